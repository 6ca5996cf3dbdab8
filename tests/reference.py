"""GaLore in plain numpy, written from the paper (arXiv 2403.03507): the oracle of the tests.

One matrix at a time, float64, no cleverness. Weights are (in, out), bases have orthonormal columns.
"""

from dataclasses import dataclass

import numpy as np


@dataclass
class Moments:
    """Adam's state of one matrix, in whatever space it lives."""

    first: np.ndarray
    second: np.ndarray
    count: int


def side_of(weight: np.ndarray) -> str:
    """`std`: the smaller side; of a square Flax kernel the in side."""
    rows, columns = weight.shape
    return "left" if rows <= columns else "right"


def project(gradient: np.ndarray, basis: np.ndarray, side: str) -> np.ndarray:
    return basis.T @ gradient if side == "left" else gradient @ basis


def lift(value: np.ndarray, basis: np.ndarray, side: str) -> np.ndarray:
    return basis @ value if side == "left" else value @ basis.T


def refreshed(gradient: np.ndarray, old: np.ndarray, side: str, method: str, rounds: int):
    """A basis of the new subspace."""
    matrix = gradient if side == "left" else gradient.T
    if method in ("svd", "eigh"):
        return np.linalg.svd(matrix, full_matrices=False)[0][:, : old.shape[1]]
    basis = old
    for _ in range(rounds):
        other, _ = np.linalg.qr(matrix.T @ basis)
        basis, _ = np.linalg.qr(matrix @ other)
    return basis


def largest_angle(one: np.ndarray, other: np.ndarray) -> float:
    """Sine of the largest principal angle between two subspaces of equal dimension."""
    return float(np.linalg.norm(one - other @ (other.T @ one), 2))


def adam(gradient: np.ndarray, moments: Moments, b1: float, b2: float, eps: float):
    """The normalised update and the new moments (optax: eps after the bias correction)."""
    count = moments.count + 1
    first = b1 * moments.first + (1 - b1) * gradient
    second = b2 * moments.second + (1 - b2) * gradient**2
    corrected = first / (1 - b1**count)
    update = corrected / (np.sqrt(second / (1 - b2**count)) + eps)
    return update, Moments(first, second, count)


def adamw_step(
    weight: np.ndarray,
    gradient: np.ndarray,
    moments: Moments,
    *,
    basis: np.ndarray | None,
    learning_rate: float,
    scale: float,
    weight_decay: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
) -> tuple[np.ndarray, Moments]:
    """One step of GaLore-AdamW; with basis None of plain AdamW, which has no scale."""
    if basis is None:
        update, moments = adam(gradient, moments, b1, b2, eps)
    else:
        side = side_of(weight)
        update, moments = adam(project(gradient, basis, side), moments, b1, b2, eps)
        update = scale * lift(update, basis, side)
    weight = weight - learning_rate * update
    return weight - learning_rate * weight_decay * weight, moments

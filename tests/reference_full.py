"""Fira and APOLLO in plain numpy, written from the papers: a continuation of `reference.py`.

One matrix at a time, float64, no cleverness. Both step along the full gradient.
"""

import numpy as np
from reference import Bases, Moments, adam, lift, project

GROWTH = 1.01


def norms(matrix: np.ndarray, bases: Bases) -> np.ndarray:
    """Of each column with a left basis, of each row with a right one."""
    return np.linalg.norm(matrix, axis=0 if "left" in bases else 1, keepdims=True)


def limited(step: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The norm-growth limiter of arXiv 2410.01623. From zero any growth is allowed."""
    norm = np.linalg.norm(step)
    if last > 0 and norm / last > GROWTH:
        step = step / norm * GROWTH * last
    return step, np.linalg.norm(step) if norm > 0 else last


def fira(gradient: np.ndarray, result: np.ndarray, bases: Bases, last: np.ndarray, method: str):
    """The direction of arXiv 2410.01623, and the norm of its step along the residual."""
    coordinates = project(gradient, bases)
    residual = gradient - lift(coordinates, bases)
    step, norm = limited(residual * norms(result, bases) / norms(coordinates, bases), last)
    return lift(result, bases) + step, norm


def apollo(gradient: np.ndarray, result: np.ndarray, bases: Bases, last: np.ndarray, method: str):
    """The direction of arXiv 2412.05270, algorithm 1; with one basis vector that of APOLLO-Mini.

    The random projection there has entries of variance 1 / rank: it is `√(size / rank)` times ours.
    """
    coordinates = project(gradient, bases)
    ((size, rank),) = [basis.shape for basis in bases.values()]
    if method == "random":
        coordinates = coordinates * np.sqrt(size / rank)
    if rank == 1:
        factors = np.linalg.norm(result) / np.linalg.norm(coordinates)
    else:
        factors = norms(result, bases) / norms(coordinates, bases)
    return limited(gradient * factors, last)


DIRECTIONS = {"fira": fira, "apollo": apollo}


def start(shape: tuple[int, ...], projected: bool) -> Moments:
    values = {"first": np.zeros(shape), "second": np.zeros(shape)}
    return Moments(values | {"norm": np.zeros(())} if projected else values, 0)


def step(
    optimizer: str,
    weight: np.ndarray,
    gradient: np.ndarray,
    moments: Moments,
    bases: Bases,
    *,
    learning_rate: float,
    scale: float,
    weight_decay: float,
    method: str,
) -> tuple[np.ndarray, Moments]:
    """One update with the decay of the weight before it; `method` is that of the refreshes."""
    decayed = weight - learning_rate * weight_decay * weight
    if not bases:
        update, moments = adam(gradient, moments, learning_rate)
        return decayed + update, moments
    result, after = adam(project(gradient, bases), moments, -1.0)
    last = moments.values["norm"]
    direction, norm = DIRECTIONS[optimizer](gradient, result, bases, last, method)
    moments = Moments(after.values | {"norm": norm}, after.count)
    return decayed - learning_rate * scale * direction, moments

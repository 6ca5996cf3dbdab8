"""GaLore in plain numpy, written from the papers: the oracle of the tests.

One matrix at a time, float64, no cleverness. Weights are (in, out), bases have orthonormal columns.
A matrix that is not projected has no bases: its gradient is its coordinates.
"""

from dataclasses import dataclass

import numpy as np

Bases = dict[str, np.ndarray]  # by side, "left" for the in axis, "right" for the out axis


@dataclass(frozen=True)
class Moments:
    """What an optimizer keeps of one matrix, in whatever space it lives.

    Attributes:
      values: "first" and "second", of the coordinates' shape; Adafactor has for the second "rows"
        and "columns", its means over the out and over the in axis. Fira and APOLLO have a "norm",
        that of the last step along the gradient.
      count: updates so far; Muon has no use for it.
    """

    values: dict[str, np.ndarray]
    count: int


def sides(shape: tuple[int, int], proj_type: str) -> set[str]:
    """`std`: the smaller side; of a square Flax kernel the in side."""
    rows, columns = shape
    std, other = ("left", "right") if rows <= columns else ("right", "left")
    return {"std": {std}, "reverse_std": {other}, "full": {"left", "right"}}.get(
        proj_type, {proj_type}
    )


def project(gradient: np.ndarray, bases: Bases) -> np.ndarray:
    if "left" in bases:
        gradient = bases["left"].T @ gradient
    return gradient @ bases["right"] if "right" in bases else gradient


def lift(value: np.ndarray, bases: Bases) -> np.ndarray:
    if "left" in bases:
        value = bases["left"] @ value
    return value @ bases["right"].T if "right" in bases else value


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
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return float(np.linalg.norm(one - other @ (other.T @ one), 2))


def after_refresh(moments: Moments, rule: str, old: Bases, new: Bases) -> Moments:
    """The moments with which a matrix takes the first update in its new bases."""
    return rotated(moments, old, new) if rule == "rotate" else moments


def rotated(moments: Moments, old: Bases, new: Bases) -> Moments:
    """A new direction is `Σⱼ Cᵢⱼ` old ones and a rest outside the old subspace.

    A first moment has nothing there. A second moment, a variance, is `Σⱼ Cᵢⱼ² Vⱼ` of uncorrelated
    coordinates; the rest, of square length `1 − Σⱼ Cᵢⱼ²`, is given the mean of the old directions.
    """
    values = dict(moments.values)
    for side in new:
        turn = new[side].T @ old[side]
        rest = 1 - np.sum(turn**2, axis=1, keepdims=True)
        variances = turn**2 + rest / len(turn)
        # Of a factored second moment only the factor along this side has its directions.
        factor = "rows" if side == "left" else "columns"
        for name, matrix in (("first", turn), ("second", variances), (factor, variances)):
            if name in values:
                value = values[name]
                values[name] = matrix @ value if side == "left" else value @ matrix.T
    return Moments(values, moments.count)


def adam(gradient, moments, learning_rate, b1=0.9, b2=0.999, eps=1e-6):
    """arXiv 1412.6980, algorithm 1."""
    count = moments.count + 1
    first = b1 * moments.values["first"] + (1 - b1) * gradient
    second = b2 * moments.values["second"] + (1 - b2) * gradient**2
    normalised = first / (1 - b1**count) / (np.sqrt(second / (1 - b2**count)) + eps)
    return -learning_rate * normalised, Moments({"first": first, "second": second}, count)


def adafactor(gradient, moments, learning_rate, b1=0.9, decay_rate=0.8, eps=1e-30, threshold=1.0):
    """arXiv 1804.04235, algorithm 4, with an absolute learning rate and momentum after it."""
    count = moments.count + 1
    decay = 1 - count**-decay_rate
    square = gradient**2 + eps
    news = {"second": square, "rows": square.mean(axis=-1), "columns": square.mean(axis=0)}
    values = {
        name: decay * value + (1 - decay) * news[name]
        for name, value in moments.values.items()
        if name != "first"
    }
    if "second" in values:
        second = values["second"]
    else:
        second = np.outer(values["rows"], values["columns"]) / values["rows"].mean()
    update = gradient / np.sqrt(second)
    update = update / max(1, np.sqrt(np.mean(update**2)) / threshold)
    first = b1 * moments.values["first"] - (1 - b1) * learning_rate * update
    return first, Moments({"first": first, **values}, count)


def lion(gradient, moments, learning_rate, b1=0.9, b2=0.99):
    """arXiv 2302.06675, algorithm 2."""
    first = moments.values["first"]
    update = -learning_rate * np.sign(b1 * first + (1 - b1) * gradient)
    return update, Moments({"first": b2 * first + (1 - b2) * gradient}, moments.count + 1)


def newton_schulz(matrix):
    """Five steps of Muon's iteration (kellerjordan.github.io/posts/muon), on the matrix itself."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / np.linalg.norm(wide)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x if wide is matrix else x.T


def muon(gradient, moments, learning_rate, beta=0.95):
    """arXiv 2502.16982, algorithm 1, with the Nesterov momentum of the post; without its scale."""
    first = beta * moments.values["first"] + (1 - beta) * gradient
    update = -learning_rate * newton_schulz(beta * first + (1 - beta) * gradient)
    return update, Moments({"first": first}, 0)


OPTIMIZERS = {"adamw": adam, "adafactor": adafactor, "lion": lion, "muon": muon}


def start(optimizer: str, shape: tuple[int, ...], projected: bool) -> Moments:
    """No moments yet. Adafactor leaves small arrays that are not projected unfactored."""
    values = {"first": np.zeros(shape)}
    if optimizer == "adafactor" and (projected or (len(shape) == 2 and min(shape) >= 128)):
        values |= {"rows": np.zeros(shape[0]), "columns": np.zeros(shape[1])}
    elif optimizer != "lion" and not (optimizer == "muon" and projected):
        values["second"] = np.zeros(shape)
    return Moments(values, 0)


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
) -> tuple[np.ndarray, Moments]:
    """One update (arXiv 2403.03507, algorithm 2), after which the whole weight decays."""
    coordinates = project(gradient, bases)
    if optimizer == "muon":
        # AdamW for what is not projected.
        optimizer, scale = (
            ("muon", scale * 0.2 * max(weight.shape) ** 0.5) if bases else ("adamw", 1)
        )
    update, moments = OPTIMIZERS[optimizer](coordinates, moments, learning_rate)
    weight = weight + (scale * lift(update, bases) if bases else update)
    return weight - learning_rate * weight_decay * weight, moments

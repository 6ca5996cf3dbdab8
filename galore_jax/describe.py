"""A table of what is projected and what that saves."""

import math
from typing import Any

import jax
import optax

from galore_jax.chain import init
from galore_jax.matrices import path_names
from galore_jax.projection import Basis
from galore_jax.state import GaLoreState, bases_of

PyTree = Any


def describe(params: PyTree, tx: optax.GradientTransformation) -> str:
    """What `tx` does with each parameter: its path, view, side, rank and the bytes saved.

    Saved is against two float32 moments of the parameter's shape, as Adam keeps; GaLore keeps the
    basis and two float32 moments of the coordinates' shape. Nothing is computed.

    Args:
      params: the parameters or their shapes.
      tx: a transformation with galore in it.

    Returns:
      A table as text, a line a leaf and a last one with the sums.

    Example:
      >>> import galore_jax, jax.numpy as jnp, optax
      >>> params = {"bias": jnp.zeros(256), "kernel": jnp.zeros((2, 64, 256))}
      >>> print(describe(params, galore_jax.chain(galore_jax.galore(8), optax.adam(1e-3))))
      path    matrices      side  rank  bytes saved
      bias    -             -        -            0
      kernel  2 x 64 x 256  left     8      225,280
      total                                 225,280
    """
    state = jax.eval_shape(lambda params: init(tx, params), params)
    is_state = lambda node: isinstance(node, GaLoreState)  # noqa: E731
    states = filter(is_state, jax.tree.leaves(state, is_leaf=is_state))
    bases = {basis.projection.path: basis for basis in bases_of(list(states))}

    rows = [("path", "matrices", "side", "rank", "bytes saved")]
    total = 0
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        names = path_names(path)
        name = "/".join(names)
        if names not in bases:
            rows.append((name, "-", "-", "-", "0"))
            continue
        projection = bases[names].projection
        view = projection.view
        saved = _bytes_saved(bases[names])
        total += saved
        sizes = " x ".join(str(size) for size in (*view.batch, view.rows, view.columns))
        rows.append((name, sizes, "+".join(projection.sides), str(projection.rank), f"{saved:,}"))
    rows.append(("total", "", "", "", f"{total:,}"))
    return _table(rows)


def _bytes_saved(basis: Basis) -> int:
    projection = basis.projection
    kept = sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(basis.vectors))
    kept += 2 * 4 * math.prod(projection.coordinates_shape)
    return 2 * 4 * math.prod(projection.view.shape) - kept


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for path, matrices, side, rank, saved in rows:
        left = f"{path:<{widths[0]}}  {matrices:<{widths[1]}}  {side:<{widths[2]}}"
        lines.append(f"{left}  {rank:>{widths[3]}}  {saved:>{widths[4]}}")
    return "\n".join(lines)

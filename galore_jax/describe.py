"""A table of what is projected and what that saves."""

from collections import Counter
from typing import Any

import jax
import optax

from galore_jax.chain import init
from galore_jax.matrices import path_names
from galore_jax.state import GaLoreState, bases_of

PyTree = Any


def describe(params: PyTree, tx: optax.GradientTransformation) -> str:
    """What `tx` does with each parameter: its path, view, side, rank and the bytes saved.

    Saved is what the optimizer's state keeps of the parameter, bases and counters included, against
    two float32 moments of its shape, as Adam keeps. Nothing is computed.

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
      kernel  2 x 64 x 256  left     8      225,236
      total                                 225,236
    """
    state = jax.eval_shape(lambda params: init(tx, params), params)
    is_state = lambda node: isinstance(node, GaLoreState)  # noqa: E731
    states = filter(is_state, jax.tree.leaves(state, is_leaf=is_state))
    bases = {basis.projection.path: basis for basis in bases_of(list(states))}

    kept = _bytes_kept(state, params)

    rows = [("path", "matrices", "side", "rank", "bytes saved")]
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        saved = 2 * 4 * leaf.size - kept[path]
        total += saved
        sizes = side = rank = "-"
        if path_names(path) in bases:
            projection = bases[path_names(path)].projection
            view, rank = projection.view, str(projection.rank)
            sizes = " x ".join(str(size) for size in (*view.batch, view.rows, view.columns))
            side = "+".join(projection.sides)
        rows.append(("/".join(path_names(path)), sizes, side, rank, f"{saved:,}"))
    rows.append(("total", "", "", "", f"{total:,}"))
    return _table(rows)


def _bytes_kept(state: PyTree, params: PyTree) -> Counter:
    """By path of a parameter, the bytes of all that a state keeps at that path."""
    paths = {path for path, _ in jax.tree_util.tree_leaves_with_path(params)}

    def owner(path: tuple) -> tuple | None:
        return next((path[n:] for n in range(len(path)) if path[n:] in paths), None)

    pieces = jax.tree_util.tree_leaves_with_path(
        state, is_leaf=lambda path, _: owner(path) is not None, is_leaf_takes_path=True
    )
    kept = Counter()
    for path, piece in pieces:
        kept[owner(path)] += sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(piece))
    return kept


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for path, matrices, side, rank, saved in rows:
        left = f"{path:<{widths[0]}}  {matrices:<{widths[1]}}  {side:<{widths[2]}}"
        lines.append(f"{left}  {rank:>{widths[3]}}  {saved:>{widths[4]}}")
    return "\n".join(lines)

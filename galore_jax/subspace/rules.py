"""Rules by path: which leaf is projected, on which side, into how many dimensions."""

import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any

import jax
import numpy as np

from galore_jax.subspace.basis import MAX_GAP
from galore_jax.subspace.matrix_view import (
    MatrixView,
    is_named_whole,
    is_no_weight,
    matrix_views,
    named_leaves,
)
from galore_jax.subspace.methods import REFRESH
from galore_jax.subspace.projection import (
    PROJ_TYPES,
    Projection,
    ProjType,
    is_coordinates,
    projected_sides,
)
from galore_jax.types import PyTree

Rank = int | float | Callable[[tuple[int, int]], int]


@dataclass(frozen=True)
class Rule:
    """How the leaves that a pattern matches are projected; None: as `galore` says for all.

    Attributes:
      rank: a number, a fraction of the smaller side, or a function of the matrix's shape (in, out)
        that returns a number.
      proj_type: "std", "reverse_std", "left", "right" or "full".
      scale: factor of the lifted update.
      update_proj_gap: updates between refreshes.
      refresh: a method of `galore`.

    Raises:
      ValueError: a value that is out of range.
    """

    rank: Rank | None = None
    proj_type: ProjType | None = None
    scale: Any = None
    update_proj_gap: Any = None
    refresh: str | None = None

    def __post_init__(self):
        rank: Any = self.rank
        whole = isinstance(rank, Integral) and not isinstance(rank, bool) and int(rank) >= 1
        part = isinstance(rank, float) and 0 < rank < 1
        if not (rank is None or whole or part or callable(rank)):
            raise ValueError(
                f"galore: rank must be an integer of at least 1, a fraction of the smaller side or "
                f"a function of the shape, not {rank!r}; optax.inject_hyperparams needs "
                'static_args="rank".'
            )
        if self.proj_type not in (None, *PROJ_TYPES):
            raise ValueError(
                f"galore: proj_type must be one of {', '.join(PROJ_TYPES)}, not {self.proj_type!r}."
            )
        check_number("scale", self.scale, "positive and finite", lambda scale: 0 < scale < math.inf)
        check_gap("update_proj_gap", self.update_proj_gap)
        if self.refresh not in (None, *REFRESH):
            raise ValueError(
                f"galore: refresh must be one of {', '.join(REFRESH)}, not {self.refresh!r}."
            )

    def or_else(self, other: "Rule") -> "Rule":
        """This rule with the other's values where it has none."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        given = {name: value for name, value in own.items() if value is not None}
        return Rule(**{field.name: getattr(other, field.name) for field in fields(self)} | given)


def check_number(name: str, value: Any, wanted: str, holds: Callable[[Any], bool]) -> None:
    """Refuses a setting of galore unless it is a number for which `holds`.

    None stands for a default, and an array, which may be traced, for itself.

    Raises:
      ValueError: says what is `wanted`.
    """
    if value is None or isinstance(value, jax.Array | np.ndarray):
        return
    if isinstance(value, bool) or not isinstance(value, Real) or not holds(value):
        raise ValueError(f"galore: {name} must be {wanted}, not {value!r}.")


def check_gap(name: str, gap: Any) -> None:
    """`check_number` for a number of updates between two refreshes."""
    wanted = f"a whole number from 1 to {MAX_GAP:,}"
    in_range = lambda gap: isinstance(gap, Integral) and 1 <= int(gap) <= MAX_GAP
    check_number(name, gap, wanted, in_range)


Rules = Mapping[str | re.Pattern[str], Rule | None]


def rule_for(path: tuple[str, ...], rules: Rules) -> tuple[str | re.Pattern[str], Rule | None]:
    """The first pattern that matches a path, and its rule; ("", Rule()) where none does."""
    name = "/".join(path)
    for pattern, rule in rules.items():
        if pattern.search(name) if isinstance(pattern, re.Pattern) else fnmatchcase(name, pattern):
            return pattern, rule
    return "", Rule()


def projections(
    params: PyTree, default: Rule, rules: Rules, weight_dimension_numbers: PyTree
) -> PyTree:
    """The `Projection` of each leaf, or None where it stays whole.

    Args:
      params: any pytree of arrays or of their shapes; `Coordinates` in it keep their projection.
      default: the rule of leaves that no pattern matches.
      rules: by pattern (a glob whose * also matches /, or a compiled regular expression, searched)
        of the path; None leaves whole. The first match wins.
      weight_dimension_numbers: see `matrix_views`.

    Returns:
      A tree like `params`.

    Raises:
      ValueError: a rule without a leaf of its own; a rank, or dimension numbers, that do not fit
        the leaf that is named.
    """
    leaves, tree = named_leaves(params, is_coordinates), jax.tree.structure(params, is_coordinates)
    if any(is_coordinates(leaf) for _, leaf in leaves):
        # Decided before: what is projected came as coordinates.
        known = [leaf.projection if is_coordinates(leaf) else None for _, leaf in leaves]
        return jax.tree_util.tree_unflatten(tree, known)
    views = tree.flatten_up_to(matrix_views(params, weight_dimension_numbers))
    chosen_by_name = weight_dimension_numbers is None
    unused = dict(rules)
    found = []
    for (names, _), view in zip(leaves, views, strict=True):
        pattern, rule = rule_for(names, rules)
        if chosen_by_name and (is_no_weight(names) or (not pattern and is_named_whole(names))):
            view = None
        if rule is None or view is not None:
            unused.pop(pattern, None)
        if rule is None or view is None:
            found.append(None)
        else:
            found.append(_projection(names, view, rule, rule.or_else(default)))
    _check_used(unused, ["/".join(names) for names, _ in leaves], rules)
    return jax.tree_util.tree_unflatten(tree, found)


def warn_of_no_projection(params: PyTree, rules: Rules, weight_dimension_numbers: PyTree) -> None:
    """Warns that none of the matrices is projected, where there are any.

    Those that a rule or dimension numbers of None leave whole do not count.
    """
    views = matrix_views(params, weight_dimension_numbers)
    sizes = {
        names: (min(view.rows, view.columns), view)
        for names, view in named_leaves(views)
        if not is_no_weight(names) and rule_for(names, rules)[1] is not None
    }
    if sizes:
        names = max(sizes, key=lambda names: sizes[names][0])
        view = sizes[names][1]
        warnings.warn(
            f"galore projects no parameter: the smaller side of each matrix is not larger than the "
            f"rank, or its name keeps it whole (as {'/'.join(names)}, {view.rows} x "
            f"{view.columns}). Choose a smaller rank, or give a Rule for what to project.",
            stacklevel=2,
        )


def _projection(
    names: tuple[str, ...], view: MatrixView, rule: Rule, settings: Rule
) -> Projection | None:
    name, smaller = "/".join(names), min(view.rows, view.columns)
    rank: Any = settings.rank
    if isinstance(rank, float):
        rank = max(1, round(rank * smaller))
    elif callable(rank):
        rank = rank((view.rows, view.columns))
        if not isinstance(rank, Integral) or rank < 1:
            raise ValueError(
                f"galore: the function for the rank returned {rank!r} for {name}, a matrix of "
                f"{view.rows} x {view.columns}: return an integer of at least 1."
            )
    if rank < smaller:
        return Projection(names, view, projected_sides(settings.proj_type, view), int(rank))  # type: ignore[arg-type]
    if rule.rank is None:
        return None
    raise ValueError(
        f"galore: a rule gives {name}, a matrix of {view.rows} x {view.columns}, the rank {rank}: "
        f"give less than {smaller}, or None in place of the rule to leave it whole."
    )


def _check_used(unused: Rules, names: list[str], rules: Rules) -> None:
    for pattern in unused:
        text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
        matched = [name for name in names if rule_for((name,), {pattern: None})[0]]
        near = get_close_matches(text, names, n=3, cutoff=0.3)
        if not matched:
            reason = (
                f"no leaf has such a path; there are for instance {', '.join(near or names[:3])}"
            )
        elif all(rule_for((name,), rules)[0] != pattern for name in matched):
            reason = "every leaf that it matches is taken by an earlier rule; put it first"
        else:
            reason = f"what it matches is no matrix, as {matched[0]}"
        raise ValueError(f"galore: the rule {text!r} has no leaf of its own: {reason}.")

"""Rules by path: which leaves are projected, on which side and to which rank."""

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
    is_bias_or_scale,
    is_unprojected_by_name,
    matrix_views,
    named_leaves,
)
from galore_jax.subspace.new_basis import REFRESH
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
    """How the leaves that match a pattern are projected; None stands for the setting of `galore`.

    Attributes:
      rank: an integer, a fraction of the smaller side, or a function from the matrix's shape
        (in, out) to an integer.
      proj_type: "std", "reverse_std", "left", "right" or "full".
      scale: factor of the lifted update.
      update_proj_gap: number of updates between refreshes.
      refresh: how refreshes compute the basis, as in `galore`.

    Raises:
      ValueError: a value is out of range.
    """

    rank: Rank | None = None
    proj_type: ProjType | None = None
    scale: Any = None
    update_proj_gap: Any = None
    refresh: str | None = None

    def __post_init__(self):
        rank: Any = self.rank
        is_integer = isinstance(rank, Integral) and not isinstance(rank, bool) and int(rank) >= 1
        is_fraction = isinstance(rank, Real) and 0 < float(rank) < 1
        if not (rank is None or is_integer or is_fraction or callable(rank)):
            hint = f"; {static_hint('rank')}" if isinstance(rank, jax.Array | np.ndarray) else ""
            raise ValueError(
                "galore: rank must be an integer of at least 1, a fraction of the smaller side or "
                f"a function of the shape, not {rank!r}{hint}."
            )
        if self.proj_type not in (None, *PROJ_TYPES):
            raise ValueError(
                f"galore: proj_type must be one of {', '.join(PROJ_TYPES)}, not {self.proj_type!r}."
            )
        check_number("scale", self.scale, "positive and finite", lambda scale: 0 < scale < math.inf)
        check_number(
            "update_proj_gap",
            self.update_proj_gap,
            f"a whole number from 1 to {MAX_GAP:,}",
            lambda gap: isinstance(gap, Integral) and 1 <= int(gap) <= MAX_GAP,
        )
        if self.refresh not in (None, *REFRESH):
            raise ValueError(
                f"galore: refresh must be one of {', '.join(REFRESH)}, not {self.refresh!r}."
            )

    def or_else(self, other: "Rule") -> "Rule":
        """This rule, with the settings that are None taken from another rule."""
        settings = {}
        for field in fields(self):
            value = getattr(self, field.name)
            settings[field.name] = getattr(other, field.name) if value is None else value
        return Rule(**settings)


def check_number(name: str, value: Any, expected: str, is_valid: Callable[[Any], bool]) -> None:
    """Checks that a setting of galore is a number for which `is_valid` returns True.

    None, which stands for a default, and arrays, which may be traced, are not checked.

    Args:
      name: name of the setting.
      value: value of the setting.
      expected: describes valid values, for the error message.
      is_valid: whether a number is valid.

    Raises:
      ValueError: the value is not a number, or is not valid.
    """
    if value is None or isinstance(value, jax.Array | np.ndarray):
        return
    if isinstance(value, bool) or not isinstance(value, Real) or not is_valid(value):
        raise ValueError(f"galore: {name} must be {expected}, not {value!r}.")


def static_hint(name: str) -> str:
    """The remedy if optax.inject_hyperparams made an array of a setting."""
    return f'add "{name}" to the static_args of optax.inject_hyperparams'


Rules = Mapping[str | re.Pattern[str], Rule | None]


def rule_for(path: tuple[str, ...], rules: Rules) -> tuple[str | re.Pattern[str], Rule | None]:
    """The first pattern that matches a path, and its rule; ("", Rule()) if none matches."""
    name = "/".join(path)
    for pattern, rule in rules.items():
        if matches(pattern, name):
            return pattern, rule
    return "", Rule()


def matches(pattern: str | re.Pattern[str], name: str) -> bool:
    """Whether a pattern, a glob in which * also matches / or a regular expression, fits a path."""
    if isinstance(pattern, re.Pattern):
        return pattern.search(name) is not None
    return fnmatchcase(name, pattern)


def projections(
    params: PyTree,
    default: Rule,
    rules: Rules,
    weight_dimension_numbers: PyTree,
) -> PyTree:
    """Determines the `Projection` of each leaf, or None if it is not projected.

    Args:
      params: any pytree of arrays or of their shapes; `Coordinates` in it keep their projection.
      default: settings for leaves that no pattern matches, and for whatever a rule leaves out.
      rules: a mapping from patterns of the path to a `Rule`, or to None not to project. A pattern
        is a glob, in which * also matches /, or a compiled regular expression to search for. The
        first match wins.
      weight_dimension_numbers: see `matrix_views`.

    Returns:
      A tree like `params`.

    Raises:
      ValueError: a rule that applies to no leaf; a rank or dimension numbers that do not fit a
        leaf, which is named; or two leaves with one path.
    """
    leaves, tree = named_leaves(params, is_coordinates), jax.tree.structure(params, is_coordinates)
    if any(is_coordinates(leaf) for _, leaf in leaves):
        # The projected leaves are known: they are the ones given as coordinates.
        existing = [leaf.projection if is_coordinates(leaf) else None for _, leaf in leaves]
        return jax.tree_util.tree_unflatten(tree, existing)

    # Apply the first matching rule to each leaf that is a matrix.
    views = tree.flatten_up_to(matrix_views(params, weight_dimension_numbers))
    chosen_by_name = weight_dimension_numbers is None
    unused = dict(rules)
    result = []
    for (names, _), view in zip(leaves, views, strict=True):
        pattern, rule = rule_for(names, rules)
        if chosen_by_name and (
            is_bias_or_scale(names) or (not pattern and is_unprojected_by_name(names))
        ):
            view = None
        if rule is None or view is not None:
            unused.pop(pattern, None)
        if rule is None or view is None:
            result.append(None)
        else:
            result.append(projection_of(names, view, rule, default))
    _check_all_used(unused, ["/".join(names) for names, _ in leaves])
    _check_paths_differ(result)
    return jax.tree_util.tree_unflatten(tree, result)


def _check_paths_differ(found: list[Projection | None]) -> None:
    """Coordinates belong to a parameter by its path, which a key with a slash can imitate."""
    paths = set()
    for projection in filter(None, found):
        if projection.path in paths:
            raise ValueError(
                f"galore: two parameters have the path {projection.name}: rename one of them."
            )
        paths.add(projection.path)


def warn_if_nothing_projected(
    params: PyTree, rules: Rules, weight_dimension_numbers: PyTree
) -> None:
    """Warns that no parameter is projected, if there are any matrices that could be.

    Matrices for which a rule or the dimension numbers are None do not count.
    """
    views = matrix_views(params, weight_dimension_numbers)
    sizes = {
        names: (min(view.rows, view.columns), view)
        for names, view in named_leaves(views)
        if not is_bias_or_scale(names) and rule_for(names, rules)[1] is not None
    }
    if sizes:
        names = max(sizes, key=lambda names: sizes[names][0])
        view = sizes[names][1]
        warnings.warn(
            "galore projects no parameter: the smaller side of each matrix is not larger than the "
            "rank, or the matrix is excluded by its name (for example "
            f"{'/'.join(names)}, {view.rows} x {view.columns}). Choose a smaller rank, or give a "
            "Rule for the leaves to project.",
            stacklevel=2,
        )


def projection_of(
    names: tuple[str, ...], view: MatrixView, rule: Rule, default: Rule
) -> Projection | None:
    """The projection of a leaf with this path and view, or None if its rank is not small enough.

    Raises:
      ValueError: a rank that does not fit it.
    """
    settings = rule.or_else(default)
    name, smaller = "/".join(names), min(view.rows, view.columns)
    rank: Any = settings.rank
    if isinstance(rank, Real) and not isinstance(rank, Integral):
        rank = max(1, round(float(rank) * smaller))
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
        f"choose a rank below {smaller}, or give None in place of the rule not to project it."
    )


def _check_all_used(unused: Rules, names: list[str]) -> None:
    for pattern in unused:
        text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
        similar = get_close_matches(text, names, n=3, cutoff=0.3)
        raise ValueError(
            f"galore: the rule {text!r} applies to no leaf: it matches no matrix, or an earlier "
            f"rule takes what it matches; existing paths include {', '.join(similar or names[:3])}."
        )

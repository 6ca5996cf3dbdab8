"""The settings of `galore`: what they may be, and the bases that follow from them."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from galore_jax.ops.implementation import Implementation, check_implementation
from galore_jax.ops.quantization import Quantized
from galore_jax.subspace.basis import AGE_UNINITIALIZED, Basis, in_buffer_of, path_hash
from galore_jax.subspace.matrix_view import unboxed
from galore_jax.subspace.new_basis import random_basis
from galore_jax.subspace.projection import (
    MOMENTS,
    Moments,
    Projection,
    ProjType,
    Side,
    is_coordinates,
)
from galore_jax.subspace.rules import (
    Rank,
    Rule,
    check_number,
    projection_of,
    projections,
    rule_for,
    warn_if_nothing_projected,
)
from galore_jax.types import PyTree

Make = TypeVar("Make", bound=Callable[..., optax.GradientTransformation])

BASIS_DTYPES = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.int8, jnp.int4)))


@dataclass(frozen=True)
class Settings:
    """The arguments of `galore`, which documents them.

    Raises:
      ValueError: a setting out of range.
    """

    rank: Rank
    update_proj_gap: Any = 200
    scale: Any = 0.25
    proj_type: ProjType = "std"
    refresh: str = "subspace_iteration"
    weight_dimension_numbers: PyTree = None
    rules: Any = None
    moments: Moments = "keep"
    lazy_overlap: Any = None
    basis_dtype: Any = None
    implementation: Implementation = "xla"
    seed: Any = 0
    # The settings of leaves that no rule matches.
    default: Rule = field(init=False)

    def __post_init__(self):
        rules = {} if self.rules is None else self.rules
        is_rules = isinstance(rules, Mapping) and all(
            isinstance(rule, Rule | None) for rule in rules.values()
        )
        if not is_rules:
            raise ValueError(
                "galore: rules must map patterns to galore_jax.Rule, or to None not to project "
                f"their leaves, not {rules!r}."
            )
        if self.moments not in MOMENTS:
            raise ValueError(
                f"galore: moments must be one of {', '.join(MOMENTS)}, not {self.moments!r}."
            )
        check_number(
            "lazy_overlap", self.lazy_overlap, "above 0 and at most 1", lambda x: 0 < x <= 1
        )
        check_implementation(self.implementation)
        check_number("seed", self.seed, "a whole number", lambda seed: isinstance(seed, Integral))
        # A copy, so that later changes of the user's mapping change nothing here.
        object.__setattr__(self, "rules", dict(rules))
        object.__setattr__(self, "basis_dtype", _basis_dtype(self.basis_dtype))
        default = Rule(self.rank, self.proj_type, self.scale, self.update_proj_gap, self.refresh)
        object.__setattr__(self, "default", default)

    def rule_of(self, path: tuple[str, ...]) -> Rule:
        """The complete rule of a projected leaf."""
        return (rule_for(path, self.rules)[1] or Rule()).or_else(self.default)

    def start_bases(self, params: PyTree) -> PyTree:
        """Random bases, which the first finite gradients replace.

        Args:
          params: the parameters or, after another galore, their `Coordinates`.

        Returns:
          The tree of the parameters without boxes, with a `Basis` for projected leaves and
          `optax.MaskedNode()` for the others.

        Raises:
          ValueError: a rule that matches no leaf; a rank, a rule or dimension numbers that do not
            fit a leaf, which is named.

        Warns:
          UserWarning: there are matrices, but none is projected.
        """
        leaves, tree = jax.tree.flatten(params, is_leaf=is_coordinates)
        if not leaves:  # A placeholder, as `optax.tree.map_params` uses.
            return params
        found = projections(params, self.default, self.rules, self.weight_dimension_numbers)
        leaf_projections = tree.flatten_up_to(found)
        if not any(leaf_projections):
            warn_if_nothing_projected(params, self.rules, self.weight_dimension_numbers)
        bases = [
            optax.MaskedNode()
            if projection is None
            else self._start_basis(projection, full_size=not is_coordinates(leaf))
            for leaf, projection in zip(leaves, leaf_projections, strict=True)
        ]
        # Without boxes: the axis names in them are the parameter's, not those of a basis.
        tree = jax.tree.structure(unboxed(params), is_leaf=is_coordinates)
        return jax.tree.unflatten(tree, bases)

    def _start_basis(self, projection: Projection, *, full_size: bool) -> Basis:
        rule, batch = self.rule_of(projection.path), projection.view.batch

        # Draw the vectors.
        key = jax.random.fold_in(jax.random.key(self.seed), path_hash(projection))
        vectors: dict[Side, Any] = {}
        for i, (side, shape) in enumerate(projection.basis_shapes.items()):
            vectors[side] = random_basis(jax.random.fold_in(key, i), shape, self.basis_dtype)

        # Start the schedule and the counters. Numbers that may be arrays among the settings are
        # copied: they would otherwise be donated once for each leaf.
        return Basis(
            vectors=vectors,
            number=jnp.arange(math.prod(batch), dtype=jnp.int32).reshape(batch),
            age=jnp.full(batch, AGE_UNINITIALIZED, jnp.int32),
            gap=jnp.array(jnp.full(batch, rule.update_proj_gap, jnp.int32)),
            wait=jnp.zeros(batch, jnp.int32),
            refreshed=jnp.zeros(batch, bool),
            finite=jnp.ones(batch, bool),
            skipped=jnp.zeros(batch, jnp.int32),
            saved=jnp.zeros(batch, jnp.int32),
            overlap=jnp.zeros(batch, jnp.float32),
            scale=jnp.array(rule.scale, jnp.float32),
            interval=jnp.array(rule.update_proj_gap, jnp.int32),
            projection=projection,
            method=str(rule.refresh),
            moments=self.moments,
            full_size=full_size,
            implementation=self.implementation,
        )

    def overlap_and_seed(self) -> tuple[jax.Array | None, jax.Array]:
        """The lazy overlap and the seed, as the state keeps them for `galore_jax.refresh`.

        They are copies, as arrays among the settings outlive a donated state.
        """
        lazy = None if self.lazy_overlap is None else jnp.array(self.lazy_overlap, jnp.float32)
        seed = self.seed if isinstance(self.seed, jax.Array) else int(self.seed) % 2**32
        return lazy, jnp.array(seed, jnp.uint32)

    def applied_to(self, basis: Basis) -> Basis:
        """The basis with the current scale and gap, which may be hyperparameters that change.

        Raises:
          ValueError: the basis was started with other settings than these.
        """
        self._check_started_with_these(basis)
        rule = self.rule_of(basis.projection.path)
        current = lambda old, new: in_buffer_of(old, jnp.asarray(new, old.dtype))
        return dataclasses.replace(
            basis,
            scale=current(basis.scale, rule.scale),
            interval=current(basis.interval, rule.update_proj_gap),
        )

    def _check_started_with_these(self, basis: Basis) -> None:
        found, (_, rule) = basis.projection, rule_for(basis.projection.path, self.rules)
        wanted = rule and projection_of(found.path, found.view, rule, self.default)
        stored = next(iter(basis.vectors.values()))
        stored = stored.code if isinstance(stored, Quantized) else stored.dtype.name
        pairs: dict[str, tuple[Any, Any]] = {
            "rank": (found.rank, wanted and wanted.rank),
            "sides": (found.sides, wanted and wanted.sides),
            "refresh": (basis.method, self.rule_of(found.path).refresh),
            "moments": (basis.moments, self.moments),
            "basis_dtype": (stored, self.basis_dtype.name),
            "implementation": (basis.implementation, self.implementation),
        }
        for name, (old, new) in pairs.items():
            if old != new:
                raise ValueError(
                    f"galore: the state of {found.name} was started with {name} = {old!r}, which "
                    f"is {new!r} here: use the optimizer that it was started with, or start anew."
                )


def _basis_dtype(basis_dtype: Any) -> jnp.dtype:
    with suppress(TypeError):  # not a dtype
        found = jnp.dtype(jnp.float32 if basis_dtype is None else basis_dtype)
        if found in BASIS_DTYPES:
            return found
    names = ", ".join(dtype.name for dtype in BASIS_DTYPES)
    raise ValueError(f"galore: basis_dtype must be one of {names}, not {basis_dtype!r}.")


def with_settings_of_galore(make: Make) -> Make:
    """Replaces `**settings` in the signature of an optimizer by the arguments of galore.

    `optax.inject_hyperparams` reads from the signature what can be a hyperparameter.
    """
    signature = inspect.signature(make)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    names = {p.name for p in own}
    for parameter in inspect.signature(Settings).parameters.values():
        if parameter.name not in names:
            own.append(parameter.replace(kind=parameter.KEYWORD_ONLY))
    make.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    return make

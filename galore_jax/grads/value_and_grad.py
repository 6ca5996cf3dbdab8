"""`value_and_grad` for training with galore: gradients that the backward pass projects.

`Passes` traces the loss once and runs it on each part of the batch. In the traced loss,
`grads.jaxpr` replaces products with projected parameters by the `projected_product`, whose backward
pass gives coordinates in place of the parameter's gradient.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from galore_jax.grads.data_parallel import leaves_of, mean_over_shards
from galore_jax.grads.jaxpr import Program
from galore_jax.grads.micro_batches import mean_over
from galore_jax.grads.projected_product import Tracked, track, varying_as
from galore_jax.ops.int8 import is_int8, place_of, places_of, with_place, with_places
from galore_jax.ops.partition import AxisNames, explicit_mesh, names_of, specs_of, with_auto_axes
from galore_jax.optim.galore_state import (
    bases_of,
    galore_states,
    is_low_rank,
    is_parameter,
    map_bases,
)
from galore_jax.subspace.basis import Basis, is_basis
from galore_jax.subspace.matrix_view import unboxed
from galore_jax.subspace.new_basis import EXACT
from galore_jax.subspace.placement import constrain, coordinates_partition
from galore_jax.subspace.projection import Coordinates
from galore_jax.types import PyTree

Names = tuple[str, ...]
Loss = Callable[..., Any]


def value_and_grad(
    loss: Loss,
    *,
    has_aux: bool = False,
    micro_batches: int = 1,
    data_axes: AxisNames = (),
) -> Callable[..., tuple[Any, PyTree]]:
    """`jax.value_and_grad` with gradients projected in the backward pass, for `apply_gradients`.

    The gradients of projected parameters are `Coordinates` in float32, equal to the projected full
    gradients up to the rounding of the loss's dtype. Where the loss multiplies by a parameter, they
    take `r · (in + out) / (in · out)` of the work, and the full gradient is never formed. Any other
    use of the parameter contributes its full gradient, which is then projected and added. A
    projected parameter that the loss never multiplies by, such as the kernel of a convolution, gets
    a full gradient instead of coordinates, which galore then projects. `describe(params, tx, loss,
    *batch)` shows which case applies to each parameter, and why.

    Bases do not change here: until the first `refresh` they are random.

    Args:
      loss: a function of the parameters and a batch that JAX can trace, as under `jax.jit`, with a
        model in Flax, Equinox, Haiku or plain JAX.
      has_aux: whether the loss returns a pair, the second part of which is not differentiated.
      micro_batches: number of equal parts into which each array of the batch is split along its
        first axis: part i has the rows i, i + micro_batches, … . Loss, aux and gradients are then
        means over the parts, in float32 or wider, but PRNG keys and unsigned integers in the aux
        are those of the last part; projected gradients are accumulated as coordinates.
      data_axes: mesh axes that divide the batch along its first axis, but no parameter. Each device
        then computes loss, aux and gradients of its shard, split into micro-batches, and they are
        averaged over the shards once: in float32, as coordinates. Other mesh axes stay as they are.
        Without this XLA sums gradients over the devices in every micro-batch.

    Returns:
      A function `(params, opt_state, *batch, **unsplit)` that returns the loss (with has_aux the
      pair) and a tree of gradients like the parameters. Keyword arguments are not split: every
      micro-batch gets the whole of them.

    Raises:
      ValueError: the optimizer has no galore, was started with full-size moments or with other
        parameters; the batch cannot be split; there is no mesh with the `data_axes`, or they divide
        a parameter.
      TypeError: the loss does not return a number or, with has_aux, a pair.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from galore_jax import apply_gradients, chain, galore, refresh, refresh_due
      >>> from galore_jax import value_and_grad
      >>> loss = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
      >>> params, x = {"w": jnp.ones((8, 16))}, jnp.ones((4, 8))
      >>> tx = chain(galore(rank=2), optax.adam(1e-3))
      >>> state = tx.init(params)
      >>> if refresh_due(state):
      ...     state = refresh(loss)(params, state, x)
      >>> value, grads = value_and_grad(loss)(params, state, x)
      >>> grads["w"].value.shape
      (2, 16)
      >>> params, state = apply_gradients(tx, grads, state, params)
    """

    def run(params: PyTree, opt_state: PyTree, *batch: Any, **unsplit: Any) -> tuple[Any, PyTree]:
        bases = bases_in(params, opt_state)
        passes = Passes(loss, params, bases, batch, unsplit, has_aux, micro_batches, data_axes)
        return passes.value_and_grad(bases)

    return run


class Uses(NamedTuple):
    """How a loss uses a projected parameter.

    Attributes:
      gradient: where it is projected: "projected" in the backward pass; "partly" there, if the loss
        uses the parameter in other ways too; "full" if it never multiplies by it.
      reasons: why a part of it is not projected there: the primitives that use the parameter in
        another way, each with its line of the source.
    """

    gradient: Literal["projected", "partly", "full"]
    reasons: tuple[str, ...]


@dataclass(eq=False)
class Passes:
    """Passes of a loss over a batch, part by part; the loss is traced once for all of them.

    Attributes:
      loss: as for `value_and_grad`, like `has_aux`, `micro_batches` and `data_axes`.
      params: the parameters.
      bases: from `bases_in`, or from `no_bases` for full gradients.
      batch: the loss's other positional arguments.
      unsplit: its keyword arguments.
      uses: how the loss uses each projected parameter, by path; empty before the first pass.
      eps: the largest machine epsilon of the dtypes in which it computes; 0 before the first pass.
    """

    loss: Loss
    params: PyTree
    bases: PyTree
    batch: Sequence[Any]
    unsplit: Mapping[str, Any]
    has_aux: bool
    micro_batches: int = 1
    data_axes: AxisNames = ()
    uses: dict[Names, Uses] = field(default_factory=dict, init=False)
    eps: float = field(default=0.0, init=False)
    _programs: dict[Any, Program] = field(default_factory=dict, init=False)

    def value_and_grad(self, bases: PyTree) -> tuple[Any, PyTree]:
        """The value of the loss (with has_aux the pair) and its gradients, in the given bases.

        The gradients are `Coordinates` for parameters with a basis, but full for those that the
        loss never multiplies by.
        """

        def of_part(part: _Part, bases: PyTree) -> tuple[tuple, PyTree]:
            pair, gradients = self._differentiate(part, bases, everything=True)
            return pair, jax.tree.structure(self.params, is_leaf=is_int8).unflatten(gradients)

        pair, gradients = self._mean(of_part, bases)
        return pair if self.has_aux else pair[0], constrain(gradients)

    def coordinates(self, bases: PyTree) -> dict[Names, jax.Array]:
        """Coordinates of the gradients, by path: no other gradients, and no value.

        The given bases may be some of its own or replacements for them. Parameters that the loss
        never multiplies by are left out.
        """

        def of_part(part: _Part, bases: PyTree) -> dict[Names, Coordinates]:
            _, gradients = self._differentiate(part, bases, everything=False)
            return {g.projection.path: g for g in gradients if isinstance(g, Coordinates)}

        means = constrain(self._mean(of_part, bases))
        return {path: node.value for path, node in means.items()}

    def find_uses(self) -> dict[Names, Uses]:
        """How the loss uses each projected parameter, by path; nothing is computed."""
        jax.eval_shape(lambda: self._mean(lambda part, _: jnp.zeros([]), None))
        return self.uses

    def _mean(self, of_part: Callable[["_Part", PyTree], PyTree], given: PyTree) -> PyTree:
        """The mean of `of_part(part, given)` over the micro-batches of all shards."""
        # On an Explicit mesh, what runs on shards must not use arrays from outside.
        arrays, with_arrays = leaves_of(jax.Array, self.unsplit)

        def of_shard(operands: tuple[PyTree, PyTree, Any, PyTree], *shard: Any) -> PyTree:
            params, bases, arrays, given = operands
            unsplit = with_arrays(arrays)
            mean = lambda *part: of_part(self._part(params, bases, part, unsplit), given)
            return mean_over(mean, self.micro_batches, *shard)

        operands = self.params, self.bases, arrays, given
        return mean_over_shards(of_shard, names_of(self.data_axes), operands, *self.batch)

    def _part(self, params: PyTree, bases: PyTree, batch: Any, unsplit: Any) -> "_Part":
        """The loss on a part of the batch; it is traced only for the first of equal types."""
        # What is known here stays known to the loss, such as a number on which it branches.
        divided = self.micro_batches > 1 or bool(self.data_axes)
        arrays, with_arrays = leaves_of(Tracer if divided else (), (batch, unsplit))

        def pair(operands: tuple[PyTree, Any]) -> tuple[Any, Any]:
            params, (batch, unsplit) = operands[0], with_arrays(operands[1])
            returned = self.loss(params, *batch, **unsplit)
            value, aux = returned if self.has_aux else (returned, None)
            if value is None:
                raise TypeError("the loss must return a number, not None.")
            return value, aux

        leaves, tree = jax.tree.flatten(params, is_leaf=is_int8)
        leaves = with_places(leaves, places_of(leaves))
        operands = tree.unflatten(leaves), arrays
        flat, structure = jax.tree.flatten(operands)
        key = structure, *map(jax.typeof, flat), jax.sharding.get_abstract_mesh()
        part = partial(_Part, leaves=leaves, arrays=jax.tree.leaves(arrays))
        if key not in self._programs:
            self._programs[key] = program = Program(pair, operands)
            self.eps = max(self.eps, program.eps)
            self.uses |= self._find_uses(part(program), bases)
        return part(self._programs[key])

    def _find_uses(self, part: "_Part", bases: PyTree) -> dict[Names, Uses]:
        by_leaf, opaque = self._by_leaf(bases), part.program.opaque
        # By path, the reasons; None stands for a projected product.
        found: dict[Names, dict[str | None, None]] = {
            basis.projection.path: {opaque: None} if opaque else {} for basis in by_leaf.values()
        }

        def evaluate() -> jax.Array:
            tracked = _tracked(part.leaves, by_leaf, _zeros(part.places, by_leaf))
            report = lambda path, reason: found[path].update({reason: None})
            return part.program.number([*tracked, *part.arrays], report)

        def uses(found: dict[str | None, None]) -> Uses:
            reasons = tuple(reason for reason in found if reason is not None)
            return Uses(
                "projected" if not reasons else "partly" if None in found else "full", reasons
            )

        if not opaque:
            jax.eval_shape(evaluate)
        return {path: uses(reasons) for path, reasons in found.items()}

    def _by_leaf(self, bases: PyTree) -> dict[int, Basis]:
        """The bases by the index of the parameter's leaf."""
        structure = jax.tree.structure(unboxed(self.params), is_leaf=is_int8)
        nodes = structure.flatten_up_to(unboxed(bases))
        return {i: node for i, node in enumerate(nodes) if is_basis(node)}

    def _differentiate(
        self, part: "_Part", bases: PyTree, *, everything: bool
    ) -> tuple[tuple, list[Any]]:
        """The loss's pair, and the gradients of leaves with a basis, or of everything."""
        by_leaf = self._by_leaf(bases)
        uses = {i: self.uses[basis.projection.path] for i, basis in by_leaf.items()}
        projected = {i: basis for i, basis in by_leaf.items() if uses[i].gradient != "full"}
        # Some projected leaves also need the ordinary gradient of their other uses.
        needs_full = lambda i: bool(uses[i].reasons) if i in projected else everything
        full_leaves = {i: place for i, place in enumerate(part.places) if needs_full(i)}

        def value(full: dict[int, Any], coordinates: dict[int, Any]) -> tuple[Any, Any]:
            at_leaf = lambda i, leaf: with_place(leaf, full[i]) if i in full else leaf
            leaves = [at_leaf(i, leaf) for i, leaf in enumerate(part.leaves)]
            return part.program([*_tracked(leaves, projected, coordinates), *part.arrays])

        value_and_gradients = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)
        pair, (full, coordinates) = value_and_gradients(full_leaves, _zeros(part.places, projected))

        def gradient(i: int) -> Any:
            if i not in projected:
                return full.get(i)
            projection, total = projected[i].projection, coordinates[i]
            if i in full:  # Add what the backward pass did not project.
                total += with_auto_axes(
                    projection.project, projected[i].vectors, full[i], out=lambda: specs_of(total)
                )
            return Coordinates(total, projection)

        return pair, [gradient(i) for i in range(len(part.leaves))]


class _Part(NamedTuple):
    """The traced loss and what it is called with for one part of a batch.

    Attributes:
      program: the traced loss.
      leaves: the parameters; an `Int8` has a place for its derivative.
      arrays: its other arguments.
    """

    program: Program
    leaves: list[Any]
    arrays: list[Any]

    @property
    def places(self) -> list[Any]:
        """For each parameter, the array by which it is differentiated."""
        return places_of(self.leaves)


def _tracked(leaves: list[Any], bases: dict[int, Basis], coordinates: dict[int, Any]) -> list[Any]:
    """The leaves as the program takes them: with their basis and coordinates if projected."""

    def at_leaf(i: int, leaf: Any) -> Any:
        if i not in bases:
            return leaf
        return with_place(leaf, track(place_of(leaf), bases[i], coordinates[i]))

    tracked = [at_leaf(i, leaf) for i, leaf in enumerate(leaves)]
    return jax.tree.leaves(tracked, is_leaf=lambda node: isinstance(node, Tracked))


def _zeros(leaves: list[Any], bases: dict[int, Basis]) -> dict[int, jax.Array]:
    """Zero coordinates of the leaves with a basis; the gradient with respect to them is wanted."""

    def zeros(leaf: Any, basis: Basis) -> jax.Array:
        coordinates = jnp.zeros(basis.projection.coordinates_shape, jnp.float32)
        partition = coordinates_partition(basis.projection)
        if partition is not None and explicit_mesh(leaf) is not None:
            coordinates = partition.constrain(coordinates, like=leaf)
        # Inside shard_map its derivative is summed over devices if that of the leaf is.
        return varying_as(coordinates, leaf)

    return {i: zeros(leaves[i], basis) for i, basis in bases.items()}


def takes_coordinates(opt_state: PyTree) -> bool:
    """Whether the optimizer can work on projected gradients, and refresh its bases with them."""
    # These keep, or choose between, updates of the parameters' shapes.
    keeps_full = lambda node: isinstance(node, optax.MultiStepsState | optax.ApplyIfFiniteState)
    outer = filter(keeps_full, jax.tree.leaves(opt_state, is_leaf=keeps_full))
    if any(galore_states(node, inside_chains=True) for node in outer):
        return False
    states = galore_states(opt_state, inside_chains=True)
    from_sketches = all(basis.method not in EXACT for basis in bases_of(states))
    return bool(states) and all(map(is_low_rank, states)) and from_sketches


def bases_in(params: PyTree, opt_state: PyTree) -> PyTree:
    """All bases of a state in one tree like the parameters without boxes.

    Elsewhere there is an `optax.MaskedNode()`.

    Raises:
      ValueError: there is no galore, or it was started with full-size moments or other parameters.
    """
    states = galore_states(opt_state, inside_chains=True)
    if not states:
        raise ValueError(
            "value_and_grad and refresh need the state of an optimizer with galore in it; use "
            "jax.value_and_grad for others."
        )
    if not all(map(is_low_rank, states)):
        raise ValueError(
            "galore was started with tx.init(params), so the optimizer after it wants full "
            "gradients: use galore_jax.chain in place of optax.chain, or start with "
            "galore_jax.init(tx, params)."
        )

    def check(basis: Basis, param: Any) -> None:
        shape = jnp.shape(place_of(param))
        if basis.projection.view.shape != shape:
            raise ValueError(
                f"{basis.projection.name} has the shape {shape}, but the optimizer's "
                f"state was started with {basis.projection.view.shape}: start it with these "
                "parameters."
            )

    bases = no_bases(params)
    # A parameter that one galore leaves out may be projected by another.
    pick = lambda own, other: own if is_basis(own) else other
    for state in states:
        bases = jax.tree.map(pick, state.bases, bases, is_leaf=is_parameter)
    map_bases(check, bases, params, otherwise=bases)
    return bases


def no_bases(tree: PyTree) -> PyTree:
    """What `bases_in` returns if nothing is projected."""
    return jax.tree.map(lambda _: optax.MaskedNode(), unboxed(tree), is_leaf=is_int8)

"""`value_and_grad` for training with galore: gradients that the backward pass projects."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from galore_jax.grads.data_parallel import leaves_of, mean_over_shards
from galore_jax.grads.jaxpr import Program
from galore_jax.grads.micro_batches import check_micro_batches, mean_over
from galore_jax.grads.projected_product import varying_as
from galore_jax.grads.tracked import track
from galore_jax.ops.partition import AxisNames, explicit_mesh, names_of, specs_of, with_auto_axes
from galore_jax.optim.galore_state import (
    bases_of,
    galore_states,
    is_low_rank,
    is_parameter,
)
from galore_jax.subspace.basis import Basis, is_basis
from galore_jax.subspace.matrix_view import named_leaves, unboxed
from galore_jax.subspace.methods import EXACT
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

    The gradients of projected parameters are `Coordinates` in float32, equal up to rounding to the
    projected full gradients. Where the loss multiplies by a parameter, they take
    `r · (in + out) / (in · out)` of the work, and the full gradient is never formed. Any other use
    of the parameter contributes its full gradient, which is then projected and added. A projected
    parameter that the loss never multiplies by, such as the kernel of a convolution, gets a full
    gradient instead of coordinates, which galore then projects. `describe(params, tx, loss,
    *batch)` shows which case applies to each parameter, and why.

    It does not change the bases: without `refresh` they stay the random ones they start as.

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
        parameters; a leaf of the parameters is a function; the batch cannot be split; there is no
        mesh with the `data_axes`, or they divide a parameter.
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
    means_over = passes(loss, has_aux, micro_batches, data_axes)

    def run(params: PyTree, opt_state: PyTree, *batch: Any, **unsplit: Any) -> tuple[Any, PyTree]:
        bases = bases_in(params, opt_state)
        return gradients(means_over(params, bases, batch, unsplit), bases)

    return run


def gradients(mean_of: "MeanOf", bases: PyTree) -> tuple[Any, PyTree]:
    """The value of a loss (with has_aux the pair) and its gradients, as means over a batch."""
    value, gradients = mean_of(TracedLoss.value_and_grad, bases)
    return value, constrain(gradients)


# The mean of `f(traced loss, given)` over the shards and micro-batches of a batch.
MeanOf = Callable[[Callable[["TracedLoss", PyTree], PyTree], PyTree], PyTree]


def passes(
    loss: Loss, has_aux: bool, micro_batches: int, data_axes: AxisNames
) -> Callable[..., MeanOf]:
    """Passes over a batch, for which the loss is traced once; arguments as for `value_and_grad`.

    Returns:
      A function of the parameters, the bases (a tree like the parameters with
      `optax.MaskedNode()` for unprojected leaves), the batch and the loss's keyword arguments.
    """
    check_micro_batches(micro_batches)
    axes = names_of(data_axes)

    def means_over(params: PyTree, bases: PyTree, batch: Any, unsplit: Any) -> MeanOf:
        trace = tracer(loss, has_aux, divided=micro_batches > 1 or bool(axes))
        # On an Explicit mesh, what runs on shards must not use arrays from outside.
        arrays, with_arrays = leaves_of(jax.Array, unsplit)

        def mean_of(f: Callable[[TracedLoss, PyTree], PyTree], given: PyTree) -> PyTree:
            def of_shard(operands: tuple[PyTree, PyTree, Any, PyTree], *shard: Any) -> PyTree:
                params, bases, arrays, given = operands
                unsplit = with_arrays(arrays)
                of_part = lambda *part: f(trace(params, bases, part, unsplit), given)
                return mean_over(of_part, micro_batches, *shard)

            return mean_over_shards(of_shard, axes, (params, bases, arrays, given), *batch)

        return mean_of

    return means_over


class Uses(NamedTuple):
    """How a loss uses a projected parameter.

    Attributes:
      products: whether it multiplies by the parameter, so that the backward pass can project.
      reasons: why a part of the gradient is not projected there: the primitives that use the
        parameter in another way, each with its line of the source.
    """

    products: bool
    reasons: tuple[str, ...]

    @property
    def gradient(self) -> str:
        """Where it is projected: "projected" in the backward pass, "partly" there, or "full"."""
        if not self.reasons:
            return "projected"
        return "partly" if self.products else "full"


def tracer(loss: Loss, has_aux: bool, divided: bool = False) -> Callable[..., "TracedLoss"]:
    """A function that traces a loss, but once for all parts of a batch, and for all passes over it.

    Args:
      loss: as for `value_and_grad`.
      has_aux: whether it returns a pair.
      divided: whether it is called with several parts of a batch; otherwise only with one batch.

    Returns:
      A function of the parameters, the bases (a tree like the parameters with `optax.MaskedNode()`
      for unprojected leaves), and the loss's other positional and keyword arguments.
    """
    traced: dict[Any, tuple[Program, dict[Names, Uses]]] = {}

    def trace(
        params: PyTree, bases: PyTree, batch: Sequence[Any], unsplit: Mapping[str, Any]
    ) -> TracedLoss:
        # What is known now stays so, such as a number on which the loss branches.
        arrays, with_arrays = leaves_of(Tracer if divided else (), (batch, unsplit))

        def pair(operands: tuple[PyTree, Any]) -> tuple[Any, Any]:
            params, (batch, unsplit) = operands[0], with_arrays(operands[1])
            returned = loss(params, *batch, **unsplit)
            if has_aux and not (isinstance(returned, tuple | list) and len(returned) == 2):
                raise TypeError("with has_aux=True the loss must return a pair.")
            value, aux = returned if has_aux else (returned, None)
            if value is None:
                raise TypeError("the loss must return a number, not None.")
            return value, aux

        leaves, structure = jax.tree.flatten((params, arrays))
        key = structure, *map(jax.typeof, leaves), jax.sharding.get_abstract_mesh()
        if key not in traced:
            program = Program(pair, (params, arrays))
            new = TracedLoss(program, {}, has_aux, params, arrays, bases)
            traced[key] = program, new.find_uses()
        return TracedLoss(*traced[key], has_aux, params, arrays, bases)

    return trace


class TracedLoss:
    """A traced loss at some parameters and a batch; made by a `tracer`.

    Attributes:
      uses: how the loss uses each projected parameter, by path.
      eps: the largest machine epsilon of the dtypes in which the loss computes.
    """

    def __init__(
        self,
        program: Program,
        uses: dict[Names, Uses],
        has_aux: bool,
        params: PyTree,
        arrays: dict[int, jax.Array],
        bases: PyTree,
    ):
        self._program, self.uses, self.eps = program, uses, program.eps
        self._leaves, self._tree = jax.tree.flatten(params)
        self._arrays, self._has_aux = jax.tree.leaves(arrays), has_aux
        self._unboxed_tree = jax.tree.structure(unboxed(params))
        self._bases = self._by_leaf(bases)

    def value_and_grad(self, bases: PyTree) -> tuple[Any, PyTree]:
        """The value of the loss (with has_aux the pair) and its gradients.

        The gradients are `Coordinates` for parameters with a basis, but full for those that the
        loss never multiplies by.
        """
        everything = set(range(len(self._leaves)))
        pair, gradients = self._differentiate(self._by_leaf(bases), everything)
        return pair if self._has_aux else pair[0], self._tree.unflatten(gradients)

    def coordinates(self, bases: PyTree) -> dict[Names, Coordinates]:
        """Coordinates of the gradients in the given bases, by path.

        The bases may be some of its own or replacements for them. Parameters that the loss never
        multiplies by are left out.
        """
        _, gradients = self._differentiate(self._by_leaf(bases), set())
        return {g.projection.path: g for g in gradients if isinstance(g, Coordinates)}

    def _by_leaf(self, bases: PyTree) -> dict[int, Basis]:
        leaves = enumerate(self._unboxed_tree.flatten_up_to(unboxed(bases)))
        return {i: basis for i, basis in leaves if is_basis(basis)}

    def find_uses(self) -> dict[Names, Uses]:
        """How the loss uses each projected parameter, by path."""
        if opaque := self._program.opaque:
            return {basis.projection.path: Uses(False, (opaque,)) for basis in self._bases.values()}
        products: set[int] = set()
        reasons: dict[int, dict[str, None]] = {i: {} for i in self._bases}

        def report(leaf: int, reason: str | None) -> None:
            if reason is None:
                products.add(leaf)
            else:
                reasons[leaf][reason] = None

        def evaluate() -> jax.Array:
            leaves = self._tracked(self._leaves, self._bases, self._zeros(self._bases))
            return self._program.number([*leaves, *self._arrays], report)

        jax.eval_shape(evaluate)
        return {
            basis.projection.path: Uses(i in products, tuple(reasons[i]))
            for i, basis in self._bases.items()
        }

    def _differentiate(self, bases: dict[int, Basis], wanted: set[int]) -> tuple[tuple, list[Any]]:
        """The loss's pair, and the gradients of the leaves with a basis and of the wanted ones."""
        # Projected leaves, and those of them that also need their ordinary gradient.
        uses = {i: self.uses[basis.projection.path] for i, basis in bases.items()}
        bases = {i: basis for i, basis in bases.items() if uses[i].gradient != "full"}
        used_otherwise = {i for i in bases if uses[i].reasons}

        def value(full: dict[int, Any], coordinates: dict[int, Any]) -> tuple[Any, Any]:
            leaves = [full.get(i, leaf) for i, leaf in enumerate(self._leaves)]
            return self._program([*self._tracked(leaves, bases, coordinates), *self._arrays])

        full_leaves = {i: self._leaves[i] for i in used_otherwise | (wanted - bases.keys())}
        value_and_gradients = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)
        pair, (full, coordinates) = value_and_gradients(full_leaves, self._zeros(bases))

        # The sum of what the backward pass projected and of the projected rest.
        def gradient(i: int) -> Any:
            if i not in bases:
                return full.get(i)
            projection, total = bases[i].projection, coordinates[i]
            if i in full:
                total += with_auto_axes(
                    projection.project, bases[i].vectors, full[i], out=lambda: specs_of(total)
                )
            return Coordinates(total, projection)

        return pair, [gradient(i) for i in range(len(self._leaves))]

    @staticmethod
    def _tracked(
        leaves: list[Any], bases: dict[int, Basis], coordinates: dict[int, Any]
    ) -> list[Any]:
        tracked = {i: track(i, leaves[i], basis, coordinates[i]) for i, basis in bases.items()}
        return [tracked.get(i, leaf) for i, leaf in enumerate(leaves)]

    def _zeros(self, bases: dict[int, Basis]) -> dict[int, jax.Array]:
        def zeros(leaf: Any, basis: Basis) -> jax.Array:
            coordinates = jnp.zeros(basis.projection.coordinates_shape, jnp.float32)
            partition = coordinates_partition(basis.projection)
            if partition is not None and explicit_mesh(leaf) is not None:
                coordinates = partition.constrain(coordinates, like=leaf)
            # Inside shard_map its derivative is summed over devices if that of the leaf is.
            return varying_as(coordinates, leaf)

        return {i: zeros(self._leaves[i], basis) for i, basis in bases.items()}


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


def no_bases(tree: PyTree) -> PyTree:
    """What `bases_in` returns if nothing is projected."""
    return jax.tree.map(lambda _: optax.MaskedNode(), unboxed(tree))


def bases_in(params: PyTree, opt_state: PyTree) -> PyTree:
    """All bases of a state in one tree like the parameters without boxes.

    Elsewhere there is an `optax.MaskedNode()` or, on a mesh, `Unprojected`.

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
    for names, leaf in named_leaves(params):
        if callable(leaf):
            raise ValueError(
                f"the leaf {'/'.join(names)} of the parameters is a function: pass the arrays "
                "alone, as by equinox.partition(model, equinox.is_inexact_array)."
            )
    bases = no_bases(params)
    pick = lambda own, other: other if isinstance(own, optax.MaskedNode) else own
    try:
        for state in states:
            bases = jax.tree.map(pick, state.bases, bases, is_leaf=is_parameter)
    except ValueError as error:
        raise ValueError(
            "the optimizer's state was started with parameters of another structure: start it with "
            "these, or pass those."
        ) from error

    def check(basis: Any, param: Any) -> None:
        if is_basis(basis) and basis.projection.view.shape != jnp.shape(param):
            raise ValueError(
                f"{basis.projection.name} has the shape {jnp.shape(param)}, but the optimizer's "
                f"state was started with {basis.projection.view.shape}: start it with these "
                "parameters."
            )

    jax.tree.map(check, bases, unboxed(params), is_leaf=is_parameter)
    return bases

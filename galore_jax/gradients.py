"""`value_and_grad` for training with galore: coordinates where a gradient can be born projected."""

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.interpreters import partial_eval

from galore_jax.backward import ProjectedKernel
from galore_jax.projection import Basis, Coordinates, is_basis
from galore_jax.state import galore_states, is_low_rank, map_bases

PyTree = Any
Path = tuple[str, ...]
Loss = Callable[..., Any]


def value_and_grad(
    loss: Loss,
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    micro_batches: int = 1,
) -> Callable[..., tuple[Any, PyTree]]:
    """`jax.value_and_grad` whose gradients are born projected; for `apply_gradients`.

    The gradients of projected kernels are `Coordinates`, float32, for `r · (in + out) / (in · out)`
    of the work, equal to projected full ones up to rounding; those are never formed. That goes for
    every kernel that Flax Linen's Dense and DenseGeneral, `x @ kernel` or `galore_jax.dot_general`
    multiply by, and nothing else uses. Any other projected leaf of a Linen model (of a convolution;
    a kernel that is used outside its layer too, or mapped before) gets its full gradient, which
    galore then projects.

    The bases do not change by it: without `refresh` they stay the random ones they start as.

    Args:
      loss: a function of the parameters and a batch. In the parameters `ProjectedKernel` stands for
        the kernels; Flax reads them as they are.
      tx: the optimizer.
      has_aux: whether the loss returns a pair, the second of which is not differentiated.
      micro_batches: into how many parts each array of the batch is split along its first axis; all
        that is returned is then the mean over them, accumulated in float32: of gradients only the
        coordinates, of aux too.

    Returns:
      A function `(params, opt_state, *batch, **unsplit)` that returns the loss (with has_aux the
      pair) and the gradients, shaped as the parameters.

    Raises:
      ValueError: the optimizer has no galore, or was started with full-size moments; the batch
        cannot be split.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from galore_jax import apply_gradients, chain, dot_general, galore, refresh, refresh_due
      >>> from galore_jax import value_and_grad
      >>> numbers = (((1,), (0,)), ((), ()))
      >>> loss = lambda params, x: jnp.mean(dot_general(x, params["w"], numbers) ** 2)
      >>> params, x = {"w": jnp.ones((8, 16))}, jnp.ones((4, 8))
      >>> tx = chain(galore(rank=2), optax.adam(1e-3))
      >>> state = tx.init(params)
      >>> if refresh_due(state):
      ...     state = refresh(loss, tx)(params, state, x)
      >>> value, grads = value_and_grad(loss, tx)(params, state, x)
      >>> grads["w"].value.shape
      (2, 16)
      >>> params, state = apply_gradients(tx, grads, state, params)
    """
    del tx  # The state says all; the signature is that of `refresh`.

    def run(params: PyTree, opt_state: PyTree, *batch: Any, **unsplit: Any) -> tuple[Any, PyTree]:
        objective = Objective(loss, params, unsplit, has_aux)
        first = first_part(batch, micro_batches)
        bases = objective.carried(bases_in(params, opt_state), *first)
        one = lambda *batch: objective.value_and_grad(bases, *batch)  # noqa: E731
        return mean_over(one, micro_batches, *batch)

    return run


@dataclass(frozen=True)
class Objective:
    """A loss at some parameters, as a function of the batch.

    `bases` is always a tree like the parameters, with `optax.MaskedNode()` where nothing is
    projected.

    Attributes:
      loss: as for `value_and_grad`.
      params: the parameters.
      unsplit: keyword arguments of the loss.
      has_aux: whether it returns a pair.
    """

    loss: Loss
    params: PyTree
    unsplit: Mapping[str, Any]
    has_aux: bool

    def value_and_grad(self, bases: PyTree, *batch: Any) -> tuple[Any, PyTree]:
        """What the loss returns, and gradients: `Coordinates` where there is a basis."""
        free = map_bases(_zeros, bases, otherwise=self.params)
        of = lambda free: self._value(bases, free, batch)  # noqa: E731
        return jax.value_and_grad(of, has_aux=self.has_aux)(free)

    def coordinates(self, bases: PyTree, *batch: Any) -> PyTree:
        """The `Coordinates` alone, and `optax.MaskedNode()` elsewhere."""

        def of(coordinates: PyTree) -> Any:
            free = map_bases(lambda _, own: own, bases, coordinates, otherwise=self.params)
            value = self._value(bases, free, batch)
            return value[0] if self.has_aux else value

        return jax.grad(of)(map_bases(_zeros, bases, otherwise=bases))

    def carried(self, bases: PyTree, *batch: Any) -> PyTree:
        """The bases of the kernels whose gradients can be born projected; the others masked."""
        multiplied, used_elsewhere = self.uses(bases, *batch)

        def keep(basis: Basis) -> Any:
            path = basis.projection.path
            carries = path in multiplied and path not in used_elsewhere
            return basis if carries else optax.MaskedNode()

        return map_bases(keep, bases, otherwise=bases)

    def uses(self, bases: PyTree, *batch: Any) -> tuple[set[Path], set[Path]]:
        """The paths of the kernels that layers multiply by, and of those used in other ways.

        The loss is traced with two arrays for each kernel, one for products and one for all else,
        and with its coordinates; what the loss does not depend on is not used.
        """
        found = jax.tree.leaves(bases, is_leaf=is_basis)
        places = {basis.projection.path: i for i, basis in enumerate(found)}

        def traced(outside: list[Any], inside: list[Any], coordinates: list[Any]) -> Any:
            def boxed(basis: Basis) -> ProjectedKernel:
                i = places[basis.projection.path]
                return _boxed(basis, outside[i], coordinates[i], inside[i])

            params = map_bases(boxed, bases, otherwise=self.params)
            with _projected_layers():
                value = self.loss(params, *batch, **self.unsplit)
            return value[0] if self.has_aux else value

        kernels = map_bases(lambda _, param: param, bases, self.params, otherwise=bases)
        shapes = jax.eval_shape(lambda: jax.tree.leaves(kernels))
        zeros = jax.eval_shape(lambda: [_zeros(basis).value for basis in found])
        jaxpr = jax.make_jaxpr(traced)(shapes, shapes, zeros).jaxpr
        _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
        outside, coordinates = used[: len(found)], used[2 * len(found) :]
        multiplied = {path for path, i in places.items() if coordinates[i]}
        return multiplied, {path for path, i in places.items() if outside[i]}

    def _value(self, bases: PyTree, free: PyTree, batch: Any) -> Any:
        boxed = lambda basis, kernel, free: _boxed(basis, kernel, free.value)  # noqa: E731
        params = map_bases(boxed, bases, self.params, free, otherwise=free)
        with _projected_layers():
            return self.loss(params, *batch, **self.unsplit)


def bases_in(params: PyTree, opt_state: PyTree) -> PyTree:
    """Every basis in a state, in one tree like the parameters, `optax.MaskedNode()` elsewhere.

    Raises:
      ValueError: there is no galore, or it was started with full-size moments.
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
    bases = jax.tree.map(lambda _: optax.MaskedNode(), params)
    for state in states:
        bases = map_bases(lambda basis: basis, state.bases, otherwise=bases)
    return bases


def mean_over(f: Callable[..., PyTree], micro_batches: int, *batch: Any) -> PyTree:
    """`f(*batch)`, or over equal parts of the batch the mean of what `f` returns, in float32."""
    if micro_batches == 1:
        return f(*batch)
    parts = split(batch, micro_batches)
    shapes = jax.eval_shape(f, *first_part(batch, micro_batches))

    def add(total: PyTree, part: Any) -> tuple[PyTree, None]:
        return jax.tree.map(
            lambda old, new: old + jnp.asarray(new, jnp.float32), total, f(*part)
        ), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)
    total, _ = lax.scan(add, zeros, parts)
    return jax.tree.map(lambda leaf: leaf / micro_batches, total)


def first_part(batch: Any, micro_batches: int) -> Any:
    """The first of the equal parts of a batch; of one part the batch, whatever it holds."""
    if micro_batches == 1:
        return batch
    return jax.tree.map(lambda parts: parts[0], split(batch, micro_batches))


def split(batch: Any, micro_batches: int) -> Any:
    """A batch of arrays (B, …) as equal parts, (micro_batches, B / micro_batches, …).

    Raises:
      ValueError: an array cannot be split so.
    """

    def parts(rows: Any) -> jax.Array:
        rows = jnp.asarray(rows)
        if rows.ndim == 0 or rows.shape[0] % micro_batches:
            raise ValueError(
                f"an array of the batch, shape {rows.shape}, cannot be split into "
                f"{micro_batches} micro-batches: its first axis must be a multiple of them; what "
                "is not to be split goes by keyword."
            )
        return rows.reshape(micro_batches, -1, *rows.shape[1:])

    return jax.tree.map(parts, batch)


def _boxed(basis: Basis, kernel: Any, coordinates: Any, inside: Any = None) -> ProjectedKernel:
    intact = jnp.ones(basis.age.shape, bool)
    return ProjectedKernel(kernel, basis.vectors, coordinates, basis.projection, intact, inside)


def _zeros(basis: Basis) -> Coordinates:
    projection = basis.projection
    return Coordinates(jnp.zeros(projection.coordinates_shape, jnp.float32), projection)


def _projected_layers() -> AbstractContextManager[None]:
    # A model of Flax comes with Flax imported; without one it is not needed.
    if "flax.linen" not in sys.modules:
        return nullcontext()
    from galore_jax.linen import projected_layers

    return projected_layers()

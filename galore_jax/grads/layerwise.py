"""Layer-wise training steps: the gradient and update of only one layer exist at a time.

The forward pass keeps the input of each layer. The backward pass is a loop from the last layer to
the first that slices a layer from the stacked parameters and the optimizer's state, recomputes it,
differentiates it, updates it and writes it back in place. The gradients and updates of all layers
never exist together, so that training a 7B model fits into 24 GB (arXiv 2403.03507, section 4.2).
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from galore_jax.grads.jaxpr import dependencies
from galore_jax.grads.layer_slices import LAYERS, Slices
from galore_jax.grads.refresh import refreshed
from galore_jax.grads.value_and_grad import (
    bases_in,
    gradients,
    no_bases,
    passes,
    takes_coordinates,
)
from galore_jax.ops.implementation import Implementation
from galore_jax.ops.partition import AxisNames
from galore_jax.ops.precision import widened
from galore_jax.optim.apply import apply_gradients
from galore_jax.optim.clipping import clip_factor, finite_squares
from galore_jax.optim.galore_state import to_float32
from galore_jax.optim.sharding import placed_state, shardings_of
from galore_jax.optim.stock_chain import start
from galore_jax.subspace.matrix_view import is_box
from galore_jax.types import PyTree

__all__ = ["LayeredModel", "LayerwiseState", "init", "state_shardings"]

ClipBy = Literal["first_pass", "previous_step"]
HEAD, EMBEDDING = "head", "embedding"


class LayeredModel(NamedTuple):
    """A model whose blocks are stacked along the first axis of the leaves below one key.

    Attributes:
      embed: `(params, batch)` to a pair: the activations before the first block, and whatever
        else all blocks need (masks, positions).
      block: `(block_params, activations, other_inputs)` to the activations after the block.
      head_loss: `(params, activations, batch)` to a pair: the loss, and something that is not
        differentiated.
      layers: the key of the blocks in the parameters. The parameters that `embed` and `head_loss`
        receive have `optax.MaskedNode()` for leaves that they do not read, including the blocks.
    """

    embed: Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]]
    block: Callable[[PyTree, jax.Array, PyTree], jax.Array]
    head_loss: Callable[[PyTree, jax.Array, PyTree], tuple[jax.Array, Any]]
    layers: str = "layers"


class LayerwiseState(NamedTuple):
    """State of a layer-wise step.

    Attributes:
      inner: the optimizer's state, from `galore_jax.init`.
      norm: float32 scalar, the global norm of the last step's finite gradients before any clipping,
        of coordinates where gradients are projected. Unchanged by a step whose norm is 0; initially
        0.
    """

    inner: PyTree
    norm: Any


def init(
    tx: optax.GradientTransformation, params: PyTree, *, over: AxisNames = ()
) -> LayerwiseState:
    """The state before the first step; moments are float32 whatever the parameters' dtype is.

    It lies where the parameters lie; for this and `over` see `galore_jax.init`.
    """
    # Compiled, so that no float32 copy of the parameters is made.
    return placed_state(jax.jit(_starter(tx)), params, over)


def state_shardings(
    tx: optax.GradientTransformation, params: PyTree, *, over: AxisNames = ()
) -> LayerwiseState:
    """The shardings of the state that `init` returns; see `galore_jax.state_shardings`."""
    return shardings_of(_starter(tx), params, over)


def _starter(tx: optax.GradientTransformation) -> Callable[[PyTree], LayerwiseState]:
    return lambda params: LayerwiseState(start(tx, to_float32(params)), jnp.zeros([], jnp.float32))


def layerwise_step(
    model: LayeredModel,
    tx: optax.GradientTransformation,
    *,
    projected: bool | None,
    refreshes: bool | None,
    clip_norm: float,
    clip_by: ClipBy,
    implementation: Implementation,
) -> Callable[..., tuple[PyTree, LayerwiseState, tuple[jax.Array, Any]]]:
    """The step of `galore_jax.make_step` for a `LayeredModel`, which documents the arguments.

    Returns:
      A function `(params, state, batch, key)` that returns the new parameters and state, and the
      pair from `head_loss`.
    """

    def step(params: PyTree, state: LayerwiseState, batch: PyTree, key: jax.Array | None) -> Any:
        if not isinstance(state, LayerwiseState):
            raise ValueError("layerwise: the state must come from galore_jax.layerwise.init.")
        parts, inner = _parts(model, params, batch), state.inner
        is_projected = takes_coordinates(inner) if projected is None else projected
        factor, refreshes_now = jnp.float32(1), refreshes if is_projected else False
        if clip_norm and clip_by == "previous_step":
            factor = clip_factor(state.norm, clip_norm)
        elif clip_norm:
            # Bases are refreshed in this first pass, since the norm is that of coordinates in them.
            measure = _PartStep(tx, is_projected, refreshes_now, update=None)
            _, inner, squares, _ = _Pass(model, parts, measure, batch)(params, inner)
            factor, refreshes_now = clip_factor(jnp.sqrt(squares), clip_norm), False
        update = _PartStep(tx, is_projected, refreshes_now, _Update(factor, key, implementation))
        params, inner, squares, pair = _Pass(model, parts, update, batch)(params, inner)
        norm = jnp.where(squares > 0, jnp.sqrt(squares), state.norm)
        return params, LayerwiseState(inner, norm), pair

    return step


class _Update(NamedTuple):
    """How leaves are updated: the factor of their gradients, rounding key, implementation."""

    factor: jax.Array
    key: jax.Array | None
    implementation: Implementation


class _PartStep(NamedTuple):
    """What a step does to one part of the model (head, a layer, embedding).

    It may refresh the part's bases, and updates the part, or without `update` only measures the
    norm of its gradients.
    """

    tx: optax.GradientTransformation
    projected: bool
    refreshes: bool | None
    update: _Update | None

    def __call__(
        self,
        loss: Callable[..., Any],
        params: PyTree,
        state: PyTree,
        x: Any,
        *rest: Any,
        number: Any,
    ) -> tuple[tuple[PyTree, PyTree], Any, jax.Array, Any]:
        """Differentiates `loss(params, x, *rest)`, a pair, with respect to params and x.

        Returns:
          Parameters and state, the gradient of x, the sum of squares of the parameters' gradients,
          and the loss's pair.
        """
        # Parameters and inputs together, to differentiate by both in one backward pass.
        joint_loss = lambda both, *rest: loss(both["params"], both["x"], *rest)
        both, unprojected = {"params": params, "x": x}, no_bases(x)
        bases = bases_in(params, state) if self.projected else no_bases(params)
        joint_bases = {"params": bases, "x": unprojected}
        mean_of = passes(joint_loss, True, 1, ())(both, joint_bases, rest, {})
        if self.refreshes is not False:
            state = refreshed(mean_of, both, joint_bases, state, when_due=self.refreshes is None)
            joint_bases = {"params": bases_in(params, state), "x": unprojected}
        pair, both_gradients = gradients(mean_of, joint_bases)
        grads = jax.tree.map(widened, both_gradients["params"])
        # Compute the norm first, so that XLA can reuse the buffers of gradients for updates.
        squares = finite_squares(grads)
        grads, squares = lax.optimization_barrier((grads, squares))

        # The update.
        if self.update is not None:
            key = self.update.key
            key = None if key is None else jax.random.fold_in(key, number)
            params, state = apply_gradients(
                self.tx, grads, state, params, key=key, implementation=self.update.implementation
            )
        return (params, state), both_gradients["x"], squares, pair


class _Pass(NamedTuple):
    """A forward pass, then `part_step` for the head, each layer from the last on, the embedding.

    Each part is a loss of its parameters and inputs. The chain rule enters as a product with the
    gradient of the outputs, of which the derivative is the vector-Jacobian product. The trees are
    pairs of the parameters and the optimizer's state.
    """

    model: LayeredModel
    parts: "_Parts"
    part_step: _PartStep
    batch: PyTree

    def __call__(self, params: PyTree, state: PyTree) -> tuple[PyTree, PyTree, jax.Array, Any]:
        """Returns the new trees, the sum of squares of all gradients, and the head's pair."""
        slices, update = self.parts.slices, self.part_step.update
        x, block_inputs, inputs = self._forward(params)
        head, (dy, head_gradient), squares, (_, pair) = self._head((params, state), x)
        trees = slices.with_group((params, state), HEAD, head)
        trees, dy, more = self._layers(trees, inputs, block_inputs, dy)
        squares += more
        trees, more = self._embedding(trees, dy, head_gradient)
        squares += more
        # Shared values, such as counts, advance once all parts have used their old values.
        params, state = slices.with_group(trees, None, head)
        factor = jnp.float32(1) if update is None else update.factor
        return params, state, squares / factor**2, pair

    def _forward(self, params: PyTree) -> tuple[jax.Array, PyTree, jax.Array]:
        """The output of the last block, what all blocks share, and the input of each block."""
        model = self.model
        x, block_inputs = model.embed(self.parts.slices.group(params, EMBEDDING), self.batch)
        x, inputs = lax.scan(
            lambda x, block: (model.block(block, x, block_inputs), x), x, params[model.layers]
        )
        return x, block_inputs, inputs

    def _head(self, trees: PyTree, x: jax.Array) -> Any:
        """The result of the head's step; its inputs are x and the embedding that it reads too."""
        slices, update = self.parts.slices, self.part_step.update

        def loss(head: PyTree, inputs: tuple[jax.Array, PyTree]) -> tuple[jax.Array, Any]:
            x, tied = inputs
            pair = self.model.head_loss(slices.with_group(tied, HEAD, head), x, self.batch)
            # Scaling this loss scales every gradient, since all are computed from this one.
            return (pair[0] if update is None else pair[0] * update.factor), pair

        tied = self.parts.tied(slices.group(trees[0], EMBEDDING))
        number = slices.layers
        result = self.part_step(loss, *slices.group(trees, HEAD), (x, tied), number=number)
        # XLA may postpone an update that nothing waits for, and would keep its gradient until then.
        return lax.optimization_barrier(result)

    def _layers(
        self, trees: PyTree, inputs: jax.Array, block_inputs: PyTree, dy: jax.Array
    ) -> tuple[PyTree, jax.Array, jax.Array]:
        """The new trees, the gradient of the first block's input, the sum of squares."""
        slices, part_step = self.parts.slices, self.part_step

        def loss(layer: PyTree, x: jax.Array, dy: jax.Array) -> tuple[jax.Array, None]:
            return _dot(self.model.block(layer[self.model.layers], x, block_inputs), dy), None

        def one_layer(n: jax.Array, carry: Any) -> Any:
            (params, state), current, dy, squares = carry
            i = slices.layers - 1 - n
            new, dx, more, _ = part_step(loss, *current, inputs[i], dy, number=i)
            if part_step.update is not None:
                params = slices.with_layer(params, i, new[0])
            if part_step.update is not None or part_step.refreshes is not False:
                state = slices.with_layer(state, i, new[1])
            trees = params, state
            # The next layer is sliced here and carried: to read from a stack and write to it in one
            # iteration, XLA would copy all of it.
            return trees, slices.layer(trees, jnp.maximum(i - 1, 0)), dx, squares + more

        start = trees, slices.layer(trees, slices.layers - 1), dy, jnp.float32(0)
        trees, _, dy, squares = lax.fori_loop(0, slices.layers, one_layer, start)
        return trees, dy, squares

    def _embedding(
        self, trees: PyTree, dy: jax.Array, head_gradient: PyTree
    ) -> tuple[PyTree, jax.Array]:
        """The new trees and the sum of squares, with the head's gradient of what it reads too."""
        slices = self.parts.slices

        def loss(embedding: PyTree, _: None, upstream: PyTree) -> tuple[jax.Array, None]:
            dy, head_gradient = upstream
            own_part = _dot(self.model.embed(embedding, self.batch)[0], dy)
            return own_part + _dot(self.parts.tied(embedding), head_gradient), None

        group, number = slices.group(trees, EMBEDDING), slices.layers + 1
        new, _, squares, _ = self.part_step(loss, *group, None, (dy, head_gradient), number=number)
        return slices.with_group(trees, EMBEDDING, new), squares


class _Parts(NamedTuple):
    """How a model is divided: its slices, and the embedding's paths that the head reads too."""

    slices: Slices
    shared: frozenset

    def tied(self, tree: PyTree) -> PyTree:
        """The leaves that both read, in a tree like the parameters; `MaskedNode()` elsewhere."""
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf if path in self.shared else optax.MaskedNode(),
            tree,
            is_leaf=is_box,
        )


def _parts(model: LayeredModel, params: PyTree, batch: PyTree) -> _Parts:
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params, is_box)]
    leaves = jax.tree.leaves(params)

    def reads(f: Callable[..., Any], *inputs: Any) -> tuple[set, set, tuple]:
        """The paths that each of the two results of `f(params, *inputs)` reads; their shapes."""
        flags, shapes = dependencies(f, params, *inputs)
        one, other = ({p for p, used in zip(paths, each, strict=False) if used} for each in flags)
        return one, other, shapes

    # Which parameters embed and head_loss read.
    read_by_embed, read_by_inputs, (x, _) = reads(lambda params: model.embed(params, batch))
    read_by_loss, read_by_aux, _ = reads(lambda params, x: model.head_loss(params, x, batch), x)
    first = lambda path: jax.tree_util.keystr(path[:1], simple=True)
    blocks = {path for path in paths if first(path) == model.layers}
    if read_by_inputs - blocks:
        raise ValueError(
            "layerwise: the second result of embed depends on parameters, whose gradient through "
            "it would be lost: compute it in the blocks."
        )
    if blocks & (read_by_embed | read_by_inputs | read_by_loss | read_by_aux):
        raise ValueError(
            f'layerwise: embed and head_loss may not read leaves below "{model.layers}": only the '
            "blocks receive them, one layer at a time."
        )

    # How the leaves are grouped.
    shapes = [leaf.shape for path, leaf in zip(paths, leaves, strict=True) if path in blocks]
    sizes = {shape[0] if shape else 0 for shape in shapes}
    if len(sizes) != 1 or sizes == {0}:
        found = (
            f"its sizes are {sorted(sizes)}"
            if blocks
            else "there are none: set LayeredModel.layers"
        )
        raise ValueError(
            f'layerwise: the leaves below "{model.layers}" must be stacked by layer along their '
            f"first axis, but {found}."
        )
    groups = {path: EMBEDDING if path in read_by_embed else HEAD for path in paths}
    groups |= dict.fromkeys(blocks, LAYERS)
    return _Parts(
        Slices(groups, sizes.pop()), frozenset(read_by_embed & (read_by_loss | read_by_aux))
    )


def _dot(a: PyTree, b: PyTree) -> jax.Array:
    """The real part of the sum of products; its derivative with respect to `a` is `b`."""
    products = jax.tree.map(lambda a, b: jnp.sum(widened(a) * widened(b)).real, a, b)
    return jnp.sum(jnp.stack([jnp.float32(0), *jax.tree.leaves(products)]))

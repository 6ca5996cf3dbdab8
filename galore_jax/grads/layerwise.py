"""Layer-wise training steps: the gradient and update of only one layer exist at a time.

The forward pass keeps the input of each layer. The backward pass is a loop from the last layer to
the first that slices a layer from the stacked parameters and the optimizer's state, recomputes it,
differentiates it, updates it and writes it back in place. The gradients and updates of all layers
never exist together, so that training a 7B model fits into 24 GB (arXiv 2403.03507, section 4.2).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from galore_jax.grads.jaxpr import dependencies
from galore_jax.grads.refresh import refreshed
from galore_jax.grads.value_and_grad import Passes, bases_in, no_bases, takes_coordinates
from galore_jax.ops.partition import AxisNames
from galore_jax.ops.precision import widened
from galore_jax.optim.apply import apply_gradients
from galore_jax.optim.clipping import clip_factor, finite_squares
from galore_jax.optim.galore_state import to_float32
from galore_jax.optim.sharding import placed_state, shardings_of
from galore_jax.optim.stock_chain import start
from galore_jax.subspace.basis import Basis, is_basis
from galore_jax.subspace.matrix_view import MatrixView, is_box, path_names
from galore_jax.subspace.projection import Coordinates, is_coordinates
from galore_jax.types import KeyPath, PyTree

__all__ = ["LayeredModel", "LayerwiseState", "init", "state_shardings"]

ClipBy = Literal["first_pass", "previous_step"]
HEAD, LAYERS, EMBEDDING = "head", "layers", "embedding"


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
) -> Callable[..., tuple[PyTree, LayerwiseState, tuple[jax.Array, Any]]]:
    """The step of `galore_jax.make_step` for a `LayeredModel`, which documents the arguments.

    Returns:
      A function `(params, state, batch, key)` that returns the new parameters and state, and the
      pair from `head_loss`.
    """

    def step(params: PyTree, state: LayerwiseState, batch: PyTree, key: jax.Array | None) -> Any:
        slices, inner = _slices_of(model, params, batch), state.inner
        is_projected = takes_coordinates(inner) if projected is None else projected
        refreshes_now, factor = refreshes if is_projected else False, jnp.float32(1)
        measure = _Pass(model, tx, slices, batch, is_projected, refreshes_now, None, key)
        if clip_norm and clip_by == "previous_step":
            factor = clip_factor(state.norm, clip_norm)
        elif clip_norm:
            # Bases are refreshed in this first pass, since the norm is that of coordinates in them.
            _, inner, squares, _ = measure(params, inner)
            factor, refreshes_now = clip_factor(jnp.sqrt(squares), clip_norm), False
        update = measure._replace(refreshes=refreshes_now, factor=factor)
        params, inner, squares, pair = update(params, inner)
        norm = jnp.where(squares > 0, jnp.sqrt(squares), state.norm)
        return params, LayerwiseState(inner, norm), pair

    return step


class _Pass(NamedTuple):
    """A forward pass, then a step of each part: the head, the layers from the last, the embedding.

    A step may refresh the part's bases. It updates the part by its gradients times `factor`, or, if
    that is None, only measures their norm. Each part is a loss of its parameters and inputs; its
    outputs are multiplied by their gradient, so that the derivative is the vector-Jacobian product.
    `trees` are pairs of the parameters and the optimizer's state.
    """

    model: LayeredModel
    tx: optax.GradientTransformation
    slices: "_Slices"
    batch: PyTree
    projected: bool
    refreshes: bool | None
    factor: jax.Array | None
    key: jax.Array | None

    def __call__(self, params: PyTree, state: PyTree) -> tuple[PyTree, PyTree, jax.Array, Any]:
        """Returns the new trees, the sum of squares of all gradients, and the head's pair."""
        slices = self.slices
        x, block_inputs, inputs = self._forward(params)
        head, (dy, head_gradient), squares, (_, pair) = self._head((params, state), x)
        trees = slices.with_group((params, state), HEAD, head)
        trees, dy, more = self._layers(trees, inputs, block_inputs, dy)
        squares += more
        trees, more = self._embedding(trees, dy, head_gradient)
        squares += more
        # Shared values, such as counts, advance once all parts have used their old values.
        params, state = slices.with_group(trees, None, head)
        factor = 1 if self.factor is None else self.factor
        return params, state, squares / factor**2, pair

    def _forward(self, params: PyTree) -> tuple[jax.Array, PyTree, jax.Array]:
        """The output of the last block, what all blocks share, and the input of each block."""
        model = self.model
        x, block_inputs = model.embed(self.slices.group(params, EMBEDDING), self.batch)
        x, inputs = lax.scan(
            lambda x, block: (model.block(block, x, block_inputs), x), x, params[model.layers]
        )
        return x, block_inputs, inputs

    def _head(self, trees: PyTree, x: jax.Array) -> Any:
        """The head's step; its inputs are x and the parameters of the embedding that it reads."""
        slices = self.slices

        def loss(head: PyTree, inputs: tuple[jax.Array, PyTree]) -> tuple[jax.Array, Any]:
            x, tied = inputs
            pair = self.model.head_loss(slices.with_group(tied, HEAD, head), x, self.batch)
            # Scaling this loss scales every gradient, since all are computed from this one.
            return (pair[0] if self.factor is None else pair[0] * self.factor), pair

        inputs = x, slices.tied(slices.group(trees[0], EMBEDDING))
        result = self._step(loss, slices.group(trees, HEAD), inputs, number=slices.layers)
        # XLA may postpone an update that nothing waits for, and would keep its gradient until then.
        return lax.optimization_barrier(result)

    def _layers(
        self, trees: PyTree, inputs: jax.Array, block_inputs: PyTree, dy: jax.Array
    ) -> tuple[PyTree, jax.Array, jax.Array]:
        """The new trees, the gradient of the first block's input, the sum of squares."""
        slices = self.slices

        def loss(layer: PyTree, x: jax.Array, dy: jax.Array) -> tuple[jax.Array, None]:
            return _dot(self.model.block(layer[self.model.layers], x, block_inputs), dy), None

        def one_layer(n: jax.Array, carry: Any) -> Any:
            (params, state), dy, squares = carry
            i = slices.layers - 1 - n
            current = slices.layer((params, state), i)
            new, dx, more, _ = self._step(loss, current, inputs[i], dy, number=i)
            if self.factor is not None:
                params = slices.with_layer(params, i, current[0], new[0])
            if self.factor is not None or self.refreshes is not False:
                state = slices.with_layer(state, i, current[1], new[1])
            return (params, state), dx, squares + more

        start = trees, dy, jnp.float32(0)
        trees, dy, squares = lax.fori_loop(0, slices.layers, one_layer, start)
        return trees, dy, squares

    def _embedding(
        self, trees: PyTree, dy: jax.Array, head_gradient: PyTree
    ) -> tuple[PyTree, jax.Array]:
        """The new trees and the sum of squares, of the gradients of embedding and head together."""
        slices = self.slices

        def loss(embedding: PyTree, _: None, upstream: PyTree) -> tuple[jax.Array, None]:
            dy, head_gradient = upstream
            own_part = _dot(self.model.embed(embedding, self.batch)[0], dy)
            return own_part + _dot(slices.tied(embedding), head_gradient), None

        own, upstream = slices.group(trees, EMBEDDING), (dy, head_gradient)
        new, _, squares, _ = self._step(loss, own, None, upstream, number=slices.layers + 1)
        return slices.with_group(trees, EMBEDDING, new), squares

    def _step(
        self, loss: Callable[..., Any], trees: PyTree, x: Any, *rest: Any, number: Any
    ) -> tuple[tuple[PyTree, PyTree], Any, jax.Array, Any]:
        """A step of one part, by the gradients of `loss(params, x, *rest)`, a pair.

        Returns:
          The part's new trees, the gradient of x, the sum of squares of the parameters' gradients,
          and the loss's pair.
        """
        # Parameters and inputs together, to differentiate by both in one backward pass.
        params, state = trees
        joint_loss = lambda both, *rest: loss(both["params"], both["x"], *rest)
        both, unprojected = {"params": params, "x": x}, no_bases(x)
        bases = bases_in(params, state) if self.projected else no_bases(params)
        joint_bases = {"params": bases, "x": unprojected}
        passes = Passes(joint_loss, both, joint_bases, rest, {}, has_aux=True)
        if self.refreshes is not False:
            state = refreshed(passes, state, when_due=self.refreshes is None)
            joint_bases = {"params": bases_in(params, state), "x": unprojected}
        pair, both_gradients = passes.value_and_grad(joint_bases)
        grads = jax.tree.map(widened, both_gradients["params"])
        # Compute the norm first, so that XLA can reuse the buffers of gradients for updates, and
        # the gradient of x, so that it need not copy a stack of which it still reads what it
        # overwrites.
        squares, dx = finite_squares(grads), both_gradients["x"]
        grads, squares, dx = lax.optimization_barrier((grads, squares, dx))
        if self.factor is not None:
            key = None if self.key is None else jax.random.fold_in(self.key, number)
            params, state = apply_gradients(self.tx, grads, state, params, key=key)
        return (params, state), dx, squares, pair


def _dot(a: PyTree, b: PyTree) -> jax.Array:
    """The real part of the sum of products; its derivative with respect to `a` is `b`."""
    products = jax.tree.map(lambda a, b: jnp.sum(widened(a) * widened(b)).real, a, b)
    return jnp.sum(jnp.stack([jnp.float32(0), *jax.tree.leaves(products)]))


@dataclasses.dataclass(frozen=True)
class _Slices:
    """How trees like the parameters, and states that contain such trees, are sliced.

    A state contains trees like the parameters (of moments, bases or counters) and shared values
    such as counts. The node at the path of a parameter is that parameter's piece, whatever the
    state keeps there: an array, codes with their scales, or a `Basis`.

    Attributes:
      groups: the group of each parameter, by path: `LAYERS` if it is stacked by layer along its
        first axis, otherwise `HEAD` or `EMBEDDING`.
      layers: number of layers.
      read_twice: paths of the embedding's parameters that the head reads too.
    """

    groups: Mapping[KeyPath, str]
    layers: int
    read_twice: frozenset

    def group(self, tree: PyTree, name: str) -> PyTree:
        """The pieces of a group and the shared values; `optax.MaskedNode()` for other pieces."""
        return self._map(lambda group, _, piece: piece if group in (None, name) else _masked, tree)

    def with_group(self, tree: PyTree, name: str | None, new: PyTree) -> PyTree:
        """The tree with new pieces for a group; for the group None, with new shared values."""
        return self._map(lambda group, _, old, new: new if group == name else old, tree, new)

    def tied(self, tree: PyTree) -> PyTree:
        """The leaves that embedding and head both read; `optax.MaskedNode()` elsewhere."""
        return self._map(lambda _, path, leaf: leaf if path in self.read_twice else _masked, tree)

    def layer(self, tree: PyTree, index: jax.Array | int) -> PyTree:
        """Like `group`, for one layer: its pieces, bases and moments too, lack the layer axis.

        Raises:
          ValueError: a state keeps something for a stacked parameter that is not stacked by layer.
        """

        def sliced(group: str | None, path: KeyPath, piece: Any) -> Any:
            if group != LAYERS:
                return piece if group is None else _masked

            def cut(stack: jax.Array) -> jax.Array:
                if _is_shared(piece, stack):
                    return stack
                if not stack.ndim or stack.shape[0] != self.layers:
                    raise ValueError(
                        f"layerwise: for {'/'.join(path_names(path))}, which is stacked by layer, "
                        f"the optimizer keeps an array, {stack.shape}, that is not stacked by "
                        "layer: use a transformation that treats each layer separately."
                    )
                return lax.dynamic_index_in_dim(stack, index, keepdims=False)

            return _without_layers(jax.tree.map(cut, piece))

        return self._map(sliced, tree)

    def with_layer(self, tree: PyTree, index: jax.Array, old: PyTree, new: PyTree) -> PyTree:
        """The tree with new pieces for a layer that had the old ones; shared values stay.

        What is the same array in both, as a basis without refresh, is not written: XLA would copy
        the stack to go on reading from it.
        """

        def updated(group: str | None, _: KeyPath, stacks: Any, old: Any, new: Any) -> Any:
            if group != LAYERS:
                return stacks

            def put(stack: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
                if _is_shared(stacks, stack):
                    return new
                if new is old:
                    return stack
                return lax.dynamic_update_index_in_dim(stack, new, index, 0)

            leaves, structure = jax.tree.flatten(stacks)
            return structure.unflatten(map(put, leaves, *map(jax.tree.leaves, (old, new))))

        return self._map(updated, tree, old, new)

    def _map(self, f: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
        """Maps `f(group, path, *pieces)`; the group of shared values is None."""

        def group_of(path: KeyPath) -> str | None:
            ends = (path[n:] for n in range(len(path)))
            return next((self.groups[end] for end in ends if end in self.groups), None)

        return jax.tree_util.tree_map_with_path(
            lambda path, *pieces: f(group_of(path), path, *pieces),
            tree,
            *rest,
            is_leaf=lambda path, _: group_of(path) is not None,
            is_leaf_takes_path=True,
        )


_masked = optax.MaskedNode()


def _is_shared(piece: Any, array: jax.Array) -> bool:
    """Whether an array of a piece is one for all layers: a number among the settings of a basis."""
    return is_basis(piece) and not array.ndim


def _without_layers(piece: Any) -> Any:
    """A piece whose bases and coordinates describe a parameter without the first axis."""
    is_leaf = lambda node: is_basis(node) or is_coordinates(node)

    def at_node(node: Any) -> Any:
        if not isinstance(node, Basis | Coordinates):
            return node
        view, partition = node.projection.view, node.projection.partition
        if 0 not in view.batch_axes:
            raise ValueError(
                f"{node.projection.name} is projected across its layers: leave the first axis, of "
                "layers, out of its dimension numbers."
            )
        shifted = lambda axes: tuple(axis - 1 for axis in axes)
        view = MatrixView(view.shape[1:], shifted(view.in_axes), shifted(view.out_axes))
        if partition is not None:
            partition = partition.trailing(len(view.shape))
        projection = dataclasses.replace(node.projection, view=view, partition=partition)
        return dataclasses.replace(node, projection=projection)

    return jax.tree.map(at_node, piece, is_leaf=is_leaf)


def _slices_of(model: LayeredModel, params: PyTree, batch: PyTree) -> _Slices:
    """Groups the parameters by which of the model's functions read them."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params, is_box)]

    def reads(f: Callable[..., Any], *inputs: Any) -> tuple[set, set, tuple]:
        """The paths that each of the two results of `f(params, *inputs)` reads; their shapes."""
        flags, shapes = dependencies(f, params, *inputs)
        one, other = ({p for p, used in zip(paths, each, strict=False) if used} for each in flags)
        return one, other, shapes

    by_embed, by_block_inputs, (x, _) = reads(lambda params: model.embed(params, batch))
    by_loss, by_aux, _ = reads(lambda params, x: model.head_loss(params, x, batch), x)
    first = lambda path: jax.tree_util.keystr(path[:1], simple=True)
    blocks = {path for path in paths if first(path) == model.layers}
    if by_block_inputs:
        raise ValueError(
            "layerwise: the second result of embed depends on parameters, whose gradient through "
            "it would be lost: compute it in the blocks."
        )
    leaves = zip(paths, jax.tree.leaves(params), strict=True)
    sizes = sorted({(*jnp.shape(leaf), 0)[0] for path, leaf in leaves if path in blocks})
    if len(sizes) != 1:
        raise ValueError(
            f'layerwise: the leaves below "{model.layers}" must be stacked by layer along their '
            f"first axis, but the sizes of that axis are {sizes}."
        )
    groups = {path: EMBEDDING if path in by_embed else HEAD for path in paths}
    groups |= dict.fromkeys(blocks, LAYERS)
    return _Slices(groups, sizes[0], frozenset(by_embed & (by_loss | by_aux)))

"""Layer-wise training steps: the gradient and update of only one layer exist at a time.

The forward pass keeps the input of each layer. The backward pass is a loop from the last layer to
the first that slices a layer from the stacked parameters and the optimizer's state, recomputes it,
differentiates it, updates it and writes it back in place. The gradients and updates of all layers
never exist together, so that training a 7B model fits into 24 GB (arXiv 2403.03507, section 4.2).

With micro-batches, or to clip by the norm of the step itself, the loop adds the gradients of each
layer to sums, which for projected parameters are coordinates; then a second loop updates the layers
from the sums.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from galore_jax.grads.jaxpr import dependencies
from galore_jax.grads.micro_batches import mean_of_stack, split
from galore_jax.grads.refresh import refreshed
from galore_jax.grads.value_and_grad import Passes, bases_in, no_bases, takes_coordinates
from galore_jax.ops.int8 import is_int8, to_arrays
from galore_jax.ops.partition import AxisNames
from galore_jax.ops.precision import promoted, widened
from galore_jax.optim.apply import apply_gradients
from galore_jax.optim.clipping import clip_factor, finite_squares
from galore_jax.optim.galore_state import to_float32
from galore_jax.optim.sharding import placed_state, shardings_of
from galore_jax.optim.stock_chain import start
from galore_jax.subspace.basis import Basis, is_basis
from galore_jax.subspace.matrix_view import MatrixView, leaves_with_path, path_names
from galore_jax.subspace.projection import Coordinates, is_coordinates
from galore_jax.types import KeyPath, PyTree

__all__ = ["LayeredModel", "LayerwiseState", "init", "state_shardings"]

ClipBy = Literal["this_step", "previous_step"]
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
    micro_batches: int,
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
        parts = split(batch, micro_batches) if micro_batches > 1 else None
        first = batch if parts is None else jax.tree.map(lambda rows: rows[0], parts)
        slices, trees = _slices_of(model, params, first), _Trees(params, state.inner)
        is_projected = takes_coordinates(state.inner) if projected is None else projected
        backward = _Pass(model, tx, slices, first, is_projected, is_projected and refreshes, key)
        if micro_batches == 1 and not (clip_norm and clip_by == "this_step"):
            factor = clip_factor(state.norm, clip_norm) if clip_norm else jnp.float32(1)
            trees, squares, pair = backward._replace(factor=factor)(trees)
            norm = jnp.sqrt(squares) / factor
        else:
            trees, structures, pair = _summed(backward, trees, parts)
            # Layer by layer: on CPUs XLA stores what it sums of a large array.
            of_layers = lax.map(finite_squares, trees.sums[model.layers])
            others = [slices.group(trees.sums, group) for group in (HEAD, EMBEDDING)]
            norm = jnp.sqrt(of_layers.sum() + finite_squares(others)) / micro_batches
            factor = clip_factor(norm, clip_norm) if clip_norm else jnp.float32(1)
            trees = _updated_by_sums(backward, trees, structures, factor / micro_batches)
        norm = jnp.where(norm > 0, norm, state.norm)
        return trees.params, LayerwiseState(trees.state, norm), pair

    return step


class _Trees(NamedTuple):
    """What a step changes: of all layers, of one, of the head or of the embedding.

    Attributes:
      params: the parameters.
      state: the optimizer's state.
      sums: sums of the gradients over micro-batches, as coordinates where the backward pass
        projects, in the dtype of bfloat16 parameters and otherwise in float32 or wider. None: each
        part is updated as soon as its gradients are known.
    """

    params: PyTree
    state: PyTree
    sums: PyTree = None


def _summed(
    backward: "_Pass", trees: _Trees, parts: PyTree
) -> tuple[_Trees, dict[str, Any], tuple[jax.Array, Any]]:
    """The trees with sums of the gradients, and with bases that the first micro-batch refreshes.

    Args:
      backward: over the first micro-batch.
      trees: without sums.
      parts: the arrays of all micro-batches, stacked; None: there is only one.

    Returns:
      The trees, the structure of the gradients of each group, and the mean of the head's pairs.
    """
    trees, structures = backward.with_zeros(trees)

    def add(sums: PyTree, part: PyTree) -> tuple[PyTree, Any]:
        one = backward._replace(batch=part, refreshes=False)
        found, _, pair = one(trees._replace(sums=sums))
        return found.sums, pair

    pairs = []
    if parts is None or backward.refreshes is not False:
        trees, _, pair = backward(trees)
        pairs.append(jax.tree.map(lambda leaf: leaf[None], pair))
    if parts is not None:
        rest = jax.tree.map(lambda rows: rows[len(pairs) :], parts)
        sums, more = lax.scan(add, trees.sums, rest)
        trees = trees._replace(sums=sums)
        pairs.append(more)
    mean = jax.tree.map(lambda *some: mean_of_stack(jnp.concatenate(some)), *pairs)
    return trees, structures, mean


def _updated_by_sums(
    backward: "_Pass", trees: _Trees, structures: dict[str, Any], factor: jax.Array
) -> _Trees:
    """The trees after an update of every part by `factor` times its sums."""
    slices = backward.slices

    def update(part: _Trees, group: str, number: Any) -> _Trees:
        sums = [widened(total) * factor for total in jax.tree.leaves(part.sums)]
        return backward.updated(part, structures[group].unflatten(sums), number)

    def update_layer(i: jax.Array, trees: _Trees) -> _Trees:
        layer = slices.layer(trees, i)
        return slices.with_layer(trees, i, layer, update(layer, LAYERS, i))

    # The layers first: while embedding and head are updated, the sums of the layers are gone.
    trees = lax.fori_loop(0, slices.layers, update_layer, trees)
    trees = lax.optimization_barrier(trees)
    head = update(slices.group(trees, HEAD), HEAD, slices.layers)
    embedding = update(slices.group(trees, EMBEDDING), EMBEDDING, slices.layers + 1)
    trees = slices.with_group(slices.with_group(trees, HEAD, head), EMBEDDING, embedding)
    # Shared values, such as counts, advance once all parts have used their old values.
    return slices.with_group(trees, None, head)


class _Found(NamedTuple):
    """What the backward pass of a part finds.

    Attributes:
      grads: the gradients of its parameters.
      squares: the sum of their finite squares, 0 if they are to be summed.
      dx: the gradient of its inputs.
      pair: the value of its loss.
    """

    grads: PyTree
    squares: jax.Array
    dx: Any
    pair: Any


class _Pass(NamedTuple):
    """A forward pass, then a step of each part: the head, the layers from the last, the embedding.

    A step may refresh the part's bases. It updates the part by its gradients times `factor`, or
    adds its gradients to the sums. Each part is a loss of its parameters and inputs; its outputs
    are multiplied by their gradient, so that the derivative is the vector-Jacobian product.
    """

    model: LayeredModel
    tx: optax.GradientTransformation
    slices: "_Slices"
    batch: PyTree
    projected: bool
    refreshes: bool | None
    key: jax.Array | None
    factor: Any = 1.0

    def __call__(self, trees: _Trees) -> tuple[_Trees, jax.Array, Any]:
        """Returns the new trees, the sum of squares of all gradients, and the head's pair."""
        slices = self.slices
        x, shared, inputs = self._forward(trees.params)

        # The head.
        own, found = self._head(slices.group(trees, HEAD), trees.params, x)
        head = self._step(own, found.grads, slices.layers)
        # XLA may postpone an update that nothing waits for, and would keep its gradient until then.
        result = lax.optimization_barrier((head, found.squares, found.dx, found.pair))
        head, squares, (dy, tied), (_, pair) = result
        dy = _after_on_cpu(dy, head.params)
        trees = slices.with_group(trees, HEAD, head)

        # The layers.
        def one_layer(n: jax.Array, carry: Any) -> Any:
            trees, dy, squares = carry
            i = slices.layers - 1 - n
            old = slices.layer(trees, i)
            own, found = self._layer(old, inputs[i], shared, dy)
            new = self._step(own, found.grads, i)
            return slices.with_layer(trees, i, old, new), found.dx, squares + found.squares

        trees, dy, squares = lax.fori_loop(0, slices.layers, one_layer, (trees, dy, squares))

        # The embedding.
        part = slices.group(trees, EMBEDDING)
        part = part._replace(params=_after_on_cpu(part.params, dy))
        own, found = self._embedding(part, dy, tied)
        trees = slices.with_group(trees, EMBEDDING, self._step(own, found.grads, slices.layers + 1))
        # Shared values, such as counts, advance once all parts have used their old values.
        return slices.with_group(trees, None, head), squares + found.squares, pair

    def with_zeros(self, trees: _Trees) -> tuple[_Trees, dict[str, Any]]:
        """The trees with sums that are zero, and the structure of the gradients of each group."""
        slices = self.slices

        def gradients() -> dict[str, PyTree]:
            x, shared, inputs = self._forward(trees.params)
            _, head = self._head(slices.group(trees, HEAD), trees.params, x)
            dy, tied = head.dx
            _, layer = self._layer(slices.layer(trees, 0), inputs[0], shared, dy)
            _, embedding = self._embedding(slices.group(trees, EMBEDDING), layer.dx, tied)
            return {HEAD: head.grads, LAYERS: layer.grads, EMBEDDING: embedding.grads}

        found, sums = jax.eval_shape(gradients), trees.params  # to be replaced group by group
        for group, grads in found.items():
            stack = (slices.layers,) if group == LAYERS else ()

            def zeros(param: jax.Array, grad: PyTree, stack: tuple[int, ...] = stack) -> jax.Array:
                (leaf,) = jax.tree.leaves(grad)
                is_narrow = param.dtype == jnp.bfloat16
                dtype = param.dtype if is_narrow else promoted(leaf.dtype, jnp.float32)
                return jnp.zeros(stack + leaf.shape, dtype)

            new = jax.tree.map(zeros, slices.group(trees.params, group), grads, is_leaf=is_int8)
            sums = slices.with_group(sums, group, new)
        return trees._replace(sums=sums), {name: jax.tree.structure(found[name]) for name in found}

    def updated(self, part: _Trees, grads: PyTree, number: Any) -> _Trees:
        """A part after an update by these gradients; its number gives it random bits of its own."""
        key = None if self.key is None else jax.random.fold_in(self.key, number)
        params, state = apply_gradients(self.tx, grads, part.state, part.params, key=key)
        return part._replace(params=params, state=_written_last(part.state, state, params))

    def _step(self, part: _Trees, grads: PyTree, number: Any) -> _Trees:
        """A part after an update by its gradients, or with its gradients in the sums."""
        if part.sums is None:
            return self.updated(part, grads, number)
        add = lambda total, grad: (widened(total) + widened(grad)).astype(total.dtype)
        sums, structure = jax.tree.flatten(part.sums)
        return part._replace(sums=structure.unflatten(map(add, sums, jax.tree.leaves(grads))))

    def _forward(self, params: PyTree) -> tuple[jax.Array, PyTree, jax.Array]:
        """The output of the last block, what all blocks share, and the input of each block."""
        model = self.model
        x, shared = model.embed(self.slices.group(params, EMBEDDING), self.batch)
        x, inputs = lax.scan(
            lambda x, block: (model.block(block, x, shared), x), x, params[model.layers]
        )
        return x, shared, inputs

    def _head(self, part: _Trees, params: PyTree, x: jax.Array) -> tuple[_Trees, _Found]:
        """The head; its inputs are x and the parameters of the embedding that it reads."""
        slices = self.slices

        def loss(head: PyTree, inputs: tuple[jax.Array, PyTree]) -> tuple[jax.Array, Any]:
            x, tied = inputs
            pair = self.model.head_loss(slices.with_group(tied, HEAD, head), x, self.batch)
            # Scaling this loss scales every gradient, since all are computed from this one.
            return pair[0] * self.factor, pair

        return self._differentiate(loss, part, (x, slices.tied(slices.group(params, EMBEDDING))))

    def _layer(
        self, part: _Trees, x: jax.Array, shared: PyTree, dy: jax.Array
    ) -> tuple[_Trees, _Found]:
        """A layer; `shared` is what all blocks share."""

        def loss(layer: PyTree, x: jax.Array, dy: jax.Array) -> tuple[jax.Array, None]:
            return _dot(self.model.block(layer[self.model.layers], x, shared), dy), None

        return self._differentiate(loss, part, x, dy)

    def _embedding(self, part: _Trees, dy: jax.Array, tied: PyTree) -> tuple[_Trees, _Found]:
        """The embedding; `tied` is the gradient of its parameters as those of the head."""

        def loss(embedding: PyTree, _: None, upstream: PyTree) -> tuple[jax.Array, None]:
            dy, tied = upstream
            own = _dot(self.model.embed(embedding, self.batch)[0], dy)
            return own + _dot(to_arrays(self.slices.tied(embedding)), tied), None

        return self._differentiate(loss, part, None, (dy, tied))

    def _differentiate(
        self, loss: Callable[..., Any], part: _Trees, x: Any, *rest: Any
    ) -> tuple[_Trees, _Found]:
        """The gradients of `loss(params, x, *rest)`, a pair, by params and x.

        Returns:
          The part, whose bases may be new, and what was found.
        """
        # Parameters and inputs together, to differentiate by both in one backward pass.
        params, state, _ = part
        joint_loss = lambda both, *rest: loss(both["params"], both["x"], *rest)
        both, unprojected = {"params": params, "x": x}, no_bases(x)
        bases = bases_in(params, state) if self.projected else no_bases(params)
        joint_bases = {"params": bases, "x": unprojected}
        passes = Passes(joint_loss, both, joint_bases, rest, {}, has_aux=True)
        if self.refreshes is not False:
            state = refreshed(passes, state, when_due=self.refreshes is None)
            joint_bases = {"params": bases_in(params, state), "x": unprojected}
        pair, both_gradients = passes.value_and_grad(joint_bases)
        grads, dx = both_gradients["params"], both_gradients["x"]
        part = part._replace(state=state)
        if part.sums is not None:
            return part, _Found(grads, jnp.float32(0), dx, pair)
        # Compute the norm first, so that XLA can reuse the buffers of gradients for updates, and
        # the gradient of x, so that it need not copy a stack of which it still reads what it
        # overwrites.
        grads = jax.tree.map(widened, grads)
        grads, squares, dx = lax.optimization_barrier((grads, finite_squares(grads), dx))
        return part, _Found(_after_on_cpu(grads, dx), squares, dx, pair)


def _written_last(old: PyTree, new: PyTree, params: PyTree) -> PyTree:
    """A new state, whose moments and bases are written after the new parameters and counters.

    On CPUs XLA need not copy stacks then, to go on reading what they overwrite.
    """
    leaves, structure = jax.tree.flatten(new)
    pairs = enumerate(zip(leaves, jax.tree.leaves(old), strict=True))
    changed = {i: leaf for i, (leaf, before) in pairs if leaf is not before and jnp.ndim(leaf)}
    changed = _after_on_cpu(changed, (params, [leaf for leaf in leaves if not jnp.ndim(leaf)]))
    return structure.unflatten([changed.get(i, leaf) for i, leaf in enumerate(leaves)])


def _after_on_cpu(tree: PyTree, other: PyTree) -> PyTree:
    """The tree; on CPUs it is made to depend on another one.

    XLA drops barriers there before it decides what to copy and when to compute what. It would copy
    whole stacks of weights for each layer, to go on reading what the layer's update overwrites.
    """
    return lax.platform_dependent(tree, other, cpu=_after, default=lambda tree, _: tree)


def _after(tree: PyTree, other: PyTree) -> PyTree:
    """The tree, made to depend on another one by a zero that XLA does not recognise."""
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    numbers = [leaf for leaf in map(jnp.asarray, jax.tree.leaves(other)) if not is_key(leaf)]
    sums = [jnp.sum(widened(leaf)).real for leaf in numbers]
    bits = lax.bitcast_convert_type(sum(sums, jnp.float32(0)).astype(jnp.float32), jnp.uint32)
    zero = (bits >> 31) >> 1
    return jax.tree.map(lambda leaf: leaf if is_key(leaf) else leaf + zero.astype(leaf.dtype), tree)


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
    paths = [path for path, node in leaves_with_path(params) for _ in jax.tree.leaves(node)]

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

"""Training steps in which one layer's gradient and update live at a time.

The forward pass keeps the input of each layer. The backward pass is a loop from the last layer to
the first: it cuts a layer out of the stacked parameters and the optimizer's state, computes it
again, differentiates it, updates it, and writes it back in place. So neither gradients nor updates
of the model are ever whole, which fits a model of 7B into 24 GB (arXiv 2403.03507, section 4.2).
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax

from galore_jax.grads.jaxpr import dependencies
from galore_jax.grads.layer_slices import LAYERS, Slices
from galore_jax.grads.sketch import refresh
from galore_jax.grads.value_and_grad import TracedLoss, bases_in
from galore_jax.ops.implementation import Implementation
from galore_jax.optim.apply import apply_gradients
from galore_jax.optim.chain import init as init_optimizer
from galore_jax.optim.clipping import finite_squares
from galore_jax.optim.state import galore_states, to_float32
from galore_jax.subspace.matrix_view import is_box, path_names
from galore_jax.types import PyTree

ClipBy = Literal["first_pass", "previous_step"]
HEAD, EMBEDDING = "head", "embedding"


class LayeredModel(NamedTuple):
    """A model whose blocks are stacked along the first axis of the leaves below one key.

    Attributes:
      embed: of the parameters and the batch, the activations before the first block and whatever
        all blocks are given beside them (masks, positions), a pair.
      block: of one block's parameters, the activations and that, the activations after it.
      head_loss: of the parameters, the activations after the last block and the batch, the loss
        and something that is not differentiated, a pair.
      layers: the key of the blocks in the parameters. What `embed` and `head_loss` get has
        `optax.MaskedNode()` in place of leaves that they do not read, the blocks' among them.
    """

    embed: Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]]
    block: Callable[[PyTree, jax.Array, PyTree], jax.Array]
    head_loss: Callable[[PyTree, jax.Array, PyTree], tuple[jax.Array, Any]]
    layers: str = "layers"


class LayerwiseState(NamedTuple):
    """State of a layer-wise step.

    Attributes:
      inner: the optimizer's, as `galore_jax.init` makes it.
      norm: float32 scalar, the global norm of the last step's finite gradients, of coordinates
        where these are projected, before any clipping; of a step whose is 0 it is left as it was,
        and 0 before the first.
    """

    inner: PyTree
    norm: Any


def init(tx: optax.GradientTransformation, params: PyTree) -> LayerwiseState:
    """The state before the first step; moments are float32, whatever the parameters are."""
    # Compiled, for then no float32 parameters exist.
    inner = jax.jit(lambda params: init_optimizer(tx, to_float32(params)))(params)
    return LayerwiseState(inner, jnp.zeros([], jnp.float32))


class Step(NamedTuple):
    """What a step returns: the new parameters and state, and what `head_loss` returned."""

    params: PyTree
    state: LayerwiseState
    loss: jax.Array
    aux: Any


def make_step(
    model: LayeredModel,
    tx: optax.GradientTransformation,
    *,
    projected: bool = True,
    refreshes: bool = False,
    clip_norm: float = 0.0,
    clip_by: ClipBy = "first_pass",
    implementation: Implementation = "xla",
) -> Callable[..., Step]:
    """A whole training step, layer by layer; call it under `jax.jit`, parameters and state donated.

    It equals `value_and_grad` (after `refresh`) and `apply_gradients` up to rounding, for
    optimizers that treat each number or matrix by itself: schedules, weight decay, and all that
    `galore_jax.adamw` has are such. What `tx` does across a stack, as Adafactor's clip of the norm
    scales, or across leaves, as a clip by global norm, it here does within a layer: in place of the
    latter give `clip_norm`. Functions in it that choose leaves, as masks, see those of one layer,
    without the layer axis: let them go by name. Gradients cannot be accumulated over micro-batches,
    since those of a layer are gone before the next one's are known; accumulate coordinates by
    `value_and_grad(micro_batches=…)`.

    Args:
      model: see `LayeredModel`.
      tx: the optimizer.
      projected: the backward pass projects gradients; False: full ones, of one layer at a time, for
        optimizers that want them and for those without galore.
      refreshes: of projected gradients, make new bases where they are due, in the same visit of a
        layer. Such a step is compiled apart, for use where `refresh_due(state)` says so. Full
        gradients refresh as galore does, without this. `refresh="random"` would draw one subspace
        for all layers.
      clip_norm: gradients are scaled down to this global norm, of coordinates where these are
        projected; 0: they are not.
      clip_by: how the norm is known before the first layer is updated. "first_pass": by a forward
        and backward pass of its own, exact, for nearly twice the time. "previous_step": the norm of
        the step before stands in for it, free of cost; the first step is not clipped, and an
        outlier clips the step after it.
      implementation: of the lift: see `ops.implementation`.

    Returns:
      A function `(params, state, batch, key=None)` of a `LayerwiseState` and, for stochastic
      rounding of bfloat16 parameters, a random key, that returns a `Step`.

    Raises:
      ValueError: a clip that there is not; when the step is called, leaves of blocks that are not
        stacked by layer or are projected across layers, an `embed` or `head_loss` that reads them,
        an `embed` that gives blocks parameters to read, a state that `init` did not make, or, if
        projected, one without galore.
    """
    if clip_by not in get_args(ClipBy):
        raise ValueError(f"layerwise: clip_by is one of {get_args(ClipBy)}, not {clip_by!r}.")
    if clip_norm < 0:
        raise ValueError(f"layerwise: clip_norm must be 0 or more, not {clip_norm}.")

    def step(
        params: PyTree, state: LayerwiseState, batch: PyTree, key: jax.Array | None = None
    ) -> Step:
        _check(state, projected)
        parts, inner = _parts(model, params, batch), state.inner
        factor, refreshes_now = jnp.float32(1), refreshes
        if clip_norm and clip_by == "previous_step":
            factor = _clip_factor(state.norm, clip_norm)
        elif clip_norm:
            # Bases are new from the first pass on, for the norm is that of coordinates in them.
            visit = _Visit(tx, projected, refreshes, update=None)
            _, inner, squares, _ = _backward(model, parts, visit, params, inner, batch)
            factor, refreshes_now = _clip_factor(jnp.sqrt(squares), clip_norm), False
        visit = _Visit(tx, projected, refreshes_now, _Update(factor, key, implementation))
        params, inner, squares, found = _backward(model, parts, visit, params, inner, batch)
        norm = jnp.where(squares > 0, jnp.sqrt(squares), state.norm)
        return Step(params, LayerwiseState(inner, norm), *found)

    return step


class _Update(NamedTuple):
    """How leaves are updated: their gradients' factor, the rounding's key, the implementation."""

    factor: jax.Array
    key: jax.Array | None
    implementation: Implementation


class _Visit(NamedTuple):
    """Of one part of the model, which refreshes its bases, updates it, or only tells the norm."""

    tx: optax.GradientTransformation
    projected: bool
    refreshes: bool
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
        """Differentiates `loss(params, x, *rest)`, a pair, by the part's parameters and x.

        Returns:
          Parameters and state, the gradient of x, the sum of squares of the gradients of the
          parameters, and the loss's pair.
        """
        if self.projected and self.refreshes:
            state = refresh(loss, self.tx, has_aux=True)(params, state, x, *rest)
        of = lambda free, *rest: loss(free["params"], free["x"], *rest)
        free = {"params": params, "x": x}
        if self.projected:
            nothing = jax.tree.map(lambda _: optax.MaskedNode(), x)
            bases = {"params": bases_in(params, state), "x": nothing}
            traced = TracedLoss(of, free, bases, rest, {}, has_aux=True)
            found, gradients = traced.value_and_grad()
        else:
            found, gradients = jax.value_and_grad(of, has_aux=True)(free, *rest)
        own = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradients["params"])
        # The norm first, for then updates can be made in place of gradients.
        own, squares = lax.optimization_barrier((own, finite_squares(own)))
        if self.update is not None:
            key = self.update.key
            key = None if key is None else jax.random.fold_in(key, number)
            params, state = apply_gradients(
                self.tx, own, state, params, key=key, implementation=self.update.implementation
            )
        return (params, state), gradients["x"], squares, found


def _backward(
    model: LayeredModel,
    parts: "_Parts",
    visit: _Visit,
    params: PyTree,
    state: PyTree,
    batch: PyTree,
) -> tuple[PyTree, PyTree, jax.Array, Any]:
    """A forward pass, then visits of the head, of each layer from the last on, of the embedding.

    Returns:
      The parameters, the optimizer's state, the sum of the squares of all gradients, and what
      `head_loss` returned.
    """
    slices, last = parts.slices, parts.slices.number
    factor = jnp.float32(1) if visit.update is None else visit.update.factor
    x, beside = model.embed(slices.group(params, EMBEDDING), batch)
    x, inputs = lax.scan(
        lambda x, block: (model.block(block, x, beside), x), x, params[model.layers]
    )

    def head_loss(head: PyTree, inputs: tuple[jax.Array, PyTree]) -> tuple[jax.Array, Any]:
        x, tied = inputs
        found = model.head_loss(slices.with_group(tied, HEAD, head), x, batch)
        # All gradients are multiples of this one's, so it alone is scaled.
        return found[0] * factor, found

    def block_product(layer: PyTree, x: jax.Array, upstream: jax.Array) -> tuple[jax.Array, None]:
        return _inner(model.block(layer[model.layers], x, beside), upstream), None

    def embedding_product(embedding: PyTree, _: None, upstream: PyTree) -> tuple[jax.Array, None]:
        # The head's share in the gradient of what both use is added to the embedding's own.
        x, share = upstream
        own = _inner(model.embed(embedding, batch)[0], x)
        return own + _inner(parts.tied(embedding), share), None

    def group(name: str) -> tuple[PyTree, PyTree]:
        return slices.group(params, name), slices.group(state, name)

    def with_part(name: str | None, new: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        return tuple(
            slices.with_group(old, name, own) for old, own in zip((params, state), new, strict=True)
        )

    def layer(i: Any, trees: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        return slices.layer(trees[0], i), slices.layer(trees[1], i)

    def at_layer(n: jax.Array, carry: Any) -> Any:
        (params, state), own, upstream, squares = carry
        i = last - 1 - n
        new, upstream, more, _ = visit(block_product, *own, inputs[i], upstream, number=i)
        if visit.update is not None:
            params = slices.with_layer(params, i, new[0])
        if visit.update is not None or visit.refreshes:
            state = slices.with_layer(state, i, new[1])
        trees = params, state
        # The next one is cut out here, and carried: XLA would copy a whole stack to read from it
        # and write to it in a visit.
        return trees, layer(jnp.maximum(i - 1, 0), trees), upstream, squares + more

    tied = parts.tied(slices.group(params, EMBEDDING))
    at_head = lambda own: visit(head_loss, *own, (x, tied), number=last)
    # XLA may postpone an update that nothing waits for, and would keep its gradient until then.
    head, (upstream, share), squares, (_, found) = lax.optimization_barrier(at_head(group(HEAD)))
    params, state = with_part(HEAD, head)
    start = (params, state), layer(last - 1, (params, state)), upstream, squares
    (params, state), _, upstream, squares = lax.fori_loop(0, last, at_layer, start)
    new, _, more, _ = visit(
        embedding_product, *group(EMBEDDING), None, (upstream, share), number=last + 1
    )
    params, state = with_part(EMBEDDING, new)
    # What is shared, such as counts, moves on once all have seen it as it was.
    params, state = with_part(None, head)
    return params, state, (squares + more) / factor**2, found


class _Parts(NamedTuple):
    """How a model is cut: the slices, and the paths in the embedding that the head reads too."""

    slices: Slices
    shared: frozenset

    def tied(self, tree: PyTree) -> PyTree:
        """What both read, of a tree like the parameters; `optax.MaskedNode()` elsewhere."""
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf if path in self.shared else optax.MaskedNode(),
            tree,
            is_leaf=is_box,
        )


def _parts(model: LayeredModel, params: PyTree, batch: PyTree) -> _Parts:
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params, is_box)]
    leaves = jax.tree.leaves(params)

    def reads(f: Callable[..., Any], *inputs: Any) -> tuple[set, set, tuple]:
        """The paths that each of two results of `f(params, *inputs)` depends on; their shapes."""
        flags, shapes = dependencies(f, params, *inputs)
        one, other = ({p for p, used in zip(paths, own, strict=False) if used} for own in flags)
        return one, other, shapes

    by_embed, by_beside, (x, _) = reads(lambda params: model.embed(params, batch))
    by_loss, by_aux, _ = reads(lambda params, x: model.head_loss(params, x, batch), x)
    blocks = {path for path in paths if path_names(path)[0] == model.layers}
    if by_beside - blocks:
        raise ValueError(
            "layerwise: what embed returns beside the activations depends on parameters, whose "
            "gradient through it would be lost: compute it in the blocks."
        )
    if blocks & (by_embed | by_beside | by_loss | by_aux):
        raise ValueError(
            f'layerwise: embed and head_loss may not read what lies below "{model.layers}": only '
            "the blocks get it, each its own layer."
        )
    shapes = [leaf.shape for path, leaf in zip(paths, leaves, strict=True) if path in blocks]
    sizes = {shape[0] if shape else 0 for shape in shapes}
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(
            f'layerwise: the leaves below "{model.layers}" must be stacked by layer along their '
            f"first axis, but its sizes are {sorted(sizes)}."
        )
    groups = {path: EMBEDDING if path in by_embed else HEAD for path in paths}
    groups |= dict.fromkeys(blocks, LAYERS)
    return _Parts(Slices(groups, sizes.pop()), frozenset(by_embed & (by_loss | by_aux)))


def _check(state: Any, projected: bool) -> None:
    if not isinstance(state, LayerwiseState):
        raise ValueError("layerwise: give the step the state of galore_jax.layerwise.init.")
    if projected and not galore_states(state.inner, inside_chains=True):
        raise ValueError(
            "layerwise: an optimizer without galore takes full gradients: make_step(…, "
            "projected=False)."
        )


def _clip_factor(norm: jax.Array, largest: float) -> jax.Array:
    return jnp.where(norm > largest, largest / norm, 1)


def _inner(a: PyTree, b: PyTree) -> jax.Array:
    """The sum of products, float32: by `a` its derivative is `b`."""
    products = jax.tree.map(
        lambda a, b: jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32)), a, b
    )
    return jnp.sum(jnp.stack([jnp.float32(0), *jax.tree.leaves(products)]))

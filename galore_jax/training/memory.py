"""Bytes of a training step, predicted from shapes and as compiled, and of the start of a run.

All shapes are traced from the model and the optimizer, so a prediction follows their changes. It is
the sum of what a step works with: XLA may need less, since gradients and activations never all
exist at once, or more, for temporaries. The compiled programs are what counts.
"""

import collections
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from galore_jax.models import llama_layerwise
from galore_jax.models.adapters import combine
from galore_jax.models.layers import Block
from galore_jax.optim.state import galore_states, start_coordinates
from galore_jax.subspace.matrix_view import named_leaves, path_names
from galore_jax.training.config import Config, OptimizerConfig
from galore_jax.training.gradients import dropout_rngs
from galore_jax.training.layout import BATCH_AXES, on_mesh
from galore_jax.training.mesh import FSDP, TENSOR
from galore_jax.training.optimizer import matrices
from galore_jax.training.state import (
    abstract_state,
    batch_shapes,
    init_state,
    starting_program,
    trained,
    tree_bytes,
    tree_size,
)
from galore_jax.training.step import batch_loss, make_train_step, with_seeds
from galore_jax.types import PyTree

Parts = dict[str, int]

PARTS = ("weights", "gradients", "bases", "moments", "activations")
# Names in the state of galore and of what follows it, also of optax.contrib.galore.
PARTS_OF_STATE = {"vectors": "bases", "projector": "bases"} | dict.fromkeys(
    ("mu", "nu", "rows", "columns", "ema"), "moments"
)
# Bytes of two 8-bit moments per number: a code each, and a float32 scale each for a block of 256.
BYTES_OF_8BIT_MOMENTS = 2 * (1 + 4 / 256)


def bytes_by_part(opt_state: PyTree) -> Parts:
    """Bytes of `bases`, `moments` and `rest`, recognised by the names in an optimizer's state."""
    parts = collections.Counter(bases=0, moments=0, rest=0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
        named = [PARTS_OF_STATE[name] for name in path_names(path) if name in PARTS_OF_STATE]
        parts[named[0] if named else "rest"] += tree_bytes(leaf)
    return dict(parts)


def matrix_state_bytes(config: Config) -> int:
    """Bytes that the optimizer keeps for the matrices that GaLore projects, bases included."""
    params, opt_state, _ = jax.eval_shape(lambda: init_state(config))
    paths = [names for names, is_matrix in named_leaves(matrices(params)) if is_matrix]

    def belongs_to_one(names: tuple[str, ...]) -> bool:
        # A state has the path of a parameter somewhere in its own: (1, mu, layers, …, kernel).
        parts = lambda length: (names[n : n + length] for n in range(len(names)))
        return any(path in parts(len(path)) for path in paths)

    leaves = jax.tree_util.tree_leaves_with_path(opt_state)
    return tree_bytes([leaf for path, leaf in leaves if belongs_to_one(path_names(path))])


def on_one_device(tree: PyTree) -> PyTree:
    """The shapes of what one device has of arrays, or of shapes with or without shardings."""

    def part(leaf: Any) -> jax.ShapeDtypeStruct:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    return jax.tree.map(part, tree)


def predict(config: Config, mesh: Mesh | None = None) -> Parts:
    """Bytes of a training step by part, on each device of a mesh, without compiling it.

    * `weights`, `bases` and `moments` are exact; counters are left out.
    * `gradients`: of all trained parameters, float32 coordinates where the backward pass projects
      them; of a layer-wise step the largest that exist at a time, those of a layer, the head or the
      embedding.
    * `activations`: what automatic differentiation keeps for the backward pass of a micro-batch,
      logits included. With `model.remat` or a layer-wise step that is the inputs of the blocks, and
      what one block keeps when it is computed again.

    Gradients are taken to be divided as parameters are, and activations as the batch is.

    Returns:
      The parts, those of `PARTS`, and their sum `total`.
    """
    params, opt_state, _ = jax.eval_shape(lambda: init_state(config))
    here = on_one_device(abstract_state(config, mesh))
    parts = bytes_by_part(here.opt_state)
    sizes = {} if mesh is None else mesh.shape
    divided = lambda *axes: math.prod(sizes.get(axis, 1) for axis in axes)
    return _with_total(
        {
            "weights": tree_bytes(here.params),
            "gradients": _gradients(config, trained(config, params)[0], opt_state)
            // divided(FSDP, TENSOR),
            "bases": parts["bases"],
            "moments": parts["moments"],
            "activations": _activations(config, params) // divided(*BATCH_AXES),
        }
    )


def trained_size(config: Config) -> int:
    """The number of parameters that the optimizer updates."""
    params, _, _ = jax.eval_shape(lambda: init_state(config))
    return tree_size(trained(config, params)[0])


def baselines(config: Config) -> dict[str, Parts]:
    """Predictions for other optimizers of the same model and batch, as the paper compares them.

    All have bfloat16 weights, hold all logits, and keep the activations of all blocks. The
    reference's GaLore has bfloat16 bases and never more than one layer's gradient, a full one.

    Returns:
      The parts of each, by name.
    """
    model = dataclasses.replace(config.model, dtype="bfloat16", remat=False)
    optimizer = OptimizerConfig(
        name="galore_adamw8bit",
        warmup_steps=0,  # which may not exceed those of the training
        rank=config.optimizer.rank,
        proj_type=config.optimizer.proj_type,
        basis_dtype="bfloat16",
    )
    training = dataclasses.replace(config.training, layerwise=False)
    reference = dataclasses.replace(config, model=model, optimizer=optimizer, training=training)
    params, opt_state, _ = jax.eval_shape(lambda: init_state(reference))
    weights, activations = tree_bytes(params), _activations(reference, params)
    one_layer = tree_bytes(params["layers"]) // model.num_layers
    coordinates = tree_size(_coordinates(params, opt_state))
    bases = bytes_by_part(opt_state)["bases"]

    def parts(gradients: int, moments: float, bases: int = 0) -> Parts:
        return _with_total(
            {
                "weights": weights,
                "gradients": gradients,
                "bases": bases,
                "moments": round(moments),
                "activations": activations,
            }
        )

    return {
        "BF16 Adam": parts(weights, 2 * weights),
        "8-bit Adam": parts(weights, BYTES_OF_8BIT_MOMENTS * tree_size(params)),
        "8-bit GaLore, as in the reference": parts(
            one_layer, BYTES_OF_8BIT_MOMENTS * coordinates, bases
        ),
    }


def compiled(config: Config, mesh: Mesh | None = None) -> dict[str, Parts]:
    """Bytes of the compiled programs on each device, as assigned by XLA; nothing is run.

    Call it outside the mesh, where a run also makes its state and steps.

    Args:
      config: the configuration of the run.
      mesh: the devices to compile for, which may be absent: see `compile_targets.target`. None: the
        default device.

    Returns:
      Parts of `train_step`, of `refresh_step` with projected gradients or ReLoRA, which first
      refreshes the bases or restarts the adapters, and of `start`, which makes the first state:
      `arguments`, `outputs`, `aliased` (outputs that share the memory of arguments), `temporaries`,
      and the `total` that the program needs.
    """
    state, batch = abstract_state(config, mesh), batch_shapes(config, mesh)
    steps = {"train_step": make_train_step(config, mesh=mesh)}
    if config.optimizer.has_refreshes:
        steps["refresh_step"] = make_train_step(config, refreshes=True, mesh=mesh)
    with on_mesh(mesh):
        parts = {name: _assigned(step.lower(state, batch)) for name, step in steps.items()}
    return parts | {"start": _assigned(starting_program(config, state).lower())}


def _assigned(lowered: Any) -> Parts:
    memory = lowered.compile().memory_analysis()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }
    return parts | {"total": sum(parts.values()) - 2 * parts["aliased"]}


def _with_total(parts: Parts) -> Parts:
    return parts | {"total": sum(parts.values())}


def _coordinates(params: PyTree, opt_state: PyTree) -> PyTree:
    """The shapes of float32 gradients, of coordinates where they are projected."""
    states = galore_states(opt_state, inside_chains=True)
    return jax.eval_shape(lambda params: start_coordinates(params, states), params)


def _gradients(config: Config, params: PyTree, opt_state: PyTree) -> int:
    is_projected = config.optimizer.has_projected_gradients
    gradients = _coordinates(params, opt_state) if is_projected else params
    if config.training.layerwise:
        layer = tree_bytes(gradients["layers"]) // config.model.num_layers
        embedding = tree_bytes(gradients["embed_tokens"])
        if config.model.tie_embeddings:  # The head's gradient waits for the embedding's.
            return embedding + max(layer, embedding)
        return max(layer, embedding, tree_bytes(gradients["lm_head"]))
    if config.training.accumulation > 1:
        return 4 * tree_size(gradients)  # They are accumulated in float32.
    return tree_bytes(gradients)


def _activations(config: Config, params: PyTree) -> int:
    """Bytes that are kept from the forward to the backward pass of a micro-batch."""
    model, adapter = config.model, config.optimizer.adapter
    rows = config.data.batch_size // config.training.accumulation
    batch = {
        name: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype)
        for name, leaf in batch_shapes(config).items()
    }
    batch = jax.eval_shape(lambda batch: with_seeds(config, jnp.int32(0), batch), batch)
    x, block_inputs = jax.eval_shape(partial(llama_layerwise.embed, model), params, batch)

    def loss(updated: PyTree, frozen: PyTree, batch: Any) -> jax.Array:
        return batch_loss(model, combine(updated, frozen), batch, adapter)[0]

    def block(updated: PyTree, frozen: PyTree, batch: Any, x: Any, block_inputs: Any) -> jax.Array:
        layer = {"params": combine(updated, frozen)}
        settings = {**model.block_settings, "adapter": adapter}
        return Block(**settings).apply(layer, x, *block_inputs, rngs=dropout_rngs(batch))[0]

    kept = 0
    if config.training.layerwise:
        kept += model.num_layers * tree_bytes(x)
    else:
        kept += _kept_for_backward(loss, *trained(config, params), batch)
    if config.training.layerwise or model.remat:
        layer = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params["layers"]
        )
        kept += _kept_for_backward(block, *trained(config, layer), batch, x, block_inputs)
    return kept


def _kept_for_backward(f: Callable[..., Any], *arguments: PyTree) -> int:
    """Bytes that `jax.vjp` by the first argument keeps, without the arguments themselves."""

    def residuals(*arguments: PyTree) -> list[jax.Array]:
        _, backward = jax.vjp(lambda first: f(first, *arguments[1:]), arguments[0])
        given = {id(leaf) for leaf in jax.tree.leaves(arguments)}
        return [leaf for leaf in jax.tree.leaves(backward) if id(leaf) not in given]

    return tree_bytes(jax.eval_shape(residuals, *arguments))

"""Bytes of a training step: predicted by arithmetic on shapes, and as compiled.

A prediction names what lives when a step takes most: what it changes (weights, bases, moments) and,
of its phases, the one that needs most beside that. Phases end where gradients do: those of the
head, of the blocks, of the embedding; then the update.
"""

import collections
import dataclasses
from typing import Any

import jax
import numpy as np

from galore_jax.models.layers import MAX_BLOCKS, MIN_QUERIES
from galore_jax.models.loss import VOCAB_CHUNK
from galore_jax.optim.state import galore_states, start_coordinates
from galore_jax.subspace.matrix_view import path_names
from galore_jax.training.compile_targets import place
from galore_jax.training.config import Config, OptimizerConfig
from galore_jax.training.state import batch_shapes, init_state, tree_bytes, tree_size
from galore_jax.training.step import make_train_step
from galore_jax.types import PyTree

Parts = dict[str, int]

PARTS = ("weights", "gradients", "bases", "moments", "activations", "logits", "update")
# Names in the state of galore and of what follows it, also of optax.contrib.galore.
PARTS_OF_STATE = {"vectors": "bases", "projector": "bases"} | dict.fromkeys(
    ("mu", "nu", "rows", "columns", "ema"), "moments"
)
# Of 8-bit moments: a code a number and a float32 scale a block of 256, of which there are two.
MOMENTS_8BIT = 2 * (1 + 4 / 256)


def bytes_by_part(opt_state: PyTree) -> Parts:
    """Bytes of `bases`, `moments` and `rest`, told apart by the names in an optimizer's state."""
    parts = collections.Counter(bases=0, moments=0, rest=0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
        named = [PARTS_OF_STATE[name] for name in path_names(path) if name in PARTS_OF_STATE]
        parts[named[0] if named else "rest"] += tree_bytes(leaf)
    return dict(parts)


def predict(config: Config) -> Parts:
    """Bytes that a training step takes at its peak, by part, without compiling it.

    `weights`, `bases` and `moments` are exact. The others are of the phase that needs most: the
    arrays that XLA is known to keep on GPUs, without gaps between them. On CPUs it keeps more, and
    much in float32 that is bfloat16 elsewhere.

    * `gradients`: float32 coordinates where the backward pass projects them;
    * `activations`: of the forward pass for the backward pass, and what one block adds to them;
    * `logits`: with their gradient;
    * `update`: what is beside gradients when weights change, and one layer's weights cut out.

    Returns:
      The parts, those of `PARTS`, and their sum `total`. Counters are left out.
    """
    state = jax.eval_shape(lambda: init_state(config))
    of_state = bytes_by_part(state.opt_state)
    kept = {"weights": tree_bytes(state.params)}
    kept |= {part: of_state[part] for part in ("bases", "moments")}
    phases = _layerwise_phases if config.training.layerwise else _whole_phases
    peak = max(phases(config, *state[:2]), key=lambda phase: sum(phase.values()))
    return _complete(kept | peak)


def baselines(config: Config) -> dict[str, Parts]:
    """Predictions for a model and batch of other optimizers, as the paper compares them, by name.

    All have bfloat16 weights, hold all logits, and keep what this model's blocks keep without
    remat. The reference's GaLore has bfloat16 bases and never more than one layer's gradient, full.
    """
    model = dataclasses.replace(config.model, dtype="bfloat16", remat=False)
    optimizer = OptimizerConfig(
        name="galore_adamw8bit",
        rank=config.optimizer.rank,
        proj_type=config.optimizer.proj_type,
        basis_dtype="bfloat16",
    )
    reference = dataclasses.replace(config, model=model, optimizer=optimizer)
    params, opt_state, _ = jax.eval_shape(lambda: init_state(reference))
    weights, numbers = tree_bytes(params), tree_size(params)
    coordinates = tree_size(_coordinates(params, opt_state))
    working = {
        "weights": weights,
        "activations": model.num_layers * _block_activations(reference),
        "logits": _logits(reference),
    }
    one_layer = tree_bytes(params["layers"]) // model.num_layers
    return {
        "BF16 Adam": _complete(working | {"gradients": weights, "moments": 2 * weights}),
        "8-bit Adam": _complete(
            working | {"gradients": weights, "moments": round(MOMENTS_8BIT * numbers)}
        ),
        "8-bit GaLore, as the reference does it": _complete(
            working
            | {
                "gradients": one_layer,
                "bases": bytes_by_part(opt_state)["bases"],
                "moments": round(MOMENTS_8BIT * coordinates),
            }
        ),
    }


def compiled(config: Config, sharding: Any = None) -> dict[str, Parts]:
    """Bytes of the compiled step, as XLA assigned them; nothing is allocated, and nothing run.

    Args:
      config: of the run.
      sharding: of a card to compile for, from `compile_targets.target`; None: the device here.

    Returns:
      Of `train_step` and, with projected gradients, of `refresh_step`, which makes new
      bases before its update: `arguments`, `outputs`, those of them `aliased` with arguments,
      `temporaries`, and `total`, all that the step needs.
    """
    arguments = jax.eval_shape(lambda: init_state(config)), batch_shapes(config)
    if sharding is not None:
        arguments = place(arguments, sharding)
    steps = {"train_step": False}
    if config.optimizer.are_projected:
        steps["refresh_step"] = True
    return {
        name: _assigned(make_train_step(config, refreshes=refreshes).lower(*arguments).compile())
        for name, refreshes in steps.items()
    }


def _assigned(step: Any) -> Parts:
    memory = step.memory_analysis()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }
    return parts | {"total": sum(parts.values()) - 2 * parts["aliased"]}


def _complete(parts: Parts) -> Parts:
    parts = {part: parts.get(part, 0) for part in PARTS}
    return parts | {"total": sum(parts.values())}


def _coordinates(params: PyTree, opt_state: PyTree) -> PyTree:
    """The shapes of float32 gradients, of coordinates where they are projected."""
    states = galore_states(opt_state, inside_chains=True)
    return jax.eval_shape(lambda params: start_coordinates(params, states), params)


def _tokens(config: Config) -> int:
    """Of a micro-batch."""
    return config.data.batch_size // config.training.accumulation * config.data.sequence_length


def _itemsize(config: Config) -> int:
    return np.dtype(config.model.dtype).itemsize


def _queries_and_keys(config: Config) -> tuple[float, float]:
    """Of attention by blocks of queries, over T: scores a query, and keys of all blocks."""
    length = config.data.sequence_length
    step = -(-length // min(MAX_BLOCKS, -(-length // MIN_QUERIES)))
    blocks = [
        (min(step, length - start), min(start + step, length)) for start in range(0, length, step)
    ]
    scores = sum(queries * keys for queries, keys in blocks) / length
    return scores, sum(keys for _, keys in blocks) / length


def _block_activations(config: Config) -> int:
    """What one block keeps for its backward pass."""
    model, itemsize = config.model, _itemsize(config)
    scores, copies = _queries_and_keys(config)
    # The gated MLP: gate, up, silu's and the product's parts.
    wide = 7 * itemsize * model.intermediate_size
    # Residuals, norms and the attention's sums in float32; inputs of products as they are.
    narrow = (7 * 4 + 3 * itemsize) * model.hidden_size
    heads = itemsize * (model.num_heads + 2 * copies * model.kv_heads) * model.head_size
    softmax = (4 + itemsize) * model.num_heads * scores
    return round(_tokens(config) * (wide + narrow + heads + softmax))


def _recomputed_half(config: Config) -> int:
    """Of a block that computes attention and MLP again, one after the other: the larger of them.

    That is what it makes, the gradients of this, and what goes in and out.
    """
    model, itemsize = config.model, _itemsize(config)
    scores, _ = _queries_and_keys(config)
    mlp = 3 * itemsize * model.intermediate_size
    attention = 4 * itemsize * model.hidden_size + (4 + itemsize) * model.num_heads * scores
    around = 3 * itemsize * model.hidden_size
    return round(_tokens(config) * (2 * max(mlp, attention) + around))


def _inputs(config: Config) -> int:
    """The inputs of all blocks."""
    model = config.model
    return model.num_layers * _tokens(config) * model.hidden_size * _itemsize(config)


def _logits(config: Config, columns: int | None = None) -> int:
    """Float32 logits and their gradient, of all the vocabulary or some columns."""
    return _tokens(config) * (columns or config.model.vocab_size) * (4 + _itemsize(config))


def _whole_phases(config: Config, params: PyTree, opt_state: PyTree) -> list[Parts]:
    """Of a step with the gradients of the whole model: head, blocks, update."""
    model, accumulates = config.model, config.training.accumulation > 1
    coordinates = _coordinates(params, opt_state)
    # Full gradients have the weights' type, and float32 where they are accumulated.
    gradients = coordinates if config.optimizer.are_projected else params
    whole = 4 * tree_size(gradients) if accumulates else tree_bytes(gradients)
    accumulated = whole if accumulates else 0
    fresh = tree_bytes(gradients["layers"]) + tree_bytes(params["lm_head"])
    block = _block_activations(config)
    kept, again = (_inputs(config), block) if model.remat else (model.num_layers * block, 0)
    # Of one block the gradients of gate and up, float32.
    again += 2 * 4 * _tokens(config) * model.intermediate_size
    return [
        {"gradients": accumulated, "activations": kept, "logits": _logits(config)},
        {"gradients": accumulated + fresh, "activations": kept + again},
        {"gradients": whole, "update": _updates(config, coordinates)},
    ]


def _updates(config: Config, coordinates: PyTree) -> int:
    """Of coordinates; others are fused with the weights they change.

    One leaf's at a time, but that a clip holds all gradients until their norm is known: then those
    of all but one leaf are beside them.
    """
    if not config.optimizer.has_galore:
        return 0
    leaves = [tree_bytes(leaf) for leaf in jax.tree.leaves(coordinates["layers"])]
    return sum(leaves) - max(leaves) if config.optimizer.clip_norm else max(leaves)


def _layerwise_phases(config: Config, params: PyTree, opt_state: PyTree) -> list[Parts]:
    """Of a step that updates layer by layer: head, a layer, embedding."""
    model, itemsize = config.model, _itemsize(config)
    gradients = _coordinates(params, opt_state) if config.optimizer.are_projected else params
    head, embedding = (tree_size(params[name]) for name in ("lm_head", "embed_tokens"))
    inputs = _inputs(config)
    return [
        {
            # As it comes, and in float32 for the update.
            "gradients": (itemsize + 4) * head,
            "activations": inputs,
            "logits": _logits(config, min(VOCAB_CHUNK, model.vocab_size)),
        },
        {
            "gradients": 4 * tree_size(gradients["layers"]) // model.num_layers,
            "activations": inputs + _recomputed_half(config),
            "update": tree_bytes(params["layers"]) // model.num_layers,
        },
        {
            # The sum over the tokens in float32, and rounded, in float32 for the update.
            "gradients": 4 * embedding,
            "activations": inputs // model.num_layers,
            "update": 4 * embedding,
        },
    ]

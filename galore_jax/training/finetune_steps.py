"""The compiled functions of a fine-tuning on one device or on a mesh."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

import galore_jax
from galore_jax.data.glue import TASKS
from galore_jax.models import adapters
from galore_jax.models.adapters import Adapter
from galore_jax.models.encoder import Classifier, EncoderConfig
from galore_jax.training.finetune_config import FinetuneConfig
from galore_jax.training.gradients import dropout_rngs, mean_gradients, seeded
from galore_jax.training.layout import (
    check_divisible,
    data_axes,
    jit_on,
    kernel_rules,
    moment_axes,
    on_mesh,
    per_shard,
    put_batch,
    whole,
    with_shardings,
)
from galore_jax.training.mesh import TENSOR, make_mesh
from galore_jax.training.optimizer import make_optimizer
from galore_jax.types import PyTree


class Steps(NamedTuple):
    """The compiled functions of a fine-tuning.

    Attributes:
      adapt: the parameters of a checkpoint and a key → those to train, with new adapters if the
        optimizer is LoRA.
      init: the parameters → the optimizer's state.
      refresh: parameters, state, batch and key → the state with new bases; None without projected
        gradients.
      update: parameters, state, batch and key → the next parameters and state, which replace those
        given, and the loss.
      outputs: parameters and batch → the outputs of the head, float32 (batch, outputs).
      put: a batch → the batch on the devices on which these functions take it.
    """

    adapt: Callable[..., Any]
    init: Callable[..., Any]
    refresh: Callable[..., Any] | None
    update: Callable[..., Any]
    outputs: Callable[..., Any]
    put: Callable[..., Any]


def finetuning_mesh(config: FinetuneConfig, encoder: EncoderConfig) -> Mesh | None:
    """The mesh of a fine-tuning of this encoder on all devices; None for a single device.

    Raises:
      InputError: as for `training_mesh`.
    """
    sizes = {"num_heads": encoder.num_heads, "intermediate_size": encoder.intermediate_size}
    mesh = make_mesh(config.mesh)
    check_divisible(mesh, config.data.batch_size, sizes)
    return mesh


def make_steps(
    config: FinetuneConfig, model: Classifier, steps: int, mesh: Mesh | None = None
) -> Steps:
    """Makes the functions of a fine-tuning of `steps` updates.

    The model has no adapters: they are added here if the optimizer is LoRA. The mesh is that of
    `finetuning_mesh`.
    """
    tx, adapter = make_optimizer(config.optimizer, steps), config.optimizer.adapter
    task = TASKS[config.data.task]
    implementation: Any = config.optimizer.implementation
    adapted = model.clone(adapter=adapter)

    def loss(params: PyTree, batch: Any) -> tuple[jax.Array, jax.Array]:
        """The sums of weighted cross-entropies, or squared errors, and of the weights."""
        outputs: Any = adapted.apply(
            {"params": params},
            batch["tokens"],
            batch["token_types"],
            deterministic=False,
            rngs=dropout_rngs(batch),
        )
        if task.labels:
            losses = optax.softmax_cross_entropy_with_integer_labels(outputs, batch["labels"])
        else:
            losses = (outputs[:, 0] - batch["labels"]) ** 2
        return jnp.sum(losses * batch["weights"]), jnp.sum(batch["weights"])

    def trained(params: PyTree) -> tuple[PyTree, PyTree]:
        """The parameters to update, and those that are frozen."""
        return adapters.split(params, adapters_only=adapter is not None)

    def initial(key: jax.Array) -> PyTree:
        return adapted.init(key, jnp.zeros((1, 1), jnp.int32))["params"]

    def adapt(params: PyTree, key: jax.Array) -> PyTree:
        if adapter is None:
            return params
        return adapters.combine(params, adapters.factors(initial(key)))

    projected, loss = config.optimizer.has_projected_gradients, per_shard(loss)
    gradients_of = mean_gradients(loss, trained, projected=projected, mesh=mesh)
    refreshed = galore_jax.refresh(loss, has_aux=True, data_axes=data_axes(mesh))

    def refresh(params: PyTree, state: PyTree, batch: Any, key: jax.Array) -> PyTree:
        return refreshed(params, state, seeded(batch, key))

    def update(params: PyTree, state: PyTree, batch: Any, key: jax.Array) -> Any:
        gradients, metrics = gradients_of(params, state, seeded(batch, key))
        updated, frozen = trained(params)
        updated, state = galore_jax.apply_gradients(
            tx, gradients, state, updated, implementation=implementation
        )
        return adapters.combine(updated, frozen), state, metrics["loss"]

    def outputs(params: PyTree, batch: Any) -> Any:
        return adapted.apply({"params": params}, batch["tokens"], batch["token_types"])

    # Where parameters and state lie on a mesh: each device has its part of them.
    placement, state_placement, after_update, over = None, None, None, ()
    if mesh is not None:
        shapes = jax.eval_shape(initial, jax.random.key(0))
        placement = galore_jax.shardings(tx, shapes, mesh, _tensor_rules(adapter))
        updated, _ = trained(with_shardings(shapes, placement))
        over = moment_axes(config.mesh, mesh)
        state_placement = galore_jax.state_shardings(tx, updated, over=over)
        after_update = placement, state_placement, whole(mesh)

    def compiled(f: Callable[..., Any], out: Any = None, **options: Any) -> Callable[..., Any]:
        jitted = jit_on(mesh, f, out, **options)

        def call(*arguments: Any) -> Any:
            with on_mesh(mesh):
                return jitted(*arguments)

        return call

    return Steps(
        adapt=jax.jit(adapt, out_shardings=placement),
        init=lambda params: galore_jax.init(tx, trained(params)[0], over=over),
        refresh=compiled(refresh, state_placement) if projected else None,
        update=compiled(update, after_update, donate_argnums=(0, 1)),
        outputs=compiled(outputs),
        put=functools.partial(put_batch, mesh=mesh),
    )


def _tensor_rules(adapter: Adapter | None) -> Mapping[str, PartitionSpec]:
    """How parameters are divided over the axis "tensor".

    Embeddings are not: few numbers divide the 50,265 rows of RoBERTa's.
    """
    by_columns = ("q", "k", "v", "up")
    biases = {f"*/{name}_proj/bias": PartitionSpec(None, TENSOR) for name in by_columns}
    return kernel_rules(adapter, by_columns) | biases

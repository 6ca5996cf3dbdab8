"""A trainer of Tunix that projects gradients in the backward pass, and its use."""

import jax
import optax
from flax import nnx
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput
from tunix.sft.utils import build_positions_from_mask, make_causal_attn_mask

from galore_jax import adamw, refresh, refresh_due, value_and_grad


class GaLoreTrainer(PeftTrainer):
    micro_batches = 4

    def _train_step(self, model, optimizer, inputs):
        inputs = self.gen_model_input_fn(inputs)
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params, inputs):
            return self.loss_fn(nnx.merge(graph, params, rest, copy=True), **inputs)

        settings = {"has_aux": self._has_aux, "micro_batches": self.micro_batches}
        new_bases = refresh(loss, **settings)
        state = nnx.as_pure(optimizer.opt_state)
        keep = lambda params, state, inputs: state
        state = jax.lax.cond(refresh_due(state), new_bases, keep, params, state, inputs)
        out, grads = value_and_grad(loss, **settings)(params, state, inputs)
        nnx.update(optimizer.opt_state, nnx.state(state))
        optimizer.update(model, grads)
        value, aux = out if self._has_aux else (out, None)
        return value, aux, optax.tree.norm(grads)


config = ModelConfig(
    num_layers=1,
    vocab_size=100,
    embed_dim=32,
    hidden_dim=64,
    num_heads=4,
    head_dim=8,
    num_kv_heads=2,
    rope_theta=10_000,
    norm_eps=1e-5,
)
model = Llama3(config, rngs=nnx.Rngs(0))


def model_inputs(batch):
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": build_positions_from_mask(batch.input_mask),
        "attention_mask": make_causal_attn_mask(batch.input_mask),
    }


tokens = jax.random.randint(jax.random.key(0), (8, 16), 0, 100)
dataset = 10 * [TrainingInput(input_tokens=tokens, input_mask=tokens >= 0)]
trainer = GaLoreTrainer(model, adamw(1e-2, rank=8), TrainingConfig(eval_every_n_steps=100))
trainer.with_gen_model_input_fn(model_inputs).train(dataset)

"""An optimizer and a model of Keras, the latter for projected gradients, and their use."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import optax

from galore_jax import chain, galore, refresh, refresh_due, value_and_grad


@keras.saving.register_keras_serializable("galore_jax")
class GaLoreAdam(keras.optimizers.Optimizer):
    def __init__(self, learning_rate=1e-3, rank=0.25, update_proj_gap=200, **settings):
        super().__init__(learning_rate, **settings)
        self.galore = {"rank": rank, "update_proj_gap": update_proj_gap}
        self.tx = chain(galore(**self.galore), optax.adam(1.0))

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        state = self.tx.init({variable.path: variable.value for variable in variables})
        leaves, self.structure = jax.tree.flatten(state)
        self.slots = [self.add_variable(x.shape, x, x.dtype, name="slot") for x in leaves]

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        variables = {variable.path: variable for variable in trainable_variables}
        params = {path: variable.value for path, variable in variables.items()}
        grads = dict(zip(variables, grads, strict=True))
        state = self.structure.unflatten([slot.value for slot in self.slots])
        updates, state = self.tx.update(grads, state, params)
        for path, variable in variables.items():
            variable.assign_add(learning_rate * updates[path])
        for slot, leaf in zip(self.slots, jax.tree.leaves(state), strict=True):
            slot.assign(leaf)

    def get_config(self):
        return super().get_config() | self.galore


class GaLoreModel(keras.Model):
    def train_step(self, state, data):
        trainable, non_trainable, optimizer_variables, metrics = state
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        paths = [variable.path for variable in self.trainable_variables]
        slots = len(self.optimizer.slots)

        def loss(params):
            return self.compute_loss_and_updates(
                *([params[path] for path in paths], non_trainable, metrics, x, y, sample_weight),
                training=True,
                optimizer_variables=optimizer_variables,
            )

        params = dict(zip(paths, trainable, strict=True))
        state = self.optimizer.structure.unflatten(optimizer_variables[-slots:])
        new_bases = refresh(loss, has_aux=True)
        keep = lambda params, state: state
        state = jax.lax.cond(refresh_due(state), new_bases, keep, params, state)
        (_, aux), grads = value_and_grad(loss, has_aux=True)(params, state)
        value, y_pred, non_trainable, metrics = aux
        trainable, optimizer_variables = self.optimizer.stateless_apply(
            [*optimizer_variables[:-slots], *jax.tree.leaves(state)],
            [grads[path] for path in paths],
            trainable,
        )
        logs, metrics = self._update_metrics_variables(metrics, value, x, y, y_pred, sample_weight)
        return logs, (trainable, non_trainable, optimizer_variables, metrics)


x = jax.random.randint(jax.random.key(0), (64, 16), 0, 100)
y = (3 * x) % 100
inputs = keras.Input((16,), dtype="int32")
hidden = keras.layers.Embedding(100, 32)(inputs)
hidden += keras.layers.MultiHeadAttention(4, 8)(hidden, hidden, use_causal_mask=True)
hidden += keras.layers.Dense(32)(keras.layers.Dense(64, activation="gelu")(hidden))
model = GaLoreModel(inputs, keras.layers.Dense(100, name="head")(hidden))
cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(GaLoreAdam(1e-2, rank=8, weight_decay=0.1), cross_entropy, metrics=["accuracy"])
history = model.fit(x, y, batch_size=16, epochs=10, verbose=0)

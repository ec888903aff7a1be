"""Job 4: Linen with BatchNorm: statistics of antithetic pairs, averaged as aux."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen
from flax.training import train_state

import flatopt


class Network(linen.Module):
    @linen.compact
    def __call__(self, inputs, train=True):
        hidden = linen.Dense(8)(inputs)
        hidden = linen.BatchNorm(use_running_average=not train, momentum=0.5)(hidden)
        return linen.Dense(2)(linen.relu(hidden))


class TrainState(train_state.TrainState):
    batch_stats: dict


network = Network()


def loss_fn(params, batch_stats, batch):
    logits, updated = network.apply(
        {"params": params, "batch_stats": batch_stats},
        batch["inputs"],
        mutable=["batch_stats"],
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return losses.mean(), updated["batch_stats"]


value_and_grad = flatopt.smooth_value_and_grad(
    loss_fn, 0.01, num_samples=2, antithetic=True, has_aux=True
)


@jax.jit
def step(state, key, batch):
    (loss, batch_stats), grads = value_and_grad(
        key, state.params, state.batch_stats, batch
    )
    # Over the draws and their two signs, whatever axes they have.
    batch_stats = jax.tree.map(
        lambda draws, old: draws.reshape(-1, *old.shape).mean(axis=0),
        batch_stats,
        state.batch_stats,
    )
    return loss, state.apply_gradients(grads=grads, batch_stats=batch_stats)


def main():
    random = np.random.default_rng(0)
    labels = jnp.asarray(random.integers(0, 2, 64))
    inputs = jnp.asarray(random.normal(size=(64, 3)) + 3 * labels[:, None], jnp.float32)
    batch = {"inputs": inputs, "labels": labels}
    variables = network.init(jax.random.key(0), inputs)
    state = TrainState.create(
        apply_fn=network.apply,
        params=variables["params"],
        tx=optax.sgd(0.5),
        batch_stats=variables["batch_stats"],
    )
    losses = []
    for index in range(12):
        loss, state = step(state, jax.random.key(index), batch)
        losses.append(float(loss))
    shapes = jax.tree.map(jnp.shape, state.batch_stats)
    trained = {"params": state.params, "batch_stats": state.batch_stats}
    logits = network.apply(trained, inputs, train=False)
    return {
        "start": losses[0],
        "end": losses[-1],
        "accuracy": float((logits.argmax(axis=-1) == labels).mean()),
        "shapes": shapes,
        # The mean of what comes into BatchNorm, to which the statistics must come close.
        "input": inputs.mean(axis=0) @ state.params["Dense_0"]["kernel"]
        + state.params["Dense_0"]["bias"],
        "statistics": state.batch_stats["BatchNorm_0"]["mean"],
    }


if __name__ == "__main__":
    print(main())

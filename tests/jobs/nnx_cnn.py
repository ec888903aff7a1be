"""Job 3: an NNX CNN with aux, BatchNorm and a growing noise, resumed bit-equal by Orbax."""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

import flatopt
import flatopt.flax

NUM_STEPS, SAVE_AT = 8, 4


class Network(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, images):
        hidden = nnx.relu(self.norm(self.conv(images)))
        return self.head(hidden.mean(axis=(1, 2)))


def loss_fn(model, batch):
    logits = model(batch["images"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return losses.mean(), (logits.argmax(axis=-1) == batch["labels"]).mean()


gamma = flatopt.schedules.cosine_growth(1e-3, growth=10, transition_steps=NUM_STEPS)
tx = flatopt.lpf_sgd(0.5, gamma, 2)  # once: with another one step compiles anew


def make():
    model = Network(nnx.Rngs(0))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def step(model, optimizer, batch):
    return flatopt.flax.update(optimizer, model, loss_fn, has_aux=True, batch=batch)


def train(run, steps):
    for index in steps:
        random = np.random.default_rng(index)
        labels = random.integers(0, 2, 16)
        images = random.normal(size=(16, 6, 6, 1)) + 2 * labels[:, None, None, None]
        batch = {"images": images.astype("f4"), "labels": labels}
        loss, accuracy = step(*run, batch)
    return float(loss), float(accuracy)


def main():
    whole = make()
    # On its device, where Orbax puts what it restores: otherwise step compiles twice.
    nnx.update(whole, jax.device_put(nnx.state(whole), jax.devices()[0]))
    start = train(whole, range(SAVE_AT))
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as saver:
        saver.save(f"{folder}/state", nnx.state(whole))
        saver.wait_until_finished()
        resumed = make()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.state(resumed))
        nnx.update(resumed, saver.restore(f"{folder}/state", like))
    rest = range(SAVE_AT, NUM_STEPS)
    end = train(whole, rest)
    assert train(resumed, rest) == end
    equal = jax.tree.map(
        jnp.array_equal, *map(nnx.to_pure_dict, map(nnx.state, (whole, resumed)))
    )
    whole[0].eval()
    return {
        "start": start[0],
        "end": end[0],
        "accuracy": end[1],
        "bit-equal": all(map(bool, jax.tree.leaves(equal))),
        **{name: float(value) for name, value in flatopt.metrics(whole[1]).items()},
    }


if __name__ == "__main__":
    print(main())

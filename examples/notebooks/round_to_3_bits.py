# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: accelerator,colab,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Round to 3 bits: networks whose weights change after training
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/flatopt/flatopt/blob/main/examples/notebooks/round_to_3_bits.ipynb)
#
# A network is trained in float32 and deployed in another form: rounded to few bits, or on
# analog hardware whose weights are noisy. At a flat minimum the loss grows slowly when the
# weights move, so a flat network keeps more of its accuracy. Train, round, compare.

# %%
import importlib.util

# From the repository. A release is on the index too: %pip install "flatopt[examples]".
if importlib.util.find_spec("flatopt") is None:
    # %pip install -q "flatopt[examples] @ git+https://github.com/flatopt/flatopt"
    pass

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import flatopt
from flatopt import kernels, sharpness

SMOKE = os.environ.get("FLATOPT_SMOKE") == "1"  # tiny sizes, to test the notebook
print(jax.devices())

# %% [markdown]
# ## Digits and a small network
#
# Few images to train on, so that there is something to lose; others to choose settings
# with, and the rest to test.

# %%
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(images))
images, labels = (
    jnp.asarray(images[order] / 16, jnp.float32),
    jnp.asarray(labels[order]),
)
sizes = {"train": 64 if SMOKE else 512, "validation": 400, "test": 800}
ends = np.cumsum([0, *sizes.values()])
data = {
    name: (images[start:end], labels[start:end])
    for name, start, end in zip(sizes, ends[:-1], ends[1:], strict=True)
}
WIDTHS = 64, 64, 32, 10


def init(key):
    """Weights and biases of dense layers."""
    shapes = list(zip(WIDTHS[:-1], WIDTHS[1:], strict=True))
    return [
        {
            "kernel": jax.nn.initializers.he_normal()(key, shape),
            "bias": jnp.zeros(shape[1]),
        }
        for key, shape in zip(jax.random.split(key, len(shapes)), shapes, strict=True)
    ]


def model_fn(params, inputs):
    for layer in params[:-1]:
        inputs = jax.nn.relu(inputs @ layer["kernel"] + layer["bias"])
    return inputs @ params[-1]["kernel"] + params[-1]["bias"]


def loss_fn(params, batch):
    inputs, labels = batch
    logits = model_fn(params, inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(params, batch):
    inputs, labels = batch
    return (model_fn(params, inputs).argmax(axis=-1) == labels).mean()


# %% [markdown]
# ## Train the same network by SGD and by LPF-SGD
#
# LPF-SGD takes each gradient at perturbed weights: four chunks of the batch see four draws
# of noise. It costs as many gradients as SGD. Everything else is equal: learning rate,
# decay, steps and batches. Five networks are trained side by side, from five seeds.

# %%
NUM_STEPS, NUM_SEEDS = (20, 2) if SMOKE else (960, 5)
RATE = optax.cosine_decay_schedule(0.1, NUM_STEPS)
DECAY = 3e-3


def sgd(key):
    del key
    return optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(RATE, momentum=0.9))


def lpf_sgd(gamma):
    return lambda key: flatopt.lpf_sgd(
        RATE, gamma, num_samples=4, weight_decay=DECAY, key=key
    )


def train(make, takes_loss):
    """Networks of all seeds, trained side by side."""

    def one(key):
        tx = make(jax.random.fold_in(key, 1))

        def step(carry, step_key):
            params, state = carry
            chosen = jax.random.choice(step_key, sizes["train"], (32,), replace=False)
            batch = jax.tree.map(lambda x: x[chosen], data["train"])
            if takes_loss:
                updates, state = tx.update(
                    None, state, params, value_fn=loss_fn, batch=batch
                )
            else:
                grads = jax.grad(loss_fn)(params, batch)
                updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = init(key)
        keys = jax.random.split(key, NUM_STEPS)
        return jax.lax.scan(step, (start, tx.init(start)), keys)[0][0]

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), NUM_SEEDS))


networks = {
    "SGD": train(sgd, takes_loss=False),
    "LPF-SGD": train(lpf_sgd(0.08), takes_loss=True),
}


# %% [markdown]
# ## Round them
#
# `sharpness.round_filters` rounds each output channel to a symmetric grid of so many bits;
# the grid ends at the channel's largest weight. Biases stay.


# %%
@jax.jit
def rounded_accuracies(params):
    """Test accuracy of every network, as trained and at each number of bits."""
    changed = [params]
    for bits in BITS:
        changed.append(
            jax.vmap(lambda p, b=bits: sharpness.round_filters(p, b))(params)
        )
    of_all = jax.vmap(accuracy, in_axes=(0, None))
    return jnp.stack([of_all(p, data["test"]) for p in changed], axis=1)


BITS = 8, 5, 4, 3, 2
rounded = {name: 100 * rounded_accuracies(p) for name, p in networks.items()}
print(f"{'test accuracy %':16}", "float32", *(f"{bits} bits " for bits in BITS))
for name, found in rounded.items():
    print(f"{name:16}", *(f"{x:7.1f}" for x in found.mean(axis=0)))
gain = rounded["LPF-SGD"][:, 1 + BITS.index(3)] - rounded["SGD"][:, 1 + BITS.index(3)]
print(
    f"at 3 bits LPF-SGD less SGD: {gain.mean():.1f} ± "
    f"{gain.std(ddof=1) / NUM_SEEDS**0.5:.1f} points (standard error over seeds)"
)

# %% [markdown]
# As trained the two are as accurate as each other, or nearly. What differs is what they keep.
#
# ## Noisy weights
#
# Analog hardware stores weights with an error in proportion to its range, so to the largest
# weight. `sharpness.perturbed_accuracy` gives the mean accuracy under such noise with its
# error, for many scales at once.

# %%
hardware = kernels.relative_to_max(())  # () : one range for each layer
scales = np.linspace(0, 0.2, 9)
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for name, params in networks.items():
    left.plot(range(len(BITS) + 1), rounded[name].mean(axis=0), "o-", label=name)
    first = jax.tree.map(lambda x: x[0], params)
    found = sharpness.perturbed_accuracy(
        accuracy,
        first,
        jax.random.key(1),
        hardware,
        scales,
        num_samples=8 if SMOKE else 64,
        data=data["test"],
    )
    right.errorbar(scales, 100 * found.value, 100 * found.standard_error, label=name)
left.set_xticks(range(len(BITS) + 1), ["float32", *BITS])
left.set(xlabel="bits of the weights", ylabel="test accuracy (%)")
right.set(xlabel="noise in units of the largest weight", ylabel="test accuracy (%)")
left.legend()
right.legend()
plt.show()

# %% [markdown]
# ## Which radius
#
# The larger the noise in training, the more a network tolerates, until it no longer fits
# the data. Choose on validation data: the largest radius whose accuracy as trained is still
# that of SGD.


# %%
@jax.jit
def validate(params):
    """Validation accuracy as trained and at 3 bits, a mean over the networks."""
    of_all = jax.vmap(accuracy, in_axes=(0, None))
    rounded = jax.vmap(lambda p: sharpness.round_filters(p, 3))(params)
    return [100 * of_all(p, data["validation"]).mean() for p in (params, rounded)]


rows = {"SGD": networks["SGD"]} | {
    f"LPF-SGD, gamma {gamma:g}": train(lpf_sgd(gamma), takes_loss=True)
    for gamma in ((0.08,) if SMOKE else (0.02, 0.04, 0.08, 0.16))
}
print(f"{'validation accuracy %':22} float32  3 bits")
for name, params in rows.items():
    print(f"{name:22}", *(f"{x:7.1f}" for x in validate(params)))

# %% [markdown]
# To train on the very noise that will run, give the kernel of your hardware or number format
# to `flatopt.smooth_gradients`: `kernels.relative_to_max()`, `kernels.rounding(3)` or a
# function of your own. [Weights that will
# change](https://flatopt.github.io/flatopt/uses.html) compares them, with tuned decay, larger
# learning rates and averages of weights beside them.

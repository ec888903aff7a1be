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
# # How flat is it? Curvature and stability of your model
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/flatopt/flatopt/blob/main/examples/notebooks/how_flat.ipynb)
#
# Two questions about a trained network, answered by measuring:
#
# 1. How fast does the loss rise around this minimum? (`flatopt.curvature`, `flatopt.sharpness`)
# 2. Can SGD stay here with my learning rate and batch size? (`flatopt.stability`)
#
# Your own model needs nothing but a loss that is a function of its parameters and a batch.

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
from flatopt import curvature, plots, sharpness, stability

SMOKE = os.environ.get("FLATOPT_SMOKE") == "1"  # tiny sizes, to test the notebook
print(jax.devices())

# %% [markdown]
# ## A small network and two ways to train it
#
# A network with one hidden layer on scikit-learn's digits, trained with plain SGD, and with
# LPF-SGD, which takes gradients at randomly perturbed parameters.

# %%
images, labels = load_digits(return_X_y=True)
images = jnp.asarray(images / 16, jnp.float32)
labels = jnp.asarray(labels)
num_images = 200 if SMOKE else 1600
data = images[:num_images], labels[:num_images]
keys = jax.random.split(jax.random.key(0), 2)
start = {
    "hidden": {
        "kernel": jax.random.normal(keys[0], (64, 32)) / 8,
        "bias": jnp.zeros(32),
    },
    "output": {
        "kernel": jax.random.normal(keys[1], (32, 10)) / 6,
        "bias": jnp.zeros(10),
    },
}


def model_fn(params, inputs):
    hidden = inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"]
    return jnp.tanh(hidden) @ params["output"]["kernel"] + params["output"]["bias"]


def loss_fn(params, batch):
    inputs, labels = batch
    logits = model_fn(params, inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(tx, smoothed):
    def step(carry, _):
        params, state = carry
        if smoothed:
            zeros = optax.tree.zeros_like(params)
            updates, state = tx.update(
                zeros, state, params, value_fn=loss_fn, batch=data
            )
        else:
            updates, state = tx.update(jax.grad(loss_fn)(params, data), state)
        return (optax.apply_updates(params, updates), state), None

    num_steps = 100 if SMOKE else 1000
    carry = start, tx.init(start)
    return jax.jit(lambda: jax.lax.scan(step, carry, None, length=num_steps)[0][0])()


networks = {
    "SGD": train(optax.sgd(0.1, momentum=0.9), smoothed=False),
    "LPF-SGD": train(flatopt.lpf_sgd(0.1, gamma=0.1), smoothed=True),
}
for name, params in networks.items():
    print(f"{name}: loss {loss_fn(params, data):.4f}")

# %% [markdown]
# ## Trace, Frobenius norm, largest eigenvalue
#
# The curvature of the loss is its Hessian. It is never formed: all that is used is its
# product with a vector, which costs about two gradients. Every estimate comes with its
# standard error, and an eigenvalue with a bound.

# %%
operators = {
    name: curvature.hessian(loss_fn, params, data) for name, params in networks.items()
}
for name, operator in operators.items():
    found = curvature.probe(operator, jax.random.key(1))
    top = curvature.eigenpairs(operator, jax.random.key(2))
    print(name)
    print(f"  trace {found.trace.value:.2f} ± {found.trace.standard_error:.2f}")
    norm = found.frobenius_norm
    print(f"  Frobenius norm {norm.value:.2f} ± {norm.standard_error:.2f}")
    print(f"  largest eigenvalue {top.values[0]:.3f}, within {top.residuals[0]:.1g}")

# %% [markdown]
# By trace and by largest eigenvalue the minimum of LPF-SGD is about four times as flat. It is
# not free: its training loss is several times as high, since the network was not allowed to
# fit as sharply.
#
# Data may also be any iterable of batches that can be iterated again: a list, a data
# loader. Batches may differ in size; every example weighs the same.

# %%
batches = [tuple(x[i : i + 100] for x in data) for i in range(0, num_images, 100)]
params = networks["LPF-SGD"]
streamed = curvature.hessian(loss_fn, params, batches)
print(curvature.probe(streamed, jax.random.key(1)).trace.value)

# %% [markdown]
# ## The whole spectrum, layer by layer
#
# On the left the density of eigenvalues: nearly all lie close to zero, a few stand out. On
# the right which layer the trace comes from.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
density = curvature.spectral_density(streamed, jax.random.key(3))
plots.spectral_density(density, ax=left)
plots.layer_traces(curvature.probe(streamed, jax.random.key(1)), ax=right)
plt.show()

# %% [markdown]
# ## The loss around the minimum
#
# The loss along a random direction. Directions are scaled by the norms of the filters, so
# that networks of different scale compare.

# %%
figure, ax = plt.subplots(layout="constrained")
for name, params in networks.items():
    plots.loss_line(loss_fn, params, jax.random.key(4), data=data, ax=ax)
    ax.lines[-1].set_label(name)
ax.legend()
plt.show()

# %% [markdown]
# Many measures of flatness have been proposed. `sharpness.report` has them all in one
# table, as `curvature.report(operator, key)` has all of the curvature.

# %%
print(sharpness.report(loss_fn, params, jax.random.key(5), data))

# %% [markdown]
# What to read from these figures: they are properties of the point *and* of its
# parametrization. Scaling one layer up and the next one down changes most of them without
# changing the network, so compare networks of one architecture, trained the same way but
# for the one thing you study. `worst_case_adaptive` and `average_case_adaptive` do not
# change under such scaling.

# %% [markdown]
# ## Can SGD stay here?
#
# SGD with a large learning rate leaves sharp minima, because its noise grows with the
# distance from them. For the square loss at a minimum that fits the data, the largest
# learning rate that can stay is known exactly. So train a second network, with the square
# loss on few images, until it fits.

# %%
num_few = 24 if SMOKE else 60
inputs, targets = images[:num_few], jax.nn.one_hot(labels[:num_few], 10)


def square_loss(outputs, targets):
    return jnp.mean(jnp.sum((outputs - targets) ** 2, axis=-1)) / 2


def whole_loss(params):
    return square_loss(model_fn(params, inputs), targets)


@jax.jit
def fit():
    num_steps = 1000 if SMOKE else 15_000
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, num_steps))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(whole_loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (start, tx.init(start)), None, length=num_steps)[0][0]


fitted = fit()
print(f"loss {whole_loss(fitted):.1e}")

# %% [markdown]
# `thresholds` has one field for each theory, and `mean_square` is the exact one for the
# linearized network. `report` puts everything in one table: how the noise of SGD is
# aligned with the curvature, the thresholds, and whether your learning rate is below them.

# %%
batch_size = 4
lin = stability.linearize(model_fn, fitted, inputs, targets, loss_fn=square_loss)
limit = stability.thresholds(lin, batch_size).mean_square
print(
    stability.report(
        model_fn, fitted, inputs, targets, limit / 2, batch_size, loss_fn=square_loss
    )
)

# %% [markdown]
# ## Does SGD do what is predicted?
#
# Start SGD a little beside the minimum, with learning rates below and above the threshold,
# and compare the growth of the loss with the prediction. This is the real network, not the
# linearized one.

# %%
num_sgd_steps = 30 if SMOKE else 200


def sgd_losses(key, learning_rate):
    noise_key, key = jax.random.split(key)
    leaves, treedef = jax.tree.flatten(fitted)
    noise_keys = jax.random.split(noise_key, len(leaves))
    params = treedef.unflatten(
        [
            leaf + 1e-3 * jax.random.normal(noise_key, leaf.shape)
            for leaf, noise_key in zip(leaves, noise_keys, strict=True)
        ]
    )

    def step(params, key):
        chosen = jax.random.choice(key, num_few, (batch_size,), replace=False)
        grads = jax.grad(
            lambda p: square_loss(model_fn(p, inputs[chosen]), targets[chosen])
        )(params)
        moved = jax.tree.map(lambda p, g: p - learning_rate * g, params, grads)
        return moved, whole_loss(params)

    return jax.lax.scan(step, params, jax.random.split(key, num_sgd_steps))[1]


runs = jax.random.split(jax.random.key(6), 4 if SMOKE else 40)
many = jax.jit(jax.vmap(sgd_losses, in_axes=(0, None)))
figure, ax = plt.subplots(layout="constrained")
for factor in (0.5, 0.9, 1.2, 1.5):
    losses = np.asarray(many(runs, factor * limit)).mean(axis=0)
    growth = stability.growth_rate(lin, factor * limit, batch_size)
    ax.semilogy(losses, label=f"{factor:g} of the threshold")
    print(
        f"{factor:g} of the threshold: predicted factor a step {growth:.3f}, "
        f"mean loss from {losses[0]:.1e} to {losses[-1]:.1e}"
    )
ax.set(xlabel="step of SGD", ylabel="mean training loss")
ax.legend()
plt.show()

# %% [markdown]
# Below the threshold the loss stays where it was or falls. Above it, it grows until the
# network has left this minimum; how far it goes then is beyond what a theory of small
# distances can say. A learning rate below the threshold of a minimum is a necessary
# condition to stay there: so large learning rates and small batches leave flat minima only.
#
# ## Where to go on
#
# - A part of a network by `mask=`, momentum and AdamW, and any loss:
#   [curvature](https://flatopt.github.io/flatopt/curvature.html) and
#   [stability](https://flatopt.github.io/flatopt/stability.html).
# - Which method trains flatter, and whether it pays: [which method, which radius, when
#   none](https://flatopt.github.io/flatopt/choose.html).

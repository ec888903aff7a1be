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
# # LPF-SGD and NSO in five minutes
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/flatopt/flatopt/blob/main/examples/notebooks/five_minutes.ipynb)
#
# A minimum is flat if the loss stays low when the parameters are moved a little. flatopt
# trains for that: it takes the gradient not at the parameters, but at randomly perturbed
# ones. **LPF-SGD** and **NSO** are two ways to choose the perturbations. This notebook
# trains a small network on handwritten digits with plain SGD and with both, and then looks
# at what changed.

# %%
import importlib.util

# From the repository. A release is on the index too: %pip install "flatopt[examples]".
if importlib.util.find_spec("flatopt") is None:
    # %pip install -q "flatopt[examples] @ git+https://github.com/flatopt/flatopt"
    pass

# %%
import functools
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import flatopt

SMOKE = os.environ.get("FLATOPT_SMOKE") == "1"  # tiny sizes, to test the notebook
print(jax.devices())

# %% [markdown]
# ## The data
#
# 400 images of scikit-learn's digits for training, the rest for testing. 30 % of the
# training labels are replaced by random ones, so that there is something to overfit.

# %%
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
images = jnp.asarray(images[order] / 16, jnp.float32)
labels = jnp.asarray(labels[order])
train_images, test_images = images[:400], images[400:]
train_labels, test_labels = labels[:400], labels[400:]

key, wrong_key = jax.random.split(jax.random.key(0))
wrong = jax.random.bernoulli(key, 0.3, (400,))
random_labels = jax.random.randint(wrong_key, (400,), 0, 10)
train_labels = jnp.where(wrong, random_labels, train_labels)

# %% [markdown]
# ## The loss
#
# A function of the parameters and a batch. The batch is an argument, not a global
# variable: LPF-SGD has to split it.


# %%
def init_params(key):
    first, second = jax.random.split(key)
    return {
        "hidden": {
            "kernel": jax.random.normal(first, (64, 64)) / 8,
            "bias": jnp.zeros(64),
        },
        "output": {
            "kernel": jax.random.normal(second, (64, 10)) / 8,
            "bias": jnp.zeros(10),
        },
    }


def logits_fn(params, images):
    hidden = images @ params["hidden"]["kernel"] + params["hidden"]["bias"]
    return jax.nn.relu(hidden) @ params["output"]["kernel"] + params["output"]["bias"]


def loss_fn(params, batch):
    logits = logits_fn(params, batch["images"])
    return optax.softmax_cross_entropy_with_integer_labels(
        logits, batch["labels"]
    ).mean()


# %% [markdown]
# ## Three optimizers
#
# All three are ordinary optax transformations.
#
# - `optax.sgd`: the gradient at the parameters.
# - `flatopt.lpf_sgd`: splits the batch into 8 chunks and takes the gradient of each at its
#   own perturbed parameters. It costs one gradient of the batch, like SGD. The noise of a
#   weight is proportional to the norm of its filter.
# - `flatopt.nso_sgd`: takes the gradient of the whole batch at $+U$ and at $-U$ and averages.
#   It costs two gradients, so it gets half the steps here: all methods spend the same.


# %%
def make(name, weight_decay):
    if name == "SGD":
        decay = optax.add_decayed_weights(weight_decay)
        return optax.chain(decay, optax.sgd(0.05, momentum=0.9))
    if name == "LPF-SGD":
        return flatopt.lpf_sgd(0.05, gamma=0.05, weight_decay=weight_decay)
    return flatopt.nso_sgd(0.05, sigma=0.05, weight_decay=weight_decay)


gradients_a_step = {"SGD": 1, "LPF-SGD": 1, "NSO": 2}

# %% [markdown]
# ## The training loop
#
# The only difference to a loop with plain optax is in two lines. SGD is given a gradient.
# flatopt is given the loss itself and the batch, because it computes its own gradients;
# the gradient it is handed is not read, so zeros will do.

# %%
budget = 40 if SMOKE else 3000  # gradients of a batch, for each method
batch_size = 80
num_seeds = 2 if SMOKE else 8


def train(name, weight_decay, key):
    tx = make(name, weight_decay)
    key, init_key = jax.random.split(key)
    params = init_params(init_key)

    def step(carry, key):
        params, state = carry
        chosen = jax.random.choice(key, 400, (batch_size,), replace=False)
        batch = {"images": train_images[chosen], "labels": train_labels[chosen]}
        if name == "SGD":
            grads = jax.grad(loss_fn)(params, batch)
            updates, state = tx.update(grads, state, params)
        else:
            zeros = optax.tree.zeros_like(params)
            updates, state = tx.update(
                zeros, state, params, value_fn=loss_fn, batch=batch
            )
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(key, budget // gradients_a_step[name])
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
    return params


# %% [markdown]
# Train each method several times, once with weak weight decay and once with strong.

# %%
seeds = jax.random.split(jax.random.key(1), num_seeds)
trained = {}
for name in gradients_a_step:
    run = jax.jit(jax.vmap(functools.partial(train, name), in_axes=(None, 0)))
    for weight_decay in (1e-3, 2e-2):
        trained[name, weight_decay] = run(weight_decay, seeds)

# %% [markdown]
# ## What came out
#
# The test accuracy, and the training loss after the parameters are moved at random.
# `flatopt.smooth` is the loss averaged over such moves. Each figure is a mean over the
# runs with its standard error.

# %%
train_batch = {"images": train_images, "labels": train_labels}
radii = np.linspace(0, 0.1, 6)


@jax.vmap
def accuracy(params):
    return (logits_fn(params, test_images).argmax(axis=-1) == test_labels).mean()


@jax.jit
def moved_loss(params, radius):
    smoothed = flatopt.smooth(
        loss_fn, radius, flatopt.kernels.filterwise(), num_samples=16
    )
    return jax.vmap(lambda p: smoothed(jax.random.key(2), p, train_batch))(params)


def mean_and_error(values):
    return values.mean(), values.std(ddof=1) / len(values) ** 0.5


losses = {
    run: np.array([moved_loss(params, radius) for radius in radii])
    for run, params in trained.items()
}
heads = "weight decay", "test accuracy %", "train loss", "moved by 0.1"
print(f"{'method':8}" + "".join(f"{head:>17}" for head in heads))
for (name, weight_decay), params in trained.items():
    loss = losses[name, weight_decay]
    columns = 100 * accuracy(params), loss[0], loss[-1]
    cells = ["{:.2f} ± {:.2f}".format(*mean_and_error(column)) for column in columns]
    print(f"{name:8}{weight_decay:17g}" + "".join(f"{cell:>17}" for cell in cells))

# %%
figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
for (name, weight_decay), values in losses.items():
    panel = panels[int(weight_decay > 1e-2)]
    error = values.std(axis=1, ddof=1) / num_seeds**0.5
    panel.errorbar(radii, values.mean(axis=1), error, label=name, capsize=3)
    panel.set(title=f"weight decay {weight_decay:g}", yscale="log")
    panel.set(xlabel="size of the random move, in filter norms")
panels[0].set_ylabel("training loss")
panels[0].legend()
plt.show()

# %% [markdown]
# ## What it says
#
# - With weak weight decay plain SGD learns the wrong labels: its training loss is the
#   lowest, and it rises steeply when the parameters move. LPF-SGD and NSO end at flatter
#   minima, LPF-SGD by far the flatter of the two at these scales of noise. Its minima are
#   also the more accurate here, by about 6 points; those of NSO hardly.
# - With strong weight decay all three are equally accurate within their errors, and
#   about equally flat. Noise is a regularizer. Where another one already does the work,
#   little is left for it.
#
# Neither method was tuned here, and the errors come from the starts, batches and noise
# alone: the images and the wrong labels are the same in all runs. On your own problem tune
# the weight decay of plain SGD first, then compare.
#
# ## Where to go on
#
# - The scale of the noise (`gamma`, `sigma`) is the one new setting. `flatopt.radius` says
#   before training which few to try
#   ([which radius](https://flatopt.github.io/flatopt/choose.html)).
# - For another optimizer put `flatopt.smooth_gradients` first in an `optax.chain`
#   ([guide](https://flatopt.github.io/flatopt/guide.html)).
# - Flax NNX models, with BatchNorm and dropout: `flatopt.flax`
#   ([Flax and Equinox](https://flatopt.github.io/flatopt/flax.html)).

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
# # The curvature of a language model: spectrum, blocks, the longest step
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/flatopt/flatopt/blob/main/examples/notebooks/language_model.ipynb)
#
# A Transformer of 12 layers, and three questions about the point where its training stands:
#
# 1. How are the eigenvalues of its curvature spread? (`curvature.spectral_density`)
# 2. Which block does the curvature come from? (`curvature.probe`)
# 3. How much longer could the step of AdamW be? (`stability.critical_learning_rate`)
#
# The model here is small, so that this takes a minute on a CPU. The code is the same for one
# of any size; [Curvature of a language model](https://flatopt.github.io/flatopt/llm.html)
# says what a large one needs, and how to plan it before it runs.

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
from sklearn import datasets

from flatopt import curvature, plots, stability

SMOKE = os.environ.get("FLATOPT_SMOKE") == "1"  # tiny sizes, to test the notebook
print(jax.devices())

# %% [markdown]
# ## Text, letter by letter
#
# What scikit-learn says of its data sets: real English that needs no download.

# %%
names = ("digits", "iris", "wine", "breast_cancer", "diabetes", "linnerud")
text = "".join(getattr(datasets, f"load_{name}")().DESCR for name in names)
letters = sorted(set(text))
codes = np.array([letters.index(letter) for letter in text])
LENGTH, BATCH = 64, 16
print(f"{len(text)} characters, {len(letters)} different ones")


def draw_batch(key):
    starts = jax.random.randint(key, (BATCH, 1), 0, len(codes) - LENGTH - 1)
    rows = jnp.asarray(codes)[starts + jnp.arange(LENGTH + 1)]
    return rows[:, :-1], rows[:, 1:]


# %% [markdown]
# ## A Transformer of 12 layers
#
# Each layer has parameters of its own in the tree, so that each gets a trace of its own. The
# model stacks them and scans over the layers.

# %%
WIDTH, HEADS, LAYERS = 32, 2, 2 if SMOKE else 12
BLOCK = {
    "query_key_value": (WIDTH, 3 * WIDTH),
    "attention_out": (WIDTH, WIDTH),
    "up": (WIDTH, 4 * WIDTH),
    "down": (4 * WIDTH, WIDTH),
}


def init(key):
    shapes = {f"layer_{i:02}": BLOCK for i in range(LAYERS)} | {
        "embedding": (len(letters), WIDTH),
        "position": (LENGTH, WIDTH),
        "head": (WIDTH, len(letters)),
    }
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten(
        [
            0.1 * jax.random.normal(k, shape)
            for k, shape in zip(keys, leaves, strict=True)
        ]
    )


def normalize(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def layer(x, weights):
    y = normalize(x) @ weights["query_key_value"]
    query, key, value = jnp.split(y.reshape(*x.shape[:2], HEADS, -1), 3, axis=-1)
    y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    x = x + y.reshape(x.shape) @ weights["attention_out"]
    return x + jax.nn.gelu(normalize(x) @ weights["up"]) @ weights["down"], None


def model_fn(params, tokens):
    layers = [params[f"layer_{i:02}"] for i in range(LAYERS)]
    x = params["embedding"][tokens] + params["position"]
    x, _ = jax.lax.scan(layer, x, jax.tree.map(lambda *w: jnp.stack(w), *layers))
    return normalize(x) @ params["head"]


def output_loss(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def loss_fn(params, batch):
    return output_loss(model_fn(params, batch[0]), batch[1])


RATE = 3e-3
tx = optax.adamw(RATE)


def step(carry, key):
    params, state = carry
    loss, grads = jax.value_and_grad(loss_fn)(params, draw_batch(key))
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), loss


params = init(jax.random.key(0))
num_steps = 20 if SMOKE else 200
keys = jax.random.split(jax.random.key(1), num_steps)
(params, state), losses = jax.jit(lambda c: jax.lax.scan(step, c, keys))(
    (params, tx.init(params))
)
print(f"loss {losses[0]:.2f} at the start, {losses[-1]:.2f} after {num_steps} steps")

# %% [markdown]
# ## Two matrices
#
# The Hessian, and its Gauss-Newton part, which has no negative eigenvalues and for
# cross-entropy is the Fisher matrix. Neither is formed: what is used is products with
# vectors. A product takes no matrix over the vocabulary either: the curvature of the loss
# in the logits, diag(p) - p pᵀ, is applied as it stands.

# %%
data = draw_batch(jax.random.key(2))
newton = curvature.gauss_newton(model_fn, output_loss, params, data)
hessian = curvature.hessian(loss_fn, params, data)
num_lanczos = 4 if SMOKE else 24
figure, ax = plt.subplots(layout="constrained")
for name, operator in (("Gauss-Newton", newton), ("Hessian", hessian)):
    density = curvature.spectral_density(
        operator, jax.random.key(3), num_draws=1, num_steps=num_lanczos
    )
    plots.spectral_density(density, ax=ax)
    ax.lines[-1].set_label(name)
    print(f"{name}: nodes from {density.nodes.min():.2f} to {density.nodes.max():.2f}")
ax.legend()
plt.show()

# %% [markdown]
# Nearly all eigenvalues lie close to zero; a few stand out.
#
# ## Which block
#
# The same random probes give the trace of every leaf's block, with its error. The error of
# a layer is at most the sum of those of its leaves, which is drawn.

# %%
found = curvature.probe(newton, jax.random.key(4), 4 if SMOKE else 16, num_deflated=4)
print(f"trace {found.trace.value:.1f} ± {found.trace.standard_error:.1f}")
plots.layer_traces(found, depth=1)
plt.show()

# %% [markdown]
# ## The longest step
#
# How many times as long could the step that AdamW is about to make be, before it raises the
# loss on this batch? It takes forward passes alone, and so works where second derivatives do
# not, as with fused attention.

# %%
grads = jax.jit(jax.grad(loss_fn))(params, data)
updates, _ = jax.jit(tx.update)(grads, state, params)
critical = stability.critical_learning_rate(
    loss_fn, params, updates, data, learning_rate=RATE
)
print(f"{critical.rate:.1f} times as long: rate {critical.rate * RATE:.1e}")
print(f"in {critical.num_evaluations} forward passes")

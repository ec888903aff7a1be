"""Small networks with one output, and data that they fit exactly: digits and text."""

import functools
import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import square_loss
from .data import regression_digits
from .text import read, windows

LIBRARY = pathlib.Path(os.__file__).parent


class Task(NamedTuple):
    """A network with one output, its initial parameters and the data of a seed."""

    model_fn: Any
    init: Any
    data: Any


@functools.cache
def digits(num_examples, hidden, scale):
    """Even or odd. Sharp starts have ReLUs; others tanh, which is linear further out."""

    def init(seed):
        return square_loss.init_mlp(jax.random.key(seed), hidden, 1, scale)

    def data(seed):
        return regression_digits(seed, num_examples, 1)

    return Task(square_loss.smooth_mlp if scale == 1 else square_loss.mlp, init, data)


def init_transformer(key, width, length):
    """A block of a Transformer on ASCII characters, and one output."""
    shapes = {
        "embed": (128, width),
        "positions": (length, width),
        "query": (width, width),
        "key": (width, width),
        "value": (width, width),
        "attended": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
        "head": (width, 1),
    }
    keys = jax.random.split(key, len(shapes))
    params = {
        name: square_loss.dense(k, *shape)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    unit = {"embed": 128**0.5, "positions": length**0.5}  # tables, not layers
    return {name: unit.get(name, 1.0) * x for name, x in params.items()}


def transformer(params, tokens):
    """The output at the last character, which attends to all."""

    def norm(x):
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)

    x = jax.nn.one_hot(tokens, 128) @ params["embed"] + params["positions"][None]
    inner, last = norm(x), x[:, -1]
    query = inner[:, -1] @ params["query"]
    scores = jnp.einsum("nw,nlw->nl", query, inner @ params["key"])
    weights = jax.nn.softmax(scores / query.shape[-1] ** 0.5)
    attended = jnp.einsum("nl,nlw->nw", weights, inner @ params["value"])
    last = last + attended @ params["attended"]
    last = last + jax.nn.gelu(norm(last) @ params["up"]) @ params["down"]
    return norm(last) @ params["head"]


@functools.cache
def text(path, num_examples, width, length):
    """Whether the next character is a vowel; as many examples of each."""
    codes = read(path or LIBRARY)
    is_vowel = np.isin(np.arange(128), [ord(x) for x in "aeiouAEIOU"])

    def init(seed):
        return init_transformer(jax.random.key(seed), width, length)

    def data(seed):
        drawn = windows(codes, length, 16 * num_examples, seed)
        _, first = np.unique(drawn[:, :-1], axis=0, return_index=True)
        drawn = drawn[np.sort(first)]  # no two alike, so that all can be fitted
        order = np.argsort(is_vowel[drawn[:, -1]], kind="stable")
        half = num_examples // 2
        drawn = drawn[np.concatenate([order[:half], order[-half:]])]
        targets = np.where(is_vowel[drawn[:, -1:]], 1, -1)
        return jnp.asarray(drawn[:, :-1], jnp.int32), jnp.asarray(targets, jnp.float32)

    return Task(transformer, init, data)

"""A small Transformer that learns a text by AdamW, alone or behind another first link.

An optimizer is ``make(setting, num_steps, trained, network, key)``: ``trained`` says which
leaves are, and ``network`` is what trains, a `Network`.
"""

import copy
import dataclasses
import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import flatopt
import flatopt.flax

from . import after, methods
from .text import Transformer, read, split, windows

LIBRARY = pathlib.Path(os.__file__).parent


@dataclasses.dataclass(frozen=True)
class Method(methods.Method):
    """A method that trains all weights but LoRA matrices, or those alone."""

    lora: bool = False


# Methods


def adamw(setting, num_steps, trained, *links):
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, num_steps // 20 + 1, num_steps)

    def learning_rate(count):
        falling = shape(jnp.minimum(count, num_steps // 20 + 1))
        constant = setting.get("constant", 0.0) > 0
        return setting["learning_rate"] * jnp.where(constant, falling, shape(count))

    last = optax.adamw(
        learning_rate, weight_decay=setting["weight_decay"], mask=trained
    )
    return optax.chain(*links, last)


def only(trained):
    frozen = jax.tree.map(lambda wanted: not wanted, trained)
    return optax.masked(optax.set_to_zero(), frozen)


def plain(setting, num_steps, trained, network, key):
    del network, key
    return adamw(setting, num_steps, trained, only(trained))


def averaged(setting, num_steps, trained, network, key):
    return optax.chain(
        plain(setting, num_steps, trained, network, key),
        after.average(setting["average"]),
    )


def sam(setting, num_steps, trained, network, key):
    del network
    link = flatopt.sam_gradients(setting["rho"], mask=trained, key=key)
    return adamw(setting, num_steps, trained, link)


def nso(setting, num_steps, trained, network, key):
    del network
    link = flatopt.smooth_gradients(
        setting["sigma"], antithetic=True, mask=trained, key=key
    )
    return adamw(setting, num_steps, trained, link)


def lpf(setting, num_steps, trained, network, key):
    link = flatopt.smooth_gradients(
        setting["gamma"],
        flatopt.kernels.filterwise(filter_axes=network.filter_axes),
        num_samples=4,
        batch_argnames=("batch",),
        mask=trained,
        key=key,
    )
    return adamw(setting, num_steps, trained, link)


def takes_loss(method):
    """Whether the optimizer takes the loss, not its gradient."""
    return method.make not in (plain, averaged)


# Training


class Network:
    """The Transformer of a study's settings, its losses, and optimizers of its weights."""

    def __init__(self, config):
        self.config = config
        model = self.make(0)
        self.graphdef, params = nnx.split(model)
        self.filter_axes = flatopt.flax.filter_axes(model)
        self.is_lora = jax.tree_util.tree_map_with_path(
            lambda path, _: "lora" in jax.tree_util.keystr(path), params
        )
        self.start = functools.cache(lambda seed: nnx.split(self.make(seed))[1])

    def make(self, seed):
        config = self.config
        rngs = nnx.Rngs(seed)
        return Transformer(config.width, config.blocks, config.length, rngs)

    def windows(self, codes):
        return windows(codes, self.config.length, self.config.windows)

    def model_fn(self, params, batch):
        return nnx.merge(self.graphdef, params)(batch[:, :-1])

    def loss_of(self, logits, batch):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
        return losses.mean()

    def loss_fn(self, params, batch):
        return self.loss_of(self.model_fn(params, batch), batch)

    def optimizer(self, method, setting, num_steps, key):
        trained = jax.tree.map(lambda lora: lora == method.lora, self.is_lora)
        return method.make(setting, num_steps, trained, self, key)

    @functools.partial(jax.jit, static_argnums=0)
    def evaluate(self, params, batch):
        return self.loss_fn(params, batch)

    @functools.partial(jax.jit, static_argnums=0)
    def trace(self, part, frozen, batch):
        """Trace of the Hessian of the loss over a part of the parameters."""

        def loss_fn(part, batch):
            return self.loss_fn(nnx.merge_state(part, frozen), batch)

        operator = flatopt.curvature.hessian(loss_fn, part, batch)
        return flatopt.curvature.trace(operator, jax.random.key(0), 24, num_deflated=0)


class Training(Network):
    """A network and a text, and how to train the one on the other."""

    def __init__(self, config, path):
        super().__init__(config)
        self.codes = read(path)
        self.split = split(self.codes, config.train_characters)

    def cost(self, method, num_steps=20):
        """Gradients of a batch a step, the mean of a short training."""
        setting, params = method.settings[0], self.start(0)
        batch = jnp.zeros((self.config.batch_size, self.config.length + 1), jnp.int32)

        def step(model_fn, carry, batch):
            counted = copy.copy(
                self
            )  # the model is counted: some methods take it alone
            counted.model_fn = model_fn
            tx = counted.optimizer(method, setting, num_steps, 0)
            takes = takes_loss(method)
            return methods.step(tx, counted.loss_fn, carry, takes, batch=batch)

        state = self.optimizer(method, setting, num_steps, 0).init(params)
        return methods.gradients_a_step(
            step, self.model_fn, (params, state), batch, num_steps=num_steps
        )

    def train(self, method, num_steps, setting, seed):
        """The network after training once, and the optimizer's state."""
        key, batch_key = jax.random.split(jax.random.key(seed))
        setting = {name: jnp.float32(value) for name, value in setting.items()}
        arguments = self.start(seed), setting, key, batch_key
        params, state = self.run(method, num_steps, *arguments)
        if method.make is averaged:
            params = optax.tree.get(state, "average")
        return params, state

    @functools.partial(jax.jit, static_argnums=(0, 1, 2))
    def run(self, method, num_steps, params, setting, key, batch_key):
        config, codes = self.config, self.split["train"]
        tx = self.optimizer(method, setting, num_steps, key)

        def body(carry, key):
            starts = jax.random.randint(
                key, (config.batch_size,), 0, len(codes) - config.length
            )
            batch = codes[starts[:, None] + jnp.arange(config.length + 1)]
            takes = takes_loss(method)
            return methods.step(tx, self.loss_fn, carry, takes, batch=batch), None

        keys = jax.random.split(batch_key, num_steps)
        return jax.lax.scan(body, (params, tx.init(params)), keys)[0]

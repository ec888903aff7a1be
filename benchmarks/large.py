"""Problems of the size that accelerators are for, as arrays or as shapes alone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.problems import MLP, Problem, ResNet18

TITLES = {
    "mlp": "MLP, float32",
    "transformer": "Transformer of 12 scanned layers, bfloat16",
    "resnet18": "ResNet-18 for CIFAR shapes, bfloat16",
}
NAMES = tuple(TITLES)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoder Transformer whose layers are stacked and scanned: 163 million parameters.

    ``sharding`` pins activations over several devices, of shape (examples, tokens, units).
    """

    num_layers: int = 12
    width: int = 768
    num_heads: int = 12
    vocabulary: int = 50_304
    length: int = 512
    sharding: Any = None

    def init(self, key):
        d, n = self.width, self.num_layers
        shapes = {
            "query_key_value": (n, d, 3 * d),
            "attention_out": (n, d, d),
            "up": (n, d, 4 * d),
            "down": (n, 4 * d, d),
            "embedding": (self.vocabulary, d),
            "position": (self.length, d),
            "head": (d, self.vocabulary),
        }
        keys = jax.random.split(key, len(shapes))
        leaves = {
            name: 0.02 * jax.random.normal(k, shape)
            for (name, shape), k in zip(shapes.items(), keys, strict=True)
        }
        norms = {"attention_norm": (n, d), "mlp_norm": (n, d), "norm": (d,)}
        return leaves | {name: jnp.ones(shape) for name, shape in norms.items()}

    def value_fn(self, params, inputs, labels):
        """Mean cross-entropy of the next token."""
        return self.loss_fn(self.model_fn(params, inputs), labels)

    def loss_fn(self, logits, labels):
        """Losses in float32."""
        return optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), labels
        ).mean()

    def model_fn(self, params, inputs):
        """The logits in bfloat16."""
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        ends = ("embedding", "position", "head", "norm")
        layers = {name: leaf for name, leaf in params.items() if name not in ends}
        x = self._pin(params["embedding"][inputs] + params["position"][None])
        x, _ = jax.lax.scan(lambda x, w: (self._layer(x, w), None), x, layers)
        return self._pin(_norm(x, params["norm"]) @ params["head"])

    def _pin(self, x):
        if self.sharding is None:
            return x
        return jax.lax.with_sharding_constraint(x, self.sharding)

    def _layer(self, x, w):
        count, length, _ = x.shape
        y = _norm(x, w["attention_norm"]) @ w["query_key_value"]
        query, key, value = jnp.moveaxis(
            y.reshape(count, length, 3, self.num_heads, -1), 2, 0
        )
        y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = self._pin(x + y.reshape(x.shape) @ w["attention_out"])
        return self._pin(x + jax.nn.gelu(_norm(x, w["mlp_norm"]) @ w["up"]) @ w["down"])


def _norm(x, scale):
    """Normalization by the root mean square, in float32."""
    wide = x.astype(jnp.float32)
    size = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-6)
    return (wide * size).astype(x.dtype) * jnp.expand_dims(
        scale, tuple(range(x.ndim - 1))
    )


def make_large(name, smoke=False, abstract=False, batch_size=None):
    """One of :data:`NAMES`: "mlp" (batch 1,024), "transformer" (8), "resnet18" (128).

    ``smoke`` makes a tiny one; ``abstract`` gives shapes in place of arrays.
    """
    make = {"mlp": _mlp, "transformer": _transformer, "resnet18": _resnet18}[name]
    sizes = {"mlp": 1024, "transformer": 8, "resnet18": 128}
    batch_size = batch_size or (8 if smoke else sizes[name])
    value_fn, arrays = make(smoke, batch_size)
    return _problem(name, value_fn, arrays, abstract)


def language_problem(name, model, batch_size):
    """A :class:`Decoder` and a batch as shapes."""
    return _problem(name, *_of_tokens(model, batch_size), abstract=True)


def of_images(name, make_model, side, batch_size, dtype):
    """A classifier of images and a batch as shapes."""
    return _problem(name, *_of_images(make_model, side, batch_size, dtype), True)


def _problem(name, value_fn, arrays, abstract):
    params, batch = jax.eval_shape(arrays) if abstract else jax.jit(arrays)()
    return Problem(name, value_fn, params, batch)


def _transformer(smoke, batch_size):
    return _of_tokens(Decoder(2, 16, 2, 32, 8) if smoke else Decoder(), batch_size)


def _of_tokens(model, batch_size):
    def arrays():
        tokens = jax.random.randint(
            jax.random.key(1), (batch_size, model.length), 0, model.vocabulary
        )
        batch = {"inputs": tokens, "labels": jnp.roll(tokens, -1, axis=1)}
        return model.init(jax.random.key(0)), batch

    return model.value_fn, arrays


def _mlp(smoke, batch_size):
    width = 16 if smoke else 1024
    return _of_images(lambda: MLP(nnx.Rngs(0), width), 24, batch_size, jnp.float32)


def _resnet18(smoke, batch_size):
    widths = (8, 8, 16) if smoke else ResNet18.WIDTHS
    side = 8 if smoke else 32
    make = lambda: ResNet18(nnx.Rngs(0), widths)  # noqa: E731
    return _of_images(make, side, batch_size, jnp.bfloat16)


def _of_images(make_model, side, batch_size, dtype):
    """A classifier of images that computes in ``dtype``; parameters are float32."""
    graphdef = nnx.split(nnx.eval_shape(make_model))[0]

    def value_fn(params, inputs, labels):
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        logits = nnx.merge(graphdef, params)(inputs.astype(dtype)).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def arrays():
        keys = jax.random.split(jax.random.key(1), 2)
        inputs = jax.random.normal(keys[0], (batch_size, side, side, 3))
        labels = jax.random.randint(keys[1], (batch_size,), 0, 10)
        params = nnx.to_pure_dict(nnx.split(make_model())[1])
        return params, {"inputs": inputs, "labels": labels}

    return value_fn, arrays

"""Names of types: what a parameter tree, a loss, a key, a word may be."""

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import jax
import optax

Params: TypeAlias = Any
"""A tree of floating arrays."""

ParamsT = TypeVar("ParamsT")
"""The type of the parameters at hand: what comes back is a tree like it."""

Batch: TypeAlias = Any
"""A tree of arrays whose leading axis counts examples, or a re-iterable of such trees."""

Scalar: TypeAlias = jax.typing.ArrayLike
"""One number: Python's, NumPy's or an array of shape ()."""

ScalarOrSchedule: TypeAlias = jax.typing.ArrayLike | optax.Schedule
"""One number, or a function of the step count that returns one."""

Key: TypeAlias = int | jax.Array
"""What a link draws from: a seed, or a JAX random key."""

Mask: TypeAlias = Any
"""A tree prefix of bools, a function of the parameters that returns one, a pattern of
paths such as ``"encoder/*/kernel"``, or None."""

AxisName: TypeAlias = str | tuple[str, ...] | None
"""Axes of ``jax.shard_map`` to average over."""

Strategy: TypeAlias = Literal["auto", "vmap", "scan", "unroll"] | int
Sampling: TypeAlias = Literal["without_replacement", "with_replacement", "bernoulli"]
SimulatedNoise: TypeAlias = Literal["sgd", "gd", "isotropic", "langevin"]
SpectrumEnd: TypeAlias = Literal["largest", "smallest", "magnitude"]
BallNorm: TypeAlias = Literal["l2", "linf"]
BatchNormSource: TypeAlias = Literal["perturbed", "clean"]

LossFn: TypeAlias = Callable[..., Any]
"""A mean loss: ``loss_fn(params, ...) -> scalar``."""

ModelFn: TypeAlias = Callable[[Any, Any], Any]
"""A model: ``model_fn(params, inputs) -> outputs``."""

WeightFn: TypeAlias = Callable[[Any], Any]
"""The weight of a batch or of a chunk, a scalar."""

Optimizer: TypeAlias = Callable[[Any], optax.GradientTransformation]
"""A function of the learning rate: ``lambda rate: optax.sgd(rate, momentum=0.9)``."""


class KernelFn(Protocol):
    """A kernel: ``kernel(key, params) -> perturbation``."""

    def __call__(self, key: Any, params: Any, /) -> Any:
        """One perturbation, a tree like the parameters."""


class Sampler(Protocol):
    """A sampler of mean 0 and variance 1, in the form of ``jax.random.normal``."""

    def __call__(self, key: Any, shape: Any, dtype: Any = ..., /) -> jax.Array:
        """Independent values."""

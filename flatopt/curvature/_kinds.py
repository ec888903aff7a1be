"""What a curvature operator does on one batch; hashable, so that compiled code is kept."""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import blocks, checks, jaxprs, parts, platforms, risk, trees, vectors
from flatopt.curvature._cross_entropy import lean
from flatopt.curvature._modes import forward_or_reverse


class Kind(abc.ABC):
    """The contract of a curvature matrix: a mean over batches, and how to finish it."""

    looks_at_data: ClassVar[bool] = False  # whether check() does anything
    is_centered: ClassVar[bool] = False  # whether batches are compared with a reference
    # Whether products are differences: of float32 vectors or wider, sharing no work. Their
    # errors are more than rounding, and told by a method errors(params, batch, block, found).
    is_differenced: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def batch_loss(self):
        """A hashable ``loss_fn(params, batch)``: the mean loss of a batch."""

    def loss(self, params, batch):
        """The loss of a batch, as :meth:`linearize` returns it."""
        return risk.loss_of(self.batch_loss, params, batch)

    @abc.abstractmethod
    def linearize(self, params, batch):
        """What all vectors share, done once: ``(loss, shared, product)``.

        ``product(vector)`` is one product with this batch's matrix. A centered kind takes
        the mean gradient of some batch as one more argument, on many batches.
        """

    @abc.abstractmethod
    def quadratic(self, params, batch, vector):
        """A tuple of numbers whose means over batches give the quadratic form."""

    def check(self, params, batch):
        """Reject a loss that this matrix is not defined for, seen on one batch."""
        del params, batch

    def finish(self, products, shared, vectors):
        """The products of all data from means over batches."""
        del shared, vectors
        return products

    def finish_quadratic(self, moments):
        """The quadratic form of all data from means over batches."""
        return moments[0]


@dataclasses.dataclass(frozen=True)
class Hessian(Kind):
    """The Hessian of the mean loss."""

    loss_fn: Callable

    @property
    def batch_loss(self):
        return self.loss_fn

    def linearize(self, params, batch):
        loss = functools.partial(self.loss, batch=batch)

        def gradient(params):
            value, grads = jax.value_and_grad(loss)(params)
            return grads, value

        def forward():
            _, product, value = jax.linearize(gradient, params, has_aux=True)
            return value, (), product

        def reverse():
            grads, pullback, value = jax.vjp(gradient, params, has_aux=True)
            del grads
            return value, (), lambda vector: pullback(vector)[0]

        value, shared, product = forward_or_reverse(
            forward, reverse, gradient, loss, params
        )
        return value, shared, jaxprs.swap_factors(product, params)

    def quadratic(self, params, batch, vector):
        loss = functools.partial(self.loss, batch=batch)

        def slope(params):
            return jax.jvp(loss, (params,), (vector,))[1]

        def forward():
            return (jax.jvp(slope, (params,), (vector,))[1],)

        def reverse():
            _, _, product = self.linearize(params, batch)
            return (vectors.dot(vector, product(vector)),)

        function = lambda p: (slope(p), ())  # noqa: E731
        return forward_or_reverse(forward, reverse, function, loss, params)


@dataclasses.dataclass(frozen=True)
class GaussNewton(Kind):
    """The Hessian of the mean loss with the model linearized."""

    model_fn: Callable
    loss_fn: Callable

    @property
    def batch_loss(self):
        return _ModelLoss(self)

    def outputs(self, params, batch):
        pair = parts.batch_of(batch)
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(
                "data must be pairs (inputs, targets), got a batch of type "
                f"{type(pair).__name__}; gauss_newton gives them to model_fn and loss_fn."
            )
        return self.model_fn(params, parts.replaced(batch, pair[0]))

    def output_loss(self, outputs, batch):
        _, targets = parts.batch_of(batch)
        return checks.check_value(self.loss_fn(outputs, targets), "loss_fn")

    def output_product(self, outputs, batch, tangent):
        _, targets = parts.batch_of(batch)
        loss_fn = lean(self.loss_fn, outputs, targets)
        gradient = jax.grad(lambda o: loss_fn(o, targets))
        return jax.jvp(gradient, (outputs,), (tangent,))[1]

    def linearize(self, params, batch):
        def model(params):
            return self.outputs(params, batch)

        def forward():
            outputs, push = jax.linearize(model, params)
            return outputs, push, jax.linear_transpose(push, params)

        def reverse():
            outputs, pull = jax.vjp(model, params)
            transposed = jax.linear_transpose(lambda u: pull(u)[0], outputs)
            jax.eval_shape(transposed, params)  # fails here if at all
            return outputs, lambda vector: transposed(vector)[0], pull

        outputs, push, pull = forward_or_reverse(
            forward, reverse, lambda p: (model(p), ()), model, params
        )

        def product(vector):
            given, tangent = _apart(outputs, push(vector))
            return pull(self.output_product(given, batch, tangent))[0]

        return self.output_loss(outputs, batch), (), product

    def quadratic(self, params, batch, vector):
        def model(params):
            return self.outputs(params, batch)

        def forward():
            outputs, tangent = jax.jvp(model, (params,), (vector,))
            curved = self.output_product(outputs, batch, tangent)
            return (vectors.dot(tangent, curved),)

        def reverse():
            _, _, product = self.linearize(params, batch)
            return (vectors.dot(vector, product(vector)),)

        return forward_or_reverse(
            forward, reverse, lambda p: (model(p), ()), model, params
        )


@dataclasses.dataclass(frozen=True)
class _ModelLoss:
    """The loss of a model's outputs as a function of its parameters."""

    kind: GaussNewton

    def __call__(self, params, batch):
        return self.kind.output_loss(self.kind.outputs(params, batch), batch)


def _apart(outputs, tangent):
    """First what is as large as the outputs, then the rest, but for CPU.

    Mixed with the forward pass, curving them takes a TPU the memory of as many again. On
    CPU a streamed product would take that of as many parameters more.
    """
    return platforms.choose(
        lambda *both: both,
        lambda *both: jax.lax.optimization_barrier(both),
        outputs,
        tangent,
    )


@dataclasses.dataclass(frozen=True)
class EmpiricalFisher(Kind):
    """The mean over examples of gradient times gradient, not centered."""

    looks_at_data: ClassVar[bool] = True
    loss_fn: Callable
    weight_fn: Callable | None = None

    @property
    def batch_loss(self):
        return self.loss_fn

    def losses(self, params, batch):
        """One loss an example, and the examples' weights, which sum to 1."""
        given, batch = batch, parts.batch_of(batch)
        axes = jax.tree.map(lambda x: 0 if jnp.ndim(x) else None, batch)

        def of_one(example):
            # A batch of one: what had an axis of examples gets it back.
            return jax.tree.map(
                lambda x, whole: x[None] if jnp.ndim(whole) else x, example, batch
            )

        def loss(example):
            one = parts.replaced(given, of_one(example))
            return checks.check_value(self.loss_fn(params, one), "loss_fn")

        def weight(example):
            return jnp.asarray(self.weight_fn(of_one(example))).astype(float)

        if self.weight_fn is None:
            values = jax.vmap(loss, in_axes=(axes,))(batch)
            return values, jnp.full_like(values, 1 / len(values))
        weights = jax.vmap(weight, in_axes=(axes,))(batch)
        # The mean loss of an example of no weight is 0 / 0: put another in its place.
        rows = jnp.where(weights > 0, jnp.arange(len(weights)), jnp.argmax(weights))
        batch = jax.tree.map(lambda x: x[rows] if jnp.ndim(x) else x, batch)
        values = jax.vmap(loss, in_axes=(axes,))(batch)
        return values, (weights / weights.sum()).astype(values.dtype)

    def loss(self, params, batch):
        values, weights = self.losses(params, batch)
        return jnp.sum(weights * values)

    def check(self, params, batch):
        """Reject a loss that is no mean over examples, such as BatchNorm in training."""
        self._check_at(params, batch)
        self._check_at(_moved(params), batch)  # a last layer near 0 hides it here

    def _check_at(self, params, batch):
        # As the same kind for all of single gradients: they share the program.
        kind = EmpiricalFisher(self.loss_fn, self.weight_fn)
        found = _both_losses(kind, params, batch)
        if isinstance(found[0], jax.core.Tracer):  # as it is by what the loss holds
            return
        alone, size, together = map(float, found)
        allowed = 1e-2 * size + 1e-6 if np.isfinite(alone + together) else np.inf
        if abs(alone - together) > allowed:
            raise ValueError(
                "loss_fn must be the mean of its losses on single examples, got "
                f"{together:g} on a batch and {alone:g} on its examples one by one; put "
                "BatchNorm in evaluation mode, or give the weight_fn of the mean."
            )

    def examples(self, params, batch):
        """The losses of the examples, their weights, and both products with Jacobians."""

        def losses(params):
            return self.losses(params, batch)

        def forward():
            values, push, weights = jax.linearize(losses, params, has_aux=True)
            return values, weights, push, jax.linear_transpose(push, params)

        def reverse():
            values, pull, weights = jax.vjp(losses, params, has_aux=True)
            transposed = jax.linear_transpose(lambda u: pull(u)[0], values)
            jax.eval_shape(transposed, params)
            return values, weights, lambda vector: transposed(vector)[0], pull

        return forward_or_reverse(forward, reverse, losses, losses, params)

    def linearize(self, params, batch):
        values, weights, push, pull = self.examples(params, batch)
        value = jnp.sum(weights * values)
        return value, (), lambda vector: pull(weights * push(vector))[0]

    def slopes(self, params, batch, vector):
        """The slopes of the examples' losses along a vector, and the weights."""
        losses = functools.partial(self.losses, batch=batch)

        def forward():
            _, slopes, weights = jax.jvp(losses, (params,), (vector,), has_aux=True)
            return slopes, weights

        def reverse():
            values, pull, weights = jax.vjp(losses, params, has_aux=True)
            slopes = jax.linear_transpose(lambda u: pull(u)[0], values)(vector)[0]
            return slopes, weights

        return forward_or_reverse(forward, reverse, losses, losses, params)

    def quadratic(self, params, batch, vector):
        slopes, weights = self.slopes(params, batch, vector)
        return (jnp.sum(weights * slopes**2),)


@jax.jit
def _moved(params):
    """Parameters of the same order of magnitude, none of them zero."""

    def move(leaf):
        wide = blocks.widen(leaf)
        size = jnp.maximum(jnp.max(jnp.abs(wide), initial=0.0), 1.0) / 2
        waves = jnp.cos(3.0 * jnp.arange(leaf.size, dtype=jnp.float32) + 1.0).reshape(
            leaf.shape
        )
        return (wide + size * waves.astype(wide.dtype)).astype(leaf.dtype)

    return jax.tree.map(move, params)


@functools.partial(jax.jit, static_argnums=0)
def _both_losses(kind, params, batch):
    """The mean loss of single examples, that of its magnitude, the loss of the batch."""
    values, weights = kind.losses(params, batch)
    together = risk.loss_of(kind.loss_fn, params, batch)
    return jnp.sum(weights * values), jnp.sum(weights * jnp.abs(values)), together


@dataclasses.dataclass(frozen=True)
class GradientCovariance(EmpiricalFisher):
    """The covariance of the examples' gradients.

    Their mean may be a thousand times their noise, and its square a million times what is
    asked for. So nothing of its size is squared: slopes are centered within a batch, and
    the means of batches are taken less a reference, the mean of one of them.
    """

    is_centered: ClassVar[bool] = True

    def mean_gradient(self, params, batch):
        """The mean gradient of a batch, a reference for the others."""
        _, weights, _, pull = self.examples(params, batch)
        return blocks.widen(pull(weights)[0])

    def linearize(self, params, batch, reference=None):
        values, weights, push, pull = self.examples(params, batch)
        value, shared = jnp.sum(weights * values), ()
        if reference is not None:
            shared = blocks.subtract(blocks.widen(pull(weights)[0]), reference)

        def product(vector):
            centered, _ = _centered(push(vector), weights)
            inside = pull(weights * centered.astype(weights.dtype))[0]
            if reference is None:
                return inside
            slope = vectors.dot(shared, vector)
            return jax.tree.map(
                lambda x, s: trees.widen(x) + slope.astype(s.dtype) * s, inside, shared
            )

        return value, shared, product

    def finish(self, products, shared, vectors):
        if not jax.tree.leaves(shared):  # of one batch, centered on its own mean
            return products
        slopes = blocks.gram(vectors, blocks.single(shared))
        return blocks.subtract(products, blocks.combine(slopes, blocks.single(shared)))

    def quadratic(self, params, batch, vector, reference=None):
        slopes, weights = self.slopes(params, batch, vector)
        centered, mean = _centered(slopes, weights)
        inside = jnp.sum(trees.widen(weights) * centered**2)
        if reference is None:
            return (inside,)
        mean = mean - vectors.dot(reference, vector).astype(mean.dtype)
        return inside + mean**2, mean

    def finish_quadratic(self, moments):
        return moments[0] - moments[1] ** 2 if len(moments) > 1 else moments[0]


def _centered(slopes, weights):
    """Slopes less their weighted mean, in float32 or wider, and that mean.

    Taken away twice: the rounding of the mean of large numbers would come back times the
    mean gradient.
    """
    slopes, weights = trees.widen(slopes), trees.widen(weights)
    mean = jnp.sum(weights * slopes)
    centered = slopes - mean
    rest = jnp.sum(weights * centered)
    return centered - rest, mean + rest

"""Measures of sharpness that are read off the curvature or the outputs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flatopt import curvature
from flatopt._core import blocks, checks, streams
from flatopt._core.estimates import Estimate
from flatopt._core.risk import check_model
from flatopt._core.types import LossFn, Mask, ModelFn, WeightFn
from flatopt.sharpness._solve import check_number, check_positive


def fisher_rao_hessian(
    loss_fn: LossFn,
    params: Any,
    *,
    data: Any = None,
    weight_fn: WeightFn | None = None,
    mask: Mask = None,
    constants: Any = None,
) -> float:
    r"""The Fisher-Rao norm :math:`\theta^\top H \theta` with the Hessian, as in the paper.

    Args:
      loss_fn, params, data, weight_fn, mask, constants: see :func:`low_pass`.

    Returns:
      The quadratic form; it may be negative.

    References:
      Liang, Poggio, Rakhlin, Stokes, `Fisher-Rao Metric, Geometry, and Complexity of Neural
      Networks <https://arxiv.org/abs/1711.01530>`_, AISTATS 2019; with the Hessian in the
      code of Bisla et al. 2022.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import sharpness
      >>> sharpness.fisher_rao_hessian(lambda p: jnp.sum(p ** 2), jnp.ones(2))
      4.0
    """
    operator = curvature.hessian(
        loss_fn, params, data, weight_fn=weight_fn, mask=mask, constants=constants
    )
    return form_of(operator)


def fisher_rao_gauss_newton(
    model_fn: ModelFn,
    loss_fn: LossFn,
    params: Any,
    data: Any,
    *,
    weight_fn: WeightFn | None = None,
    mask: Mask = None,
    constants: Any = None,
) -> float:
    r"""The Fisher-Rao norm with the Gauss-Newton matrix: the Fisher for cross-entropy.

    Args:
      model_fn, loss_fn, params, data, weight_fn, mask, constants: see
        :func:`flatopt.curvature.gauss_newton`.

    Returns:
      The quadratic form.

    References:
      Liang, Poggio, Rakhlin, Stokes, `Fisher-Rao Metric, Geometry, and Complexity of Neural
      Networks <https://arxiv.org/abs/1711.01530>`_, AISTATS 2019.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import sharpness
      >>> sharpness.fisher_rao_gauss_newton(
      ...     lambda p, x: x @ p, lambda f, y: jnp.mean((f - y) ** 2) / 2, jnp.ones(2),
      ...     (jnp.eye(2), jnp.zeros(2)))
      1.0
    """
    operator = curvature.gauss_newton(
        model_fn,
        loss_fn,
        params,
        data,
        weight_fn=weight_fn,
        mask=mask,
        constants=constants,
    )
    return form_of(operator)


def fisher_rao_empirical(
    loss_fn: LossFn,
    params: Any,
    data: Any,
    *,
    weight_fn: WeightFn | None = None,
    mask: Mask = None,
    constants: Any = None,
) -> float:
    r"""The Fisher-Rao norm with the empirical Fisher matrix.

    Args:
      loss_fn, params, data, weight_fn, mask, constants: see
        :func:`flatopt.curvature.empirical_fisher`.

    Returns:
      The quadratic form.

    References:
      Liang, Poggio, Rakhlin, Stokes, `Fisher-Rao Metric, Geometry, and Complexity of Neural
      Networks <https://arxiv.org/abs/1711.01530>`_, AISTATS 2019.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import sharpness
      >>> sharpness.fisher_rao_empirical(
      ...     lambda p, batch: jnp.mean(batch @ p), jnp.ones(2), 2 * jnp.eye(2))
      4.0
    """
    operator = curvature.empirical_fisher(
        loss_fn, params, data, weight_fn=weight_fn, mask=mask, constants=constants
    )
    return form_of(operator)


def form_of(operator):
    """The quadratic form of the parameters themselves."""
    found = operator.quadratic_form(operator.like)
    advice = "look at the gradient and the curvature at these parameters first."
    return checks.float_of(check_number(found, "fisher_rao", advice), "fisher_rao")


def shannon_entropy(
    model_fn: ModelFn, params: Any, inputs: Any, *, constants: Any = None
) -> float:
    r"""Minus the mean entropy of the predicted classes: larger is more certain.

    The paper tabulates the mean entropy itself; the sign is turned here so that larger
    means sharper, as for all measures.

    Args:
      model_fn: ``model_fn(params, inputs) -> logits``, classes last.
      params: the parameters.
      inputs: one batch of inputs, or a list of batches.
      constants: arrays that ``model_fn`` takes last, such as running statistics; networks
        that differ in them share compiled code.

    Returns:
      The negative mean entropy in nats, at most 0.

    References:
      Pereyra, Tucker, Chorowski, Kaiser, Hinton, `Regularizing Neural Networks by
      Penalizing Confident Output Distributions <https://arxiv.org/abs/1701.06548>`_, 2017.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import sharpness
      >>> round(sharpness.shannon_entropy(lambda p, x: x, None, jnp.zeros((5, 2))), 4)
      -0.6931
    """
    check_model(model_fn, constants)
    rest = () if constants is None else (constants,)
    total, count = 0.0, 0
    for batch in inputs if streams.is_stream(inputs) else [inputs]:
        batch = jax.tree.map(jnp.asarray, batch)
        size = streams.batch_size(batch)
        total, count = (
            total + size * _certainty(model_fn, params, batch, *rest),
            count + size,
        )
    if not count:
        raise ValueError(
            "inputs must hold examples, got none; give at least one batch."
        )
    advice = "look at the outputs of model_fn first."
    name = "shannon_entropy"
    return checks.float_of(check_number(total / count, name, advice), name)


@functools.partial(jax.jit, static_argnums=0)
def _certainty(model_fn, params, *arguments):
    logits = jnp.asarray(model_fn(params, *arguments), jnp.float32)
    if logits.ndim < 2 or logits.shape[-1] < 2:
        raise ValueError(
            f"model_fn must return logits of shape (n, classes), got {logits.shape}; for "
            "one logit z of two classes give (0, z)."
        )
    logs = jax.nn.log_softmax(logits, axis=-1)
    return jnp.mean(jnp.sum(jnp.exp(logs) * logs, axis=-1))


def effective_dimension(
    loss_fn: LossFn,
    params: Any,
    key: jax.Array,
    *,
    alpha: float = 1.0,
    num_draws: int = 4,
    num_steps: int = 64,
    data: Any = None,
    weight_fn: WeightFn | None = None,
    mask: Mask = None,
    constants: Any = None,
) -> Estimate:
    r"""The number of directions that the loss determines.

    .. math:: \sum_i \frac{\lambda_i^+}{\lambda_i^+ + \alpha}

    by stochastic Lanczos quadrature. Negative eigenvalues count as zero; in the paper's
    code those near :math:`-\alpha` make it blow up.

    Args:
      loss_fn, params, data, weight_fn, mask, constants: see :func:`low_pass`.
      key: a JAX random key.
      alpha: the eigenvalue that counts as one half, > 0.
      num_draws, num_steps: see :func:`flatopt.curvature.spectral_density`.

    Returns:
      An :class:`~flatopt.curvature.Estimate` over draws.

    References:
      Maddox, Benton, Wilson, `Rethinking Parameter Counting in Deep Models: Effective
      Dimensionality Revisited <https://arxiv.org/abs/2003.02139>`_, 2020.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import sharpness
      >>> found = sharpness.effective_dimension(
      ...     lambda p: jnp.sum(p ** 2), jnp.ones(4), jax.random.key(0), alpha=2.0)
      >>> round(float(found.value), 3)
      2.0
    """
    check_positive(alpha, "alpha")
    operator = curvature.hessian(
        loss_fn, params, data, weight_fn=weight_fn, mask=mask, constants=constants
    )
    return dimension_of(operator, key, alpha, num_draws, num_steps)


def dimension_of(operator, key, alpha=1.0, num_draws=4, num_steps=64):
    """As :func:`effective_dimension`, of a Hessian at hand."""
    density = curvature.spectral_density(
        operator, key, num_draws=num_draws, num_steps=num_steps
    )
    positive = np.maximum(density.nodes, 0)
    shares = (density.weights * positive / (positive + alpha)).sum(axis=1)
    return Estimate.of(jnp.asarray(blocks.size(operator.like) * shares))

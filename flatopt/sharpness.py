r"""Measures of sharpness: how much the loss grows around a minimum.

Each takes ``loss_fn(params)``, or ``loss_fn(params, batch)`` with ``data=`` one batch or a
re-iterable of batches, whose examples weigh the same or as ``weight_fn(batch)`` says. For
all of them larger means sharper. Measures in units of the parameters change when layers are
rescaled without changing the function; :func:`normalize_filters` removes that freedom.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flatopt import (
    _blocks,
    _checks,
    _filters,
    _passes,
    _random,
    _streams,
    _trees,
    curvature,
    kernels,
)
from flatopt._probes import probe_keys
from flatopt.curvature import Estimate
from flatopt.entropy import entropy_sgd_gradients


class NormalizedFilters(NamedTuple):
    """A network in units of its filters, from :func:`normalize_filters`.

    Attributes:
      params: the parameters, each filter with its bias divided by its size.
      restore: ``restore(params)``, the original parameters from normalized ones.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import sharpness
      >>> found = sharpness.normalize_filters({"kernel": jnp.array([[3.0], [4.0]])})
      >>> [round(float(x), 2) for x in found.params["kernel"][:, 0]]
      [0.6, 0.8]
    """

    params: Any
    restore: Callable[[Any], Any]


class PACBayes(NamedTuple):
    """Result of :func:`pac_bayes`.

    Attributes:
      value: the measure.
      sigma: the standard deviation of the noise that raises the loss by the target.

    Example:
      >>> from flatopt import sharpness
      >>> sharpness.PACBayes(value=30.0, sigma=0.1).sigma
      0.1
    """

    value: float
    sigma: float


def normalize_filters(
    params: Any, filter_axes: kernels.FilterAxes = None
) -> NormalizedFilters:
    r"""Divide each filter and its bias by :math:`\|w_f\| + |b_f|`; the function stays.

    Leaves of one layer (of the same path but for its last part) are taken together: the
    norm of each filter of a kernel, plus the magnitudes of what has one value a filter (a
    ``bias``, the ``scale`` of a normalization). A filter of size zero is left alone. With
    ``normalized, restore = normalize_filters(params)``, measure
    ``lambda q, batch: loss_fn(restore(q), batch)`` at ``normalized``: rescaling layers no
    longer matters.

    Args:
      params: the parameters.
      filter_axes: see :func:`flatopt.kernels.filterwise`.

    Returns:
      :class:`NormalizedFilters`.

    References:
      Bisla, Wang, Choromanska, `Low-Pass Filtering SGD for Recovering Flat Optima
      <https://arxiv.org/abs/2201.08025>`_, AISTATS 2022, section 4 (the authors' code).

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import sharpness
      >>> params = {"kernel": jnp.array([[3.0], [4.0]]), "bias": jnp.array([5.0])}
      >>> normalized, restore = sharpness.normalize_filters(params)
      >>> normalized["bias"], restore(normalized)["bias"]
      (Array([0.5], dtype=float32), Array([5.], dtype=float32))
    """
    norm = _filters.filter_norm(filter_axes)
    axes_of = _filters.filter_axes_function(filter_axes)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    layers, sizes = {}, []
    for path, leaf in leaves:
        name = _trees.path_name(path)
        layer, _, last = name.rpartition("/")
        leaf = _trees.widen(jnp.asarray(leaf))
        single = leaf.ndim <= 1 or last in ("bias", "scale")
        size = jnp.abs(leaf) if single else norm(name, leaf)
        axes = _filters.check_axes(axes_of(name, leaf), name, leaf)
        shape = leaf.shape if single else tuple(leaf.shape[axis] for axis in axes)
        sizes.append((layer, shape, size))
        group = layers.setdefault((layer, shape), 0.0)
        layers[layer, shape] = group + size.reshape(shape)
    scales = []
    for layer, shape, size in sizes:
        total = layers[layer, shape]
        scales.append(jnp.where(total == 0, 1.0, total).reshape(size.shape))
    scales = treedef.unflatten(scales)

    def restore(params):
        return jax.tree.map(
            lambda p, s: (_trees.widen(p) * s).astype(p.dtype), params, scales
        )

    normalized = jax.tree.map(
        lambda p, s: (_trees.widen(jnp.asarray(p)) / s).astype(jnp.asarray(p).dtype),
        params,
        scales,
    )
    return NormalizedFilters(normalized, restore)


# Averages over random perturbations


@functools.lru_cache(maxsize=64)
def _noise_move(kernel):
    def move(key, params, scale):
        noise = _trees.bind(kernel, key, params)(key)
        return jax.tree.map(
            lambda p, u: _trees.widen(p) + scale.astype(u.dtype) * u, params, noise
        )

    return move


ISOTROPIC, ELEMENTWISE = kernels.isotropic(), kernels.elementwise()


def _rises(operator, key, scale, num_samples, kernel, base=None):
    """Loss at random perturbations less the loss, shape (num_samples,)."""
    base = _passes.base_loss(operator) if base is None else base
    keys = probe_keys(key, 0, num_samples)
    found = _passes.losses(operator, _noise_move(kernel), keys, jnp.float32(scale))
    return found - base


def _mean(samples):
    count = len(samples)
    error = jnp.std(samples, ddof=1) / count**0.5 if count > 1 else jnp.float32(jnp.inf)
    return Estimate(jnp.mean(samples), error, count)


def low_pass(
    loss_fn: Callable[..., Any],
    params: Any,
    key: jax.Array,
    *,
    sigma: float = 0.01,
    num_samples: int = 100,
    kernel: Callable[..., Any] | None = None,
    data: Any = None,
    weight_fn: Callable[[Any], Any] | None = None,
) -> Estimate:
    r"""The mean loss under random perturbation, less the loss.

    .. math:: E_U[L(\theta + \sigma U)] - L(\theta) \approx
        \tfrac{\sigma^2}{2} \operatorname{tr} H

    The paper measures it with isotropic noise on the filter-normalized network
    (:func:`normalize_filters`), without taking the loss away.

    Args:
      loss_fn: the mean loss.
      params: the parameters.
      key: a JAX random key.
      sigma: scale of the noise, > 0.
      num_samples: number of perturbations.
      kernel: the noise; default: :func:`flatopt.kernels.isotropic`. Make it once: code is
        compiled for each kernel, as for each loss.
      data: one batch, or a re-iterable of batches.
      weight_fn: weight of a batch; default: its number of examples.

    Returns:
      An :class:`~flatopt.curvature.Estimate`.

    References:
      Bisla, Wang, Choromanska, `Low-Pass Filtering SGD for Recovering Flat Optima
      <https://arxiv.org/abs/2201.08025>`_, AISTATS 2022, section 4.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import kernels, sharpness
      >>> found = sharpness.low_pass(
      ...     lambda p: jnp.sum(p ** 2), jnp.zeros(3), jax.random.key(0), sigma=0.1,
      ...     kernel=kernels.isotropic(kernels.signs))
      >>> round(float(found.value), 4)
      0.03
    """
    _check_positive(sigma, "sigma")
    _checks.check_num_samples(num_samples)
    operator = curvature.hessian(loss_fn, params, data, weight_fn=weight_fn)
    kernel = ISOTROPIC if kernel is None else kernel
    return _mean(_rises(operator, key, sigma, num_samples, kernel))


def average_case_adaptive(
    loss_fn: Callable[..., Any],
    params: Any,
    key: jax.Array,
    *,
    rho: float = 0.1,
    num_samples: int = 100,
    data: Any = None,
    weight_fn: Callable[[Any], Any] | None = None,
) -> Estimate:
    r"""The mean loss at :math:`\theta + \rho |\theta| \odot U`, less the loss.

    Unchanged when layers are rescaled.

    Args:
      loss_fn, params, key, num_samples, data, weight_fn: see :func:`low_pass`.
      rho: scale of the noise in units of each parameter, > 0.

    Returns:
      An :class:`~flatopt.curvature.Estimate`.

    References:
      Andriushchenko, Croce, Müller, Hein, Flammarion, `A Modern Look at the Relationship
      between Sharpness and Generalization <https://arxiv.org/abs/2302.07011>`_, ICML 2023.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import sharpness
      >>> found = sharpness.average_case_adaptive(
      ...     lambda p: jnp.sum(p), jnp.ones(3), jax.random.key(0), num_samples=1000)
      >>> abs(float(found.value)) < 4 * float(found.standard_error)
      True
    """
    _check_positive(rho, "rho")
    _checks.check_num_samples(num_samples)
    operator = curvature.hessian(loss_fn, params, data, weight_fn=weight_fn)
    return _mean(_rises(operator, key, rho, num_samples, ELEMENTWISE))


def pac_bayes(
    loss_fn: Callable[..., Any],
    params: Any,
    key: jax.Array,
    *,
    initial_params: Any,
    num_examples: int | None = None,
    epsilon: float = 0.1,
    num_samples: int = 10,
    delta: float = 1e-6,
    data: Any = None,
    weight_fn: Callable[[Any], Any] | None = None,
) -> PACBayes:
    r"""Distance to the initialization, in units of the noise that the loss tolerates.

    .. math:: \frac{\|\theta - \theta_0\|^2}{4 \sigma^2} + \log \frac{2n}{\delta}, \qquad
        E_U[L(\theta + \sigma U)] - L(\theta) = \epsilon

    The scale is found by bisection on the same draws at each scale, so that the rise is a
    smooth function of it. The authors' code replaces the initialization that it is given by
    zeros; this does not.

    Args:
      loss_fn, params, key, data, weight_fn: see :func:`low_pass`.
      initial_params: the parameters at initialization.
      num_examples: n; default: counted from ``data``.
      epsilon: rise of the loss, > 0.
      num_samples: number of perturbations.
      delta: probability that the bound fails.

    Returns:
      :class:`PACBayes`; sigma is infinite and the value the logarithm alone where no
      scale up to 1e6 raises the loss by epsilon.

    References:
      Bisla, Wang, Choromanska, `Low-Pass Filtering SGD for Recovering Flat Optima
      <https://arxiv.org/abs/2201.08025>`_, AISTATS 2022, section 4, after Jiang,
      Neyshabur, Mobahi, Krishnan, Bengio, `Fantastic Generalization Measures
      <https://arxiv.org/abs/1912.02178>`_, ICLR 2020.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import sharpness
      >>> found = sharpness.pac_bayes(
      ...     lambda p: jnp.sum(p ** 2), jnp.zeros(500), jax.random.key(0),
      ...     initial_params=jnp.ones(500), num_examples=100)
      >>> round(found.sigma, 3)  # sqrt(0.1 / 500)
      0.014
    """
    _check_positive(epsilon, "epsilon")
    _check_positive(delta, "delta")
    _checks.check_num_samples(num_samples)
    operator = curvature.hessian(loss_fn, params, data, weight_fn=weight_fn)
    if num_examples is None:
        num_examples = _count_examples(operator)
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (initial_params, params)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "initial_params must have the structure and shapes of params, got "
            f"{shapes[0]}; give the parameters that training started from."
        )

    base = _passes.base_loss(operator)

    def rise(sigma):
        return float(
            jnp.mean(_rises(operator, key, sigma, num_samples, ISOTROPIC, base))
        )

    sigma = _solve(rise, epsilon, 1e-3, 1e6)
    difference = jax.tree.map(
        lambda p, q: _trees.widen(jnp.asarray(p)) - _trees.widen(jnp.asarray(q)),
        params,
        initial_params,
    )
    distance = float(_blocks.dot(difference, difference))
    penalty = distance / (4 * sigma**2) if math.isfinite(sigma) else 0.0
    return PACBayes(penalty + math.log(2 * num_examples / delta), sigma)


def local_entropy(
    loss_fn: Callable[..., Any],
    params: Any,
    key: jax.Array,
    *,
    gamma: float = 100.0,
    num_samples: int = 100,
    data: Any = None,
    weight_fn: Callable[[Any], Any] | None = None,
) -> Estimate:
    r"""The negative local entropy, relative to a flat loss.

    .. math:: -\log E_U \exp\left(-(L(\theta + \gamma^{-1/2} U) - L(\theta))\right)

    with :math:`U` standard normal: :math:`-\log \int e^{-L(\theta') - \frac{\gamma}{2}
    \|\theta - \theta'\|^2} d\theta'` less its value for a constant loss. The authors' code
    uses :math:`1/\gamma` for the standard deviation and the wrong sign of the loss; this
    does not.

    Args:
      loss_fn, params, key, num_samples, data, weight_fn: see :func:`low_pass`.
      gamma: inverse variance of the noise, > 0.

    Returns:
      An :class:`~flatopt.curvature.Estimate`; its error by the delta method.

    References:
      Chaudhari et al., `Entropy-SGD: Biasing Gradient Descent into Wide Valleys
      <https://arxiv.org/abs/1611.01838>`_, ICLR 2017, equation 2.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import sharpness
      >>> found = sharpness.local_entropy(
      ...     lambda p: jnp.sum(p ** 2), jnp.zeros(1), jax.random.key(0), gamma=2.0,
      ...     num_samples=4000)
      >>> abs(float(found.value) - 0.3466) < 0.03  # log(1 + 2 / 2) / 2
      True
    """
    _check_positive(gamma, "gamma")
    _checks.check_num_samples(num_samples)
    operator = curvature.hessian(loss_fn, params, data, weight_fn=weight_fn)
    return _entropy(_rises(operator, key, gamma**-0.5, num_samples, ISOTROPIC))


def _entropy(rises):
    count = len(rises)
    value = math.log(count) - jax.scipy.special.logsumexp(-rises)
    weights = jnp.exp(value - rises)  # their mean is 1
    error = jnp.std(weights, ddof=1) / count**0.5 if count > 1 else jnp.inf
    return Estimate(value, error, count)


def local_entropy_gradient(
    loss_fn: Callable[..., Any],
    params: Any,
    key: jax.Array,
    data: Any,
    *,
    gamma: float = 1e-4,
    num_steps: int = 20,
    inner_learning_rate: float = 0.1,
    noise_scale: float = 1e-4,
    decay: float = 0.75,
) -> float:
    r"""Mean over batches of :math:`\|\theta - \mu\|`, :math:`\mu` from Entropy-SGD's loop.

    Args:
      loss_fn: ``loss_fn(params, batch)``.
      params: the parameters.
      key: a JAX random key.
      data: one batch, or a re-iterable of batches.
      gamma, num_steps, inner_learning_rate, noise_scale, decay: see
        :func:`flatopt.entropy_sgd_gradients`.

    Returns:
      The mean norm.

    References:
      Bisla, Wang, Choromanska, `Low-Pass Filtering SGD for Recovering Flat Optima
      <https://arxiv.org/abs/2201.08025>`_, AISTATS 2022, section 4.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import sharpness
      >>> found = sharpness.local_entropy_gradient(
      ...     lambda p, batch: jnp.mean((batch @ p) ** 2), jnp.zeros(2),
      ...     jax.random.key(0), jnp.eye(2))
      >>> found < 1e-3  # at a minimum only the noise moves the walk
      True
    """
    operator = curvature.hessian(loss_fn, params, data)
    if operator.batch is None and operator.stream is None:
        raise ValueError("data must be a batch or batches, got None; give the data.")
    settings = gamma, num_steps, inner_learning_rate, noise_scale, decay
    total = count = 0
    batches = [operator.batch] if operator.stream is None else operator.stream.batches
    for count, batch in enumerate(batches, 1):
        batch = jax.tree.map(jnp.asarray, batch)
        step_key = _random.fold_in(key, count)
        total += _walk_length(loss_fn, settings, operator.like, batch, step_key)
    if not count:
        raise ValueError("data must hold batches, got none; give a loader that yields.")
    return float(total / count)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _walk_length(loss_fn, settings, params, batch, key):
    tx = entropy_sgd_gradients(*settings, key=key)
    value_fn = lambda params, batch: loss_fn(params, batch)  # noqa: E731
    grads, _ = tx.update(None, tx.init(params), params, value_fn=value_fn, batch=batch)
    return jnp.sqrt(_blocks.dot(grads, grads))


# Worst cases


def epsilon_sharpness(
    loss_fn: Callable[..., Any],
    params: Any,
    *,
    epsilon: float = 0.1,
    data: Any = None,
    weight_fn: Callable[[Any], Any] | None = None,
) -> float:
    r"""One over the distance along the gradient at which the loss has risen by epsilon.

    Args:
      loss_fn, params, data, weight_fn: see :func:`low_pass`.
      epsilon: rise of the loss, > 0.

    Returns:
      The inverse distance; 0 where no distance up to 1e6 raises the loss by epsilon.

    Raises:
      ValueError: where the gradient is zero: the direction is then undefined.

    References:
      Bisla, Wang, Choromanska, `Low-Pass Filtering SGD for Recovering Flat Optima
      <https://arxiv.org/abs/2201.08025>`_, AISTATS 2022, section 4, after Keskar et al.,
      `On Large-Batch Training for Deep Learning <https://arxiv.org/abs/1609.04836>`_.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import sharpness
      >>> round(sharpness.epsilon_sharpness(lambda p: p[0], jnp.zeros(2), epsilon=0.5), 3)
      2.0
    """
    _check_positive(epsilon, "epsilon")
    operator = curvature.hessian(loss_fn, params, data, weight_fn=weight_fn)
    found = _epsilon_sharpness(operator, epsilon)
    if math.isnan(found):
        raise ValueError(
            "params must have a gradient to follow, got one of norm 0 or not a number; at an "
            "exact minimum use worst_case or max_eigenvalue."
        )
    return found


def _epsilon_sharpness(operator, epsilon):
    """As :func:`epsilon_sharpness`; not a number where there is no gradient to follow."""
    value, grads = _passes.value_and_gradient(operator)
    length = float(jnp.sqrt(_blocks.dot(grads, grads)))
    if not length > 0:
        return math.nan
    direction = jax.tree.map(lambda g: g / length, grads)

    def rise(distance):
        steps = jnp.full(1, distance, jnp.float32)
        moved = _passes.losses(operator, _passes.along, steps, direction)
        return float(moved[0] - value)

    distance = _solve(rise, epsilon, 1e-3, 1e6)
    return 1 / distance if math.isfinite(distance) else 0.0


NORMS = ("l2", "linf")


def worst_case(
    loss_fn: Callable[..., Any],
    params: Any,
    key: jax.Array,
    *,
    rho: float,
    norm: str = "l2",
    adaptive: bool = False,
    num_steps: int = 20,
    data: Any = None,
    weight_fn: Callable[[Any], Any] | None = None,
) -> float:
    r"""The largest rise of the loss found in a ball.

    .. math:: \max_{\|T^{-1} \epsilon\| \le \rho} L(\theta + \epsilon) - L(\theta), \qquad
        T = 1 \text{ or } |\theta|

    Ascent from a random point of the ball, each step to the point of the ball farthest
    along the gradient; the best point counts, the parameters themselves included. A lower
    bound of the maximum; for a convex quadratic it converges to it.

    Args:
      loss_fn, params, key, data, weight_fn: see :func:`low_pass`.
      rho: radius of the ball, > 0.
      norm: "l2" or "linf".
      adaptive: measure the ball in units of each parameter's magnitude: unchanged when
        layers are rescaled.
      num_steps: number of ascent steps, a gradient of all data each, and one more.

    Returns:
      The rise, at least 0.

    Raises:
      ValueError: where the loss in the ball is not a number.

    References:
      Foret et al., `Sharpness-Aware Minimization <https://arxiv.org/abs/2010.01412>`_;
      Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_ (adaptive); Andriushchenko et
      al., `A Modern Look <https://arxiv.org/abs/2302.07011>`_.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import sharpness
      >>> found = sharpness.worst_case(
      ...     lambda p: 3 * p[0] ** 2 + p[1] ** 2, jnp.zeros(2), jax.random.key(0), rho=0.1)
      >>> round(found, 4)
      0.03
    """
    _check_positive(rho, "rho")
    _checks.check_num_samples(num_steps, "num_steps")
    if norm not in NORMS:
        raise ValueError(f"norm must be 'l2' or 'linf', got {norm!r}.")
    operator = curvature.hessian(loss_fn, params, data, weight_fn=weight_fn)
    params = operator.like
    units = jax.tree.map(
        lambda p: (
            jnp.abs(_trees.widen(p)) if adaptive else jnp.ones_like(_trees.widen(p))
        ),
        params,
    )
    direction = _random_direction(key, params)
    base, best = None, 0.0
    for _ in range(num_steps + 1):
        moved = _farthest(params, units, direction, jnp.float32(rho), norm == "l2")
        value, grads = _passes.value_and_gradient(_passes.at(operator, moved))
        base = float(_passes.base_loss(operator)) if base is None else base
        if math.isnan(float(value) - base):
            raise ValueError(
                f"the loss is not a number within rho={rho} of the parameters; choose a "
                "smaller radius."
            )
        best = max(best, float(value) - base)
        direction = _times(units, grads)
    return best


@jax.jit
def _random_direction(key, params):
    return _trees.bind(ISOTROPIC, key, params)(key)


@jax.jit
def _times(tree, other):
    return jax.tree.map(jnp.multiply, tree, other)


@functools.partial(jax.jit, static_argnums=4)
def _farthest(params, units, direction, rho, is_l2):
    if is_l2:
        length = jnp.sqrt(_blocks.dot(direction, direction))
        safe = jnp.where(length == 0, 1.0, length)
        step = jax.tree.map(lambda d: d / safe.astype(d.dtype), direction)
    else:
        step = jax.tree.map(jnp.sign, direction)
    return jax.tree.map(
        lambda p, t, s: _trees.widen(p) + rho.astype(t.dtype) * t * s.astype(t.dtype),
        params,
        units,
        step,
    )


def m_sharpness(
    loss_fn: Callable[..., Any],
    params: Any,
    key: jax.Array,
    batches: Any,
    *,
    rho: float,
    norm: str = "l2",
    adaptive: bool = False,
    num_steps: int = 20,
) -> Estimate:
    r"""The mean over batches of the worst case of each batch: SAM's m-sharpness.

    Args:
      loss_fn: ``loss_fn(params, batch)``.
      params: the parameters.
      key: a JAX random key.
      batches: a re-iterable of batches of m examples.
      rho, norm, adaptive, num_steps: see :func:`worst_case`.

    Returns:
      An :class:`~flatopt.curvature.Estimate` over batches.

    References:
      Foret et al., `Sharpness-Aware Minimization <https://arxiv.org/abs/2010.01412>`_.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import sharpness
      >>> found = sharpness.m_sharpness(
      ...     lambda p, batch: jnp.mean(batch) * jnp.sum(p ** 2), jnp.zeros(2),
      ...     jax.random.key(0), [jnp.ones(3), 3 * jnp.ones(3)], rho=0.1)
      >>> round(float(found.value), 4)
      0.02
    """
    found = [
        worst_case(
            loss_fn,
            params,
            key,
            rho=rho,
            norm=norm,
            adaptive=adaptive,
            num_steps=num_steps,
            data=[batch] if _streams.is_stream(batch) else batch,
        )
        for batch in batches
    ]
    if not found:
        raise ValueError("batches must hold batches, got none; give a list of batches.")
    return _mean(jnp.asarray(found))


# Measures of the curvature


def fisher_rao_hessian(
    loss_fn: Callable[..., Any],
    params: Any,
    *,
    data: Any = None,
    weight_fn: Callable[[Any], Any] | None = None,
) -> float:
    r"""The Fisher-Rao norm :math:`\theta^\top H \theta` with the Hessian, as in the paper.

    Args:
      loss_fn, params, data, weight_fn: see :func:`low_pass`.

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
    operator = curvature.hessian(loss_fn, params, data, weight_fn=weight_fn)
    return float(operator.quadratic_form(operator.like))


def fisher_rao_gauss_newton(
    model_fn: Callable[..., Any],
    loss_fn: Callable[..., Any],
    params: Any,
    data: Any,
    *,
    weight_fn: Callable[[Any], Any] | None = None,
) -> float:
    r"""The Fisher-Rao norm with the Gauss-Newton matrix: the Fisher for cross-entropy.

    Args:
      model_fn, loss_fn, params, data, weight_fn: see :func:`flatopt.curvature.gauss_newton`.

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
        model_fn, loss_fn, params, data, weight_fn=weight_fn
    )
    return float(operator.quadratic_form(operator.like))


def fisher_rao_empirical(
    loss_fn: Callable[..., Any],
    params: Any,
    data: Any,
    *,
    weight_fn: Callable[[Any], Any] | None = None,
) -> float:
    r"""The Fisher-Rao norm with the empirical Fisher matrix.

    Args:
      loss_fn, params, data, weight_fn: see :func:`flatopt.curvature.empirical_fisher`.

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
    operator = curvature.empirical_fisher(loss_fn, params, data, weight_fn=weight_fn)
    return float(operator.quadratic_form(operator.like))


def shannon_entropy(model_fn: Callable[..., Any], params: Any, inputs: Any) -> float:
    r"""Minus the mean entropy of the predicted classes: larger is more certain.

    The paper tabulates the mean entropy itself; the sign is turned here so that larger
    means sharper, as for all measures.

    Args:
      model_fn: ``model_fn(params, inputs) -> logits``, classes last.
      params: the parameters.
      inputs: one batch of inputs, or a list of batches.

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
    total, count = 0.0, 0
    for batch in inputs if _streams.is_stream(inputs) else [inputs]:
        batch = jax.tree.map(jnp.asarray, batch)
        size = _streams.batch_size(batch)
        total, count = total + size * _certainty(model_fn, params, batch), count + size
    if not count:
        raise ValueError(
            "inputs must hold examples, got none; give at least one batch."
        )
    return float(total / count)


@functools.partial(jax.jit, static_argnums=0)
def _certainty(model_fn, params, batch):
    logs = jax.nn.log_softmax(
        jnp.asarray(model_fn(params, batch), jnp.float32), axis=-1
    )
    return jnp.mean(jnp.sum(jnp.exp(logs) * logs, axis=-1))


def frobenius_norm(
    loss_fn: Callable[..., Any],
    params: Any,
    key: jax.Array,
    *,
    num_probes: int = 32,
    data: Any = None,
    weight_fn: Callable[[Any], Any] | None = None,
) -> Estimate:
    """The Frobenius norm of the Hessian.

    Args:
      loss_fn, params, data, weight_fn: see :func:`low_pass`.
      key: a JAX random key.
      num_probes: see :func:`flatopt.curvature.probe`.

    Returns:
      An :class:`~flatopt.curvature.Estimate`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import sharpness
      >>> found = sharpness.frobenius_norm(
      ...     lambda p: jnp.sum(p ** 2), jnp.ones(4), jax.random.key(0))
      >>> round(float(found.value), 3)
      4.0
    """
    operator = curvature.hessian(loss_fn, params, data, weight_fn=weight_fn)
    return curvature.probe(operator, key, num_probes).frobenius_norm


def trace(
    loss_fn: Callable[..., Any],
    params: Any,
    key: jax.Array,
    *,
    num_probes: int = 32,
    data: Any = None,
    weight_fn: Callable[[Any], Any] | None = None,
) -> Estimate:
    """The trace of the Hessian. The paper's code sums 100 Ritz values; this does not.

    Args:
      loss_fn, params, data, weight_fn: see :func:`low_pass`.
      key: a JAX random key.
      num_probes: see :func:`flatopt.curvature.trace`.

    Returns:
      An :class:`~flatopt.curvature.Estimate`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import sharpness
      >>> found = sharpness.trace(lambda p: jnp.sum(p ** 2), jnp.ones(4), jax.random.key(0))
      >>> round(float(found.value), 3)
      8.0
    """
    operator = curvature.hessian(loss_fn, params, data, weight_fn=weight_fn)
    return curvature.trace(operator, key, num_probes)


def max_eigenvalue(
    loss_fn: Callable[..., Any],
    params: Any,
    key: jax.Array,
    *,
    data: Any = None,
    weight_fn: Callable[[Any], Any] | None = None,
) -> curvature.Eigenpairs:
    """The largest eigenvalue of the Hessian, with its vector and bound.

    Args:
      loss_fn, params, data, weight_fn: see :func:`low_pass`.
      key: a JAX random key.

    Returns:
      :class:`~flatopt.curvature.Eigenpairs` of one.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import sharpness
      >>> found = sharpness.max_eigenvalue(
      ...     lambda p: 3 * p[0] ** 2 + p[1] ** 2, jnp.ones(2), jax.random.key(0))
      >>> round(float(found.values[0]), 3)
      6.0
    """
    operator = curvature.hessian(loss_fn, params, data, weight_fn=weight_fn)
    return curvature.eigenpairs(operator, key)


def effective_dimension(
    loss_fn: Callable[..., Any],
    params: Any,
    key: jax.Array,
    *,
    alpha: float = 1.0,
    num_draws: int = 4,
    num_steps: int = 64,
    data: Any = None,
    weight_fn: Callable[[Any], Any] | None = None,
) -> Estimate:
    r"""The number of directions that the loss determines.

    .. math:: \sum_i \frac{\lambda_i^+}{\lambda_i^+ + \alpha}

    by stochastic Lanczos quadrature. Negative eigenvalues count as zero; in the paper's
    code those near :math:`-\alpha` make it blow up.

    Args:
      loss_fn, params, data, weight_fn: see :func:`low_pass`.
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
    _check_positive(alpha, "alpha")
    operator = curvature.hessian(loss_fn, params, data, weight_fn=weight_fn)
    density = curvature.spectral_density(
        operator, key, num_draws=num_draws, num_steps=num_steps
    )
    positive = np.maximum(density.nodes, 0)
    shares = (density.weights * positive / (positive + alpha)).sum(axis=1)
    return _mean(jnp.asarray(_blocks.size(operator.like) * shares))


# Everything at once


class Report(NamedTuple):
    """All measures of one network, from :func:`report`; ``print`` shows a table.

    Attributes:
      values: the measures by name: numbers, and Estimates with their errors.

    Example:
      >>> from flatopt import sharpness
      >>> print(sharpness.Report({"trace": 2.0}))
      measure   value  standard error
      trace     2
    """

    values: dict[str, Any]

    def __str__(self):
        width = max(8, *(len(name) for name in self.values))
        lines = [f"{'measure':{width}}  value  standard error"]
        for name, value in self.values.items():
            if isinstance(value, Estimate):
                value, error = (
                    float(value.value),
                    f"  {float(value.standard_error):.2g}",
                )
            else:
                error = ""
            lines.append(f"{name:{width}}  {value:.4g}{error}")
        return "\n".join(lines)


def report(
    loss_fn: Callable[..., Any],
    params: Any,
    key: jax.Array,
    data: Any,
    *,
    model_fn: Callable[..., Any] | None = None,
    inputs: Any = None,
    initial_params: Any = None,
    sigma: float = 0.01,
    rho: float = 0.05,
    weight_fn: Callable[[Any], Any] | None = None,
) -> Report:
    """All measures at one point, sharing what they can.

    One probe gives the trace and the Frobenius norm. Cost: some 1,500 losses, gradients and
    products of all data. At a zero gradient the epsilon sharpness is not a number.

    Args:
      loss_fn, params, key, data, weight_fn: see :func:`low_pass`.
      model_fn: for the Shannon entropy: ``model_fn(params, inputs) -> logits``.
      inputs: for the Shannon entropy.
      initial_params: for the PAC-Bayes measure.
      sigma: scale of the low-pass measure.
      rho: radius of the worst and average cases.

    Returns:
      A :class:`Report`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import sharpness
      >>> found = sharpness.report(
      ...     lambda p, batch: jnp.mean((batch @ p) ** 2), jnp.ones(2), jax.random.key(0),
      ...     jnp.eye(2))
      >>> round(float(found.values["trace"].value), 3)
      2.0
    """
    if (model_fn is None) != (inputs is None):
        raise ValueError(
            "model_fn and inputs must be given together, got one; both are for the Shannon "
            "entropy."
        )
    options = {"data": data, "weight_fn": weight_fn}
    operator = curvature.hessian(loss_fn, params, data, weight_fn=weight_fn)
    keys = [_random.fold_in(key, index) for index in range(9)]
    base = _passes.base_loss(operator)
    probe = curvature.probe(operator, keys[0])
    top = curvature.eigenpairs(operator, keys[1])
    values = {
        "loss": float(base),
        "trace": probe.trace,
        "frobenius_norm": probe.frobenius_norm,
        "max_eigenvalue": float(top.values[0]),
        "max_eigenvalue_bound": float(top.residuals[0]),
        "effective_dimension": effective_dimension(loss_fn, params, keys[2], **options),
        "fisher_rao_hessian": float(operator.quadratic_form(operator.like)),
        "fisher_rao_empirical": fisher_rao_empirical(
            loss_fn, params, data, weight_fn=weight_fn
        ),
        "low_pass": _mean(_rises(operator, keys[3], sigma, 100, ISOTROPIC, base)),
        "local_entropy": _entropy(_rises(operator, keys[4], 0.1, 100, ISOTROPIC, base)),
        "local_entropy_gradient": local_entropy_gradient(
            loss_fn, params, keys[5], data
        ),
        "epsilon_sharpness": _epsilon_sharpness(operator, 0.1),
        "worst_case": worst_case(loss_fn, params, keys[6], rho=rho, **options),
        "worst_case_adaptive": worst_case(
            loss_fn, params, keys[6], rho=rho, adaptive=True, **options
        ),
        "average_case_adaptive": _mean(
            _rises(operator, keys[7], rho, 100, ELEMENTWISE, base)
        ),
    }
    if initial_params is not None:
        values["pac_bayes"] = pac_bayes(
            loss_fn, params, keys[8], initial_params=initial_params, **options
        ).value
    if model_fn is not None:
        values["shannon_entropy"] = shannon_entropy(model_fn, params, inputs)
    return Report(values)


def _check_positive(value, name):
    _checks.check_scale(value, name)
    if not value > 0:
        raise ValueError(f"{name} must be greater than 0, got {value}.")


def _count_examples(operator):
    if operator.batch is not None:
        return _streams.batch_size(operator.batch)
    if operator.stream is None:
        raise ValueError("num_examples must be given where there is no data.")
    return sum(
        _streams.batch_size(jax.tree.map(jnp.asarray, batch))
        for batch in operator.stream.batches
    )


def _solve(rise, target, start, largest):
    """The scale at which a rise reaches a target: bracket, then bisect to 1e-4.

    What is not a number counts as risen.
    """
    low, high = 0.0, start
    while rise(high) < target:
        low, high = high, 5 * high
        if high > largest:
            return math.inf
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        if rise(middle) < target:
            low = middle
        else:
            high = middle
    return (low + high) / 2

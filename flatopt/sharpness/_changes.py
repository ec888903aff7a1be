"""What a network keeps when its weights are changed after training."""

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flatopt import kernels
from flatopt._core import binding, checks, filters, loops, parts, trees
from flatopt._core.estimates import Estimate
from flatopt._core.risk import Risk, check_loss, check_params
from flatopt._core.types import KernelFn, LossFn, Mask, ParamsT, WeightFn
from flatopt.curvature._draws import probe_keys


def perturbed_accuracy(
    metric_fn: LossFn,
    params: Any,
    key: jax.Array,
    kernel: KernelFn,
    scales: Any,
    *,
    num_samples: int = 32,
    data: Any = None,
    weight_fn: WeightFn | None = None,
    mask: Mask = None,
    constants: Any = None,
) -> Estimate:
    r"""Measure the mean accuracy under random perturbation, a curve over its scale.

    .. math:: s \mapsto E_U[A(\theta + s U)]

    Accuracy, or any other metric that is a mean over examples. All scales see the same
    draws, so that the curve is smooth; with one key two networks of the same shapes see the
    same unit noise, and are compared in pairs.

    Cost: ``num_samples`` forward passes a scale.

    Args:
      metric_fn: ``metric_fn(params)``, or ``metric_fn(params, batch)`` with data: the mean
        over the examples of a batch, a floating scalar.
      params: the parameters.
      key: a JAX random key.
      kernel: the noise, such as :func:`flatopt.kernels.filterwise`. Make it once: code is
        compiled for each kernel, as for each metric.
      scales: scales of the noise, each at least 0: a number, or a sequence of them.
      num_samples: number of perturbations.
      data: one batch, or a re-iterable of batches.
      weight_fn: weight of a batch; default: its number of examples.
      mask: the leaves that get noise, in the forms of :func:`flatopt.curvature.hessian`.
      constants: arrays that ``metric_fn`` takes last and that get no noise, such as running
        statistics; networks that differ in them share compiled code.

    Returns:
      An :class:`~flatopt.curvature.Estimate`, its value and error shaped as ``scales``.
      The error is that of the draws of noise, not of the examples.

    Raises:
      ValueError: if a scale is negative or not finite, or the metric is not a number
        somewhere.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import kernels, sharpness
      >>> def accuracy(params, batch):
      ...     inputs, labels = batch
      ...     return jnp.mean((inputs @ params > 0) == labels)
      >>> data = jnp.eye(2), jnp.array([True, True])
      >>> found = sharpness.perturbed_accuracy(
      ...     accuracy, jnp.array([1.0, 2.0]), jax.random.key(0), kernels.isotropic(),
      ...     [0.0, 1.0], num_samples=1000, data=data)
      >>> [round(float(x), 1) for x in found.value]  # of the normal: 0.84 and 0.98
      [1.0, 0.9]
    """
    scales = _check_scales(scales)
    checks.check_count(num_samples)
    checks.check_random_key(key)
    checks.check_kernel(kernel)
    check_loss(metric_fn, data, constants, "metric_fn")
    risk = Risk.of(_Metric(metric_fn), params, data, weight_fn, mask, constants)
    keys = probe_keys(key, 0, num_samples)
    curve = _Curve(risk.loss_fn, kernel)
    found = risk.mean(curve, keys, scales.reshape(-1), check=False)
    _check_curve(found, scales)
    return Estimate.of(found.reshape(num_samples, *scales.shape))


@dataclasses.dataclass(frozen=True)
class _Metric:
    metric_fn: Callable

    def __call__(self, *arguments):
        return checks.check_value(self.metric_fn(*arguments), "metric_fn")


@dataclasses.dataclass(frozen=True)
class _Curve:
    """The metric at each scale of each draw, shape (draws, scales)."""

    metric_fn: Callable
    kernel: KernelFn

    def __call__(self, params, batch, keys, scales):
        data = () if batch is None else (batch,)

        def metric(params):
            return trees.widen(self.metric_fn(params, *data))

        def of_draw(key):
            # Drawn once for all scales.
            noise = binding.bind(self.kernel, key, params, parts.whole_of(batch))(key)
            return loops.map_rows(
                lambda scale: metric(
                    jax.tree.map(
                        lambda p, u: trees.widen(p) + scale.astype(u.dtype) * u,
                        params,
                        noise,
                    )
                ),
                scales,
            )

        return metric(params), loops.map_rows(of_draw, keys)


def _check_scales(scales):
    advice = "give a number of at least 0, or a sequence of them."
    try:
        found = jnp.asarray(scales, jnp.float32)
    except (TypeError, ValueError) as error:
        raise TypeError(f"scales must be numbers, got {scales!r}; {advice}") from error
    if found.ndim > 1 or not found.size:
        raise ValueError(
            f"scales must be one number or a sequence, got shape {found.shape}; {advice}"
        )
    if not isinstance(found, jax.core.Tracer) and not np.all(
        np.isfinite(found) & (np.asarray(found) >= 0)
    ):
        raise ValueError(f"scales must be finite and >= 0, got {scales}; {advice}")
    return found


def _check_curve(found, scales):
    """Reject what is not a number; traced values pass unseen."""
    if isinstance(found, jax.core.Tracer):
        return
    lost = np.isnan(found).any(axis=0)
    if lost.any():
        first = np.asarray(scales).reshape(-1)[lost].min()
        raise ValueError(
            f"perturbed_accuracy met a metric that is not a number, from scale {first:g} "
            "on; give smaller scales, or a metric that is a number there."
        )


def round_filters(
    params: ParamsT, bits: int, *, filter_axes: kernels.FilterAxes = None
) -> ParamsT:
    r"""Round each filter to a symmetric grid of so many bits, as in quantization.

    .. math:: w \mapsto s \operatorname{round}(w / s), \qquad
        s = \frac{\max |w_f|}{2^{b - 1} - 1}

    Each output channel has its own grid of :math:`2^b - 1` values, which ends at its largest
    weight. Leaves of at most one axis, and those named ``bias`` or ``scale``, stay as they
    are, as they do in common number formats. The result is what the rounded network computes
    with, in the dtype of the parameters.

    Args:
      params: the parameters.
      bits: b, at least 2.
      filter_axes: the axes of a leaf that index its filters, see
        :func:`flatopt.kernels.filterwise`.

    Returns:
      The rounded parameters.

    Raises:
      ValueError: if ``bits`` is not a whole number of at least 2.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import sharpness
      >>> params = {"kernel": jnp.array([[3.0, 5.0], [-1.3, 6.0]]), "bias": jnp.ones(2)}
      >>> sharpness.round_filters(params, 3)["kernel"]  # in steps of 1 and of 2
      Array([[ 3.,  4.],
             [-1.,  6.]], dtype=float32)
    """
    if isinstance(bits, bool) or not isinstance(bits, numbers.Integral) or bits < 2:
        raise ValueError(
            f"bits must be an int of at least 2, got {bits!r}; one bit is kept for the sign."
        )
    params = check_params(params)
    axes_of = filters.filter_axes_function(filter_axes, params)
    levels = 2.0 ** (int(bits) - 1) - 1

    def rounded(path, leaf):
        name = trees.path_name(path)
        if leaf.ndim <= 1 or name.rpartition("/")[2] in ("bias", "scale"):
            return leaf
        axes = filters.check_axes(axes_of(name, leaf), name, leaf)
        others = tuple(a for a in range(leaf.ndim) if a not in axes)
        wide = trees.widen(leaf)
        largest = jnp.max(jnp.abs(wide), axis=others, keepdims=True, initial=0.0)
        step = jnp.where(largest == 0, 1.0, largest) / levels
        return (step * jnp.round(wide / step)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(rounded, params)

"""The curvature operators."""

from typing import Any

from flatopt._core import checks, parts, streams
from flatopt._core.risk import Risk, check_loss, check_model
from flatopt._core.types import LossFn, Mask, ModelFn, WeightFn
from flatopt.curvature import _differences, _kinds
from flatopt.curvature._operator import Operator


def hessian(
    loss_fn: LossFn,
    params: Any,
    data: Any = None,
    *,
    weight_fn: WeightFn | None = None,
    mask: Mask = None,
    constants: Any = None,
) -> Operator:
    r"""The Hessian of a mean loss.

    Define ``loss_fn`` once and pass the data as ``data``: a new function compiles again, and
    what it closes over stays in memory.

    Products by forward over reverse mode, linearized once a batch for all vectors;
    quadratic forms by forward mode alone. Where a ``custom_vjp`` in the loss refuses
    forward mode, reverse mode does both; where it refuses that too, see
    :func:`finite_difference_hessian`.

    Args:
      loss_fn: ``loss_fn(params)``, or ``loss_fn(params, batch)`` that returns the mean
        loss of the batch.
      params: the parameters, floating.
      data: None, one batch, or a re-iterable of batches.
      weight_fn: what the mean of a batch divides by; default: its number of examples.
        For a mean over tokens, ``lambda batch: batch["mask"].sum()``.
      mask: the leaves whose block of the matrix is meant; the others are constant. A tree
        prefix of bools, a function of the parameters that returns one, or a pattern of
        paths such as ``"encoder/*/kernel"`` or ``"layer_3"``, where ``*`` stands for
        anything. Vectors then have None in place of the others. None: all leaves.
      constants: what the loss needs and is not differentiated, such as running statistics:
        a tree of arrays, given to ``loss_fn`` last, as ``loss_fn(params, batch,
        constants)``. Networks of one shape that differ in it share compiled code.

    Returns:
      An :class:`Operator`.

    Raises:
      TypeError, ValueError: for integer parameters, a loss that is no scalar, a mask that
        names no leaf or has another structure, constants that are no arrays, an iterator
        that ends after one pass, and, when used, for data that is empty or changes.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import curvature
      >>> def loss_fn(params, batch):
      ...     inputs, targets = batch
      ...     return jnp.mean((inputs @ params - targets) ** 2) / 2
      >>> batches = [(jnp.eye(2), jnp.ones(2)), (2 * jnp.ones((1, 2)), jnp.ones(1))]
      >>> curvature.hessian(loss_fn, jnp.zeros(2), batches).dense()
      Array([[1.6666666, 1.3333334],
             [1.3333334, 1.6666666]], dtype=float32)
    """
    check_loss(loss_fn, data, constants)
    part = parts.choose(params, mask, constants)
    return _operator(_kinds.Hessian(part.wrap(loss_fn)), part, data, weight_fn)


def finite_difference_hessian(
    loss_fn: LossFn,
    params: Any,
    data: Any = None,
    *,
    weight_fn: WeightFn | None = None,
    mask: Mask = None,
    constants: Any = None,
) -> Operator:
    r"""The Hessian of a mean loss by differences of gradients: no second derivative.

    .. math:: H v \approx \frac{\nabla L(\theta + h v) - \nabla L(\theta - h v)}{2 h}

    For a loss with a kernel whose backward pass cannot be differentiated, or one whose
    products do not fit into memory. Where :func:`hessian` works, it is nearer.

    The entries of :math:`h v` are about :math:`0.25\, \epsilon^{1/3}` of a typical parameter,
    with :math:`\epsilon` of the narrowest dtype that the gradient goes through: errors of
    rounding and of the difference are then about equal. Parameters and data are given in
    float32 or wider, where the loss takes them so, and products of matrices have the
    highest precision. Where the gradient goes through bfloat16 or float16, differences at
    1/8 to 4 times that step are fitted by :math:`H v + c\, h^2`; the largest steps are left
    out where they differ from the rest by more than rounding explains (Lepskii's rule).

    :meth:`Operator.product_error` estimates the error of a product, some 1e-4 of it in
    float32, 0.03 to 0.2 where a smooth network computes in bfloat16. Bounds of eigenpairs
    contain it; standard errors of :func:`trace` and :func:`probe` do not. Ask for it first

    - where the network has kinks, such as those of ReLU: the gradient jumps there, the
      Hessian does not see it, and a product may be off by its own length in any dtype;
    - where the numbers of one leaf are far smaller than those of another: one step must
      suit both, and a leaf 1,000 times as small costs some 1 % of the product, one 100,000
      times as small most of it. Leaves of zeros do no harm.

    Cost: 2 gradients a product, and on streamed data the loss; 12 and one for all products
    of a batch where the gradient goes through fewer digits than float32. Memory: that of
    one gradient, and in the latter case of six vectors; where parameters and data are
    narrower, that of one in float32.

    Args:
      loss_fn, params, data, weight_fn, mask, constants: as in :func:`hessian`.

    Returns:
      An :class:`Operator`.

    Raises:
      TypeError, ValueError: as :func:`hessian`.

    References:
      Pearlmutter, `Fast Exact Multiplication by the Hessian
      <https://doi.org/10.1162/neco.1994.6.1.147>`_, Neural Computation 1994; Lepskii, `On a
      Problem of Adaptive Estimation in Gaussian White Noise
      <https://doi.org/10.1137/1135065>`_, Theory of Probability & Its Applications 1991.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import curvature
      >>> operator = curvature.finite_difference_hessian(
      ...     lambda p: jnp.sum(p ** 3), jnp.array([1.0, 2.0]))
      >>> operator.matvec(jnp.array([1.0, 1.0])).round(2)
      Array([ 6., 12.], dtype=float32)
    """
    check_loss(loss_fn, data, constants)
    part = parts.choose(params, mask, constants)
    kind = _differences.FiniteDifferenceHessian(part.wrap(loss_fn))
    return _operator(kind, part, data, weight_fn)


def gauss_newton(
    model_fn: ModelFn,
    loss_fn: LossFn,
    params: Any,
    data: Any,
    *,
    weight_fn: WeightFn | None = None,
    mask: Mask = None,
    constants: Any = None,
) -> Operator:
    r"""The Gauss-Newton part of the Hessian: positive semidefinite for a convex loss.

    .. math:: G = J^\top \nabla^2_{\text{outputs}} L\, J

    Args:
      model_fn: ``model_fn(params, inputs) -> outputs``.
      loss_fn: ``loss_fn(outputs, targets)``, the mean loss of the batch.
      params: the parameters, floating.
      data: one batch ``(inputs, targets)``, or a re-iterable of them.
      weight_fn, mask: as in :func:`hessian`.
      constants: as in :func:`hessian`, given to ``model_fn(params, inputs, constants)``.

    Returns:
      An :class:`Operator`.

    Raises:
      TypeError, ValueError: as :func:`hessian`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import curvature
      >>> operator = curvature.gauss_newton(
      ...     lambda params, inputs: inputs @ params,
      ...     lambda outputs, targets: jnp.mean((outputs - targets) ** 2) / 2,
      ...     jnp.zeros(2), (jnp.eye(2), jnp.ones(2)))
      >>> operator.dense()
      Array([[0.5, 0. ],
             [0. , 0.5]], dtype=float32)
    """
    pair = isinstance(data, tuple) and len(data) == 2
    if data is None or not (pair or streams.is_stream(data)):
        raise ValueError(
            "data must be a pair (inputs, targets) or batches of such pairs, got "
            f"{type(data).__name__}; gauss_newton gives them to model_fn and loss_fn."
        )
    check_model(model_fn, constants)
    checks.check_function(loss_fn, "loss_fn", "loss_fn(outputs, targets)", count=2)
    part = parts.choose(params, mask, constants)
    kind = _kinds.GaussNewton(part.wrap(model_fn), loss_fn)
    return _operator(kind, part, data, weight_fn)


def empirical_fisher(
    loss_fn: LossFn,
    params: Any,
    data: Any,
    *,
    weight_fn: WeightFn | None = None,
    mask: Mask = None,
    constants: Any = None,
) -> Operator:
    r"""The mean over examples of :math:`g_i g_i^\top`, not centered.

    Args:
      loss_fn: ``loss_fn(params, batch)``, the mean loss of a batch; :math:`g_i` is its
        gradient on a batch of the one example.
      params: the parameters, floating.
      data: one batch, or a re-iterable of batches.
      weight_fn: weight of a batch, which must be the sum of its examples' weights.
      mask, constants: as in :func:`hessian`.

    Returns:
      An :class:`Operator`.

    Raises:
      TypeError, ValueError: as :func:`hessian`, and where the loss of a batch is not the
        mean of the losses of its examples, as with BatchNorm in training mode.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import curvature
      >>> def loss_fn(params, batch):
      ...     return jnp.mean(batch @ params)
      >>> curvature.empirical_fisher(loss_fn, jnp.ones(2), 2 * jnp.eye(2)).dense()
      Array([[2., 0.],
             [0., 2.]], dtype=float32)
    """
    return _of_examples(
        _kinds.EmpiricalFisher, loss_fn, params, data, weight_fn, mask, constants
    )


def gradient_covariance(
    loss_fn: LossFn,
    params: Any,
    data: Any,
    *,
    weight_fn: WeightFn | None = None,
    mask: Mask = None,
    constants: Any = None,
) -> Operator:
    r"""The covariance of the examples' gradients: that of SGD's noise at batch size 1.

    .. math:: \Sigma = \frac1n \sum_i g_i g_i^\top - \bar g\, \bar g^\top

    A batch of B examples drawn with replacement has noise :math:`\Sigma / B`, without
    replacement :math:`\Sigma\, (n - B) / (B (n - 1))`.

    Args:
      loss_fn: ``loss_fn(params, batch)``, the mean loss of a batch.
      params: the parameters, floating.
      data: one batch, or a re-iterable of batches.
      weight_fn: weight of a batch, which must be the sum of its examples' weights.
      mask, constants: as in :func:`hessian`.

    Returns:
      An :class:`Operator`.

    Raises:
      TypeError, ValueError: as :func:`hessian`, and where the loss of a batch is not the
        mean of the losses of its examples, as with BatchNorm in training mode.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import curvature
      >>> def loss_fn(params, batch):
      ...     return jnp.mean(batch @ params)
      >>> curvature.gradient_covariance(loss_fn, jnp.ones(2), 2 * jnp.eye(2)).dense()
      Array([[ 1., -1.],
             [-1.,  1.]], dtype=float32)
    """
    return _of_examples(
        _kinds.GradientCovariance, loss_fn, params, data, weight_fn, mask, constants
    )


def _of_examples(make, loss_fn, params, data, weight_fn, mask, constants):
    if data is None:
        raise ValueError(
            "data must be a batch or batches, got None; the gradients of single examples "
            "need examples."
        )
    check_loss(loss_fn, data, constants)
    checks.check_weight_fn(weight_fn)
    part = parts.choose(params, mask, constants)
    return _operator(make(part.wrap(loss_fn), weight_fn), part, data, weight_fn)


def _operator(kind, part, data, weight_fn):
    return Operator(kind, Risk.of_part(kind.batch_loss, part, data, weight_fn))

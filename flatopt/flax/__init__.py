"""Smoothed gradients of Flax NNX models: BatchNorm, dropout, filter axes.

Needs the extra ``flatopt[flax]``. Flax Linen needs nothing of this module: its
models are functions of a parameter tree, so use :func:`flatopt.smooth_value_and_grad`
or a chain as they are (see the guide for its TrainState).
"""

try:
    from flax import nnx as _nnx  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        "flatopt.flax needs Flax, which is not installed; run "
        "pip install 'flatopt[flax]'."
    ) from error

from flatopt.flax._axes import filter_axes
from flatopt.flax._functional import functional
from flatopt.flax._statistics import update_batch_stats
from flatopt.flax._training import update, value_and_grad

__all__ = [
    "filter_axes",
    "functional",
    "update",
    "update_batch_stats",
    "value_and_grad",
]

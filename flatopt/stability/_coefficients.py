"""The coefficients of an optimizer that is linear near a minimum.

Where the gradient is ``H z[0]``, the distance to the minimum and the slots of such an
optimizer follow ``z' = A z + b H z[0]``, with the same A and b at each coordinate but for
the factor by which adaptive methods multiply the gradient: the preconditioner.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import linear, risk
from flatopt._core.types import Optimizer, ParamsT
from flatopt.stability import _slots
from flatopt.stability._reading import RATES, reader
from flatopt.stability._shared import ADVICE, Coefficients

WORDS = {  # of optax's links; "" for those that go without saying
    "trace": "momentum",
    "ema": "a moving average",
    "add_decayed_weights": "weight decay",
    "scale_by_adam": "Adam",
    "scale_by_rms": "RMSprop",
    "scale_by_rss": "AdaGrad",
    "clip_by_global_norm": "clipping",
    "identity": "",
    "scale": "",
    "scale_by_learning_rate": "",
    "scale_by_schedule": "",
}


class Chain(NamedTuple):
    """An optimizer's coefficients, as functions of the rate.

    Attributes:
      parts: coefficients at rate 0 and their slopes, or None where a rate enters in
        another way.
      read: ``read(rate)``, from the chain itself.
    """

    parts: tuple[Coefficients, Coefficients] | None
    read: Any

    def at(self, rate):
        """The :class:`Coefficients` at a rate."""
        if self.parts is None:
            return self.read(rate)
        start, slope = self.parts
        return Coefficients(*(a + rate * b for a, b in zip(start, slope, strict=True)))


def describe(optimizer):
    """A name for an optimizer: its function's, or those of its links."""
    if optimizer is None:
        return "SGD"
    name = getattr(optimizer, "__name__", "<lambda>")
    if name != "<lambda>":
        return name
    links = [name for name, _ in _slots.parts(_slots.make(optimizer, RATES[0]))]
    shown = [WORDS.get(name, name.removeprefix("scale_by_")) for name in links]
    shown = [word for word in shown if word]
    if not any(
        name.startswith("scale_by_") and WORDS.get(name) != "" for name in links
    ):
        shown = ["SGD", *shown]
    return " with ".join([shown[0], ", ".join(shown[1:])] if shown[1:] else shown)


def plain():
    """The chain of plain gradient steps."""
    start = Coefficients(np.ones((1, 1)), np.zeros(1), np.zeros(()))
    slope = Coefficients(np.zeros((1, 1)), -np.ones(1), np.zeros(()))
    return Chain((start, slope), None)


def is_plain(lin, optimizer, opt_state):
    """Whether plain SGD is asked about: no optimizer is given."""
    if optimizer is not None:
        return False
    if opt_state is not None:
        raise ValueError(
            "opt_state needs the optimizer that it is of, got none; give optimizer="
            "lambda rate: ..., as it was trained."
        )
    if lin.preconditioner is not None:
        raise ValueError(
            "a linearization with a preconditioner needs the optimizer that has it, got "
            "none; give optimizer=lambda rate: ..., as it was trained."
        )
    return True


def chain(lin, optimizer, opt_state):
    """The :class:`Chain` of an optimizer at a linearization; None: plain SGD."""
    if is_plain(lin, optimizer, opt_state):
        return plain()
    params = lin.params
    if params is None:
        params = np.zeros(lin.num_params)
    asked = reader(optimizer, params, opt_state)
    has_scales = lin.preconditioner is not None

    def read(rate):
        return asked.shared(rate, has_scales)

    (r1, r2, r3) = RATES
    one, two, three = map(read, RATES)
    slope = Coefficients(*((b - a) / (r2 - r1) for a, b in zip(one, two, strict=True)))
    start = Coefficients(*(a - r1 * s for a, s in zip(one, slope, strict=True)))
    found = Chain((start, slope), read)
    sizes = zip(found.at(r3), three, strict=True)
    is_affine = all(np.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in sizes)
    return found if is_affine else Chain(None, read)


def preconditioner(optimizer: Optimizer, opt_state: Any, params: ParamsT) -> ParamsT:
    r"""The factor by which an adaptive optimizer multiplies each parameter's gradient.

    For Adam at its t-th step :math:`1 / ((1 - \beta_1^t) (\sqrt{\hat\nu} + \epsilon))` with
    the second moments :math:`\hat\nu` of the state, corrected for their bias. It is read
    off the chain itself, so that ``eps``, corrections and whatever else scales parts of the
    parameters are those of the chain, and it is frozen: what is said with it holds while
    the second moments stay.

    Args:
      optimizer: a function of the learning rate that returns the optax transformation, such
        as ``lambda rate: optax.adamw(rate, weight_decay=0.1)``.
      opt_state: its state, after at least one step.
      params: the parameters.

    Returns:
      A tree like ``params``: 1 for plain SGD.

    Raises:
      TypeError, ValueError: for an optimizer that is not linear beyond such a factor, such
        as Lion, or a state of another one.

    References:
      Cohen, Ghorbani, Krishnan, Agarwal, Medapati, Badura, Suo, Cardoze, Nado, Dahl, Gilmer,
      `Adaptive Gradient Methods at the Edge of Stability
      <https://arxiv.org/abs/2207.14484>`_, 2022.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from flatopt import stability
      >>> params = jnp.zeros(2)
      >>> _, state = optax.adam(0.1).update(jnp.array([0.5, 2.0]), optax.adam(0.1).init(params))
      >>> 0.1 * stability.preconditioner(optax.adam, state, params)  # (1 - 0.9) / |g|
      Array([2. , 0.5], dtype=float32)
    """
    if opt_state is None:
        raise ValueError(
            "opt_state must be the optimizer's state after training, got None; a "
            "preconditioner is made of the gradients that it has seen."
        )
    params = risk.check_params(params)
    return _factors(reader(optimizer, params, opt_state), params)


def preconditioner_if_any(optimizer, opt_state, params):
    """That of an optimizer that has one, or None."""
    if optimizer is None:
        return None
    asked = reader(optimizer, params, opt_state)
    if asked.is_shared(RATES[0]):
        return None
    if opt_state is None:
        raise ValueError(
            "opt_state is needed with an optimizer that scales each gradient by what it has "
            "seen, got None; give its state after training."
        )
    return _factors(asked, params)


def normalized(optimizer, params, opt_state):
    """Coefficients where a fresh gradient moves parameters by -1, and active slots."""
    asked = reader(optimizer, params, opt_state)
    found = asked.shared(RATES[0], not asked.is_shared(RATES[0]))
    if found.gain[0] >= 0:
        raise linear.NotLinearError(
            "optimizer must follow a gradient downhill at once, got one that does not; "
            + ADVICE
        )
    return found._replace(gain=found.gain / -found.gain[0]), asked.active


def _factors(asked, params):
    factors = asked.factors(RATES[0])
    if not np.isfinite(factors).all():
        raise ValueError(
            "opt_state gives a preconditioner that is not finite; give the state after a "
            "step at least."
        )
    with _slots.on_host():
        tree = asked.machine.layout.tree(jnp.asarray(factors))
        tree = jax.tree.map(np.asarray, tree)
    return jax.tree.map(lambda x, p: jnp.asarray(x, _dtype(p)), tree, params)


def _dtype(leaf):
    dtype = jnp.result_type(leaf)
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32

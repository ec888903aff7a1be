"""The coefficients of an optimizer that is linear near a minimum, read off the chain.

Where the gradient is ``H z[0]``, the distance to the minimum and the slots of such an
optimizer follow ``z' = A z + b H z[0]``, with the same A and b at each coordinate but for
the factor by which adaptive methods multiply the gradient: the preconditioner.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flatopt._core import linear
from flatopt.stability import _slots

UNIT = 2.0**-66  # of displacements and gradients: far below every eps, squares in range
SETTLED = 2.0**60  # second moments beside which every eps is nothing
COUNT = 2**30  # steps after which averages have settled
FEWER = 2**20  # as many as make no difference to that
NEAR = 2.0**-20  # of gradients beside parameters of size 1
DISCOUNT = 65 / 64  # so that slots that keep all the past have a finite gain
COUNTS = (0, 1, 10, 100, 1_000, 10_000, 100_000)  # that a schedule is looked at
TOLERANCE = 1e-5  # relative, of what has to agree
TINY = 1e-12  # relative, that counts as zero
NARROW = 3e-2  # the same where slots are narrower than float32
RATES = 0.25, 0.5, 0.125  # two to read at, one to check
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
ADVICE = "use stability.critical_learning_rate, which takes any update."


class Coefficients(NamedTuple):
    """One step near a minimum: ``z' = matrix @ z + gain * gradient``.

    Attributes:
      matrix: shape (k, k), of the distance to the minimum and the slots.
      gain: shape (k,).
      rho: the gradient is that of the loss times 1 + rho H; 0 but for an ascent step.
    """

    matrix: np.ndarray
    gain: np.ndarray
    rho: np.ndarray


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
    reader = _reader(optimizer, params, opt_state)
    has_scales = lin.preconditioner is not None

    def read(rate):
        return reader.shared(rate, has_scales)

    (r1, r2, r3) = RATES
    one, two, three = map(read, RATES)
    slope = Coefficients(*((b - a) / (r2 - r1) for a, b in zip(one, two, strict=True)))
    start = Coefficients(*(a - r1 * s for a, s in zip(one, slope, strict=True)))
    found = Chain((start, slope), read)
    sizes = zip(found.at(r3), three, strict=True)
    is_affine = all(np.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in sizes)
    return found if is_affine else Chain(None, read)


def preconditioner(optimizer: Any, opt_state: Any, params: Any) -> Any:
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
    return _factors(_reader(optimizer, params, opt_state), params)


def preconditioner_if_any(optimizer, opt_state, params):
    """That of an optimizer that has one, or None."""
    if optimizer is None:
        return None
    reader = _reader(optimizer, params, opt_state)
    if reader.is_shared(RATES[0]):
        return None
    if opt_state is None:
        raise ValueError(
            "opt_state is needed with an optimizer that scales each gradient by what it has "
            "seen, got None; give its state after training."
        )
    return _factors(reader, params)


def normalized(optimizer, params, opt_state):
    """Coefficients where a fresh gradient moves parameters by -1, and active slots."""
    reader = _reader(optimizer, params, opt_state)
    found = reader.shared(RATES[0], not reader.is_shared(RATES[0]))
    if found.gain[0] >= 0:
        raise linear.NotLinearError(
            "optimizer must follow a gradient downhill at once, got one that does not; "
            + ADVICE
        )
    return found._replace(gain=found.gain / -found.gain[0]), reader.active


def _factors(reader, params):
    factors = reader.factors(RATES[0])
    if not np.isfinite(factors).all():
        raise ValueError(
            "opt_state gives a preconditioner that is not finite; give the state after a "
            "step at least."
        )
    with _slots.on_host():
        tree = reader.machine.layout.tree(jnp.asarray(factors))
        tree = jax.tree.map(np.asarray, tree)
    return jax.tree.map(lambda x, p: jnp.asarray(x, _dtype(p)), tree, params)


def _dtype(leaf):
    dtype = jnp.result_type(leaf)
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


class _Reader(NamedTuple):
    """An optimizer at a state, whose slots are known.

    Attributes:
      machine: at the state.
      settled: after very many steps, at which a preconditioner of moments 1 is 1; the same
        as ``machine`` where there is none.
      active: the slots that move with the gradient to first order.
      moments: values of the other ones in the state, 0 for active ones, shape (slots, d).
      spread: random second moments about 1, shape (slots, d); 0 for active ones.
      power: that of a second moment in the preconditioner, 0 where there is none, shape
        (d,).
      tolerance: of what has to agree.
    """

    machine: _slots.Machine
    settled: _slots.Machine
    active: tuple[int, ...]
    moments: np.ndarray
    spread: np.ndarray
    power: np.ndarray
    tolerance: float

    def reference(self, rate):
        """What :func:`_read` gives at second moments beside which eps is nothing."""
        moments = _kept(self.settled, SETTLED * self.spread)
        return _read(self.settled, self.active, moments, rate, self.tolerance)

    def unit(self, matrix, gain):
        """The gain of a constant gradient where the preconditioner is 1."""
        total = _total_gain(matrix, gain)
        moments = SETTLED * self.spread.max(axis=0, initial=1 / SETTLED)
        total = total * moments**self.power
        return total[np.argmax(np.abs(total))]

    def factors(self, rate):
        """The preconditioner at the state, shape (d,)."""
        matrix, gain, _ = self.reference(rate)
        here = _read(self.machine, self.active, self.moments, rate, self.tolerance)
        return _total_gain(*here[:2]) / self.unit(matrix, gain)

    def is_shared(self, rate):
        """Whether all coordinates have the same coefficients without a preconditioner."""
        matrix, gain, _ = self.reference(rate)
        return _common(matrix, gain, self.tolerance) is not None

    def shared(self, rate, has_scales):
        """The :class:`Coefficients` that all coordinates share, the factor divided out."""
        matrix, gain, rho = self.reference(rate)
        factors = _total_gain(matrix, gain) / self.unit(matrix, gain)
        as_they_are = _common(matrix, gain, self.tolerance)
        used = factors != 0
        divided = _common(
            *_divided(matrix[..., used], gain[..., used], factors[used]), self.tolerance
        )
        if has_scales and as_they_are is not None:
            raise ValueError(
                "optimizer has no preconditioner, got a linearization made with one; leave "
                "preconditioner out of linearize, or give the adaptive optimizer."
            )
        found = divided if has_scales else as_they_are
        if found is None:
            _refuse_apart(is_scale=divided is not None)
        return _minimal(*found, rho)


def _reader(optimizer, params, opt_state):
    start = _slots.machine(optimizer, params, None)
    start = start.after_step(RATES[0]).at_count(COUNT)
    _check_steps(start)
    tolerance = NARROW if start.has_narrow_slots else TOLERANCE
    active = _active_slots(start)
    quiet = [k for k in range(len(start.slots)) if k not in active]
    spread = np.zeros_like(start.slots)
    size = spread.shape[1]
    spread[quiet] = np.exp2(np.random.default_rng(0).uniform(0, 2, size))
    settled = start.at_scheduled(COUNT)
    if opt_state is None:
        machine, moments = settled, SETTLED * spread
    else:
        machine = _slots.machine(optimizer, params, opt_state)
        settled = machine.at_count(COUNT)
        stored = np.zeros_like(machine.slots)
        stored[quiet] = machine.slots[quiet]
        moments = _kept(machine, stored)
        machine = machine.before_last_step(set(quiet))
    _check_linear(optimizer, settled, active, SETTLED * spread, tolerance)
    power = _power(settled, active, SETTLED * spread, tolerance)
    if opt_state is None:
        _check_counts(settled, active, SETTLED * spread, tolerance)
    elif not power.any():
        settled = machine
    return _Reader(machine, settled, active, moments, spread, power, tolerance)


def _check_steps(machine):
    """Refuse what takes a step every so often."""
    nodes = jax.tree.leaves(machine.state, is_leaf=_is_accumulation)
    if any(map(_is_accumulation, nodes)):
        raise linear.NotLinearError(
            "optimizer must take a step for each gradient, got one that accumulates them "
            "(MultiSteps); give the optimizer inside of it, and the size of the whole batch."
        )


def _is_accumulation(node):
    return isinstance(node, optax.MultiStepsState)


def _random(seed, shape):
    """Numbers between 1/2 and 3/2 of either sign, of the size of a unit."""
    rng = np.random.default_rng(seed)
    return UNIT * rng.choice([-1.0, 1.0], shape) * rng.uniform(0.5, 1.5, shape)


def _active_slots(machine):
    """Slots that move to first order with the gradient, the parameters or such a slot."""
    rate = RATES[0]
    size = machine.layout.size
    zero = np.zeros(size)
    _, base, _ = machine.step(rate, zero, machine.slots, zero)
    tried = [
        (machine.slots, _random(0, size), zero),
        (machine.slots, zero, _random(0, size)),
    ]
    active = set()
    while tried:
        slots, point, grads = tried.pop()
        _, moved, _ = machine.step(rate, point, slots, grads)
        change = np.abs(moved - base).max(axis=1, initial=0.0)
        for k in np.flatnonzero(change > TOLERANCE * UNIT):
            if k not in active:
                active.add(int(k))
                other = machine.slots.copy()
                other[k] += _random(0, size)
                if len(machine.slots) > 1:
                    tried.append((other, zero, zero))
    return tuple(sorted(active))


def _kept(machine, moments):
    """Second moments that a step without gradient, which decays them, turns into these."""
    zero = np.zeros(machine.layout.size)
    _, after, _ = machine.step(RATES[0], zero, moments, zero)
    used = (moments != 0) & (after != 0)
    return moments * np.divide(moments, after, out=np.ones_like(after), where=used)


def _outputs(machine, active, moments, rate, point, slots, grads):
    """New distance less the old, and the active slots, shape (k, d); and ascents."""
    given = moments.copy()
    given[list(active)] = slots
    updates, after, rhos = machine.step(rate, point, given, grads)
    return np.concatenate([updates[None], after[list(active)]]), rhos


def _read(machine, active, moments, rate, tolerance):
    """Matrix (k, k, d), gain (k, d), and the factor of an ascent.

    The first entry is less 1, so that a small weight decay keeps its digits.
    """
    size, count = machine.layout.size, len(active)

    def response(source, seed):
        inputs = np.zeros((count + 2, size))
        inputs[source] = _random(seed, size)
        found, rhos = _outputs(
            machine, active, moments, rate, inputs[0], inputs[1:-1], inputs[-1]
        )
        return found / inputs[source], rhos

    columns = []
    for source in range(count + 2):
        one, rhos = response(source, 1)
        other, _ = response(source, 2)
        if not np.allclose(one, other, rtol=tolerance, atol=TINY * np.abs(one).max()):
            raise linear.NotLinearError(
                "optimizer must act on each coordinate by itself, got one that mixes them; "
                + ADVICE
            )
        columns.append(one)
    matrix = np.stack(columns[:-1], axis=1)
    return matrix, columns[-1], float(sum(rhos.values()))


def _check_linear(optimizer, machine, active, moments, tolerance):
    """Refuse an optimizer that is not additive and homogeneous, by name."""
    if _is_linear(machine, active, moments, tolerance):
        return
    names = []
    for name, part in _slots.parts(_slots.make(optimizer, RATES[0])):
        params = machine.layout.tree(np.zeros(machine.layout.size))
        if not _is_part_linear(part, params, tolerance):
            names.append(name)
    found = f" ({', '.join(names)})" if names else ""
    raise linear.NotLinearError(
        f"optimizer must be linear near a minimum, got one that is not{found}; {ADVICE}"
    )


def _is_part_linear(part, params, tolerance):
    try:
        machine = _slots.machine(lambda rate: part, params, None).at_count(COUNT)
        active = _active_slots(machine)
        moments = SETTLED * np.ones_like(machine.slots)
        moments[list(active)] = 0
        return _is_linear(machine, active, moments, tolerance)
    except Exception:  # by itself it may lack what comes before it: not to blame
        return True


def _is_linear(machine, active, moments, tolerance):
    """Whether outputs of sums are sums of outputs, and of multiples multiples.

    Of the distance, slots and gradients about zero; and of slots and gradients at
    parameters of size 1, which norms of parameters show in.
    """
    shape = len(active) + 2, machine.layout.size
    place = np.random.default_rng(5).choice([-1.0, 1.0], shape[1])
    fixed = np.arange(shape[0])[:, None] == 0

    def outputs(inputs, place=0.0, size=1.0):
        point, slots, grads = place + inputs[0], inputs[1:-1], inputs[-1]
        return _outputs(machine, active, size * moments, RATES[0], point, slots, grads)[
            0
        ]

    start = outputs(np.zeros(shape), place, 1 / SETTLED)

    def outputs_at_place(inputs):
        inputs = np.where(fixed, 0.0, inputs)
        return outputs(inputs, place, 1 / SETTLED) - start

    one, other = _random(3, shape), _random(4, shape)
    return _is_additive(outputs, one, other, tolerance) and _is_additive(
        outputs_at_place, NEAR / UNIT * one, NEAR / UNIT * other, tolerance
    )


def _is_additive(function, one, other, tolerance):
    first, second = function(one), function(other)
    size = np.abs(first).max(axis=1) + np.abs(second).max(axis=1)
    misses = (
        function(one + other) - first - second,
        function(-2 * one) + 2 * first,
        function(0 * one),
    )
    # Comparisons are False for NaN.
    return all((np.abs(x).max(axis=1) <= 10 * tolerance * size).all() for x in misses)


def _total_gain(matrix, gain):
    """What a lasting gradient moves the parameters by, its past discounted; shape (d,)."""
    slots = matrix.shape[0] - 1
    if not slots:
        return gain[0]
    own = DISCOUNT * np.eye(slots)[..., None] - matrix[1:, 1:]
    own = np.moveaxis(own, -1, 0)
    kept = np.linalg.solve(own, np.moveaxis(gain[1:, None], -1, 0))[..., 0]
    return gain[0] + np.einsum("kd,dk->d", matrix[0, 1:], kept)


def _power(machine, active, moments, tolerance):
    """The power of second moments that divides the gradient: 1/2 for Adam, 0 for SGD."""
    one, other = (
        _total_gain(*_read(machine, active, size * moments, RATES[0], tolerance)[:2])
        for size in (1.0, 4.0)
    )
    used = one != 0
    if not used.any():
        raise ValueError(
            "optimizer must move the parameters, got updates of zero; for a schedule give "
            "opt_state, at whose step its rate is taken."
        )
    ratios = np.divide(other, one, out=np.ones_like(one), where=used)
    power = -np.round(8 * np.log2(ratios)) / 16  # so that rounding is not blown up
    if not power.any() and len(moments):
        drawn = np.exp2(np.random.default_rng(6).uniform(0, 2, moments.shape))
        matrix, gain, _ = _read(machine, active, drawn * moments, RATES[0], tolerance)
        if not np.allclose(_total_gain(matrix, gain), one, rtol=10 * tolerance, atol=0):
            raise linear.NotLinearError(
                "optimizer must divide gradients by one kind of second moments, got one "
                f"that sets several against each other; {ADVICE}"
            )
    return power


def _check_counts(machine, active, moments, tolerance):
    """Refuse an optimizer whose rate depends on the step, where no state says which."""
    found = _read(machine, active, moments, RATES[0], tolerance)
    others = [machine.at_count(FEWER), machine.after_step(RATES[0])]
    if machine.has_schedules:
        others += map(machine.at_scheduled, COUNTS)
    for other in others:
        seen = _read(other, active, moments, RATES[0], tolerance)
        if not all(
            np.allclose(a, b, rtol=1e-3, atol=0)
            for a, b in zip(found, seen, strict=True)
        ):
            raise ValueError(
                "optimizer must do the same at each step, got one that changes along "
                "training; for a schedule give opt_state, at whose step its rate is taken, "
                "or a number in its place."
            )


def _divided(matrix, gain, factors):
    """Coefficients in the coordinates where the preconditioner is 1.

    Of the parameters these are theta over the root of the factor; those of a slot are the
    ones in which all coordinates take up the gradient alike.
    """
    scales = [factors**-0.5]
    for k in range(1, len(gain)):
        if np.any(gain[k]):
            scales.append(factors**0.5 / _nonzero(gain[k]))
        elif np.any(matrix[k, 0]):
            scales.append(factors**-0.5 / _nonzero(matrix[k, 0]))
        else:
            scales.append(np.ones_like(factors))
    scales = np.stack(scales)
    return scales[:, None] * matrix / scales[None], scales * gain * factors**-0.5


def _nonzero(values):
    return np.where(values == 0, 1.0, values)


def _common(matrix, gain, tolerance):
    """The coefficients if they are the same at all coordinates, else None."""
    whole = np.concatenate([matrix, gain[:, None]], axis=1)
    found = np.median(whole, axis=-1)
    sizes = np.abs(found)
    floor = TINY * sizes.max(axis=1, keepdims=True)
    apart = np.abs(whole - found[..., None]).max(axis=-1, initial=0.0)
    if not (apart <= tolerance * sizes + floor).all():
        return None
    return found[:, :-1], found[:, -1]


def _refuse_apart(is_scale):
    if is_scale:
        raise ValueError(
            "optimizer scales gradients differently at each coordinate; give linearize "
            "preconditioner=stability.preconditioner(optimizer, opt_state, params)."
        )
    raise linear.NotLinearError(
        "optimizer must treat all parameters alike but for a preconditioner, got one that "
        "decays or averages some of them otherwise (masked or coupled weight decay, "
        f"partitions); {ADVICE}"
    )


def _minimal(matrix, gain, rho):
    """The coefficients without slots that nothing moves or reads, each moved by 1."""
    reads = np.abs(matrix) > TINY * np.abs(matrix).max(axis=1, keepdims=True)
    moves = (np.abs(gain) > 0) | (np.arange(len(gain)) == 0)
    seen = np.arange(len(gain)) == 0
    for _ in gain:
        moves = moves | (reads @ moves)
        seen = seen | (seen @ reads)
    kept = np.flatnonzero(moves & seen)
    matrix, gain = matrix[np.ix_(kept, kept)], gain[kept]
    scales = np.where(gain == 0, 1.0, 1 / _nonzero(gain))
    scales[0] = 1.0
    matrix = scales[:, None] * matrix / scales[None]
    matrix[0, 0] += 1
    return Coefficients(matrix, scales * gain, np.asarray(rho))

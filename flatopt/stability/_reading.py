"""The coefficients of each coordinate, read off an optax chain and checked.

A chain is asked for its response to displacements, slots and gradients so small that
nothing but its linear part is at work; what does not add up is refused.
"""

from typing import NamedTuple

import jax
import numpy as np
import optax

from flatopt._core import linear
from flatopt.stability import _shared, _slots
from flatopt.stability._shared import ADVICE, TINY

UNIT = 2.0**-66  # of displacements and gradients: far below every eps, squares in range
SETTLED = 2.0**60  # second moments beside which every eps is nothing
COUNT = 2**30  # steps after which averages have settled
FEWER = 2**20  # as many as make no difference to that
NEAR = 2.0**-20  # of gradients beside parameters of size 1
DISCOUNT = 65 / 64  # so that slots that keep all the past have a finite gain
COUNTS = (0, 1, 10, 100, 1_000, 10_000, 100_000)  # that a schedule is looked at
TOLERANCE = 1e-5  # relative, of what has to agree
NARROW = 3e-2  # the same where slots are narrower than float32
RATES = 0.25, 0.5, 0.125  # two to read at, one to check


class Reader(NamedTuple):
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
        return _shared.common(matrix, gain, self.tolerance) is not None

    def shared(self, rate, has_scales):
        """The :class:`Coefficients` that all coordinates share, the factor divided out."""
        matrix, gain, rho = self.reference(rate)
        factors = _total_gain(matrix, gain) / self.unit(matrix, gain)
        as_they_are = _shared.common(matrix, gain, self.tolerance)
        used = factors != 0
        divided = _shared.common(
            *_shared.divided(matrix[..., used], gain[..., used], factors[used]),
            self.tolerance,
        )
        if has_scales and as_they_are is not None:
            raise ValueError(
                "optimizer has no preconditioner, got a linearization made with one; leave "
                "preconditioner out of linearize, or give the adaptive optimizer."
            )
        found = divided if has_scales else as_they_are
        if found is None:
            _shared.refuse_apart(is_scale=divided is not None)
        return _shared.minimal(*found, rho)


def reader(optimizer, params, opt_state):
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
    return Reader(machine, settled, active, moments, spread, power, tolerance)


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

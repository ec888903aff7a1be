"""What SGD does near a minimum: growth, escape, simulation, where it settles."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import blocks
from flatopt._core.types import Optimizer, Sampling, SimulatedNoise
from flatopt.stability import _checks, _coefficients, _moments, _motion
from flatopt.stability._linearization import Linearization, check_whole

MOST_STEPS = 100_000  # looked at for an escape
ROUND_STEPS = 32  # of an escape, looked at at once


def growth_rate(
    lin: Linearization,
    learning_rate: float,
    batch_size: int,
    *,
    sampling: Sampling = "without_replacement",
    optimizer: Optimizer | None = None,
    opt_state: Any = None,
    progress: Callable[[int, int | None, str], Any] | bool | None = None,
) -> float:
    r"""The factor by which SGD's second moment grows a step, in the long run.

    Above 1 the expected loss grows exponentially, below it falls. Directions that no
    example sees stay as they are and are left out. Below the threshold of a large problem
    the flattest directions rule, and two digits of the result are good. Of a linearization
    of some directions it is a lower bound.

    Args:
      lin: from :func:`linearize`.
      learning_rate: the step size, > 0.
      batch_size: B, at most n.
      sampling, optimizer, opt_state: see :func:`thresholds`.
      progress: see :func:`linearize`; the total is a guess.

    Returns:
      The largest eigenvalue of the second moment's recursion.

    References:
      Mulayoff, Michaeli, `Exact Mean Square Linear Stability Analysis for SGD
      <https://arxiv.org/abs/2306.07850>`_, 2023, equation 10.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import stability
      >>> lin = stability.linearize(
      ...     lambda w, x: x @ w, jnp.ones(2), jnp.eye(2), jnp.ones(2))
      >>> round(stability.growth_rate(lin, 3.0, 1), 3)
      2.5
    """
    _checks.check_linearization(lin)
    _checks.check_rate(learning_rate)
    if _coefficients.is_plain(lin, optimizer, opt_state):
        return _moments.growth(lin, learning_rate, batch_size, sampling, progress)
    chain = _coefficients.chain(lin, optimizer, opt_state)
    found = _motion.motion(lin, chain, batch_size, sampling)
    return _motion.growth(found, learning_rate, progress)


def expected_losses(
    lin: Linearization,
    learning_rate: float,
    batch_size: int,
    num_steps: int,
    *,
    sampling: Sampling = "without_replacement",
    optimizer: Optimizer | None = None,
    opt_state: Any = None,
) -> jax.Array:
    r"""The exact expected loss along linearized SGD, from a random start of loss 1.

    The mean over runs; a typical run can shrink while the mean grows.

    Args:
      lin: from :func:`linearize`.
      learning_rate: the step size, > 0.
      batch_size: B, at most n.
      num_steps: number of steps.
      sampling, optimizer, opt_state: see :func:`thresholds`.

    Returns:
      The expected losses, shape (num_steps + 1,).

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import stability
      >>> lin = stability.linearize(
      ...     lambda w, x: x @ w, jnp.ones(2), jnp.eye(2), jnp.ones(2))
      >>> [round(float(x), 3) for x in stability.expected_losses(lin, 3.0, 1, 2)]
      [1.0, 2.5, 6.25]
    """
    _checks.check_linearization(lin)
    _checks.check_rate(learning_rate)
    _checks.check_count(num_steps, "num_steps", "steps")
    run = _run(lin, optimizer, opt_state, learning_rate, batch_size, sampling)
    _, losses = _mean_losses(run, _start(run), num_steps + 1)
    return losses


class _Run(NamedTuple):
    """What compiled recursions take: a space, an optimizer's coefficients, weights."""

    room: _moments.Space
    coefficients: tuple[jax.Array, jax.Array]
    weights: _moments.Weights


def _run(lin, optimizer, opt_state, learning_rate, batch_size, sampling):
    check_whole(lin, "a recursion of losses")
    chain = _coefficients.chain(lin, optimizer, opt_state)
    weights = _moments.sampling_weights(len(lin.coordinates), batch_size, sampling)
    lin = _motion.ascended(lin, chain, batch_size, weights)
    room = _moments.space(lin)
    coefficients = _motion.scaled(
        chain.at(learning_rate), room.scale, room.values.dtype
    )
    return _Run(room, coefficients, weights)


def _start(run):
    """The second moment of a random start of loss 1, and of slots at rest."""
    room, slots = run.room, len(run.coefficients[1])
    moment = np.zeros((slots, slots, *(2 * room.values.shape)))
    distance = np.eye(room.rank) * 2 / np.sum(np.asarray(room.values, "f8"))
    moment[0, 0] = room.pad(distance)
    return _moments.narrow(moment, room.values.dtype)


def _mean_losses(run, moment, count):
    """The moment after so many steps, and the mean loss before each of them."""
    length = 1 << (count - 1).bit_length()  # so that other counts share compiled code
    room = run.room
    moment, losses = _recursion(
        room.coordinates,
        room.values,
        run.coefficients,
        run.weights,
        moment,
        count,
        length,
    )
    return moment, losses[:count]


@functools.partial(jax.jit, static_argnums=6)
def _recursion(coordinates, values, coefficients, weights, moment, count, length):
    def step(index, state):
        moment, losses = state
        loss = jnp.sum(jnp.diagonal(moment[0, 0]) * values) / 2
        losses = losses.at[index].set(loss)
        moment = _moments.slots_moment_step(
            coordinates, values, coefficients, weights, moment
        )
        return moment, losses

    start = moment, jnp.zeros(length, values.dtype)
    return jax.lax.fori_loop(0, count, step, start)


def escape_time(
    lin: Linearization,
    learning_rate: float,
    batch_size: int,
    *,
    factor: float = 10.0,
    sampling: Sampling = "without_replacement",
    optimizer: Optimizer | None = None,
    opt_state: Any = None,
) -> float:
    r"""Steps until the expected loss of linearized SGD has grown by a factor.

    Args:
      lin: from :func:`linearize`.
      learning_rate: the step size, > 0.
      batch_size: B, at most n.
      factor: the growth to wait for, > 1.
      sampling, optimizer, opt_state: see :func:`thresholds`.

    Returns:
      The number of steps, infinite where SGD stays.

    Example:
      >>> import jax.numpy as jnp
      >>> from flatopt import stability
      >>> lin = stability.linearize(
      ...     lambda w, x: x @ w, jnp.ones(2), jnp.eye(2), jnp.ones(2))
      >>> stability.escape_time(lin, 3.0, 1), stability.escape_time(lin, 1.0, 1)
      (3.0, inf)
    """
    _checks.check_linearization(lin)
    _checks.check_rate(learning_rate)
    _checks.check_rate(factor, "factor")
    if not factor > 1:
        raise ValueError(
            f"factor must be greater than 1, got {factor}; write factor=10.0."
        )
    if _stays(lin, optimizer, opt_state, learning_rate, batch_size, sampling):
        return math.inf
    run = _run(lin, optimizer, opt_state, learning_rate, batch_size, sampling)
    moment, count = _start(run), ROUND_STEPS
    for start in range(0, MOST_STEPS, ROUND_STEPS):
        moment, losses = _mean_losses(run, moment, count)
        reached = np.flatnonzero(~(np.asarray(losses) < factor))
        if len(reached):
            return float(start + reached[0])
    return math.inf


def _stays(lin, optimizer, opt_state, learning_rate, batch_size, sampling):
    if _coefficients.is_plain(lin, optimizer, opt_state):
        return learning_rate <= _moments.exact_threshold(lin, batch_size, sampling)
    chain = _coefficients.chain(lin, optimizer, opt_state)
    found = _motion.motion(lin, chain, batch_size, sampling)
    return _motion.stays(found, learning_rate)


NOISES = ("sgd", "gd", "isotropic", "langevin")


def simulate(
    lin: Linearization,
    key: jax.Array,
    learning_rate: float,
    batch_size: int,
    num_steps: int,
    *,
    num_runs: int = 100,
    noise: SimulatedNoise = "sgd",
    sampling: Sampling = "without_replacement",
    optimizer: Optimizer | None = None,
    opt_state: Any = None,
) -> jax.Array:
    r"""Losses of linearized SGD, of gradient descent, or of it with isotropic noise.

    Each run starts at a random displacement of expected loss 1. "isotropic" adds to
    gradient descent Gaussian noise of the same trace as SGD's at the same point, spread
    evenly over all parameters; "langevin" keeps the noise at the size it has at the start.

    The mean over runs is carried by rare ones: a typical run can shrink while the mean
    grows. Plot a median beside :func:`expected_losses`.

    Args:
      lin: from :func:`linearize`.
      key: a JAX random key.
      learning_rate: the step size, > 0.
      batch_size: B, at most n.
      num_steps: number of steps.
      num_runs: number of independent runs.
      noise: "sgd", "gd", "isotropic" or "langevin".
      sampling, optimizer, opt_state: see :func:`thresholds`.

    Returns:
      Losses, shape (num_runs, num_steps + 1).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flatopt import stability
      >>> lin = stability.linearize(
      ...     lambda w, x: x @ w, jnp.ones(2), jnp.eye(2), jnp.ones(2))
      >>> losses = stability.simulate(lin, jax.random.key(0), 0.1, 1, 5, num_runs=3)
      >>> losses.shape
      (3, 6)
    """
    _checks.check_linearization(lin)
    _checks.check_rate(learning_rate)
    _checks.check_count(num_steps, "num_steps", "steps")
    _checks.check_count(num_runs, "num_runs", "runs")
    _checks.check_key(key)
    if noise not in NOISES:
        raise ValueError(
            f"noise must be one of {', '.join(map(repr, NOISES))}, got {noise!r}."
        )
    run = _run(lin, optimizer, opt_state, learning_rate, batch_size, sampling)
    draws = num_steps, num_runs
    return _simulate(
        run.room.coordinates,
        run.room.values,
        run.coefficients,
        run.weights.each / lin.num_params,
        key,
        (batch_size, *draws, noise, sampling),
    )


@functools.partial(jax.jit, static_argnums=5)
def _simulate(coordinates, values, coefficients, share, key, setting):
    batch_size, num_steps, num_runs, noise, sampling = setting
    matrix, gain = coefficients
    n, _, width = coordinates.shape
    scale = jnp.sqrt(2 / jnp.sum(values))
    spread = _start_spread(coordinates, values) if noise == "langevin" else None

    def gradient(point, key):
        errors = jnp.einsum("ncr,r->nc", coordinates, point)
        if noise == "sgd":
            counts = _batch_counts(key, n, batch_size, sampling).astype(values.dtype)
            errors = counts[:, None] / batch_size * errors
            return jnp.einsum("nc,ncr->r", errors, coordinates)
        grads = values * point
        if noise == "gd":
            return grads
        trace = spread
        if noise == "isotropic":
            each = jnp.einsum("nc,ncr->nr", errors, coordinates)
            trace = jnp.mean(jnp.sum(each**2, axis=1)) - jnp.sum(grads**2)
        deviation = jnp.sqrt(share * jnp.maximum(trace, 0))
        drawn = jax.random.normal(key, (width,), values.dtype)
        return grads + deviation * jnp.where(values > 0, drawn, 0.0)

    def step(state, key):
        loss = jnp.sum(values * state[0] ** 2) / 2
        moved = jnp.einsum("ik,kr->ir", matrix, state, precision=blocks.PRECISION)
        return moved + gain[:, None] * gradient(state[0], key)[None], loss

    def run(key):
        start_key, key = jax.random.split(key)
        start = scale * jax.random.normal(start_key, (width,), values.dtype)
        start = jnp.zeros((len(gain), width), values.dtype).at[0].set(start)
        _, losses = jax.lax.scan(step, start, jax.random.split(key, num_steps + 1))
        return losses

    return jax.vmap(run)(jax.random.split(key, num_runs))


def _start_spread(coordinates, values):
    """The trace of SGD's noise, in expectation over the starts of loss 1."""
    grams = jnp.einsum("ncr,ndr->ncd", coordinates, coordinates)
    each = jnp.sum(grams**2) / len(coordinates)
    return 2 / jnp.sum(values) * (each - jnp.sum(values**2))


def _batch_counts(key, num_examples, batch_size, sampling):
    """How often each example is in a random batch."""
    if sampling == "with_replacement":
        chosen = jax.random.randint(key, (batch_size,), 0, num_examples)
        return jnp.zeros(num_examples, jnp.int32).at[chosen].add(1)
    drawn = jax.random.uniform(key, (num_examples,))
    if sampling == "bernoulli":
        return drawn < batch_size / num_examples
    return jnp.argsort(jnp.argsort(drawn)) < batch_size

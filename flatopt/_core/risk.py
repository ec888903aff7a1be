"""A risk: a mean loss over data at parameters, and means of anything else over the data."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import (
    blocks,
    checks,
    loops,
    parts,
    progress,
    sharding,
    signatures,
    streams,
    trees,
)


@jax.tree_util.register_pytree_node_class
class Risk:
    """A mean loss over one batch, a re-iterable of batches or no data, at parameters.

    A pytree: parameters and a single batch are leaves, the rest is static, so that new
    parameters reuse compiled code. Make one with :meth:`of`, which checks.

    Attributes:
      loss_fn: ``loss_fn(params, batch)``, or ``loss_fn(params)`` without data.
      params: the parameters.
      batch, stream: the data, one of them None; both where there is none.
      weight_fn: weight of a batch; None: its number of examples.
      rest: all parameters and constants, where ``params`` are a part; see parts.choose.
    """

    def __init__(self, loss_fn, params, batch, stream, weight_fn, rest=None):
        self.loss_fn, self.params, self.weight_fn = loss_fn, params, weight_fn
        self.batch, self.stream, self.rest = batch, stream, rest
        self.seen = None  # what the last pass saw, see streams.Pass
        self.bar = None  # counts passes while inside of watched()

    @classmethod
    def of(cls, loss_fn, params, data=None, weight_fn=None, mask=None, constants=None):
        """A risk of checked arguments."""
        check_loss(loss_fn, data, constants)
        part = parts.choose(params, mask, constants)
        return cls.of_part(part.wrap(loss_fn), part, data, weight_fn)

    @classmethod
    def of_part(cls, loss_fn, part, data=None, weight_fn=None):
        """A risk of a part of the parameters, for which ``loss_fn`` is wrapped."""
        checks.check_weight_fn(weight_fn)
        check_hashable(loss_fn, weight_fn)
        params = check_params(part.params)
        return cls(loss_fn, params, *streams.prepare(data), weight_fn, part.rest)

    def tree_flatten(self):
        """For JAX: leaves and static parts."""
        static = self.loss_fn, self.stream, self.weight_fn
        return (self.params, self.batch, self.rest), static

    @classmethod
    def tree_unflatten(cls, static, leaves):
        """For JAX: a risk from leaves and static parts."""
        loss_fn, stream, weight_fn = static
        params, batch, rest = leaves
        return cls(loss_fn, params, batch, stream, weight_fn, rest)

    def at(self, params):
        """The same risk at other parameters, on data that is known to be finite."""
        return Risk(
            self.loss_fn, params, self.batch, self.stream, self.weight_fn, self.rest
        )

    @property
    def whole(self):
        """All parameters, where ``params`` are a part of them; else None."""
        return None if self.rest is None else self.rest[0]

    def given(self, batch):
        """What the loss is given for a batch: with constants, where there are any."""
        return batch if self.rest is None else parts.Beside(batch, *self.rest)

    @property
    def value(self):
        """The mean loss, float32 or wider; an error where it is not finite."""
        return self.mean(_Value(self.loss_fn))

    @property
    def gradient(self):
        """The gradient of the mean loss, in float32 or wider."""
        return self.value_and_gradient()[1]

    def value_and_gradient(self, check=True):
        """The mean loss and its gradient, in one pass."""
        return self.mean(_Gradient(self.loss_fn), check=check)

    def time_gradient(self):
        """Seconds of a gradient of all data, and of compiling it: the first one does."""
        seconds = []
        for _ in range(2):
            start = time.monotonic()
            jax.block_until_ready(self.value_and_gradient())
            seconds.append(time.monotonic() - start)
        return seconds[1], max(seconds[0] - seconds[1], 0.0)

    def losses(self, move, rows, fixed=()):
        """The mean loss at ``move(row, params, fixed)`` for each row, in one pass."""
        # A value at the parameters themselves costs a forward pass: see it once.
        return self.mean(_Losses(self.loss_fn, move), rows, fixed, check=False)

    def mean(self, function, *rows, check=True):
        """The mean over all data of what ``function(params, batch, *rows)`` returns.

        The function is hashable, since compiled code is kept by it, and returns ``(loss,
        asked)``. On a re-iterable the losses tell whether the data changed since the last
        pass; ``check=False`` leaves out to look at the loss on one batch.
        """
        if self.stream is not None:
            return self._sweep(function, rows, check)
        check = check and self.seen is None and not trees.is_traced((self, rows))
        arguments = self.params, self.given(self.batch)
        is_free = getattr(function, "has_free_loss", False)
        if check and not is_free:
            # By a small program of its own: the large one serves later calls as well.
            self._look_at(_on_batch(_Value(self.loss_fn), True, *arguments)[0])
        found = _on_batch(function, is_free, *arguments, *rows)
        if self.bar is not None:
            self.bar.update()
        if not is_free:
            return found
        loss, asked = found
        if check:
            self._look_at(loss)
        return asked

    def _look_at(self, loss):
        """Reject a loss that is not finite, unless what the loss function holds is traced."""
        if not trees.is_traced(loss):
            streams.check_finite(float(loss))
            self.seen = True

    def _sweep(self, function, rows, check):
        self._check_read((self, rows))
        total, weights = None, []
        for batch, weight in self.batches(function.__class__.__name__.strip("_")):
            arguments = self.params, batch, *rows
            weights.append(weight)
            weight = jnp.float32(weight)
            start = time.monotonic()
            if total is None:
                total, eps = _first_weighted(function, weight, *arguments)
            elif sharding.placement_of(self.params) is not None:
                # The program of the first batch: on a mesh it takes long to compile.
                total = _added(total, _weighted(function, weight, *arguments))
            else:
                total = add_weighted(function, total, weight, *arguments)
            self._check_read(total)  # traced by what the loss function holds
            if len(weights) == 1 and self.bar is not None:
                jax.block_until_ready(total)
                self._announce(start, function, total, weight, arguments)
        if not any(weights):
            raise ValueError(
                f"data must hold examples, got {len(weights)} batches of weight 0; give a "
                "loader that yields batches each time it is iterated."
            )
        weight = float(np.sum(np.sort(weights)))  # the same in every order
        size, loss, asked = _divided(total, weight)
        if check:
            found = streams.Pass(len(weights), weight, float(loss), float(size), eps)
            streams.check_same(self.seen, found)
            self.seen = found
        elif self.seen is not None:  # at other parameters: the number of examples tells
            found = self.seen._replace(batches=len(weights), weight=weight)
            streams.check_same(self.seen, found)
        return asked

    def _check_read(self, tree):
        """Reject a trace where batches are read."""
        if trees.is_traced(tree):
            raise TypeError(
                "data that is a re-iterable of batches is read on the host, got a call "
                "inside jax.jit or jax.vmap; give one batch there, or call this outside."
            )

    def _announce(self, start, function, total, weight, arguments):
        """Say how long all passes will take; the first batch is timed once more.

        The first time compiles: what is short with that is short without.
        """
        if not self.bar.may_take_long(time.monotonic() - start):
            return
        spare = jax.tree.map(jnp.zeros_like, total)
        start = time.monotonic()
        jax.block_until_ready(add_weighted(function, spare, weight, *arguments))
        self.bar.announce(time.monotonic() - start)

    def batches(self, description):
        """Yield ``(given batch, weight)`` of a re-iterable, and count them on the bar."""
        passes = streams.passes(self.stream, self.weight_fn, description, self.bar)
        for batch, weight in passes:
            yield self.given(batch), weight

    @contextlib.contextmanager
    def watched(self, choice, num_passes, description):
        """Within, passes over the data count on one bar of ``num_passes`` passes.

        One batch that is read in one go needs no bar unless it is asked for.
        """
        progress.check_progress(choice)
        if self.bar is not None or (self.stream is None and choice is None):
            yield
            return
        sized = self.stream is not None and hasattr(self.stream.batches, "__len__")
        total = num_passes * (len(self.stream.batches) if sized else 1)
        unknown = self.stream is not None and not sized
        with progress.bar(choice, None if unknown else total, description) as bar:
            self.bar = bar
            try:
                yield
            finally:
                self.bar = None


def check_loss(loss_fn, data, constants=None, name="loss_fn"):
    """Reject what does not take parameters, a batch where there is data, constants."""
    names = ["params", *["batch"] * (data is not None)]
    names += ["constants"] * (constants is not None)
    example = f"{name}({', '.join(names)})"
    if data is None:
        example += ", or give data"
    checks.check_function(loss_fn, name, example, count=len(names))
    signatures.check_order(loss_fn, name)


def check_model(model_fn, constants=None):
    """Reject what does not take parameters, inputs, constants."""
    names = ["params", "inputs", *["constants"] * (constants is not None)]
    example = f"model_fn({', '.join(names)})"
    checks.check_function(model_fn, "model_fn", example, count=len(names))
    signatures.check_order(model_fn, "model_fn")


def loss_of(loss_fn, params, batch):
    """The loss of one batch, which must be a real scalar."""
    arguments = () if batch is None else (batch,)
    return checks.check_value(loss_fn(params, *arguments), "loss_fn")


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _on_batch(function, with_loss, params, batch, *rows):
    found = function(params, batch, *rows)
    return found if with_loss else found[1]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def add_weighted(function, total, weight, params, batch, *rows):
    """The one weighted sum: magnitudes of losses, losses, and what is asked for."""
    loss, asked = _on_batch(function, True, params, batch, *rows)
    found = jnp.abs(loss), loss, asked
    return jax.tree.map(
        lambda t, x: t + weight.astype(t.dtype) * x.astype(t.dtype), total, found
    )


def _first_weighted(function, weight, params, *arguments):
    """The sum of the first batch, and the rounding of its loss.

    On a mesh it is not added to zeros: these would lie whole on one device.
    """
    # As a compiled function it is traced once, here for its shapes and for the sum.
    shapes = _on_batch.eval_shape(function, True, params, *arguments)
    eps = float(jnp.finfo(shapes[0].dtype).eps)
    if sharding.placement_of(params) is not None:
        return _weighted(function, weight, params, *arguments), eps
    leaves, treedef = jax.tree.flatten((shapes[0], *shapes))
    zeros = _zeros(tuple((s.shape, trees.wide(s.dtype)) for s in leaves))
    zeros = treedef.unflatten(zeros)
    return add_weighted(function, zeros, weight, params, *arguments), eps


@functools.partial(jax.jit, static_argnums=0)
def _zeros(shapes):
    """Arrays of zeros by one program, not one a shape."""
    return [jnp.zeros(shape, dtype) for shape, dtype in shapes]


@functools.partial(jax.jit, donate_argnums=0)
def _added(total, part):
    return jax.tree.map(jnp.add, total, part)


@functools.partial(jax.jit, donate_argnums=0)
def _divided(total, weight):
    return jax.tree.map(lambda x: x / weight, total)


@functools.partial(jax.jit, static_argnums=0)
def _weighted(function, weight, params, batch, *rows):
    loss, asked = function(params, batch, *rows)
    found = blocks.widen((jnp.abs(loss), loss, asked))
    return jax.tree.map(lambda x: weight.astype(x.dtype) * x, found)


@dataclasses.dataclass(frozen=True)
class _Value:
    has_free_loss: ClassVar[bool] = True  # it is computed anyway
    loss_fn: Callable

    def __call__(self, params, batch):
        loss = trees.widen(loss_of(self.loss_fn, params, batch))
        return loss, loss


@dataclasses.dataclass(frozen=True)
class _Gradient:
    has_free_loss: ClassVar[bool] = True
    loss_fn: Callable

    def __call__(self, params, batch):
        value, grads = jax.value_and_grad(
            lambda params: loss_of(self.loss_fn, params, batch)
        )(params)
        value, grads = trees.widen(value), blocks.widen(grads)
        return value, (value, grads)


@dataclasses.dataclass(frozen=True)
class _Losses:
    loss_fn: Callable
    move: Callable

    def __call__(self, params, batch, rows, fixed):
        def loss(row):
            # In float32 or wider: bfloat16 would round small moves away.
            moved = blocks.widen(self.move(row, params, fixed))
            return trees.widen(loss_of(self.loss_fn, moved, batch))

        here = trees.widen(loss_of(self.loss_fn, params, batch))
        return here, loops.map_rows(loss, rows)


def along(step, params, direction):
    """A move along a direction, one step a row."""
    return jax.tree.map(
        lambda p, d: trees.widen(p) + step.astype(d.dtype) * d, params, direction
    )


def check_hashable(*functions):
    """Reject functions by which compiled code cannot be kept."""
    try:
        hash(functions)
    except TypeError as error:
        given = [f for f in functions if f is not None]
        raise TypeError(
            f"loss_fn, model_fn and weight_fn must be hashable, got {given!r}; wrap them in "
            "a function."
        ) from error


def check_params(params):
    params = checks.check_params(params)
    if not blocks.size(params):
        raise ValueError(
            "params must hold at least one number, got "
            + ("arrays of size 0." if jax.tree.leaves(params) else "an empty tree.")
        )
    for leaf in jax.tree.leaves(params):
        placed = sharding.explicit_sharding(jax.typeof(leaf))
        if placed is not None and any(placed.spec):
            raise ValueError(
                f"params must not be sharded on an Explicit mesh, got {placed.spec}; make "
                "the mesh with axis_types Auto for the analysis."
            )
    return params

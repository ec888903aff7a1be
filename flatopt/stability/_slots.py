"""One step of an optax optimizer as a function of flat vectors, in float64.

A state is told apart into slots, which are copies of the parameters, and the rest.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flatopt._core import linear

SCHEDULED = {"ScaleByScheduleState", "WrappedScheduleState"}  # states of schedules


class _Mark(NamedTuple):
    slot: int
    leaf: int


class Layout(NamedTuple):
    """What the leaves of an optimizer's state are.

    Attributes:
      params: structure of the parameters.
      shapes: of their leaves.
      state: structure of the state.
      places: for each leaf of the state the slot and the leaf of the parameters that it is
        a copy of, or None.
      is_fresh: for each leaf whether ``init`` knows it best: what depends on the rate.
    """

    params: Any
    shapes: tuple[tuple[int, ...], ...]
    state: Any
    places: tuple[tuple[int, int] | None, ...]
    is_fresh: tuple[bool, ...]

    @property
    def num_slots(self):
        return 1 + max((place[0] for place in self.places if place), default=-1)

    @property
    def sizes(self):
        return [int(np.prod(shape)) for shape in self.shapes]

    @property
    def size(self):
        return sum(self.sizes)

    def tree(self, vector):
        """A flat vector as a tree like the parameters."""
        return jax.tree.unflatten(self.params, self._leaves(vector))

    def _leaves(self, vector):
        ends = np.cumsum(self.sizes)[:-1]
        parts = jnp.split(vector, ends)
        return [x.reshape(shape) for x, shape in zip(parts, self.shapes, strict=True)]

    def vector(self, tree):
        leaves = jax.tree.leaves(tree)
        return jnp.concatenate([x.astype(jnp.float64).ravel() for x in leaves])

    def put(self, state_leaves, slots):
        """Leaves of a state with the slots' vectors in their places."""
        rows = [self._leaves(slot) for slot in slots]
        return [
            leaf if place is None else rows[place[0]][place[1]].astype(leaf.dtype)
            for leaf, place in zip(state_leaves, self.places, strict=True)
        ]

    def take(self, state_leaves, numpy=jnp):
        """The slots of a state's leaves, shape (slots, size); zero where one has none."""
        rows = [
            [numpy.zeros(size) for size in self.sizes] for _ in range(self.num_slots)
        ]
        for leaf, place in zip(state_leaves, self.places, strict=True):
            if place is not None:
                rows[place[0]][place[1]] = leaf.astype(numpy.float64).ravel()
        flat = [numpy.concatenate(row) for row in rows]
        return numpy.stack(flat) if flat else numpy.zeros((0, self.size))


class Machine(NamedTuple):
    """An optimizer at a state, whose slots and rate are open.

    Attributes:
      optimizer: a function of the rate.
      layout: of its state.
      slots: those of the state, shape (slots, size), float64.
      rest: the leaves of the state; those of the slots are not looked at.
      state: the state.
      parents: for each leaf the path of what holds it.
    """

    optimizer: Callable[[Any], Any]
    layout: Layout
    slots: np.ndarray
    rest: list[Any]
    state: Any
    parents: list[Any]

    @property
    def has_schedules(self):
        nodes = jax.tree.leaves(self.state, is_leaf=_is_schedule)
        return any(map(_is_schedule, nodes))

    @property
    def has_narrow_slots(self):
        """Whether some slot is kept in less than float32."""
        pairs = zip(self.layout.places, self.rest, strict=True)
        return any(place and jnp.finfo(leaf.dtype).bits < 32 for place, leaf in pairs)

    def step(self, rate, point, slots, grads):
        """The updates, the new slots, and the ascents of flatopt's links by name."""
        updates, slots, _, rhos = self._step(rate, point, slots, grads)
        return updates, slots, rhos

    def after_step(self, rate):
        """The machine a step later, its slots aside."""
        zero = np.zeros(self.layout.size)
        _, _, rest, _ = self._step(rate, zero, self.slots, zero)
        return self._at(jax.tree.unflatten(jax.tree.structure(self.state), rest))

    def _step(self, rate, point, slots, grads):
        arguments = rate, point, slots, self.rest, grads
        with on_host():
            try:
                return _advance(self.optimizer, self.layout, arguments)
            except linear.NotLinearError:
                raise
            except Exception as error:
                raise linear.NotLinearError(
                    "optimizer must take gradients of the form of the parameters, got an "
                    f"error from its update: {error}"
                ) from error

    def at_count(self, count):
        """The machine with its counts set, but for those of schedules."""

        def set_count(node):
            return node if _is_schedule(node) else _counted(node, count)

        return self._at(jax.tree.map(set_count, self.state, is_leaf=_is_schedule))

    def at_scheduled(self, count):
        """The machine with the counts of schedules set."""

        def set_count(node):
            if not _is_schedule(node):
                return node
            return jax.tree.map(lambda leaf: _counted(leaf, count), node)

        return self._at(jax.tree.map(set_count, self.state, is_leaf=_is_schedule))

    def _at(self, state):
        return self._replace(state=state, rest=jax.tree.leaves(state))

    def before_last_step(self, slots):
        """The machine with the counts of these slots one lower."""
        held = {
            str(parent)
            for place, parent in zip(self.layout.places, self.parents, strict=True)
            if place is not None and place[0] in slots
        }
        rest = [
            _counted(leaf, max(int(leaf) - 1, 0))
            if str(parent) in held and _is_count(leaf)
            else leaf
            for leaf, parent in zip(self.rest, self.parents, strict=True)
        ]
        return self._at(jax.tree.unflatten(jax.tree.structure(self.state), rest))


def _is_schedule(node):
    return type(node).__name__ in SCHEDULED


def _is_count(leaf):
    return jnp.issubdtype(jnp.result_type(leaf), jnp.signedinteger) and not np.ndim(
        leaf
    )


def _counted(leaf, count):
    return np.asarray(count, jnp.result_type(leaf)) if _is_count(leaf) else leaf


def on_host():
    """Float64 on the CPU; links of others need not promote strictly."""
    stack = contextlib.ExitStack()
    stack.enter_context(jax.enable_x64(True))
    stack.enter_context(jax.numpy_dtype_promotion("standard"))
    stack.enter_context(jax.numpy_rank_promotion("allow"))
    stack.enter_context(jax.default_device(jax.local_devices(backend="cpu")[0]))
    return stack


def _advance(optimizer, layout, arguments):
    try:
        found = _traced_step(optimizer, layout, *arguments)
    except (jax.errors.ConcretizationTypeError, TypeError):
        # A rate that has to be a number.
        rate, *others = arguments
        found = _fixed_step(optimizer, layout, float(rate), *others)
    updates, slots, rest, rhos = found
    return np.asarray(updates), np.asarray(slots), rest, jax.tree.map(float, rhos)


def _step(optimizer, layout, rate, point, slots, rest, grads):
    tx = optax.with_extra_args_support(optimizer(rate))
    params = layout.tree(point)
    leaves = jax.tree.leaves(tx.init(params))
    leaves = [
        mine if fresh else given
        for mine, given, fresh in zip(leaves, rest, layout.is_fresh, strict=True)
    ]
    state = jax.tree.unflatten(layout.state, layout.put(leaves, slots))
    with linear.reading() as ascents:
        updates, state = tx.update(
            layout.tree(grads), state, params, value=jnp.ones(())
        )
    rhos = {name: jnp.asarray(rho, jnp.float64) for name, rho in ascents}
    leaves = jax.tree.leaves(state)
    return layout.vector(updates), layout.take(leaves), leaves, rhos


_traced_step = functools.partial(jax.jit, static_argnums=(0, 1))(_step)
_fixed_step = functools.partial(jax.jit, static_argnums=(0, 1, 2))(_step)


def machine(optimizer, params, opt_state):
    """The :class:`Machine` of an optimizer at a state; None: after very many steps."""
    with on_host():
        zeros = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), jnp.float64), params)
        tx = make(optimizer, 0.5)
        state = tx.init(zeros)
        places, parents = _places(tx, state, zeros)
        leaves, structure = jax.tree.flatten(state)
        others = jax.tree.leaves(make(optimizer, 0.25).init(zeros))
        is_fresh = [
            place is None and _differ(leaf, other)
            for place, leaf, other in zip(places, leaves, others, strict=True)
        ]
        given = leaves if opt_state is None else _given(opt_state, structure)
        shapes = tuple(jnp.shape(leaf) for leaf in jax.tree.leaves(params))
        layout = Layout(
            jax.tree.structure(params),
            shapes,
            structure,
            tuple(places),
            tuple(is_fresh),
        )
        pairs = zip(given, places, strict=True)
        slots = layout.take([np.asarray(x) if at else x for x, at in pairs], np)
    state = jax.tree.unflatten(structure, given)
    return Machine(optimizer, layout, slots, given, state, parents)


def _given(opt_state, structure):
    """Leaves of a user's state, floating ones in float64."""
    if jax.tree.structure(opt_state) != structure:
        raise ValueError(
            "opt_state must be the state of this optimizer for these parameters, got "
            f"{jax.tree.structure(opt_state)} where its init gives {structure}."
        )

    def widen(leaf):
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return np.asarray(leaf).astype("f8") if is_float else leaf

    return [widen(leaf) for leaf in jax.tree.leaves(opt_state)]


def _differ(leaf, other):
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating) and not np.array_equal(
        leaf, other, equal_nan=True
    )


def make(optimizer, rate):
    """The transformation at a rate."""
    if isinstance(optimizer, optax.GradientTransformation) or not callable(optimizer):
        raise TypeError(
            "optimizer must be a function of the learning rate, got "
            f"{type(optimizer).__name__}; write lambda rate: optax.sgd(rate, momentum=0.9)."
        )
    tx = optimizer(rate)
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            "optimizer must return an optax.GradientTransformation, got "
            f"{type(tx).__name__}; for MultiSteps give the optimizer inside of it, and the "
            "size of the whole batch."
        )
    return tx


def _places(tx, state, params):
    """For each leaf of a state its place among the slots, and the path of its parent."""
    structure = jax.tree.structure(params)
    indices = jax.tree.unflatten(structure, range(structure.num_leaves))
    before = _Mark(-1, structure.num_leaves)

    def mark(leaf, index):
        nonlocal before
        if isinstance(leaf, optax.MaskedNode):
            return leaf
        before = _Mark(before.slot + (index <= before.leaf), index)
        return before

    is_mark = lambda node: isinstance(node, _Mark)  # noqa: E731
    try:
        marked = optax.tree_map_params(
            tx,
            mark,
            state,
            indices,
            transform_non_params=lambda leaf: leaf,
            is_leaf=lambda node: isinstance(node, optax.MaskedNode),
        )
        found = jax.tree.leaves_with_path(marked, is_leaf=is_mark)
        _check_shapes([x for _, x in found], jax.tree.leaves(state), params)
    except (TypeError, ValueError) as error:
        raise linear.NotLinearError(
            "optimizer must keep copies of the parameters or single numbers, got one that "
            "keeps something else, such as factored second moments; "
            "use stability.critical_learning_rate, which takes any update."
        ) from error
    depths = [len(path) for path, _ in jax.tree.leaves_with_path(params)]
    places, parents = [], []
    for (path, found_mark), leaf in zip(found, jax.tree.leaves(state), strict=True):
        is_slot = is_mark(found_mark) and jnp.issubdtype(leaf.dtype, jnp.floating)
        depth = 1 + (depths[found_mark.leaf] if is_mark(found_mark) else 0)
        places.append(tuple(found_mark) if is_slot else None)
        parents.append(path[: max(len(path) - depth, 0)])
    return _merged(places), parents


def _check_shapes(marks, leaves, params):
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
    for mark, leaf in zip(marks, leaves, strict=True):
        if isinstance(mark, _Mark) and jnp.shape(leaf) != shapes[mark.leaf]:
            raise ValueError("a copy of the parameters of another shape")


def _merged(places):
    """Places with slots of different leaves made one: those of parts of the parameters."""
    leaves = {}
    for place in filter(None, places):
        leaves.setdefault(place[0], set()).add(place[1])
    merged, numbers = [], {}
    for slot, own in leaves.items():
        free = [k for k, taken in enumerate(merged) if not taken & own]
        if not free:
            merged.append(set())
        numbers[slot] = free[0] if free else len(merged) - 1
        merged[numbers[slot]] |= own
    return [place and (numbers[place[0]], place[1]) for place in places]


def without(tx, state, params, slots):
    """A state whose slots of these numbers are zero."""
    places, _ = _places(tx, state, params)
    leaves, structure = jax.tree.flatten(state)
    leaves = [
        jnp.zeros_like(leaf) if place is not None and place[0] in slots else leaf
        for leaf, place in zip(leaves, places, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


def parts(tx):
    """The links that a chain is made of, with their names, as far as can be told."""
    update, init = _closure(tx.update), _closure(tx.init)
    if "update_fns" in update and "init_fns" in init:
        pairs = zip(init["init_fns"], update["update_fns"], strict=True)
        links = [optax.GradientTransformationExtraArgs(*pair) for pair in pairs]
        return [part for link in links for part in parts(link)]
    inner = update.get("tx")
    if isinstance(inner, optax.GradientTransformation):  # with_extra_args_support
        return parts(inner)
    return [(getattr(tx.update, "__qualname__", "a link").split(".")[0], tx)]


def _closure(function):
    cells = getattr(function, "__closure__", None) or ()
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=False)}

"""One pass of a loss over NNX objects: what it is given, and which variables it changes.

The model and every NNX object among the arguments of the loss are the roots of one graph.
The variables of the model that ``wrt`` names are differentiated; all others are the rest.
"""

import functools
from typing import Any, NamedTuple

import jax
from flax import errors, nnx
from flax.nnx import filterlib

from flatopt._core import checks, signatures
from flatopt._core.types import LossFn


class Change(NamedTuple):
    """What one pass left in the variables that it changed, in place of their values."""

    paths: list[tuple[Any, ...]]
    values: list[Any]


@jax.tree_util.register_static
class Place:
    """Where an NNX object stands among the arguments of a loss."""

    def __init__(self, index):
        self.index = index

    def __eq__(self, other):
        return isinstance(other, Place) and self.index == other.index

    def __hash__(self):
        return hash(self.index)


class Pass:
    """A loss of a model as a function of the model's variables in ``wrt``.

    Attributes:
      roots: the model, then the NNX objects among the arguments.
      wrt: filter of the variables of the model to differentiate or perturb.
      params: these variables, an ``nnx.State``.
      rest: all other variables of the roots, an ``nnx.State``.
    """

    def __init__(self, loss_fn: LossFn, model, objects, wrt, noise_wrt=None):
        example = "loss_fn(model, batch)"
        checks.check_function(loss_fn, "loss_fn", example, count=1, more=True)
        signatures.check_order(loss_fn)
        check_model(model)
        self.loss_fn = loss_fn
        self.roots = (model, *objects)
        self.wrt = wrt if noise_wrt is None else nnx.Any(wrt, noise_wrt)
        for name, given in {"wrt": wrt, "noise_wrt": noise_wrt}.items():
            if given is not None:
                _check_filter(name, given, model)
        self.params = nnx.state(model, self.wrt)
        predicate = filterlib.to_predicate(self.wrt)
        parts: tuple[Any, ...] = nnx.split(
            self.roots, lambda path, x: path[0] == 0 and predicate(path[1:], x), ...
        )
        self.graphdef, _, self.rest = parts
        self._trained = {(0, *path) for path, _ in nnx.to_flat_state(self.params)}

    def flags(self, wrt):
        """A mask of ``params`` by a filter; None where it names them all."""
        predicate, flat = filterlib.to_predicate(wrt), nnx.to_flat_state(self.params)
        named = [bool(predicate(path, v)) for path, v in flat]
        if all(named):
            return None
        masks = [
            (path, _with_value(v, jax.tree.map(lambda _, flag=flag: flag, value_of(v))))
            for (path, v), flag in zip(flat, named, strict=True)
        ]
        return nnx.from_flat_state(masks)

    def select(self, grads, wrt):
        """Of a tree like ``params`` what a filter names."""
        if self.flags(wrt) is None:
            return grads
        predicate, flat = filterlib.to_predicate(wrt), nnx.to_flat_state(grads)
        return nnx.from_flat_state([(p, v) for p, v in flat if predicate(p, v)])

    def may_change(self) -> bool:
        """Whether there is any variable that a pass may change."""
        return bool(self._kept(self.roots))

    def run(self, params, rest, args, kwargs) -> tuple[Any, Change]:
        """Call the loss on a copy of the roots; the roots stay as they are."""
        flat = [((0, *path), v) for path, v in nnx.to_flat_state(params)]
        model, *objects = copies = nnx.merge(
            self.graphdef, nnx.from_flat_state(flat), rest, copy=True
        )
        before = {path: _leaves(v) for path, v in self._kept(copies).items()}
        args, kwargs = put_back((args, kwargs), objects)
        try:
            out = self.loss_fn(model, *args, **kwargs)
        except errors.TraceContextError as error:
            raise ValueError(
                "loss_fn changes an nnx object that is not among its arguments (it closes "
                "over it); pass Rngs, metrics and other models to loss_fn as arguments, "
                "as to nnx.value_and_grad."
            ) from error
        after = {p: v for p, v in self._kept(copies).items() if p in before}
        paths = [p for p, v in after.items() if not _same(before[p], _leaves(v))]
        return out, Change(paths, [value_of(after[p]) for p in paths])

    def write(self, change: Change) -> None:
        """Bring a change into the roots."""
        live = self._kept(self.roots)
        flat = [
            (path, _with_value(live[path], value))
            for path, value in zip(change.paths, change.values, strict=True)
        ]
        nnx.update(self.roots, nnx.from_flat_state(flat))

    def variables(self) -> dict[tuple[Any, ...], Any]:
        """The variables of the roots that a pass may change, by their paths."""
        return self._kept(self.roots)

    def _kept(self, roots):
        """All but what is trained, random keys and what is sown."""
        state = nnx.state(roots, nnx.Not(nnx.Any(nnx.RngKey, nnx.Intermediate)))
        flat = nnx.to_flat_state(state)
        return {path: v for path, v in flat if path not in self._trained}


def check_model(model):
    """Reject what is no NNX object, such as a batch or a loss in its place."""
    if not isinstance(model, nnx.Pytree | nnx.State | dict | list | tuple):
        raise TypeError(
            f"model must be an nnx.Module, got {checks.described(model)}; look at the order "
            "of the arguments."
        )


def take_out(arguments):
    """The NNX objects among arguments, and the arguments with a Place for each."""
    objects: list[Any] = []

    def place(x):
        if not _is_object(x):
            return x
        for index, known in enumerate(objects):
            if known is x:
                return Place(index)
        objects.append(x)
        return Place(len(objects) - 1)

    placed = jax.tree.map(place, arguments, is_leaf=_is_object)
    return (objects, placed) if objects else (objects, arguments)


def put_back(arguments, objects):
    """The inverse of :func:`take_out`, for these objects or their copies."""
    if not objects:
        return arguments
    is_place = lambda x: isinstance(x, Place)  # noqa: E731
    return jax.tree.map(
        lambda x: objects[x.index] if is_place(x) else x, arguments, is_leaf=is_place
    )


def fold_streams(rest, sample_key):
    """Random streams of their own for one draw of noise."""
    word = jax.random.bits(sample_key)

    def fold(variable):
        if not isinstance(variable, nnx.RngKey):
            return variable
        keys = variable[...]
        folded = jax.vmap(jax.random.fold_in, (0, None))(keys.reshape(-1), word)
        return variable.replace(folded.reshape(keys.shape))

    return jax.tree.map(fold, rest, is_leaf=lambda x: isinstance(x, nnx.Variable))


def parent(roots, path):
    """The object that holds the variable at a path."""

    def child(node, name):
        return getattr(node, name) if isinstance(name, str) else node[name]

    return functools.reduce(child, path[:-1], roots)


def given_sample_key(loss_fn, kwargs, key):
    """The keyword arguments, with a key if ``loss_fn`` names ``sample_key``."""
    named = signatures.names_keyword(loss_fn, "sample_key")
    return {**kwargs, "sample_key": key} if named else kwargs


def _is_object(x):
    """Whether x is an NNX object with variables; a batch may be one without."""
    if isinstance(x, nnx.Variable):
        return True
    return isinstance(x, nnx.Pytree) and any(
        isinstance(leaf, nnx.Variable) for _, leaf in nnx.to_flat_state(nnx.state(x))
    )


def value_of(x):
    return x.get_raw_value() if isinstance(x, nnx.Variable) else x


def _with_value(x, value):
    return x.replace(value) if isinstance(x, nnx.Variable) else value


def _check_filter(name, given, model):
    if not jax.tree.leaves(nnx.state(model, given)):
        kinds = {type(v).__name__ for _, v in nnx.to_flat_state(nnx.state(model))}
        raise ValueError(
            f"{name} names no variable of the model, got {given!r} for variables of the "
            f"types {', '.join(sorted(kinds)) or 'none at all'}; name those to train."
        )


def _leaves(x):
    return jax.tree.leaves(value_of(x))


def _same(before, after):
    """Whether a pass left a variable alone: it holds the very same arrays."""
    return len(before) == len(after) and all(
        x is y for x, y in zip(before, after, strict=True)
    )

"""What a state of an optimizer measured last, whatever is around the link."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flatopt.transforms import _skip, _states, _track

_SCALES = ("scale", "sigma", "gamma", "rho")
_STATES = (
    _states.SmoothGradientsState,
    _states.AdversarialState,
    _states.EntropySGDState,
    _track.TrackStabilityState,
    _skip.SkipNonfiniteState,
)


def loss(opt_state: Any) -> jax.Array:
    """Return the loss that a link of flatopt measured at its last update.

    That of ``value_fn`` as it was given: of the smoothed loss for
    :func:`smooth_gradients`, at the parameters before the step for the sharpness-aware
    links, on its first chunk for :func:`entropy_sgd_gradients`. Under loss scaling it is
    the scaled loss: divide it by the factor that ``value_fn`` multiplies with.

    Args:
      opt_state: a state of any chain that holds one link which makes a gradient: also
        inside of ``optax.masked``, ``optax.inject_hyperparams``, ``optax.MultiSteps``,
        :func:`skip_nonfinite`, or the optimizer of Flax NNX, its state or ``nnx.state`` of
        it.

    Returns:
      A scalar; infinite before the first update.

    Raises:
      ValueError: if no link in the state measures a loss, or more than one.

    Example:
      >>> import jax.numpy as jnp, flatopt
      >>> tx = flatopt.skip_nonfinite(flatopt.sam_sgd(0.1))
      >>> params = jnp.array([3.0, 4.0])
      >>> _, state = tx.update(
      ...     None, tx.init(params), params, value_fn=lambda p: jnp.sum(p ** 2))
      >>> flatopt.loss(state)
      Array(25., dtype=float32)
    """
    found = losses(opt_state)
    if not found:
        raise ValueError(
            "opt_state must hold a link that makes a gradient, got none in a "
            f"{type(opt_state).__name__}; give the state of an optimizer with a link such "
            "as flatopt.smooth_gradients or flatopt.sam_gradients."
        )
    _check_one("loss", found)
    return found[0]


def metrics(opt_state: Any) -> dict[str, jax.Array]:
    """Return what the links of flatopt in a state measured last, by name.

    - ``loss``, see :func:`loss`, of every link that makes a gradient;
    - ``scale`` of the noise, radius ``rho`` or pull ``gamma`` of the last update, schedule
      and all; 0 before the first one and before ``start_step``;
    - ``max_eigenvalue``, ``trace``, ``frobenius_norm``, ``eigenvalue_margin`` and
      ``frobenius_margin`` of :func:`track_stability`;
    - ``num_skipped`` of :func:`skip_nonfinite`.

    A name that two links measure is told apart by where they stand in the state:
    ``0/trace`` and ``1/trace`` in a chain, ``first/trace`` in ``optax.named_chain``.
    Nothing is computed and no device is waited for: call it inside of jit, or outside.

    Args:
      opt_state: as for :func:`loss`; with any number of links.

    Returns:
      A dict of scalars by name, sorted, to be logged; names that no link measures are
      absent.

    Example:
      >>> import jax.numpy as jnp, flatopt
      >>> tx = flatopt.skip_nonfinite(flatopt.nso_sgd(0.1, sigma=0.0))
      >>> params = jnp.array([3.0, 4.0])
      >>> _, state = tx.update(
      ...     None, tx.init(params), params, value_fn=lambda p: jnp.sum(p ** 2))
      >>> {name: float(value) for name, value in flatopt.metrics(state).items()}
      {'loss': 25.0, 'num_skipped': 0.0, 'scale': 0.0}
    """
    found = _measured(opt_state)
    named = {}
    for name in {name for _, name, _ in found}:
        same = [(path, value) for path, other, value in found if other == name]
        for label, (_, value) in zip(_labels([p for p, _ in same]), same, strict=True):
            named[label + name] = value
    return dict(sorted(named.items()))


def losses(opt_state):
    """What every link in a state measured of the loss, from the outermost inward."""
    return [value for _, name, value in _measured(opt_state) if name == "loss"]


def _labels(paths):
    """What tells paths apart, ``"a/"`` each: no more of them than is needed."""
    if len(paths) == 1:
        return [""]
    shared = 0
    while len({path[shared : shared + 1] for path in paths}) == 1:
        shared += 1
    end = shared + 1
    while len({path[shared:end] for path in paths}) < len(paths):
        end += 1
    return ["".join(f"{part}/" for part in path[shared:end]) for path in paths]


def _check_one(name, found):
    if len(found) > 1:
        raise ValueError(
            f"opt_state must hold one {name}, got {len(found)}; give the part of the "
            "state that belongs to one link, such as opt_state[0]."
        )


def one_state(opt_state, kind, name):
    """The one state of a kind in a state of any optimizer."""
    found = []

    def visit(node):
        if isinstance(node, kind):
            found.append(node)
        else:
            for _, child in _children(node):
                visit(child)

    visit(getattr(opt_state, "opt_state", opt_state))
    if len(found) != 1:
        raise ValueError(
            f"opt_state must hold one state of {name}, got {len(found)} in a "
            f"{type(opt_state).__name__}; give what its update returned."
        )
    return found[0]


def _measured(state):
    """Path, name and value of all that was measured, from the outermost state inward."""
    state = getattr(state, "opt_state", state)  # an optimizer, a train state
    found = []

    def visit(node, path):
        node = _as_state(node)
        start = len(found)
        if hasattr(node, "metrics"):
            found.extend((path, name, array(x)) for name, x in node.metrics().items())
        for part, child in _children(node):
            visit(child, (*path, part))
        hyperparams = _part(node, "hyperparams")
        if isinstance(hyperparams, Mapping):
            # Links say their own; what is left are those that measure nothing.
            told = {name for _, name, _ in found[start:]}
            if not told & {*_SCALES}:
                names = [name for name in _SCALES if name in hyperparams]
                found.extend((path, name, array(hyperparams[name])) for name in names)

    visit(state, ())
    return found


def _as_state(node):
    """A state of ours from a dict of its fields, as nnx.state and checkpoints hold it."""
    if not isinstance(node, Mapping):
        return node
    states = []
    for kind in _STATES:
        needed = [name for name in kind._fields if name not in kind._field_defaults]
        if all(name in node for name in needed):
            given = [name for name in kind._fields if name in node]
            states.append(kind(**{name: node[name] for name in given}))
    # Two kinds may need the same fields: the one that takes more of them is meant.
    return max(states, key=lambda state: _num_of(state, node), default=node)


def _num_of(state, node):
    return sum(name in node for name in state._fields)


def _part(node, name):
    if isinstance(node, Mapping):
        return node.get(name)
    return getattr(node, name, None)


def _children(node):
    """Pairs of a name and a child: index, key or field."""
    if isinstance(node, Mapping):
        return list(node.items())
    # One level: what is not the node itself is a leaf.
    leaves = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda x: x is not node)
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in leaves
        if leaf is not node
    ]


def array(value):
    """An array, out of a variable of Flax NNX if it is in one."""
    return jnp.asarray(value.get_value() if hasattr(value, "get_value") else value)

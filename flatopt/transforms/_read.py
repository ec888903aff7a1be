"""What a state of an optimizer measured last, whatever is around the link."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flatopt.transforms import _skip, _states, _track

_SCALES = ("scale", "sigma", "gamma", "rho")
_STATES = (
    _states.SmoothGradientsState,
    _states.AdversarialState,  # of the fields of an EntropySGDState
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

    ``loss`` (see :func:`loss`); of :func:`track_stability` ``max_eigenvalue``, ``trace``,
    ``frobenius_norm``, ``eigenvalue_margin`` and ``frobenius_margin``; of
    :func:`skip_nonfinite` ``num_skipped``; and ``scale``, ``sigma``, ``gamma`` or ``rho``
    where ``optax.inject_hyperparams`` keeps it in the state.

    Args:
      opt_state: as for :func:`loss`.

    Returns:
      A dict of scalars, to be logged; names that no link measures are absent.

    Raises:
      ValueError: if two links measure the same.

    Example:
      >>> import jax.numpy as jnp, flatopt
      >>> tx = flatopt.skip_nonfinite(flatopt.nso_sgd(0.1, sigma=0.0))
      >>> params = jnp.array([3.0, 4.0])
      >>> _, state = tx.update(
      ...     None, tx.init(params), params, value_fn=lambda p: jnp.sum(p ** 2))
      >>> flatopt.metrics(state)
      {'loss': Array(25., dtype=float32), 'num_skipped': Array(0, dtype=int32)}
    """
    pairs = measured(opt_state)
    for name in {name for name, _ in pairs}:
        _check_one(name, [value for other, value in pairs if other == name])
    return dict(sorted(pairs, key=lambda pair: pair[0]))


def losses(opt_state):
    """What every link in a state measured of the loss, from the outermost inward."""
    return [value for name, value in measured(opt_state) if name == "loss"]


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
            for child in _children(node):
                visit(child)

    visit(getattr(opt_state, "opt_state", opt_state))
    if len(found) != 1:
        raise ValueError(
            f"opt_state must hold one state of {name}, got {len(found)} in a "
            f"{type(opt_state).__name__}; give what its update returned."
        )
    return found[0]


def measured(state):
    """All pairs of a name and a value, from the outermost state inward."""
    state = getattr(state, "opt_state", state)  # an optimizer, a train state
    pairs = []

    def visit(node):
        node = _as_state(node)
        if hasattr(node, "metrics"):
            pairs.extend((name, array(x)) for name, x in node.metrics().items())
        hyperparams = _part(node, "hyperparams")
        if isinstance(hyperparams, Mapping):
            names = [name for name in _SCALES if name in hyperparams]
            pairs.extend((name, array(hyperparams[name])) for name in names)
        for child in _children(node):
            visit(child)

    visit(state)
    return pairs


def _as_state(node):
    """A state of ours from a dict of its fields, as nnx.state and checkpoints hold it."""
    if not isinstance(node, Mapping):
        return node
    for kind in _STATES:
        needed = [name for name in kind._fields if name not in kind._field_defaults]
        if all(name in node for name in needed):
            given = [name for name in kind._fields if name in node]
            return kind(**{name: node[name] for name in given})
    return node


def _part(node, name):
    if isinstance(node, Mapping):
        return node.get(name)
    return getattr(node, name, None)


def _children(node):
    if isinstance(node, Mapping):
        return list(node.values())
    # One level: what is not the node itself is a leaf.
    leaves = jax.tree.leaves(node, is_leaf=lambda x: x is not node)
    return [leaf for leaf in leaves if leaf is not node]


def array(value):
    """An array, out of a variable of Flax NNX if it is in one."""
    return jnp.asarray(value.get_value() if hasattr(value, "get_value") else value)

"""What a state of an optimizer measured last, whatever is around the link."""

from typing import Any

import jax
import jax.numpy as jnp

_SCALES = ("scale", "sigma", "gamma", "rho")


def loss(opt_state: Any) -> jax.Array:
    """Return the loss that a link of flatopt measured at its last update.

    That of ``value_fn`` as it was given: of the smoothed loss for
    :func:`smooth_gradients`, at the parameters before the step for the sharpness-aware
    links, on its first chunk for :func:`entropy_sgd_gradients`. Under loss scaling it is
    the scaled loss: divide it by the factor that ``value_fn`` multiplies with.

    Args:
      opt_state: a state of any chain that holds one link which makes a gradient: also
        inside of ``optax.masked``, ``optax.inject_hyperparams``, ``optax.MultiSteps``,
        :func:`skip_nonfinite`, or the optimizer of Flax NNX or its state.

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
    measured = _measured(opt_state)
    for name in {name for name, _ in measured}:
        _check_one(name, [value for other, value in measured if other == name])
    return dict(sorted(measured, key=lambda pair: pair[0]))


def losses(opt_state):
    """What every link in a state measured of the loss, from the outermost inward."""
    return [value for name, value in _measured(opt_state) if name == "loss"]


def _check_one(name, found):
    if len(found) > 1:
        raise ValueError(
            f"opt_state must hold one {name}, got {len(found)}; give the part of the "
            "state that belongs to one link, such as opt_state[0]."
        )


def _measured(state):
    """All pairs of a name and a value, from the outermost state inward."""
    state = getattr(state, "opt_state", state)  # an optimizer, a train state
    pairs = []

    def visit(node):
        if hasattr(node, "metrics"):
            pairs.extend((name, _array(x)) for name, x in node.metrics().items())
        hyperparams = getattr(node, "hyperparams", None)
        if isinstance(hyperparams, dict):
            names = [name for name in _SCALES if name in hyperparams]
            pairs.extend((name, _array(hyperparams[name])) for name in names)
        for child in _children(node):
            visit(child)

    visit(state)
    return pairs


def _children(node):
    # One level: what is not the node itself is a leaf.
    leaves = jax.tree.leaves(node, is_leaf=lambda x: x is not node)
    return [leaf for leaf in leaves if leaf is not node]


def _array(value):
    """An array, out of a variable of Flax NNX if it is in one."""
    return jnp.asarray(value.get_value() if hasattr(value, "get_value") else value)

"""A chain that knows which links have to come first."""

import optax

from flatopt.transforms import _link, _read


def chain(
    *transformations: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Chain transformations as ``optax.chain``; refuse a link in the wrong place.

    A link that makes a gradient does not read what comes in: whatever stands before it has
    no effect, and after an optimizer it would ascend. ``optax.chain`` cannot know that.

    Args:
      *transformations: as for ``optax.chain``; of flatopt's, at most one that makes a
        gradient, at the front or after :func:`track_stability`, which alone leaves updates
        as they are.

    Returns:
      The transformation ``optax.chain(*transformations)``.

    Raises:
      TypeError: for what is no gradient transformation.
      ValueError: if a transformation stands before a link that would discard its result;
        raised by ``init`` for a link inside of a wrapper, as ``optax.inject_hyperparams``.

    Example:
      >>> import optax, flatopt
      >>> tx = flatopt.chain(flatopt.sam_gradients(0.05), optax.sgd(0.1))
      >>> try:
      ...     flatopt.chain(optax.sgd(0.1), flatopt.sam_gradients(0.05))
      ... except ValueError as error:
      ...     print(str(error).split(",")[0])
      sam_gradients must come first in a chain
    """
    before = 0
    for transformation in transformations:
        _link.check_transformation(transformation)
        name = getattr(transformation.update, "makes_gradient", None)
        if name is not None:
            _check_first(name, f"{name}(...)", before)
        before += not getattr(transformation.update, "keeps_updates", False)
    tx = optax.chain(*transformations)
    names = [getattr(t.update, "makes_gradient", None) for t in transformations]
    name = next((name for name in names if name is not None), None)
    update_fn = tx.update if name is None else _link.makes_gradient(tx.update, name)

    def init_fn(params):
        states = tx.init(params)
        _check_states(states, transformations)
        return states

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_first(name, example, before):
    if before:
        plural = "" if before == 1 else "s"
        raise ValueError(
            f"{name} must come first in a chain, got {before} transformation{plural} "
            f"before it whose result it would discard; write flatopt.chain({example}, "
            "optimizer)."
        )


def _check_states(states, transformations):
    """The same order by states: the mark of a link is lost where a wrapper is around it."""
    before = 0
    for state, transformation in zip(states, transformations, strict=True):
        if _read.losses(state):
            _check_first("the link that measures a loss", "link", before)
        before += not getattr(transformation.update, "keeps_updates", False)

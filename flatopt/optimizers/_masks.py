"""The optimizers of the recipes: what is trained and what decays are two masks."""

import jax
import optax

from flatopt._core import checks, trees
from flatopt.transforms import chain


def recipe(*transformations):
    """A chain that is a whole optimizer, and says so to what would put another after it."""
    tx = chain(*transformations)
    tx.update.is_optimizer = True
    return tx


def check_rates(learning_rate, weight_decay):
    """Reject what is no rate; optax would ascend by a negative one."""
    for name, given in zip(
        ("learning_rate", "weight_decay"), (learning_rate, weight_decay), strict=True
    ):
        if not callable(given):
            checks.check_scale(given, name)


def sgd(learning_rate, *, weight_decay, weight_decay_mask, mask, **options):
    check_rates(learning_rate, weight_decay)
    return optax.chain(
        optax.add_decayed_weights(weight_decay, _both(mask, weight_decay_mask)),
        _masked(optax.sgd(learning_rate, **options), mask),
    )


def adamw(learning_rate, *, weight_decay, weight_decay_mask, mask, **options):
    """``optax.adamw``, link by link: decay has a mask of its own."""
    check_rates(learning_rate, weight_decay)
    if mask is None:
        decays = _both(None, weight_decay_mask)
        return optax.adamw(
            learning_rate, weight_decay=weight_decay, mask=decays, **options
        )
    return optax.chain(
        _masked(optax.scale_by_adam(**options), mask),
        optax.add_decayed_weights(weight_decay, _both(mask, weight_decay_mask)),
        optax.scale_by_learning_rate(learning_rate),
    )


def _both(mask, weight_decay_mask):
    """The leaves that are trained and decay, as a function of parameters; None: all."""
    named = {"mask": mask, "weight_decay_mask": weight_decay_mask}
    named = {name: given for name, given in named.items() if given is not None}
    if not named:
        return None

    def flags(params):
        # No leaf may decay: a rule such as "matrices alone" may meet vectors alone.
        lists = [trees.flags_of(given, params, name) for name, given in named.items()]
        both = [all(flags) for flags in zip(*lists, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(params), both)

    return flags


def _masked(tx, mask):
    return tx if mask is None else optax.masked(tx, _both(mask, None))

"""Loss scaling: which links give the same gradient for a loss that is multiplied."""

import pathlib
import re

import jax
import numpy as np
import optax
import pytest
from helpers import (
    TRANSFORMATIONS,
    leaves_array,
    loss_fn,
    regression,
    transformation,
)

import flatopt

FACTOR = 2.0**10
PAGE = pathlib.Path(__file__).parent.parent / "docs" / "loss_scaling.md"
LINKS = [
    name
    for name, row in TRANSFORMATIONS.items()
    if row.needs_value_fn
    and not (row.is_optimizer or row.is_last)
    and name not in ("track_stability", "chain")
]


def documented():
    """Names of links in the table of the page, by its first word: invariant or not."""
    rows = re.findall(r"^\| (the same|another) \| (.*?) \|", PAGE.read_text(), re.M)
    return {word: set(re.findall(r"`(\w+)`", names)) for word, names in rows}


def _runs(make, *cases, steps=3):
    """Where a few steps lead, for each case of a factor of the loss and a number."""
    start, batch = regression()

    def chained(factor, number):
        return flatopt.chain(make(number), optax.scale(1 / factor), optax.sgd(0.1))

    @jax.jit
    def step(params, state, factor, number):
        def value_fn(params, batch):
            return factor * loss_fn(params, batch)

        updates, state = chained(factor, number).update(
            None, state, params, value_fn=value_fn, batch=batch
        )
        return optax.apply_updates(params, updates), state

    for case in cases:
        params, state = start, chained(*case).init(start)
        for _ in range(steps):
            params, state = step(params, state, *case)
        yield leaves_array(params)


@pytest.mark.parametrize("name", LINKS)
def test_the_page_says_which_links_do_not_mind(name, standard_promotion):
    make = lambda _: transformation(name)  # noqa: E731
    plain, scaled = _runs(make, (1.0, 0.0), (FACTOR, 0.0))
    same = np.allclose(plain, scaled, rtol=1e-5, atol=1e-6)
    word = "the same" if same else "another"
    assert name in documented()[word], np.abs(plain - scaled).max()


@pytest.mark.parametrize(
    ("make", "number", "other"),
    [
        (flatopt.usam_gradients, 0.1, 0.1 / FACTOR),
        (lambda eta: flatopt.arwp_gradients(0.1, eta), 0.5, 0.5 / FACTOR**2),
    ],
)
def test_other_numbers_bring_the_method_back(make, number, other, standard_promotion):
    plain, scaled = _runs(make, (1.0, number), (FACTOR, other))
    np.testing.assert_allclose(plain, scaled, rtol=1e-5, atol=1e-6)


@pytest.mark.heart
def test_the_page_names_links_that_there_are():
    names = [name for group in documented().values() for name in group]
    assert len(names) == len(set(names))
    assert all(hasattr(flatopt, name) for name in names)
    assert {*LINKS} <= {*names}

"""Links on a part of a layer: the axes of its filters show in the whole layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatopt
from flatopt import kernels

# The bias tells that a kernel of attention has two output axes; it is masked out.
RNG = np.random.default_rng(0)
KERNEL, WEIGHTS = RNG.normal(size=(4, 2, 3)), RNG.uniform(1, 3, size=(4, 2, 3))
PARAMS = {
    "query": {"kernel": jnp.asarray(KERNEL, jnp.float32), "bias": jnp.ones((2, 3))}
}
RHO, SIGMA, ETA = 0.3, 0.1, 0.05


def _loss(params):
    layer = params["query"]
    weights = jnp.asarray(WEIGHTS, jnp.float32)
    return jnp.sum(weights * layer["kernel"] ** 2) / 2 + jnp.sum(layer["bias"])


def _gradient(kernel):
    return WEIGHTS * kernel


def _norms(kernel):
    return np.sqrt((kernel**2).sum(axis=0, keepdims=True))


def _largest(kernel):
    return np.abs(kernel).max(axis=0, keepdims=True)


def _noise(step, scales):
    """Normal values by the path of the leaf, in units of its filters."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), step), 0)
    return scales * np.asarray(kernels.isotropic()(key, PARAMS)["query"]["kernel"])


def _ascent(gradient):
    return RHO * gradient / np.linalg.norm(gradient)


def _filterwise_asam():
    sizes = _norms(KERNEL) + ETA
    return _gradient(KERNEL + sizes * _ascent(sizes * _gradient(KERNEL)))


def _noisy_sam(scales):
    there = _gradient(KERNEL + SIGMA * _noise(0, scales))
    return _gradient(KERNEL + _ascent(there))


LINKS = {
    "filterwise_asam": (
        flatopt.filterwise_asam_gradients(RHO, ETA, mask="query/kernel"),
        _filterwise_asam,
    ),
    "random_sam": (
        flatopt.random_sam_gradients(RHO, SIGMA, mask="query/kernel", key=3),
        lambda: _noisy_sam(_norms(KERNEL)),
    ),
    "noisy_sam": (
        flatopt.noisy_sam_gradients(
            RHO, SIGMA, kernels.relative_to_max(), mask="query/kernel", key=3
        ),
        lambda: _noisy_sam(_largest(KERNEL)),
    ),
}


@pytest.mark.parametrize("name", LINKS)
def test_units_are_those_of_the_filters_of_the_whole_layer(name):
    tx, expected = LINKS[name]
    updates, _ = tx.update(None, tx.init(PARAMS), PARAMS, value_fn=_loss)
    np.testing.assert_allclose(updates["query"]["kernel"], expected(), rtol=1e-4)
    assert not updates["query"]["bias"].any()


@pytest.mark.heart
def test_arwp_remembers_one_number_a_filter_of_the_whole_layer():
    tx = flatopt.arwp_gradients(
        SIGMA, 2.0, 0.9, clean_weight=None, mask="query/kernel", key=3
    )
    state, memory = tx.init(PARAMS), np.zeros((1, 2, 3))
    assert state.memory["query"]["kernel"].shape == memory.shape
    for step in range(2):
        updates, state = tx.update(None, state, PARAMS, value_fn=_loss)
        noise = _noise(step, _norms(KERNEL)) / np.sqrt(1 + 2 * memory)
        found = _gradient(KERNEL + SIGMA * noise)
        np.testing.assert_allclose(updates["query"]["kernel"], found, rtol=1e-4)
        memory = 0.9 * memory + (found**2).sum(axis=0, keepdims=True)
        np.testing.assert_allclose(state.memory["query"]["kernel"], memory, rtol=1e-4)


def _function(key, params):
    return kernels.filterwise()(key, params)


USERS = {
    "a function": _function,
    "a kernel of its own": kernels.Kernel(
        lambda key, params: kernels.filterwise().bind(key, params)
    ),
    "masked": kernels.masked(_function, "query/kernel"),
    "a function of a masked one": lambda key, params: kernels.masked(
        _function, "query/kernel"
    )(key, params),
    "one layer at a time": kernels.one_layer(_function),
}


@pytest.mark.parametrize("name", USERS)
def test_kernels_of_users_see_the_whole_layer(name):
    tx = flatopt.smooth_gradients(
        SIGMA, USERS[name], num_samples=1, mask="query/kernel", key=3
    )
    updates, _ = tx.update(None, tx.init(PARAMS), PARAMS, value_fn=_loss)
    expected = _gradient(KERNEL + SIGMA * _noise(0, _norms(KERNEL)))
    np.testing.assert_allclose(updates["query"]["kernel"], expected, rtol=1e-4)


def test_filters_of_another_tree_are_its_own():
    """A kernel may be drawn at leaves that are none of the step's."""

    def of_another(key, params):
        kernel = params["query"]["kernel"]
        noise = kernels.filterwise()(key, {"other": kernel})["other"]
        seen.append(noise / kernels.isotropic()(key, {"other": kernel})["other"])
        return {"query": {**params["query"], "kernel": noise}}

    seen = []
    tx = flatopt.smooth_gradients(
        SIGMA, of_another, num_samples=1, mask="query/kernel", key=3
    )
    tx.update(None, tx.init(PARAMS), PARAMS, value_fn=_loss)
    last_axis = np.sqrt((KERNEL**2).sum(axis=(0, 1), keepdims=True))
    np.testing.assert_allclose(seen[0], last_axis + 0 * KERNEL, rtol=1e-4)

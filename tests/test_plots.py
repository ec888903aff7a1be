"""Figures show the numbers they are given."""

import importlib
import sys

import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest

import flatopt
from flatopt import curvature, kernels, plots, stability

mpl.use("agg")
KEY = jax.random.key(0)
PARAMS = {"a": jnp.array([[1.0, 2.0], [0.0, 2.0]]), "b": jnp.array([3.0])}


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def loss_fn(params, batch):
    return jnp.mean(batch) * (jnp.sum(params["a"] ** 2) + 2 * jnp.sum(params["b"] ** 2))


@pytest.mark.heart
@pytest.mark.parametrize("data", [jnp.ones(3), [jnp.ones(2), jnp.ones(1)]])
def test_lines_and_planes_go_along_draws_of_the_kernel(data):
    ax = plots.loss_line(loss_fn, PARAMS, KEY, radius=0.5, num_points=5, data=data)
    steps, losses = ax.lines[0].get_data()
    key = jax.random.split(KEY, 1)[0]
    direction = kernels.filterwise()(key, PARAMS)
    for step, found in zip(steps, losses, strict=True):
        moved = jax.tree.map(lambda p, d, s=step: p + s * d, PARAMS, direction)
        np.testing.assert_allclose(found, loss_fn(moved, jnp.ones(1)), rtol=1e-5)
    ax = plots.loss_plane(loss_fn, PARAMS, KEY, num_points=4, data=data)
    assert ax.collections


@pytest.mark.parametrize("data", [jnp.ones(3), [jnp.ones(2), jnp.ones(1)]])
def test_a_line_leads_from_one_network_to_another(data):
    other = {"a": jnp.ones((2, 2), jnp.bfloat16), "b": jnp.array([-1.0])}
    ax = plots.loss_line(loss_fn, PARAMS, to=other, num_points=5, data=data)
    shares, losses = ax.lines[0].get_data()
    np.testing.assert_allclose(shares, np.linspace(0, 1, 5))
    for share, found in zip(shares, losses, strict=True):
        a = (1 - share) * np.asarray(PARAMS["a"]) + share
        b = 3 - 4 * share
        np.testing.assert_allclose(found, (a**2).sum() + 2 * b**2, rtol=1e-5)
    with pytest.raises(ValueError, match="to must have the structure and shapes of"):
        plots.loss_line(loss_fn, PARAMS, to={"a": jnp.ones(4), "b": jnp.ones(1)})
    with pytest.raises(TypeError, match="key must be one JAX random key, got None"):
        plots.loss_line(loss_fn, PARAMS, data=jnp.ones(3))


def test_bars_are_the_traces_of_the_layers():
    operator = curvature.hessian(loss_fn, PARAMS, jnp.ones(2))
    ax = plots.layer_traces(curvature.probe(operator, KEY))
    widths = [bar.get_width() for bar in ax.patches]
    np.testing.assert_allclose(widths, [8, 4], rtol=1e-4)


def test_radii_are_drawn_with_their_rises_and_what_is_suggested():
    kernel = kernels.isotropic(kernels.signs)
    found = flatopt.radius(loss_fn, PARAMS, KEY, kernel=kernel, data=jnp.ones(2))
    ax = plots.radius(found)
    radii, rises = ax.lines[0].get_data()
    np.testing.assert_allclose(radii, found.radii)
    np.testing.assert_allclose(rises, 6 * radii**2, atol=1e-5)  # half of the trace
    assert not [line for line in ax.lines if line.get_gid() == "try"]
    found = flatopt.radius(loss_fn, PARAMS, KEY, method="sam", data=jnp.ones(2))
    ax = plots.radius(found)
    tried = [line.get_xdata()[0] for line in ax.lines if line.get_gid() == "try"]
    np.testing.assert_allclose(tried, found.bracket)


def test_the_density_integrates_to_one():
    operator = curvature.hessian(loss_fn, PARAMS, jnp.ones(2))
    density = curvature.spectral_density(operator, KEY)
    ax = plots.spectral_density(density, ax=plt.subplots()[1])
    points, heights = ax.lines[0].get_data()
    assert abs(np.trapezoid(heights, points) - 1) < 1e-2
    same = curvature.SpectralDensity(np.ones((1, 1)), np.ones((1, 1)))
    assert plots.spectral_density(same).lines


@pytest.mark.heart
def test_threshold_curves_are_the_thresholds():
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)
    lin = stability.linearize(lambda w, x: x @ w, jnp.ones(3), rows, jnp.zeros(6))
    ax = plots.stability_thresholds(lin, learning_rate=0.1, batch_size=2)
    lines = {line.get_label(): line for line in ax.lines}
    sizes, rates = lines["mean square (exact)"].get_data()
    assert list(sizes) == [1, 2, 4, 6]
    for size, rate in zip(sizes, rates, strict=True):
        expected = stability.thresholds(lin, int(size)).mean_square
        np.testing.assert_allclose(rate, expected, rtol=1e-6)
    assert lines["this setting"].get_data()[1][0] == 0.1


def test_the_plane_shows_the_norm_over_its_bound_and_losses_their_mean():
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)
    lin = stability.linearize(lambda w, x: x @ w, jnp.ones(3), rows, jnp.zeros(6))
    axes = plots.stability_report(lin, 0.2, 2)
    assert [ax.get_ylabel() for ax in axes[:2]] == ["learning rate"] * 2
    norm = np.linalg.norm(lin.eigenvalues)
    mu = stability.alignment(lin).mu
    colors, line = axes[1].collections[:2]
    points = line.get_paths()[0].vertices  # where the norm is at its bound
    batches = points[:, 0]
    p = (6 - batches) / (batches * 5)
    near = np.isin(batches, [1, 2, 4])
    assert near.any()
    np.testing.assert_allclose(
        points[near, 1], (1 / (norm * np.sqrt(p * mu)))[near], rtol=0.02
    )
    exact = stability.expected_losses(lin, 0.2, 2, 100)
    np.testing.assert_allclose(axes[2].lines[0].get_ydata(), exact, rtol=1e-5)


def _lin():
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)
    return stability.linearize(lambda w, x: x @ w, jnp.ones(3), rows, jnp.zeros(6))


def test_stability_is_drawn_for_the_optimizer_that_is_asked_about():
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    lin = stability.linearize(lambda w, x: x @ w, jnp.zeros(3), rows, jnp.zeros(8))

    def momentum(rate):
        return optax.sgd(rate, momentum=0.9)

    limits = [
        stability.thresholds(lin, size, optimizer=momentum).mean_square
        for size in (1, 4)
    ]
    ax = plots.stability_thresholds(lin, batch_sizes=[1, 4], optimizer=momentum)
    drawn = {line.get_label(): line.get_ydata() for line in ax.lines}
    assert set(drawn) == {"gradient descent", "mean square (exact)"}
    np.testing.assert_allclose(drawn["mean square (exact)"], limits, rtol=1e-5)
    ax = plots.stability_plane(lin, batch_sizes=[1, 4], optimizer=momentum)
    top = np.linalg.eigvalsh(np.asarray(rows.T @ rows) / 8)[-1]
    labels = {line.get_label(): line.get_ydata() for line in ax.lines}
    np.testing.assert_allclose(labels["all data in one batch"][0], 3.8 / top, rtol=1e-4)
    ax = plots.stability_losses(lin, limits[0], 1, num_steps=5, optimizer=momentum)
    expected = stability.expected_losses(lin, limits[0], 1, 5, optimizer=momentum)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), expected)
    axes = plots.stability_report(lin, limits[0], 1, optimizer=momentum)
    assert "log10 of learning rate" in axes[1].figure.axes[-1].get_ylabel()


def test_wrong_settings_are_one_sentence():
    lin = _lin()
    with pytest.raises(ValueError, match="learning_rate must be positive, got 0"):
        plots.stability_report(lin, 0, 2)
    with pytest.raises(TypeError, match="got a function; evaluate a schedule"):
        plots.stability_losses(lin, lambda count: 0.1, 2)
    with pytest.raises(ValueError, match="batch_size must be at most .*, 6, got 7"):
        plots.stability_thresholds(lin, learning_rate=0.1, batch_size=7)
    with pytest.raises(ValueError, match="mark a setting together, got 0.1 and None"):
        plots.stability_plane(lin, learning_rate=0.1)
    with pytest.raises(ValueError, match="batch_sizes must hold batch sizes, got none"):
        plots.stability_plane(lin, batch_sizes=[])
    with pytest.raises(ValueError, match="mu must be positive, got 0"):
        plots.stability_plane(lin, mu=0)
    with pytest.raises(TypeError, match="key must be one JAX random key, got 0"):
        plots.loss_line(loss_fn, PARAMS, 0, data=jnp.ones(3))
    with pytest.raises(ValueError, match="radius must be positive, got -1"):
        plots.loss_line(loss_fn, PARAMS, KEY, radius=-1, data=jnp.ones(3))
    with pytest.raises(ValueError, match="num_points must be at least 2 for a line"):
        plots.loss_plane(loss_fn, PARAMS, KEY, num_points=1, data=jnp.ones(3))
    with pytest.raises(ValueError, match="one leading axis"):
        plots.loss_line(loss_fn, PARAMS, KEY, data=(jnp.ones(3), jnp.ones((1, 3))))


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    for name in [n for n in sys.modules if n.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "flatopt.plots")
    with pytest.raises(ImportError, match=r"pip install 'flatopt\[plot\]'"):
        importlib.import_module("flatopt.plots")


@pytest.mark.parametrize("draw", [plots.loss_line, plots.loss_plane])
@pytest.mark.parametrize("data", [None, [jnp.ones(3), jnp.ones(3)]])
def test_a_loss_that_is_no_number_is_one_sentence(draw, data):
    figures = plt.get_fignums()

    def loss_fn(params, batch=None):
        del batch
        return jnp.sum(params) * jnp.nan

    with pytest.raises(ValueError, match="finite at none of the .* got nan in the mid"):
        draw(loss_fn, jnp.ones(2), jax.random.key(0), num_points=3, data=data)
    assert plt.get_fignums() == figures

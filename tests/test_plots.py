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
import scipy.stats

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


def _well(params, batch):
    """Two minima at -1 and 1 of depth 0 and 0.5, with 1.25 between them at 0."""
    x = params["a"][0, 0]
    return jnp.mean(batch) * ((x**2 - 1) ** 2 + (x + 1) / 4) + 0 * jnp.sum(params["b"])


def _at(x, b=0.0):
    return {"a": jnp.zeros((2, 2)).at[0, 0].set(x), "b": jnp.full(1, b)}


def _barrier(ax):
    (line,) = [line for line in ax.lines if line.get_gid() == "barrier"]
    return line


@pytest.mark.parametrize("data", [jnp.ones(3), [jnp.ones(2), jnp.ones(1)]])
def test_the_barrier_is_the_rise_above_the_straight_line(data):
    ax = plots.loss_line(_well, _at(-1.0), to=_at(1.0, 3.0), num_points=101, data=data)
    line = _barrier(ax)
    np.testing.assert_allclose(line.get_xdata(), 0.5, atol=1e-6)
    np.testing.assert_allclose(line.get_ydata(), [0.25, 1.25], rtol=1e-6)
    assert line.get_label() == "barrier 1"


def test_convex_and_broken_ways_have_no_barrier():
    ax = plots.loss_line(loss_fn, PARAMS, to=_at(1.0), num_points=11, data=jnp.ones(3))
    assert _barrier(ax).get_label() == "no barrier"

    def root(params):
        return jnp.sqrt(params["a"][0, 0])

    ax = plots.loss_line(root, _at(-1.0), to=_at(1.0), num_points=11)
    assert _barrier(ax).get_label() == "barrier not finite"
    with pytest.raises(ValueError, match="radius belongs to random .* beside to"):
        plots.loss_line(root, _at(-1.0), to=_at(1.0), radius=2.0)


MATRIX = np.diag([6.0, 3.0, 2.0, 1.0, 0.5])
MATRIX[0, 1] = MATRIX[1, 0] = 1.0


def _quadratic(params, batch=None):
    del batch
    flat = jnp.concatenate([params["a"].ravel(), params["b"]])
    return flat @ jnp.asarray(MATRIX, jnp.float32) @ flat / 2


def _unflat(rows):
    """Vectors as a tree like PARAMS with a leading axis."""
    rows = jnp.asarray(rows, jnp.float32)
    return {"a": rows[:, :4].reshape(-1, 2, 2), "b": rows[:, 4:]}


ORIGIN = np.array([1.0, 2.0, 0.0, 2.0, 3.0])  # PARAMS, flat
PATH = ORIGIN + np.random.default_rng(0).normal(size=(6, 5)) * [4, 2, 1, 0.5, 0.2]


@pytest.fixture
def filled(monkeypatch):
    """What contourf was given, as (across, up, losses)."""
    found = []
    contourf = mpl.axes.Axes.contourf

    def spy(ax, across, up, losses, **options):
        found.append((across, up, losses))
        return contourf(ax, across, up, losses, **options)

    monkeypatch.setattr(mpl.axes.Axes, "contourf", spy)
    return found


def _check_plane(grid, origin, rows):
    across, up, losses = grid
    for i, y in enumerate(up):
        for j, x in enumerate(across):
            point = origin + x * rows[0] + y * rows[1]
            truth = point @ MATRIX @ point / 2
            np.testing.assert_allclose(losses[i, j], truth, rtol=1e-4, atol=1e-4)


@pytest.mark.heart
@pytest.mark.parametrize("form", ["stacked", "listed", "bfloat16"])
def test_a_plane_of_given_directions_is_the_closed_form(filled, form):
    rows = np.array([[1.0, 0, 0, 0, 0], [1.0, 1.0, 0, 0, 2.0]])  # not orthogonal
    given = _unflat(rows)
    if form == "listed":
        given = [jax.tree.map(lambda x, i=i: x[i], given) for i in range(2)]
    if form == "bfloat16":
        given = jax.tree.map(lambda x: x.astype(jnp.bfloat16), given)
    ax = plots.loss_plane(_quadratic, PARAMS, directions=given, radius=2, num_points=5)
    np.testing.assert_allclose(filled[0][0], np.linspace(-2, 2, 5))
    _check_plane(filled[0], ORIGIN, rows)
    # Any path in that plane lies in it wholly, at coordinates that are known.
    places = np.array([[0.0, 0.0], [1.0, 0.5], [2.0, -1.0]])
    path = _unflat(ORIGIN + places @ rows)
    ax = plots.loss_plane(
        _quadratic, PARAMS, directions=given, trajectory=path, num_points=4
    )
    (line,) = [line for line in ax.lines if line.get_gid() == "trajectory"]
    np.testing.assert_allclose(np.transpose(line.get_data()), places, atol=1e-5)
    shares = [
        float(label.split("(")[1].split(" %")[0])
        for label in (ax.get_xlabel(), ax.get_ylabel())
    ]
    assert abs(sum(shares) - 100) <= 1  # all of its variance
    across, up, _ = filled[-1]
    assert (across[0] < 0) & (across[-1] > 2) & (up[0] < -1) & (up[-1] > 0.5)


def test_eigenvectors_give_the_plane_of_the_sharpest_directions(filled):
    operator = curvature.hessian(_quadratic, PARAMS)
    pairs = curvature.eigenpairs(operator, KEY, 2)
    plots.loss_plane(_quadratic, _at(0.0), directions=pairs.vectors, num_points=3)
    across, up, losses = filled[0]
    x, y = np.meshgrid(across, up)
    truth = (pairs.values[0] * x**2 + pairs.values[1] * y**2) / 2
    np.testing.assert_allclose(losses, truth, rtol=1e-3, atol=1e-3)
    with pytest.raises(
        ValueError, match=r"got Eigenpairs; write directions=pairs\.vec"
    ):
        plots.loss_plane(_quadratic, PARAMS, directions=pairs)
    part = dict(pairs.vectors, b=None)  # as those of a block of the matrix
    plots.loss_plane(_quadratic, PARAMS, directions=part, num_points=3)


@pytest.mark.heart
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_trajectory_lies_in_its_principal_plane(filled, dtype):
    path = jax.tree.map(lambda x: x.astype(dtype), _unflat(PATH))
    rows = np.concatenate(
        [np.asarray(x, "f8").reshape(6, -1) for x in path.values()], axis=1
    )
    params = jax.tree.map(lambda x: x[-1].astype(jnp.float32), path)
    ax = plots.loss_plane(_quadratic, params, trajectory=path, num_points=4)
    _, sizes, right = np.linalg.svd(rows - rows.mean(axis=0))
    (line,) = [line for line in ax.lines if line.get_gid() == "trajectory"]
    found = np.transpose(line.get_data())
    signs = np.sign(found[0] * ((rows - rows[-1]) @ right[:2].T)[0])
    right = right[:2] * signs[:, None]
    np.testing.assert_allclose(found, (rows - rows[-1]) @ right.T, atol=1e-5)
    shares = 100 * sizes[:2] ** 2 / (sizes**2).sum()
    assert f"({shares[0]:.0f} % of the variance)" in ax.get_xlabel()
    assert f"({shares[1]:.0f} % of the variance)" in ax.get_ylabel()
    _check_plane(filled[0], rows[-1], right)


def test_given_directions_say_how_little_of_a_trajectory_they_see():
    rows = np.eye(5)[3:]
    ax = plots.loss_plane(
        _quadratic,
        PARAMS,
        directions=_unflat(rows),
        trajectory=_unflat(PATH),
        num_points=3,
    )
    shares = 100 * PATH.var(axis=0) / PATH.var(axis=0).sum()
    assert f"({shares[3]:.0f} % of the variance)" in ax.get_xlabel()
    assert f"({shares[4]:.0f} % of the variance)" in ax.get_ylabel()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"directions": _unflat(np.eye(5)[:3])}, "directions must be two, got 3"),
        ({"directions": _unflat(np.ones((2, 5)))}, "directions must span a plane"),
        ({"directions": _unflat(np.eye(5)[:2] * [[1], [0]])}, "got lengths 1 and 0"),
        ({"directions": PARAMS}, "directions must be trees of the shapes of params"),
        ({"directions": [PARAMS, {"a": jnp.ones(2)}]}, "directions must be trees of"),
        ({"trajectory": _unflat(np.outer([0, 1, 2], np.ones(5)))}, "got 3 points on a"),
        (
            {"trajectory": _unflat(PATH[:2])},
            "must span a plane, got 2 points on a line",
        ),
        ({"trajectory": _unflat(PATH * np.nan)}, "trajectory must be finite"),
        (
            {"trajectory": [], "directions": _unflat(np.eye(5)[:2])},
            "trajectory must be",
        ),
        (
            {"trajectory": _unflat(PATH[[0, 0]]), "directions": _unflat(np.eye(5)[:2])},
            "trajectory must move, got 2 times the same",
        ),
        (
            {"directions": _unflat(np.eye(5)[:2]), "kernel": kernels.isotropic()},
            "kernel",
        ),
    ],
)
def test_planes_that_are_none_are_one_sentence(given, message):
    figures = plt.get_fignums()
    with pytest.raises(ValueError, match=message) as error:
        plots.loss_plane(_quadratic, PARAMS, num_points=3, **given)
    assert "\n" not in str(error.value)
    assert plt.get_fignums() == figures


def test_bars_are_the_traces_of_the_layers():
    operator = curvature.hessian(loss_fn, PARAMS, jnp.ones(2))
    ax = plots.layer_traces(curvature.probe(operator, KEY))
    widths = [bar.get_width() for bar in ax.patches]
    np.testing.assert_allclose(widths, [8, 4], rtol=1e-4)


def test_layers_are_subtrees_and_keep_apart_where_names_coincide():
    def tree(*leaves):
        names = ("kernel", "bias")
        return {
            "in/out": dict(zip(names, leaves[:2], strict=True)),
            "in": {"out": dict(zip(names, leaves[2:], strict=True))},
        }

    values = tree(*np.array([1.0, 2.0, 30.0, 40.0]))
    errors = tree(*np.array([0.1, 0.2, 0.3, 0.4]))
    traces = curvature.Estimate(values, errors, 32)
    probe = curvature.Probe(*4 * [None], None)._replace(layer_traces=traces)
    quantile = scipy.stats.t.ppf(0.975, 31)
    for depth, widths in ((None, [40, 30, 2, 1]), (2, [70, 2, 1]), (1, [70, 3])):
        ax = plots.layer_traces(probe, depth=depth, ax=plt.subplots()[1])
        assert [bar.get_width() for bar in ax.patches] == widths
        (segments,) = [c.get_segments() for c in ax.collections]
        halves = [np.ptp(segment[:, 0]) / 2 for segment in segments]
        parts = np.array(widths) / [100 if w > 9 else 10 for w in widths]
        np.testing.assert_allclose(halves, quantile * np.array(parts), rtol=1e-5)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["in", "in/out"]
    with pytest.raises(TypeError, match="probe must be what curvature.probe returned"):
        plots.layer_traces(traces)


def _densities(tops):
    return [
        curvature.SpectralDensity(
            np.array([[0.0, top], [0.1, top]]), np.array([[0.9, 0.1], [0.8, 0.2]])
        )
        for top in tops
    ]


def test_densities_over_training_are_columns_of_color():
    steps, spectra = [0, 10, 40], _densities([2.0, 5.0, 10.0])
    ax = plots.spectrum_over_training(
        steps, spectra, learning_rate=[0.2, 0.4, 0.4], num_points=40
    )
    mesh = ax.collections[0]
    corners = mesh.get_coordinates()
    np.testing.assert_allclose(corners[0, :, 0], [-5, 5, 25, 55])
    points = (corners[1:, 0, 1] + corners[:-1, 0, 1]) / 2
    colors = mesh.get_array().reshape(40, 3)
    for column, density in enumerate(spectra):
        width = 10 / 100
        truth = sum(
            weight * scipy.stats.norm.pdf(points, node, width) / 2
            for node, weight in zip(
                density.nodes.flat, density.weights.flat, strict=True
            )
        )
        np.testing.assert_allclose(
            colors[:, column],
            np.log10(np.maximum(truth, 10 ** colors.min())),
            atol=1e-6,
        )
    np.testing.assert_allclose(ax.lines[-1].get_ydata(), [10, 5, 5])


@pytest.mark.heart
def test_eigenvalues_over_training_are_lines_with_their_bounds():
    values, bounds = np.array([[4.0, 1.0], [9.0, 2.0]]), np.array([[0.5, 0.1]] * 2)
    pairs = [
        curvature.Eigenpairs(v, None, b) for v, b in zip(values, bounds, strict=True)
    ]
    ax = plots.spectrum_over_training([1, 2], pairs, learning_rate=0.1)
    for index in range(2):
        np.testing.assert_allclose(ax.lines[index].get_ydata(), values[:, index])
        edges = ax.collections[index].get_paths()[0].vertices[:, 1]
        ends = values[:, index] + bounds[:, index], values[:, index] - bounds[:, index]
        assert {*edges.round(6)} == {*np.round(ends, 6).ravel()}
    np.testing.assert_allclose(ax.lines[2].get_ydata(), [20, 20])
    assert ax.get_ylim()[1] > 20
    # A limit far above would leave the eigenvalues a line at the bottom.
    ax = plots.spectrum_over_training([1, 2], values, learning_rate=1e-3)
    assert ax.get_ylim()[1] < 20
    assert "2000 or more, above the figure" in ax.lines[2].get_label()


@pytest.mark.parametrize(
    ("steps", "spectra", "rate", "message"),
    [
        ([0, 1], [1.0], None, "spectra must be one a step, got 1 for steps of shape"),
        ([1, 0], [1.0, 2.0], None, "steps must ascend"),
        ([0, 1], [[1.0], [1.0, 2.0]], None, "as many eigenvalues at each step"),
        ([0, 1], [*_densities([1.0]), 2.0], None, "spectra must all be densities"),
        (
            [0, 1],
            [1.0, 2.0],
            [0.1],
            r"learning_rate must be one number, .* shape \(1,\)",
        ),
        ([0, 1], [1.0, 2.0], [0.1, 0.0], "learning_rate must be positive, got 0"),
        ([], [], None, "spectra must be one a step, got 0"),
    ],
)
def test_spectra_that_do_not_fit_their_steps(steps, spectra, rate, message):
    with pytest.raises((TypeError, ValueError), match=message):
        plots.spectrum_over_training(steps, spectra, learning_rate=rate)


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


def test_what_would_be_ignored_or_drawn_wrongly_is_refused():
    key, point = jax.random.key(0), jnp.ones(2)
    square = lambda p: jnp.sum(p**2)  # noqa: E731
    with pytest.raises(ValueError, match="key belongs to random directions"):
        plots.loss_line(square, point, key, to=jnp.zeros(2))
    with pytest.raises(ValueError, match="key belongs to random directions"):
        plots.loss_plane(square, point, key, directions=jnp.eye(2))
    with pytest.raises(TypeError, match="to must be floating point, got int"):
        plots.loss_line(square, point, to=np.zeros(2, int))
    estimates = [curvature.Estimate(1.0, 0.5, 32), curvature.Estimate(2.0, 0.5, 32)]
    with pytest.raises(TypeError, match="spectra must all be densities"):
        plots.spectrum_over_training([1, 2], estimates)

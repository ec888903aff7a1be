"""The evidence: commands run, figures come from JSON, pages quote what was measured."""

import dataclasses
import json
import math
import pathlib
import re
import shutil

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.program

ROOT = pathlib.Path(__file__).parent.parent
COMMANDS = sorted((ROOT / "examples" / "reproduce").glob("*.py"))
RESULTS = ROOT / "docs" / "results"
STEMS = [path.stem for path in COMMANDS]


def plain(tree):
    """As a JSON file gives it back."""
    return json.loads(json.dumps(tree, default=lambda x: np.asarray(x).tolist()))


@pytest.fixture(scope="module")
def run():
    with helpers.commands(helpers.environment(1)) as run:
        yield run


@pytest.mark.parametrize("path", COMMANDS, ids=STEMS)
def test_a_command_runs_small_and_draws_what_it_saved(path, tmp_path, run):
    places = ["--output", tmp_path, "--images", tmp_path]
    run(path, "--smoke", *places)
    report = json.loads((tmp_path / f"{path.stem}.json").read_text())
    assert set(report["versions"]) >= {"flatopt", "jax", "optax"}
    assert report["results"]
    assert (tmp_path / f"{path.stem}.png").stat().st_size > 1000
    assert not (tmp_path / f"{path.stem}.partial").exists()


@pytest.mark.parametrize("path", COMMANDS, ids=STEMS)
def test_the_figure_is_drawn_from_the_committed_results_alone(path, tmp_path, run):
    shutil.copy(RESULTS / f"{path.stem}.json", tmp_path)
    run(path, "--redraw", "--output", tmp_path, "--images", tmp_path)
    assert (tmp_path / f"{path.stem}.png").stat().st_size > 1000


@pytest.mark.heart
def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    import common

    config = common.Config(output=tmp_path, images=tmp_path)
    calls = []

    def compute(config, piece, fail=False):
        def one(name):
            calls.append(name)
            if fail and name == "second":
                raise KeyboardInterrupt
            return {"value": len(calls)}

        return [
            piece(name, lambda name=name: one(name)) for name in ("first", "second")
        ]

    def draw(report):
        from matplotlib.figure import Figure

        return Figure()

    with pytest.raises(KeyboardInterrupt):
        common.run("name", config, lambda c, p: compute(c, p, fail=True), draw)
    report = common.run("name", config, compute, draw)
    assert calls == ["first", "second", "second"]
    assert report["results"] == [{"value": 1}, {"value": 3}]
    common.run("name", config, compute, draw)
    assert calls[3:] == ["first", "second"]  # a whole run starts again


def test_digits_splits_share_no_image_and_wrong_labels_follow_the_seed(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    import common

    splits = common.split_digits(1, 500, 0.4)
    clean = common.split_digits(1, 500)
    rows = [{row.tobytes() for row in images} for images, _ in splits.values()]
    assert [len(labels) for _, labels in splits.values()] == [500, 400, 800]
    assert len(set.union(*rows)) == sum(map(len, rows))
    np.testing.assert_array_equal(splits["train"][0], clean["train"][0])
    wrong = (splits["train"][1] != clean["train"][1]).mean()
    assert abs(wrong - 0.4 * 0.9) < 4 * (0.36 * 0.64 / 500) ** 0.5
    for split in ("validation", "test"):
        np.testing.assert_array_equal(splits[split][1], clean[split][1])


def test_compare_tunes_on_one_seed_and_shares_cost_and_choice(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    from common import Method, compare, grid, methods

    def one():
        pass

    def two():
        pass

    settings = grid(rate=(1, 2), decay=(3, 4))
    assert settings == [
        {"rate": 1, "decay": 3},
        {"rate": 1, "decay": 4},
        {"rate": 2, "decay": 3},
        {"rate": 2, "decay": 4},
    ]
    table = {
        "first": Method(one, settings),
        "other": Method(two, settings[:1], budget=2),
        "as first": Method(one, tuned_as="first", budget=3),
    }
    losses = {(1, 3): np.nan, (1, 4): 2.0, (2, 3): 1.0, (2, 4): np.inf}
    tuned, sizes = [], []

    def piece(name, function, size):
        sizes.append(size)
        return function()

    def tune(method, setting, seed, cost):
        tuned.append(seed)
        return losses[*setting.values()]

    found = compare(
        piece,
        "stage",
        table,
        seeds=2,
        budget=10,
        cost=lambda method, setting: {one: 1.0, two: 2.0}[method.make],
        tune=tune,
        train=lambda method, setting, seed, cost: {
            "run": (setting["rate"], seed, cost)
        },
    )
    assert set(tuned) == {methods.TUNING_SEED}
    assert [m["setting"] for m in found.values()] == [settings[i] for i in (2, 0, 2)]
    assert [m["budget"] for m in found.values()] == [10, 20, 30]
    assert found["first"]["tuning"][1:] == [2.0, 1.0, np.inf]
    assert found["other"]["runs"] == [{"run": (1, 1, 2.0)}, {"run": (1, 2, 2.0)}]
    assert found["as first"]["runs"] == [{"run": (2, 1, 1.0)}, {"run": (2, 2, 1.0)}]
    assert sum(sizes) == 10 * methods.num_runs(table, 2)
    assert table["first"] == Method(one)
    assert table["first"] != Method(two)


@pytest.mark.heart
def test_methods_are_compared_seed_by_seed_and_then_over_cells(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    from common import cells

    def runs(accuracy, trace, loss):
        return {
            "test_accuracy": accuracy,
            "trace": trace,
            "max_eigenvalue": [1.0, np.nan],
            "loss curve": [loss, loss],
            "trace curve": [[8.0, 2.0], [8.0, 2.0]],
        }

    base = runs([0.5, 0.6], [2.0, 4.0], [1.0, 0.01])
    better = runs([0.6, 0.7], [1.0, 8.0], [1.0, 0.1])
    mixed = runs([0.5, 0.8], [2.0, 4.0], [1.0, 0.1])
    networks = {
        network: {"base": {"runs": {"0.0": base}}, "other": {"runs": {"0.0": own}}}
        for network, own in {"A": better, "B": mixed}.items()
    }
    table = cells.runs_of(networks)
    pairs = cells.paired(table, table.xs("base", level="method"))
    of_a = cells.means(pairs.loc["A", "other"])
    np.testing.assert_allclose(of_a["accuracy_gain"]["mean"], 0.1)
    np.testing.assert_allclose(of_a["trace_ratio"]["mean"], 1.0)  # of 1/2 and 2
    # Of logarithms: a deviation of log 4 / sqrt 2 over sqrt 2.
    np.testing.assert_allclose(of_a["trace_ratio"]["error"], np.log(2))
    assert np.isnan(of_a["max_eigenvalue_ratio"]["mean"])  # never dropped
    # Both have passed a loss of 0.1, the base half-way in logarithms, at a trace of 4.
    np.testing.assert_allclose(of_a["matched_loss"]["mean"], 0.1)
    np.testing.assert_allclose(of_a["matched_trace_ratio"]["mean"], 2 / 4)
    found = cells.over_cells(pairs)
    assert list(found) == ["A", "B", "all"]
    counts = {n: found["all"]["other"][n] for n in ("wins", "losses", "ties")}
    assert counts == {"wins": 1, "losses": 0, "ties": 1}
    gain = found["all"]["other"]["accuracy_gain"]  # mean over cells: 0.05 and 0.15
    np.testing.assert_allclose([gain["mean"], gain["error"]], [0.1, 0.05])


def test_rank_correlations_are_taken_within_groups(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    import pandas as pd
    import scipy.stats
    from common import statistics

    x, y = pd.Series([1, 2, 3, 1, 2, 3, 5.0]), pd.Series([1, 2, 3, 9, 7, 8, np.inf])
    by = pd.DataFrame({"group": [0, 0, 0, 1, 1, 1, 2]})
    found = statistics.correlation_within(by, x, y)
    assert found["count"] == 2
    np.testing.assert_allclose(found["mean"], (1 - 1 / 3) / 2)
    rho = statistics.rank_correlation(x[3:], y[3:], scipy.stats.spearmanr)
    np.testing.assert_allclose(rho, -0.5)  # of 1, 2, 3 and 3, 1, 2
    drawn = statistics.resampled_correlations(pd.DataFrame({"x": x}), x, 50)
    assert (drawn["x"].dropna() > 0.999).all()
    low, high = statistics.interval(np.arange(1001))
    assert (low, high) == (25, 975)


def test_granulated_tau_compares_what_differs_in_one_hyperparameter(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    import sharpness_study as study
    from common import measures

    fixed = dict.fromkeys(study.HYPERPARAMETERS, 0)
    networks = [
        fixed
        | {"learning_rate": rate, "width": width, "test_error": 0.0, "gap": gap}
        | ({"measures": {"m": 3 * rate - width}} if seed or rate < 3 else {})
        for rate in range(4)
        for width in (1, 10)
        for seed, gap in enumerate((rate + width, rate + width + 2))
    ]
    configurations, values = measures.average(networks, study.HYPERPARAMETERS)
    assert len(configurations) == 6  # those of the highest rate lack a measure
    assert configurations["gap"][1] == 0 + 10 + 1
    assert configurations["gaps"][1] == [10, 12]
    found = study.granulated(configurations, values["m"])
    assert found["learning_rate"]["mean"] == 1
    assert found["width"]["mean"] == -1
    assert found["momentum"]["count"] == 0
    assert found["mean"] == 0


@jax.numpy_rank_promotion("allow")
@jax.numpy_dtype_promotion("standard")
def test_a_network_in_a_wider_program_has_the_curvature_of_its_own(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    import common
    from common import measures, one_loss

    import flatopt

    images, labels = map(jnp.asarray, common.split_digits(0, 20)["train"])
    functions = one_loss.Functions(skip=True)
    wide = one_loss.init(jax.random.key(0), 6, 3, norm=False)
    cut = {"first": np.s_[:, :3], "output": np.s_[:3], "block": np.s_[:3, :3]}
    narrow = {
        name: {
            "kernel": layer["kernel"][cut[name.split()[0]]],
            "bias": layer["bias"] if name == "output" else layer["bias"][:3],
        }
        for name, layer in wide.items()
    }
    spectra = []
    for params in (wide, narrow):
        grads = jax.grad(functions.loss_fn)(params, (images, labels))
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
        normalized, _, units = measures.normalize(params, params, 3)
        batch = jax.tree.map(lambda u: jnp.stack([u] * 20), units), images, labels
        operator = flatopt.curvature.hessian(
            functions.normalized_loss_fn, normalized, batch
        )
        values = np.linalg.eigvalsh(operator.dense())
        spectra.append(values[np.argsort(-abs(values))][:100])
    np.testing.assert_allclose(*spectra, rtol=1e-3, atol=1e-5)
    assert abs(spectra[0][0]) > 0.01


# Weights that change after training


def test_settings_are_chosen_as_trained_at_matched_accuracy_and_at_any(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    import rounding
    from common import goals

    targets = rounding.TARGETS

    rates = [{"learning_rate": rate} for rate in (0.1, 0.2, 0.2, 0.8)]
    kept = np.zeros((4, 6))
    kept[:, 4] = [0.5, 0.6, 0.7, 0.9]  # at 3 bits
    tuned = {
        "float": [0.960, 0.956, np.nan, 0.930],
        "bits": kept.tolist(),
        "noise": kept[:, :5].tolist(),
        "pruned": kept[:, :5].tolist(),
    }
    sgd = goals.chosen_of("SGD", rates, tuned, 0.955, targets)
    assert sgd["float, 3 bits"] == 0
    assert sgd["matched, 3 bits"] == 1  # a setting that fell to NaN is not trained
    assert sgd["best, 3 bits"] == 3
    assert sgd["SGD, largest rate, 3 bits"] == 1
    weak = tuned | {"float": [0.90, 0.91, 0.80, 0.85]}
    other = goals.chosen_of("SAM", rates, weak, 0.955, targets)
    assert other["matched, 3 bits"] == 1  # its best as trained, where none is as good
    assert "SGD, largest rate, 3 bits" not in other


def test_gains_are_paired_by_seed_and_averaged_over_networks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    from common import goals

    def runs(trained, kept):
        return {"float": trained, "bits": np.tile(np.array(kept)[:, None], 6)}

    own = [runs([0.9, 0.8], [0.7, 0.6]), runs([0.5, 0.6], [0.5, 0.8])]
    base = [runs([0.8, 0.8], [0.6, 0.6]), runs([0.5, 0.6], [0.5, 0.6])]
    found = goals.against(own, base, ("bits", 3))
    np.testing.assert_allclose(found["float_gain"]["mean"], 0.025)
    gain = found["gain"]  # of 0.05 and 0.1; the 97.5 % quantile of t for one degree
    np.testing.assert_allclose(gain["mean"], 0.075)
    np.testing.assert_allclose(gain["high"] - gain["mean"], 12.706 * 0.025, rtol=1e-4)
    assert found["levels"]["3"]["gain"] == gain


@jax.numpy_rank_promotion("allow")
@jax.numpy_dtype_promotion("standard")
def test_what_is_kept_is_measured_as_in_numpy(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    from common import after

    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(10, 3)).astype(np.float32)
    params = {"kernel": jnp.asarray(kernel), "bias": jnp.full(3, 0.01)}

    def mean_square(params, batch):
        return jnp.mean(batch) * jnp.mean(params["kernel"] ** 2) + params["bias"].sum()

    found = jax.jit(lambda p: after.kept(mean_square, p, jnp.ones(2), 400))(params)
    np.testing.assert_allclose(found["float"], (kernel**2).mean() + 0.03, rtol=1e-5)
    step = np.abs(kernel).max(axis=0) / 3
    rounded = (np.rint(kernel / step) * step) ** 2
    at = after.BITS.index(3)
    np.testing.assert_allclose(found["bits"][at], rounded.mean() + 0.03, rtol=1e-5)
    rise = np.asarray(found["noise"]) - float(found["float"])
    expected = (np.array(after.NOISE) * np.abs(kernel).max()) ** 2
    np.testing.assert_allclose(rise, expected, rtol=0.05, atol=0.005)
    smallest = np.sort(np.abs(kernel).ravel())[15:]  # half of thirty
    at = after.PRUNED.index(0.5)
    expected = (smallest**2).sum() / 30 + 0.03
    np.testing.assert_allclose(found["pruned"][at], expected, rtol=1e-5)


def test_the_average_forgets_the_start_and_changes_no_update(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    from common import after

    link = after.average(0.5)
    params, state = jnp.zeros(2), link.init(jnp.zeros(2))
    expected = 0.0
    for step in range(4):
        updates, state = link.update(jnp.ones(2), state, params)
        np.testing.assert_array_equal(updates, 1)
        params = params + updates
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (step + 1)
    np.testing.assert_allclose(state["average"], expected, rtol=1e-6)


def test_the_frontier_is_the_most_kept_where_so_much_is_learned(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    from common import again, frontiers

    old, new = [[0.9, 0.5], [0.7, 0.6]], [[0.2, 0.8], [0.6, 0.9]]
    found = frontiers.frontier(old, new, [0.1, 0.5, 0.7, 0.85, 0.95])
    np.testing.assert_array_equal(found, [0.9, 0.7, 0.6, 0.6, 0])
    # From a half to all: 0.7 to a level of 0.6, 0.6 to 0.9, none beyond.
    np.testing.assert_allclose(
        frontiers.area(old, new, again.LEVELS.curve), 0.14 + 0.36, atol=0.02
    )
    digit = jnp.arange(64.0)[None]
    assert again.turned(digit).reshape(8, 8)[0, 0] == 7  # the upper right corner
    np.testing.assert_array_equal(again.turned(again.turned(digit), 3), digit)


def test_a_task_is_tuned_at_one_seed_and_compared_with_the_first_method(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    import types

    from common import frontiers

    levels = frontiers.Levels(np.array([0.5, 0.7, 0.9]), 0.7, tolerance=0.02)
    kept = {  # what is kept where 0.8 are learned, and accuracy before, by setting
        "base": ((0.6, 0.90), (0.7, 0.89), (0.8, 0.5)),
        "other": ((0.4, 0.80), (0.9, 0.70), (0.1, 0.6)),
    }
    seeds = []

    class Training(frontiers.OneByOne):
        config, num_steps = types.SimpleNamespace(seeds=2), 10

        def settings(self, method):
            return kept[method]

        def cost(self, method):
            return {"base": 1.0, "other": 2.0}[method]

        def again(self, method, setting, seed, num_steps, split):
            assert num_steps == {"base": 10, "other": 5}[method]
            seeds.append((split, seed))
            old = setting[0] + (0.01 * seed if split == "test" else 0)
            found = {"before": setting[1], "sharpness": old, "old": [[old, 0.2]]}
            return {k: np.array(x) for k, x in (found | {"new": [[0.8, 0.4]]}).items()}

    training = Training()
    training.levels = levels
    found = frontiers.study(
        lambda name, function: plain(function()),
        "network",
        training,
        {name: name for name in kept},
        levels,
    )
    assert set(seeds) == {("validation", 100), ("test", 1), ("test", 2)}
    assert found["methods"]["base"]["chosen"] == {"float": 0, "matched": 1, "best": 2}
    # Its best before the second task, where none is within the tolerance of the base.
    assert found["methods"]["other"]["chosen"] == {"float": 0, "matched": 0, "best": 1}
    row = found["summary"]["matched"]["other"]
    np.testing.assert_allclose(row["kept"]["mean"], 0.415)
    np.testing.assert_allclose(row["kept_gain"]["mean"], 0.4 - 0.7)
    # Two of three levels are reached.
    np.testing.assert_allclose(row["area_gain"]["mean"], (0.4 - 0.7) * 2 / 3)
    assert found["predictor"]["kendall"] > 0.999  # that curvature is what is kept


@jax.numpy_rank_promotion("allow")
@jax.numpy_dtype_promotion("standard")
def test_photographs_are_halved_and_statistics_follow_the_weights(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    import types

    from common import photographs

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 1, 1, 3)) * rng.random((12, 32, 32, 1))
    images = images.astype(np.uint8)
    small, labels = photographs.halved(images, np.arange(12) % 10)
    means = images.astype(float).reshape(12, 16, 2, 16, 2, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(small, means, rtol=1e-6)
    config = types.SimpleNamespace(
        width=2, blocks=(), dtype="float32", epochs=1, batch_size=4
    )
    split = small, labels
    training = photographs.Training(config, {"train": split})
    params = training.network.start(0)
    order = [
        np.concatenate(
            [b.argmax(axis=1) for _, b in training.batches(split, 3, seed, 4)]
        )
        for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(order[0], order[1])
    np.testing.assert_array_equal(np.sort(order[0]), np.sort(labels))
    assert (order[0] != order[2]).any()

    def predicted(params, statistics_of):
        x = (small / 255 - np.array([0.491, 0.482, 0.447])) / np.array(
            [0.247, 0.243, 0.262]
        )

        def stem(params):
            padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            kernel = np.asarray(params["stem"]["kernel"].get_value(), float)
            return sum(
                padded[:, i : i + 16, j : j + 16] @ kernel[i, j]
                for i in range(3)
                for j in range(3)
            )

        y, own = stem(params), stem(statistics_of)
        y = (y - own.mean(axis=(0, 1, 2))) / np.sqrt(own.var(axis=(0, 1, 2)) + 1e-5)
        head = np.asarray(params["head"]["kernel"].get_value(), float)
        return (np.maximum(y, 0).mean(axis=(1, 2)) @ head).argmax(axis=1)

    # A channel a hundred times as large hides the other, unless statistics follow it.
    moved = jax.tree.map(lambda x: x, params)
    kernel = moved["stem"]["kernel"].get_value()
    moved["stem"]["kernel"].set_value(kernel * jnp.array([100.0, 1.0]))
    statistics = training.network.mean_statistics(params, small)
    split = small, predicted(moved, params)
    assert training.accuracy((moved, statistics), split) == 1
    expected = (predicted(moved, moved) == split[1]).mean()
    found = training.updated_accuracy(moved, split)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert expected < 0.9


@jax.numpy_rank_promotion("allow")
@jax.numpy_dtype_promotion("standard")
def test_a_task_is_asked_for_its_own_classes_alone(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    import types

    import forgetting_cifar as study
    from flax import nnx

    config = types.SimpleNamespace(width=2, blocks=(), dtype="float32")
    network = study.Network(config)
    params = network.start(0)
    images = np.random.default_rng(0).uniform(0, 255, (6, 16, 16, 3))
    images = jnp.asarray(images, jnp.float32)
    model = nnx.merge(network.graphdef, params, network.statistics, copy=True)
    logits = np.asarray(model(study.normalize(images)), float)
    for task, labels in (("old", [2, 3, 4, 5, 6, 7]), ("new", [0, 1, 8, 9, 0, 9])):
        own = np.log(np.exp(logits[:, study.CLASSES[task]]).sum(axis=1))
        expected = (own - logits[np.arange(6), labels]).mean()
        found = network.loss_fn(params, (images, study.one_hot(np.array(labels))))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    grads = jax.grad(network.loss_fn)(params, (images, study.one_hot(np.arange(6) + 2)))
    columns = np.abs(grads["head"]["kernel"].get_value()).sum(axis=0) > 0
    np.testing.assert_array_equal(columns, np.isin(range(10), study.CLASSES["old"]))


@jax.numpy_rank_promotion("allow")
@jax.numpy_dtype_promotion("standard")
def test_sharpness_and_limits_are_those_of_a_quadratic(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    from common import fitted, optimizers

    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)
    targets, params = jnp.zeros((6, 1)), {"w": jnp.zeros((3, 1))}
    hessian = np.asarray(inputs.T @ inputs) / 6
    factors = np.array([1.0, 4.0, 0.25], np.float32)
    values, vectors = np.linalg.eigh(hessian * np.sqrt(np.outer(factors, factors)))

    def model_fn(params, inputs):
        return inputs @ params["w"]

    # The gradient of the second start is the top eigenvector: then both are the same.
    along = np.linalg.solve(hessian, np.linalg.eigh(hessian)[1][:, -1:])
    for start, own, largest in (
        (np.ones((3, 1)), factors, values[-1]),
        (along, np.ones(3), np.linalg.eigvalsh(hessian)[-1]),
    ):
        tree = {"w": jnp.asarray(start, jnp.float32)}
        make = optimizers.OPTIMIZERS["SGD"]
        state = make(0.1).init(tree)
        scaled = {"w": jnp.asarray(own, jnp.float32)[:, None]}
        critical, found = optimizers.sharpness(
            model_fn, make, tree, state, 0.1, scaled, (inputs, targets)
        )
        np.testing.assert_allclose(found, largest, rtol=1e-4)
    np.testing.assert_allclose(critical, largest, rtol=1 / 16)
    task = fitted.Task(model_fn, None, None)
    for name in ("SGD", "heavy ball", "Nesterov"):
        lin, rate = optimizers.at(task, name, 6, params, None, (inputs, targets))
        limit = float(lin.eigenvalues[0]) * rate
        np.testing.assert_allclose(limit, optimizers.LIMITS[name], rtol=1e-5)
    assert abs(optimizers.LIMITS["AdamW"] - 38) < 1e-9


def test_growth_is_seen_between_ten_and_a_thousand_times_the_start(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    from common import optimizers

    steps = np.arange(60.0)
    exact = 1.2**steps
    losses = np.stack([1.1**steps, 1.1**steps, 3 * 1.3**steps])
    losses[2, 45:] = np.nan  # it has left before
    found = optimizers.seen(losses, exact)
    first, last = 13, 38  # 1.2**13 > 10, 1.2**38 > 1000
    mean = losses.mean(axis=0)
    np.testing.assert_allclose(
        found["mean"], (mean[last] / mean[first]) ** (1 / (last - first))
    )
    np.testing.assert_allclose(found["median"], 1.1)
    np.testing.assert_allclose(found["left"], 1 / 3)
    np.testing.assert_allclose(
        optimizers.seen(0.9 ** steps[None], 0.9**steps)["mean"], 0.9
    )


# A small Transformer


@jax.numpy_rank_promotion("allow")
@jax.numpy_dtype_promotion("standard")
def test_the_calibration_error_is_that_of_numpy(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    import transformer_methods as study

    rng = np.random.default_rng(0)
    confidence = rng.uniform(0, 1, 400).astype(np.float32)
    confidence[0] = 1.0  # belongs to the last bin
    right = rng.uniform(0, 1, 400) < confidence**2
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        inside |= (low > 0.93) & (confidence == 1)
        gap = abs(confidence[inside].mean() - right[inside].mean())
        expected += inside.mean() * gap
    found = study.calibration_error(
        jnp.asarray(confidence).reshape(20, 20), jnp.asarray(right).reshape(20, 20)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_every_method_of_the_transformer_has_as_many_settings(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    import transformer_methods as study

    assert {len(m.settings) for m in study.METHODS.values()} == {6}
    config = study.Config()

    class Counted:
        def cost_of(self, method):
            return 2.0

    found = study.methods_of(config, Counted(), lambda name, run, size: run())
    longer = {name: m for name, m in found.items() if name.endswith("equal steps")}
    assert [m.tuned_as for m in longer.values()] == list(study.LONGER)
    assert {m.budget for m in longer.values()} == {2.0}
    assert not any(m.settings for m in longer.values())


# Which radius


def test_a_strategy_keeps_the_best_on_validation_and_ties_share(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    from common import strategies as study

    grid, rule = study.places_of("SAM")
    assert grid == list(range(2, 11))
    assert [*rule.values()] == [11, 12, 13, 14]
    validation, test = np.zeros((2, 15)), np.zeros((2, 15))
    validation[:, [0, 2, 5]] = 0.5, 0.7, 0.7  # two of the grid are tied
    test[:, [0, 2, 5]] = 0.4, 0.6, 0.8
    validation[0, 12:14], test[0, 12:14] = (0.6, 0.9), (0.5, 0.75)
    validation[1, 11], test[1, 11] = 0.8, 0.65  # below the rule's start value
    validation[0, 14], test[0, 14] = 0.95, 0.1  # beyond the cliff
    scores = {"accuracy": validation, "loss": validation, "3 bits": validation}
    rise = np.zeros((2, 15))
    rise[0, 14] = 10.0
    task = {
        "SAM": {
            "validation": scores,
            "test": {"accuracy": test},
            "rise": rise,
            "guess": np.full(2, np.log(10)),
        }
    }
    found = study.regrets("SAM", "accuracy", task, [task])
    expected = {
        "whole grid": 0,
        "none": 0.7 - 0.4,
        "paper's default": 0.7,
        "start value alone": 0.7 - 0.25,
        "bracket of two": 0.7 - (0.75 + 0.4) / 2,
        "bracket of three": 0.7 - (0.75 + 0.65) / 2,
        "recipe": 0.7 - (0.75 + 0.65) / 2,
        "best on test data": 0.7 - 0.8,
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-12, err_msg=name)


def test_a_constant_is_chosen_on_other_tasks_alone(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    from common import strategies as study

    def task(network, best):
        values = np.zeros((1, 15))
        values[0, best] = 0.9
        found = {"validation": {"accuracy": values}, "test": {"accuracy": values}}
        found |= {"rise": np.zeros((1, 15)), "guess": np.ones(1)}
        return {"network": network, "data": "digits", "SAM": found}

    tasks = [task("a", 3), task("a", 3), task("b", 6)]
    first, _, last = (study.regrets("SAM", "accuracy", t, tasks) for t in tasks)
    name = "one constant, {} left out".format
    np.testing.assert_allclose(first[name("network")], 0.9)  # that of b
    assert last[name("task")] == last[name("network")] == 0.9
    assert name("data set") not in first  # none is left
    assert first["two constants, task left out"] == 0  # those of a and b


@jax.numpy_rank_promotion("allow")
@jax.numpy_dtype_promotion("standard")
def test_the_network_of_the_demo_is_the_same_function(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    from common import radii
    from flax import nnx

    rng = np.random.default_rng(0)
    params = {
        name: {"kernel": rng.normal(size=s) / 5, "bias": rng.normal(size=s[-1])}
        for name, s in radii.CNN.items()
    }
    params = jax.tree.map(jnp.float32, params)
    images = jnp.float32(rng.uniform(size=(3, 64)))
    x = images.reshape(-1, 8, 8, 1)
    for name, features in (("0", 1), ("1", 16)):
        layer = nnx.Conv(
            features, 2 * features if features > 1 else 16, (3, 3), rngs=nnx.Rngs(0)
        )
        layer.kernel.set_value(params[name]["kernel"])
        layer.bias.set_value(params[name]["bias"])
        x = nnx.avg_pool(nnx.relu(layer(x)), (2, 2), strides=(2, 2))
    x = x.reshape(3, -1)
    hidden = np.maximum(x @ params["2"]["kernel"] + params["2"]["bias"], 0)
    expected = hidden @ params["3"]["kernel"] + params["3"]["bias"]
    np.testing.assert_allclose(
        radii.demo_cnn(params, images), expected, rtol=2e-4, atol=1e-4
    )


def test_the_loop_takes_its_place_behind_the_radii(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    from common import strategies as study

    def runs(*values):
        return {goal: np.array([values]) for goal in study.GOALS}

    none, radius = [0.5], [0.6] * 14  # all radii alike
    loop = {"validation": runs(0.7, 0.2, 0.65), "test": runs(0.65, 0.1, 0.8)}
    loop |= {"last": [[0.1] * 3], "largest": [[0.2] * 3], "share": [[0.1] * 3]}
    plain = runs(*none, *radius)
    task = {"network": "a", "data": "digits", "guess": 0.1, "wrong": 0.0}
    task["SAM"] = {"validation": plain, "test": plain, "held": loop, "start": [0.1]}
    task["SAM"] |= {"rise": np.zeros((1, 15)), "guess": [2.3]}
    found = study.regrets("SAM", "accuracy", task, [task])
    expected = {
        "loop at 0.05": 0.6 - 0.65,
        "loop at 0.1": 0.6 - 0.1,
        "loop at 0.2": 0.6 - 0.8,
        "loop at 0.1, or none": 0.6 - 0.5,
        "loop at 0.05 and 0.2, or none": 0.6 - 0.65,
        "loop at all three, or none": 0.6 - 0.65,
        "whole grid": 0,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-12, err_msg=name)
    # 0.2 has a quarter of what none has above a guess; 0.1 has none of it.
    assert study.collapsed(task, "SAM", [[0.21, 0.2 - 1e-9, 0.1]]).tolist() == [
        [False, True, True]
    ]
    failed = study.failures(task, "SAM")
    assert failed["collapsed"].tolist() == [0, 0, 0]
    np.testing.assert_allclose(failed["largest"], 2.0)
    summary = study.summarize("SAM", [task, task], [task])
    gain = summary["loop"]["gains"]["bracket of two less loop at 0.05 and 0.2, or none"]
    np.testing.assert_allclose(gain["dense"]["accuracy"]["mean"], 0.05)
    assert summary["added"]["accuracy"]["loop at 0.2"]["worst"] == pytest.approx(-0.2)


@jax.numpy_rank_promotion("allow")
@jax.numpy_dtype_promotion("standard")
def test_the_loop_follows_the_share_of_what_was_learned(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    from common import held

    share = held.share_undone
    np.testing.assert_allclose(share(1.0, 1.2, 3.0), 0.1)
    for here, there in ((3.0, 3.2), (4.0, 3.5), (1.0, np.nan), (np.nan, 1.0)):
        assert share(jnp.float32(here), jnp.float32(there), 3.0) == np.inf
    np.testing.assert_allclose(
        held.follow(0.0, 0.2, 0.1, 9.0), 0.5 * np.log(0.5) / 2, rtol=1e-6
    )
    limits = [held.follow(0.0, x, 0.1, 9.0) for x in (np.inf, 0.0, -1.0)]
    np.testing.assert_allclose(limits, [-0.35, 0.35, 0.35], rtol=1e-6)
    assert held.follow(0.0, 0.0, 0.1, 0.2) == np.float32(0.2)  # the largest radius

    class Task(held.Held):
        kernels = {"SAM": None, "noise": lambda key, params: jnp.ones(2)}
        num_classes = np.exp(4.0)

        def loss_fn(self, params, batch):
            return 1 + batch * jnp.sum(params**2)

    params, radius = jnp.array([0.3, 0.4]), 0.1
    key, task = jax.random.key(0), Task()
    found = task.share("SAM", params, 2.0, radius, key)  # from a norm of 0.5 to 0.6
    np.testing.assert_allclose(found, (1.72 - 1.5) / (4 - 1.5), rtol=1e-5)
    found = task.share("noise", params, 2.0, radius, key)
    np.testing.assert_allclose(found, (1.82 - 1.5) / (4 - 1.5), rtol=1e-5)


@jax.numpy_rank_promotion("allow")
@jax.numpy_dtype_promotion("standard")
def test_radii_beside_the_loop_are_those_of_a_run_without_it(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    import radius as study
    from common import held, radii

    settings = {"steps": 21, "seeds": 1, "tumours": 16, "batch_size": 8}
    config = study.Config(shares=(0.4,), **settings)
    training = radii.Training(config, "one layer of 32", "breast cancer")
    rows = np.array([[0.0, 0.2]])
    alone = training.at_radii("SAM", rows, [(1, 0.4)])
    beside = training.hold("SAM", [(1, 0.4)], [0.1], [0.15], rows)
    count = len(held.TARGETS)
    np.testing.assert_allclose(
        beside["validation"]["loss"][:, count:], alone["validation"]["loss"], rtol=1e-4
    )
    np.testing.assert_allclose(beside["last"][:, count:], rows, rtol=1e-6)
    steps = np.log(beside["largest"][0, :count] / 0.1)
    assert (np.abs(steps) < 2 * 0.35 + 1e-6).all()  # it moves twice
    assert (beside["largest"][0, :count] <= 0.15 + 1e-7).all()
    assert len(set(beside["validation"]["loss"].ravel().tolist())) > 2


def test_the_largest_radius_is_where_the_first_loss_rises_by_half(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    import radius as study

    radii = np.array([0.0, 0.4, 0.1, 0.2])
    found = study.cap_of(radii, 50 * radii**2, 2.0)  # 50 r^2 = 1
    np.testing.assert_allclose(found, 0.02**0.5, rtol=2e-3)
    assert study.cap_of(radii, radii**2, 2.0) == pytest.approx(0.4)


def test_what_has_no_data_is_left_out_and_its_rows_stay(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    import common
    import radius as study

    config = study.Config(output=tmp_path, data_dir=tmp_path)
    rows = {
        name: {"network": name, "data": f"data of {name}"}
        for name in ("ResNet", "Transformer", "one layer of 32")
    }
    sources = {row["data"]: name for name, row in rows.items()}
    report = {"settings": common.settings(config)}
    report["results"] = {"tasks": rows, "sources": sources}
    path = tmp_path / "radius.json"
    assert study.left_out(config) == ({}, {})  # nothing was measured before
    path.write_text(json.dumps(report))
    tasks, sources = study.left_out(config)
    assert [*tasks] == ["Transformer"]
    assert sources == {"data of Transformer": "Transformer"}
    assert "Transformer left out: give --data-dir" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds Transformer with other settings"):
        study.left_out(dataclasses.replace(config, seeds=5))
    capsys.readouterr()
    whole = dataclasses.replace(config, text_dir=tmp_path)
    assert study.left_out(whole) == ({}, {})
    assert not capsys.readouterr().out
    names = [network for network, _, _ in study.trainings(config)]
    assert names.count("ResNet") == 1
    assert "Transformer" not in names


@jax.numpy_rank_promotion("allow")
@jax.numpy_dtype_promotion("standard")
def test_the_residual_network_of_photographs_is_that_of_other_convolutions(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    from common import added

    rng = np.random.default_rng(0)
    params = {
        name: {"kernel": rng.normal(size=s) / 5, "bias": rng.normal(size=s[-1])}
        for name, s in added.RESIDUAL.items()
    }
    images = rng.normal(size=(2, 16, 16, 3))
    params, images = jax.tree.map(jnp.float32, (params, images))

    def layer(name, x, stride):
        kernel = params[name]["kernel"]
        pad = ((len(kernel) // 2,) * 2,) * 2
        x = jax.lax.conv_general_dilated(
            x, kernel, (stride,) * 2, pad, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        mean, std = x.mean((1, 2, 3), keepdims=True), x.std((1, 2, 3), keepdims=True)
        return (x - mean) / std + params[name]["bias"]

    x = jax.nn.relu(layer("stem", images, 2))
    for name in ("first", "second"):
        inner = layer(f"{name} 2", jax.nn.relu(layer(f"{name} 1", x, 2)), 1)
        x = jax.nn.relu(inner + layer(f"{name} shortcut", x, 2))
    expected = x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(
        added.residual(params, images), expected, rtol=1e-3, atol=1e-3
    )


@jax.numpy_rank_promotion("allow")
@jax.numpy_dtype_promotion("standard")
def test_text_is_split_apart_and_targets_follow_inputs(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    from common import added

    parts = {name: jnp.arange(i, i + 90) for i, name in enumerate(("train", "test"))}
    parts["validation"] = parts["test"]
    found = added.split_text(parts, 8, 3, 20, 0.4)
    inputs, targets = found["train"]
    assert inputs.shape == targets.shape == (20, 8)
    np.testing.assert_array_equal(targets, inputs + 1)
    other = added.split_text(parts, 8, 4, 20, 0.0)
    assert (other["train"][0] != inputs).any()
    np.testing.assert_array_equal(other["test"][0], found["test"][0])


# Pages


NUMBER = re.compile(r"(?<![\w.,/-])[-−]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w/])")
POWER = re.compile(r"(\d(?:\.\d+)?) ?[·×] ?10([⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+)")
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")


def quoted_numbers(text):
    """Numbers with a decimal point or an exponent, outside code, links and formulas."""
    for pattern in (
        r"```.*?```",
        r"`[^`]*`",
        r"\$[^$]*\$",
        r"\]\([^)]*\)",
        r"https?:\S+",
    ):
        text = re.sub(pattern, " ", text, flags=re.DOTALL)
    text = POWER.sub(lambda m: f"{m[1]}e{m[2].translate(SUPERSCRIPTS)}", text)
    found = [number.group() for number in NUMBER.finditer(text)]
    return [n for n in found if "." in n or "e" in n.lower()]


def values_of(tree):
    """The numbers of a report, but for curves, in which nearly any number is found."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    elif isinstance(tree, list) and len(tree) > 30:
        return []
    if isinstance(tree, list):
        return [value for item in tree for value in values_of(item)]
    if isinstance(tree, int | float) and not isinstance(tree, bool):
        return [float(tree)]
    return []


def stands_in(number, values):
    """Whether some value, or a hundred times it, rounds to the number as it is shown."""
    mantissa, _, exponent = (
        number.lower().replace("−", "-").replace(",", "").partition("e")
    )
    decimals = len(mantissa.partition(".")[2])
    shown = float(f"{mantissa}e{exponent or 0}")
    half = 0.5000001 * 10.0 ** (int(exponent or 0) - decimals)
    return any(
        math.isclose(abs(value) * factor, abs(shown), abs_tol=half)
        for value in values
        for factor in (1, 100)
    )


def test_quoted_numbers_are_found_and_compared():
    text = "It is 3.21 (or 4.5 %), `9.9`, $7.7$, 6.1e-4, 2 · 10⁻³; see [1.5](a1.5)."
    numbers = quoted_numbers(text)
    assert numbers == ["3.21", "4.5", "6.1e-4", "2e-3", "1.5"]
    values = [3.2099, 0.0453, 6.13e-4, 0.0021]
    assert [stands_in(n, values) for n in numbers] == [True, True, True, True, False]


PAGES = [
    *sorted((ROOT / "docs" / "reproduce").glob("*.md")),
    *(
        ROOT / name
        for name in ("docs/evidence.md", "docs/choose.md", "docs/uses.md", "README.md")
    ),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_number_on_a_page_was_measured(page):
    paths = [*RESULTS.glob(f"{page.stem}*.json")] or [*RESULTS.glob("*.json")]
    values = values_of([json.loads(path.read_text()) for path in paths])
    wrong = [n for n in quoted_numbers(page.read_text()) if not stands_in(n, values)]
    assert not wrong

"""The evidence: commands run, figures come from JSON, pages quote what was measured."""

import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
COMMANDS = sorted(
    path
    for path in (ROOT / "examples" / "reproduce").glob("*.py")
    if path.stem != "common"
)
RESULTS = ROOT / "docs" / "results"
STEMS = [path.stem for path in COMMANDS]


def _run(*arguments):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("path", COMMANDS, ids=STEMS)
def test_a_command_runs_small_and_draws_what_it_saved(path, tmp_path):
    places = ["--output", tmp_path, "--images", tmp_path]
    _run(path, "--smoke", *places)
    report = json.loads((tmp_path / f"{path.stem}.json").read_text())
    assert set(report["versions"]) >= {"flatopt", "jax", "optax"}
    assert report["results"]
    assert (tmp_path / f"{path.stem}.png").stat().st_size > 1000
    assert not (tmp_path / f"{path.stem}.partial").exists()


@pytest.mark.parametrize("path", COMMANDS, ids=STEMS)
def test_the_figure_is_drawn_from_the_committed_results_alone(path, tmp_path):
    shutil.copy(RESULTS / f"{path.stem}.json", tmp_path)
    _run(path, "--redraw", "--output", tmp_path, "--images", tmp_path)
    assert (tmp_path / f"{path.stem}.png").stat().st_size > 1000


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


def test_granulated_tau_compares_what_differs_in_one_hyperparameter(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    import sharpness_study as study

    fixed = dict.fromkeys(study.HYPERPARAMETERS, 0)
    networks = [
        fixed
        | {"learning_rate": rate, "width": width, "test_error": 0.0, "gap": gap}
        | ({"measures": {"m": 3 * rate - width}} if seed or rate < 3 else {})
        for rate in range(4)
        for width in (1, 10)
        for seed, gap in enumerate((rate + width, rate + width + 2))
    ]
    configurations = study.average(networks, study.HYPERPARAMETERS)
    assert len(configurations) == 6  # those of the highest rate lack a measure
    assert configurations[1]["gap"] == 0 + 10 + 1
    found = study.granulated(configurations, "m")
    assert found["learning_rate"]["mean"] == 1
    assert found["width"]["mean"] == -1
    assert found["momentum"]["count"] == 0
    assert found["mean"] == 0


@jax.numpy_rank_promotion("allow")
@jax.numpy_dtype_promotion("standard")
def test_a_network_in_a_wider_program_has_the_curvature_of_its_own(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "reproduce")
    import sharpness_study as study

    import flatopt

    images, labels = map(jnp.asarray, study.common.split_digits(0, 20)["train"])
    functions = study.Functions(skip=True)
    wide = study.init(jax.random.key(0), 6, 3, norm=False)
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
        normalized, _, units = study.normalize(params, params, 3)
        batch = jax.tree.map(lambda u: jnp.stack([u] * 20), units), images, labels
        operator = flatopt.curvature.hessian(
            functions.normalized_loss_fn, normalized, batch
        )
        values = np.linalg.eigvalsh(operator.dense())
        spectra.append(values[np.argsort(-abs(values))][:100])
    np.testing.assert_allclose(*spectra, rtol=1e-3, atol=1e-5)
    assert abs(spectra[0][0]) > 0.01


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
    *(ROOT / name for name in ("docs/evidence.md", "docs/choose.md", "README.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_number_on_a_page_was_measured(page):
    paths = [*RESULTS.glob(f"{page.stem}*.json")] or [*RESULTS.glob("*.json")]
    values = values_of([json.loads(path.read_text()) for path in paths])
    wrong = [n for n in quoted_numbers(page.read_text()) if not stands_in(n, values)]
    assert not wrong

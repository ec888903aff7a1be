"""The package as a reader meets it: names, documentation, README."""

import inspect
import json
import pathlib
import re
import rlcompleter
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatopt
import flatopt.flax
import flatopt.plots

ROOT = pathlib.Path(__file__).parent.parent
SUBMODULES = [
    flatopt.kernels,
    flatopt.schedules,
    flatopt.flax,
    flatopt.curvature,
    flatopt.sharpness,
    flatopt.stability,
    flatopt.plots,
]


def _public_names():
    names = [f"flatopt.{n}" for n in flatopt.__all__ if callable(getattr(flatopt, n))]
    for module in SUBMODULES:
        for name, value in vars(module).items():
            if name.startswith("_") or not callable(value):
                continue
            # Parts that live in private modules are named in `__all__` again.
            home = getattr(value, "__module__", "")
            if home == module.__name__ or name in getattr(module, "__all__", ()):
                names.append(f"{module.__name__}.{name}")
    return names


def _resolve(name):
    value = flatopt
    for part in name.split(".")[1:]:
        value = getattr(value, part)
    return value


@pytest.mark.heart
def test_dir_offers_what_is_public_and_nothing_else():
    assert set(dir(flatopt)) == {*flatopt.__all__, "flax", "plots", "__version__"}
    for name in dir(flatopt):
        value = getattr(flatopt, name)
        assert name == "__version__" or value.__name__.split(".")[-1] == name
    with pytest.raises(AttributeError, match="lpf_sdg"):
        flatopt.lpf_sdg  # noqa: B018


@pytest.mark.parametrize("name", _public_names())
def test_every_public_name_is_documented_with_an_example(name):
    reference = (ROOT / "docs" / "api.md").read_text()
    assert re.search(rf":: {re.escape(name)}$", reference, re.MULTILINE)
    docstring = inspect.getdoc(_resolve(name))
    assert ">>>" in docstring


def _described(name):
    """A public function or class, and the methods that a user calls."""
    value = _resolve(name)
    hooks = ("tree_flatten", "tree_unflatten", "after_skip", "with_memory")
    if not inspect.isclass(value):
        return {name: value}
    own = {n: m for n, m in vars(value).items() if n not in hooks}
    if name.endswith("State"):
        return {}
    return {
        f"{name}.{n}": m
        for n, m in own.items()
        if inspect.isfunction(m) and n[0] != "_"
    }


@pytest.mark.parametrize("name", _public_names())
def test_every_public_name_says_what_it_is_for_and_what_it_returns(name):
    first = inspect.getdoc(_resolve(name)).splitlines()[0]
    assert first[0].isupper()
    assert first.endswith(".")
    for where, function in _described(name).items():
        found = inspect.signature(function).return_annotation
        says = found if isinstance(found, str) else inspect.formatannotation(found)
        assert found is not inspect.Signature.empty, where
        assert not re.fullmatch(
            r"(typing\.)?Any|.*Callable\[.*, (typing\.)?Any\]", says
        ), where


# Those hand their arguments on, and say so in their docstrings.
OPEN = {"flatopt.chain": "transformations", "flatopt.flax.update": "kwargs"}


@pytest.mark.parametrize("name", _public_names())
def test_signatures_name_their_arguments_and_defaults(name):
    value = _resolve(name)
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    given = inspect.signature(value).parameters.values()
    hidden = [p.name for p in given if p.kind in kinds]
    assert hidden == [OPEN[name]] if name in OPEN else not hidden
    if name in OPEN:
        assert OPEN[name] in inspect.getdoc(value)


@pytest.mark.heart
def test_a_prompt_completes_public_names_alone():
    completer = rlcompleter.Completer({"flatopt": flatopt})
    for room in ("", *(f"{name}." for name in flatopt._MODULES)):
        start = f"flatopt.{room}"
        texts = iter(range(1000))
        found = {
            text.removeprefix(start).rstrip("()")
            for text in iter(lambda: completer.complete(start, next(texts)), None)  # noqa: B023
        }
        module = _resolve(start.rstrip(".")) if room else flatopt
        names = {*getattr(module, "__all__", ())} | (
            {"flax", "plots"} if not room else set()
        )
        types = {"FilterAxes", "Sampler"} if room == "kernels." else set()
        assert found == names | types


def test_reference_names_nothing_that_is_gone():
    reference = (ROOT / "docs" / "api.md").read_text()
    listed = re.findall(r"^\.\. auto\w+:: (\S+)$", reference, re.MULTILINE)
    assert sorted(listed) == sorted(_public_names())


def test_readme_code_runs():
    blocks = re.findall(
        r"^```python\n(.*?)^```",
        (ROOT / "README.md").read_text(),
        re.DOTALL | re.MULTILINE,
    )
    assert blocks
    namespace = {}
    for block in blocks:
        exec(block, namespace)
    params, loss_fn = namespace["params"], namespace["loss_fn"]
    assert loss_fn(params, namespace["batch"]) < 0.999


def _versions_of_the_loop():
    """The loop of the README before and after, each as it would stand in a script."""
    (block,) = re.findall(
        r"^```diff\n(.*?)^```",
        (ROOT / "README.md").read_text(),
        re.DOTALL | re.MULTILINE,
    )
    assert "1e-3, 100, 1000" in block  # two steps are too few for so long a warm-up
    lines = block.replace("1e-3, 100, 1000", "0.1, 2, 1000").splitlines()
    kept = {mark: [x[1:] for x in lines if x[:1] != mark] for mark in "+-"}
    return ["\n".join(kept[mark]) for mark in "+-"]


def _loss(params, batch):
    return jnp.mean((jnp.tanh(batch["x"] @ params["w"]) - batch["y"]) ** 2)


def _train(code, microbatches):
    names = {"loss_fn": _loss}
    exec(code, names)
    params = {"w": jnp.array([0.5, -0.5, 1.0])}
    state, averages = names["tx"].init(params), names["ema"].init(params)
    for batch in microbatches:
        params, state, averages, average = names["step"](params, state, averages, batch)
    return names, params, average


@pytest.fixture
def microbatches():
    random = np.random.default_rng(0)
    inputs = random.normal(size=(8, 16, 3)).astype("f4")
    targets = random.normal(size=(8, 16)).astype("f4")
    return [{"x": x, "y": y} for x, y in zip(inputs, targets, strict=True)]


@pytest.mark.usefixtures("standard_promotion")
def test_without_noise_the_loops_of_the_readme_step_as_on_large_batches(microbatches):
    """Both loops, accumulating, against plain optax on the four microbatches as one."""
    before, after = _versions_of_the_loop()
    names, *found_before = _train(before, microbatches)
    _, *found_after = _train(
        after.replace("lpf_gradients(5e-4)", "lpf_gradients(0.0)"), microbatches
    )
    tx, ema = names["adamw"], names["ema"]
    params = {"w": jnp.array([0.5, -0.5, 1.0])}
    state, averages = tx.init(params), ema.init(params)
    for group in (microbatches[:4], microbatches[4:]):
        for _ in range(3):  # of the calls that do not step
            _, averages = ema.update(params, averages)
        whole = {name: np.concatenate([b[name] for b in group]) for name in "xy"}
        updates, state = tx.update(jax.grad(_loss)(params, whole), state, params)
        params = optax.apply_updates(params, updates)
        average, averages = ema.update(params, averages)
    assert abs(params["w"] - jnp.array([0.5, -0.5, 1.0])).max() > 0.01
    for found in (found_before, found_after):
        np.testing.assert_allclose(found[0]["w"], params["w"], rtol=0, atol=1e-5)
        np.testing.assert_allclose(found[1]["w"], average["w"], rtol=0, atol=1e-5)


@pytest.mark.usefixtures("standard_promotion")
def test_the_loop_of_the_readme_averages_the_gradients_of_its_microbatches(
    microbatches,
):
    """With noise: AdamW on the mean of what the link alone measures in the same calls."""
    names, found, _ = _train(_versions_of_the_loop()[1], microbatches)
    link, tx = flatopt.lpf_gradients(5e-4), names["adamw"]
    params = {"w": jnp.array([0.5, -0.5, 1.0])}
    link_state, state = link.init(params), tx.init(params)
    for group in (microbatches[:4], microbatches[4:]):
        grads = []
        for batch in group:
            grad, link_state = link.update(
                None, link_state, params, value_fn=_loss, batch=batch
            )
            grads.append(grad["w"])
        mean = {"w": jnp.mean(jnp.stack(grads), axis=0)}
        updates, state = tx.update(mean, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(found["w"], params["w"], rtol=0, atol=1e-5)


def test_prose_of_the_readme_is_wrapped():
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    long = [line for line in text.splitlines() if len(line) > 96]
    # Tables, images and the addresses of links cannot be.
    assert not [line for line in long if not re.match(r"\||!\[|\[[^\]]+\]: ", line)]


@pytest.mark.heart
def test_package_imports_without_its_extras():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['flax', 'matplotlib', 'tqdm'])); "
        "import flatopt; flatopt.lpf_sgd(0.1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_imports_what_is_asked_for():
    """`import flatopt` brings itself, and the optimizers bring the links alone."""
    code = (
        "import sys, jax, optax; before = set(sys.modules); import flatopt; "
        "assert set(sys.modules) - before == {'flatopt'}; "
        "flatopt.track_stability(0.1, 32); flatopt.lpf_sgd(0.1); "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    new = done.stdout.split()
    rooms = {"_core", "kernels", "optimizers", "smoothing", "transforms"}
    assert {name.split(".")[1] for name in new if name.startswith("flatopt.")} == rooms
    others = {name.split(".")[0] for name in new} - {"flatopt"}
    assert not others & {"flax", "matplotlib", "scipy", "tqdm"}


def test_benchmark_figures_are_those_of_the_measured_run():
    from benchmarks import render

    results = ROOT / "docs" / "results" / "benchmarks_cpu.json"
    assert (
        render.summary(json.loads(results.read_text()))
        in (ROOT / "README.md").read_text()
    )


def test_benchmark_page_is_rendered_from_the_measured_run(tmp_path):
    from benchmarks import render

    render.write(
        ROOT / "docs" / "results" / "benchmarks_cpu.json", tmp_path / "page.md"
    )
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert (tmp_path / "page.md").read_text() == page


def test_the_page_of_curvature_says_what_was_measured_on_small_problems():
    from benchmarks import render

    report = json.loads((ROOT / "docs" / "results" / "small.json").read_text())
    page = (ROOT / "docs" / "curvature.md").read_text()
    assert render.diagonals(report) in page
    assert render.networks(report) in " ".join(page.split())


def test_the_page_of_curvature_says_how_far_off_differences_are():
    from benchmarks import differences

    report = json.loads(differences.OUTPUT.read_text())
    page = (ROOT / "docs" / "curvature.md").read_text()
    assert differences.table(report) in page
    for title in differences.DTYPES:
        assert differences.told(report, title) in " ".join(page.split())


def test_the_page_of_layouts_says_what_was_measured():
    from benchmarks import samplers

    page = (ROOT / "docs" / "strategies.md").read_text()
    assert samplers.table(json.loads(samplers.OUTPUT.read_text())) in page
    path = ROOT / "docs" / "results" / "accelerators.json"
    problems = json.loads(path.read_text())["tpu"]["problems"]

    def over_plain(problem, row, figure="cycles"):
        rows = problems[problem]["rows"]
        return f"{rows[row][figure] / rows['plain'][figure]:.2f}"

    text = " ".join(page.split())
    scan, vmap = "LPF signs, scan", "LPF signs, vmap"
    for said in (
        f"{over_plain('resnet18', scan)} plain steps for 8 chunks of 16 images in a loop",
        f"{over_plain('resnet18', vmap)} all at once",
        f"{over_plain('resnet18', f'{scan}, 2 chunks')} for 2 chunks of 64",
        f"{over_plain('resnet18, 512', scan)} for 8 chunks of 64",
        f"{over_plain('resnet18, 1024', scan)} of a plain step of 1,024 images",
        f"up to {over_plain('resnet18, 512', vmap)[:3]} times as long",
        f"SAM takes {over_plain('transformer', 'SAM')} plain steps",
        f"NSO takes {over_plain('transformer', 'NSO normal', 'temporary_bytes')} times",
        f"SAM {over_plain('transformer', 'SAM', 'temporary_bytes')} times",
        f"{over_plain('mlp', 'LPF normal, vmap')} plain steps for Gaussian noise and "
        f"{over_plain('mlp', vmap)} for signs",
    ):
        assert said in text

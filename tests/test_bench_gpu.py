"""The benchmark for a GPU, as it runs on a machine without one: it must run at once there."""

import json
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from helpers import environment
from test_examples import write_binary, write_cifar10

from benchmarks import (
    contenders,
    gpu,
    render_accelerators,
    render_compiled,
    roofline,
)
from benchmarks.large import NAMES, make_large

pytestmark = pytest.mark.program

ROOT = pathlib.Path(__file__).parent.parent


def _arguments(tmp_path, *more):
    results = ["--results", str(tmp_path / "gpu.json"), "--smoke"]
    return gpu.parse([*results, "--part-results", str(tmp_path / "part.json"), *more])


def test_the_command_measures_and_trains_and_writes_what_the_page_shows(tmp_path):
    folder = write_cifar10(tmp_path / "cifar-10", write_binary)
    command = [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--repeats", "2"]
    command += ["--parts", "transformer", "cifar10", "--data-dir", str(folder)]
    command += ["--contenders", "plain", "LPF signs, auto", "--methods", "NSO"]
    command += ["--epochs", "1", "--results", str(tmp_path / "gpu.json")]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(1), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["machine"]["versions"]["jax"] == jax.__version__
    rows = report["parts"]["transformer"]["rows"]
    assert set(rows) == {"plain", "LPF signs, auto"}
    for row in rows.values():
        assert row["timings"] == 2
        assert np.all(np.diff([0.0, *row["seconds"]]) >= 0)
        assert row["temporary_bytes"] > 0
    trained = report["parts"]["cifar10"]
    assert (trained["num_train"], trained["num_test"]) == (128, 32)
    figures = trained["methods"]["NSO"]
    assert 0 <= figures["accuracies"][0] <= 1
    assert 1 < figures["losses"][0] < 5  # of ten classes at the start: log 10 = 2.3
    render_accelerators.write(tmp_path, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert f"| NSO | 2 | {100 * figures['accuracies'][0]:.2f} |" in page
    ratio = rows["LPF signs, auto"]["seconds"][1] / rows["plain"]["seconds"][1]
    assert f" | {ratio:.2f} | " in page


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", NAMES)
def test_every_step_of_the_benchmark_can_be_traced(name):
    problem = make_large(name, smoke=True, abstract=True)
    for make in gpu.contenders().values():
        tx, step = make(problem)
        state = jax.eval_shape(tx.init, problem.params)
        key = jax.random.key(0)
        shapes = jax.eval_shape(step, key, problem.params, state, problem.batch)
        assert jax.tree.map(np.shape, shapes) == jax.tree.map(
            np.shape, (problem.params, state)
        )


@pytest.mark.parametrize(
    ("name", "millions"), [("mlp", 3.9), ("transformer", 162.6), ("resnet18", 11.2)]
)
def test_the_networks_have_the_size_that_the_page_tells(name, millions):
    assert make_large(name, abstract=True).num_parameters / 1e6 == pytest.approx(
        millions, abs=0.05
    )


@pytest.mark.heart
@pytest.mark.usefixtures("standard_promotion")
def test_a_row_that_fails_is_written_down_and_the_rest_goes_on(tmp_path, monkeypatch):
    def broken(problem):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand a long trace")

    steps = {"broken": broken, "plain": contenders.plain}
    monkeypatch.setattr(gpu, "contenders", lambda: steps)
    more = ["--part", "mlp", "--until", "1e12", "--repeats", "1"]
    gpu.run_part(_arguments(tmp_path, *more))
    rows = json.loads((tmp_path / "part.json").read_text())["figures"]["rows"]
    assert rows["broken"] == {
        "error": "RuntimeError: RESOURCE_EXHAUSTED: out of memory"
    }
    assert rows["plain"]["timings"] == 1


@pytest.mark.usefixtures("standard_promotion")
def test_rows_past_the_limit_are_skipped_and_said(tmp_path):
    gpu.run_part(_arguments(tmp_path, "--part", "mlp", "--until", "0"))
    part = json.loads((tmp_path / "part.json").read_text())["figures"]
    assert all(row == {"skipped": "no time was left"} for row in part["rows"].values())
    page = render_accelerators.gpu_table("mlp", part)
    assert page.count("no time was left") == len(gpu.contenders())


def test_a_part_that_hangs_or_dies_leaves_its_figures_and_the_others_time(
    tmp_path, monkeypatch
):
    limits = {}

    def start(command, timeout, cwd):
        name = command[command.index("--part") + 1]
        limits[name] = timeout
        path = pathlib.Path(command[command.index("--part-results") + 1])
        figures = {"num_parameters": 1, "batch_size": 1}
        figures["rows"] = {"plain": {"skipped": name}}
        if name != "resnet18":
            path.write_text(json.dumps({"machine": {}, "figures": figures}))
        if name == "mlp":
            raise subprocess.TimeoutExpired(command, timeout)
        return types.SimpleNamespace(returncode=0 if name == "transformer" else -11)

    monkeypatch.setattr(gpu.subprocess, "run", start)
    arguments = ["--smoke", "--results", str(tmp_path / "gpu.json"), "--minutes", "5"]
    assert "mlp, resnet18" in gpu.main(arguments)
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert set(parts) == {"mlp", "transformer", "resnet18"}  # no data, no training
    assert parts["mlp"]["error"].startswith("stopped at its limit of")
    assert parts["mlp"]["rows"] == {"plain": {"skipped": "mlp"}}
    assert "error" not in parts["transformer"]
    assert parts["resnet18"] == {"error": "the process ended with code -11"}
    # Each gets a part of the time, the last all that is left; together at most all.
    assert limits["mlp"] < limits["resnet18"] <= 5 * 60
    render_accelerators.write(tmp_path, tmp_path / "page.md")


def test_parts_stay_in_the_file_for_the_same_machine_alone(tmp_path):
    arguments = _arguments(tmp_path)
    gpu.write({"machine": {"device": "A"}, "parts": {"mlp": {}}}, arguments)
    gpu.write({"machine": {"device": "A"}, "parts": {"resnet18": {}}}, arguments)
    assert set(json.loads(arguments.results.read_text())["parts"]) == {
        "mlp",
        "resnet18",
    }
    gpu.write({"machine": {"device": "B"}, "parts": {"cifar10": {}}}, arguments)
    assert set(json.loads(arguments.results.read_text())["parts"]) == {"cifar10"}


def test_without_a_gpu_one_sentence_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(SystemExit, match="got 'cpu'; install jax"):
        gpu.main(["--results", str(tmp_path / "gpu.json")])
    assert not (tmp_path / "gpu.json").exists()


def test_augmented_images_are_mirrored_crops_of_the_padded_ones():
    from benchmarks import gpu_training

    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (16, 32, 32, 3), np.uint8)
    found = np.asarray(gpu_training.augment(jax.random.key(0), images))
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    places = []
    for image, whole in zip(found, padded, strict=True):
        crops = {
            whole[i : i + 32, j : j + 32][:, ::step].tobytes(): (i, j, step)
            for i in range(9)
            for j in range(9)
            for step in (1, -1)
        }
        places.append(crops[image.tobytes()])
    rows, columns, steps = (set(values) for values in zip(*places, strict=True))
    assert len(rows) > 4
    assert len(columns) > 4
    assert steps == {1, -1}


def test_the_page_is_rendered_from_what_was_measured(tmp_path):
    render_accelerators.write(page=tmp_path / "page.md")
    page = (ROOT / "docs" / "accelerators.md").read_text()
    assert (tmp_path / "page.md").read_text() == page


def test_memory_is_shown_beside_what_goes_in():
    def row(temporary, peak, allocated):
        sizes = {"argument": 10e6, "temporary": temporary}
        sizes |= {"peak": peak, "allocated": allocated}
        return {f"{kind}_bytes": size for kind, size in sizes.items()}

    rows = {"plain": row(20e6, 30e6, 30e6), "SAM": row(50e6, 40e6, 35e6)}
    _, table, text = render_compiled.memory_section(rows)
    assert "add up to 60 MB" in text
    assert "| SAM | 2.50 | 1.50 | 1.25 |" in table
    assert render_compiled.memory_section({"plain": rows["plain"]}) == []
    counted = {"cycles": 3, "bytes_moved": 1, "kernels": 2, "collectives": {}}
    rows = {"plain": rows["plain"] | counted, "NSO signs": rows["SAM"] | counted}
    found = render_compiled.compiled_table(rows)
    assert "| NSO signs | 1.00 | – | 1.00 | 50 | 40 | 2 |" in found
    assert "| plain | 1.00" in found


def _counted(seconds, kernels=10, **more):
    sizes = {"argument_bytes": 2e6, "temporary_bytes": 4e6, "peak_bytes": 6e6}
    sizes |= {"allocated_bytes": 6e6, "bytes_moved": 1e9, "kernels": kernels}
    return (
        sizes | {"roofline_seconds": seconds, "cycles": None, "collectives": {}} | more
    )


def test_programs_for_a_gpu_are_compared_by_their_roofline():
    rows = {
        "plain": _counted(2e-3),
        "LPF no noise, scan": _counted(4e-3),
        "LPF signs, scan": _counted(5e-3, 1200, matrix_flops=100),
        "LPF signs, vmap": _counted(6e-3, 300, matrix_flops=150),
        "SAM": {"error": "ValueError: no | room"},
    }
    sizes = {"num_parameters": 3e6, "batch_size": 64}
    problems = {name: sizes | {"rows": rows, "rule": "vmap"} for name in ("mlp", "cnn")}
    report = {"versions": {"jax": "1.2"}, "problems": problems}
    page = "\n".join(render_compiled.section("h100", report))
    assert "cycles" not in page
    assert "Small chunks" not in page
    assert page.startswith("## Compiled for an H100, not run\n")
    assert "Plain: 4 MB of temporaries, roofline 2.000 ms, 1.00 GB moved." in page
    assert "| LPF signs, scan | 2.50 | 1.00 | 4 | 6 | 1,200 |" in page
    assert "| SAM | ValueError: no / room | – | – | – | – |" in page
    # The noise over its chunks without noise: 5 over 4 ms. The rule's regret: 6 over 5.
    assert "| MLP, float32 | – | 1.25 | – |" in page
    assert "| 3.0 | 64 | 2.50 | 3.00 | 4 | 4 | vmap | 20 | 1,200 | 300 |" in page
    assert "CNN of four convolutions 1.50" in " ".join(page.split())


def test_rows_without_a_roofline_are_shown_without_it():
    rows = {"plain": _counted(None, cycles=100), "SAM": _counted(None, cycles=250)}
    found = render_compiled.compiled_table(rows, "tpu")
    assert "| SAM | 2.50 | – | 1.00 | 4 | 6 | 10 |" in found
    assert "roofline" not in render_compiled.plain_line(rows["plain"])


@pytest.mark.parametrize("target", ["tpu", "h100"])
def test_the_legend_tells_the_peaks_that_are_counted_with(target):
    text = " ".join(render_compiled.legend(target).split())
    chip = roofline.CHIPS[target]
    assert f"at {chip.bandwidth / 1e9:,.0f} GB/s" in text
    assert f"{chip.matrix['bf16'] / 1e12:.0f} TFLOP/s" in text
    assert ("of float32 at 495" in text) == (target == "h100")

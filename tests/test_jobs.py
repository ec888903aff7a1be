"""Ten jobs of a first hour, as scripts: they end well, warn of nothing and compile once."""

import collections
import contextlib
import importlib.util
import logging
import pathlib
import re

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.program

JOBS = sorted((pathlib.Path(__file__).parent / "jobs").glob("*.py"))


@contextlib.contextmanager
def compilations():
    """How often each function was compiled, by its name; JAX logs each."""
    found = collections.Counter()

    class Handler(logging.Handler):
        def emit(self, record):
            match = re.match(r"Compiling (?:jit\()?(\w+)", record.getMessage())
            if match:
                found[match[1]] += 1

    logger = logging.getLogger("jax")
    handler = Handler()
    propagates = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with jax.log_compiles(True):
            yield found
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


@pytest.fixture(scope="module")
def run():
    """``run(name)``: what a job returns, what was compiled, and the job itself."""

    def run(name):
        path = pathlib.Path(__file__).parent / "jobs" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"job_{name}", path)
        module = importlib.util.module_from_spec(spec)
        # As a user runs it: without the strict rules of the tests, but warnings are errors.
        with (
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
            compilations() as found,
        ):
            spec.loader.exec_module(module)
            result = module.main()
        return result, found, module

    return run


def test_there_are_ten_jobs():
    assert len(JOBS) == 10
    source = pathlib.Path(__file__).read_text()
    for path in JOBS:
        assert f'run("{path.stem}")' in source


@pytest.mark.heart
def test_readme_loop(run):
    found, compiled, _ = run("readme_loop")
    assert found["end"] < 0.97 * found["start"]  # of noise: little can be learned
    assert compiled["step"] == 1


def test_optax_loop(run):
    found, compiled, _ = run("optax_loop")
    # The first step of four calls has a rate of 0, of the warm-up.
    assert found["moved"] == [i % 4 == 3 and i > 3 for i in range(24)]
    assert found["end"] < 0.7 * found["start"]
    assert found["end, averaged"] < found["start"]
    assert found["scale"] == pytest.approx(1e-3)
    assert compiled["step"] == 1


def test_nnx_cnn(run):
    found, compiled, _ = run("nnx_cnn")
    assert found["bit-equal"]
    assert found["end"] < found["start"]
    assert 0 <= found["accuracy"] <= 1
    grown = 1e-3 * (1 + 9 * (1 - np.cos(np.pi * 7 / 8)) / 2)  # at the eighth step
    assert found["scale"] == pytest.approx(grown, rel=1e-5)
    assert compiled["step"] == 1


def test_linen_batch_stats(run):
    found, compiled, _ = run("linen_batch_stats")
    assert found["shapes"] == {"BatchNorm_0": {"mean": (8,), "var": (8,)}}
    assert found["end"] < 0.5 * found["start"]
    assert found["accuracy"] > 0.9
    gap = np.abs(found["statistics"] - found["input"]).max()
    assert gap < 0.3 * np.abs(found["input"]).max()
    assert compiled["step"] == 1


def test_lora(run):
    found, compiled, _ = run("lora")
    for name in ("LoRA", "Flat-LoRA"):
        assert found[name]["frozen"]
        assert found[name]["end"] < 0.7 * found[name]["start"]
    assert compiled["step"] == 2  # one each


def test_many_devices(run):
    found, compiled, _ = run("many_devices")
    ends = [*found["end"].values()]
    np.testing.assert_allclose(ends, ends[0], rtol=1e-5)
    assert ends[0] < 0.9 * found["start"]
    assert "'data'" in found["specs"]["FSDP"]
    assert "'data'" not in found["specs"]["data parallel"]
    assert compiled["step"] == 3  # one each


def test_precision(run):
    found, compiled, _ = run("precision")
    for losses in found.values():
        assert losses[-1] < 0.6 * losses[0]
        np.testing.assert_allclose(losses, found["float32"], rtol=0.03)
    assert compiled["step"] == 3  # one each


def test_curvature_loaders(run):
    found, compiled, job = run("curvature_loaders")
    values = np.array([*found["found"].values()])
    top = np.linalg.eigvalsh(found["matrix"])[-1]
    np.testing.assert_allclose(values[:, 0], top, rtol=1e-4)
    np.testing.assert_allclose(values[:, 1], values[0, 1], rtol=1e-4)
    # One batch and batches are two shapes, of vectors alone and in blocks.
    assert compiled["_on_batch"] <= 4
    inputs = np.ones((job.NUM_EXAMPLES, 3), "f4")
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        compilations() as further,
    ):
        job.measure(jax.numpy.ones(3), job.Stream(inputs))
    assert not further


def test_stable_rates(run):
    found, compiled, _ = run("stable_rates")
    descent = found["gradient descent"]
    assert found["rates"]["SGD"] == pytest.approx(descent, rel=1e-4)
    # Heavy ball on a quadratic: 2 (1 + 0.9) over the largest eigenvalue.
    assert found["rates"]["momentum"] == pytest.approx(1.9 * descent, rel=1e-3)
    assert "AdamW" in found["text"] or "adam" in found["text"]
    assert found["report"]["thresholds"]["mean_square"] > 0
    assert {"margin"} <= {name.split("_")[-1] for name in found["watched"]}
    assert compiled["step"] == 1


def test_choose_radius(run):
    found, compiled, _ = run("choose_radius")
    for sigma, rise in found["rises"].items():
        exact = sigma**2 * found["second moments"]  # of a quadratic loss
        assert rise == pytest.approx(exact, rel=0.5)
    assert found["chosen"] == 0.1
    assert found["scale"] == pytest.approx(0.1)
    assert found["end"] < 0.2 * found["start"]
    assert compiled["step"] == 1

"""Two processes that share a mesh train as one device does."""

import functools
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import process_worker
import pytest
from helpers import assert_close, environment

pytestmark = pytest.mark.program

WORKER = pathlib.Path(__file__).parent / "process_worker.py"
NUM_PROCESSES = 2
TIMEOUT = 240


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each of two processes saw in the end."""
    port, folder = _free_port(), tmp_path_factory.mktemp("processes")
    paths = [folder / f"{process}.npz" for process in range(NUM_PROCESSES)]
    workers = [
        subprocess.Popen(
            [sys.executable, WORKER, port, str(process), str(NUM_PROCESSES), path],
            env=environment(8 // NUM_PROCESSES),
            stderr=subprocess.PIPE,
            text=True,
        )
        for process, path in enumerate(paths)
    ]
    try:
        for worker in workers:
            _, errors = worker.communicate(timeout=TIMEOUT)
            assert worker.returncode == 0, errors[-3000:]
    finally:
        for worker in workers:
            worker.kill()
    return [dict(np.load(path)) for path in paths]


def _of(seen, name):
    params, _ = process_worker.problem()
    return [{leaf: part[f"{name}: {leaf}"] for leaf in params} for part in seen]


@functools.cache
def _on_one_device(recipe):
    tx = process_worker.RECIPES[recipe]()
    return process_worker.train(tx, *process_worker.problem())


@pytest.mark.parametrize(("recipe", "layout"), process_worker.RUNS)
def test_two_processes_train_as_one_device(seen, recipe, layout):
    params, _ = process_worker.problem()
    expected = _on_one_device(recipe)
    for tree in _of(seen, f"{recipe}, {layout}"):
        assert_close(tree, expected, rtol=2e-5, atol=2e-6)
        assert np.abs(tree["first"] - params["first"]).max() > 1e-3


@pytest.mark.heart
def test_devices_of_two_processes_draw_as_those_of_one_do(seen):
    params, batch = process_worker.problem()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    expected = process_worker.train_spread(params, batch, mesh)
    for tree in _of(seen, "spread draws"):
        assert_close(tree, expected, rtol=2e-5, atol=2e-6)

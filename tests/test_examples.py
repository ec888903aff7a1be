"""The examples as a user runs them: commands, data in every format, notebooks."""

import ast
import csv
import dataclasses
import io
import json
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import time
import tomllib
import types

import numpy as np
import pytest
from helpers import commands, environment

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.py"))

sys.path.insert(0, str(EXAMPLES))
import cifar10_data  # noqa: E402

pytestmark = pytest.mark.program


def draw(count, seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    return images, rng.integers(0, 10, count).astype(np.uint8)


def rows_of(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def write_binary(folder, name, images, labels):
    rows = np.concatenate([labels[:, None], rows_of(images)], axis=1)
    rows.tofile(folder / f"{name}.bin")


def write_pickle(folder, name, images, labels):
    batch = {b"data": rows_of(images), b"labels": labels.tolist()}
    (folder / name).write_bytes(pickle.dumps(batch))


def write_parquet(folder, name, images, labels):
    import PIL.Image
    import pyarrow as pa
    import pyarrow.parquet

    encoded = []
    for image in images:
        buffer = io.BytesIO()
        PIL.Image.fromarray(image).save(buffer, "PNG")  # lossless
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = {"img": pa.array(encoded, struct), "label": labels.astype(np.int64)}
    split = "test" if "test" in name else f"train-{name[-1]}"
    pyarrow.parquet.write_table(pa.table(table), folder / f"{split}.parquet")


WRITERS = {"binary": write_binary, "pickle": write_pickle, "parquet": write_parquet}


def write_cifar10(folder, write):
    """Two training files and one of tests, of 160 random images each."""
    folder.mkdir(parents=True)
    for seed, name in enumerate(["test_batch", "data_batch_1", "data_batch_2"]):
        write(folder, name, *draw(160, seed))
    return folder


# Two devices. What was compiled is kept apart: a killed run may leave half a file.
@pytest.fixture(scope="module")
def variables(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("compiled"))
    return environment(2, FLATOPT_SMOKE="1", JAX_COMPILATION_CACHE_DIR=cache)


@pytest.fixture(scope="module")
def run(variables):
    """Run a file of Python to its end; return what it printed."""
    with commands(variables) as run:
        yield run


def read_metrics(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# Data


@pytest.mark.heart
@pytest.mark.parametrize("format_name", WRITERS)
def test_every_format_gives_the_images_that_were_written(tmp_path, format_name):
    folder = write_cifar10(tmp_path / "cifar-10", WRITERS[format_name])
    data = cifar10_data.load(folder, num_train=200)
    written = [draw(160, seed) for seed in (1, 2)]
    for index, name in enumerate(["images", "labels"]):
        expected = np.concatenate([part[index] for part in written])[:200]
        np.testing.assert_array_equal(data["train"][name], expected)
        np.testing.assert_array_equal(data["test"][name], draw(160, 0)[index])
    assert data["train"]["images"].dtype == np.uint8
    assert data["train"]["labels"].dtype == np.int32


def test_the_folder_inside_the_archive_is_found(tmp_path):
    write_cifar10(tmp_path / "cifar-10-batches-bin", write_binary)
    assert len(cifar10_data.load(tmp_path, 5)["train"]["labels"]) == 5


def test_a_folder_without_data_is_an_error_that_says_what_it_needs(tmp_path):
    with pytest.raises(FileNotFoundError, match="data_batch_1.bin"):
        cifar10_data.load(tmp_path)


@pytest.mark.heart
def test_without_folder_and_library_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setattr(cifar10_data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="--data-dir"):
        cifar10_data.load()


def test_without_folder_an_installed_library_is_asked(monkeypatch):
    images, labels = draw(4, 0)
    loaded = []

    def load(name, split, batch_size):
        loaded.append((name, split, batch_size))
        return {"image": images, "label": labels}

    library = types.ModuleType("tensorflow_datasets")
    library.load, library.as_numpy = load, lambda data: data
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", library)
    monkeypatch.setattr(cifar10_data.importlib.util, "find_spec", lambda name: library)
    data = cifar10_data.load(None, 4)
    np.testing.assert_array_equal(data["train"]["images"], images)
    assert loaded == [("cifar10", "train[:4]", -1), ("cifar10", "test", -1)]


# Commands


@pytest.fixture(scope="module")
def whole(tmp_path_factory, run):
    """Folder and output of a run of all methods that nothing broke."""
    folder = tmp_path_factory.mktemp("whole")
    data = write_cifar10(folder / "data", write_binary)
    return folder, run(*cifar10_command(data, folder))


def cifar10_command(data, output, *options):
    command = [EXAMPLES / "cifar10.py", "--smoke", "--data-dir", data]
    return [*map(str, [*command, "--output", output]), *options]


def test_cifar10_trains_every_method_at_equal_budgets(whole):
    folder, printed = whole
    gradients = set()
    for method in ("sgd", "sam", "lpf_sgd", "nso"):
        assert method in printed
        rows = read_metrics(folder / method)
        gradients.add(rows[-1]["gradients"])
        assert np.isfinite([float(value) for value in rows[-1].values()]).all()
        assert list((folder / method / "tensorboard").glob("events*"))
    assert gradients == {"16"}
    noise = [float(row["flatopt/scale"]) for row in read_metrics(folder / "lpf_sgd")]
    turns = np.pi * np.array([3, 7, 11, 15]) / 16  # at the last step of an epoch
    np.testing.assert_allclose(noise, 5e-4 * (1 + 7 * (1 - np.cos(turns))), rtol=1e-5)


def result_of(folder):
    """Metrics without seconds, and every array of the last checkpoint."""
    import orbax.checkpoint

    metrics = [{**row, "seconds": None} for row in read_metrics(folder)]
    last = folder / "checkpoints" / metrics[-1]["epoch"] / "default"
    state = orbax.checkpoint.PyTreeCheckpointer().restore(last)
    return metrics, state


@pytest.mark.filterwarnings("ignore")  # of Orbax: restored without shardings
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    tmp_path, run, variables, whole
):
    import jax

    data = write_cifar10(tmp_path / "data", write_parquet)
    command = cifar10_command(data, tmp_path, "--methods", "nso")
    process = subprocess.Popen(
        [sys.executable, *command],
        env=variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoint = tmp_path / "nso" / "checkpoints" / "1"
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (checkpoint.parent / "2").exists()

    run(*command)
    metrics, state = result_of(tmp_path / "nso")
    expected_metrics, expected_state = result_of(whole[0] / "nso")
    assert metrics == expected_metrics
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)
    for leaf, expected in zip(
        jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True
    ):
        np.testing.assert_array_equal(leaf, expected)


@pytest.mark.usefixtures("standard_promotion")
def test_in_bfloat16_parameters_and_logits_stay_float32():
    import cifar10
    import jax
    import jax.numpy as jnp
    from flax import nnx

    config = cifar10.Config(width=2, blocks=(1, 1), bfloat16=True)
    model = nnx.eval_shape(lambda: cifar10.make_model(config))
    leaves = jax.tree.leaves(nnx.state(model))
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)
    images = jnp.zeros((2, 32, 32, 3))
    stem = nnx.eval_shape(lambda model: model.stem(images), model)
    assert stem.dtype == jnp.bfloat16
    assert nnx.eval_shape(lambda model: model(images), model).dtype == jnp.float32


@pytest.mark.heart
def test_a_folder_made_with_other_settings_is_refused(tmp_path):
    import cifar10

    config = cifar10.Config(output=tmp_path)
    cifar10.open_folder(config, "sgd")
    cifar10.open_folder(config, "sgd")
    other = dataclasses.replace(config, seed=1)
    with pytest.raises(SystemExit, match="made with other settings .seed.: give"):
        cifar10.open_folder(other, "sgd")
    cifar10.open_folder(dataclasses.replace(other, resume=False), "sgd")


@pytest.mark.parametrize(
    "command", [["digits.py", "--methods", "NSO"], ["stability.py"]], ids=" ".join
)
def test_command_runs_at_its_quick_size(tmp_path, run, command):
    run(EXAMPLES / command[0], *command[1:], "--quick", "--output", tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".json"}


def test_flat_lora_runs_at_its_quick_size(tmp_path, run):
    printed = run(EXAMPLES / "flat_lora.py", "--quick", "--output", tmp_path)
    assert "Flat-LoRA: " in printed
    results = json.loads((tmp_path / "flat_lora.json").read_text())
    assert {len(row["accuracy"]) for row in results.values()} == {2}


# Notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_from_its_first_cell_to_its_last(tmp_path, variables, path):
    data = write_cifar10(tmp_path / "data", write_parquet)
    execute = "from nbclient.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", execute, str(path.with_suffix(".ipynb"))],
        env=variables | {"FLATOPT_CIFAR10": str(data)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_that_of_its_text(path):
    import jupytext

    text = jupytext.read(path)
    notebook = json.loads(path.with_suffix(".ipynb").read_text())
    expected = [(cell["cell_type"], cell["source"]) for cell in text.cells]
    cells = notebook["cells"]
    assert [(c["cell_type"], "".join(c["source"])) for c in cells] == expected
    assert not any(cell.get("outputs") for cell in cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_ready_for_colab(path):
    notebook = json.loads(path.with_suffix(".ipynb").read_text())
    expected = "TPU" if path.stem == "cifar10_resnet18" else "GPU"
    assert notebook["metadata"]["accelerator"] == expected
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    address = "https://colab.research.google.com/github/flatopt/flatopt/blob/main"
    assert f"{address}/examples/notebooks/{path.stem}.ipynb" in sources[0]
    # Before the first release the index has no flatopt: the repository always does.
    project = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text())["project"]
    repository = project["urls"]["Source"]
    install = f'%pip install -q "flatopt[examples] @ git+{repository}"'
    assert re.search(rf"^    {re.escape(install)}$", sources[1], re.MULTILINE)
    assert "print(jax.devices())" in sources[2]


def definitions(*paths):
    trees = [ast.parse(path.read_text()) for path in paths]
    kinds = ast.ClassDef | ast.FunctionDef
    nodes = [node for tree in trees for node in tree.body if isinstance(node, kinds)]
    return {node.name: ast.dump(node) for node in nodes}


def test_the_cifar10_notebook_has_the_model_and_the_readers_of_the_command():
    notebook = definitions(EXAMPLES / "notebooks" / "cifar10_resnet18.py")
    command = definitions(
        *(EXAMPLES / name for name in ("cifar10.py", "cifar10_data.py", "resnet.py"))
    )
    own = {"from_folder", "make_transformation", "train"}
    common = notebook.keys() & command.keys()
    assert common - own >= {"Block", "ResNet", "flat_step", "augment", "read_parquet"}
    assert {n: notebook[n] for n in common - own} == {
        n: command[n] for n in common - own
    }

"""What the commands of this folder share: results as JSON, runs that resume, figures."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import matplotlib as mpl
import numpy as np
import optax
from sklearn.datasets import load_digits

import flatopt

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
IMAGES = ROOT / "docs" / "images"


@dataclasses.dataclass
class Config:
    """Settings that every command has."""

    output: pathlib.Path = RESULTS
    """Folder of the JSON file."""
    images: pathlib.Path = IMAGES
    """Folder of the figure."""
    redraw: bool = False
    """Only draw the figure again from the JSON file."""
    smoke: bool = False
    """A tiny version that shows that everything runs; writes to results/smoke."""


def prepare(config: Config, smoke: dict[str, Any]) -> Config:
    """The settings to run with; those of ``smoke`` where a tiny version is asked for."""
    mpl.use("agg")
    if not config.smoke:
        return config
    jax.config.update("jax_disable_most_optimizations", True)  # compiles faster
    folder = pathlib.Path("results") / "smoke"
    given = {name: getattr(config, name) for name in ("output", "images")}
    defaults = {"output": RESULTS, "images": IMAGES}
    places = {n: folder if given[n] == defaults[n] else given[n] for n in given}
    return dataclasses.replace(config, **smoke, **places)


def run(name: str, config: Config, compute: Callable, draw: Callable) -> dict:
    """Compute results piece by piece, save them as JSON, and draw the figure from it.

    Args:
      name: of the JSON file and of the figure.
      config: the settings.
      compute: ``compute(config, piece) -> results``; ``piece(name, function)`` is
        ``function()``, or what it returned before an earlier run was killed.
      draw: ``draw(report) -> figure``, from what the JSON file holds.

    Returns:
      The report.
    """
    config.output.mkdir(parents=True, exist_ok=True)
    config.images.mkdir(parents=True, exist_ok=True)
    path = config.output / f"{name}.json"
    if not config.redraw:
        pieces = Pieces(path.with_suffix(".partial"), settings(config))
        results = compute(config, pieces)
        report = {
            "command": f"python examples/reproduce/{name}.py",
            "versions": {
                "flatopt": flatopt.__version__,
                "jax": jax.__version__,
                "optax": optax.__version__,
                "numpy": np.__version__,
            },
            "device": jax.devices()[0].device_kind,
            "settings": settings(config),
            "seconds": round(sum(pieces.seconds.values()), 1),
            "results": results,
        }
        path.write_text(json.dumps(plain(report), indent=1, allow_nan=True) + "\n")
        pieces.path.unlink(missing_ok=True)
    report = json.loads(path.read_text())
    draw(report).savefig(config.images / f"{name}.png", dpi=130)
    return report


def print_summaries(
    results: dict, stages: tuple[str, ...], columns: tuple[str, ...]
) -> None:
    """Means and errors of some columns, a line for each method of each stage."""
    for stage in stages:
        for name, row in results[stage]["summary"].items():
            cells = (
                f"{column} {row[column]['mean']:.4g} ± {row[column]['error']:.2g}"
                for column in columns
            )
            print(f"{stage}, {name:24}", *cells, sep="   ")


def settings(config: Config) -> dict[str, Any]:
    """The settings that decide the results; places of files do not."""
    found = dataclasses.asdict(config)
    places = "output", "images", "redraw", "smoke", "data_dir"
    return plain({name: value for name, value in found.items() if name not in places})


class Pieces:
    """Finished pieces of a run, on disk, so that a killed run goes on where it was.

    Attributes:
      path: the file.
      seconds: what each piece took.
    """

    def __init__(self, path: pathlib.Path, settings: dict[str, Any]):
        self.path, self.settings = path, settings
        self.found, self.seconds = {}, {}
        if path.exists():
            stored = json.loads(path.read_text())
            if stored["settings"] == settings:
                self.found, self.seconds = stored["found"], stored["seconds"]

    def __call__(self, name: str, function: Callable[[], Any]) -> Any:
        """What ``function`` returns, or returned in an earlier run with these settings."""
        if name not in self.found:
            start = time.perf_counter()
            self.found[name] = plain(function())
            self.seconds[name] = time.perf_counter() - start
            partial = self.path.with_suffix(".writing")
            partial.write_text(
                json.dumps(
                    {
                        "settings": self.settings,
                        "found": self.found,
                        "seconds": self.seconds,
                    }
                )
            )
            partial.replace(self.path)
        return self.found[name]


def plain(tree: Any) -> Any:
    """Numbers, lists and dicts, as JSON gives them back; floats to seven digits."""
    if isinstance(tree, dict):
        return {str(name): plain(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(value) for value in tree]
    if isinstance(tree, np.ndarray | jax.Array | np.generic):
        return plain(np.asarray(tree).tolist())
    if isinstance(tree, float):
        return float(f"{tree:.7g}")
    if isinstance(tree, pathlib.Path):
        return str(tree)
    return tree


def split_digits(
    seed: int, num_train: int, label_noise: float = 0.0
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Real handwritten digits: images (n, 64) in [0, 1] and labels (n,) of each split.

    Validation (400) and test (800) are always the same images. The seed draws the training
    images from the other 597, and which of their labels are replaced by random ones.
    """
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    test, validation, rest = np.split(order, [800, 1200])
    rng = np.random.default_rng(seed)
    train = rng.permutation(rest)[:num_train]
    train_labels = labels[train]
    wrong = rng.random(len(train)) < label_noise
    train_labels[wrong] = rng.integers(0, 10, wrong.sum())
    return {
        "train": (images[train], train_labels),
        "validation": (images[validation], labels[validation]),
        "test": (images[test], labels[test]),
    }


def gradients_a_step(
    step: Callable, loss_fn: Callable, carry: Any, *batch: Any, num_steps: int = 2
) -> float:
    """Gradients of a batch a step takes, as flatopt counts those of single examples.

    Args:
      step: ``step(value_fn, carry, *batch) -> carry``, a training step on that loss.
      loss_fn: the loss.
      carry: parameters and state at the start.
      *batch: arrays of equal leading axis.
      num_steps: over which to take the mean.
    """
    counter = flatopt.GradientCounter(loss_fn)
    run = jax.jit(lambda carry, batch: step(counter, carry, *batch))
    for _ in range(num_steps):
        carry = run(carry, batch)
    return counter.count / num_steps / len(jax.tree.leaves(batch)[0])


def mean_and_error(values: Any) -> dict[str, float]:
    """Mean, standard error over the first axis, and the number of values."""
    values = np.asarray(values, float)
    count = len(values)
    error = values.std(axis=0, ddof=1) / count**0.5 if count > 1 else np.nan
    return {"mean": values.mean(axis=0), "error": error, "count": count}

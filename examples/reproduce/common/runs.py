"""Running a study: its command line, pieces that survive a kill, the JSON file, the figure."""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import matplotlib as mpl
import numpy as np
import optax
import pandas as pd
import tqdm
import tyro

import flatopt

ROOT = pathlib.Path(__file__).resolve().parents[3]
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


def main(
    file: str,
    doc: str,
    config_class: type[Config],
    smoke: dict[str, Any],
    compute: Callable,
    draw: Callable,
    lines: Callable[[dict], Iterable[str]],
) -> None:
    """Run a study with the settings of the command line, and print its results.

    Args:
      file: the study's ``__file__``; its stem names what it writes.
      doc: the study's ``__doc__``.
      config_class: its settings.
      smoke: those of the tiny version.
      compute: as in `run`.
      draw: as in `run`.
      lines: ``lines(report)``, the lines to print.
    """
    config = prepare(tyro.cli(config_class, description=doc), smoke)
    report = run(pathlib.Path(file).stem, config, compute, draw)
    for line in lines(report):
        print(line)


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
      draw: ``draw(report) -> figure``, from what the JSON file holds; or a dict of
        figures, each saved under the name with its key behind it.

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
    figures = draw(report)
    figures = figures if isinstance(figures, dict) else {"": figures}
    for key, figure in figures.items():
        figure.savefig(config.images / f"{name}{key}.png", dpi=130)
    return report


def settings(config: Config) -> dict[str, Any]:
    """The settings that decide the results; places of files do not."""
    found = dataclasses.asdict(config)
    places = "output", "images", "redraw", "smoke", "data_dir", "text_dir"
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


@contextlib.contextmanager
def shown(
    piece: Callable, total: int | None = None, unit: str = "piece"
) -> Iterator[Callable]:
    """The same ``piece`` with a bar: ``piece(name, function, size=1)`` of ``total`` units."""
    with tqdm.tqdm(total=total, unit=unit, unit_scale=(total or 0) > 10_000) as bar:

        def run(name, function, size=1):
            bar.set_description(name)
            found = piece(name, function)
            bar.update(size)
            return found

        yield run


def plain(tree: Any) -> Any:
    """Numbers, lists and dicts, as JSON gives them back; floats to seven digits.

    A table becomes a list for each column.
    """
    if isinstance(tree, dict):
        return {str(name): plain(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(value) for value in tree]
    if isinstance(tree, pd.DataFrame):
        return {name: plain(column) for name, column in tree.items()}
    if isinstance(tree, np.ndarray | jax.Array | np.generic | pd.Series):
        return plain(np.asarray(tree).tolist())
    if isinstance(tree, float):
        return float(f"{tree:.7g}")
    if isinstance(tree, pathlib.Path):
        return str(tree)
    return tree

"""What every measure of ``sharpness.report`` is on a small network that was really trained.

The network and the settings of ``examples/digits.py``, trained by SGD and by LPF-SGD; the
report quotes the two as typical, as far as two networks are.

Example: python -m benchmarks.typical
"""

import json
import pathlib
import sys

import jax
import numpy as np

from flatopt import sharpness

ROOT = pathlib.Path(__file__).parent.parent
OUTPUT = ROOT / "docs" / "results" / "typical.json"
METHODS = ("SGD", "LPF-SGD")
SEED = 0


def measure(digits, method, seed):
    """The report of one network at the end of its training."""
    saved = json.loads((ROOT / "docs" / "results" / "digits.json").read_text())
    setting = saved["results"][method]["setting"]
    trainer = digits.Trainer(method, digits.Config())
    params, data, _, _ = trainer.train(setting, seed, "test")
    images, labels = data["train"]
    _, initial = digits.nnx.split(digits.Network(digits.nnx.Rngs(seed)))
    report = sharpness.report(
        lambda params, batch: digits.loss_fn(params, *batch),
        params,
        jax.random.key(seed),
        (images, labels),
        model_fn=digits.logits_fn,
        inputs=images,
        initial_params=initial,
    )
    return report.to_dict()


def main():
    sys.path.insert(0, str(ROOT / "examples"))
    import digits

    runs = {name: measure(digits, name, SEED) for name in METHODS}
    names = [
        name for name in runs["SGD"] if not name.endswith(("standard_error", "seconds"))
    ]
    spread = {}
    for name in names:
        found = [run[name] for run in runs.values()]
        spread[name] = [float(f"{x:.2g}") for x in (np.min(found), np.max(found))]
    saved = {"command": "python -m benchmarks.typical", "typical": spread, "runs": runs}
    OUTPUT.write_text(json.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    main()

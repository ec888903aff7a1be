"""``docs/accelerators.md``, from the JSON alone: what was measured on a GPU, and the page."""

import json
import pathlib
import sys

from benchmarks import render_compiled
from benchmarks.large import TITLES
from benchmarks.tables import megabytes, ratio, reason, table, versions_of

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "accelerators.md"
HEADER = """# GPUs and TPUs

Three networks of the size that accelerators are for, and whole training steps of SGD with
momentum on them: plain, LPF-SGD (8 chunks of the batch, the filter-wise kernel), NSO (one pair,
the isotropic kernel) and SAM. *Signs* and *normal* name the noise; *auto*, *scan* and *vmap*
the [layout](strategies.md) of the chunks.
"""
GPU = """## Measured on a GPU

`make bench-gpu` measures this section on any machine with a GPU, in at most 8 minutes; `make
bench-gpu DATA=FOLDER` also trains ResNet-18 on CIFAR-10 (see [its notes](developing.md)).
"""
GPU_READING = """A step's time is that of steps that follow each other without waiting, the
launch from Python included, which a small network feels; medians (quartiles). **Over plain**
divides medians. **Temporaries** are the compiled step's own figure. **Peak** is the most that
the device held (all live arrays, a spare copy of parameters and state among them); it is seen
only where it is higher than that of every row above.
"""


def write(results=RESULTS, page=PAGE):
    """Render the page from what results there are."""
    lines = [HEADER, *gpu_section(load(results, "gpu.json"))]
    compiled = load(results, "accelerators.json") or {}
    for target, report in compiled.items():
        lines += render_compiled.section(target, report)
    pathlib.Path(page).write_text("\n".join(lines).rstrip() + "\n")


def load(results, name):
    path = pathlib.Path(results) / name
    return json.loads(path.read_text()) if path.exists() else None


def title_of(name, problem):
    size, batch = problem["num_parameters"] / 1e6, problem["batch_size"]
    return f"### {TITLES[name]}: {size:.1f} M parameters, batch {batch}\n"


# On a GPU


def gpu_section(report):
    if report is None:
        return [GPU, "It has not been run yet: there are no figures.\n"]
    machine = report.get("machine", {})
    versions = versions_of(machine.get("versions", {}))
    parts = report["parts"]
    lines = [GPU, f"On one {machine.get('device')}, with {versions}.\n", GPU_READING]
    lines += [gpu_table(name, parts[name]) for name in TITLES if name in parts]
    if "cifar10" in parts:
        lines += [training_table(parts["cifar10"])]
    return lines


def gpu_table(name, part):
    if "rows" not in part:
        return f"### {TITLES[name]}\n\n{reason(part)}\n"
    rows = part["rows"]
    plain = rows.get("plain", {}).get("seconds", [None] * 3)[1]
    head = ["step", "ms", "over plain", "temporaries, MB", "peak, MB", "compile, s"]
    cells = []
    for contender, row in rows.items():
        if "seconds" not in row:
            cells += [[contender, reason(row), *["–"] * 4]]
            continue
        low, median, high = (1e3 * second for second in row["seconds"])
        cells += [
            [
                contender,
                f"{median:.2f} ({low:.2f}–{high:.2f})",
                ratio(row["seconds"][1], plain),
                megabytes(row["temporary_bytes"]),
                megabytes(row["device_peak_bytes"]),
                f"{row['compile_seconds']:.0f}",
            ]
        ]
    ending = f"\n{reason(part)}\n" if "error" in part else ""
    return title_of(name, part) + "\n" + table(head, cells) + ending


def training_table(part):
    if "methods" not in part:
        return f"### ResNet-18 on CIFAR-10\n\n{reason(part)}\n"
    head = [
        "method",
        "gradients a step",
        "test accuracy, %",
        "seconds an epoch",
        "note",
    ]
    cells = []
    for method, row in part["methods"].items():
        accuracies, seconds = row.get("accuracies"), row.get("epoch_seconds")
        if not accuracies:
            cells += [[method, "–", "–", "–", reason(row)]]
            continue
        later = sorted(seconds[1:] or seconds)
        cells += [
            [
                method,
                str(row["gradients_a_step"]),
                f"{100 * accuracies[-1]:.2f}",
                f"{later[len(later) // 2]:.1f}",
                row.get("error", ""),
            ]
        ]
    return (
        f"### ResNet-18 on CIFAR-10, {part['epochs']} epochs\n\n"
        f"{part['num_train']:,} images in batches of {part['batch_size']}, one seed, the same "
        "epochs for every method: the table shows that all of it trains and what it takes, "
        "not which method is best.\n\n" + table(head, cells)
    )


if __name__ == "__main__":
    write(*sys.argv[1:])

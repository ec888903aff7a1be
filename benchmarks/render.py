"""``docs/benchmarks.md`` and its figure, from the JSON alone."""

import json
import pathlib
import sys
import textwrap

import matplotlib.pyplot as plt
import numpy as np

TITLES = {
    "mlp": "MLP",
    "cnn": "CNN with GroupNorm",
    "transformer": "Transformer language model",
    "resnet18": "ResNet-18, CIFAR shapes",
    "words": "50,000 words, token by token",
}
LAYOUTS = {"cnn": "unroll", "mlp": "scan", "transformer": "scan", "resnet18": "scan"}
HEADER = """# Benchmarks

`make bench` measures this page: every contender makes a whole training step of SGD with
momentum, contenders take turns within one process, and figures are ratios within a round,
as median (quartiles). LPF-SGD splits the batch into 8 chunks and uses the filter-wise kernel;
NSO uses one pair and the isotropic one. Ratios carry over to other machines only roughly:
measure on yours.

- **over plain**: step time over one plain gradient of the same batch.
- **over floor**: over the same chunks with no noise at all. **over copy**: over the same chunks
  at parameters scaled by one random number a chunk, which is what writing perturbed parameters
  to memory costs (without noise XLA also shares work on the parameters between chunks).
- **memory**: temporary memory beyond that of the plain step, in parameter sizes; in brackets
  with XLA's memory-optimized scheduler (see [layouts](strategies.md)).
- **compile**: compile time over that of the plain step.
- Kernels: *no noise* is the floor; *signs*, *shared* (one Gaussian draw a step, fresh signs a
  chunk), *normal* (independent Gaussians), *jax.random.normal* (the same numbers up to
  rounding, from JAX's own generator).
"""

NEXT = """
**Next**: [which layout to choose](strategies.md), what a [TPU's compiler](accelerators.md) says
of the same steps, and what a [large model](scale.md) needs.
"""


def write(results, page):
    """Render the page and the figure of growth."""
    report = json.loads(pathlib.Path(results).read_text())
    lines = [HEADER, _machine(report)]
    for name, problem in report["problems"].items():
        lines += [_problem(name, problem)]
    lines += [_targets(report)]
    if "growth" in report:
        lines += [_growth(report, page)]
    curvature = pathlib.Path(results).with_name("curvature_cpu.json")
    if curvature.exists():
        lines += [_curvature(json.loads(curvature.read_text()))]
    stability = pathlib.Path(results).with_name("stability_cpu.json")
    if stability.exists():
        lines += [_stability(json.loads(stability.read_text()))]
    pathlib.Path(page).write_text(_wrapped("\n".join([*lines, NEXT])))


def _wrapped(text):
    """Lines of prose of at most 96 characters; tables, figures and lists as they are."""
    return "\n".join(
        line if line.startswith(("|", "!", "#", "-", " ")) else textwrap.fill(line, 96)
        for line in text.split("\n")
    )


CURVATURE_TARGETS = {
    "Hessian": 2.4,
    "Hessian, 8 vectors": 2.2,
    "Gauss-Newton, 8 vectors": 1.7,
    "quadratic form of the Hessian": 1.5,
    "quadratic form of Gauss-Newton": 1.05,
}

MONITORED = 100  # steps between two measurements, the default of flatopt.monitor


def _curvature(report):
    """Products over gradients, and time to a trace, beside curvlinops and PyHessian."""
    versions = next(iter(report.values()))["peer"]["versions"]
    lines = [
        "## Curvature\n",
        "`make bench-curvature`: one product over one gradient of the same framework, median "
        "(quartiles); the peers on the same weights and batch ("
        + ", ".join(f"{k} {v}" for k, v in versions.items())
        + "). On the CNN the frameworks pad strided convolutions differently.\n",
    ]
    for name, row in report.items():
        ours, peer = row["times"], row["peer"]["times"]
        size = row["num_parameters"] / 1e6
        lines += [
            f"### {TITLES[name]}, {size:.1f} M parameters, batch {row['batch_size']}\n",
            f"After {row['training_steps']} steps of training; "
            f"{len(ours['gradient'])} rounds.\n",
            "| product | flatopt | target | met | curvlinops | seconds, its over ours |",
            "|---|---|---|---|---|---|",
        ]
        for contender in list(ours)[1:]:
            low, median, high = _over(ours[contender], ours["gradient"])
            target = CURVATURE_TARGETS.get(contender)
            met = "" if target is None else "yes" if median <= target else "no"
            other = peer.get(f"curvlinops, {contender}")
            if contender == "quadratic form of the Hessian":
                other = peer["curvlinops, trace"]
            theirs = ratio = ""
            if other:
                theirs = f"{_over(other, peer['gradient'])[1]:.2f}"
                ratio = f"{np.median(other) / np.median(ours[contender]):.2f}"
            limit = "" if target is None else f"≤ {target}"
            lines.append(
                f"| {contender} | {median:.2f} ({low:.2f}–{high:.2f}) | {limit} | {met} "
                f"| {theirs} | {ratio} |"
            )
        lines += [
            _precision(row["trace"], peer),
            "Temporary memory of `probe`, in parameter sizes: "
            + ", ".join(
                f"{size:.1f} at {n} probes" for n, size in row["memory"].items()
            )
            + ".\n",
        ]
    return "\n".join(lines)


def _precision(trace, peer):
    """Seconds to a trace within 2 %, where they were measured."""
    if trace is None:
        return "\nSeconds to a trace were not measured.\n"
    seconds = np.median([run["seconds"] for run in trace["runs"]])
    probes = [run["probes"] for run in trace["runs"]]
    needed = trace["hutchinson_probes_needed"]
    return (
        f"\nTrace to ± 2 % at 95 %: flatopt {seconds:.2f} s ({min(probes)} to "
        f"{max(probes)} probes beyond 8 deflated directions). A plain Hutchinson probe "
        f"has a relative deviation of {trace['deviation_of_one_probe']:.2f}, so that "
        f"{needed:.0f} are needed: curvlinops "
        f"{needed * np.median(peer['curvlinops, trace']):.2f} s, PyHessian "
        f"{needed * np.median(peer['PyHessian, trace']):.2f} s at their measured time a "
        "probe. (PyHessian's own rule stops earlier, at an error it does not know.)\n"
    )


def _stability(report):
    lines = [
        "## Stability\n",
        "`make bench-stability`. Training with `track_stability` at every 50th step over "
        "training without, 50 steps each, in turns: median and quartiles of the ratio. "
        "In the chain, the step that does not measure pays too: XLA on CPU copies the "
        "state through the branch and runs the rest more slowly beside it. Apart, a jitted "
        "function of its own measures before every 50th step. `flatopt.monitor` adds "
        "nothing to the step: its column is 1 + the seconds of a measurement over those of "
        "100 steps, the mean of its two kinds, timed one after the other.\n",
        "| network | in the chain | apart | `flatopt.monitor` |",
        "|---|---|---|---|",
    ]
    for name, row in report["tracker"].items():
        cells = [TITLES[name]]
        share = 1 + np.divide(report["monitor"][name], MONITORED)
        for ratios in (row["chain"], row["apart"], share):
            low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
            cells.append(f"{median:.3f} ({low:.3f}–{high:.3f})")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "\nAll thresholds at batch 8 of random examples, as many as parameters, float32:\n",
        "| n | seconds | of which linearize |",
        "|---|---|---|",
    ]
    for size, row in report["thresholds"].items():
        total = row["linearize"] + row["thresholds"]
        lines.append(f"| {size} | {total:.1f} | {row['linearize']:.1f} |")
    plain, heavy = report["momentum"]["plain"], report["momentum"]["momentum"]
    lines.append(
        f"\nOn the smallest of them the exact threshold of SGD with momentum 0.9 takes "
        f"{heavy['products']} products where plain SGD takes {plain['products']}, and "
        f"{heavy['seconds'] / plain['seconds']:.1f} times its seconds."
    )
    return "\n".join(lines) + "\n"


def _over(times, reference):
    return np.percentile(np.divide(times, reference), [25, 50, 75])


def diagonals(report):
    """The table of ``docs/curvature.md``: ways to the diagonal of a matrix."""
    ways = list(next(iter(report["diagonals"].values())))
    lines = [f"| spectrum | {' | '.join(ways)} |", "|---" * (len(ways) + 1) + "|"]
    for spectrum, row in report["diagonals"].items():
        cells = [f"{row[w]['error']:.2g}, {100 * row[w]['held']:.0f} %" for w in ways]
        lines.append(f"| {' | '.join([spectrum, *cells])} |")
    return "\n".join(lines)


def networks(report):
    """The sentence of ``docs/curvature.md`` on many networks in one program."""
    row = report["networks"]
    return (
        f"For {row['networks']:,} networks of {row['parameters']} parameters, the two "
        f"largest eigenvalues of each took {row['seconds']:.2g} s together, after "
        f"{row['compile_seconds']:.2g} s of compilation, on two busy cores, and differed "
        f"from those of the dense matrices by about {row['largest_distance']:.0e}."
    )


def summary(report):
    """The table of the README: medians, by problem."""
    lines = [
        "| network | LPF-SGD over plain SGD: Gaussian | signs | signs over writing perturbed "
        "parameters | PyTorch loop of LPF-SGD (Gaussian) over its plain SGD | "
        "NSO, signs: over `optax.contrib.sam` |",
        "|---|---|---|---|---|---|",
    ]
    for name, layout in LAYOUTS.items():
        problem = report["problems"][name]
        rows = problem["rows"]
        signs = rows[f"LPF-SGD signs, {layout}"]
        cells = [
            rows.get(f"LPF-SGD normal, {layout}", {}).get("over_plain"),
            signs["over_plain"],
            signs["over_copy"],
            problem.get("torch", {})
            .get("rows", {})
            .get("LPF-SGD", {})
            .get("over_plain"),
            rows["NSO signs"]["over_sam"],
        ]
        cells = ["–" if cell is None else f"{cell[1]:.2f}" for cell in cells]
        size = problem["num_parameters"] / 1e6
        title = (
            f"{TITLES[name]}, {size:.1f} M parameters, batch {problem['batch_size']}"
        )
        lines.append(f"| {' | '.join([title, *cells])} |")
    return "\n".join(lines)


def _machine(report):
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    hardware = report["hardware"]
    return (
        f"Measured on {hardware['cores']} {hardware['processor']} cores "
        f"({hardware['backend']}) with {versions}; {report['repeats']} rounds "
        "(a fourth for ResNet-18).\n"
    )


def _quartiles(row, column):
    if column not in row:
        return ""
    low, median, high = row[column]
    return f"{median:.2f} ({low:.2f}–{high:.2f})"


def _problem(name, problem):
    size, batch = problem["num_parameters"], problem["batch_size"]
    lines = [
        f"## {TITLES[name]}\n",
        f"{size / 1e6:.2f} million parameters, batch {batch}"
        + (f"; {problem['repeats']} rounds" if "repeats" in problem else "")
        + ".\n",
    ]
    lines += [
        "| step | over plain | over floor | over copy | over SAM | memory | compile |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    rows = problem["rows"]
    for contender, row in rows.items():
        memory = f"{row['temporary'] - rows['plain']['temporary']:.1f}"
        if "temporary_memory_scheduler" in row:
            plain = rows["plain"]["temporary_memory_scheduler"]
            memory += f" ({row['temporary_memory_scheduler'] - plain:.1f})"
        compile_ratio = row["compile_seconds"] / rows["plain"]["compile_seconds"]
        columns = ["over_plain", "over_floor", "over_copy", "over_sam"]
        cells = [_quartiles(row, column) for column in columns]
        lines += [
            f"| {' | '.join([contender, *cells, memory, f'{compile_ratio:.1f}'])} |"
        ]
    if "torch" in problem:
        lines += [
            f"\nPyTorch {problem['torch']['version']}, the same network and batch:\n"
        ]
        lines += ["| step | over its own plain | over JAX's plain |", "|---|---|---|"]
        base = rows["plain"]["seconds"][1]
        for contender, row in problem["torch"]["rows"].items():
            other = f"{row['seconds'][1] / base:.2f}"
            own = _quartiles(row, "over_plain")
            lines += [f"| {contender} | {own} | {other} |"]
    return "\n".join(lines) + "\n"


def _targets(report):
    problems = report["problems"]
    lines = [
        "## Targets\n",
        "| figure | target | measured | met |",
        "|---|---|---|---|",
    ]

    def add_value(figure, target, value):
        verdict = "yes" if value <= target else "no"
        lines.append(f"| {figure} | ≤ {target} | {value:.2f} | {verdict} |")

    def add(figure, target, name, contender, column):
        if name in problems and contender in problems[name]["rows"]:
            add_value(figure, target, problems[name]["rows"][contender][column][1])

    cnn, mlp = "LPF-SGD {}, unroll", "LPF-SGD {}, scan"
    add("CNN, signs, over floor", 1.2, "cnn", cnn.format("signs"), "over_floor")
    add("CNN, signs, over plain", 1.0, "cnn", cnn.format("signs"), "over_plain")
    add("CNN, Gaussian, over floor", 1.4, "cnn", cnn.format("normal"), "over_floor")
    add("MLP, signs, over floor", 1.15, "mlp", mlp.format("signs"), "over_floor")
    add("MLP, signs, over copy", 1.1, "mlp", mlp.format("signs"), "over_copy")
    add(
        "MLP, shared Gaussian, over floor",
        2.0,
        "mlp",
        mlp.format("shared"),
        "over_floor",
    )
    for name, layout in (("cnn", cnn), ("resnet18", mlp), ("transformer", mlp)):
        contender = layout.format("signs")
        add(f"{TITLES[name]}, signs, over copy", 1.1, name, contender, "over_copy")
    for name in ("cnn", "mlp"):
        limit = 1.15 if name == "cnn" else 1.0
        title = TITLES[name]
        add(f"NSO signs over SAM, {title}", 1.0, name, "NSO signs", "over_sam")
        if name == "cnn":
            add(f"NSO normal over SAM, {title}", limit, name, "NSO normal", "over_sam")
        add(f"SAM over optax's, {title}", 1.0, name, "SAM", "over_sam")
    for name in ("cnn", "mlp", "resnet18"):
        title = f"LookSAM's average step over plain, {TITLES[name]}"
        add(title, 1.3, name, "LookSAM, average of 5", "over_plain")
    for name, problem in problems.items():
        rows, title = problem["rows"], TITLES[name]
        plain, loop = rows["plain"], rows["LPF-SGD signs, scan"]
        memory = loop["temporary"] - plain["temporary"]
        add_value(f"memory of a loop beyond plain, {title}", 2.2, memory)
        ratio = loop["compile_seconds"] / plain["compile_seconds"]
        add_value(f"compile time of a loop over plain, {title}", 4.0, ratio)
    return "\n".join(lines) + "\n"


def _growth(report, page):
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    labels = {"samples": "samples M", "width": "parameters", "batch": "batch size"}
    titles = {
        "samples": "MLP, batch 64",
        "width": "Transformer, M = 8",
        "batch": "MLP, M = 8",
    }
    for axis, (name, label) in zip(axes, labels.items(), strict=True):
        points = report["growth"][name]
        x = [float(value) for value in points]
        for column, text in (
            ("over_plain", "over plain"),
            ("over_floor", "over floor"),
        ):
            low, median, high = zip(*(p[column] for p in points.values()), strict=True)
            axis.plot(x, median, marker="o", label=text)
            axis.fill_between(x, low, high, alpha=0.2)
        axis.set(xlabel=label, xscale="log", title=titles[name], ylim=(0, None))
        axis.set_xticks(x, [f"{v / 1e6:.1f} M" if v > 1e5 else f"{v:g}" for v in x])
        axis.minorticks_off()
    axes[0].set_ylabel("step time ratio")
    axes[0].legend()
    images = pathlib.Path(page).parent / "images"
    images.mkdir(exist_ok=True)
    figure.savefig(images / "benchmarks_growth.png", dpi=130)
    return (
        "## Growth\n\nLPF-SGD with signs in a loop: the cost of chunks grows with their "
        "number, the cost of noise beyond them hardly.\n\n"
        "![Step time ratios against samples, parameters and batch size]"
        "(images/benchmarks_growth.png)\n"
    )


if __name__ == "__main__":
    write(sys.argv[1], sys.argv[2])
    print(summary(json.loads(pathlib.Path(sys.argv[1]).read_text())))

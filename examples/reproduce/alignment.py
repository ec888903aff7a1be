"""Is SGD's noise aligned with the curvature, and does that bound what SGD finds?

Two experiments after Wu, Wang and Su (NeurIPS 2022), on real handwritten digits with square
loss. The first follows the alignment of SGD's noise along training for four models, beside
isotropic noise of the same trace. The second trains a network from a sharp start over a
grid of learning rates and batch sizes and holds the Frobenius norm of the Hessian it ends
with against the paper's bound and against the exact threshold.
"""

import dataclasses
import functools

import common
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import tqdm
import tyro
from sklearn.datasets import load_digits

from flatopt import stability

PAPER = {
    "reference": "Wu, Wang, Su, NeurIPS 2022, arXiv 2207.02628",
    "statements": [
        "the noise concentrates in sharp directions and its size is proportional to the loss",
        "proved for linear networks and random features, seen for nonlinear networks",
        "a minimum that is linearly stable has a Frobenius norm of at most sqrt(B / mu) / eta",
        "so what SGD finds is bounded by a constant times sqrt(B) / eta",
    ],
    "aligned_mu": 1.0,
    "slope": 1.0,
    "power_of_batch_size": 0.5,
}


@dataclasses.dataclass
class Config(common.Config):
    """Settings."""

    models: tuple[str, ...] = ("linear", "random features", "MLP", "CNN")
    """Models whose alignment is followed."""
    outputs: tuple[int, ...] = (1, 10)
    """Their outputs: even or odd, ten classes."""
    num_images: int = 64
    """Training images."""
    hidden: int = 32
    """Hidden units of the network."""
    num_features: int = 256
    """Random features."""
    batch_size: int = 8
    """Batch size along training."""
    checkpoints: tuple[int, ...] = (0, 10, 30, 100, 300, 1000, 3000)
    """Steps at which the alignment is measured."""
    learning_rates: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.4)
    """Learning rates of the grid."""
    batch_sizes: tuple[int, ...] = (1, 2, 4, 16, 64)
    """Batch sizes of the grid, drawn with replacement."""
    num_steps: int = 20_000
    """Steps of each run of the grid, the first quarter warming up."""
    init_scale: float = 2.0
    """Factor of the initial weights of the grid: a sharp start."""
    num_seeds: int = 5
    """Seeds: images, initial parameters and batches."""


SMOKE = dict(
    models=("linear", "CNN"),
    outputs=(1,),
    num_images=12,
    hidden=8,
    num_features=32,
    batch_size=4,
    checkpoints=(0, 10),
    learning_rates=(0.1, 0.2),
    batch_sizes=(4,),
    num_steps=1000,
    num_seeds=1,
)


def digits(seed, num_images, num_outputs):
    """Images in [0, 1] as rows; even or odd as 1 or -1, or ten classes as one-hot rows."""
    images, labels = load_digits(return_X_y=True)
    chosen = np.random.default_rng(seed).permutation(len(images))[:num_images]
    labels = labels[chosen]
    targets = 1 - 2 * (labels % 2)[:, None] if num_outputs == 1 else np.eye(10)[labels]
    inputs = jnp.asarray(images[chosen] / 16, jnp.float32)
    return inputs, jnp.asarray(targets, jnp.float32)


def dense(key, *shape, fan_in=None):
    return jax.random.normal(key, shape) / (fan_in or shape[0]) ** 0.5


def init_linear(key, num_inputs, num_outputs):
    return {"output": dense(key, num_inputs, num_outputs)}


def linear(params, inputs):
    return inputs @ params["output"]


def init_mlp(key, hidden, num_outputs, scale=1.0):
    keys = jax.random.split(key)
    return {
        "hidden": scale * 2**0.5 * dense(keys[0], 64, hidden),
        "bias": jnp.zeros((1, hidden)),
        "output": scale * dense(keys[1], hidden, num_outputs),
    }


def mlp(params, inputs):
    hidden = jax.nn.relu(inputs @ params["hidden"] + params["bias"])
    return hidden @ params["output"]


def init_cnn(key, num_outputs):
    keys = jax.random.split(key, 3)
    return {
        "first": 2**0.5 * dense(keys[0], 3, 3, 1, 8, fan_in=9),
        "second": 2**0.5 * dense(keys[1], 3, 3, 8, 16, fan_in=72),
        "output": dense(keys[2], 64, num_outputs),
    }


def cnn(params, inputs):
    hidden = inputs.reshape(-1, 8, 8, 1)
    for name in ("first", "second"):
        hidden = jax.lax.conv_general_dilated(
            hidden,
            params[name],
            (2, 2),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        hidden = jax.nn.relu(hidden)
    return hidden.reshape(len(inputs), -1) @ params["output"]


def square_loss(model_fn, params, inputs, targets):
    """The papers' convention: half the squared error, mean over examples."""
    return jnp.sum((model_fn(params, inputs) - targets) ** 2) / (2 * len(inputs))


def draw_batch(key, num_examples, batch_size, replace):
    if replace:
        return jax.random.randint(key, (batch_size,), 0, num_examples)
    if batch_size == num_examples:
        return jnp.arange(num_examples)
    return jax.lax.top_k(jax.random.uniform(key, (num_examples,)), batch_size)[1]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def sgd_step(model_fn, batch_size, replace, params, key, rate, inputs, targets):
    chosen = draw_batch(key, len(inputs), batch_size, replace)
    loss_fn = functools.partial(square_loss, model_fn)
    grads = jax.grad(loss_fn)(params, inputs[chosen], targets[chosen])
    return jax.tree.map(lambda p, g: p - rate * g, params, grads)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def train_runs(batch_size, replace, num_steps, warm_up, params, keys, rates, data):
    """Networks trained side by side from stacked parameters and data, and their losses."""

    def run(params, key, rate, data):
        def body(params, moment):
            step, key = moment
            now = rate * jnp.minimum(1, (step + 1) / warm_up)
            return sgd_step(mlp, batch_size, replace, params, key, now, *data), None

        moments = jnp.arange(num_steps), jax.random.split(key, num_steps)
        params, _ = jax.lax.scan(body, params, moments)
        return params, square_loss(mlp, params, *data)

    return jax.vmap(run)(params, keys, rates, data)


def sharp_starts(config, num_outputs, batch_size, replace):
    """Train from sharp starts: a run for each learning rate and seed, as (settings, params).

    The learning rate warms up to its value over the first quarter.
    """
    settings = [(r, s) for r in config.learning_rates for s in range(config.num_seeds)]
    starts, data = [], []
    for _, seed in settings:
        key = jax.random.key(seed)
        starts.append(init_mlp(key, config.hidden, num_outputs, config.init_scale))
        data.append(digits(seed, config.num_images, num_outputs))
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)  # noqa: E731
    keys = jnp.stack([jax.random.key(1000 + seed) for _, seed in settings])
    rates = jnp.array([rate for rate, _ in settings])
    params, losses = train_runs(
        batch_size,
        replace,
        config.num_steps,
        config.num_steps // 4,
        stack(starts),
        keys,
        rates,
        stack(data),
    )
    found = []
    for index, (rate, seed) in enumerate(settings):
        loss = float(losses[index])
        _, targets = data[index]
        constant = float(jnp.sum((targets - targets.mean(0)) ** 2) / (2 * len(targets)))
        row = {"learning_rate": rate, "batch_size": batch_size, "seed": seed}
        row.update(loss=loss, outcome=outcome(loss, constant))
        found.append((row, jax.tree.map(lambda x, i=index: x[i], params)))
    return found


def outcome(loss, constant):
    """What became of a run: only minima that fit their data are compared with theory."""
    if not np.isfinite(loss) or loss > 10 * constant:
        return "diverged"
    if loss > 0.5 * constant:
        return "collapsed"
    return "minimum" if loss <= 0.01 * constant else "unfinished"


def tasks(config):
    """Name, inputs of seed, initial parameters and model of the four models."""

    def features(seed, images):
        weights = dense(jax.random.key(100 + seed), 64, config.num_features)
        return jax.nn.relu(images @ weights) * (2 / config.num_features) ** 0.5

    def plain(_, images):
        return images

    return {
        "linear": (plain, lambda k, c: init_linear(k, 64, c), linear),
        "random features": (
            features,
            lambda k, c: init_linear(k, config.num_features, c),
            linear,
        ),
        "MLP": (plain, lambda k, c: init_mlp(k, config.hidden, c), mlp),
        "CNN": (plain, init_cnn, cnn),
    }


def follow(config, name, num_outputs, seed):
    """The alignment at the checkpoints of one run of SGD.

    The learning rate is half of that at which the trace forbids batches of one, at the
    initial parameters.
    """
    prepare, init, model_fn = tasks(config)[name]
    images, targets = digits(seed, config.num_images, num_outputs)
    inputs, params = prepare(seed, images), init(jax.random.key(seed), num_outputs)
    start = stability.linearize(model_fn, params, inputs, targets)
    rate = num_outputs / float(jnp.sum(start.eigenvalues))
    keys = jax.random.split(jax.random.key(1000 + seed), max(config.checkpoints))
    rows = []
    for step in range(max(config.checkpoints) + 1):
        if step in config.checkpoints:
            lin = stability.linearize(model_fn, params, inputs, targets)
            found = stability.alignment(lin)._asdict()
            rows.append({"step": step, **{k: float(v) for k, v in found.items()}})
        if step < len(keys):
            params = sgd_step(
                model_fn,
                config.batch_size,
                False,
                params,
                keys[step],
                rate,
                inputs,
                targets,
            )
    return rows


def summarize_training(runs, num_outputs):
    """Means over seeds at each checkpoint, times the outputs where the theory is about 1/c."""
    found = {"step": [row["step"] for row in runs[0]]}
    factors = {"mu": num_outputs, "alpha": 1, "beta": num_outputs}
    factors |= {"isotropic_mu": num_outputs, "loss": 1}
    for field, factor in factors.items():
        values = factor * np.array([[row[field] for row in run] for run in runs])
        found[field] = common.mean_and_error(values)
    ratio = [[row["mu"] / row["isotropic_mu"] for row in run] for run in runs]
    found["over_isotropic"] = common.mean_and_error(ratio)
    smallest = np.array([[row["mu"] for row in run] for run in runs]).min()
    return found | {"smallest_mu": num_outputs * smallest}


def measure_minimum(config, row, params):
    """Sharpness of what a run found, with the bounds on it."""
    if row["outcome"] != "minimum":
        return row
    inputs, targets = digits(row["seed"], config.num_images, 1)
    lin = stability.linearize(mlp, params, inputs, targets)
    batch_size, rate = row["batch_size"], row["learning_rate"]
    limits = stability.thresholds(lin, batch_size, sampling="with_replacement")
    norm = float(jnp.linalg.norm(lin.eigenvalues))
    mu = near_alignment(mlp, params, inputs, targets)
    return row | {
        "frobenius_norm": norm,
        "max_eigenvalue": float(lin.eigenvalues[0]),
        "mu": mu,
        "root_bound": batch_size**0.5 / rate,
        "mu_bound": (batch_size / mu) ** 0.5 / rate,
        "theorem_bound": norm * limits.frobenius / rate,
        "exact_bound": norm * limits.mean_square / rate,
    }


def near_alignment(model_fn, params, inputs, targets):
    """The alignment a little away from the minimum, mean of random displacements."""
    found = []
    for seed in range(4):
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        moved = [
            leaf + 1e-3 * jax.random.normal(key, leaf.shape)
            for leaf, key in zip(leaves, keys, strict=True)
        ]
        lin = stability.linearize(model_fn, treedef.unflatten(moved), inputs, targets)
        found.append(float(stability.alignment(lin).mu))
    return float(np.mean(found))


BOUNDS = {
    "root_bound": r"$\sqrt{B}/\eta$",
    "mu_bound": r"$\sqrt{B/\mu}/\eta$",
    "exact_bound": "exact threshold",
}


def summarize_grid(rows):
    """How the norm follows each bound; slopes by seed, so that they have an error."""
    minima = [row for row in rows if row["outcome"] == "minimum"]
    outcomes = [row["outcome"] for row in rows]
    found = {
        "runs": len(rows),
        "outcomes": {name: outcomes.count(name) for name in sorted(set(outcomes))},
        "smallest_mu": min(row["mu"] for row in minima),
        "largest_mu": max(row["mu"] for row in minima),
    }
    for bound in [*BOUNDS, "theorem_bound"]:
        shares = np.array([row["frobenius_norm"] / row[bound] for row in minima])
        found[bound] = {
            "slope": common.mean_and_error(slopes(minima, bound)),
            "largest_share": shares.max(),
            "median_share": np.median(shares),
            "above": int((shares > 1).sum()),
        }
    found["at_the_edge"] = summarize_edge(minima)
    return found


def summarize_edge(minima):
    """The same for learning rates of 0.1 and more, for which every start is too sharp."""
    sharp = [row for row in minima if row["learning_rate"] >= 0.1]
    found = {
        bound: {"slope": common.mean_and_error(slopes(sharp, bound))}
        for bound in BOUNDS
    }
    found["powers"] = powers(sharp)
    found["powers_small_batches"] = powers([r for r in sharp if r["batch_size"] <= 4])
    for size in sorted({row["batch_size"] for row in sharp}):
        mine = [row for row in sharp if row["batch_size"] == size]
        found[f"B = {size}"] = {
            bound: common.mean_and_error([r["frobenius_norm"] / r[bound] for r in mine])
            for bound in BOUNDS
        }
    return found


def slopes(minima, bound):
    """Slope of log norm against log bound, for each seed."""
    found = []
    for seed in sorted({row["seed"] for row in minima}):
        mine = [row for row in minima if row["seed"] == seed]
        x, y = (np.log([row[k] for row in mine]) for k in (bound, "frobenius_norm"))
        if len(mine) > 1:
            found.append(np.polyfit(x, y, 1)[0])
    return found


def powers(minima):
    """Powers of 1 / eta and B that the norm follows, over seeds."""
    found = []
    for seed in sorted({row["seed"] for row in minima}):
        mine = [row for row in minima if row["seed"] == seed]
        names = ("learning_rate", "batch_size", "frobenius_norm")
        rate, size, norm = (np.log([row[name] for row in mine]) for name in names)
        if len(mine) > 3:
            causes = np.stack([-rate, size, np.ones(len(mine))], axis=1)
            found.append(np.linalg.lstsq(causes, norm)[0])
    names = ("inverse_learning_rate", "batch_size")
    return {
        name: common.mean_and_error([power[i] for power in found])
        for i, name in enumerate(names)
        if found
    }


def compute(config, piece):
    pairs = [(name, c) for name in config.models for c in config.outputs]
    total = len(pairs) * config.num_seeds + len(config.batch_sizes)
    bar = tqdm.tqdm(total=total)
    runs = {}
    for name, c in pairs:
        for seed in range(config.num_seeds):
            bar.set_description(f"{name}, {c} outputs")
            found = piece(
                f"{name} {c} {seed}", functools.partial(follow, config, name, c, seed)
            )
            runs.setdefault(f"{name}, {c}", []).append(found)
            bar.update()

    def cells(batch_size):
        found = sharp_starts(config, 1, batch_size, True)
        return [measure_minimum(config, *run) for run in found]

    rows = []
    for batch_size in config.batch_sizes:
        bar.set_description(f"grid, B = {batch_size}")
        rows += piece(f"grid {batch_size}", functools.partial(cells, batch_size))
        bar.update()
    bar.close()
    training = {
        name: summarize_training(found, int(name.split(", ")[1]))
        for name, found in runs.items()
    }
    return {
        "paper": PAPER,
        "training": training,
        "training_runs": runs,
        "grid": summarize_grid(rows),
        "grid_runs": rows,
    }


def draw(report):
    results = report["results"]
    figure, axes = plt.subplots(3, 3, figsize=(12, 10.5), layout="constrained")
    for row, c in zip(axes, report["settings"]["outputs"], strict=False):
        draw_training(row, results["training"], c)
    draw_grid(axes[2], results["grid_runs"])
    return figure


def draw_training(axes, training, num_outputs):
    title = "even or odd, 1 output" if num_outputs == 1 else "ten classes, 10 outputs"
    times = "" if num_outputs == 1 else "10 "
    labels = {"mu": rf"{times}$\mu$", "alpha": r"$\alpha$", "beta": rf"{times}$\beta$"}
    names = [name for name in training if name.endswith(f", {num_outputs}")]
    for axis, (field, label) in zip(axes, labels.items(), strict=True):
        for index, name in enumerate(names):
            found, style = training[name], {"color": f"C{index}", "marker": "."}
            steps = np.array(found["step"]) + 1
            shown = found[field]["mean"], found[field]["error"]
            axis.errorbar(steps, *shown, label=name.split(",")[0], **style)
            if field == "mu":
                axis.plot(steps, found["isotropic_mu"]["mean"], ":", **style)
        axis.set(xscale="log", xlabel="step of SGD + 1", ylabel=label, title=title)
        axis.axhline(1, color="0.7", zorder=0)
    axes[0].set_yscale("log")
    axes[1].legend(title="left, dotted: isotropic noise", fontsize=8, title_fontsize=8)


def draw_grid(axes, rows):
    minima = [row for row in rows if row["outcome"] == "minimum"]
    lost = len(rows) - len(minima)
    for axis, (bound, label) in zip(axes, BOUNDS.items(), strict=True):
        for index, size in enumerate(sorted({row["batch_size"] for row in minima})):
            mine = [row for row in minima if row["batch_size"] == size]
            values = ([row[key] for row in mine] for key in (bound, "frobenius_norm"))
            axis.loglog(*values, ".", color=f"C{index}", label=f"B = {size}")
        ends = np.array([min(r["frobenius_norm"] for r in minima)] * 2)
        ends[1] = max(row["exact_bound"] for row in minima)
        axis.plot(ends, ends, color="0.5", zorder=0)
        axis.set(
            xlabel=f"largest stable norm, {label}", ylabel=r"$\|H\|_F$ found by SGD"
        )
    axes[0].legend(
        fontsize=8, title=f"{lost} of {len(rows)} runs lost", title_fontsize=8
    )


def main(config: Config) -> None:
    config = common.prepare(config, SMOKE)
    results = common.run("alignment", config, compute, draw)["results"]
    for name, found in results["training"].items():
        print(
            f"{name:20} mu (times outputs) {found['mu']['mean'][0]:.2f} at the start, "
            f"{found['mu']['mean'][-1]:.2f} at the end; isotropic noise "
            f"{found['isotropic_mu']['mean'][-1]:.4f}"
        )
    for bound in BOUNDS:
        share = results["grid"][bound]["median_share"]
        print(f"median norm over {bound.replace('_', ' ')}: {share:.2f}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))

"""Which measure of sharpness tells how well a network generalises?

Trains some thousand small networks on real digits, some labels wrong, to the same training
loss: every combination of learning rate, batch size, width, weight decay, momentum,
skip connections and normalization. Ranks them by every measure of ``flatopt.sharpness`` and
by their generalization gap, and gives Kendall's tau of the two. Then the same along label
noise, input noise and width. The protocol is that of Bisla, Wang, Choromanska (arXiv
2201.08025), section 4; theirs are narrow ResNets on CIFAR-10.
"""

import dataclasses
import functools
import itertools

import common
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import scipy.stats
import tqdm
import tyro

from flatopt import curvature, sharpness

# Kendall's tau: over all networks (printed by the authors' code), then read off the titles
# of their figures on label noise, input noise and width. The Shannon entropy has its sign
# turned, as flatopt's; their PAC-Bayes measure takes the distance from zero.
PAPER = {
    "gap": {
        "low_pass": 0.606,
        "frobenius_norm": 0.481,
        "pac_bayes, from zero": 0.466,
        "epsilon_sharpness": 0.383,
        "shannon_entropy": -0.296,
        "fisher_rao_hessian": 0.270,
        "local_entropy_gradient": -0.064,
    },
    "label_noise": {
        "max_eigenvalue": 0.778,
        "frobenius_norm": 0.733,
        "trace": 0.733,
        "effective_dimension": 0.689,
        "epsilon_sharpness": -0.200,
        "pac_bayes, from zero": 0.911,
        "fisher_rao_hessian": 0.644,
        "shannon_entropy": 0.333,
        "local_entropy_gradient": 0.600,
        "low_pass": 0.867,
    },
    "input_noise": {
        "max_eigenvalue": 0.674,
        "frobenius_norm": 0.947,
        "trace": 0.800,
        "effective_dimension": 0.800,
        "epsilon_sharpness": 0.684,
        "pac_bayes, from zero": 0.916,
        "fisher_rao_hessian": 0.442,
        "shannon_entropy": -0.611,
        "local_entropy_gradient": 0.811,
        "low_pass": 0.916,
    },
    "width": {
        "max_eigenvalue": 0.778,
        "frobenius_norm": 0.823,
        "trace": 0.794,
        "effective_dimension": 0.149,
        "epsilon_sharpness": 0.774,
        "pac_bayes, from zero": 0.440,
        "fisher_rao_hessian": 0.810,
        "shannon_entropy": -0.617,
        "local_entropy_gradient": -0.141,
        "low_pass": 0.851,
    },
}


@dataclasses.dataclass
class Config(common.Config):
    """Settings of the study."""

    learning_rates: tuple[float, ...] = (0.05, 0.1, 0.2)
    """Learning rates of SGD, constant; the step is taken times 1 less the momentum."""
    momenta: tuple[float, ...] = (0.0, 0.9)
    """Coefficients of the momentum buffer."""
    weight_decays: tuple[float, ...] = (0.0, 5e-4, 2e-3)
    """Coefficients of the parameters added to the gradient."""
    batch_sizes: tuple[int, ...] = (10, 50)
    """Images a step."""
    widths: tuple[int, ...] = (16, 24, 32)
    """Units of each hidden layer."""
    skips: tuple[bool, ...] = (False, True)
    """Whether hidden layers are added to what comes in."""
    norms: tuple[bool, ...] = (False, True)
    """Whether there are layer norms."""
    seeds: int = 3
    """Networks of each configuration: start and batches change, the data stay."""
    train_images: int = 200
    """Number of training images."""
    label_noise: float = 0.2
    """Share of training labels replaced by random ones."""
    target_loss: float = 0.05
    """Training loss at which a network is measured."""
    epochs: int = 800
    """Longest training; a network that is not at the target by then is left out."""
    noise_seeds: int = 5
    """Networks of each level of label or input noise and of each width."""
    label_noises: tuple[float, ...] = tuple(round(0.1 * i, 1) for i in range(10))
    """Levels of label noise."""
    input_noises: tuple[float, ...] = tuple(round(0.2 * i, 1) for i in range(20))
    """Levels of Gaussian noise on the training images, in their standard deviations."""
    many_widths: tuple[int, ...] = (*range(1, 9), 10, 12, 14, 16, 20, 24, 32, 48, 64)
    """Widths along which to look for double descent."""
    width_epochs: int = 1000
    """Training along the widths, the same for all."""
    radii: tuple[float, ...] = (0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    """Scales of the low-pass measure."""
    resamples: int = 1000
    """Bootstrap samples of an interval."""


SMOKE = {
    "learning_rates": (0.1, 0.2),
    "momenta": (0.9,),
    "weight_decays": (0.0, 1e-3),
    "batch_sizes": (10,),
    "widths": (8,),
    "skips": (False,),
    "norms": (False,),
    "seeds": 2,
    "train_images": 20,
    "target_loss": 1.0,
    "epochs": 60,
    "noise_seeds": 1,
    "label_noises": (0.0, 0.5),
    "input_noises": (0.0, 1.0),
    "many_widths": (4, 8),
    "width_epochs": 60,
    "radii": (0.01, 0.1),
    "resamples": 10,
}

BLOCKS = 2
LOW_PASS = "low_pass {:g}"
HYPERPARAMETERS = (
    "learning_rate",
    "momentum",
    "weight_decay",
    "batch_size",
    "width",
    "skip",
    "norm",
)


# Networks


def init(key, width, active, norm):
    """Parameters of a network with ``width`` units a layer, the first ``active`` in use.

    The others are zero, and stay zero in training: networks of many widths are one program.
    """
    keys = jax.random.split(key, BLOCKS + 2)
    used = (jnp.arange(width) < active).astype(jnp.float32)

    def dense(key, num_inputs, rows, columns):
        kernel = jax.random.normal(key, (len(rows), len(columns)))
        kernel *= (2 / num_inputs) ** 0.5 * jnp.outer(rows, columns)
        return {"kernel": kernel, "bias": jnp.zeros(len(columns))}

    params = {
        "first": dense(keys[0], 64, jnp.ones(64), used),
        "output": dense(keys[1], active, used, jnp.ones(10)),
    }
    for index, block_key in enumerate(keys[2:]):
        params[f"block {index}"] = dense(block_key, active, used, used)
    if norm:
        for index in range(BLOCKS + 1):
            params[f"norm {index}"] = {"scale": used, "bias": jnp.zeros(width)}
    return params


def apply(params, images, skip):
    """Logits of a network of dense layers, with or without skips and layer norms."""

    def layer(index, name, x):
        x = dense(name, x)
        if (norm := params.get(f"norm {index}")) is not None:
            x = jax.nn.standardize(x, epsilon=1e-5) * norm["scale"] + norm["bias"]
        return jax.nn.relu(x)

    def dense(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"]

    x = layer(0, "first", images)
    for index in range(BLOCKS):
        y = layer(index + 1, f"block {index}", x)
        x = x + y if skip else y
    return dense("output", x)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Functions:
    """The functions of networks with or without skips.

    The measures are taken of normalized parameters. Their units, the sizes of the filters,
    come with the data, once an example: networks of one shape are then measured by one
    program, where units in the loss itself would compile it again for each network.
    """

    def __init__(self, skip):
        self.skip = skip

    def model_fn(self, params, images):
        return apply(params, images, self.skip)

    def loss_fn(self, params, batch):
        images, labels = batch
        return cross_entropy(self.model_fn(params, images), labels)

    def normalized_loss_fn(self, normalized, batch):
        units, images, labels = batch
        params = jax.tree.map(lambda p, u: p * u[0], normalized, units)
        return self.loss_fn(params, (images, labels))

    def accuracy(self, params, images, labels):
        return (self.model_fn(params, images).argmax(axis=-1) == labels).mean()

    @functools.partial(jax.jit, static_argnums=(0, 1, 2))
    def train(self, shape, epochs, target, settings, data, test):
        """Train the networks of all settings, each on data of its own, side by side."""
        one = functools.partial(self.train_one, shape, epochs, target)
        return jax.vmap(one, in_axes=(0, 0, None))(settings, data, test)

    def train_one(self, shape, epochs, target, setting, data, test):
        """Train to the target loss, or to the end; return the network of that moment."""
        width, norm, batch_size = shape
        images, labels = data
        key = jax.random.key(setting["seed"])
        start = init(key, width, setting["width"], norm)
        momentum = setting["momentum"]
        tx = optax.chain(
            optax.add_decayed_weights(setting["weight_decay"]),
            optax.sgd(setting["learning_rate"] * (1 - momentum), momentum),
        )

        def batches(number):
            order = jax.random.permutation(jax.random.fold_in(key, number), len(labels))
            return order.reshape(-1, batch_size)

        def step(carry, chosen):
            params, state = carry
            grads = jax.grad(self.loss_fn)(params, (images[chosen], labels[chosen]))
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        def going(carry):
            (params, _), _, number = carry
            return (number <= epochs) & (self.loss_fn(params, data) > target)

        def epoch(carry):
            now, _, number = carry
            return jax.lax.scan(step, now, batches(number))[0], now, number + 1

        now = start, tx.init(start)
        now, before, number = jax.lax.while_loop(going, epoch, (now, now, jnp.int32(1)))
        reached = jnp.where(self.loss_fn(now[0], data) <= target, number - 1, 0)

        def search(carry, chosen):
            """The step of that epoch which passes the target, as two iterates."""
            now, ends, passed = carry
            after, _ = step(now, chosen)
            ends = where(passed, ends, (now[0], after[0]))
            return (
                after,
                ends,
                passed | (self.loss_fn(after[0], data) <= target),
            ), None

        carry = before, (before[0], before[0]), jnp.bool_(False)
        (_, ends, _), _ = jax.lax.scan(search, carry, batches(reached))
        params = where(reached == 0, now[0], self.between(*ends, data, target))
        return {
            "params": params,
            "start": start,
            "epoch": reached,
            "loss": self.loss_fn(params, data),
            "train_accuracy": self.accuracy(params, *data),
            "test_accuracy": self.accuracy(params, *test),
        }

    def between(self, before, after, data, target):
        """The point between two iterates whose loss is the target, by bisection."""

        def at(share):
            return optax.tree.add_scale(before, share, optax.tree.sub(after, before))

        def halve(_, ends):
            low, high = ends
            middle = (low + high) / 2
            above = self.loss_fn(at(middle), data) > target
            return jnp.where(above, middle, low), jnp.where(above, high, middle)

        return at(jax.lax.fori_loop(0, 20, halve, (0.0, 1.0))[1])


def where(condition, tree, other):
    return jax.tree.map(functools.partial(jnp.where, condition), tree, other)


FUNCTIONS = {skip: Functions(skip) for skip in (False, True)}


# Measures


def measure(functions, config, width, network, data):
    """Every measure of one network on its training data; larger is sharper.

    Parameters are in units of their filters, as in the paper. Fisher-Rao norms and adaptive
    measures are the same in all units.
    """
    params, (images, labels) = network["params"], data
    key = jax.random.key(0)
    normalized, start, units = normalize(params, network["start"], width)
    units = jax.tree.map(lambda u: jnp.broadcast_to(u, (len(labels), *u.shape)), units)
    batch = units, images, labels
    quarter = len(labels) // 4
    batches = [
        jax.tree.map(lambda array, i=i: array[i * quarter :][:quarter], batch)
        for i in range(4)
    ]
    at = {"loss_fn": functions.normalized_loss_fn, "params": normalized, "key": key}
    raw = {"loss_fn": functions.loss_fn, "params": params}
    operator = curvature.hessian(at["loss_fn"], normalized, batch)
    probe = curvature.probe(operator, key)
    tolerated = sharpness.pac_bayes(
        **at, initial_params=start, num_examples=len(labels), data=batch
    )
    norm = optax.tree.norm(normalized)
    distance = optax.tree.norm(optax.tree.sub(normalized, start))
    found = {
        LOW_PASS.format(sigma): sharpness.low_pass(**at, sigma=sigma, data=batch).value
        for sigma in config.radii
    }
    found |= {
        "trace": probe.trace.value,
        "frobenius_norm": probe.frobenius_norm.value,
        "max_eigenvalue": curvature.eigenpairs(operator, key).values[0],
        "effective_dimension": sharpness.effective_dimension(
            **at, num_draws=2, num_steps=32, data=batch
        ).value,
        "local_entropy": sharpness.local_entropy(**at, data=batch).value,
        "local_entropy_gradient": sharpness.local_entropy_gradient(**at, data=batches),
        "epsilon_sharpness": sharpness.epsilon_sharpness(
            at["loss_fn"], normalized, data=batch
        ),
        "worst_case": sharpness.worst_case(**at, rho=0.05, data=batch),
        "worst_case_adaptive": sharpness.worst_case(
            **raw, key=key, rho=0.5, adaptive=True, data=data
        ),
        "m_sharpness": sharpness.m_sharpness(**at, rho=0.05, batches=batches).value,
        "average_case_adaptive": sharpness.average_case_adaptive(
            **raw, key=key, data=data
        ).value,
        "pac_bayes": tolerated.value,
        "pac_bayes, from zero": norm**2 / (4 * tolerated.sigma**2),
        "inverse_sigma": 1 / tolerated.sigma,
        "fisher_rao_hessian": sharpness.fisher_rao_hessian(**raw, data=data),
        "fisher_rao_gauss_newton": sharpness.fisher_rao_gauss_newton(
            functions.model_fn, cross_entropy, params, data
        ),
        "fisher_rao_empirical": sharpness.fisher_rao_empirical(**raw, data=data),
        "shannon_entropy": sharpness.shannon_entropy(
            functions.model_fn, params, images
        ),
        "parameter norm": norm,
        "distance": distance,
        "training loss": network["loss"],
    }
    return {name: float(value) for name, value in found.items()}


def normalize(params, start, width):
    """Parameters and start in units of the filters, and these units: zero if not in use."""
    normalized, restore = sharpness.normalize_filters(params)
    units = restore(jax.tree.map(jnp.ones_like, params))
    start = jax.tree.map(jnp.divide, start, units)
    used = {
        name: jax.tree.map(lambda u: u * (jnp.arange(u.shape[-1]) < width), layer)
        for name, layer in units.items()
        if name != "output"
    }
    return normalized, start, units | used


def train_and_measure(functions, config, shape, epochs, target, settings, data, test):
    """Networks of one shape: training side by side, then measures one by one."""
    columns = {
        name: jnp.asarray([setting[name] for setting in settings])
        for name in ("learning_rate", "momentum", "weight_decay", "width", "seed")
    }
    data = tuple(jnp.asarray(array) for array in data)
    trained = functions.train(shape, epochs, target, columns, data, test)
    found = []
    for index, setting in enumerate(settings):
        network = jax.tree.map(lambda leaf, i=index: leaf[i], trained)
        own = tuple(array[index] for array in data)
        record = setting | {
            "epoch": int(network["epoch"]),
            "gap": float(network["train_accuracy"] - network["test_accuracy"]),
            "test_error": float(1 - network["test_accuracy"]),
        }
        if target == 0 or record["epoch"]:
            record["measures"] = measure(
                functions, config, setting["width"], network, own
            )
        found.append(record)
    return found


# The study


def compute(config, piece):
    total = len(settings_of(config)) * len(config.batch_sizes) * len(config.widths)
    total *= len(config.skips) * len(config.norms)
    levels = [config.label_noises, config.input_noises, config.many_widths]
    total += config.noise_seeds * sum(map(len, levels))
    with tqdm.tqdm(total=total, unit="network") as progress:

        def networks(name, function):
            progress.set_description(name)
            found = piece(name, function)
            progress.update(len(found))
            return found

        grid = train_grid(config, networks)
        along = {
            "label_noise": networks("label noise", lambda: along_label_noise(config)),
            "input_noise": networks("input noise", lambda: along_input_noise(config)),
            "width": networks("widths", lambda: along_width(config)),
        }
    configurations = average(grid, HYPERPARAMETERS)
    return {
        "paper": PAPER,
        "gap": piece("statistics", lambda: gap_statistics(configurations, config)),
        "networks": counts(grid, configurations),
        **{name: along_statistics(found, name) for name, found in along.items()},
        "configurations": columns(configurations),
    }


def settings_of(config):
    """What networks of one shape and batch size differ in."""
    names = "learning_rate", "momentum", "weight_decay", "seed"
    values = itertools.product(
        config.learning_rates,
        config.momenta,
        config.weight_decays,
        range(1, 1 + config.seeds),
    )
    return [dict(zip(names, value, strict=True)) for value in values]


def train_grid(config, networks):
    """Every combination of hyperparameters, one piece for each shape and batch size."""
    splits = common.split_digits(0, config.train_images, config.label_noise)
    found = []
    for width, batch_size, skip, norm in itertools.product(
        config.widths, config.batch_sizes, config.skips, config.norms
    ):
        own = {"width": width, "batch_size": batch_size, "skip": skip, "norm": norm}
        settings = [setting | own for setting in settings_of(config)]
        data = [np.stack([part] * len(settings)) for part in splits["train"]]
        found += networks(
            f"width {width}, batches of {batch_size}, skip {skip}, norm {norm}",
            functools.partial(
                train_and_measure,
                FUNCTIONS[skip],
                config,
                (width, norm, batch_size),
                config.epochs,
                config.target_loss,
                settings,
                data,
                splits["test"],
            ),
        )
    return found


# Of the networks whose data or widths are varied, which have no skips or norms.
TYPICAL = {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 5e-4}


def train_along(config, cases, epochs, target):
    """Networks of several seeds for each case: its level, its settings, its data."""
    settings, data = [], []
    for level, setting, own in cases:
        for seed in range(1, 1 + config.noise_seeds):
            fixed = {"width": config.widths[-1], "level": level, "seed": seed}
            settings.append(TYPICAL | fixed | setting)
            data.append(own)
    widest = max(setting["width"] for setting in settings)
    return train_and_measure(
        FUNCTIONS[False],
        config,
        (widest, False, config.batch_sizes[0]),
        epochs,
        target,
        settings,
        [np.stack(part) for part in zip(*data, strict=True)],
        common.split_digits(0, config.train_images)["test"],
    )


def along_label_noise(config):
    cases = [
        (noise, {}, common.split_digits(0, config.train_images, noise)["train"])
        for noise in config.label_noises
    ]
    return train_along(config, cases, config.epochs, config.target_loss)


def along_input_noise(config):
    images, labels = common.split_digits(0, config.train_images)["train"]
    noise = images.std() * np.random.default_rng(0).normal(size=images.shape)
    cases = [
        (level, {}, (np.float32(images + level * noise), labels))
        for level in config.input_noises
    ]
    return train_along(config, cases, config.epochs, config.target_loss)


def along_width(config):
    """All trained equally long, without weight decay: the narrow ones do not fit."""
    data = common.split_digits(0, config.train_images, config.label_noise)["train"]
    cases = [
        (width, {"width": width, "weight_decay": 0.0}, data)
        for width in config.many_widths
    ]
    return train_along(config, cases, config.width_epochs, target=0.0)


# Statistics


def average(networks, names):
    """Means over the seeds of each configuration, where all of them were measured."""
    groups = {}
    for network in networks:
        groups.setdefault(tuple(network[name] for name in names), []).append(network)
    found = []
    for values, group in groups.items():
        if all("measures" in network for network in group):
            found.append(
                dict(zip(names, values, strict=True))
                | {
                    "gaps": [network["gap"] for network in group],
                    "gap": np.mean([network["gap"] for network in group]),
                    "test_error": np.mean([n["test_error"] for n in group]),
                    "measures": {
                        measure: np.mean([n["measures"][measure] for n in group])
                        for measure in group[0]["measures"]
                    },
                }
            )
    return found


def columns(configurations):
    """Lists in place of a list of dicts."""
    names = [name for name in configurations[0] if name != "measures"]
    measures = configurations[0]["measures"]
    return {name: [c[name] for c in configurations] for name in names} | {
        "measures": {
            name: [c["measures"][name] for c in configurations] for name in measures
        }
    }


def counts(networks, configurations):
    """How many there are, how far they got, and how much there is to explain."""
    gaps = np.array([c["gaps"] for c in configurations])
    others = [np.delete(gaps, seed, axis=1).mean(axis=1) for seed in range(len(gaps.T))]
    measured = [network for network in networks if "measures" in network]
    losses = [network["measures"]["training loss"] for network in measured]
    return {
        "trained": len(networks),
        "measured": len(measured),
        "left_out": len(networks) - len(measured),
        "configurations": len(configurations),
        "training_loss": {"smallest": min(losses), "largest": max(losses)},
        "gap": {
            "smallest": gaps.mean(axis=1).min(),
            "largest": gaps.mean(axis=1).max(),
            "deviation": gaps.mean(axis=1).std(ddof=1),
            "deviation_of_a_seed": gaps.std(axis=1, ddof=1).mean(),
        },
        "tau_of_one_seed_with_the_others": np.mean(
            [tau(one, rest) for one, rest in zip(gaps.T, others, strict=True)]
        ),
    }


def tau(x, y):
    """Kendall's tau-b where both are finite."""
    x, y = np.asarray(x), np.asarray(y)
    both = np.isfinite(x) & np.isfinite(y)
    if both.sum() < 2:
        return np.nan
    return float(scipy.stats.kendalltau(x[both], y[both]).statistic)


def gap_statistics(configurations, config):
    """Kendall's tau of every measure with the gap: of all, and where little changes."""
    gap = np.array([c["gap"] for c in configurations])
    rng = np.random.default_rng(0)
    samples = rng.integers(0, len(gap), (config.resamples, len(gap)))
    values = columns(configurations)["measures"]
    drawn = {
        name: np.array([tau(np.take(value, s), gap[s]) for s in samples])
        for name, value in tqdm.tqdm(values.items(), desc="bootstrap", leave=False)
    }
    taus = {name: tau(value, gap) for name, value in values.items()}
    best = max(taus, key=taus.get)
    architecture = [
        name for name in HYPERPARAMETERS if name in ("width", "skip", "norm")
    ]
    return {
        name: {
            "tau": taus[name],
            "interval": np.quantile(drawn[name], [0.025, 0.975]),
            "behind_best": np.quantile(drawn[best] - drawn[name], [0.025, 0.975]),
            "granulated": granulated(configurations, name),
            "same_architecture": grouped(configurations, name, architecture),
            "not_finite": int(np.sum(~np.isfinite(value))),
        }
        for name, value in values.items()
    }


def granulated(configurations, name):
    """Tau where one hyperparameter changes, for each, and their mean."""
    found = {
        changed: grouped(
            configurations,
            name,
            [other for other in HYPERPARAMETERS if other != changed],
        )
        for changed in HYPERPARAMETERS
    }
    means = [value["mean"] for value in found.values() if value["count"]]
    return found | {"mean": np.mean(means) if means else np.nan}


def grouped(configurations, name, fixed):
    """Mean tau within groups that agree in the fixed hyperparameters."""
    groups = {}
    for c in configurations:
        pair = c["measures"][name], c["gap"]
        groups.setdefault(tuple(c[f] for f in fixed), []).append(pair)
    found = [
        tau(*zip(*group, strict=True)) for group in groups.values() if len(group) > 1
    ]
    found = [value for value in found if np.isfinite(value)]
    if not found:
        return {"mean": np.nan, "error": np.nan, "count": 0}
    return common.mean_and_error(found)


def along_statistics(networks, name):
    """Tau of every measure with the level, and with the test error; curves of both."""
    levels = average(networks, ("level",))
    values = columns(levels)
    x = np.array(values["level"])
    y = np.array(values["test_error"])
    return {
        "levels": x,
        "test_error": y,
        "left_out": sum("measures" not in network for network in networks),
        "measures": {
            measure: {
                "tau": tau(value, y if name == "width" else x),
                "tau_with_test_error": tau(value, y),
            }
            for measure, value in values["measures"].items()
        },
        "curves": values["measures"],
    }


# Figure


def draw(report):
    results = report["results"]
    figure, axes = plt.subplots(1, 3, figsize=(14, 5), layout="constrained")
    draw_taus(axes[0], results)
    draw_radii(axes[1], results, report["settings"]["radii"])
    draw_networks(axes[2], results)
    return figure


def draw_taus(axis, results):
    taus = results["gap"]
    names = sorted(taus, key=lambda name: taus[name]["tau"])
    middle = np.array([taus[name]["tau"] for name in names])
    ends = np.array([taus[name]["interval"] for name in names]).T
    axis.errorbar(middle, range(len(names)), xerr=abs(ends - middle), fmt="o", ms=4)
    paper = {
        LOW_PASS.format(0.01) if n == "low_pass" else n: v
        for n, v in PAPER["gap"].items()
    }
    rows = [names.index(name) for name in paper if name in names]
    values = [paper[names[row]] for row in rows]
    axis.plot(values, rows, "x", color="black", label="the paper's networks")
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.axvline(0, color="gray", linewidth=0.8)
    axis.set_xlabel("Kendall's tau with the generalization gap")
    axis.legend(fontsize=8, loc="lower right")


def draw_radii(axis, results, radii):
    for label, taus in {
        "gap": results["gap"],
        "label noise": results["label_noise"]["measures"],
        "input noise": results["input_noise"]["measures"],
        "test error along width": results["width"]["measures"],
    }.items():
        values = [taus[LOW_PASS.format(sigma)]["tau"] for sigma in radii]
        axis.plot(radii, values, "o-", label=label)
    axis.set(
        xscale="log",
        xlabel="radius of the low-pass measure",
        ylabel="Kendall's tau",
        ylim=(-1.05, 1.05),
    )
    axis.axhline(0, color="gray", linewidth=0.8)
    axis.legend(fontsize=8)


def draw_networks(axis, results):
    table = results["configurations"]
    gap, value = (
        np.array(table["gap"]),
        np.array(table["measures"][LOW_PASS.format(0.01)]),
    )
    for norm, skip in itertools.product((False, True), (False, True)):
        chosen = (np.array(table["norm"]) == norm) & (np.array(table["skip"]) == skip)
        label = f"{'norm' if norm else 'no norm'}, {'skip' if skip else 'no skip'}"
        axis.plot(value[chosen], gap[chosen], ".", label=label)
    axis.set(
        xscale="log",
        xlabel="low-pass measure, radius 0.01",
        ylabel="generalization gap",
    )
    axis.legend(fontsize=8)


def main(config):
    report = common.run("sharpness_study", common.prepare(config, SMOKE), compute, draw)
    taus = report["results"]["gap"]
    for name in sorted(taus, key=lambda name: -taus[name]["tau"]):
        low, high = taus[name]["interval"]
        print(
            f"{name:24} tau with the gap {taus[name]['tau']:.3f} ({low:.3f} to {high:.3f}), "
            f"granulated {taus[name]['granulated']['mean']:.3f}"
        )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))

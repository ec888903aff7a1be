"""Every measure of ``flatopt.sharpness`` of one network, in units of its filters."""

import jax
import jax.numpy as jnp
import optax
import pandas as pd

from flatopt import curvature, sharpness

from .one_loss import cross_entropy
from .statistics import mean_of

LOW_PASS = "low_pass {:g}"


def measure(functions, radii, width, network, data):
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
        for sigma in radii
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


def train_and_measure(functions, radii, shape, epochs, target, settings, data, test):
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
                functions, radii, setting["width"], network, own
            )
        found.append(record)
    return found


def average(
    networks: list[dict], names: list[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Means over the seeds of each configuration, where all of them were measured.

    Args:
      networks: what `train_and_measure` returns.
      names: settings that make a configuration.

    Returns:
      A table of the configurations, and one of their measures, with equal rows.
    """
    table = pd.DataFrame(networks)
    groups = [table[name] for name in names]
    table = table[table["measures"].notna().groupby(groups).transform("all")]
    groups = [table[name] for name in names]
    found = table.groupby(groups, sort=False).agg(
        gaps=("gap", list), gap=("gap", mean_of), test_error=("test_error", mean_of)
    )
    values = pd.DataFrame(table["measures"].tolist(), index=table.index)
    values = values.groupby(groups, sort=False).agg(mean_of)
    return found.reset_index(), values.reset_index(drop=True)

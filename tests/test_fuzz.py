"""Any link with any arguments gives what NumPy gives, or one sentence of ours.

``FLATOPT_FUZZ=500`` sets the number of cases of each test.
"""

import os
import pathlib
import re
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import TRANSFORMATIONS, optimizer, takes, types
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import sparse

import flatopt
from flatopt import kernels

CASES = int(os.environ.get("FLATOPT_FUZZ", "30"))
fuzz = settings(
    max_examples=CASES, deadline=None, derandomize=True, database=None, print_blob=False
)
PACKAGE = str(pathlib.Path(flatopt.__file__).parent)


# A loss, its gradient and its smoothing in NumPy


def value_fn(params, batch, unused=0):
    """Not quadratic, so that the gradient depends on where it is taken."""
    del unused
    second = jnp.mean(batch**2)
    return sum(
        second * jnp.sum(p.astype(jnp.float32) ** 2) / 2
        + jnp.mean(batch) * jnp.sum(jnp.cos(p.astype(jnp.float32)))
        for p in jax.tree.leaves(params)
    ) + jnp.zeros(())


def _value_and_gradient(params, batch):
    first, second = batch.mean(), (batch**2).mean()
    value = sum(
        second * (p**2).sum() / 2 + first * np.cos(p).sum() for p in params.values()
    )
    return value, {n: second * p - first * np.sin(p) for n, p in params.items()}


def _moved(params, step, dtype):
    """Parameters after a step, as rounded as they are."""
    return {
        n: np.asarray(jnp.asarray(p + step[n], dtype), "f8") for n, p in params.items()
    }


def _mean(pairs):
    values, grads = zip(*pairs, strict=True)
    names = grads[0]
    return sum(values) / len(values), {
        n: sum(g[n] for g in grads) / len(grads) for n in names
    }


def _chunks(batch, count, is_split):
    return [batch[j::count] if is_split else batch for j in range(count)]


def _step_key(case):
    return jax.random.fold_in(jax.random.key(case["key"]), 0)


def _noises(case, kernel, free, count):
    draw = kernel.bind(_step_key(case), free)
    for index in range(count):
        noise = draw(jax.random.fold_in(_step_key(case), index))
        yield {n: np.asarray(noise[n], "f8") for n in noise}


def _smoothed(case, kernel, free, params, dtype):
    count, scale = case["count"], case["scale"]
    pairs = []
    noises = _noises(case, kernel, free, count)
    chunks = _chunks(case["batch"], count, case["is_split"])
    for chunk, noise in zip(chunks, noises, strict=True):
        for sign in (1, -1) if case["antithetic"] else (1,):
            step = {n: sign * scale * u for n, u in noise.items()}
            pairs.append(_value_and_gradient(_moved(params, step, dtype), chunk))
    return _mean(pairs)


def _norm(tree):
    return np.sqrt(sum((x**2).sum() for x in tree.values()))


def _filter_norms(leaf):
    axes = tuple(range(leaf.ndim - 1))
    return np.sqrt((leaf**2).sum(axis=axes, keepdims=True))


ETA, ALPHA, SIGMA = 0.05, 0.4, 0.3
SIZES = {  # the units of an ascent step, from parameters and gradient
    "asam": lambda p, g: np.abs(p) + ETA,
    "filterwise_asam": lambda p, g: (
        (_filter_norms(p) if p.ndim > 1 else np.abs(p)) + ETA
    ),
    "fisher_sam": lambda p, g: 1 / np.sqrt(1 + ETA * g**2),
}
NOISY = {"random_sam": kernels.filterwise(), "noisy_sam": kernels.isotropic()}


def _ascent(case, params, grad):
    """The ascent step of a method at its first step."""
    if case["link"] == "usam":
        return {n: case["scale"] * g for n, g in grad.items()}
    size_of = SIZES.get(case["link"], lambda p, g: np.ones_like(p))
    sizes = {n: size_of(params[n], grad[n]) for n in params}
    norm = _norm({n: sizes[n] * grad[n] for n in grad})
    length = case["scale"] / norm if norm else 0.0
    return {n: length * sizes[n] ** 2 * grad[n] for n in grad}


def _ascended(case, free, params, dtype):
    pairs = []
    for index, chunk in enumerate(
        _chunks(case["batch"], case["count"], case["is_split"])
    ):
        start = params
        if case["link"] in NOISY:
            key = jax.random.fold_in(_step_key(case), index)
            noise = NOISY[case["link"]](key, free)
            noise = {n: SIGMA * np.asarray(noise[n], "f8") for n in params}
            start = _moved(params, noise, dtype)
        value, clean = _value_and_gradient(start, chunk)
        step = _ascent(case, params, clean)
        _, grad = _value_and_gradient(_moved(params, step, dtype), chunk)
        if case["link"] == "gsam":
            square = sum((g**2).sum() for g in grad.values())
            share = sum((clean[n] * grad[n]).sum() for n in grad) / (square or 1.0)
            grad = {
                n: g - ALPHA * (clean[n] - share * g)
                if square
                else g - ALPHA * clean[n]
                for n, g in grad.items()
            }
        pairs.append((value, grad))
    return _mean(pairs)


# Cases

KERNELS = {
    "normal": kernels.isotropic(),
    "signs": kernels.isotropic(kernels.signs),
    "uniform": kernels.isotropic(kernels.uniform),
    "filterwise": kernels.filterwise(),
    "elementwise": kernels.elementwise(kernels.laplace),
    "shared": kernels.shared_magnitude(kernels.isotropic()),
    "one layer": kernels.one_layer(kernels.isotropic(), lambda path: path),
}
SMOOTHED = ["smooth", "lpf", "nso"]
ASCENDED = [
    "sam",
    "usam",
    "asam",
    "filterwise_asam",
    "fisher_sam",
    "gsam",
    "look_sam",
    "friendly_sam",
    "random_sam",
    "noisy_sam",
]
SETTINGS = {
    "asam": {"eta": ETA},
    "filterwise_asam": {"eta": ETA},
    "fisher_sam": {"eta": ETA},
    "gsam": {"alpha": ALPHA},
    "random_sam": {"sigma": SIGMA},
    "noisy_sam": {"sigma": SIGMA},
}
SHAPES = [(), (3,), (2, 3), (0,), (0, 3)]
MASKS = [None, True, {"a": True, "b": False}, {"a": False, "b": True}]
CASE = st.fixed_dictionaries(
    {
        "link": st.sampled_from([*SMOOTHED * 4, *ASCENDED]),
        "kernel": st.sampled_from(sorted(KERNELS)),
        "shapes": st.tuples(st.sampled_from(SHAPES), st.sampled_from(SHAPES)),
        "dtype": st.sampled_from(["float32", "float32", "bfloat16", "float16"]),
        "scale": st.sampled_from([0.0, 0.1, 0.5]),
        "count": st.integers(1, 4),
        "is_split": st.booleans(),
        "antithetic": st.booleans(),
        "mask": st.sampled_from(MASKS),
        "strategy": st.sampled_from(["auto", "unroll", "auto", "unroll", "scan"]),
        "per_chunk": st.integers(1, 3),
        "key": st.integers(-2, 3),
        "seed": st.integers(0, 5),
    }
)


def _prepare(case):
    rng = np.random.default_rng(case["seed"])
    if case["link"] == "nso":
        case |= {"antithetic": True, "is_split": False}
    if case["link"] == "lpf":
        case["antithetic"] = False
    if case["link"] in ASCENDED and not case["is_split"]:
        case["count"] = 1
    case["batch"] = rng.normal(size=case["count"] * case["per_chunk"])
    params = {
        name: jnp.asarray(rng.normal(size=shape), case["dtype"])
        for name, shape in zip("ab", case["shapes"], strict=True)
    }
    options = {"mask": case["mask"], "key": case["key"]}
    if case["link"] != "nso":
        options["batch_argnames"] = ("batch",) if case["is_split"] else ()
    make = getattr(flatopt, case["link"] + "_gradients")
    if case["link"] in ASCENDED:
        options |= {"rho": case["scale"], "num_microbatches": case["count"]}
        options |= SETTINGS.get(case["link"], {})
    else:
        names = {"smooth": "scale", "lpf": "gamma", "nso": "sigma"}
        counts = {"nso": "num_perturbations"}
        options |= {
            names[case["link"]]: case["scale"],
            counts.get(case["link"], "num_samples"): case["count"],
            "kernel": KERNELS[case["kernel"]],
            "strategy": case["strategy"],
        }
        if case["link"] == "smooth":
            options["antithetic"] = case["antithetic"]
    arguments = {"value_fn": value_fn, "batch": jnp.asarray(case["batch"], jnp.float32)}
    return make, options, params, arguments


def _update(make, options, params, arguments):
    tx = make(**options)
    return tx.update(None, tx.init(params), params, **arguments)


@fuzz
@given(CASE)
def test_a_link_gives_what_numpy_gives(case):
    make, options, params, arguments = _prepare(case)
    updates, state = _update(make, options, params, arguments)

    mask = case["mask"] if isinstance(case["mask"], dict) else dict.fromkeys("ab", True)
    wide = {n: np.asarray(p, "f8") for n, p in params.items()}
    fixed = {n: p for n, p in wide.items() if not mask[n]}
    free = {n: p if mask[n] else None for n, p in params.items()}
    start = {n: p for n, p in wide.items() if mask[n]}
    if case["link"] in SMOOTHED:
        kernel = KERNELS[case["kernel"]]
        value, grads = _smoothed(case, kernel, free, start, case["dtype"])
    else:
        value, grads = _ascended(case, free, start, case["dtype"])
    chunks = _chunks(case["batch"], case["count"], case["is_split"])
    value += np.mean([_value_and_gradient(fixed, chunk)[0] for chunk in chunks])
    eps = float(jnp.finfo(case["dtype"]).eps)
    tolerance = max(20 * eps, 2e-5)
    np.testing.assert_allclose(
        flatopt.loss(state), value, rtol=tolerance, atol=tolerance
    )
    assert updates.keys() == params.keys()
    for name, update in updates.items():
        assert update.dtype == params[name].dtype
        expected = grads[name] if mask[name] else np.zeros(params[name].shape)
        np.testing.assert_allclose(
            np.asarray(update, "f8"), expected, rtol=tolerance, atol=tolerance
        )


# Faults

WRONG_NUMBERS = [-1.0, np.nan, np.inf, True, "0.1", None, 1j, jnp.ones(2), [0.1], -1]
WRONG_COUNTS = [0, -1, 1.5, "2", True, jnp.int32(2), [2]]
WRONG = {
    "scale": WRONG_NUMBERS,
    "rho": WRONG_NUMBERS,
    "num_samples": WRONG_COUNTS,
    "num_microbatches": WRONG_COUNTS,
    "start_step": [-1, 1.5, "2", True, jnp.ones(2), None],
    "strategy": ["loop", 0, 1.5, None, True, ["scan"]],
    "batch_argnames": ["batch", ("images",), (3,), None, 3],
    "axis_name": ["data", ("data", "x")],
    "key": [0.5, "x", None, True, np.ones(2), jnp.arange(3), 2**70, [0]],
    "mask": [
        {},
        {"a": True},
        {"a": 1, "b": 0},
        {"a": True, "b": True, "c": True},
        "yes",
        1,
        [True, False],
        jnp.array(True),
        {"a": True, "b": {"c": True}},
        lambda params: {"a": True},
        lambda params: None,
    ],
    "kernel": [
        kernels.filterwise,
        kernels.signs,
        jax.random.normal,
        kernels.Kernel,
        3,
        "filterwise",
        lambda key: key,
        lambda key, params: None,
        lambda key, params: {"a": jnp.zeros(7), "b": jnp.zeros(7)},
    ],
    "weight_fn": [3, "mask", lambda chunk: chunk, lambda chunk: None],
    "value_fn": [
        None,
        1.0,
        "loss",
        lambda params, batch: params,
        lambda params, batch: batch,
        lambda params, batch: (jnp.zeros(()), 1),
        lambda params, batch: None,
        lambda params, batch: jax.lax.complex(jnp.mean(batch), jnp.mean(batch)),
        lambda params, batch: 3,
        lambda params, batch, labels: jnp.mean(batch),
    ],
    "batch": [
        {"x": jnp.ones(7), "y": jnp.ones(8)},
        jnp.ones(7),
        3.0,
        None,
        sparse.BCOO.fromdense(jnp.ones((8, 2))),
    ],
    "params": [
        None,
        {"a": jnp.arange(3), "b": jnp.ones(2)},
        {"a": jnp.ones(3, jnp.complex64), "b": jnp.ones(2)},
        {"a": jnp.ones(3, bool), "b": jnp.ones(2)},
        {"a": "name", "b": jnp.ones(2)},
        {"a": jnp.tanh, "b": jnp.ones(2)},
        {"a": jax.random.key(0), "b": jnp.ones(2)},
    ],
}
FAULTS = [(name, i) for name, values in WRONG.items() for i in range(len(values))]
OF_SMOOTH = {"scale", "kernel", "num_samples", "strategy", "weight_fn"}
OF_ASCENT = {"rho", "num_microbatches", "start_step"}


@pytest.mark.heart
@fuzz
@given(CASE, st.sampled_from(FAULTS))
def test_a_fault_is_one_sentence_of_ours(case, fault):
    name, index = fault
    wrong = WRONG[name][index]
    if name in OF_SMOOTH:
        case["link"] = "smooth"
    if name in OF_ASCENT and case["link"] in SMOOTHED:
        case["link"] = "sam"
    if name == "batch_argnames" and case["link"] == "nso":
        case["link"] = "lpf"
    if name in ("params", "mask", "kernel"):  # with another fault out of the way
        case["mask"], case["shapes"] = None, ((3,), (2,))
    if name in ("batch", "weight_fn"):
        case["is_split"], case["count"] = True, 4
        if case["link"] == "nso":  # it splits no batch
            case["link"] = "lpf"
    make, options, params, arguments = _prepare(case)
    if name in ("value_fn", "batch"):
        arguments[name] = wrong
    elif name == "params":
        params = wrong
    else:
        options[name] = wrong
    with pytest.raises((ValueError, TypeError)) as raised:
        _update(make, options, params, arguments)
    message = str(raised.value)
    frame = traceback.extract_tb(raised.tb)[-1]
    assert frame.filename.startswith(PACKAGE), (fault, frame, message)
    assert re.search(r"\w+.*; '?\w+.*\.$", message), (fault, message)
    assert "\n" not in message, (fault, message)


# The links without a reference here, whole optimizers and what is around links

OTHERS = sorted(
    name
    for name in TRANSFORMATIONS
    if name.removesuffix("_gradients") not in {*SMOOTHED, *ASCENDED}
)


def _options(name, case):
    """Options of any transformation, as far as it takes them."""
    given = {
        "kernel": KERNELS[case["kernel"]],
        "num_samples": case["count"],
        "num_perturbations": case["count"],
        "num_microbatches": case["count"] if case["is_split"] else 1,
        "mask": case["mask"],
        "strategy": case["strategy"],
        "batch_argnames": ("batch",) if case["is_split"] else (),
        "key": case["key"],
    }
    if case["is_split"] and takes(name, "num_steps"):  # one chunk an inner step
        given["num_steps"] = case["count"]
    fixed = ("link", "inner", "optimizer")
    if any(takes(name, argument) for argument in fixed):
        return {}
    return {k: v for k, v in given.items() if takes(name, k)}


@fuzz
@given(st.sampled_from(OTHERS), CASE)
def test_any_transformation_keeps_shapes_and_is_finite(name, case):
    case["link"] = "smooth"
    _, _, params, arguments = _prepare(case)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        tx = optimizer(name, **_options(name, case))
        state, current = tx.init(params), params
        treedef = jax.tree.structure(state)
        for _ in range(2):
            zeros = jax.tree.map(jnp.zeros_like, current)
            updates, state = tx.update(zeros, state, current, **arguments)
            current = optax.apply_updates(current, updates)
    assert jax.tree.structure(state) == treedef
    assert types(current) == types(params)
    for leaf in jax.tree.leaves((updates, current)):
        assert np.isfinite(np.asarray(leaf, "f8")).all()
    frozen = case["mask"] if takes(name, "mask") else None
    for leaf in params if isinstance(frozen, dict) else ():
        if not frozen[leaf] and name != "track_stability":
            np.testing.assert_array_equal(current[leaf], params[leaf])

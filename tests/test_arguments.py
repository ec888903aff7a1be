"""Every argument of every public function: what is wrong is one sentence of ours."""

import functools
import inspect
import pathlib
import re
import traceback

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
import pytest
from flax import nnx

import flatopt
import flatopt.flax
from flatopt import curvature, kernels, plots, schedules, sharpness, stability

mpl.use("agg")
PACKAGE = str(pathlib.Path(flatopt.__file__).parent)
ROOMS = {
    "flatopt": flatopt,
    "curvature": curvature,
    "sharpness": sharpness,
    "stability": stability,
    "plots": plots,
    "kernels": kernels,
    "schedules": schedules,
    "flax": flatopt.flax,
}
KEY = jax.random.key(0)
PARAMS = jnp.ones(2)
BATCH = jnp.eye(8, 2)


def _loss(params, batch=BATCH):
    return jnp.mean((batch @ params) ** 2)


def _swapped(batch, params):
    return jnp.mean((batch @ params) ** 2)


def _model(params, inputs):
    return inputs @ params


def _squares(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def _outputs_loss(outputs, batch=BATCH):
    return jnp.mean(outputs**2) + 0 * jnp.mean(batch)


OPERATOR = curvature.hessian(_loss, PARAMS, BATCH)
NNX_MODEL = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
NNX_OPTIMIZER = nnx.Optimizer(NNX_MODEL, flatopt.nso_sgd(0.1), wrt=nnx.Param)


@pytest.fixture(scope="module")
def lin():
    """A linearization to ask about."""
    return stability.linearize(_model, PARAMS, BATCH, jnp.zeros(8))


VALID = {
    "learning_rate": 0.1,
    "batch_size": 1,
    "num_steps": 3,
    "params": PARAMS,
    "loss_fn": _loss,
    "value_fn": _loss,
    "model_fn": _model,
    "data": BATCH,
    "batches": [BATCH],
    "inputs": BATCH,
    "targets": jnp.zeros(8),
    "updates": PARAMS,
    "initial_params": PARAMS,
    "key": KEY,
    "operator": OPERATOR,
    "scale": 0.1,
    "rho": 0.1,
    "sigma": 0.1,
    "alpha": 0.1,
    "gamma": 0.1,
    "init_value": 1.0,
    "growth": 2.0,
    "transition_steps": 3,
    "link": flatopt.sam_gradients(0.1),
    "optimizer": optax.sgd(0.1),
    "inner": optax.sgd(0.1),
    "num_microbatches": 1,
    "kernel": kernels.isotropic(),
    "mask": True,
    "model": NNX_MODEL,
    "num_examples": 8,
    "density": curvature.SpectralDensity(np.ones((1, 3)), np.ones((1, 3)) / 3),
    "tx": optax.sgd(0.1),
    "ess": 8.0,
    "opt_state": (),
    "bits": 3,
    "coefficients": (0.1, 0.2),
    "metric_fn": _loss,
    "kappa": 0.5,
    "sharp_share": 0.1,
    "momentum": 0.9,
    "decay": 0.9,
    "scales": [0.0, 0.1],
    "steps": [0, 10, 20],
    "spectra": [5.0, 9.0, 20.0],
}


@functools.cache
def _results():
    """Valid arguments that take a run to make, for those who ask."""
    return {
        "probe": curvature.probe(OPERATOR, KEY, 2),
        "found": flatopt.radius(_loss, PARAMS, KEY, radii=[0.1, 0.2], num_samples=2),
    }


IVON = flatopt.ivon(0.1, 8.0)
ADAM_STATE = optax.tree.set(optax.adam(0.1).init(PARAMS), count=jnp.int32(9), nu=PARAMS)
PAIRS = {"data": (BATCH, jnp.zeros(8))}
OF_SQUARES = {"loss_fn": _squares}
CHANGES = {
    "curvature.gauss_newton": PAIRS | OF_SQUARES,
    "curvature.cross_entropy": {
        "logits": jnp.zeros((8, 3)),
        "labels": jnp.zeros(8, int),
    },
    "sharpness.fisher_rao_gauss_newton": PAIRS | OF_SQUARES,
    "stability.linearize_gauss_newton": OF_SQUARES,
    "stability.estimate_alignment": PAIRS,
    "stability.report": {"loss_scale": 1.0},
    "flax.update": {"optimizer": NNX_OPTIMIZER},
    "flatopt.functional_sam_gradients": {"loss_fn": _outputs_loss},
    "flatopt.sample_posterior": {"opt_state": IVON.init(PARAMS)},
    "flatopt.posterior_kernel": {"opt_state": IVON.init(PARAMS)},
    "stability.preconditioner": {
        "optimizer": optax.adam,
        "opt_state": ADAM_STATE,
    },
}

NUMBERS = ["a", -1.0, np.nan, np.inf, 1j, [0.1], jnp.ones(2)]
COUNTS = ["a", 0, -1, 1.5, [2], jnp.ones(2)]
KEYS = [None, "a", jnp.ones(2), jax.random.split(KEY, 2)]  # links take an int too
FUNCTIONS = [None, 3, "loss"]
OF_NOTHING = [lambda: 1]
MASKS = ["a", 1, {"x": True}, False, lambda params: False, *OF_NOTHING]
WRONG = dict.fromkeys(
    [
        "scale",
        "rho",
        "sigma",
        "gamma",
        "alpha",
        "eta",
        "noise_scale",
        "inner_learning_rate",
        "learning_rate",
        "init_value",
        "growth",
        "epsilon",
        "radius",
        "loss_scale",
        "factor",
        "mu",
        "delta",
        "decay",
    ],
    NUMBERS,
)
WRONG |= dict.fromkeys(
    [
        "num_samples",
        "num_steps",
        "num_probes",
        "num_draws",
        "num_matvecs",
        "num_runs",
        "num_points",
        "num_microbatches",
        "num_perturbations",
        "num_examples",
        "num_outputs",
        "batch_size",
        "every",
        "k",
        "max_matvecs",
        "chunk_size",
        "transition_steps",
    ],
    COUNTS,
)
WRONG |= dict.fromkeys(["loss_fn", "model_fn"], FUNCTIONS + OF_NOTHING)
WRONG |= {"value_fn": FUNCTIONS}
WRONG |= {
    "key": KEYS,
    "transition_steps": ["a", 0, -1.0, [2], jnp.ones(2)],
    "num_deflated": ["a", -1, 1.5],
    "start_step": ["a", -1, 1.5],
    "rtol": ["a", -1.0, np.nan, 0.0],
    "batch_sizes": ["a", [0], [-1], [1.5]],
    "start": ["a", -1.0, [1.0]],
    "which": ["middle", 3],
    "method": ["dropout", None, 3],
    "radii": ["a", 0.1, [], [-1.0], [0.2, 0.1], [np.nan], [1j], [[0.1]]],
    "found": [None, 3, OPERATOR],
    "probe": [None, 3, OPERATOR],
    "depth": ["a", 0, -1, 1.5],
    "to": [3, "a", jnp.ones(3)],
    "directions": [3, "a", [], PARAMS, jnp.ones((3, 2)), 1j * np.eye(2)],
    "trajectory": [3, "a", [], PARAMS, jnp.ones((3, 2)), 1j * np.eye(3, 2)],
    "steps": [None, 3, "a", [], [0, 1], [0, 0, 1], [0, np.nan, 1]],
    "spectra": [None, 3, "a", [], [1.0], [1.0, "a", 2.0], [[1.0], [1.0, 2.0], [1.0]]],
    "norm": ["l3", 2],
    "noise": ["none", 3],
    "sampling": ["sometimes", None, 3],
    "strategy": ["loop", 0, 1.5],
    "batch_norm": ["dirty", None],
    "progress": ["yes", 3],
    "operator": [None, "a", BATCH],
    "lin": [None, "a", BATCH],
    "params": [None, "a", {}, jnp.arange(2), jnp.zeros((0,))],
    "updates": [None, "a", jnp.ones(3)],
    "initial_params": [None, "a", jnp.ones(3)],
    "batches": [None, 3, [], "a"],
    "kernel": [3, "a", kernels.filterwise, kernels.signs],
    "sampler": [3, "a", kernels.isotropic()],
    "mask": MASKS,
    "noise_mask": MASKS,
    "constants": ["a"],
    "weight_fn": [3, "a", *OF_NOTHING],
    "layer_of": [3, "a", *OF_NOTHING],
    "norms_of": [3, "a"],
    "link": [None, 3, flatopt.sam_gradients],
    "inner": [None, 3, optax.sgd],
    "optimizer": [None, 3, optax.sgd],
    "model": [None, 3, "a", _loss],
    "width": ["a", -1.0, 0.0, np.nan],
    "data": ["a", b"a", [], jnp.zeros((0, 2))],
    "ax": ["a", 3, [3], np.array([None])],
}
# None is refused where it is no default, but for numbers that wrappers leave out.
OF_NONE = {
    "learning_rate",
    "batch_size",
    "rho",
    "sigma",
    "scale",
    "k",
    "mu",
    "num_steps",
}


def public_functions():
    """Names of the public functions that take arguments worth a check."""
    for room, module in ROOMS.items():
        for name in getattr(module, "__all__", None) or dir(module):
            function = getattr(module, name)
            is_ours = getattr(function, "__module__", "").startswith(module.__name__)
            if inspect.isfunction(function) and is_ours and not name.startswith("_"):
                yield f"{room}.{name}"


# Where loss_fn takes outputs.
OF_OUTPUTS = {
    *(name for name, changes in CHANGES.items() if "loss_fn" in changes),
    "stability.linearize",
    "stability.report",
}
# What any value may stand for.
FREE = {("sharpness.shannon_entropy", "params")}
SKIPPED = {
    "flatopt.loss",
    "flatopt.metrics",
    "flatopt.chain",
    "kernels.normal",
    "kernels.signs",
    "kernels.uniform",
    "kernels.irwin_hall",
    "kernels.laplace",
}


def _used(room, name, function, arguments):
    """Call a function, and what it returns as its user would."""
    if (room, name) == ("flax", "update"):
        arguments = {"batch": jnp.ones((2, 2)), **arguments}
        return function(**arguments)
    found = function(**arguments)
    if isinstance(found, optax.GradientTransformation) and name != "accumulate":
        named = "batch_argnames" in inspect.signature(function).parameters
        batch = {"batch": BATCH} if named else {}
        return found.update(None, found.init(PARAMS), PARAMS, value_fn=_loss, **batch)
    if isinstance(found, kernels.Kernel):
        return found(KEY, PARAMS)
    if name in ("smooth", "smooth_value_and_grad"):
        return found(KEY, PARAMS)
    if (room, name) == ("flax", "value_and_grad"):
        return found(KEY, NNX_MODEL)
    return found


@pytest.mark.heart
@pytest.mark.parametrize("full_name", sorted(public_functions()))
def test_a_wrong_argument_is_one_sentence_of_ours(full_name, request):
    if full_name in SKIPPED:
        return
    room, name = full_name.split(".")
    function = getattr(ROOMS[room], name)
    parameters = inspect.signature(function).parameters
    valid = VALID | CHANGES.get(full_name, {})
    if parameters.keys() & {"probe", "found"}:
        valid = valid | _results()
    given = {
        p: request.getfixturevalue("lin") if p == "lin" else valid[p]
        for p, parameter in parameters.items()
        if parameter.default is parameter.empty and p != "kwargs"
    }
    faults = []
    for parameter, p in parameters.items():
        values = list(WRONG.get(parameter, ()))
        if (full_name, parameter) in FREE:
            continue
        if parameter == "optimizer" and room in ("stability", "plots"):
            values = [3, "a", optax.sgd(0.1)]  # a function of the rate is asked for
        if parameter in ("model_fn", "value_fn", "loss_fn") and (
            full_name not in OF_OUTPUTS or parameter != "loss_fn"
        ):
            values.append(_swapped)
        if p.default is None:
            values = [x for x in values if x is not None]
        if parameter == "key" and room != "flatopt":
            values.append(0)
        if parameter in OF_NONE and p.default is not None:
            values.append(None)
        for wrong in values:
            try:
                _used(room, name, function, {**given, parameter: wrong})
            except (ValueError, TypeError) as error:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                message = str(error)
                ours = frame.filename.startswith(PACKAGE)
                if ours and "\n" not in message and re.search(r"got .*\.$", message):
                    continue
                faults.append((parameter, wrong, type(error).__name__, message[:120]))
            except Exception as error:  # noqa: BLE001
                faults.append(
                    (parameter, wrong, type(error).__name__, str(error)[:120])
                )
            else:
                faults.append((parameter, wrong, "no error"))
    assert not faults, "\n".join(map(repr, faults))

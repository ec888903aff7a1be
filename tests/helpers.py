"""Small problems with known answers, shared by the tests."""

import contextlib
import inspect
import json
import math
import os
import re
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax

import flatopt
from flatopt._core import platforms

STRATEGIES = ["vmap", "scan", "unroll", 3, "auto"]


def regression(num_examples=64, dtype=jnp.float32):
    """A two-layer regression: params, batch and loss_fn(params, batch)."""
    keys = jax.random.split(jax.random.key(7), 4)
    params = {
        "first": {"kernel": jax.random.normal(keys[0], (5, 4), dtype) / 2},
        "second": {
            "kernel": jax.random.normal(keys[1], (4, 2), dtype) / 2,
            "bias": jnp.zeros(2, dtype),
        },
    }
    batch = {
        "inputs": jax.random.normal(keys[2], (num_examples, 5), dtype),
        "targets": jax.random.normal(keys[3], (num_examples, 2), dtype),
    }
    return params, batch


def linear_outputs(params, rows):
    """Outputs (n, c) of a linear model, of which the rows (n, c, d) are the Jacobian.

    One function for all tests: compiled code is kept by it.
    """
    return jnp.einsum("ncd,d->nc", rows, params)


def loss_fn(params, batch):
    hidden = jnp.tanh(batch["inputs"] @ params["first"]["kernel"])
    bias = params["second"]["bias"]
    outputs = hidden @ params["second"]["kernel"] + bias[None]
    return jnp.mean((outputs - batch["targets"]) ** 2)


def leaves_array(tree):
    return np.concatenate(
        [np.ravel(np.asarray(x, "f8")) for x in jax.tree.leaves(tree)]
    )


def assert_close(tree, other, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(
            np.asarray(x, "f8"), np.asarray(y, "f8"), rtol=rtol, atol=atol
        )


def environment(num_devices, **variables):
    """Variables of a program that a test starts; it compiles as fast as the tests do."""
    count = f"device_count={num_devices}"
    flags = re.sub(r"device_count=\d+", count, os.environ["XLA_FLAGS"])
    return os.environ | {"XLA_FLAGS": flags, "MPLBACKEND": "agg"} | variables


SERVER = """
import contextlib, io, json, os, runpy, sys, traceback
out, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    path, *rest = json.loads(line)
    sys.argv, sys.path[0] = [path, *rest], os.path.dirname(path)
    printed, error = io.StringIO(), ""
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        try:
            runpy.run_path(path, run_name="__main__")
        except BaseException:
            error = traceback.format_exc()
    print(json.dumps([printed.getvalue(), error]), file=out, flush=True)
"""


@contextlib.contextmanager
def commands(env):
    """``run(path, *arguments)`` of Python files: their output.

    All in one process, since importing takes longer than most of them.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(*arguments):
        process.stdin.write(json.dumps([str(x) for x in arguments]) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, f"the process ended with {process.wait()}"
        printed, error = json.loads(answer)
        assert not error, error
        return printed

    with process:
        yield run
        process.stdin.close()


def types(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


@contextlib.contextmanager
def count_compilations():
    """Collect one entry for each XLA compilation inside the block."""
    compiled = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def softmax_regression():
    """Parameters, inputs, labels and a loss whose gradient NumPy can write out."""
    keys = jax.random.split(jax.random.key(11), 4)
    params = {
        "bias": jax.random.normal(keys[1], (3,)),
        "kernel": jax.random.normal(keys[0], (6, 3)),
    }
    inputs = jax.random.normal(keys[2], (32, 6))
    labels = jax.random.randint(keys[3], (32,), 0, 3)
    return params, inputs, labels


def softmax_loss(params, inputs, labels):
    logits = inputs @ params["kernel"] + params["bias"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def softmax_gradient(params, inputs, labels):
    """The gradient of ``softmax_loss`` in NumPy."""
    logits = inputs @ params["kernel"] + params["bias"]
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    error = (p - np.eye(3)[labels]) / len(labels)
    return {"bias": error.sum(axis=0), "kernel": inputs.T @ error}


# The register of transformations

TINY = 1e-3  # noise and ascent steps that leave a minimum where it is


class Row(NamedTuple):
    """One public transformation, as the shared tests use it.

    Attributes:
      arguments: arguments under which one step shows what the method does.
      tiny: those that differ where a run is to end at the minimum.
      quick: those that differ where every step is to show its number, and be cheap.
      quiet: those that differ where devices are not to draw noise of their own.
      gradients: gradients of the batch in the first three steps; None for products of the
        Hessian, which cannot be counted.
      rate: learning rate of the SGD after it.
      parts: positional arguments, of which there is no table of names.
      is_optimizer: whether it is a whole optimizer, not a link.
      is_last: whether it stands last in a chain.
      needs_value_fn: whether its update needs the loss.
      branches: more arguments, under each of which the loss is in a loop or a branch.
      make: what makes it, where its loss is not passed to update; None: its name.
      is_resumed: whether it has a kind of state, or reads one as no other does.
    """

    arguments: dict[str, Any]
    tiny: dict[str, Any] = {}
    quick: dict[str, Any] = {}
    quiet: dict[str, Any] = {}
    gradients: int | None = 6
    rate: float = 2e-3
    parts: tuple[Any, ...] = ()
    is_optimizer: bool = False
    is_last: bool = False
    needs_value_fn: bool = True
    branches: tuple[dict[str, Any], ...] = ()
    make: Any = None
    is_resumed: bool = False


def _sam(tiny=None, **options):
    arguments = {"rho": 0.1, **options.pop("arguments", {})}
    return Row(arguments, tiny={"rho": TINY, **(tiny or {})}, **options)


def _recipe(tiny, gradients, **options):
    rate = 0.05 if options.pop("adam", False) else TINY * 2
    arguments = {"learning_rate": 0.1, **options.pop("arguments", {})}
    tiny = {"learning_rate": rate, **tiny}
    return Row(arguments, tiny, gradients=gradients, is_optimizer=True, **options)


def _of_value_fn(make):
    """A link of a model and a loss: of the parameters themselves, and the loss of update."""

    def made(**options):
        def update(updates, state, params=None, *, value_fn=None, **extra_args):
            tx = make(lambda params: params, value_fn, **options)
            return tx.update(updates, state, params, **extra_args)

        tx = make(lambda params: params, jnp.sum, **options)
        update.makes_gradient = tx.update.makes_gradient
        return optax.GradientTransformationExtraArgs(tx.init, update)

    signature = inspect.signature(make)
    parameters = [
        parameter.replace(kind=parameter.KEYWORD_ONLY)
        for name, parameter in signature.parameters.items()
        if name not in ("model_fn", "loss_fn")
    ]
    made.__signature__ = signature.replace(parameters=parameters)
    return made


TRANSFORMATIONS = {
    "accumulate": Row(
        {
            "link": flatopt.nso_gradients(0.1),
            "optimizer": optax.sgd(0.1),
            "num_microbatches": 1,
        },
        {"link": flatopt.nso_gradients(TINY), "optimizer": optax.sgd(2e-3, 0.9)},
        is_optimizer=True,
    ),
    "anti_pgd": Row(
        {"scale": 0.1},
        {"scale": lambda count: jnp.where(count < 700, TINY, 0.0)},
        gradients=0,
        is_last=True,
        needs_value_fn=False,
    ),
    "arwp_gradients": Row({"sigma": 0.1}, {"sigma": TINY}, is_resumed=True),
    "asam_gradients": _sam(),
    "asam_sgd": _recipe({"rho": TINY}, 6),
    "chain": Row(
        {}, parts=(flatopt.nso_sgd(2e-3, TINY), optax.identity()), is_optimizer=True
    ),
    "entropy_sgd_gradients": Row(
        {"gamma": 0.3, "num_steps": 4, "inner_learning_rate": 0.1},
        {"gamma": 1e-4, "inner_learning_rate": 5e-4},
        quick={"inner_learning_rate": 0.1},
        quiet={"noise_scale": 0.0},
        gradients=12,
        rate=1.0,
        branches=({},),
    ),
    "filterwise_asam_gradients": _sam(),
    "fisher_sam_gradients": _sam(),
    "friendly_sam_gradients": _sam({"sigma": 0.5}, is_resumed=True),
    "functional_sam_gradients": _sam(
        make=_of_value_fn(flatopt.functional_sam_gradients),
        needs_value_fn=False,
        gradients=3,  # of the loss of the outputs, which is taken once
    ),
    "gsam_gradients": _sam({"alpha": 0.1}, arguments={"alpha": 0.4}),
    "ire": Row(
        {"kappa": 0.5, "sharp_share": 0.5},
        {"kappa": 0.1},
        quick={"every": 1},
        gradients=1,
        is_last=True,
    ),
    "ivon": Row(
        {"learning_rate": 0.1, "ess": 100.0},
        {"learning_rate": 0.02, "ess": 1e8, "beta2": 1 - 1e-8},
        quick={"beta2": 0.875},
        gradients=3,
        is_optimizer=True,
        is_resumed=True,
    ),
    "look_sam_gradients": _sam(
        {"every": 3, "alpha": TINY},
        quick={"every": 1},
        gradients=4,  # every fifth step takes two
        branches=({},),
        is_resumed=True,
    ),
    "lpf_adamw": _recipe(
        {"gamma": TINY, "num_samples": 2}, 3, adam=True, quick={"num_samples": 1}
    ),
    "lpf_gradients": Row(
        {"gamma": 0.1, "num_samples": 2},
        {"gamma": TINY},
        quick={"num_samples": 1},
        gradients=3,
    ),
    "lpf_sgd": _recipe(
        {"gamma": TINY, "num_samples": 2},
        3,
        arguments={"gamma": 0.1},
        quick={"num_samples": 1},
        is_resumed=True,
    ),
    "momentum_sam_gradients": _sam(gradients=3, is_resumed=True),
    "noisy_sam_gradients": _sam(
        {"sigma": TINY}, arguments={"sigma": 0.1}, quiet={"sigma": 0.0}
    ),
    "nso_adamw": _recipe({"sigma": TINY}, 6, adam=True),
    "nso_gradients": Row({"sigma": 0.1}, {"sigma": TINY}),
    "nso_sgd": _recipe({"sigma": TINY}, 6),
    "random_sam_gradients": _sam(
        {"sigma": TINY}, arguments={"sigma": 0.1}, quiet={"sigma": 0.0}
    ),
    "sam_gradients": _sam(branches=({"start_step": 3},)),
    "sam_sgd": _recipe({"rho": TINY}, 6, arguments={"rho": 0.1}, is_resumed=True),
    "skip_nonfinite": Row(
        {"inner": flatopt.nso_sgd(0.1)},
        {"inner": flatopt.nso_sgd(2e-3, TINY)},
        is_optimizer=True,
    ),
    "smooth_gradients": Row(
        {"scale": 0.1},
        {"scale": TINY},
        gradients=3,
        branches=(
            {"num_samples": 4, "batch_argnames": ("batch",), "strategy": "scan"},
            {"num_samples": 4, "strategy": 2},
        ),
    ),
    "smooth_gradients_zeroth_order": Row(
        {"scale": 0.1, "num_samples": 4},
        {"scale": TINY, "num_samples": 8},
        quick={"num_samples": 1},
        gradients=0,
        rate=5e-4,
    ),
    "track_stability": Row(
        {"learning_rate": 0.1, "batch_size": 64, "every": 2},
        {"learning_rate": 2e-3, "batch_size": 8, "every": 50},
        quick={"every": 1},
        gradients=None,
    ),
    "usam_gradients": _sam({"rho": TINY / 10}),
}
"""Every public transformation: a test fails for one that is missing here."""


def arguments_of(name, *columns, **more):
    """Arguments of a transformation, with those of other columns of its row on top."""
    row = TRANSFORMATIONS[name]
    changes = {k: v for column in columns for k, v in getattr(row, column).items()}
    return {**row.arguments, **changes, **more}


def maker(name):
    """The function that makes a transformation whose loss is passed to update."""
    return TRANSFORMATIONS[name].make or getattr(flatopt, name)


def transformation(name, *columns, **more):
    """A transformation made from its row."""
    parts = TRANSFORMATIONS[name].parts
    return maker(name)(*parts, **arguments_of(name, *columns, **more))


def optimizer(name, *columns, rate=None, momentum=0.9, **more):
    """A whole optimizer of a transformation, with SGD where it needs one."""
    row, tx = TRANSFORMATIONS[name], transformation(name, *columns, **more)
    sgd = optax.sgd(row.rate if rate is None else rate, momentum=momentum)
    if row.is_optimizer:
        return tx
    return optax.chain(sgd, tx) if row.is_last else optax.chain(tx, sgd)


def takes(name, argument):
    """Whether a transformation has an argument of this name."""
    return argument in inspect.signature(getattr(flatopt, name)).parameters


def public_transformations():
    """Names in ``flatopt.__all__`` of functions that return a transformation."""
    kinds = (optax.GradientTransformation, optax.GradientTransformationExtraArgs)
    functions = {
        name: getattr(flatopt, name)
        for name in flatopt.__all__
        if inspect.isfunction(getattr(flatopt, name))
    }
    return {
        name
        for name, function in functions.items()
        if inspect.signature(function, eval_str=True).return_annotation in kinds
    }


def run_program_of(platform, function, *args):
    """What a function's program for another platform returns, compiled for CPU and run."""
    check = jax.export.DisabledSafetyCheck.platform()
    export = jax.export.export(function, platforms=(platform,), disabled_checks=[check])
    return export(*args).call(*args)


def take_ways_of(monkeypatch, platform):
    """Run what programs for another platform hold, on CPU."""

    def choose(on_cpu, elsewhere, *args, on_tpu=None):
        ways = {"cpu": on_cpu, "tpu": on_tpu or elsewhere}
        return ways.get(platform, elsewhere)(*args)

    monkeypatch.setattr(platforms, "choose", choose)


def collectives(lowered):
    """Kind and number of values of each collective of the compiled program."""
    text = lowered.compile().as_text()
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    return [
        (
            kind,
            sum(
                math.prod(map(int, filter(None, shape.split(","))))
                for shape in re.findall(r"\w\d+\[([\d,]*)\]", result)
            ),
        )
        for result, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text)
    ]

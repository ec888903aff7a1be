"""Checks of arguments, made while tracing: each error is one sentence."""

import inspect
import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core.sharding import axis_names
from flatopt._core.signatures import names_keyword, parameters_of, takes_any_keyword
from flatopt._core.trees import is_traced, path_name

STRATEGIES = ("auto", "vmap", "scan", "unroll")


_WHAT_SCALES = {
    "scale": "give the standard deviation of the noise in units of the kernel.",
    "rho": "give the length of the ascent step.",
    "learning_rate": "give the learning rate of the optimizer.",
}


def check_scale(scale, name="scale"):
    """Reject what is not a finite number >= 0; traced values pass unseen."""
    advice = _WHAT_SCALES.get(name, "give one number of at least 0.")
    if isinstance(scale, bool | np.bool_) or not isinstance(
        scale, numbers.Real | np.ndarray | jax.Array
    ):
        raise TypeError(
            f"{name} must be a number or a scalar array, got {scale!r}; {advice}"
        )
    if jnp.issubdtype(jnp.result_type(scale), jnp.complexfloating) or (
        jnp.result_type(scale) == jnp.bool_
    ):
        raise TypeError(
            f"{name} must be real, got dtype {jnp.result_type(scale)}; {advice}"
        )
    if jnp.ndim(scale) != 0:
        raise ValueError(
            f"{name} must be a scalar, got shape {jnp.shape(scale)}; "
            + (
                "give one number and let the kernel shape the noise."
                if name == "scale"
                else "give one number."
            )
        )
    if isinstance(scale, jax.core.Tracer):
        return
    if not math.isfinite(scale) or float(scale) < 0:
        raise ValueError(
            f"{name} must be finite and not negative, got {scale}; {advice}"
        )


def check_positive(number, name):
    """Reject what is not a finite number > 0; traced values pass unseen."""
    check_scale(number, name)
    if not isinstance(number, jax.core.Tracer) and float(number) == 0:
        raise ValueError(f"{name} must be greater than 0, got 0; give one number.")


def check_decay(decay, name="decay"):
    check_scale(decay, name)
    if not isinstance(decay, jax.core.Tracer) and float(decay) >= 1:
        raise ValueError(
            f"{name} must be less than 1, got {decay}; it is the weight of the past in a "
            "moving average."
        )


def check_share(share, name):
    """Reject what is not a number between 0 and 1; traced values pass unseen."""
    check_scale(share, name)
    if not isinstance(share, jax.core.Tracer) and float(share) > 1:
        raise ValueError(
            f"{name} must be between 0 and 1, got {share}; give it as a part of the whole."
        )


def check_start_step(start_step):
    whole = isinstance(start_step, numbers.Integral) and not isinstance(
        start_step, bool
    )
    if isinstance(start_step, jax.Array):
        whole = start_step.shape == () and jnp.issubdtype(start_step.dtype, jnp.number)
    traced = isinstance(start_step, jax.core.Tracer)
    if not whole or (not traced and int(start_step) < 0):
        raise ValueError(
            f"start_step must be an int of at least 0, got {start_step!r}; it counts the "
            "steps of plain gradients before the method begins."
        )


def check_count(value, name="num_samples", advice=None):
    """Reject what is not an int of at least 1."""
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{name} must be a Python int, got an array; it fixes shapes, so under "
            f"optax.inject_hyperparams write static_args=({name!r},)."
        )
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        advice = advice or _WHAT_COUNTS.get(name, "give a whole number")
        raise ValueError(
            f"{name} must be an int of at least 1, got {value!r}; {advice}."
        )


_WHAT_COUNTS = {
    "num_samples": "it counts the draws of noise a step",
    "num_perturbations": "it counts the pairs of draws a step",
    "num_microbatches": "it counts the chunks of a batch, each with its ascent step",
    "num_steps": "it counts the steps of a loop",
    "num_runs": "it counts the runs",
    "num_probes": "it counts the random probes",
    "num_matvecs": "it counts the products with the matrix",
    "num_draws": "it counts the random starts",
    "num_deflated": "it counts the directions that are treated exactly",
    "num_outputs": "it counts the outputs of an example",
    "every": "it counts the steps from one measurement to the next",
    "batch_size": "it counts the examples of a batch",
    "chunk_size": "it counts the examples that are treated at once",
    "k": "it counts the eigenvalues",
}


def check_strategy(strategy):
    if strategy in STRATEGIES and isinstance(strategy, str):
        return
    if (
        isinstance(strategy, bool)
        or not isinstance(strategy, numbers.Integral)
        or strategy < 1
    ):
        raise ValueError(
            f"strategy must be one of {', '.join(map(repr, STRATEGIES))} or an int of at "
            f"least 1, got {strategy!r}; 'auto' suits most uses."
        )


def check_names(batch_argnames):
    if not isinstance(batch_argnames, tuple | list) or not all(
        isinstance(name, str) for name in batch_argnames
    ):
        raise TypeError(
            f"batch_argnames must be a tuple of names, got {batch_argnames!r}; write "
            "('batch',) for one name."
        )
    return tuple(batch_argnames)


def check_batch_argnames(batch_argnames, value_fn):
    names = check_names(batch_argnames)
    for name in names:
        if not (names_keyword(value_fn, name) or takes_any_keyword(value_fn)):
            raise ValueError(
                f"batch_argnames names {name!r}, which value_fn does not take; write "
                f"value_fn(params, {name}) and pass {name}= at each call (a closure over "
                "the batch cannot be split)."
            )
    return names


def check_params(params):
    """Arrays of ``params``, which must be real and floating."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in leaves:
        if not is_numeric(leaf):
            raise TypeError(
                f"params must be arrays, got {leaf!r} at {path_name(path)!r}; partition "
                "what is not an array out of params first."
            )
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"params must be real, got {dtype} at {path_name(path)!r}; store the "
                "real and the imaginary part as two leaves."
            )
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"params must be floating point, got {dtype} at {path_name(path)!r}; "
                "partition it out of params first, or exclude it with mask=."
            )
    return jax.tree.map(jnp.asarray, params)


def is_numeric(leaf):
    return isinstance(leaf, numbers.Number | np.ndarray | np.generic | jax.Array)


def check_value(value, name="value_fn"):
    """The scalar that a value_fn or a loss_fn returned."""
    if isinstance(value, tuple):
        raise TypeError(
            f"{name} must return a real scalar, got a tuple of {len(value)}; return the "
            "loss alone, or use smooth_value_and_grad with has_aux=True for (loss, aux)."
        )
    if not is_numeric(value):
        raise TypeError(
            f"{name} must return a real scalar, got {value!r}; return the mean loss."
        )
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{name} must return a real scalar, got shape {shape} and dtype {dtype}; "
            "return the mean loss."
        )
    return jnp.asarray(value)


def check_concrete(tree, name):
    """Reject what is traced, for what is decided on the host."""
    if is_traced(tree):
        raise TypeError(
            f"{name} runs on the host, got a call inside jax.jit or jax.vmap; call it "
            "outside."
        )


def float_of(value, name):
    """A number of Python, for what is decided on the host."""
    check_concrete(value, name)
    return float(value)


def check_weight(weight):
    """The scalar that a weight_fn returned."""
    if not is_numeric(weight) or jnp.shape(weight) != ():
        raise TypeError(
            "weight_fn must return a scalar, got "
            f"{jnp.shape(weight) if is_numeric(weight) else weight!r}; sum over the chunk, "
            "as in chunk['mask'].sum()."
        )
    return jnp.asarray(weight)


def raw_key_shape():
    """The shape of the raw key of JAX's default generator."""
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape


def check_random_key(key):
    """Reject what is not one JAX random key, typed or raw."""
    if isinstance(key, jax.Array | np.ndarray):
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if (typed and key.shape == ()) or (
            key.dtype == np.uint32 and key.shape == raw_key_shape()
        ):
            return
        got = f"{key.dtype} of shape {key.shape}"
    else:
        got = repr(key) if isinstance(key, numbers.Number) else type(key).__name__
    raise TypeError(
        f"key must be one JAX random key, got {got}; write jax.random.key(0), and give "
        "the key before params."
    )


def described(value):
    """A value in a few words of one line, for an error."""
    text = repr(value)
    if isinstance(value, jax.Array | np.ndarray):
        return f"an array of shape {jnp.shape(value)}"
    short = isinstance(value, numbers.Number | str | tuple | list | None) and (
        len(text) < 60
    )
    name = getattr(value, "__name__", None)
    return text if short else name or f"a {type(value).__name__}"


def check_function(
    function, name="loss_fn", example="loss_fn(params, batch)", count=None, more=False
):
    """Reject what cannot be called, or not with so many positional arguments.

    With ``more`` it may need others, too.
    """
    if not callable(function):
        raise TypeError(
            f"{name} must be a function, got {described(function)}; give one such as "
            f"{example}."
        )
    if count is not None and not _takes(function, count, more):
        taken = ", ".join(parameters_of(function) or ())
        raise TypeError(
            f"{name} must take {count} argument{'s' * (count > 1)}, got one of ({taken}); "
            f"write {example}."
        )


def check_kernel(kernel, name="kernel"):
    """Reject a sampler, or a function that makes a kernel, in place of a kernel."""
    label = getattr(kernel, "__name__", None) or f"a {type(kernel).__name__}"
    if not isinstance(kernel, type) and hasattr(kernel, "bind"):
        return
    if not callable(kernel):
        raise TypeError(
            f"{name} must be a function (key, params) -> perturbation, got {kernel!r}; "
            "write kernels.isotropic() or kernels.filterwise()."
        )
    parameters = parameters_of(kernel)
    if parameters is None:
        return
    if "shape" in parameters:
        raise TypeError(
            f"{name} must be a function (key, params) -> perturbation, got the sampler "
            f"{label}; write kernels.isotropic({label})."
        )
    positional = [
        p
        for p in parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)
    ]
    takes_two = len(positional) >= 2 or any(
        p.kind is p.VAR_POSITIONAL for p in positional
    )
    ours = str(getattr(kernel, "__module__", "")).startswith("flatopt.kernels.")
    if ours or not takes_two:
        raise TypeError(
            f"{name} must be a function (key, params) -> perturbation, got {label}, which "
            "takes other arguments; if it makes a kernel, call it, as in "
            "kernels.filterwise()."
        )


def check_sampler(sampler):
    """Reject what is not of the form of ``jax.random.normal``."""
    if callable(sampler) and not hasattr(sampler, "bind") and _takes(sampler, 3):
        return
    got = getattr(sampler, "__name__", None) or repr(sampler)
    raise TypeError(
        f"sampler must be a function (key, shape, dtype) -> array, got {got}; write "
        "kernels.normal or kernels.signs, and set the size of the noise by the scale."
    )


def _takes(function, count, more=False):
    """Whether a function can be called with so many positional arguments."""
    try:
        signature = inspect.signature(function)
        (signature.bind_partial if more else signature.bind)(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # it has no signature
        return True
    return True


def check_axis_name(axis_name):
    """Reject the name of an axis that we are not inside of."""
    try:
        names = axis_names(axis_name)
        for name in names:
            jax.lax.axis_index(name)
    except (NameError, TypeError) as error:
        raise ValueError(
            "axis_name must name an axis of the jax.shard_map around the call, got "
            f"{axis_name!r}; call it inside of one, or leave axis_name out."
        ) from error


def check_weight_fn(weight_fn):
    if weight_fn is not None and not callable(weight_fn):
        raise TypeError(
            f"weight_fn must be a function of a chunk, got {described(weight_fn)}; write "
            "one such as lambda chunk: chunk['mask'].sum()."
        )
    if weight_fn is not None:
        example = "lambda chunk: chunk['mask'].sum()"
        check_function(weight_fn, "weight_fn", example, count=1)

"""What the signature of a function says, and the arguments that it takes."""

import contextlib
import inspect

import jax


def parameters_of(function):
    """The parameters of a callable's signature, or None where it has none."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None


def first_of(function):
    """The name of the first parameter, None where there is none."""
    return next(iter(parameters_of(function) or {}), None)


def names_keyword(function, name):
    """Whether the signature of ``function`` names the keyword ``name``."""
    parameters = parameters_of(function) or {}
    return name in parameters and parameters[name].kind in (
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )


def takes_any_keyword(function):
    parameters = parameters_of(function)
    if parameters is None:
        return True
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def sample_options(value_fn, noise_key):
    """The key of one sample for a ``value_fn`` that names ``sample_key``."""
    if not names_keyword(value_fn, "sample_key"):
        return {}
    return {"sample_key": jax.random.split(noise_key)[1]}


def forwarded(value_fn, extra_args):
    """The extra arguments that ``value_fn`` takes, but for its first parameter."""
    if "sample_key" in extra_args:
        raise ValueError(
            "sample_key is the key that flatopt draws for each sample, got one as an "
            "argument; choose another name for yours."
        )
    return accepted(value_fn, extra_args)


def check_first(value_fn, given, names):
    """Reject a ``value_fn`` that takes first what is split or passed by keyword."""
    first = first_of(value_fn)
    if (first in names and first not in given) or (
        first in given and names_keyword(value_fn, first)
    ):
        raise TypeError(_not_first(first))


_PARAMS = {"params", "parameters", "model", "weights", "variables", "theta", "w", "p"}
_BATCHES = {"batch", "batches", "minibatch", "data"}
_INPUTS = {"inputs", "images", "tokens", "x"}


def check_order(function, name="loss_fn"):
    """Reject a function whose names say that it takes a batch first and parameters later.

    Nothing but names tells where shapes fit both ways. Inputs may be what a loss is
    differentiated in, so that they are refused as the first argument of a model alone.
    """
    first, *later = parameters_of(function) or [None]
    if first in (_BATCHES | _INPUTS if name == "model_fn" else _BATCHES) and (
        _PARAMS.intersection(later)
    ):
        raise TypeError(_not_first(first, name))


def _not_first(first, name="value_fn"):
    return (
        f"{name} must take the parameters or the model first, got {first!r} first; swap "
        "its arguments."
    )


def accepted(function, arguments):
    """Those of the arguments that a function takes, but for its first parameter."""
    first = first_of(function)
    return {
        name: value
        for name, value in arguments.items()
        if takes_any_keyword(function)
        or (name != first and names_keyword(function, name))
    }


@contextlib.contextmanager
def naming_what_lacks(value_fn, arguments, extra_args):
    """Where a call of ``value_fn`` fails for want of an argument, say which.

    Not before it fails: a signature may be that of another function.
    """
    try:
        yield
    except TypeError as error:
        for parameter in list((parameters_of(value_fn) or {}).values())[1:]:
            if (
                parameter.kind
                in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
                and parameter.default is parameter.empty
                and parameter.name not in {*arguments, "sample_key"}
            ):
                if first_of(value_fn) in extra_args:
                    raise TypeError(_not_first(first_of(value_fn))) from error
                names = ", ".join(sorted(map(repr, extra_args))) or "none"
                raise TypeError(
                    f"value_fn needs the argument {parameter.name!r}, got arguments named "
                    f"{names}; pass {parameter.name}= to update."
                ) from error
        raise

"""Forward mode of differentiation, or reverse mode where a kernel refuses it."""

import jax

from flatopt._core import jaxprs


def forward_or_reverse(forward, reverse, function, plain, params):
    """Forward mode where it is allowed: a ``custom_vjp`` refuses it, reverse mode may do.

    ``function`` is what forward mode would differentiate, ``plain`` holds no derivative.
    Where a ``custom_vjp`` is in it the derivative is traced once more: ``jax.linearize``
    itself finds out only when the program is compiled.
    """
    reason = None
    try:
        if jaxprs.has_custom_vjp(jax.make_jaxpr(plain)(params).jaxpr):
            push = lambda p: jax.jvp(function, (p,), (p,), has_aux=True)  # noqa: E731
            jaxpr = jax.make_jaxpr(push)(params).jaxpr
            if jaxprs.has_primitive(jaxpr, "custom_lin"):
                reason = "a custom_vjp has no rule for it"
        if reason is None:
            return forward()
    except (TypeError, ValueError, NotImplementedError) as error:
        reason = _first_line(error)
    try:
        return reverse()
    except (TypeError, ValueError, NotImplementedError) as error:
        second = _first_line(error)
        jax.eval_shape(function, params)  # an error of the loss itself comes as it is
        raise TypeError(
            f"the loss can be differentiated twice neither in forward mode ({reason}) nor "
            f"in reverse mode ({second}); give its custom_vjp rules that are themselves "
            "differentiable, use a plain implementation for the analysis, or take "
            "curvature.finite_difference_hessian."
        ) from error


def _first_line(error):
    return (str(error).strip() or repr(error)).splitlines()[0]

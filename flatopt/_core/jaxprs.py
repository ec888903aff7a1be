"""Tracing a function, and what is rewritten in it so that XLA has fast kernels.

XLA brings convolutions on CPU into the layout of its fast kernels in the outermost
computation alone. In loops and branches, those of a backward pass keep the layout that JAX
gave them, for which XLA has no fast kernel: one took 70 times as long. So they are brought
into that layout here, before XLA sees them; the kernels and the numbers are the same.

The product of a Hessian with a vector holds the transpose of a sum of two matrix products
for each dense layer. XLA transposes one matrix product by the order of its factors, which
costs nothing; it does not look into a sum, and copies the matrix, which is slow on CPU. So
the factors are swapped here.

What cannot be rewritten runs as JAX traced it. A test fails on the day XLA does it alone.
"""

import collections
import functools
import warnings

import jax
import jax.numpy as jnp

from flatopt._core import platforms

CONVOLUTION = "conv_general_dilated"
BODIES = (
    "jit",
    "scan",
    "checkpoint",
    "remat2",
)  # primitives of one jaxpr, run as it is


def _extend():
    """``jax.extend.core``, which takes a third of a second to import."""
    import jax.extend.core.primitives

    return jax.extend.core


def trace(function, *args):
    """Trace once. Returns the function, to be called many times, and its jaxpr."""
    plain, treedef, closed = _traced(function, *args)
    flat = plain
    if has_convolution(closed.jaxpr):

        def flat(*leaves):
            try:
                return _evaluate(closed.jaxpr, closed.consts, leaves)
            except Exception as error:  # of a JAX whose inner parts have changed
                warnings.warn(
                    "convolutions in loops keep the layout that JAX gave them, which may "
                    f"be slow on CPU: this version of JAX cannot be rewritten ({error}).",
                    stacklevel=2,
                )
                return plain(*leaves)

    def traced(*args):
        return treedef.unflatten(flat(*jax.tree.leaves(args)))

    return traced, closed.jaxpr


def once(function, *args):
    """The function as traced once, convolutions as they are: later calls are cheap."""
    flat, treedef, _ = _traced(function, *args)
    return lambda *args: treedef.unflatten(flat(*jax.tree.leaves(args)))


def swap_factors(function, *args):
    """The same function, its transposed sums of matrix products with swapped factors."""
    _, treedef, closed = _traced(function, *args)
    try:
        jaxpr = _swapped(closed.jaxpr)
    except Exception as error:  # of a JAX whose inner parts have changed
        warnings.warn(
            "sums of matrix products are transposed as JAX traced them, which may be slow on "
            f"CPU: this version of JAX cannot be rewritten ({error}).",
            stacklevel=2,
        )
        return function
    flat = _extend().jaxpr_as_fun(closed.replace(jaxpr=jaxpr))
    return lambda *args: treedef.unflatten(flat(*jax.tree.leaves(args)))


def _traced(function, *args):
    """The function of leaves, the structure of its results, the jaxpr."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    return _extend().jaxpr_as_fun(closed), jax.tree.structure(shapes), closed


def has_primitive(jaxpr, name, platform=platforms.CPU):
    """Whether a primitive is anywhere in a jaxpr, as it is on one platform."""
    return any(
        equation.primitive.name == name
        or any(
            has_primitive(inner, name, platform)
            for inner in _inner_jaxprs(equation, platform)
        )
        for equation in jaxpr.eqns
    )


def has_custom_vjp(jaxpr):
    """Whether a ``custom_vjp`` is anywhere in a jaxpr, whatever JAX calls it."""
    return any(
        equation.primitive.name.startswith("custom_vjp")
        or any(map(has_custom_vjp, _inner_jaxprs(equation)))
        for equation in jaxpr.eqns
    )


def float_dtypes(jaxpr):
    """The floating dtypes of all values that depend on the arguments."""
    core = _extend()
    depends = set(jaxpr.invars)
    found = {getattr(x.aval, "dtype", None) for x in jaxpr.invars}
    for equation in jaxpr.eqns:
        inputs = [x for x in equation.invars if not isinstance(x, core.Literal)]
        if depends.isdisjoint(inputs):
            continue
        depends.update(equation.outvars)
        found.update(getattr(x.aval, "dtype", None) for x in equation.outvars)
        for inner in _inner_jaxprs(equation):
            found |= float_dtypes(inner)
    return {x for x in found if x is not None and jnp.issubdtype(x, jnp.floating)}


def num_convolutions(jaxpr):
    """How many convolutions a jaxpr holds, those of a loop's body once."""
    return len(_convolutions(jaxpr))


def convolution_flops(jaxpr, platform=platforms.CPU):
    """The floating-point operations of each convolution, zeros of strides included."""
    return [_flops(equation) for equation in _convolutions(jaxpr, platform)]


def _convolutions(jaxpr, platform=platforms.CPU):
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == CONVOLUTION:
            found.append(equation)
        for inner in _inner_jaxprs(equation, platform):
            found.extend(_convolutions(inner, platform))
    return found


def _flops(convolution):
    """Each value of the result is a sum over one filter of the kernel."""
    kernel = convolution.invars[1].aval
    num_filters = kernel.shape[convolution.params["dimension_numbers"].rhs_spec[0]]
    return 2 * convolution.outvars[0].aval.size * kernel.size // max(num_filters, 1)


def has_convolution(jaxpr):
    """Whether a convolution is anywhere in a jaxpr."""
    return has_primitive(jaxpr, CONVOLUTION)


def are_fast_in_loops(jaxpr, apart_from=()):
    """Whether :func:`trace` makes every convolution of a jaxpr one that is fast on CPU.

    ``apart_from`` names primitives inside which convolutions do not count.
    """
    return not _has_slow(jaxpr, apart_from, is_reached=True)


def _has_slow(jaxpr, apart_from, is_reached):
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == CONVOLUTION:
            is_fast = is_reached or _is_in_fast_layout(equation)
            if equation.params["batch_group_count"] > 1 or not is_fast:
                return True
            continue
        is_choice = platforms.branches_on(equation, platforms.CPU) is not None
        if name in apart_from and not is_choice:
            continue
        inner = _inner_jaxprs(equation)
        reached = is_reached and name == "jit"
        if any(_has_slow(x, apart_from, reached) for x in inner):
            return True
    return False


def _is_in_fast_layout(equation):
    last = equation.invars[0].aval.ndim - 1
    return equation.params["dimension_numbers"] == _fast_layout(last)


def _inner_jaxprs(equation, platform=platforms.CPU):
    inner = platforms.branches_on(equation, platform)
    if inner is None:
        inner = _extend().jaxprs_in_params(equation.params)
    return [getattr(jaxpr, "jaxpr", jaxpr) for jaxpr in inner]


def _evaluate(jaxpr, consts, args):
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    literal = _extend().Literal

    def read(atom):
        is_literal = isinstance(atom, literal)
        return atom.val if is_literal else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        name = equation.primitive.name
        with equation.ctx.manager:
            if name == CONVOLUTION:
                outputs = [_convolution(inputs, equation)]
            elif name == "jit" and any(map(has_convolution, _inner_jaxprs(equation))):
                inner = equation.params["jaxpr"]
                outputs = _evaluate(inner.jaxpr, inner.consts, inputs)
            else:
                params = equation.primitive.get_bind_params(equation.params)
                outputs = equation.primitive.bind(*inputs, **params)
                if not equation.primitive.multiple_results:
                    outputs = [outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _convolution(inputs, equation):
    as_traced = functools.partial(equation.primitive.bind, **equation.params)
    if equation.params["batch_group_count"] > 1:
        return as_traced(*inputs)
    rewritten = functools.partial(_fast_convolution, **equation.params)
    return platforms.choose(rewritten, as_traced, *inputs)


def _fast_convolution(inputs, kernel, *, dimension_numbers, **params):
    """The same convolution of batch, space, features by space, features, features."""
    of_inputs, of_kernel, of_result = dimension_numbers
    inputs = jnp.transpose(inputs, (of_inputs[0], *of_inputs[2:], of_inputs[1]))
    kernel = jnp.transpose(kernel, (*of_kernel[2:], of_kernel[1], of_kernel[0]))
    last = inputs.ndim - 1
    result = _extend().primitives.conv_general_dilated_p.bind(
        inputs, kernel, dimension_numbers=_fast_layout(last), **params
    )
    order = (of_result[0], *of_result[2:], of_result[1])
    return jnp.transpose(result, [order.index(axis) for axis in range(last + 1)])


def _fast_layout(last):
    outer, space = (0, last, *range(1, last)), range(last - 1)
    return jax.lax.ConvDimensionNumbers(outer, (last, last - 1, *space), outer)


def _swapped(jaxpr):
    """A jaxpr without transposed sums of matrix products, the bodies of loops as well."""
    literal = _extend().Literal
    made = {var: equation for equation in jaxpr.eqns for var in equation.outvars}
    read = [atom for equation in jaxpr.eqns for atom in equation.invars]
    uses = collections.Counter(
        x for x in [*read, *jaxpr.outvars] if not isinstance(x, literal)
    )
    replaced = {}  # equations by the variable that they made
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in BODIES and equation.outvars:
            inner = equation.params["jaxpr"]
            is_closed = hasattr(inner, "consts")
            new = (
                inner.replace(jaxpr=_swapped(inner.jaxpr))
                if is_closed
                else _swapped(inner)
            )
            params = equation.params | {"jaxpr": new}
            replaced[equation.outvars[0]] = equation.replace(params=params)
        if name == "transpose" and _is_sum(equation.invars[0], made):
            terms = _transposed_terms(equation, equation.outvars[0], made, uses)
            if terms is not None:
                replaced |= terms | {equation.outvars[0]: None}
    equations = [replaced.get(e.outvars[0], e) if e.outvars else e for e in jaxpr.eqns]
    return jaxpr.replace(eqns=[e for e in equations if e is not None])


def _is_sum(var, made):
    return var in made and made[var].primitive.name == "add_any"


def _transposed_terms(transpose, out, made, uses):
    """What makes ``out``, the transpose, by the variable that each equation made.

    None where it is not a sum of matrix products, which nothing else reads.
    """
    (var,) = transpose.invars
    equation = made.get(var)
    if equation is None or uses[var] != 1:
        return None
    if equation.primitive.name == "dot_general":
        params = _swapped_params(equation, transpose.params["permutation"])
        if params is None:
            return None
        factors = equation.invars[::-1]
        return {var: equation.replace(invars=factors, outvars=[out], params=params)}
    if equation.primitive.name != "add_any":
        return None
    terms, outs = {}, []
    for term in equation.invars:
        outs.append(_extend().Var(out.aval))
        one = transpose.replace(invars=[term])
        found = _transposed_terms(one, outs[-1], made, uses)
        if found is None:
            return None
        terms |= found
    return terms | {var: equation.replace(invars=outs, outvars=[out])}


def _swapped_params(product, permutation):
    """Those of the product of swapped factors, if that is what a permutation makes of it."""
    (left, right), batch = product.params["dimension_numbers"]
    leading = len(batch[0])
    own = product.invars[0].aval.ndim - leading - len(left)
    last = product.outvars[0].aval.ndim
    swap = (
        *range(leading),
        *range(leading + own, last),
        *range(leading, leading + own),
    )
    if tuple(permutation) != swap or product.params["out_sharding"] is not None:
        return None
    numbers = (right, left), (batch[1], batch[0])
    return product.params | {"dimension_numbers": numbers}

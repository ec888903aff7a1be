"""Products by differences of gradients against exact ones, and the error they report."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, count_compilations, leaves_array

from benchmarks import differences
from flatopt import curvature

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def _cross_entropy(outputs, labels):
    outputs = outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


def _normal(*shape, scale=1.0):
    return scale * RNG.normal(size=shape)


NETWORKS = {
    "MLP": (
        differences.mlp,
        {
            "in": _normal(6, 10, scale=6**-0.5),
            "bias": _normal(10, scale=0.1),
            "out": _normal(10, 4, scale=10**-0.5),
        },
        (_normal(64, 6), RNG.integers(0, 4, 64)),
    ),
    "CNN": (
        differences.cnn,
        {
            "kernel": _normal(4, 1, 3, 3, scale=1 / 3),
            "head": _normal(64, 4, scale=1 / 8),
        },
        (_normal(64, 1, 8, 8), RNG.integers(0, 4, 64)),
    ),
    "Transformer": (
        differences.transformer,
        {
            "embed": _normal(8, 8, scale=0.5),
            "qkv": _normal(8, 24, scale=8**-0.5),
            "mix": _normal(8, 8, scale=8**-0.5),
            "up": _normal(8, 16, scale=8**-0.5),
            "down": _normal(16, 8, scale=1 / 4),
            "first": np.ones(8),
            "second": np.ones(8),
        },
        (RNG.integers(0, 8, (16, 6)), RNG.integers(0, 8, (16, 6))),
    ),
}


def _cast(tree, dtype):
    """Floating leaves in another dtype, of NumPy or of JAX."""
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda x: x.astype(dtype) if is_float(x) else x, tree)


@functools.cache
def _losses(name):
    """The loss of a network, and that of one which computes in bfloat16."""
    model_fn = NETWORKS[name][0]

    def loss_fn(params, batch):
        return _cross_entropy(model_fn(params, batch[0]), batch[1])

    def loss_in_bfloat16(params, batch):
        return loss_fn(*_cast((params, batch), jnp.bfloat16))

    return loss_fn, loss_in_bfloat16


@functools.cache
def _problem(name):
    """Parameters and data in NumPy, without a rounding error in bfloat16."""
    return _cast(NETWORKS[name][1:], jnp.bfloat16)


@functools.cache
def _truth(name):
    """Vectors, and their products from second derivatives in float64."""
    loss_fn, _ = _losses(name)
    with jax.enable_x64(True):
        params, data = _cast(_problem(name), "f8")
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        rng = np.random.default_rng(1)
        rows = np.sign(rng.normal(size=(5, flat.size)))
        rows = np.concatenate([rng.normal(size=(2, flat.size)), rows])

        @jax.jit
        def products(rows):
            gradient = jax.grad(lambda p: loss_fn(unravel(p), data))
            push = lambda v: jax.jvp(gradient, (flat,), (v,))[1]  # noqa: E731

            def toward_top(_, row):
                top = push(row)
                return top / jnp.linalg.norm(top)

            top = jax.lax.fori_loop(0, 12, toward_top, rows[-1])
            rows = rows.at[-1].set(top)
            return rows, jax.lax.map(push, rows)

        found = products(jnp.asarray(rows))
    return tuple(np.asarray(x) for x in found)


def _measured(operator, rows):
    """Products with flat rows, and the errors they report."""
    leaves, treedef = jax.tree.flatten(operator.like)
    ends = np.cumsum([x.size for x in leaves])[:-1]
    found, errors = [], []
    for row in rows.astype("f4"):
        parts = np.split(row, ends)
        shaped = [p.reshape(x.shape) for p, x in zip(parts, leaves, strict=True)]
        vector = treedef.unflatten(shaped)
        found.append(leaves_array(operator.matvec(vector)))
        errors.append(operator.product_error(vector))
    return np.asarray(found), np.asarray(errors, "f8")


# Parameters in bfloat16 are widened alike for all networks.
DTYPES = {
    "MLP": ["float32", "bfloat16 inside"],
    "CNN": ["bfloat16", "bfloat16 inside"],
    "Transformer": ["float32", "bfloat16 inside"],
}


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name in DTYPES for dtype in DTYPES[name]]
)
def test_errors_are_small_and_within_what_is_reported(name, dtype, standard_promotion):
    rows, truth = _truth(name)
    params, data = _cast(_problem(name), jnp.bfloat16 if dtype == "bfloat16" else "f4")
    loss_fn, loss_in_bfloat16 = _losses(name)
    loss_fn = loss_in_bfloat16 if dtype == "bfloat16 inside" else loss_fn
    operator = curvature.finite_difference_hessian(loss_fn, params, data)
    found, reported = _measured(operator, rows)
    wrong = np.linalg.norm(found - truth, axis=1)
    size = np.linalg.norm(truth, axis=1)
    assert (wrong <= reported).all()
    assert (reported <= 8 * wrong).all()
    assert (wrong <= (0.1 if dtype == "bfloat16 inside" else 1e-3) * size).all()


def _of_two_leaves(params, batch=1.0):
    losses = jnp.sum((params["a"] - 1) ** 2), jnp.sum(params["b"] ** 2)
    return sum(losses) / 2 * jnp.mean(batch)


@pytest.mark.parametrize("value", [0.7, 3.0, -0.9])
@pytest.mark.parametrize("batches", [0, 1, 2])
def test_entries_that_round_alike_at_both_steps(value, batches):
    """Products with both steps then agree to the last bit, and are off."""
    one = np.ones(1, "f4")
    data = [None, np.ones(2, "f4"), [one, np.ones(3, "f4")]][batches]
    params = {"a": np.full(3, value, "f4"), "b": np.full((2, 1), value, "f4")}
    operator = curvature.finite_difference_hessian(_of_two_leaves, params, data)
    for size in (1.0, -3e9):
        vector = jax.tree.map(functools.partial(np.full_like, fill_value=size), params)
        wrong = np.linalg.norm(leaves_array(operator.matvec(vector)) - size)
        reported = operator.product_error(vector)
        length = 5**0.5 * abs(size)
        assert 0 < wrong <= reported <= 3e-4 * length
        # What rounding of gradients alone may cause, at the step that is documented.
        step = 0.25 * np.finfo("f4").eps ** (1 / 3) * abs(value)
        gradient = np.hypot(3**0.5 * (value - 1), 2**0.5 * value)
        least = np.finfo("f4").eps * (gradient / (2 * step) + 5**0.5 / 2) * abs(size)
        assert reported >= 0.99 * least


def test_bounds_of_eigenvalues_where_products_round_alike():
    operator = curvature.finite_difference_hessian(
        lambda p: 3 * (p[0] - 1) ** 2 / 2, jnp.full(1, 0.7)
    )
    pairs = curvature.eigenpairs(operator, KEY)
    traced = jax.jit(lambda o: curvature.block_lanczos(o, KEY))(operator)
    for found in (pairs, traced):
        assert 0 < abs(float(found.values[0]) - 3) <= found.residuals[0] <= 1e-3


def _of_scales_apart(params, large):
    far = jnp.sum((params["large"] / large) ** 4)
    return jnp.sum(jnp.tanh(params["small"]) ** 2) + far


@pytest.mark.parametrize("large", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("start", [0.3, 0.0])
def test_a_leaf_of_large_numbers_sets_no_step_for_the_others(large, start):
    params = {
        "large": np.full(3, large, "f4"),
        "other": np.full(3, 0.5, "f4"),
        "small": (start * np.array([0.8, 1.0, 1.3])).astype("f4"),
    }
    operator = curvature.finite_difference_hessian(
        _of_scales_apart, params, constants=np.float32(large)
    )
    point = np.tanh(start * np.array([0.8, 1.0, 1.3]))
    slope = 1 - point**2
    truths = {
        "small": 2 * slope**2 - 4 * point**2 * slope,
        "large": np.full(3, 12 / large**2),
    }
    for name, truth in truths.items():
        vector = jax.tree.map(np.zeros_like, params) | {name: np.ones(3, "f4")}
        found = operator.matvec(vector)[name]
        wrong, size = np.linalg.norm(found - truth), np.linalg.norm(truth)
        assert wrong <= operator.product_error(vector) + 1e-6 * size
        assert wrong <= 2e-3 * size
    both = jax.tree.map(np.ones_like, params)
    assert_close(operator.matvec(both)["small"], truths["small"], rtol=2e-3)
    pairs = curvature.eigenpairs(operator, jax.random.key(0), 3)
    everything = np.concatenate([*truths.values(), [0.0]])
    distance = np.abs(np.asarray(pairs.values)[:, None] - everything).min(axis=1)
    assert (distance <= pairs.residuals).all()
    np.testing.assert_allclose(pairs.values[0], everything.max(), rtol=2e-3)


def _half_square(params):
    return jnp.sum(params**2) / 2


@pytest.mark.parametrize("size", [1e-38, 1e-37, 1e-35, 1e-20, 1.0, 1e15])
def test_parameters_and_vectors_of_any_size(size):
    params = np.float32(size) * np.array([1.0, 2.0, 3.0], "f4")
    operator = curvature.finite_difference_hessian(_half_square, params)
    for scale in (1e-30, 1.0, 1e38):
        vector = np.full(3, scale, "f4")
        found = np.asarray(operator.matvec(vector), "f8") / scale
        np.testing.assert_allclose(found, 1, rtol=2e-3)


@jax.custom_vjp
def _kernel(x):
    return jnp.tanh(x)


def _backward(x, grads):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    rule = lambda x, g: (g / np.cosh(x) ** 2).astype(x.dtype)  # noqa: E731
    CALLS.append(1)
    return (jax.pure_callback(rule, shape, x, grads, vmap_method="sequential"),)


CALLS: list[int] = []
_kernel.defvjp(lambda x: (jnp.tanh(x), x), _backward)
PARAMS = {"in": _normal(3, 4).astype("f4"), "out": _normal(4).astype("f4")}
DATA = tuple(x.astype("f4") for x in (_normal(10, 3), _normal(10)))
BATCHES = [(DATA[0][:5], DATA[1][:5]), (DATA[0][5:], DATA[1][5:])]


def _loss(params, batch, shift=0.0, activation=_kernel):
    hidden = activation((batch[0] - shift) @ params["in"])
    return jnp.mean((hidden @ params["out"] - batch[1]) ** 2)


_plain = functools.partial(_loss, activation=jnp.tanh)


def _dense(**options):
    return np.asarray(curvature.hessian(_plain, PARAMS, DATA, **options).dense())


@pytest.mark.heart
def test_a_kernel_without_a_second_derivative():
    with pytest.raises(TypeError, match=r"take curvature\.finite_difference_hessian\."):
        curvature.hessian(_loss, PARAMS, DATA).matvec(PARAMS)
    truth = _dense()
    values, size = np.linalg.eigvalsh(truth), np.abs(truth).max()
    for data in (DATA, BATCHES):
        operator = curvature.finite_difference_hessian(_loss, PARAMS, data)
        if data is DATA:
            assert_close(operator.dense(), truth, rtol=0, atol=1e-3 * size)
        found = curvature.eigenpairs(operator, KEY, 2)
        distance = np.abs(np.asarray(found.values)[:, None] - values).min(axis=1)
        assert (distance <= found.residuals).all()
        assert_close(found.values, values[::-1][:2], rtol=1e-3)
    probed = curvature.probe(operator, KEY, 32)
    for estimate, true in (
        (probed.trace, np.trace(truth)),
        (probed.frobenius_norm, np.linalg.norm(truth)),
    ):
        allowed = 4 * estimate.standard_error + 1e-3 * np.abs(values).sum()
        assert abs(estimate.value - true) <= allowed
    form = operator.quadratic_form(PARAMS)
    flat = leaves_array(PARAMS)
    assert_close(form, flat @ truth @ flat, rtol=2e-3)


def test_inside_jit_and_vmap():
    def at(scale, make):
        params = jax.tree.map(lambda x: scale * x, PARAMS)
        return make(_plain, params, DATA)

    def measure(scale):
        operator = at(scale, curvature.finite_difference_hessian)
        pairs = curvature.block_lanczos(operator, KEY, 2, num_steps=8)
        return pairs.values, pairs.residuals

    scales = np.array([1.0, 0.5], "f4")
    for scale, found, bounds in zip(
        scales, *jax.jit(jax.vmap(measure))(scales), strict=True
    ):
        values = np.linalg.eigvalsh(at(scale, curvature.hessian).dense())
        assert (np.abs(found - values[::-1][:2]) <= bounds).all()
        assert_close(found, values[::-1][:2], rtol=1e-3, atol=1e-3)


def test_a_part_of_the_parameters_and_constants():
    shift = np.full((1, 3), 0.3, "f4")
    options = {"mask": "out", "constants": shift}
    operator = curvature.finite_difference_hessian(_loss, PARAMS, BATCHES, **options)
    truth = _dense(**options)
    assert operator.like["in"] is None
    assert_close(operator.dense(), truth, rtol=0, atol=1e-3 * np.abs(truth).max())


def test_two_gradients_a_product():
    calls = []

    @jax.custom_vjp
    def counted(x):
        return jnp.sum(x**2)

    def backward(x, grads):
        jax.debug.callback(lambda: calls.append(1))
        return (2 * x * grads,)

    counted.defvjp(lambda x: (counted(x), x), backward)
    operator = curvature.finite_difference_hessian(counted, jnp.ones(3))
    operator.matvec(jnp.ones(3))
    jax.effects_barrier()
    assert len(calls) == 2
    with count_compilations() as compiled:  # the first one looked at the loss, too
        operator.matvec(jnp.ones(3))
    jax.effects_barrier()
    assert not compiled
    assert len(calls) == 4
    operator.dense()
    jax.effects_barrier()
    assert len(calls) == 4 + 2 * 3


def _cubes(params, batch, scale):
    return jnp.mean((batch @ (params["w"] / scale)) ** 3)


@pytest.mark.parametrize("of_vector", [1e-18, 1.0, 1e18])
@pytest.mark.parametrize("of_params", [1e-9, 1.0, 1e9])
def test_scales_of_parameters_and_vectors(of_params, of_vector):
    x = RNG.normal(size=(8, 3))
    point, vector = np.array([1.0, -2.0, 0.5]), np.array([1.0, 0.3, -1.0])
    operator = curvature.finite_difference_hessian(
        _cubes,
        {"w": (of_params * point).astype("f4")},
        x.astype("f4"),
        constants=np.float32(of_params),
    )
    found = operator.matvec({"w": (of_vector * vector).astype("f4")})["w"]
    found = np.asarray(found, "f8") / of_vector * of_params**2
    truth = 6 * np.mean((x @ point)[:, None, None] * x[:, :, None] * x[:, None], axis=0)
    size = np.linalg.norm(truth @ vector)
    np.testing.assert_allclose(found, truth @ vector, rtol=0, atol=1e-3 * size)


def test_no_parameters_but_zero_and_vectors_of_zeros():
    operator = curvature.finite_difference_hessian(
        lambda p: jnp.sum(jnp.cosh(p)), jnp.zeros(3)
    )
    assert_close(operator.dense(), np.eye(3), rtol=1e-3, atol=1e-6)
    assert_close(operator.matvec(jnp.zeros(3)), np.zeros(3), atol=0)
    assert operator.product_error(jnp.zeros(3)) == 0


def test_exact_operators_report_no_error_beyond_rounding():
    operator = curvature.hessian(_plain, PARAMS, DATA)
    assert operator.product_error(PARAMS) == 0


def test_products_of_matrices_have_the_highest_precision():
    operator = curvature.finite_difference_hessian(_plain, PARAMS, DATA)
    program = str(jax.make_jaxpr(operator.matvec)(PARAMS))
    # Two in the gradient's forward pass, three in its backward pass; the loss itself,
    # by which data is compared between passes, is as the user has it.
    assert program.count("precision=(Precision.HIGHEST") == 5
    assert program.count("dot_general[") == 7


def test_memory_is_that_of_one_gradient():
    params = [jnp.ones((32, 32)) for _ in range(6)]
    data = jnp.ones((2048, 32))

    def loss_fn(params, batch):
        for kernel in params:
            batch = jnp.tanh(batch @ kernel)
        return jnp.mean(batch**2)

    def temporary(function):
        compiled = jax.jit(function).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def product(params):
        operator = curvature.finite_difference_hessian(loss_fn, params, data)
        return operator.matvec(params)

    gradient = temporary(lambda params: jax.grad(loss_fn)(params, data))
    assert temporary(product) < 1.3 * gradient


def test_not_finite():
    operator = curvature.finite_difference_hessian(
        lambda p: jnp.nan * jnp.sum(p), jnp.ones(2)
    )
    with pytest.raises(ValueError, match="the loss must be finite|is not finite"):
        operator.matvec(jnp.ones(2))

"""Each wrong use fails while tracing, in one sentence that says what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import loss_fn, regression

import flatopt
from flatopt import kernels, smooth, smooth_gradients, smooth_value_and_grad

KEY = jax.random.key(0)


def _raises(error, match):
    return pytest.raises(error, match=match)


def _update(tx, params, **extra_args):
    return tx.update(None, tx.init(params), params, **extra_args)


def total(params):
    return params.sum()


@pytest.mark.parametrize(
    "make",
    [
        smooth_gradients,
        lambda s: smooth(total, s),
        lambda s: smooth_value_and_grad(total, s),
    ],
)
@pytest.mark.parametrize(
    ("scale", "error", "match"),
    [
        (-0.1, ValueError, "scale must be finite and not negative, got -0.1; give"),
        (jnp.nan, ValueError, "scale must be finite and not negative, got nan"),
        (
            np.float32(np.inf),
            ValueError,
            "scale must be finite and not negative, got inf",
        ),
        (jnp.float32(-1), ValueError, "scale must be finite and not negative, got -1"),
        (True, TypeError, "scale must be a number or a scalar array, got True; give"),
        ("0.1", TypeError, "scale must be a number or a scalar array, got '0.1'"),
        (jnp.ones(2), ValueError, r"scale must be a scalar, got shape \(2,\); give"),
    ],
)
def test_scale(make, scale, error, match):
    with _raises(error, match):
        make(scale)


def test_a_negative_value_of_a_schedule():
    with _raises(ValueError, "scale must be finite and not negative, got -1"):
        _update(smooth_gradients(lambda count: -1.0), jnp.ones(2), value_fn=total)


@pytest.mark.parametrize("num_samples", [0, -1, 1.5, True, "2"])
def test_num_samples(num_samples):
    with _raises(ValueError, "num_samples must be an int of at least 1, got .*; it"):
        smooth_value_and_grad(total, 0.1, num_samples=num_samples)


@pytest.mark.parametrize("strategy", ["loop", 0, True, 1.5])
def test_strategy(strategy):
    with _raises(
        ValueError, "strategy must be one of 'auto', 'vmap', 'scan', 'unroll'"
    ):
        smooth_gradients(0.1, strategy=strategy)


def test_missing_value_fn():
    with _raises(
        ValueError,
        r"smooth_gradients needs value_fn, which was not passed; call tx.upd",
    ):
        _update(smooth_gradients(0.1), jnp.ones(2))


def test_value_instead_of_value_fn():
    with _raises(TypeError, "value_fn must be a function of params, got 1.0; pass the"):
        _update(smooth_gradients(0.1), jnp.ones(2), value_fn=1.0)


def test_missing_params():
    tx = smooth_gradients(0.1)
    with _raises(ValueError, "smooth_gradients needs params, got None; call tx.update"):
        tx.update(None, tx.init(jnp.ones(2)), value_fn=total)


def test_batch_name_not_passed():
    with _raises(
        ValueError, "batch_argnames names 'batch', which was not passed; pass"
    ):
        _update(flatopt.lpf_sgd(0.1), jnp.ones(2), value_fn=lambda p, batch: p.sum())


def test_closure_over_the_batch_under_lpf_sgd():
    with _raises(ValueError, "'batch', which value_fn does not take; write value_fn"):
        _update(flatopt.lpf_sgd(0.1), jnp.ones(2), value_fn=total, batch=jnp.ones(8))


def test_batch_that_does_not_divide():
    params, batch = regression(64)
    with _raises(
        ValueError, "a batch of 64 examples does not divide into num_samples=7"
    ):
        smooth_value_and_grad(loss_fn, 0.1, num_samples=7, batch_argnames=("batch",))(
            KEY, params, batch=batch
        )


@pytest.mark.parametrize("size", [0, 5])
def test_the_ragged_last_batch_of_an_epoch(size):
    with _raises(
        ValueError,
        f"a batch of {size} examples .*drop_last=True.*weight 0 .weight_fn",
    ):
        _update(
            flatopt.lpf_sgd(0.1),
            jnp.ones(2),
            value_fn=lambda p, batch: (batch @ p).mean(),
            batch=jnp.ones((size, 2)),
        )


def test_leaves_of_size_zero():
    params = {"w": jnp.ones((3, 2)), "e": jnp.ones((0, 2)), "z": jnp.ones(0)}
    for sampler in (kernels.normal, kernels.signs, kernels.laplace):
        for make in (kernels.isotropic, kernels.filterwise, kernels.elementwise):
            f = smooth_value_and_grad(
                lambda p: (p["w"] ** 2).mean() + p["e"].sum(), 0.1, make(sampler)
            )
            value, grads = f(KEY, params)
            assert jnp.isfinite(value)
            assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)


def test_batch_leaves_that_disagree():
    with _raises(
        ValueError, "batch leaves disagree: 4 examples in 'batch', 6 in 'batch'"
    ):
        smooth_value_and_grad(
            lambda p, batch: p.sum(), 0.1, num_samples=2, batch_argnames=("batch",)
        )(KEY, jnp.ones(2), batch=(jnp.ones(4), jnp.ones((6, 2))))


def test_batch_without_arrays():
    with _raises(
        ValueError, r"batch_argnames \('batch',\) hold no array to split; pass"
    ):
        smooth_value_and_grad(
            lambda p, batch: p.sum(), 0.1, num_samples=2, batch_argnames=("batch",)
        )(KEY, jnp.ones(2), batch=3.0)


def test_batch_argnames_as_a_string():
    with _raises(
        TypeError, r"batch_argnames must be a tuple of names, got 'batch'; wri"
    ):
        smooth_gradients(0.1, batch_argnames="batch")


def test_weight_fn_without_a_batch():
    with _raises(
        ValueError, "weight_fn weighs the chunks of a batch, got .* with no bat"
    ):
        smooth_value_and_grad(total, 0.1, weight_fn=lambda chunk: 1.0)


def test_mask_of_another_structure():
    params, batch = regression()
    for mask in ({"first": True}, {"first": True, "second": {"kernel": True}}):
        with _raises(ValueError, "mask must be a tree prefix of params, got PyTreeDef"):
            _update(
                smooth_gradients(0.1, mask=mask), params, value_fn=loss_fn, batch=batch
            )
    with _raises(TypeError, "mask must be made of Python bools, got 1; write True"):
        _update(smooth_gradients(0.1, mask=1), params, value_fn=loss_fn, batch=batch)


@pytest.mark.parametrize(
    ("leaf", "match"),
    [
        (
            jnp.arange(3),
            "params must be floating point, got int32 at 'w'; partition it",
        ),
        (
            jnp.ones(3, jnp.complex64),
            "params must be real, got complex64 at 'w'; store",
        ),
        (
            jnp.ones(3, bool),
            "params must be floating point, got bool at 'w'; partition",
        ),
    ],
)
def test_parameter_types(leaf, match):
    for f in (smooth, smooth_value_and_grad):
        with _raises(TypeError, match):
            f(lambda p: p["w"].sum(), 0.1)(KEY, {"w": leaf})


@pytest.mark.parametrize("strategy", ["vmap", "scan", "unroll"])
@pytest.mark.parametrize(
    ("value_fn", "got"),
    [
        (lambda p: p, r"shape \(2,\) and dtype float32"),
        (lambda p: p.sum().astype(jnp.int32), r"shape \(\) and dtype int32"),
        (lambda p: p.sum() > 0, r"shape \(\) and dtype bool"),
    ],
)
def test_value_that_is_no_scalar(value_fn, got, strategy):
    for f in (smooth, smooth_value_and_grad):
        with _raises(
            TypeError, f"value_fn must return a real scalar, got {got}; return"
        ):
            f(value_fn, 0.1, num_samples=2, strategy=strategy)(KEY, jnp.ones(2))


def test_aux_that_is_missing():
    with _raises(TypeError, r"value_fn must return \(value, aux\) with has_aux=True"):
        smooth_value_and_grad(total, 0.1, has_aux=True)(KEY, jnp.ones(2))


def test_masked_nodes_from_a_wrapper_around_us():
    params, batch = regression()
    mask = {"first": True, "second": False}
    tx = optax.masked(smooth_gradients(0.1), mask, mask_compatible_extra_args=True)
    with _raises(
        ValueError, "params hold MaskedNodes.*put smooth_gradients outside of"
    ):
        tx.update(
            optax.tree.zeros_like(params),
            tx.init(params),
            params,
            value_fn=loss_fn,
            batch=batch,
        )


@pytest.mark.parametrize(
    "key", [0.5, True, "seed", jax.random.split(jax.random.key(0)), np.ones(2)]
)
def test_key(key):
    with _raises(
        TypeError, "(?s)key must be an int or a single JAX random key, got .*; write"
    ):
        smooth_gradients(0.1, key=key)


@pytest.mark.parametrize("scale", [jnp.array(True), np.array(True), jnp.array(1j)])
def test_scale_that_is_not_real(scale):
    with _raises(TypeError, "scale must be real, got dtype (bool|complex64); give"):
        smooth_gradients(scale)


@pytest.mark.parametrize(
    ("value_fn", "match"),
    [
        (
            lambda p: (p.sum(), 0),
            "got a tuple of 2; return the loss alone, or use smooth_va",
        ),
        (
            lambda p: None,
            "value_fn must return a real scalar, got None; return the mean",
        ),
    ],
)
def test_value_fn_with_aux_or_without_return(value_fn, match):
    with _raises(TypeError, match):
        _update(smooth_gradients(0.1), jnp.ones(2), value_fn=value_fn)


def test_weight_fn_that_returns_no_scalar():
    f = smooth_value_and_grad(
        lambda p, batch: (p * batch.sum()).sum(),
        0.1,
        batch_argnames=("batch",),
        weight_fn=lambda chunk: chunk,
    )
    with _raises(
        TypeError, r"weight_fn must return a scalar, got \(3,\); sum over the"
    ):
        f(KEY, jnp.ones(2), batch=jnp.ones(3))


def test_leaves_that_are_no_arrays():
    for leaf in (jnp.tanh, "name"):
        with _raises(
            TypeError, "params must be arrays, got .* at 'f'; partition what is"
        ):
            smooth(lambda p: p["w"].sum(), 0.1)(KEY, {"w": jnp.ones(2), "f": leaf})


def test_sample_key_given_by_the_user():
    with _raises(
        ValueError, "sample_key is the key that flatopt draws for each sample"
    ):
        _update(smooth_gradients(0.1), jnp.ones(2), value_fn=total, sample_key=KEY)


def test_kernel_of_another_structure_or_shape():
    with _raises(ValueError, "kernel must return a perturbation of the tree structure"):
        smooth(total, 0.1, lambda key, params: (params,))(KEY, jnp.ones(2))
    with _raises(
        ValueError, r"kernel returned shape \(\) for the leaf 'w' of shape \(2,"
    ):
        smooth(lambda p: p["w"].sum(), 0.1, lambda key, params: {"w": jnp.float32(1)})(
            KEY, {"w": jnp.ones(2)}
        )


@pytest.mark.parametrize(
    ("filter_axes", "match"),
    [
        (
            2,
            r"filter_axes names axis \(2,\) for the leaf 'w' of shape \(2, 3\); give axes",
        ),
        (
            lambda path, leaf: "out",
            "filter_axes must give an int or a tuple of ints, got",
        ),
        ({"v": 0}, "filter_axes has no entry for the leaf 'w' of shape"),
    ],
)
def test_filter_axes(filter_axes, match):
    with _raises(ValueError, match):
        kernels.filterwise(filter_axes=filter_axes)(KEY, {"w": jnp.ones((2, 3))})


def test_errors_come_while_tracing_and_leave_the_state_alone():
    tx = flatopt.lpf_sgd(0.1)
    params = jnp.ones(2)
    state = tx.init(params)

    @jax.jit
    def step(state, batch):
        return tx.update(
            None,
            state,
            params,
            value_fn=lambda p, batch: (batch @ p).mean(),
            batch=batch,
        )

    with _raises(ValueError, "a batch of 12 examples does not divide"):
        step(state, jnp.ones((12, 2)))
    _, state = step(state, jnp.ones((16, 2)))
    assert optax.tree.get(state, "smoothed_value") != jnp.inf


# A thing that makes a kernel, or a sampler, in place of a kernel; a wrong key

TAKE_A_KERNEL = [
    lambda kernel: smooth(total, 0.1, kernel),
    lambda kernel: smooth_value_and_grad(total, 0.1, kernel),
    kernels.shared_magnitude,
    kernels.one_layer,
    lambda kernel: kernels.masked(kernel, True),
    lambda kernel: _update(smooth_gradients(0.1, kernel), jnp.ones(2), value_fn=total),
]


@pytest.mark.parametrize("take", TAKE_A_KERNEL)
@pytest.mark.parametrize(
    ("kernel", "got"),
    [
        (
            kernels.filterwise,
            "got filterwise, which takes other arguments; if it makes",
        ),
        (kernels.masked, "got masked, which takes other arguments; if it makes"),
        (kernels.Kernel, "got Kernel, which takes other arguments; if it makes"),
        (kernels.signs, r"got the sampler signs; write kernels.isotropic\(signs\)"),
        (jax.random.normal, "got the sampler normal; write kernels.isotropic"),
        (0.1, "got 0.1; write kernels.isotropic"),
    ],
)
def test_what_is_no_kernel(take, kernel, got):
    with _raises(TypeError, rf"kernel must be a function \(key, params\) -> .*, {got}"):
        take(kernel)


@pytest.mark.parametrize("sampler", [0.1, kernels.isotropic()])
def test_what_is_no_sampler(sampler):
    for make in (kernels.isotropic, kernels.filterwise, kernels.elementwise):
        with _raises(TypeError, r"sampler must be a function \(key, shape, dtype\) ->"):
            make(sampler)


@pytest.mark.parametrize(
    ("key", "got"),
    [
        (0, "got 0"),
        (jnp.ones(2), r"got float32 of shape \(2,\)"),
        (jax.random.split(KEY), r"got key<fry> of shape \(2,\)"),
        ({"w": jnp.ones(2)}, "got dict"),
        (None, "got NoneType"),
    ],
)
def test_random_key(key, got):
    for f in (smooth, smooth_value_and_grad):
        with _raises(TypeError, f"key must be one JAX random key, {got}; write"):
            f(total, 0.1)(key, jnp.ones(2))

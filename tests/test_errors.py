"""Each wrong use fails while tracing, in one sentence that says what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse
from helpers import (
    TRANSFORMATIONS,
    assert_close,
    loss_fn,
    regression,
    takes,
    transformation,
)
from jax.experimental import sparse

import flatopt
from flatopt import (
    curvature,
    kernels,
    smooth,
    smooth_gradients,
    smooth_value_and_grad,
)

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


@pytest.mark.heart
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
        f"a batch of {size} examples .*drop_last=True.*weight 0 for weight_fn",
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


@pytest.mark.heart
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


MASKS = {
    "a subtree lacks": (
        {"first": True},
        "no entry for 'second/bias', 'second/kernel'; ",
    ),
    "a leaf lacks": (
        {"first": True, "second": {"kernel": True}},
        "no entry for 'second/bias'; ",
    ),
    "None": ({"first": True, "second": None}, "no entry for 'second/bias', 'second"),
    "another name": (
        {"first": True, "third": True},
        "no entry for 'second/bias', 'second/kernel' and entries that params lack: "
        "'third'; ",
    ),
    "deeper": (
        {"first": {"kernel": {"x": True}}, "second": True},
        "no entry for 'first/kernel' and entries that params lack: 'first/kernel/x'; ",
    ),
    "other containers": (
        optax.MaskedState({"first": True, "second": True}),
        "no entry for 'first/kernel', 'second/bias', 'second/kernel' and entries",
    ),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(
    "make",
    [
        lambda mask: smooth_gradients(0.1, mask=mask),
        lambda mask: flatopt.lpf_sgd(0.1, mask=mask),
        lambda mask: flatopt.look_sam_gradients(0.1, mask=mask),
        lambda mask: flatopt.track_stability(0.1, 8, mask=mask),
    ],
)
def test_mask_of_another_structure(make, name):
    mask, match = MASKS[name]
    params, batch = regression()
    with _raises(ValueError, f"mask must be a tree prefix of params, got {match}") as e:
        _update(make(mask), params, value_fn=loss_fn, batch=batch)
    assert "\n" not in str(e.value)


def test_mask_of_other_values():
    params, batch = regression()
    with _raises(TypeError, "mask must be made of Python bools, got 1; write True"):
        _update(smooth_gradients(0.1, mask=1), params, value_fn=loss_fn, batch=batch)


def test_mask_with_many_paths_that_differ_is_still_one_line():
    params = [jnp.ones(1)] * 30
    with _raises(ValueError, "no entry for '0', '1', '2', '3' and 26 more; give one"):
        smooth_gradients(0.1, mask={}).init(params)


@pytest.mark.parametrize("name", ["lpf_sgd", "sam_gradients", "entropy_sgd_gradients"])
def test_sparse_batch(name):
    counts = {"sam_gradients": {"num_microbatches": 2, "batch_argnames": ("batch",)}}
    counts["entropy_sgd_gradients"] = {"num_steps": 2, "batch_argnames": ("batch",)}
    tx = transformation(name, **counts.get(name, {}))
    batch = {"x": sparse.BCOO.fromdense(jnp.arange(32.0).reshape(8, 4))}
    with _raises(TypeError, "'batch', got a sparse BCOO, whose examples cannot be spl"):
        _update(tx, jnp.ones(4), value_fn=lambda p, batch: p.sum(), batch=batch)


@pytest.mark.parametrize(
    "batch", [np.array(["a", "b"]), np.array([{}, {}]), scipy.sparse.eye(4).tocsr()]
)
def test_batch_of_what_is_no_number(batch):
    value_and_grad = smooth_value_and_grad(
        lambda p, batch: p.sum(), 0.1, num_samples=2, batch_argnames=("batch",)
    )
    with _raises(
        TypeError, "must be made of arrays to be split, got a .*; give arrays"
    ):
        value_and_grad(KEY, jnp.ones(2), batch=batch)


def test_sparse_batch_that_is_not_split():
    batch = sparse.BCOO.fromdense(jnp.arange(32.0).reshape(8, 4))
    value_and_grad = smooth_value_and_grad(lambda p, b: (b @ p).sum(), 0.0)
    _, grads = value_and_grad(KEY, jnp.ones(4), batch)
    np.testing.assert_allclose(grads, np.arange(32.0).reshape(8, 4).sum(axis=0))


@pytest.mark.parametrize(
    ("name", "count", "advice"),
    [
        (
            "smooth_gradients",
            "num_samples",
            "pad it with examples of weight 0 for weig",
        ),
        ("sam_gradients", "num_microbatches", r"\(drop_last=True\) or pad it\."),
        ("entropy_sgd_gradients", "num_steps", r"\(drop_last=True\) or pad it\."),
    ],
)
def test_last_batch_of_an_epoch(name, count, advice):
    tx = transformation(name, batch_argnames=("batch",), **{count: 4})
    match = f"a batch of 5 examples does not divide into {count}=4 chunks; .*{advice}"
    with _raises(ValueError, match):
        _update(
            tx,
            jnp.ones(2),
            value_fn=lambda p, batch: (batch @ p).mean(),
            batch=jnp.ones((5, 2)),
        )


@pytest.mark.parametrize(
    "name", [n for n, r in TRANSFORMATIONS.items() if not r.is_last]
)
def test_argument_of_the_loss_that_lacks(name):
    tx = transformation(name)
    if takes(name, "batch_argnames"):
        tx = transformation(name, batch_argnames=())
    match = "value_fn needs the argument 'batch', got arguments named 'batches'; pass"
    with _raises(TypeError, match):
        _update(tx, jnp.ones(2), value_fn=lambda p, batch: p.sum(), batches=1)


def test_type_error_of_the_loss_itself_is_left_alone():
    with _raises(TypeError, "unsupported operand"):
        _update(
            flatopt.sam_gradients(0.1),
            jnp.ones(2),
            value_fn=lambda p, batch: p.sum() + "x",
            batch=1,
        )


COUNTS = [
    ("look_sam_gradients", "every", "counts the steps from one ascent step"),
    ("track_stability", "every", "counts the steps from one measurement"),
    ("track_stability", "batch_size", "counts the examples of a batch"),
    ("entropy_sgd_gradients", "num_steps", "counts the steps of the inner walk"),
    ("sam_gradients", "num_microbatches", "counts the chunks of a batch"),
    ("smooth_gradients", "num_samples", "counts the draws of noise"),
]


@pytest.mark.parametrize(("name", "count", "advice"), COUNTS)
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "2", None])
def test_counts(name, count, advice, value):
    if value is None and takes(name, count) and count.startswith("num_"):
        return  # a default
    with _raises(
        ValueError, f"{count} must be an int of at least 1, got .*; it {advice}"
    ):
        transformation(name, **{count: value})


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_advice_on_rates_and_radii_does_not_speak_of_noise(name):
    for rate in ("rho", "learning_rate"):
        if takes(name, rate) and not TRANSFORMATIONS[name].is_optimizer:
            for wrong in (-1.0, jnp.ones(2), "x"):
                with _raises((ValueError, TypeError), f"{rate} must be") as error:
                    transformation(name, **{rate: wrong})
                assert "noise" not in str(error.value)


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


@pytest.mark.parametrize("name", [n for n in TRANSFORMATIONS if takes(n, "key")])
@pytest.mark.parametrize(
    "key",
    [
        0.5,
        jnp.nan,
        True,
        "seed",
        None,
        jax.random.split(jax.random.key(0)),
        np.ones(2),
        jnp.arange(3),
        jnp.arange(4),
        jnp.ones((2, 2), jnp.uint32),
    ],
)
def test_key(name, key):
    with _raises(TypeError, "key must be an int or a single JAX random key, got") as e:
        transformation(name, key=key)
    assert "\n" not in str(e.value)


@pytest.mark.heart
def test_key_of_too_many_bits():
    with _raises(
        ValueError, "key must be an int of at most 64 bits, got 1180591620717"
    ):
        smooth_gradients(0.1, key=2**70)


def test_raw_keys_of_the_default_generator_and_of_no_other():
    with jax.default_prng_impl("rbg"):
        key = jax.random.PRNGKey(3)
        assert key.shape == (4,)
        for name in ("smooth_gradients", "random_sam_gradients", "track_stability"):
            raw, typed = (
                _update(transformation(name, key=k), jnp.ones(2), value_fn=total)
                for k in (key, jax.random.wrap_key_data(key))
            )
            for one, other in zip(*map(jax.tree.leaves, (raw, typed)), strict=True):
                np.testing.assert_array_equal(one, other)
        with _raises(TypeError, r"got an array of shape \(2,\) and dtype int32; write"):
            smooth_gradients(0.1, key=jnp.arange(2))


@pytest.mark.parametrize(
    ("kernel", "got"),
    [
        (kernels.filterwise, "filterwise, which takes other arguments"),
        (kernels.one_layer, "one_layer, which takes other arguments"),
        (kernels.signs, "the sampler signs; write kernels.isotropic"),
        (jax.random.normal, "the sampler normal"),
        (0.1, "0.1; write kernels"),
    ],
)
def test_kernel_that_is_none_is_refused_where_a_link_is_made(kernel, got):
    match = rf"kernel must be a function \(key, params\) -> perturbation, got {got}"
    with _raises(TypeError, match):
        smooth_gradients(0.1, kernel)


@pytest.mark.parametrize(
    "make",
    [
        lambda sampler: flatopt.anti_pgd(0.1, sampler),
        lambda sampler: flatopt.smooth_gradients_zeroth_order(0.1, sampler),
    ],
)
def test_sampler_that_is_none_is_refused_where_a_link_is_made(make):
    for wrong in (kernels.isotropic(), 0.1):
        with _raises(TypeError, r"sampler must be a function \(key, shape, dtype\)"):
            make(wrong)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_leaves_of_size_zero_change_nothing(name, standard_promotion):
    def value_fn(params, batch):
        squares = [jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)]
        return jnp.mean(batch) * sum(squares)

    def updates_of(params):
        tx = transformation(name)
        grads = optax.tree.ones_like(params)
        options = {"value_fn": value_fn, "batch": jnp.ones(8)}
        updates, state = tx.update(grads, tx.init(params), params, **options)
        return updates, tx.update(grads, state, params, **options)[0]

    params = {"w": jnp.array([3.0, 4.0])}
    found = updates_of({**params, "empty": jnp.zeros((0, 3))})
    for one, other in zip(found, updates_of(params), strict=True):
        np.testing.assert_allclose(one["w"], other["w"], rtol=1e-6)
        assert one["empty"].shape == (0, 3)


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


# What people do in their first hour, whatever the message: each is one sentence that names
# what came. The messages themselves are tested above.

WEIGHTS = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
EXAMPLES = {"x": jnp.ones((16, 4)), "y": jnp.zeros(16, int)}


def _classes(params, batch):
    logits = batch["x"] @ params["w"] + params["b"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def _step(tx=None, value_fn=_classes, params=WEIGHTS, **batch):
    tx = flatopt.lpf_sgd(0.1) if tx is None else tx
    zeros = optax.tree.zeros_like(params)
    return tx.update(zeros, tx.init(params), params, value_fn=value_fn, **batch)


def _averaged(*args, **kwargs):
    return smooth_value_and_grad(
        _classes, 0.01, num_samples=8, batch_argnames=("batch",)
    )(*args, **kwargs)


MISTAKES = {
    "the loss under another name": lambda: _step(None, None, batch=EXAMPLES),
    "the batch under another name": lambda: _step(batches=EXAMPLES),
    "the same for NSO": lambda: _step(flatopt.nso_sgd(0.1), batches=EXAMPLES),
    "the batch as a positional argument": lambda: _averaged(KEY, WEIGHTS, EXAMPLES),
    "a closure over the batch": lambda: _step(
        value_fn=lambda p: _classes(p, EXAMPLES), batch=EXAMPLES
    ),
    "arguments of the loss swapped": lambda: _step(
        value_fn=lambda batch, params: _classes(params, batch), batch=EXAMPLES
    ),
    "a batch that does not divide": lambda: _step(
        flatopt.lpf_sgd(0.1, num_samples=7), batch=EXAMPLES
    ),
    "leaves of a batch that disagree": lambda: _step(
        batch={**EXAMPLES, "index": jnp.arange(15)}
    ),
    "a mask that leaves out all": lambda: _step(
        flatopt.lpf_sgd(0.1, mask=lambda params: jax.tree.map(lambda _: False, params)),
        batch=EXAMPLES,
    ),
    "a mask of another tree": lambda: _step(
        flatopt.lpf_sgd(0.1, mask={"v": True}), batch=EXAMPLES
    ),
    "losses of examples": lambda: _step(
        value_fn=lambda params, batch: batch["x"] @ params["w"][:, 0], batch=EXAMPLES
    ),
    "aux without has_aux": lambda: _step(
        value_fn=lambda params, batch: (_classes(params, batch), 1), batch=EXAMPLES
    ),
    "parameters of integers": lambda: _step(
        params={"w": jnp.ones((4, 3), int), "b": jnp.zeros(3)}, batch=EXAMPLES
    ),
    "key and params swapped": lambda: _averaged(WEIGHTS, KEY, batch=EXAMPLES),
    "a kernel that was not made": lambda: smooth_gradients(0.1, kernels.filterwise),
    "a link after an optimizer": lambda: flatopt.chain(
        optax.sgd(0.1), smooth_gradients(0.01)
    ),
    "MultiSteps around a link": lambda: _step(
        optax.MultiSteps(flatopt.lpf_sgd(0.1), 4), batch=EXAMPLES
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_the_first_hour_is_one_sentence(mistake):
    with pytest.raises((TypeError, ValueError)) as caught:
        MISTAKES[mistake]()
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    assert ". " not in text
    assert 40 < len(text) < 400
    assert ";" in text or "write" in text  # what to do


@pytest.mark.parametrize(
    "make",
    [
        lambda: flatopt.lpf_sgd(0.1),
        lambda: flatopt.nso_sgd(0.1),
        lambda: flatopt.sam_sgd(0.1),
        lambda: flatopt.sam_gradients(
            0.1, num_microbatches=2, batch_argnames=("batch",)
        ),
        lambda: flatopt.accumulate(flatopt.lpf_gradients(), optax.sgd(0.1), 2),
    ],
)
def test_a_loss_that_takes_the_batch_first_is_told_so(make):
    def swapped(batch, params):
        return _classes(params, batch)

    with _raises(TypeError, "take the parameters or the model first, got 'batch' fir"):
        _step(make(), swapped, batch=EXAMPLES)


SQUARE = jnp.arange(9.0).reshape(3, 3)  # parameters and a batch of one shape


def _swapped(batch, params):
    return jnp.sum((batch @ params) ** 2)


@pytest.mark.parametrize(
    "use",
    [
        lambda f: smooth(f, 0.1)(KEY, SQUARE, SQUARE),
        lambda f: smooth_value_and_grad(f, 0.1)(KEY, SQUARE, SQUARE),
        lambda f: curvature.hessian(f, SQUARE, SQUARE).matvec(SQUARE),
        lambda f: curvature.gauss_newton(f, total, SQUARE, [SQUARE]),
        lambda f: flatopt.radius(f, SQUARE, KEY, data=SQUARE),
        lambda f: flatopt.sharpness.low_pass(f, SQUARE, KEY, data=SQUARE),
        lambda f: flatopt.sharpness.report(f, SQUARE, KEY, data=SQUARE),
        lambda f: flatopt.stability.batch_sharpness(f, SQUARE, [SQUARE]),
        lambda f: flatopt.plots.loss_line(f, SQUARE, KEY, data=SQUARE),
    ],
)
def test_a_batch_first_is_refused_where_shapes_fit_both_ways(use):
    with _raises(TypeError, "take the parameters or the model first, got 'batch' fir"):
        use(_swapped)


def test_a_batch_first_under_any_name_is_refused_where_it_has_a_keyword():
    def of_pairs(pairs, vector):
        return _swapped(pairs, vector)

    for averaged in smooth(of_pairs, 0.1), smooth_value_and_grad(of_pairs, 0.1):
        with _raises(
            TypeError, "take the parameters or the model first, got 'pairs' f"
        ):
            averaged(KEY, SQUARE, pairs=SQUARE)


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda images, params: _swapped(images, params),  # noise on images
        lambda x, params: _swapped(x, params),
        lambda batch, labels: _swapped(batch, labels),
        lambda adapters, params: _swapped(adapters, params),
        lambda theta, data: _swapped(theta, data),
        lambda *args: _swapped(*args),
    ],
)
def test_a_loss_may_name_its_first_argument_as_it_likes(loss_fn):
    given = jnp.eye(3), 2 * jnp.eye(3)
    assert_close(smooth(loss_fn, 0.0)(KEY, *given), 12.0)
    assert_close(curvature.hessian(loss_fn, *given).matvec(jnp.eye(3)), 8 * jnp.eye(3))


# Masks that leave out everything


NOWHERE = [False, {"w": False, "b": False}, lambda p: jax.tree.map(lambda _: False, p)]


@pytest.mark.parametrize("mask", NOWHERE)
@pytest.mark.parametrize("name", [n for n in TRANSFORMATIONS if takes(n, "mask")])
def test_a_mask_that_leaves_out_all_is_refused_before_training(name, mask):
    with _raises(ValueError, "mask must be True for at least one leaf of params, got"):
        transformation(name, mask=mask).init(WEIGHTS)


@pytest.mark.parametrize("mask", NOWHERE)
def test_noise_nowhere_is_refused(mask):
    with _raises(ValueError, "noise_mask must be True for at least one leaf of params"):
        _step(smooth_gradients(0.1, noise_mask=mask), batch=EXAMPLES)
    with _raises(ValueError, "mask must be True for at least one leaf of params, got"):
        kernels.masked(kernels.isotropic(), mask)(KEY, WEIGHTS)


def test_no_leaf_has_to_decay():
    def matrices(params):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    def decayed(weight_decay):
        tx = flatopt.nso_sgd(
            0.1, 0.0, weight_decay=weight_decay, weight_decay_mask=matrices
        )
        zeros = {"b": jnp.ones(3)}
        return _step(tx, lambda p: jnp.sum(p["b"]), zeros)[0]["b"]

    assert_close(decayed(0.5), -0.1 * jnp.ones(3))

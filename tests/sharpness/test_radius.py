"""The table of radii against closed forms, NumPy, and itself on other layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flatopt
from flatopt import kernels
from flatopt.curvature import Estimate

KEY = jax.random.key(0)
SIGNS = kernels.isotropic(kernels.signs)
H = np.array([3.0, 1.0, 0.5, 0.0])
THETA = np.array([1.0, -2.0, 0.5, 4.0])
RADII = np.array([0.05, 0.1, 0.4])
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(16, 4)).astype("f4")
LABELS = RNG.integers(0, 3, 16)
WEIGHTS = RNG.normal(size=(4, 3)).astype("f4")
MOVE = RNG.normal(size=(4, 3)).astype("f4")


def quadratic(params):
    return jnp.sum(jnp.asarray(H, params.dtype) * params**2) / 2 + 1


def model_fn(params, inputs):
    return inputs @ params["w"]


def cross_entropy(params, batch):
    inputs, labels = batch
    log_p = jax.nn.log_softmax(model_fn(params, inputs))
    return -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], 1))


def fixed(key, params):
    """No noise at all: a known direction."""
    del key
    return {"w": jnp.asarray(MOVE)} if isinstance(params, dict) else jnp.asarray(V)


V = np.array([1.0, 1.0, -1.0, 0.5], "f4")
PARAMS = {"w": jnp.asarray(WEIGHTS)}
DATA = (jnp.asarray(INPUTS), jnp.asarray(LABELS))


@pytest.mark.heart
def test_noise_on_a_quadratic_is_the_closed_form():
    params = jnp.asarray(THETA, jnp.float32)
    found = flatopt.radius(quadratic, params, KEY, kernel=SIGNS, radii=RADII)
    np.testing.assert_allclose(found.rise.value, RADII**2 / 2 * H.sum(), rtol=2e-3)
    np.testing.assert_allclose(found.rise.standard_error, 0, atol=1e-5)
    norm = np.linalg.norm(THETA)
    np.testing.assert_allclose(found.noise_over_weight.value, RADII * 2 / norm, 1e-5)
    loss = (H * THETA**2).sum() / 2 + 1
    assert found.loss == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(found.share.value, found.rise.value / loss, rtol=1e-5)
    assert found.kl is None
    assert found.changed is None
    normal = flatopt.radius(quadratic, params, KEY, radii=RADII, num_samples=500)
    spread = RADII**2 / 2 * np.sqrt(2 * (H**2).sum() / 500)
    np.testing.assert_allclose(normal.rise.standard_error, spread, rtol=0.2)
    off = np.abs(normal.rise.value - RADII**2 / 2 * H.sum())
    assert (off < 4 * spread).all()


def _cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_cosines_are_those_of_the_gradients_at_both_signs():
    params = jnp.asarray(THETA, jnp.float32)
    found = flatopt.radius(quadratic, params, KEY, kernel=fixed, radii=RADII)
    expected = [
        np.mean([_cosine(H * THETA, H * (THETA + s * r * V)) for s in (1, -1)])
        for r in RADII
    ]
    np.testing.assert_allclose(found.cosine.value, expected, rtol=1e-5)


@pytest.mark.heart
def test_sam_on_a_quadratic_is_the_closed_form():
    params = jnp.asarray(THETA, jnp.float32)
    found = flatopt.radius(quadratic, params, KEY, method="sam", radii=RADII)
    gradient = H * THETA
    unit = gradient / np.linalg.norm(gradient)
    rise = RADII * np.linalg.norm(gradient) + RADII**2 / 2 * (H * unit**2).sum()
    np.testing.assert_allclose(found.rise.value, rise, rtol=1e-4)
    cosines = [_cosine(gradient, H * (THETA + r * unit)) for r in RADII]
    np.testing.assert_allclose(found.cosine.value, cosines, rtol=1e-5)
    share = RADII / np.linalg.norm(THETA)
    np.testing.assert_allclose(found.noise_over_weight.value, share, rtol=1e-5)
    np.testing.assert_array_equal(found.rise.standard_error, 0)


@pytest.mark.heart
def test_the_change_of_predictions_is_that_of_numpy():
    radii = [1e-3, 0.3, 2.0]
    found = flatopt.radius(
        cross_entropy,
        PARAMS,
        KEY,
        kernel=fixed,
        radii=radii,
        data=DATA,
        model_fn=model_fn,
    )
    logits, change = INPUTS.astype(float) @ WEIGHTS, INPUTS.astype(float) @ MOVE
    log_p = scipy.special.log_softmax(logits, axis=-1)
    p = np.exp(log_p)
    for index, r in enumerate(radii):
        kls, changes = [], []
        for sign in (1, -1):
            moved = logits + sign * r * change
            log_q = scipy.special.log_softmax(moved, axis=-1)
            kls.append((p * (log_p - log_q)).sum(-1).mean())
            changes.append((logits.argmax(-1) != moved.argmax(-1)).mean())
        np.testing.assert_allclose(found.kl.value[index], np.mean(kls), rtol=1e-4)
        np.testing.assert_allclose(found.changed.value[index], np.mean(changes), 1e-6)
    variance = (p * change**2).sum(-1) - (p * change).sum(-1) ** 2
    second_order = radii[0] ** 2 / 2 * variance.mean()
    np.testing.assert_allclose(found.kl.value[0], second_order, rtol=1e-3)


def test_a_class_that_is_ruled_out_adds_nothing():
    def masked(params, inputs):
        return model_fn(params, inputs).at[:, 0].set(-jnp.inf)

    def two(params, inputs):
        return model_fn(params, inputs)[:, 1:]

    options = {"radii": [0.1, 0.5], "data": DATA, "num_samples": 2}
    masked, two = (
        flatopt.radius(cross_entropy, PARAMS, KEY, model_fn=f, **options)
        for f in (masked, two)
    )
    np.testing.assert_allclose(masked.kl.value, two.kl.value, rtol=1e-5)


def _cut(row):
    """The data in two batches."""
    parts = slice(row), slice(row, None)
    return [(jnp.asarray(INPUTS[p]), jnp.asarray(LABELS[p])) for p in parts]


SPLIT = _cut(5)
HALVES = _cut(8)  # of one size, which share their programs


def _all_of(found):
    return jax.tree.map(
        np.asarray,
        {name: getattr(found, name) for name in FIELDS} | {"start": found.start},
    )


FIELDS = ("rise", "share", "cosine", "noise_over_weight", "kl", "changed")


@pytest.mark.parametrize(
    ("method", "dtype"),
    [("noise", jnp.float32), ("noise", jnp.bfloat16), ("sam", jnp.bfloat16)],
)
def test_batches_give_what_all_data_give(method, dtype):
    options = {"method": method, "radii": [0.1, 1.0, 8.0], "num_samples": 2}
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    whole, parts = (
        flatopt.radius(
            cross_entropy, params, KEY, data=data, model_fn=model_fn, **options
        )
        for data in (DATA, SPLIT)
    )
    assert whole.rise.value.dtype == jnp.float32
    assert whole.start > 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6),
        _all_of(parts),
        _all_of(whole),
    )
    assert parts.num_classes == 3


def test_a_mesh_gives_what_one_device_gives():
    options = {"radii": [0.1, 1.0], "model_fn": model_fn, "num_samples": 2}
    alone = flatopt.radius(cross_entropy, PARAMS, KEY, data=DATA, **options)
    auto = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("params", "data"), axis_types=auto)
    params = jax.device_put(PARAMS, NamedSharding(mesh, P("params")))
    data = jax.device_put(DATA, NamedSharding(mesh, P("data")))
    found = flatopt.radius(cross_entropy, params, KEY, data=data, **options)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        {name: getattr(found, name) for name in FIELDS},
        {name: getattr(alone, name) for name in FIELDS},
    )


def test_a_key_gives_a_table_and_a_second_call_compiles_nothing():
    calls = []

    def loss_fn(params, batch):
        calls.append(None)
        return cross_entropy(params, batch)

    def table(key, params):
        found = flatopt.radius(
            loss_fn, params, key, radii=[0.1, 1.0], data=DATA, num_samples=2
        )
        return str(found._replace(seconds=None))

    first, count = table(KEY, PARAMS), len(calls)
    assert table(KEY, PARAMS) == first
    assert table(jax.random.key(1), PARAMS) != first
    table(KEY, {"w": PARAMS["w"] + 1})
    assert len(calls) == count


def test_inside_of_jit_the_effects_are_traced():
    def rises(params):
        return flatopt.radius(quadratic, params, KEY, kernel=SIGNS, radii=RADII).rise

    params = jnp.asarray(THETA, jnp.float32)
    found = jax.jit(rises)(params)
    np.testing.assert_allclose(found.value, rises(params).value, rtol=1e-3)


# A part of the parameters, and constants


def test_a_mask_on_a_quadratic_is_the_closed_form_of_its_leaves():
    params = {"a": jnp.asarray(THETA[:2], jnp.float32), "b": jnp.float32([5.0, 7.0])}

    def loss_fn(params):
        return quadratic(jnp.concatenate([params["a"], params["b"]]))

    options = {"radii": RADII, "mask": "a"}
    found = flatopt.radius(loss_fn, params, KEY, kernel=SIGNS, **options)
    np.testing.assert_allclose(found.rise.value, RADII**2 / 2 * H[:2].sum(), rtol=2e-3)
    norm = np.linalg.norm(THETA[:2])
    share = RADII * np.sqrt(2) / norm
    np.testing.assert_allclose(found.noise_over_weight.value, share, rtol=1e-5)
    climb = flatopt.radius(loss_fn, params, KEY, method="sam", **options)
    gradient = H[:2] * THETA[:2]
    unit = gradient / np.linalg.norm(gradient)
    rise = RADII * np.linalg.norm(gradient) + RADII**2 / 2 * (H[:2] * unit**2).sum()
    np.testing.assert_allclose(climb.rise.value, rise, rtol=1e-4)
    cosines = [_cosine(gradient, H[:2] * (THETA[:2] + r * unit)) for r in RADII]
    np.testing.assert_allclose(climb.cosine.value, cosines, rtol=1e-5)


FROZEN = {"kernel": jnp.asarray(RNG.normal(size=(4, 4)), jnp.float32)}
SHIFT = {"mean": jnp.float32([[0.5, -1.0, 0.0, 2.0]])}


def two_layers(params, inputs, constants):
    hidden = jnp.tanh((inputs - constants["mean"]) @ params["body"]["kernel"])
    return model_fn(params["head"], hidden)


def two_layer_loss(params, batch, constants):
    inputs, labels = batch
    log_p = jax.nn.log_softmax(two_layers(params, inputs, constants))
    return -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], 1))


def frozen_model(params, inputs):
    return two_layers(params | {"body": FROZEN}, inputs, SHIFT)


def frozen_loss(params, batch):
    return two_layer_loss(params | {"body": FROZEN}, batch, SHIFT)


ONLY_HEAD = {"body": False, "head": True}


@pytest.mark.parametrize(
    ("mask", "options", "data"),
    [
        ("head", {}, HALVES),
        (ONLY_HEAD, {"kernel": kernels.filterwise()}, DATA),
        (lambda params: ONLY_HEAD, {"method": "sam"}, DATA),
        (ONLY_HEAD, {"method": "sam"}, HALVES),
    ],
    ids=["isotropic", "filterwise", "sam", "sam streamed"],
)
def test_a_mask_gives_what_leaves_frozen_by_hand_give(mask, options, data):
    options = {"radii": [0.1, 1.0], "num_samples": 2, "data": data} | options
    found = flatopt.radius(
        two_layer_loss,
        {"body": FROZEN, "head": PARAMS},
        KEY,
        model_fn=two_layers,
        mask=mask,
        constants=SHIFT,
        **options,
    )
    by_hand = flatopt.radius(
        frozen_loss, {"head": PARAMS}, KEY, model_fn=frozen_model, **options
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        _all_of(found),
        _all_of(by_hand),
    )
    assert found.num_classes == 3
    assert found.loss == pytest.approx(by_hand.loss, rel=1e-6)


def test_other_constants_and_frozen_leaves_compile_nothing():
    calls = []

    def loss_fn(params, batch, constants):
        calls.append(None)
        return two_layer_loss(params, batch, constants)

    def rises(body, constants):
        params = {"body": body, "head": PARAMS}
        options = {"mask": "head", "constants": constants, "num_samples": 1}
        found = flatopt.radius(loss_fn, params, KEY, radii=[1.0], data=DATA, **options)
        return np.asarray(found.rise.value)

    first, count = rises(FROZEN, SHIFT), len(calls)
    other = rises(FROZEN, {"mean": SHIFT["mean"] + 1})
    third = rises({"kernel": 2 * FROZEN["kernel"]}, SHIFT)
    assert len(calls) == count
    assert abs(other - first) > 1e-4
    assert abs(third - first) > 1e-4


def test_constants_alone_are_given_last():
    params = {"body": FROZEN, "head": PARAMS}

    def closed_model(params, inputs):
        return two_layers(params, inputs, SHIFT)

    def closed_loss(params, batch):
        return two_layer_loss(params, batch, SHIFT)

    options = {"radii": [0.5], "data": DATA, "num_samples": 1}
    found = flatopt.radius(
        two_layer_loss, params, KEY, model_fn=two_layers, constants=SHIFT, **options
    )
    closed = flatopt.radius(closed_loss, params, KEY, model_fn=closed_model, **options)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        {name: getattr(found, name) for name in FIELDS},
        {name: getattr(closed, name) for name in FIELDS},
    )


def _made(rises, kl=None, recipe="nso", loss=2.0, radii=(0.01, 0.1, 1.0)):
    def estimate(x):
        return None if x is None else Estimate(np.array(x), np.zeros(len(x)), 4)

    rises = estimate(rises)
    return flatopt.Radius(
        np.array(radii), rises, rises, rises, estimate(kl), None, loss, recipe, 10
    )


@pytest.mark.heart
def test_what_is_suggested_lies_where_the_rule_says():
    radii = np.array([0.01, 0.1, 1.0])
    found = _made(3 * radii**2, kl=6 * radii**2)
    assert found.start == pytest.approx(0.1)  # 6 * 0.1^2 = 0.06
    assert found.bracket == pytest.approx((0.1, 0.3))
    assert "sigma = 0.1, 0.3, and none" in " ".join(str(found).split())
    found = _made(50 * radii**2, recipe="sam")
    assert found.bracket == pytest.approx((0.1, 0.3))
    found = _made(50 * radii**2, recipe="lpf")
    assert found.bracket == pytest.approx((0.04, 0.08, 0.16))
    below = _made(1e-3 * radii**2, kl=1e-3 * radii**2)
    assert below.bracket == ()
    assert "give larger ones" in " ".join(str(below).split())
    above = _made(50 + radii, recipe="sam")
    assert above.start is None
    assert "give smaller ones" in " ".join(str(above).split())
    assert "Give model_fn" in str(_made(radii))
    assert "No rule was measured for this kernel" in str(_made(radii, recipe=None))


def test_what_does_nothing_and_what_lies_beyond_the_cliff():
    found = _made([1.9e-4, 2.1e-4, 1.2])  # of a loss of 2, where a guess loses 2.3
    assert found.does_nothing.tolist() == [True, False, False]
    assert found.beyond_cliff.tolist() == [False, False, True]
    lost = _made([0.1, np.nan, np.inf], kl=[0.02, np.nan, np.inf])
    assert lost.beyond_cliff.tolist() == [False, True, True]
    assert lost.start == 0.01  # the last that is a number
    for text in (str(lost), lost._repr_html_()):
        assert "beyond" in text
    assert lost.to_dict()["bracket"] == pytest.approx([0.01, 0.03])
    flat = flatopt.radius(lambda p: 0 * jnp.sum(p) + 2, jnp.ones(3), KEY, radii=RADII)
    assert flat.does_nothing.all()
    assert np.isnan(flat.cosine.value).all()


@pytest.mark.parametrize("loss", [0.0, -5.0])
def test_without_a_loss_of_a_guess_the_height_of_the_cliff_is_unknown(loss):
    rises = [0.0, 3.0, np.inf]
    found = _made(rises, loss=loss)._replace(num_classes=None)
    assert found.beyond_cliff.tolist() == [False, False, True]
    assert "collapsed" not in str(found)
    assert _made(rises, loss=loss).beyond_cliff.tolist() == [False, True, True]


@pytest.mark.parametrize(("data", "total"), [(DATA, 1), (SPLIT, 6)])
def test_the_bar_of_sam_counts_one_step_a_radius(data, total):
    calls = []
    flatopt.radius(
        cross_entropy,
        PARAMS,
        KEY,
        method="sam",
        radii=[0.1, 0.2],
        data=data,
        progress=lambda *call: calls.append(call),
    )
    assert [done for done, _, _ in calls] == [*range(total + 1)]
    assert {of for _, of, _ in calls} == {total}


class _Unhashable:
    __hash__ = None

    def __call__(self, params, inputs):
        return model_fn(params, inputs)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda p, x: (x @ p["w"] > 0).astype(jnp.int32), "floating logits, got int32"),
        (_Unhashable(), "must be hashable"),
        (lambda p: p, r"model_fn must take 2 arguments"),
    ],
)
def test_wrong_models_are_one_sentence(model, words):
    with pytest.raises(TypeError, match=words):
        flatopt.radius(cross_entropy, PARAMS, KEY, data=DATA, model_fn=model)


def test_constants_that_a_function_does_not_take_are_one_sentence():
    options = {"data": DATA, "constants": SHIFT}
    with pytest.raises(TypeError, match=r"loss_fn must take 3 arguments"):
        flatopt.radius(cross_entropy, PARAMS, KEY, **options)
    params = {"body": FROZEN, "head": PARAMS}
    with pytest.raises(TypeError, match=r"model_fn must take 3 arguments"):
        flatopt.radius(two_layer_loss, params, KEY, model_fn=model_fn, **options)
    options["constants"] = {"mean": "none"}
    with pytest.raises(TypeError, match="constants must be arrays, got 'none'"):
        flatopt.radius(two_layer_loss, params, KEY, **options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "sam", "kernel": SIGNS}, "kernel must be None where method='sam'"),
        ({"model_fn": model_fn}, r"data must be \(inputs, targets\)"),
        (
            {"model_fn": model_fn, "data": {"x": DATA[0], "y": DATA[1]}},
            "data must be pairs .* got a batch of type dict",
        ),
        (
            {"model_fn": lambda p, x: (x @ p["w"])[:, :1], "data": DATA},
            r"two or more classes on the last axis, got \(16, 1\)",
        ),
        ({"radii": [0.2, 0.1]}, "radii must be positive and increase"),
        ({"mask": {"w": False}}, "mask must be True for at least one leaf"),
        ({"mask": "b"}, "mask"),
    ],
)
def test_wrong_use_is_one_sentence(change, words):
    def loss_fn(params, batch=None):
        return jnp.sum(params["w"] ** 2)

    with pytest.raises(ValueError, match=words):
        flatopt.radius(loss_fn, PARAMS, KEY, **change)
    with pytest.raises(ValueError, match="the loss over all data is nan"):
        flatopt.radius(lambda p: jnp.nan * jnp.sum(p["w"]), PARAMS, KEY)

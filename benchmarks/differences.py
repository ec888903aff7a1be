"""How far off products by differences are on small networks: ``make bench-curvature``.

Writes ``docs/results/differences.json``; ``docs/curvature.md`` shows its table. The truth
is from second derivatives in float64.
"""

import json
import pathlib

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

from flatopt import curvature

OUTPUT = pathlib.Path(__file__).parent.parent / "docs" / "results" / "differences.json"
DTYPES = {"float32": jnp.float32, "computing in bfloat16": jnp.bfloat16}


def mlp(params, x):
    return jnp.tanh(x @ params["in"] + params["bias"]) @ params["out"]


def _deep(params, x):
    for name in ("first", "second", "third"):
        x = jax.nn.relu(x @ params[name])
    return x @ params["out"]


def cnn(params, x):
    x = jax.nn.gelu(jax.lax.conv(x, params["kernel"], (2, 2), "SAME"))
    return x.reshape(len(x), -1) @ params["head"]


def _two_layers(params, x):
    x = jax.nn.relu(jax.lax.conv(x, params["first"], (1, 1), "SAME"))
    x = jax.nn.silu(jax.lax.conv(x, params["second"], (2, 2), "SAME"))
    return x.mean((2, 3)) @ params["head"]


def _norm(x, scale):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-5)
    return wide.astype(x.dtype) * scale


def transformer(params, tokens):
    x = params["embed"][tokens]
    query, key, value = jnp.split(_norm(x, params["first"]) @ params["qkv"], 3, -1)
    scores = query @ key.swapaxes(1, 2) / x.shape[-1] ** 0.5
    x = x + jax.nn.softmax(scores, -1) @ value @ params["mix"]
    x = x + jax.nn.gelu(_norm(x, params["second"]) @ params["up"]) @ params["down"]
    return x @ params["embed"].T


def _recurrent(params, tokens):
    x, units = params["embed"][tokens], params["state"].shape[0]
    state = jnp.zeros((len(tokens), units), x.dtype)
    for step in range(x.shape[1]):
        gates = x[:, step] @ params["input"] + state @ params["state"]
        update, reset, new = jnp.split(gates, 3, -1)
        update = jax.nn.sigmoid(update)
        new = jnp.tanh(new * jax.nn.sigmoid(reset))
        state = (1 - update) * state + update * new
    return state @ params["out"]


# Name, network, shapes of kernels, shape of inputs, classes; inputs of one number are words.
NETWORKS = {
    "MLP, tanh": (mlp, {"in": (6, 10), "bias": (10,), "out": (10, 4)}, (64, 6), 4),
    "CNN, GELU": (cnn, {"kernel": (4, 1, 3, 3), "head": (64, 4)}, (64, 1, 8, 8), 4),
    "Transformer": (
        transformer,
        {
            "embed": (8, 8),
            "qkv": (8, 24),
            "mix": (8, 8),
            "up": (8, 16),
            "down": (16, 8),
        },
        (16, 6),
        8,
    ),
    "wider Transformer": (
        transformer,
        {
            "embed": (12, 16),
            "qkv": (16, 48),
            "mix": (16, 16),
            "up": (16, 32),
            "down": (32, 16),
        },
        (16, 10),
        12,
    ),
    "gated recurrent network": (
        _recurrent,
        {"embed": (9, 8), "input": (8, 36), "state": (12, 36), "out": (12, 4)},
        (64, 7),
        4,
    ),
    "MLP of three ReLU layers": (
        _deep,
        {"first": (8, 24), "second": (24, 24), "third": (24, 24), "out": (24, 5)},
        (128, 8),
        5,
    ),
    "CNN of a ReLU and a SiLU": (
        _two_layers,
        {"first": (6, 2, 3, 3), "second": (8, 6, 3, 3), "head": (8, 4)},
        (32, 2, 8, 8),
        4,
    ),
}


def make(name, rng):
    """Loss, parameters and data, which bfloat16 holds without rounding."""
    network, shapes, shape, classes = NETWORKS[name]

    def draw(shape):
        inner = shape[0] if len(shape) < 3 else np.prod(shape[1:])
        return rng.normal(size=shape) / inner**0.5

    params = {key: draw(shape) for key, shape in shapes.items()}
    if network is transformer:
        params |= {key: np.ones(len(params["mix"])) for key in ("first", "second")}
    if "embed" in params:
        words = len(params["embed"])
        labels = shape if network is transformer else shape[:1]
        data = rng.integers(0, words, shape), rng.integers(0, classes, labels)
    else:
        data = _rounded(rng.normal(size=shape)), rng.integers(0, classes, shape[0])

    def loss_fn(params, batch, dtype):
        outputs = network(*_cast((params, batch[0]), dtype))
        outputs = outputs.astype(jnp.promote_types(dtype, jnp.float32))
        return optax.softmax_cross_entropy_with_integer_labels(outputs, batch[1]).mean()

    return loss_fn, jax.tree.map(_rounded, params), data


def _rounded(x):
    return np.asarray(jnp.asarray(x, jnp.bfloat16), "f8")


def _cast(tree, dtype):
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def truth(loss_fn, params, data, rng):
    """Flat vectors, the last along a leading direction, and products in float64."""
    with jax.enable_x64(True):
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        gradient = jax.grad(lambda p: loss_fn(unravel(p), data, jnp.float64))
        push = jax.jit(lambda v: jax.jvp(gradient, (flat,), (v,))[1])
        rows = [rng.normal(size=flat.size) for _ in range(2)]
        rows += [np.sign(rng.normal(size=flat.size)) for _ in range(4)]
        top = rows[-1]
        for _ in range(12):
            top = np.asarray(push(top))
            top = top / np.linalg.norm(top)
        rows.append(top)
        return rows, [np.asarray(push(row)) for row in rows]


def measure(name):
    rng = np.random.default_rng(0)
    loss_fn, params, data = make(name, rng)
    rows, truths = truth(loss_fn, params, data, rng)
    params, data = _cast((params, data), np.float32)
    _, unravel = jax.flatten_util.ravel_pytree(params)
    report = {"num_parameters": sum(x.size for x in params.values())}
    for title, dtype in DTYPES.items():
        operator = curvature.finite_difference_hessian(
            lambda p, b, dtype=dtype: loss_fn(p, b, dtype), params, data
        )
        offs, tolds = [], []
        for row, product in zip(rows, truths, strict=True):
            vector = unravel(jnp.asarray(row, jnp.float32))
            found = jax.flatten_util.ravel_pytree(operator.matvec(vector))[0]
            off = np.linalg.norm(np.asarray(found, "f8") - product)
            offs.append(off / np.linalg.norm(product))
            tolds.append(float(operator.product_error(vector)) / off)
        report[title] = {"errors": offs, "told_over_true": tolds}
    return report


def table(report):
    """The table of the page: largest errors of six random vectors, and the leading one."""
    head = [f"{title} | leading" for title in DTYPES]
    lines = [f"| network | {' | '.join(head)} |", "|---" * (1 + 2 * len(head)) + "|"]
    for name, found in report["networks"].items():
        cells = [f"{name}, {found['num_parameters']:,} parameters"]
        for title in DTYPES:
            *random, leading = found[title]["errors"]
            cells += [f"{max(random):.2g}", f"{leading:.2g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def told(report, title):
    """The smallest and largest reported error over the true one."""
    found = [x[title]["told_over_true"] for x in report["networks"].values()]
    return f"{np.min(found):.1f} to {np.max(found):.1f}"


def main():
    networks = {name: measure(name) for name in NETWORKS}
    report = {"jax": jax.__version__, "networks": networks}
    OUTPUT.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report), *(told(report, title) for title in DTYPES), sep="\n")


if __name__ == "__main__":
    main()

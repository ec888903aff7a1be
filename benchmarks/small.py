"""What many small problems say at once: ``make bench-curvature``.

Ways to the diagonal of a matrix, over 300 seeds; the largest eigenvalues of 2,000 networks
in one program. Writes ``docs/results/small.json``, which ``docs/curvature.md`` quotes.
"""

import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from matfree import stochtrace

from flatopt import curvature

OUTPUT = pathlib.Path(__file__).parent.parent / "docs" / "results" / "small.json"
ROWS, PRODUCTS, SEEDS, NETWORKS = 80, 48, 300, 2000
SPECTRA = {
    "10 · 0.8^i": 10 * 0.8 ** np.arange(ROWS),
    "10 / (1 + i)^1.5": 10 / (1 + np.arange(ROWS)) ** 1.5,
    "20 of 5, 60 of 0.01": np.repeat([5.0, 0.01], [20, 60]),
}


def _quadratic(params, batch):
    return params @ batch[0] @ params / 2


def _probed(num_deflated):
    # Of the products three a direction find the directions and measure them.
    count = PRODUCTS - 3 * num_deflated

    def find(operator, key):
        found = curvature.probe(operator, key, count, num_deflated=num_deflated)
        return found.diagonal[:2]

    return find, count


def _xdiag(operator, key):
    """Leave-one-out; half the products make the sketch, half are with its basis."""
    product, like = operator.flat()
    sampler = stochtrace.sampler_normal(jnp.zeros(like.shape), num=PRODUCTS // 2)
    rule = stochtrace.leave_one_out_xdiag()
    with jax.numpy_rank_promotion("allow"):
        estimator = stochtrace.estimator_leave_one_out_mean_and_sem(rule, sampler)
        return estimator(product, key)


# Each with the number of samples that its standard error rests on.
WAYS = {
    "signs alone": _probed(0),
    "8 directions, as in `probe`": _probed(8),
    "`diagonal`": (
        lambda operator, key: curvature.diagonal(operator, key, PRODUCTS)[:2],
        PRODUCTS - 2 * (PRODUCTS // 3),
    ),
    "XDiag": (_xdiag, PRODUCTS // 2),
}


def diagonals():
    """Errors over the length of the diagonal, and how often 95 % intervals hold.

    One seed after another: side by side, XDiag of matfree 0.6.3 hangs on CPU in jax 0.10.2.
    """
    keys = jax.random.split(jax.random.key(1), SEEDS)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(ROWS, ROWS)))[0]
    matrices = {name: (turn * values) @ turn.T for name, values in SPECTRA.items()}
    report = {name: {} for name in SPECTRA}
    for way, (find, samples) in WAYS.items():

        @jax.jit
        def run(matrix, keys, find=find):
            operator = curvature.hessian(_quadratic, jnp.zeros(ROWS), matrix[None])
            return jax.lax.map(lambda key: find(operator, key), keys)

        for name, matrix in matrices.items():
            found = run(jnp.asarray(matrix, jnp.float32), keys)
            value, error = (np.asarray(x, "f8") for x in found)
            truth = np.diag(matrix)
            wrong = np.abs(value - truth)
            within = scipy.stats.t.ppf(0.975, samples - 1) * error + 1e-6 * truth
            report[name][way] = {
                "error": np.sqrt(np.mean(np.sum(wrong**2, axis=1)))
                / np.linalg.norm(truth),
                "held": np.mean(wrong <= within),
            }
    return report


def _loss(params, batch):
    inputs, targets = batch
    hidden = jnp.tanh(inputs @ params["kernel"] + params["bias"][None])
    return jnp.mean((hidden @ params["head"] - targets) ** 2)


def networks():
    """Seconds to compile and to run, and the distance to dense eigenvalues."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = {"kernel": (4, 6), "bias": (6,), "head": (6, 2)}
    params = {
        name: jax.random.normal(key, (NETWORKS, *shape))
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    data = jax.random.normal(keys[3], (64, 4)), jax.random.normal(keys[4], (64, 2))

    def largest(params, key):
        operator = curvature.hessian(_loss, params, data)
        found = curvature.block_lanczos(operator, key, 2)
        return found.values, found.residuals

    arguments = params, jax.random.split(jax.random.key(1), NETWORKS)
    start = time.perf_counter()
    compiled = jax.jit(jax.vmap(largest)).lower(*arguments).compile()
    compiling = time.perf_counter() - start
    jax.block_until_ready(compiled(*arguments))
    start = time.perf_counter()
    values, residuals = jax.block_until_ready(compiled(*arguments))
    seconds = time.perf_counter() - start

    @jax.jit
    @jax.vmap
    def dense(params):
        return curvature.hessian(_loss, params, data).dense()

    truths = np.linalg.eigvalsh(np.asarray(dense(params), "f8"))[:, -2:][:, ::-1]
    return {
        "networks": NETWORKS,
        "parameters": sum(int(np.prod(shape)) for shape in shapes.values()),
        "compile_seconds": compiling,
        "seconds": seconds,
        "largest_residual": float(np.max(residuals)),
        "largest_distance": float(np.abs(np.asarray(values) - truths).max()),
    }


def main():
    report = {
        "command": "make bench-curvature",
        "jax": jax.__version__,
        "diagonals": diagonals(),
        "networks": networks(),
    }
    OUTPUT.write_text(json.dumps(report, indent=1) + "\n")
    print(OUTPUT.read_text())


if __name__ == "__main__":
    main()

"""Inner products of the examples' rows, a chunk of examples at a time."""

import contextlib
import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import blocks, platforms, progress, trees

MOST_OUTPUTS = 32_000  # LAPACK counts its work space, twice the matrix, in 32 bits
COPIES = (
    6  # of the matrix: its own, eigenvectors twice, work space of two; 5.4 measured
)
UNKNOWN_MEMORY = 4 << 30  # bytes, where the system does not say


def check_size(num_outputs):
    """Reject a matrix that does not fit, before the system ends the process."""
    needed = COPIES * 8 * num_outputs**2
    found = _free_memory()
    if num_outputs > MOST_OUTPUTS or needed > found:
        raise ValueError(
            f"inputs give {num_outputs:,} outputs in all, whose inner products and their "
            f"eigenvectors take {needed / 1e9:.3g} GB of {found / 1e9:.3g} GB of free memory, "
            f"with at most {MOST_OUTPUTS:,} outputs; ask for num_directions, or use "
            "estimate_alignment, batch_sharpness and critical_learning_rate, which take "
            "batches."
        )


def _host_memory():
    """Bytes of memory in all."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return UNKNOWN_MEMORY


def _free_memory():
    """Bytes that this process may still take; where Linux does not say, all there are."""
    found = _host_memory()
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        line = next(x for x in lines if x.startswith("MemAvailable:"))
        found = min(found, 1024 * int(line.split()[1]))
    with contextlib.suppress(OSError, ValueError):  # a limit may be the word "max"
        found = min(found, int(pathlib.Path("/sys/fs/cgroup/memory.max").read_text()))
    return found


def most_held():
    """Number of float32 values in a quarter of the device's memory."""
    found = jax.local_devices()[0].memory_stats()
    if found and "bytes_limit" in found:
        return found["bytes_limit"] // 16
    return _host_memory() // 16


@functools.partial(jax.jit, static_argnums=0)
def jacobian(model_fn, params, scales, inputs, roots):
    """Rows of the examples' roots times Jacobians, two axes a leaf.

    ``scales``: a tree like the parameters that multiplies their columns, or None.
    """

    def outputs(params, example):
        example = jax.tree.map(lambda x: x[None], example)
        return trees.widen(model_fn(params, example)[0]).reshape(-1)

    rows = jax.vmap(jax.jacrev(outputs), in_axes=(None, 0))(params, inputs)

    if scales is None:
        scales = jax.tree.map(lambda p: jnp.ones((), p.dtype), params)

    def flatten(leaf, scale):
        leaf = trees.widen(leaf.reshape(*roots.shape[:2], -1))
        leaf = leaf * scale.reshape(1, 1, -1).astype(leaf.dtype)
        mixed = jnp.einsum(
            "ncd,ndp->ncp", roots.astype(leaf.dtype), leaf, precision=blocks.PRECISION
        )
        return mixed.reshape(-1, leaf.shape[2])

    pairs = zip(jax.tree.leaves(rows), jax.tree.leaves(scales), strict=True)
    return [flatten(leaf, scale) for leaf, scale in pairs if leaf.size]


@jax.jit
def _wide_gram(block, other):
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), (block, other))
    return blocks.gram(*wide)


_narrow_gram = jax.jit(blocks.gram)


def _products(block, other):
    """Inner products in float64: in float32 they hide what is flat beside the sharpest."""
    leaves = jax.tree.leaves((block, other))
    if platforms.platform_of(leaves) == "tpu":  # which has no float64
        return np.asarray(_narrow_gram(block, other), "f8")
    with jax.enable_x64(True):
        return np.asarray(_wide_gram(block, other))


def gram(model_fn, params, scales, inputs, roots, chunk_size, size, shown):
    """Inner products of all rows, shape (n c, n c), in float64 on the host.

    Chunks are held while they fit; with the chunks held, all later ones are computed
    again.
    """
    n, c, _ = roots.shape
    check_size(n * c)
    starts = range(0, n, chunk_size)
    chunks = [
        jax.tree.map(lambda x, s=start: x[s : s + chunk_size], (inputs, roots))
        for start in starts
    ]
    places = [slice(s * c, min(s + chunk_size, n) * c) for s in starts]
    most = max(1, most_held() // (chunk_size * c * size))
    found = np.empty((n * c, n * c))
    total = len(chunks) * (len(chunks) + 1) // 2
    with progress.bar(shown, total, "linearize") as steps:
        for first in range(0, len(chunks), most):
            held = {}
            for j in range(first, len(chunks)):
                rows = jacobian(model_fn, params, scales, *chunks[j])
                if j < first + most:
                    held[j] = rows
                for i, others in held.items():
                    part = _products(others, rows)
                    found[places[i], places[j]] = part
                    found[places[j], places[i]] = part.T
                    steps.update()
    return found

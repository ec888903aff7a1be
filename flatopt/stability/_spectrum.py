"""The sharpest directions of the examples' rows, in three ways."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import blocks, progress, trees
from flatopt.stability import _gram

MANY_OUTPUTS = 1_000  # from which fewer parameters than outputs are worth their own way
PASS = 512  # examples of a pass of products
PRODUCTS = 4  # of a direction, as a guess


class Spectrum(NamedTuple):
    """Eigenvectors of the rows' inner products.

    Attributes:
      values: eigenvalues, descending, shape (k,), float64.
      vectors: shape (n c, k), float64.
      slope: the norm of the rows' sum, weighted by the errors.
      largest_example: the largest eigenvalue of an example's own inner products, or None
        where all directions are there.
    """

    values: np.ndarray
    vectors: np.ndarray
    slope: float
    largest_example: float | None = None


class Rows(NamedTuple):
    """The rows of a model's roots times Jacobians, of all examples.

    Attributes:
      model_fn, params, scales, inputs, roots: as :func:`_gram.jacobian` takes them.
      errors: the examples' errors, flat, float64.
      chunk_size: number of examples whose rows are held.
      shown: where progress is shown.
    """

    model_fn: object
    params: object
    scales: object
    inputs: object
    roots: jax.Array
    errors: np.ndarray
    chunk_size: int
    shown: object

    @property
    def size(self):
        return blocks.size(self.params)

    def chunks(self, size):
        """Slices of the outputs with the inputs and roots of so many examples each."""
        n, c, _ = self.roots.shape
        for start in range(0, n, size):
            part = jax.tree.map(
                lambda x, s=start: x[s : s + size], (self.inputs, self.roots)
            )
            yield slice(start * c, min(start + size, n) * c), part

    def held(self):
        """Chunks of rows, shape (outputs, parameters), float64 on the host."""
        for place, part in self.chunks(self.chunk_size):
            rows = _gram.jacobian(self.model_fn, self.params, self.scales, *part)
            yield place, np.concatenate([np.asarray(x, "f8") for x in rows], axis=1)


def spectrum(rows: Rows, num_directions):
    """The :class:`Spectrum` of all directions, or of so many."""
    n, c, _ = rows.roots.shape
    if rows.size < n * c // 2 and n * c > MANY_OUTPUTS:
        return _of_few_parameters(rows)
    if num_directions is not None and num_directions < min(n * c, rows.size):
        return _by_products(rows, num_directions)
    return _of_few_outputs(rows)


def _of_few_outputs(rows):
    gram = _gram.gram(
        rows.model_fn,
        rows.params,
        rows.scales,
        rows.inputs,
        rows.roots,
        rows.chunk_size,
        rows.size,
        rows.shown,
    )
    _check_finite(gram)
    values, vectors = np.linalg.eigh(gram)
    slope = max(rows.errors @ gram @ rows.errors, 0.0) ** 0.5
    return Spectrum(values[::-1], vectors[:, ::-1], slope)


def _of_few_parameters(rows):
    """From the products of columns: no matrix over all pairs of outputs is made."""
    n, c, _ = rows.roots.shape
    _gram.check_size(rows.size)
    whole, slope = np.zeros((rows.size, rows.size)), np.zeros(rows.size)
    total = 2 * -(-n // rows.chunk_size)
    with progress.bar(rows.shown, total, "linearize") as steps:
        for place, part in rows.held():
            whole += part.T @ part
            slope += rows.errors[place] @ part
            steps.update()
        _check_finite(whole)
        values, basis = np.linalg.eigh(whole)
        values, basis = np.maximum(values[::-1], 0.0), basis[:, ::-1]
        lengths = np.sqrt(values)
        basis = basis * np.divide(
            1, lengths, out=np.zeros_like(lengths), where=lengths > 0
        )
        vectors = np.empty((n * c, rows.size))
        for place, part in rows.held():
            vectors[place] = part @ basis
            steps.update()
    return Spectrum(values, vectors, float(np.linalg.norm(slope)))


def _by_products(rows, num_directions):
    """By Lanczos on products with the Jacobian and its transpose."""
    import scipy.sparse.linalg  # slow to import

    n, c, _ = rows.roots.shape
    passes = list(rows.chunks(PASS))
    total = PRODUCTS * num_directions + -(-n // rows.chunk_size)
    with progress.bar(rows.shown, total, "linearize") as steps:

        def transposed(vector):
            found = None
            for place, part in passes:
                weights = jnp.asarray(vector[place].reshape(-1, c), rows.roots.dtype)
                one = _transposed(
                    rows.model_fn, rows.params, rows.scales, *part, weights
                )
                found = one if found is None else jax.tree.map(jnp.add, found, one)
            return found

        def product(vector):
            steps.update()
            moved = transposed(np.asarray(vector).ravel())
            found = [
                _applied(rows.model_fn, rows.params, rows.scales, *part, moved)
                for _, part in passes
            ]
            return np.concatenate([np.asarray(x, "f8").ravel() for x in found])

        start = product(np.random.default_rng(0).normal(size=n * c))
        _check_finite(start)
        operator = scipy.sparse.linalg.LinearOperator((n * c,) * 2, product, dtype="f8")
        values, vectors = scipy.sparse.linalg.eigsh(
            operator, k=num_directions, which="LA", v0=start, tol=1e-6
        )
        slope = np.sqrt(
            sum(
                np.sum(np.asarray(x, "f8") ** 2)
                for x in jax.tree.leaves(transposed(rows.errors))
            )
        )
        largest = 0.0
        for _, part in rows.held():
            part = part.reshape(-1, c, part.shape[1])
            grams = np.einsum("ncp,ndp->ncd", part, part)
            largest = max(largest, float(np.linalg.eigvalsh(grams)[:, -1].max()))
            steps.update()
    return Spectrum(values[::-1], vectors[:, ::-1], float(slope), largest)


@functools.partial(jax.jit, static_argnums=0)
def _transposed(model_fn, params, scales, inputs, roots, weights):
    """The sum of rows with weights, a tree like the parameters."""

    def outputs(params):
        return _outputs(model_fn, params, inputs, roots)

    _, pull = jax.vjp(outputs, params)
    (found,) = pull(weights)
    return _times(scales, blocks.widen(found))


@functools.partial(jax.jit, static_argnums=0)
def _applied(model_fn, params, scales, inputs, roots, vector):
    """The products of rows with a vector, shape (n, c)."""
    vector = _times(scales, vector)
    vector = jax.tree.map(lambda v, p: v.astype(p.dtype), vector, params)
    _, found = jax.jvp(
        lambda params: _outputs(model_fn, params, inputs, roots), (params,), (vector,)
    )
    return found


def _outputs(model_fn, params, inputs, roots):
    found = trees.widen(model_fn(params, inputs)).reshape(*roots.shape[:2])
    return jnp.einsum("ncd,nd->nc", roots, found, precision=blocks.PRECISION)


def _times(scales, tree):
    if scales is None:
        return tree
    return jax.tree.map(lambda s, x: s.astype(x.dtype) * x, scales, tree)


def _check_finite(values):
    if not np.isfinite(values).all():
        raise ValueError(
            "the Jacobian is not finite; look at the model's outputs and gradients first."
        )

"""A growing orthonormal basis of Lanczos vectors with the matrix projected on it.

Vectors stay trees on the device; the small projected matrix is solved on the host in
float64. Every new vector is orthogonalized twice against all earlier ones.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import blocks, checks, host, platforms, vectors
from flatopt._core.sharding import lay_out, placement_of
from flatopt._core.trees import is_traced
from flatopt.curvature._draws import draw_normal, probe_keys
from flatopt.curvature._operator import products
from flatopt.curvature._probes import GROUP, bringing, check_operator

ENDS = ("largest", "smallest", "magnitude")

DRAWS = 4  # random directions to try before the basis counts as the whole space
DEPENDENT = 1e-2  # of a normal vector of length 1 a dimension: its rest is rounding


@host.compiled
def _expand(basis, found):
    """A block of one in a basis: coefficients, the direction of the rest, its length.

    Coefficients and length are in units of a power of two, which comes last: squares of
    tiny and of huge products stay within float32.
    """
    unit = blocks.unit(found)
    rest, coefficients = blocks.row(blocks.divide(found, unit), 0), 0.0
    for _ in range(2):
        part = blocks.gram(blocks.single(rest), basis)[0]
        rest = blocks.subtract(rest, blocks.combine(part, basis))
        coefficients = coefficients + part
    square = vectors.dot(rest, rest)
    xp = host.namespace(square)
    length = xp.sqrt(square)
    rest = blocks.divide(rest, xp.where(length == 0, xp.ones_like(length), length))
    return coefficients, rest, length, unit


@functools.partial(host.compiled, static_argnums=0, donate_argnums=2)
def _append(placement, params, basis, index, direction):
    """The basis with one more direction, and that direction as a block of one."""
    basis = blocks.set_row(basis, index, direction)
    found = basis, blocks.single(direction)
    return tuple(lay_out(block, params, placement) for block in found)


@functools.partial(host.compiled, static_argnums=0)
def _combine(placement, params, coefficients, basis):
    return lay_out(blocks.combine(coefficients, basis), params, placement)


@functools.partial(host.compiled, donate_argnums=0)
def _keep(basis, rows):
    """A basis of some rows alone."""

    def kept(b, r):
        xp = host.namespace(b)
        return xp.concatenate([r.astype(b.dtype), xp.zeros_like(b[len(r) :])])

    return jax.tree.map(kept, basis, rows)


@host.compiled
def _split(block):
    count = len(jax.tree.leaves(block)[0])
    return [jax.tree.map(lambda x, i=i: x[i : i + 1], block) for i in range(count)]


@host.compiled
def _join(rows):
    return jax.tree.map(lambda *x: host.namespace(x[0]).concatenate(x), *rows)


class Krylov:
    """A growing orthonormal basis with the operator's projection on it.

    Vectors are where :func:`bringing` brings them: small ones on the host.
    """

    def __init__(self, operator, key, capacity):
        self.operator, self.key = operator, key
        self.bring = bringing(operator, key)
        self.is_on_host = self.bring is host.fetch
        self.place = placement_of(operator.like), operator.like
        xp = np if self.is_on_host else jnp
        self.basis = blocks.zeros(operator.like, capacity, xp)
        self.projection = np.zeros((capacity, capacity))
        self.size = self.used = 0
        self.draws = 0
        self.noise = noise_of(self.basis)

    def products(self, block):
        """Products with few vectors; on one batch by the code of a single one.

        They share no work then, but nothing is compiled for their number.
        """
        if self.operator.stream is not None:
            found = self.bring(products(self.operator, block))
            return self._checked(found)
        rows = [self.bring(products(self.operator, x)) for x in _split(block)]
        self._checked(rows)
        return rows[0] if len(rows) == 1 else _join(rows)

    def _checked(self, found):
        """Reject what the loss alone makes traced: the operator is not."""
        if is_traced(found):
            raise TypeError(
                "loss_fn must hold concrete arrays here, got one traced by jax.jit or "
                "jax.vmap; the Lanczos method decides on the host, so call it outside, or "
                "curvature.block_lanczos for eigenvalues."
            )
        return found

    def restart(self, rows, values):
        """Keep these orthonormal Ritz vectors alone."""
        count = len(values)
        self.basis = _keep(self.basis, rows)
        self.projection[:] = 0
        self.projection[:count, :count] = np.diag(values)
        self.size = count

    def rest_of(self, block):
        """The direction of a block of one beyond the basis, and its length."""
        _, rest, length, unit = _expand(self.basis, block)
        return rest, float(length) * float(unit)

    def random(self):
        """A random direction orthogonal to the basis."""
        for _ in range(DRAWS):
            self.draws += 1
            # Small ones by the code that draws for probes, of which one is used.
            count = GROUP if self.is_on_host else 1
            keys = probe_keys(self.key, self.draws, count)
            noise = self.bring(draw_normal(self.operator, keys))
            rest, length = self.rest_of(_split(noise)[0])
            if length > DEPENDENT:
                break
        return rest, length

    def step(self, rest):
        """Add a direction; return the next one, and its length."""
        index = self.size
        self.basis, block = _append(*self.place, self.basis, index, rest)
        found = self.products(block)
        coefficients, rest, length, unit = _expand(self.basis, found)
        unit = float(unit)
        coefficients = unit * np.asarray(coefficients, "f8")
        if not np.isfinite(coefficients).all():
            raise ValueError(
                "the curvature is not finite; look at the loss and its gradient at these "
                "parameters first."
            )
        self.size = index + 1
        self.used += 1
        self.projection[index, : self.size] = coefficients[: self.size]
        self.projection[: self.size, index] = coefficients[: self.size]
        return rest, unit * float(length)

    def ritz(self, which, length=0.0):
        """Ritz values from the wanted end inwards, coefficients, bounds of residuals."""
        size = self.size
        values, coefficients = np.linalg.eigh(self.projection[:size, :size])
        order = order_from(values, which)
        coefficients = coefficients[:, order]
        return values[order], coefficients, length * np.abs(coefficients[-1])

    def rows(self, coefficients):
        """Combinations of the basis, from columns of coefficients."""
        padded = np.zeros((coefficients.shape[1], len(self.projection)))
        padded[:, : self.size] = coefficients.T
        dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
        coefficients = self.bring(jnp.asarray(padded, dtype))
        return _combine(*self.place, coefficients, self.basis)


def noise_of(basis):
    """Of a product what is less is noise, not a direction: some ten roundings."""
    dtypes = [x.dtype for x in jax.tree.leaves(basis)]
    return 8 * max(float(jnp.finfo(dtype).eps) for dtype in dtypes)


def check_host(operator, key, advice):
    """Reject a call inside of jax.jit or jax.vmap."""
    if platforms.is_staged() or is_traced((operator, key)):
        raise TypeError(
            "operator and key must be concrete arrays, got a call inside jax.jit or "
            f"jax.vmap; the Lanczos method decides on the host, so {advice}."
        )


def check_eigen(operator, key, k, which):
    check_operator(operator)
    checks.check_random_key(key)
    checks.check_count(k, "k")
    size = blocks.size(operator.like)
    if k > size:
        raise ValueError(
            f"k must be at most the number of parameters, {size}, got {k}; ask for fewer."
        )
    if which not in ENDS:
        raise ValueError(
            f"which must be one of {', '.join(map(repr, ENDS))}, got {which!r}."
        )
    return size


def order_from(values, which):
    if which == "largest":
        return np.argsort(-values)
    return np.argsort(values if which == "smallest" else -np.abs(values))

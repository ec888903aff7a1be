"""Planes in the space of parameters: their directions, and a path projected on them.

In float64 on the host, leaf by leaf: a path is few vectors.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flatopt._core import checks, trees

PARALLEL = 1e-6  # the sine of an angle, or a share of a length, that is rounding


class Plane(NamedTuple):
    """Two directions, and a path in their plane if there is one.

    Attributes:
      directions: a tree like the parameters with a leading axis of 2.
      path: shape (steps, 2), in units of the directions; None: no path.
      shares: of the variance of the path, along the first direction, and what the second
        adds to it.
    """

    directions: Any
    path: np.ndarray | None = None
    shares: np.ndarray | None = None


def plane_of(params, directions, trajectory):
    """The plane of given directions, or that in which a path varies most."""
    if trajectory is not None:
        path = _matrices(trajectory, params, "trajectory")
        centered = [x - x.mean(axis=0) for x in path]
    if directions is None:
        rows = _principal(centered)
    else:
        rows = _matrices(directions, params, "directions")
        _check_two(rows)
    leaves, treedef = jax.tree.flatten(params)
    plane = Plane(
        treedef.unflatten(
            [
                jnp.asarray(x.reshape(2, *p.shape), trees.wide(p.dtype))
                for x, p in zip(rows, leaves, strict=True)
            ]
        )
    )
    if trajectory is None:
        return plane
    origin = [np.asarray(p, "f8").reshape(1, -1) for p in leaves]
    steps = [x - p for x, p in zip(path, origin, strict=True)]
    gram, lengths = _gram(rows, rows), _gram(centered, centered).trace()
    if not lengths > 0:
        raise ValueError(
            f"trajectory must move, got {len(path[0])} times the same parameters; give "
            "those of several steps of training."
        )
    along = np.linalg.solve(np.linalg.cholesky(gram), _gram(rows, centered))
    return plane._replace(
        path=np.linalg.solve(gram, _gram(rows, steps)).T,
        shares=(along**2).sum(axis=1) / lengths,
    )


def _gram(rows, others):
    return sum(x @ y.T for x, y in zip(rows, others, strict=True))


def _principal(centered):
    """The two principal directions of a path, of length 1; the largest step is positive."""
    squares, left = np.linalg.eigh(_gram(centered, centered))
    if len(squares) < 3 or squares[-2] <= PARALLEL**2 * squares[-1]:
        raise ValueError(
            f"trajectory must span a plane, got {len(squares)} points on a line; give three "
            "that lie on none, or directions."
        )
    left = left[:, [-1, -2]]
    largest = left[np.abs(left).argmax(axis=0), [0, 1]]
    left = left * np.sign(largest) / np.sqrt(squares[[-1, -2]])
    return [left.T @ x for x in centered]


def _check_two(rows):
    if len(rows[0]) != 2:
        raise ValueError(
            f"directions must be two, got {len(rows[0])}; take the first two of a leading "
            "axis by jax.tree.map(lambda x: x[:2], directions)."
        )
    gram = _gram(rows, rows)
    sizes = np.sqrt(gram.diagonal())
    if not sizes.all() or np.linalg.det(gram / np.outer(sizes, sizes)) < PARALLEL**2:
        raise ValueError(
            f"directions must span a plane, got lengths {sizes[0]:.3g} and {sizes[1]:.3g} "
            "on one line; give two that are not parallel."
        )


def _matrices(given, params, name):
    """A tree with a leading axis, or a list of trees, as one matrix a leaf."""
    found = _leaves(given, params, 1)
    if found is None and isinstance(given, list | tuple):
        each = [_leaves(tree, params, 0) for tree in given]
        if each and all(leaves is not None for leaves in each):
            found = [np.stack(rows) for rows in zip(*each, strict=True)]
    if found is None:
        got = "Eigenpairs" if hasattr(given, "residuals") else checks.described(given)
        advice = (
            "write directions=pairs.vectors"
            if hasattr(given, "residuals")
            else "write jax.tree.map(lambda *x: jnp.stack(x), first, second)"
        )
        raise ValueError(
            f"{name} must be trees of the shapes of params, in a list or stacked along a "
            f"leading axis, got {got}; {advice}."
        )
    if not all(np.isfinite(x).all() for x in found):
        raise ValueError(
            f"{name} must be finite, got numbers that are not; leave out what came after "
            "the training diverged."
        )
    return [x.reshape(len(x), -1) for x in found]


def _leaves(given, params, num_axes):
    """Leaves in float64, of the shapes of the parameters behind some axes; else None.

    None in place of a leaf, as in the eigenvectors of a part, stands for zeros.
    """
    try:
        leaves = jax.tree.structure(params).flatten_up_to(given)
    except (ValueError, TypeError):
        return None
    arrays = [x for x in leaves if x is not None]
    if not arrays or not all(map(_is_real, arrays)):
        return None
    lead = jnp.shape(arrays[0])[:num_axes]
    shapes = [(*lead, *jnp.shape(p)) for p in jax.tree.leaves(params)]
    pairs = list(zip(leaves, shapes, strict=True))
    if len(lead) < num_axes or any(
        x is not None and jnp.shape(x) != shape for x, shape in pairs
    ):
        return None
    return [np.zeros(s) if x is None else np.asarray(x, "f8") for x, s in pairs]


def _is_real(leaf):
    return checks.is_numeric(leaf) and not jnp.issubdtype(
        jnp.result_type(leaf), jnp.complexfloating
    )

"""Training steps to compare: ``step(key, params, state, batch) -> (params, state)``.

Every contender makes a whole step of SGD with momentum; they differ in the gradient.
"""

import jax
import jax.numpy as jnp
import optax

import flatopt
from flatopt import kernels

LEARNING_RATE, SCALE, RADIUS = 0.01, 5e-4, 0.05
BATCH = ("inputs", "labels")


def no_noise(key, params):
    """A kernel of zeros, which XLA removes: the chunks alone, the floor."""
    del key
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)


def copy(key, params):
    """A kernel of one random number: the price of writing perturbed parameters."""
    size = jax.random.uniform(key)
    return jax.tree.map(lambda leaf: size * leaf.astype(jnp.float32), params)


KERNELS = {
    "no noise": no_noise,
    "copy": copy,
    "signs": kernels.filterwise(kernels.signs),
    "shared": kernels.shared_magnitude(kernels.filterwise()),
    "normal": kernels.filterwise(),
    "jax.random.normal": kernels.filterwise(jax.random.normal),
}


def _sgd():
    return optax.sgd(LEARNING_RATE, momentum=0.9)


def plain(problem):
    """One gradient of the whole batch."""
    tx = _sgd()

    def step(key, params, state, batch):
        del key
        grads = jax.grad(problem.value_fn)(params, **batch)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state

    return tx, step


def lpf(kernel, strategy, num_samples=8):
    """LPF-SGD: the batch in chunks, each at its own noise."""
    options = {"num_samples": num_samples, "batch_argnames": BATCH}
    return _smoothed(KERNELS[kernel], strategy, **options)


def nso(sampler):
    """NSO: one pair of gradients of the whole batch."""
    return _smoothed(kernels.isotropic(sampler), "auto", antithetic=True)


def _smoothed(kernel, strategy, **options):
    def make(problem):
        tx = _sgd()

        def step(key, params, state, batch):
            f = flatopt.smooth_value_and_grad(
                problem.value_fn, SCALE, kernel, strategy=strategy, **options
            )
            _, grads = f(key, params, **batch)
            updates, state = tx.update(grads, state)
            return optax.apply_updates(params, updates), state

        return tx, step

    return make


def optax_sam(problem):
    """SAM as optax has it, in opaque mode."""
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RADIUS))
    tx = optax.contrib.sam(_sgd(), ascent, opaque_mode=True, reset_state=False)

    def step(key, params, state, batch):
        del key
        gradient = jax.grad(problem.value_fn)
        updates, state = tx.update(
            gradient(params, **batch),
            state,
            params,
            grad_fn=lambda params, _: gradient(params, **batch),
        )
        return optax.apply_updates(params, updates), state

    return tx, step


def sam(problem):
    """SAM as flatopt has it."""
    return whole(optax.chain(flatopt.sam_gradients(RADIUS), _sgd()), problem)


def whole(tx, problem):
    """An optimizer that takes the loss itself."""

    def step(key, params, state, batch):
        del key
        updates, state = tx.update(
            None, state, params, value_fn=problem.value_fn, **batch
        )
        return optax.apply_updates(params, updates), state

    return tx, step


def look_sam(count):
    """LookSAM's step number ``count``; of five, the first looks and the others do not."""

    def make(problem):
        link = flatopt.look_sam_gradients(RADIUS, every=5)
        tx = optax.chain(link, _sgd())

        def init(params):
            state, *rest = tx.init(params)
            memory = jax.tree.map(jnp.ones_like, state.memory)
            return (state._replace(count=jnp.int32(count), memory=memory), *rest)

        def step(key, params, state, batch):
            del key
            updates, state = tx.update(
                None, state, params, value_fn=problem.value_fn, **batch
            )
            return optax.apply_updates(params, updates), state

        return tx._replace(init=init), step

    return make

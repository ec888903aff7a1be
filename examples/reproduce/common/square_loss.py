"""Models of digits with square loss, SGD on them, and how it leaves a minimum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flatopt import stability

from .data import regression_digits

NOISES = ("SGD", "gradient descent", "isotropic noise")


def dense(key, *shape, fan_in=None):
    return jax.random.normal(key, shape) / (fan_in or shape[0]) ** 0.5


def init_linear(key, num_inputs, num_outputs):
    return {"output": dense(key, num_inputs, num_outputs)}


def linear(params, inputs):
    return inputs @ params["output"]


def init_mlp(key, hidden, num_outputs, scale=1.0):
    keys = jax.random.split(key)
    return {
        "hidden": scale * 2**0.5 * dense(keys[0], 64, hidden),
        "bias": jnp.zeros((1, hidden)),
        "output": scale * dense(keys[1], hidden, num_outputs),
    }


def mlp(params, inputs):
    hidden = jax.nn.relu(inputs @ params["hidden"] + params["bias"])
    return hidden @ params["output"]


def smooth_mlp(params, inputs):
    """The network of the escapes: smooth, so that the linear model holds for long."""
    hidden = jnp.tanh(inputs @ params["hidden"] + params["bias"])
    return hidden @ params["output"]


def init_cnn(key, num_outputs):
    keys = jax.random.split(key, 3)
    return {
        "first": 2**0.5 * dense(keys[0], 3, 3, 1, 8, fan_in=9),
        "second": 2**0.5 * dense(keys[1], 3, 3, 8, 16, fan_in=72),
        "output": dense(keys[2], 64, num_outputs),
    }


def cnn(params, inputs):
    hidden = inputs.reshape(-1, 8, 8, 1)
    for name in ("first", "second"):
        hidden = jax.lax.conv_general_dilated(
            hidden,
            params[name],
            (2, 2),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        hidden = jax.nn.relu(hidden)
    return hidden.reshape(len(inputs), -1) @ params["output"]


def square_loss(model_fn, params, inputs, targets):
    """The papers' convention: half the squared error, mean over examples."""
    return jnp.sum((model_fn(params, inputs) - targets) ** 2) / (2 * len(inputs))


def draw_batch(key, num_examples, batch_size, replace):
    if replace:
        return jax.random.randint(key, (batch_size,), 0, num_examples)
    if batch_size == num_examples:
        return jnp.arange(num_examples)
    return jax.lax.top_k(jax.random.uniform(key, (num_examples,)), batch_size)[1]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def sgd_step(model_fn, batch_size, replace, params, key, rate, inputs, targets):
    chosen = draw_batch(key, len(inputs), batch_size, replace)
    loss_fn = functools.partial(square_loss, model_fn)
    grads = jax.grad(loss_fn)(params, inputs[chosen], targets[chosen])
    return jax.tree.map(lambda p, g: p - rate * g, params, grads)


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def train_runs(batch_size, replace, num_steps, warm_up, params, keys, rates, data):
    """Networks trained side by side from stacked parameters and data, and their losses."""

    def run(params, key, rate, data):
        def body(params, moment):
            step, key = moment
            now = rate * jnp.minimum(1, (step + 1) / warm_up)
            return sgd_step(mlp, batch_size, replace, params, key, now, *data), None

        moments = jnp.arange(num_steps), jax.random.split(key, num_steps)
        params, _ = jax.lax.scan(body, params, moments)
        return params, square_loss(mlp, params, *data)

    return jax.vmap(run)(params, keys, rates, data)


def sharp_starts(config, num_outputs, batch_size, replace):
    """Train from sharp starts: a run for each learning rate and seed, as (settings, params).

    The learning rate warms up to its value over the first quarter.
    """
    settings = [(r, s) for r in config.learning_rates for s in range(config.num_seeds)]
    starts, data = [], []
    for _, seed in settings:
        key = jax.random.key(seed)
        starts.append(init_mlp(key, config.hidden, num_outputs, config.init_scale))
        data.append(regression_digits(seed, config.num_images, num_outputs))
    keys = jnp.stack([jax.random.key(1000 + seed) for _, seed in settings])
    rates = jnp.array([rate for rate, _ in settings])
    params, losses = train_runs(
        batch_size,
        replace,
        config.num_steps,
        config.num_steps // 4,
        stack(starts),
        keys,
        rates,
        stack(data),
    )
    found = []
    for index, (rate, seed) in enumerate(settings):
        loss = float(losses[index])
        _, targets = data[index]
        constant = float(jnp.sum((targets - targets.mean(0)) ** 2) / (2 * len(targets)))
        row = {"learning_rate": rate, "batch_size": batch_size, "seed": seed}
        row.update(loss=loss, outcome=outcome(loss, constant))
        found.append((row, jax.tree.map(lambda x, i=index: x[i], params)))
    return found


def outcome(loss, constant):
    """What became of a run: only minima that fit their data are compared with theory."""
    if not np.isfinite(loss) or loss > 10 * constant:
        return "diverged"
    if loss > 0.5 * constant:
        return "collapsed"
    return "minimum" if loss <= 0.01 * constant else "unfinished"


def displace(params, key, scale):
    """Parameters moved by Gaussian noise of that standard deviation."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten(
        [
            leaf + scale * jax.random.normal(k, leaf.shape)
            for leaf, k in zip(leaves, keys, strict=True)
        ]
    )


def near_alignment(model_fn, params, inputs, targets):
    """The alignment a little away from the minimum, mean of random displacements."""
    found = []
    for seed in range(4):
        moved = displace(params, jax.random.key(seed), 1e-3)
        lin = stability.linearize(model_fn, moved, inputs, targets)
        found.append(float(stability.alignment(lin).mu))
    return float(np.mean(found))


def mean_alignment(lin, residuals):
    """The alignment at the points of some runs, each weighing as its loss."""
    found, weights = [], []
    for errors in residuals[:128]:
        weights.append(float(jnp.sum(errors**2)))
        found.append(float(stability.alignment(lin._replace(residuals=errors)).mu))
    return np.average(found, weights=weights)


@functools.partial(jax.jit, static_argnums=(0, 1))
def fit(num_steps, momentum, params, rate, inputs, targets):
    """Gradient descent with momentum to a minimum."""

    def body(carry, _):
        params, trace = carry
        grads = jax.grad(square_loss, argnums=1)(smooth_mlp, params, inputs, targets)
        trace = jax.tree.map(lambda t, g: momentum * t + g, trace, grads)
        return (jax.tree.map(lambda p, t: p - rate * t, params, trace), trace), None

    start = params, optax.tree.zeros_like(params)
    return jax.lax.scan(body, start, None, length=num_steps)[0][0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def leave(noise, num_steps, num_runs, snapshot, params, key, rate, start_scale, data):
    """Losses of runs from displaced parameters, shape (num_runs, num_steps + 1).

    Also the residuals at step ``snapshot``. SGD draws one example a step.

    Isotropic noise has at each step the trace of the noise of SGD's batch at the same
    point, spread evenly over all parameters.
    """
    inputs, targets = data

    def step_gradient(params, key):
        if noise == "SGD":
            chosen = draw_batch(key, len(inputs), 1, False)
            return jax.grad(square_loss, argnums=1)(
                smooth_mlp, params, inputs[chosen], targets[chosen]
            )
        if noise == "gradient descent":
            return jax.grad(square_loss, argnums=1)(smooth_mlp, params, inputs, targets)
        grads, spread = gradient_and_spread(params, inputs, targets)
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        return displace(grads, key, jnp.sqrt(spread / size))

    def run(key):
        start_key, key = jax.random.split(key)

        def body(carry, moment):
            params, kept = carry
            step, key = moment
            residuals = smooth_mlp(params, inputs) - targets
            kept = jnp.where(step == snapshot, residuals, kept)
            grads = step_gradient(params, key)
            params = jax.tree.map(lambda x, g: x - rate * g, params, grads)
            return (params, kept), jnp.sum(residuals**2) / (2 * len(inputs))

        start = displace(params, start_key, start_scale), jnp.zeros_like(targets)
        moments = jnp.arange(num_steps + 1), jax.random.split(key, num_steps + 1)
        (_, kept), losses = jax.lax.scan(body, start, moments)
        return losses, kept

    return jax.lax.map(run, jax.random.split(key, num_runs), batch_size=16)


def gradient_and_spread(params, inputs, targets):
    """The gradient, and the trace of the covariance of the examples' gradients."""

    def of_one(x, y):
        return jax.grad(square_loss, argnums=1)(smooth_mlp, params, x[None], y[None])

    each = jax.vmap(of_one)(inputs, targets)
    mean = jax.tree.map(lambda x: x.mean(axis=0), each)
    pairs = zip(jax.tree.leaves(each), jax.tree.leaves(mean), strict=True)
    return mean, sum(jnp.sum((x - m) ** 2) for x, m in pairs) / len(inputs)

"""Networks of digits that are all trained to the same training loss, side by side."""

import functools

import jax
import jax.numpy as jnp
import optax

BLOCKS = 2


def init(key, width, active, norm):
    """Parameters of a network with ``width`` units a layer, the first ``active`` in use.

    The others are zero, and stay zero in training: networks of many widths are one program.
    """
    keys = jax.random.split(key, BLOCKS + 2)
    used = (jnp.arange(width) < active).astype(jnp.float32)

    def dense(key, num_inputs, rows, columns):
        kernel = jax.random.normal(key, (len(rows), len(columns)))
        kernel *= (2 / num_inputs) ** 0.5 * jnp.outer(rows, columns)
        return {"kernel": kernel, "bias": jnp.zeros(len(columns))}

    params = {
        "first": dense(keys[0], 64, jnp.ones(64), used),
        "output": dense(keys[1], active, used, jnp.ones(10)),
    }
    for index, block_key in enumerate(keys[2:]):
        params[f"block {index}"] = dense(block_key, active, used, used)
    if norm:
        for index in range(BLOCKS + 1):
            params[f"norm {index}"] = {"scale": used, "bias": jnp.zeros(width)}
    return params


def apply(params, images, skip):
    """Logits of a network of dense layers, with or without skips and layer norms."""

    def layer(index, name, x):
        x = dense(name, x)
        if (norm := params.get(f"norm {index}")) is not None:
            x = jax.nn.standardize(x, epsilon=1e-5) * norm["scale"] + norm["bias"]
        return jax.nn.relu(x)

    def dense(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"]

    x = layer(0, "first", images)
    for index in range(BLOCKS):
        y = layer(index + 1, f"block {index}", x)
        x = x + y if skip else y
    return dense("output", x)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Functions:
    """The functions of networks with or without skips.

    The measures are taken of normalized parameters. Their units, the sizes of the filters,
    come with the data, once an example: networks of one shape are then measured by one
    program, where units in the loss itself would compile it again for each network.
    """

    def __init__(self, skip):
        self.skip = skip

    def model_fn(self, params, images):
        return apply(params, images, self.skip)

    def loss_fn(self, params, batch):
        images, labels = batch
        return cross_entropy(self.model_fn(params, images), labels)

    def normalized_loss_fn(self, normalized, batch):
        units, images, labels = batch
        params = jax.tree.map(lambda p, u: p * u[0], normalized, units)
        return self.loss_fn(params, (images, labels))

    def accuracy(self, params, images, labels):
        return (self.model_fn(params, images).argmax(axis=-1) == labels).mean()

    @functools.partial(jax.jit, static_argnums=(0, 1, 2))
    def train(self, shape, epochs, target, settings, data, test):
        """Train the networks of all settings, each on data of its own, side by side."""
        one = functools.partial(self.train_one, shape, epochs, target)
        return jax.vmap(one, in_axes=(0, 0, None))(settings, data, test)

    def train_one(self, shape, epochs, target, setting, data, test):
        """Train to the target loss, or to the end; return the network of that moment."""
        width, norm, batch_size = shape
        images, labels = data
        key = jax.random.key(setting["seed"])
        start = init(key, width, setting["width"], norm)
        momentum = setting["momentum"]
        tx = optax.chain(
            optax.add_decayed_weights(setting["weight_decay"]),
            optax.sgd(setting["learning_rate"] * (1 - momentum), momentum),
        )

        def batches(number):
            order = jax.random.permutation(jax.random.fold_in(key, number), len(labels))
            return order.reshape(-1, batch_size)

        def step(carry, chosen):
            params, state = carry
            grads = jax.grad(self.loss_fn)(params, (images[chosen], labels[chosen]))
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        def going(carry):
            (params, _), _, number = carry
            return (number <= epochs) & (self.loss_fn(params, data) > target)

        def epoch(carry):
            now, _, number = carry
            return jax.lax.scan(step, now, batches(number))[0], now, number + 1

        now = start, tx.init(start)
        now, before, number = jax.lax.while_loop(going, epoch, (now, now, jnp.int32(1)))
        reached = jnp.where(self.loss_fn(now[0], data) <= target, number - 1, 0)

        def search(carry, chosen):
            """The step of that epoch which passes the target, as two iterates."""
            now, ends, passed = carry
            after, _ = step(now, chosen)
            ends = where(passed, ends, (now[0], after[0]))
            return (
                after,
                ends,
                passed | (self.loss_fn(after[0], data) <= target),
            ), None

        carry = before, (before[0], before[0]), jnp.bool_(False)
        (_, ends, _), _ = jax.lax.scan(search, carry, batches(reached))
        params = where(reached == 0, now[0], self.between(*ends, data, target))
        return {
            "params": params,
            "start": start,
            "epoch": reached,
            "loss": self.loss_fn(params, data),
            "train_accuracy": self.accuracy(params, *data),
            "test_accuracy": self.accuracy(params, *test),
        }

    def between(self, before, after, data, target):
        """The point between two iterates whose loss is the target, by bisection."""

        def at(share):
            return optax.tree.add_scale(before, share, optax.tree.sub(after, before))

        def halve(_, ends):
            low, high = ends
            middle = (low + high) / 2
            above = self.loss_fn(at(middle), data) > target
            return jnp.where(above, middle, low), jnp.where(above, high, middle)

        return at(jax.lax.fori_loop(0, 20, halve, (0.0, 1.0))[1])


def where(condition, tree, other):
    return jax.tree.map(functools.partial(jnp.where, condition), tree, other)


FUNCTIONS = {skip: Functions(skip) for skip in (False, True)}

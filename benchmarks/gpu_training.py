"""Twelve epochs of ResNet-18 on CIFAR-10: all images on the device, an epoch in one call."""

import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import flatopt
import flatopt.flax
from benchmarks.gpu import sentence

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))
import cifar10_data  # noqa: E402
import resnet  # noqa: E402

BATCH_SIZE, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 256, 0.1, 0.9, 5e-4
METHODS = {"SGD": 1, "LPF-SGD": 1, "SAM": 2, "NSO": 2}  # gradients of the batch a step
MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)


def make_transformation(method, num_steps):
    """The settings of ``examples/cifar10.py``, with a warm-up."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0, LEARNING_RATE, num_steps // 12, num_steps
    )
    options = {"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
    if method == "SAM":
        return flatopt.sam_sgd(rate, 0.05, **options)
    if method == "LPF-SGD":
        gamma = flatopt.schedules.cosine_growth(5e-4, 15.0, num_steps)
        return flatopt.lpf_sgd(rate, gamma, 8, key=0, **options)
    if method == "NSO":
        return flatopt.nso_sgd(rate, 0.01, key=0, **options)
    return optax.chain(
        optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(rate, MOMENTUM)
    )


def loss_fn(model, batch):
    images = (batch["images"] / 255.0 - jnp.array(MEAN)) / jnp.array(STD)
    return optax.softmax_cross_entropy_with_integer_labels(
        model(images), batch["labels"]
    ).mean()


def augment(key, images):
    """Crop at random from images padded by 4 pixels and mirror half of them."""
    places, mirror = jax.random.split(key)
    corners = jax.random.randint(places, (len(images), 2), 0, 9)
    mirrored = jax.random.bernoulli(mirror, shape=(len(images),))
    padded = jnp.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))

    def crop(image, corner, is_mirrored):
        part = jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:])
        return jnp.where(is_mirrored, part[:, ::-1], part)

    return jax.vmap(crop)(padded, corners, mirrored)


def make_epoch(method, graphdef, batch_size):
    """A function of state, images and key: one pass over the images in random order."""

    def step(state, batch):
        model, optimizer = nnx.merge(graphdef, state)
        if method == "SGD":
            loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
            optimizer.update(model, grads)
        else:
            loss = flatopt.flax.update(optimizer, model, loss_fn, batch=batch)
        return nnx.state((model, optimizer)), loss

    def epoch(state, data, key):
        count = len(data["labels"]) // batch_size
        shuffle, crops = jax.random.split(key)
        order = jax.random.permutation(shuffle, len(data["labels"]))
        order = order[: count * batch_size].reshape(count, batch_size)

        def one(state, row):
            chosen, key = row
            images = augment(key, data["images"][chosen])
            batch = {"images": images, "labels": data["labels"][chosen]}
            return step(state, batch)

        state, losses = jax.lax.scan(
            one, state, (order, jax.random.split(crops, count))
        )
        return state, losses.mean()

    return jax.jit(epoch, donate_argnums=0)


def make_accuracy(graphdef, batch_size):
    """A function of state and images: the share of hits, with running statistics."""

    def accuracy(state, data):
        model = nnx.view(nnx.merge(graphdef, state)[0], use_running_average=True)
        count = len(data["labels"]) // batch_size

        def hits(start):
            part = jax.tree.map(
                lambda x: jax.lax.dynamic_slice_in_dim(x, start, batch_size), data
            )
            images = (part["images"] / 255.0 - jnp.array(MEAN)) / jnp.array(STD)
            return jnp.sum(model(images).argmax(axis=-1) == part["labels"])

        starts = jnp.arange(count) * batch_size
        return jnp.sum(jax.lax.map(hits, starts)) / (count * batch_size)

    return jax.jit(accuracy)


def train_method(method, data, arguments, until):
    """Train from the start; yield the figures after every epoch."""
    smoke = arguments.smoke
    batch_size = 32 if smoke else BATCH_SIZE
    test_size = 16 if smoke else 1000
    num_steps = arguments.epochs * (len(data["train"]["labels"]) // batch_size)
    width, blocks = (8, (1, 1)) if smoke else (64, (2, 2, 2, 2))
    make = lambda: resnet.ResNet(width, blocks, jnp.bfloat16, nnx.Rngs(0))  # noqa: E731
    model = nnx.jit(make)()
    tx = make_transformation(method, num_steps)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    graphdef, state = nnx.split((model, optimizer))
    begin = time.perf_counter()
    key = jax.random.key(0)
    epoch = make_epoch(method, graphdef, batch_size)
    epoch = epoch.lower(state, data["train"], key).compile()
    accuracy = make_accuracy(graphdef, test_size)
    accuracy = accuracy.lower(state, data["test"]).compile()
    figures = {"gradients_a_step": METHODS[method], "accuracies": [], "losses": []}
    figures |= {"compile_seconds": time.perf_counter() - begin, "epoch_seconds": []}
    for index in range(arguments.epochs):
        if time.time() > until:
            figures["error"] = f"no time was left after {index} epochs"
            break
        begin = time.perf_counter()
        state, loss = epoch(state, data["train"], jax.random.fold_in(key, index))
        figures["losses"].append(float(loss))
        figures["epoch_seconds"].append(time.perf_counter() - begin)
        figures["accuracies"].append(float(accuracy(state, data["test"])))
        print(f"{method}: {figures['accuracies'][-1]:.4f}", file=sys.stderr, flush=True)
        yield figures
    yield figures


def train(arguments, report):
    """Train by every method, each within its part of the time that is left."""
    count = (128, 32) if arguments.smoke else (None, None)
    data = jax.device_put(cifar10_data.load(arguments.data_dir, *count))
    found = {
        "num_train": len(data["train"]["labels"]),
        "num_test": len(data["test"]["labels"]),
        "batch_size": BATCH_SIZE,
        "epochs": arguments.epochs,
        "methods": {},
    }
    methods = arguments.methods or list(METHODS)
    for i, method in enumerate(methods):
        # Each gets its part of what is left, so that later ones take what others spare.
        share = METHODS[method] / sum(METHODS[name] for name in methods[i:])
        until = time.time() + share * (arguments.until - time.time())
        try:
            for figures in train_method(method, data, arguments, until):
                found["methods"][method] = figures
                report(found)
        except Exception as error:  # the other methods go on
            found["methods"][method] = {"error": sentence(error)}
            report(found)

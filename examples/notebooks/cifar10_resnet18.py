# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V28
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: accelerator,colab,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # CIFAR-10 with ResNet-18 on a TPU: LPF-SGD, NSO, SAM side by side
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/flatopt/flatopt/blob/main/examples/notebooks/cifar10_resnet18.ipynb)
#
# Trains a ResNet-18 on CIFAR-10 by plain SGD, SAM, LPF-SGD and NSO, each with the same number
# of gradients, with the batch split over all devices. The same job as a command, with
# checkpoints, resuming and TensorBoard, is `examples/cifar10.py`.

# %%
import importlib.util

# From the repository. A release is on the index too: %pip install "flatopt[examples]".
if importlib.util.find_spec("flatopt") is None:
    # %pip install -q "flatopt[examples] @ git+https://github.com/flatopt/flatopt"
    pass

# %%
import io
import os
import pathlib

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tqdm.auto import tqdm

import flatopt
import flatopt.flax

SMOKE = os.environ.get("FLATOPT_SMOKE") == "1"  # tiny sizes, to test the notebook
print(jax.devices())

# %% [markdown]
# ## Settings
#
# 30 epochs of full size are a matter of minutes for each method on a TPU; on a CPU it would be
# days. Set `DATA_DIR` to a folder with the binary files of CIFAR-10 or with parquet files, or
# leave it at `None` to get the data from `tensorflow_datasets` or `datasets`.

# %%
DATA_DIR = os.environ.get("FLATOPT_CIFAR10")  # @param {type:"string"}
EPOCHS = 1 if SMOKE else 30  # @param {type:"integer"}
BATCH_SIZE = 32 if SMOKE else 256  # @param {type:"integer"}
LEARNING_RATE = 0.1  # @param {type:"number"}
WEIGHT_DECAY = 5e-4  # @param {type:"number"}
WIDTH, BLOCKS = (4, (1, 1)) if SMOKE else (64, (2, 2, 2, 2))
DTYPE = jnp.bfloat16 if jax.default_backend() == "tpu" else jnp.float32
NUM_TRAIN, NUM_TEST = (64, 32) if SMOKE else (50_000, 10_000)

# %% [markdown]
# ## The data
#
# The readers are those of `examples/cifar10_data.py`.


# %%
def concatenate(paths, read_file, limit):
    """Read files one after another until there are ``limit`` images."""
    parts, missing = [], limit
    for path in paths:
        parts.append(read_file(path, missing))
        if limit is not None:
            missing -= len(parts[-1][1])
            if missing <= 0:
                break
    images, labels = (np.concatenate(x) for x in zip(*parts, strict=True))
    return {"images": images, "labels": labels.astype(np.int32)}


def read_binary(path, limit):
    """One label byte and 3,072 bytes of red, green and blue for each image."""
    rows = np.fromfile(path, np.uint8).reshape(-1, 3073)[:limit]
    return channels_last(rows[:, 1:]), rows[:, 0]


def channels_last(rows):
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def read_parquet(path, limit):
    """Columns ``img``, or ``image``, with encoded images, and ``label``."""
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    column = "img" if "img" in file.schema_arrow.names else "image"
    images, labels = [], []
    for batch in file.iter_batches(1024, columns=[column, "label"]):
        rows = batch.to_pylist()
        if limit is not None:
            rows = rows[: limit - len(labels)]
        images += [decode(row[column]["bytes"]) for row in rows]
        labels += [row["label"] for row in rows]
        if len(labels) == limit:
            break
    return np.stack(images), np.array(labels)


def decode(encoded):
    import PIL.Image

    return np.asarray(PIL.Image.open(io.BytesIO(encoded)).convert("RGB"))


def read_tensorflow_datasets(split, limit):
    import tensorflow_datasets as tfds

    split = split if limit is None else f"{split}[:{limit}]"
    data = tfds.as_numpy(tfds.load("cifar10", split=split, batch_size=-1))
    return {"images": data["image"], "labels": data["label"].astype(np.int32)}


def read_datasets(split, limit):
    import datasets

    split = split if limit is None else f"{split}[:{limit}]"
    data = datasets.load_dataset("uoft-cs/cifar10", split=split)
    images = np.stack([np.asarray(image.convert("RGB")) for image in data["img"]])
    return {"images": images, "labels": np.array(data["label"], np.int32)}


# %%
def from_folder(folder):
    for train, test, read_file in (
        ("data_batch_[1-5].bin", "test_batch.bin", read_binary),
        ("*train*.parquet", "*test*.parquet", read_parquet),
    ):
        paths = {"train": sorted(folder.glob(train)), "test": sorted(folder.glob(test))}
        if all(paths.values()):
            return lambda split, limit: concatenate(paths[split], read_file, limit)
    raise FileNotFoundError(
        f"{folder} holds no CIFAR-10: set DATA_DIR to a folder of it."
    )


if DATA_DIR:
    read = from_folder(pathlib.Path(DATA_DIR))
elif importlib.util.find_spec("tensorflow_datasets"):
    read = read_tensorflow_datasets
else:
    read = read_datasets
data = {"train": read("train", NUM_TRAIN), "test": read("test", NUM_TEST)}
print({split: part["images"].shape for split, part in data.items()})

# %% [markdown]
# ## The model
#
# ResNet-18 in its form for small images: a 3 by 3 stem and no max-pooling, in Flax NNX. On
# a TPU it computes in bfloat16; the parameters stay in float32.


# %%
class Block(nnx.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs, outputs, stride, dtype, rngs):
        def conv(size, inputs, stride):
            return nnx.Conv(
                inputs,
                outputs,
                (size, size),
                stride,
                use_bias=False,
                dtype=dtype,
                rngs=rngs,
            )

        def norm():
            return nnx.BatchNorm(outputs, momentum=0.9, dtype=dtype, rngs=rngs)

        self.first, self.first_norm = conv(3, inputs, stride), norm()
        self.second, self.second_norm = conv(3, outputs, 1), norm()
        if stride == 1 and inputs == outputs:
            self.shortcut = nnx.identity
        else:
            self.shortcut = nnx.Sequential(conv(1, inputs, stride), norm())

    def __call__(self, x):
        y = nnx.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        return nnx.relu(self.shortcut(x) + y)


class ResNet(nnx.Module):
    """ResNet for images of 32 by 32: a 3 by 3 stem, no max-pooling."""

    def __init__(self, width, blocks, dtype, rngs):
        self.stem = nnx.Conv(3, width, (3, 3), use_bias=False, dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(width, momentum=0.9, dtype=dtype, rngs=rngs)
        layers, inputs = [], width
        for stage, count in enumerate(blocks):
            for index in range(count):
                stride = 2 if stage and not index else 1
                outputs = width * 2**stage
                layers.append(Block(inputs, outputs, stride, dtype, rngs))
                inputs = outputs
        self.layers = nnx.List(layers)
        self.head = nnx.Linear(inputs, 10, dtype=dtype, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.norm(self.stem(images)))
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(axis=(1, 2))).astype(jnp.float32)


MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)


def logits_of(model, images):
    return model((images / 255.0 - jnp.array(MEAN)) / jnp.array(STD))


def loss_fn(model, batch):
    return optax.softmax_cross_entropy_with_integer_labels(
        logits_of(model, batch["images"]), batch["labels"]
    ).mean()


# %% [markdown]
# ## Four methods
#
# - SAM climbs to the worst point nearby and takes the gradient there.
# - LPF-SGD splits the batch into 8 chunks, each with its own noise, proportional to the norms
#   of the filters. Its noise grows along training, as in the paper.
# - NSO takes gradients at $+U$ and $-U$ and averages them.
#
# SAM and NSO take two gradients a step, so they get half the epochs.

# %%
GRADIENTS_A_STEP = {"SGD": 1, "SAM": 2, "LPF-SGD": 1, "NSO": 2}


def make_transformation(method, num_steps):
    rate = optax.cosine_decay_schedule(LEARNING_RATE, num_steps)
    match method:
        case "SGD":
            decay = optax.add_decayed_weights(WEIGHT_DECAY)
            return optax.chain(decay, optax.sgd(rate, momentum=0.9))
        case "SAM":
            return flatopt.sam_sgd(rate, rho=0.05, weight_decay=WEIGHT_DECAY)
        case "LPF-SGD":
            gamma = flatopt.schedules.cosine_growth(5e-4, 15, num_steps)
            samples = 2 if SMOKE else 8
            return flatopt.lpf_sgd(rate, gamma, samples, weight_decay=WEIGHT_DECAY)
        case "NSO":
            return flatopt.nso_sgd(rate, sigma=0.01, weight_decay=WEIGHT_DECAY)


# %% [markdown]
# A step of plain SGD, and one that serves all methods of flatopt. `flatopt.flax.update` takes
# the loss itself. The running statistics of BatchNorm come from one more forward pass at the
# unperturbed parameters.


# %%
@nnx.jit
def plain_step(model, optimizer, batch):
    loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def flat_step(model, optimizer, batch):
    # Gradients at perturbed parameters; running statistics from one clean forward pass.
    return flatopt.flax.update(optimizer, model, loss_fn, batch=batch)


@nnx.jit
def evaluate_batch(model, batch):
    """Sums of losses and of hits; images of label -1 are padding."""
    logits, labels = logits_of(model, batch["images"]), batch["labels"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, abs(labels))
    hits = logits.argmax(axis=-1) == labels
    return jnp.sum(losses * (labels >= 0)), hits.sum()


# %% [markdown]
# ## Training on all devices
#
# The batch is split over the devices and the parameters are copied to each. Nothing else is
# needed: the noise is the same on every device, and JAX averages the gradients.


# %%
def augment(rng, images):
    """Crop at random from images padded by 4 pixels and mirror half of them."""
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    rows, columns = rng.integers(0, 9, (2, len(images), 1)) + np.arange(32)
    crops = padded[
        np.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]
    ]
    mirrored = rng.random(len(images)) < 0.5
    crops[mirrored] = crops[mirrored, :, ::-1]
    return crops


# %%
mesh = jax.make_mesh(
    (jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
)
split = NamedSharding(mesh, PartitionSpec("data"))
copied = NamedSharding(mesh, PartitionSpec())


def batches_of(part, rng=None):
    """Whole batches, in random order and augmented if there is a random generator."""
    count = len(part["labels"])
    order = np.arange(count) if rng is None else rng.permutation(count)
    for start in range(0, count - BATCH_SIZE + 1, BATCH_SIZE):
        chosen = order[start : start + BATCH_SIZE]
        images = part["images"][chosen]
        images = images if rng is None else augment(rng, images)
        yield jax.device_put(
            {"images": images, "labels": part["labels"][chosen]}, split
        )


def accuracy(model, part):
    view = nnx.view(model, use_running_average=True)
    hits = [evaluate_batch(view, batch)[1] for batch in batches_of(part)]
    return float(np.mean(jax.device_get(hits))) / BATCH_SIZE


def train(method):
    num_epochs = max(1, EPOCHS // GRADIENTS_A_STEP[method])
    num_steps = num_epochs * (len(data["train"]["labels"]) // BATCH_SIZE)
    model = nnx.jit(lambda: ResNet(WIDTH, BLOCKS, DTYPE, nnx.Rngs(0)))()
    transformation = make_transformation(method, num_steps)
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
    everything = model, optimizer
    nnx.update(everything, jax.device_put(nnx.state(everything), copied))
    step = plain_step if method == "SGD" else flat_step
    rng, curve = np.random.default_rng(0), []
    with tqdm(desc=method, total=num_steps) as progress:
        for epoch in range(1, num_epochs + 1):
            for batch in batches_of(data["train"], rng):
                loss = step(model, optimizer, batch)
                progress.update()
            curve.append((epoch, accuracy(model, data["test"])))
            progress.set_postfix(loss=f"{loss:.2f}", accuracy=f"{curve[-1][1]:.1%}")
    return model, curve


trained = {method: train(method) for method in GRADIENTS_A_STEP}

# %% [markdown]
# ## Accuracy and flatness
#
# The last column is the rise of the training loss when the parameters are moved by filter-wise
# noise of scale 0.05, on one batch, with its standard error.


# %%
@nnx.jit
def moved_loss(model, key, batch):
    """The loss after filter-wise noise of scale 0.05 has moved the parameters."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_of(params):
        return loss_fn(nnx.merge(graphdef, params, rest), batch)

    return flatopt.smooth(loss_of, 0.05, flatopt.kernels.filterwise())(key, params)


def rise_under_noise(model):
    view = nnx.view(model, use_running_average=True)
    batch = next(batches_of(data["train"]))
    keys = jax.random.split(jax.random.key(0), 4 if SMOKE else 32)
    rises = np.array([moved_loss(view, key, batch) for key in keys])
    rises -= float(nnx.jit(loss_fn)(view, batch))
    return rises.mean(), rises.std(ddof=1) / len(rises) ** 0.5


print(f"{'method':8} {'test accuracy %':>16} {'rise under noise':>18}")
for method, (model, curve) in trained.items():
    rise, error = rise_under_noise(model)
    noise = f"{rise:.3f} ± {error:.3f}"
    print(f"{method:8} {100 * curve[-1][1]:16.2f} {noise:>18}")

# %%
for method, (_, curve) in trained.items():
    epochs, accuracies = zip(*curve, strict=True)
    spent = np.array(epochs) * GRADIENTS_A_STEP[method]
    plt.plot(spent, accuracies, marker=".", label=method)
plt.xlabel("gradients spent, in epochs of SGD")
plt.ylabel("test accuracy")
plt.legend()
plt.show()

# %% [markdown]
# ## How to read it
#
# This is one seed and nobody tuned the settings: differences of half a percent in accuracy say
# nothing. Repeat with several seeds before you conclude, and tune the weight decay of plain SGD
# as carefully as the noise. A smaller rise under noise says that the minimum is flatter;
# whether that buys accuracy is a question for your own validation split. What it gave on a
# small and short version of CIFAR-10 stands on [a page of its
# own](https://flatopt.github.io/flatopt/reproduce/cifar10.html).

"""Job 8: the curvature of the whole data, from four kinds of loader."""

import jax
import jax.numpy as jnp
import numpy as np

from flatopt import curvature

SIZE, NUM_EXAMPLES = 8, 32


class Dataset:
    """Like those of PyTorch: a length, and one example at an index."""

    def __init__(self, inputs):
        self.inputs = inputs

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return self.inputs[index]


class Loader:
    """Like a DataLoader: iterated afresh at each pass."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        for start in range(0, len(self.dataset), SIZE):
            rows = [self.dataset[i] for i in range(start, start + SIZE)]
            yield np.stack(rows)


class Stream:
    """A generator with a start: what grain and tf.data give."""

    def __init__(self, inputs):
        self.inputs = inputs

    def __iter__(self):
        return iter(np.split(self.inputs, NUM_EXAMPLES // SIZE))


def loss_fn(params, batch):
    return jnp.mean((batch @ params) ** 2) / 2


def measure(params, data):
    """The largest eigenvalue and the trace of all data."""
    operator = curvature.hessian(loss_fn, params, data)
    top = curvature.eigenpairs(operator, jax.random.key(0))
    probe = curvature.probe(operator, jax.random.key(1), 8)
    return float(top.values[0]), float(probe.trace.value)


def main():
    inputs = np.random.default_rng(0).normal(size=(NUM_EXAMPLES, 3)).astype("f4")
    params = jnp.ones(3)
    loaders = {
        "one batch": jnp.asarray(inputs),
        "list of batches": np.split(inputs, NUM_EXAMPLES // SIZE),
        "data loader": Loader(Dataset(inputs)),
        "stream": Stream(inputs),
    }
    found = {name: measure(params, data) for name, data in loaders.items()}
    return {"found": found, "matrix": inputs.T @ inputs / NUM_EXAMPLES}


if __name__ == "__main__":
    print(main())

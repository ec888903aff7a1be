"""What does a small Transformer keep of a text when it learns another one?

The study of forgetting.py on texts: a character Transformer learns plays by AdamW, by AdamW
with an average of its weights, and by flat methods before AdamW, all with the same number
of gradients, counted by flatopt. Then plain AdamW goes on with the help texts of Python, at
five learning rates. Accuracy is the share of the next characters that are foretold.
"""

import dataclasses
import functools
import hashlib
import pathlib
from pydoc_data import topics

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rounding_text
from common import frontiers, language
from common.frontiers import Levels
from common.language import Method
from common.text import split
from flax import nnx
from rounding_text import ADAMW, METHODS

from flatopt import curvature

# The share by which a phase of SAM at the end of pre-training lowers forgetting in a
# language model of 1B parameters (abstract of arXiv 2605.02105).
PAPER = {"forgetting": 0.31}
LEVELS = Levels(np.linspace(0.3, 0.36, 61), learned=0.33, tolerance=0.005)
PLAIN = Method(language.plain)


@dataclasses.dataclass
class Config(common.Config):
    """Settings of the comparison."""

    data_dir: pathlib.Path | None = None
    """A folder with tinyshakespeare.txt. Default: Python's standard library as text."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods of the first training; AdamW must come first."""
    settings: int = 4
    """Number of settings that each method chooses from, spread over its grid."""
    seeds: int = 5
    """Number of final runs: start, batches and noise change, the texts stay."""
    pretraining: int = 600
    """Gradients of a batch."""
    train_characters: int = 200_000
    """Size of the text to train on."""
    new_characters: int = 20_000
    """Size of the second text, the library's help texts (pydoc_data)."""
    new_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
    """Learning rates of the second training."""
    new_steps: int = 80
    """Steps of plain AdamW on the second text."""
    points: int = 4
    """Points along the second training."""
    width: int = 32
    """Width of the Transformer."""
    blocks: int = 2
    """Number of its blocks."""
    length: int = 32
    """Characters of an example."""
    batch_size: int = 32
    """Examples of a batch; of the second training half of them."""
    windows: int = 256
    """Examples to measure an accuracy on."""


SMOKE = {
    "methods": (ADAMW,),
    "settings": 1,
    "seeds": 2,
    "pretraining": 4,
    "train_characters": 20_000,
    "new_rates": (1e-2,),
    "new_steps": 2,
    "points": 1,
    "width": 16,
    "blocks": 1,
    "length": 16,
    "batch_size": 8,
    "windows": 16,
}


class Training(frontiers.OneByOne, rounding_text.Training):
    """A network that learns one text, then another."""

    levels = LEVELS

    def __init__(self, config):
        folder = config.data_dir
        path = folder / "tinyshakespeare.txt" if folder else language.LIBRARY
        super().__init__(config, path)
        self.num_steps = config.pretraining
        helps = "\n".join(topics.topics.values()).encode("ascii", "replace")
        self.new_codes = np.frombuffer(helps, np.uint8)
        self.new_split = split(self.new_codes, config.new_characters)

    def settings(self, method):
        return method.settings[:: len(method.settings) // self.config.settings]

    def again(self, method, setting, seed, num_steps, name):
        """Accuracies before the second text and along it, and the curvature before it."""
        params, _ = self.train(method, num_steps, setting, seed)
        windows = [self.windows(texts[name]) for texts in (self.split, self.new_split)]
        old, new = self.learn(params, jax.random.key(seed), windows)
        return {
            "before": float(self.accuracy(params, windows[0])),
            "sharpness": float(self.relative_sharpness(params)),
            "old": np.asarray(old),
            "new": np.asarray(new),
        }

    @functools.partial(jax.jit, static_argnums=0)
    def accuracy(self, params, batch):
        logits = nnx.merge(self.graphdef, params)(batch[:, :-1])
        return (logits.argmax(axis=-1) == batch[:, 1:]).mean()

    @functools.partial(jax.jit, static_argnums=0)
    def learn(self, params, key, windows):
        """Accuracies on both texts along plain AdamW, shape (rates, points) each."""
        config, codes = self.config, self.new_split["train"]

        def of_rate(rate):
            setting = {"learning_rate": rate, "weight_decay": jnp.float32(0.01)}
            tx = self.optimizer(PLAIN, setting, config.new_steps, key)

            def body(carry, key):
                size = config.batch_size // 2
                starts = jax.random.randint(key, (size,), 0, len(codes) - config.length)
                batch = codes[starts[:, None] + jnp.arange(config.length + 1)]
                return common.step(tx, self.loss_fn, carry, False, batch=batch), None

            def part(carry, keys):
                carry, _ = jax.lax.scan(body, carry, keys)
                return carry, [self.accuracy(carry[0], batch) for batch in windows]

            keys = jax.random.split(key, config.new_steps)
            keys = keys.reshape(config.points, -1)
            return jax.lax.scan(part, (params, tx.init(params)), keys)[1]

        return jax.vmap(of_rate)(jnp.array(config.new_rates))

    @functools.partial(jax.jit, static_argnums=0)
    def relative_sharpness(self, params):
        """Curvature of the first loss along the gradient of the second."""
        texts = self.split["train"], self.new_split["train"]
        old, new = (self.windows(text) for text in texts)
        grads = jax.tree.map(
            lambda grad, lora: 0 * grad if lora else grad,  # LoRA matrices never train
            jax.grad(self.loss_fn)(params, new),
            self.is_lora,
        )
        hessian = curvature.hessian(self.loss_fn, params, old)
        return hessian.quadratic_form(grads) / optax.tree.norm(grads, squared=True)


def compute(config, piece):
    training = Training(config)
    methods = {name: METHODS[name] for name in config.methods}
    with common.shown(piece) as piece:
        found = frontiers.study(piece, "Transformer", training, methods, LEVELS)
    return {
        "paper": PAPER,
        "tolerance": LEVELS.tolerance,
        "learned": LEVELS.learned,
        "num_settings": config.settings,
        "texts": {
            name: {"sha256": hashlib.sha256(text).hexdigest(), "characters": len(text)}
            for name, text in (("old", training.codes), ("new", training.new_codes))
        },
        **found,
    }


def draw(report):
    return frontiers.figure(report["results"], LEVELS)


def lines(report):
    return frontiers.lines("Transformer", report["results"])


if __name__ == "__main__":
    common.main(__file__, __doc__, Config, SMOKE, compute, draw, lines)

"""Text as ASCII characters, and a small causal Transformer that predicts the next."""

import jax.numpy as jnp
import numpy as np
from flax import nnx


def read(path):
    """The bytes of a file or of all Python files of a folder; 63 for all but ASCII."""
    paths = sorted(path.glob("*.py")) if path.is_dir() else [path]
    text = "".join(p.read_text("utf-8", "replace") for p in paths)
    return np.frombuffer(text.encode("ascii", "replace"), np.uint8)


def split(codes, num_train, block=2000):
    """Training, validation and test text: blocks of the whole, in random order."""
    starts = np.random.default_rng(0).permutation(len(codes) // block) * block
    blocks = codes[starts[:, None] + np.arange(block)]
    count = min(100, len(blocks) // 4)
    validation, test, rest = np.split(blocks, [count, 2 * count])
    train = rest.reshape(-1)[:num_train]
    parts = {"train": train, "validation": validation, "test": test}
    return {name: jnp.asarray(p.reshape(-1), jnp.int32) for name, p in parts.items()}


def windows(codes, length, count, seed=1):
    """Random pieces of a text, each with one more character to predict."""
    starts = np.random.default_rng(seed).integers(0, len(codes) - length, count)
    return codes[starts[:, None] + np.arange(length + 1)]


class Block(nnx.Module):
    """Attention, then two layers with LoRA matrices, each behind a norm."""

    def __init__(self, width, rngs):
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.LoRALinear(width, 4 * width, lora_rank=4, rngs=rngs)
        self.down = nnx.LoRALinear(4 * width, width, lora_rank=4, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Transformer(nnx.Module):
    """A causal Transformer on ASCII characters."""

    def __init__(self, width, num_blocks, length, rngs):
        self.embed = nnx.Embed(128, width, rngs=rngs)
        self.positions = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(num_blocks)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 128, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[1]))[None]
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))

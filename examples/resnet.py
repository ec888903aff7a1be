"""A residual network in Flax NNX."""

import jax.numpy as jnp
from flax import nnx


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

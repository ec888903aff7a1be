"""Job 5: LoRA, with noise on the adapters; and Flat-LoRA, with noise on the frozen weight."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import flatopt
import flatopt.flax


def loss_fn(model, batch):
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


def merged(variables):
    """The norms of Flat-LoRA's noise: those of the merged weight over sqrt(inputs)."""
    adapter = variables["lora"]
    weight = variables["kernel"][...] + (
        adapter["lora_a"][...] @ adapter["lora_b"][...]
    )
    return {"kernel": weight / weight.shape[0] ** 0.5}


ADAPTERS = {
    "LoRA": {"noise_wrt": nnx.LoRAParam},
    "Flat-LoRA": {
        "noise_wrt": nnx.All(nnx.Not(nnx.LoRAParam), nnx.PathContains("kernel"))
    },
}
KERNELS = {
    "LoRA": flatopt.kernels.isotropic(),
    "Flat-LoRA": flatopt.kernels.filterwise(norms_of=merged),
}


def train(name, batch):
    model = nnx.LoRALinear(4, 2, lora_rank=2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.LoRAParam)
    frozen = jnp.copy(model.kernel[...])
    value_and_grad = flatopt.flax.value_and_grad(
        loss_fn, 0.02, KERNELS[name], wrt=nnx.LoRAParam, **ADAPTERS[name]
    )

    @nnx.jit
    def step(model, optimizer, key, batch):
        loss, grads = value_and_grad(key, model, batch)
        optimizer.update(model, grads)
        return loss

    start = float(loss_fn(model, batch))
    for index in range(30):
        step(model, optimizer, jax.random.key(index), batch)
    return {
        "start": start,
        "end": float(loss_fn(model, batch)),
        "frozen": bool((model.kernel[...] == frozen).all()),
    }


def main():
    random = np.random.default_rng(0)
    inputs = random.normal(size=(32, 4)).astype("f4")
    targets = inputs @ random.normal(size=(4, 2)).astype("f4")
    return {name: train(name, {"x": inputs, "y": targets}) for name in ADAPTERS}


if __name__ == "__main__":
    print(main())

"""How long the first call of a step takes, and 500 calls, by the layout of its samples.

Residual networks for images of 32 by 32, 64 images in 8 chunks, LPF-SGD. Seconds hold for
the machine; what counts are their ratios within a run. Seconds of the processor, of all
threads of this process, are beside: other programs change them little, but they do not tell
how well cores are shared.

Example: python -m benchmarks.first_call --output first_call.json
"""

import argparse
import itertools
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import flatopt
import flatopt.flax
from examples.resnet import ResNet

NETWORKS = {"one block a stage": (1, 1, 1), "three blocks a stage": (3, 3, 3)}
LAYOUTS = ("plain", "scan", "unroll", "vmap", "auto")


def make_step(value_fn, layout):
    """An optimizer and its jitted step; ``plain`` is SGD without flatopt."""
    sgd = optax.sgd(0.1, momentum=0.9)
    link = flatopt.lpf_gradients(5e-4, strategy="auto" if layout == "plain" else layout)
    tx = sgd if layout == "plain" else optax.chain(link, sgd)

    @jax.jit
    def step(params, state, batch):
        if layout == "plain":
            grads = jax.grad(value_fn)(params, batch)
            updates, state = tx.update(grads, state, params)
        else:
            updates, state = tx.update(
                None, state, params, value_fn=value_fn, batch=batch
            )
        return optax.apply_updates(params, updates), state

    return tx, step


def measure(value_fn, params, batch, layout, num_calls):
    """Seconds of the first call and of a later one, the median; by the clock and of cores."""
    jax.clear_caches()
    tx, step = make_step(value_fn, layout)
    carry, clocks = (params, tx.init(params)), (time.perf_counter, time.process_time)
    readings = [[clock() for clock in clocks]]
    for _ in range(1 + num_calls):
        carry = jax.block_until_ready(step(*carry, batch))
        readings.append([clock() for clock in clocks])
    found = {}
    for kind, times in zip(("", "cpu_"), zip(*readings, strict=True), strict=True):
        first, *rest = (b - a for a, b in itertools.pairwise(times))
        later = statistics.median(rest)
        found |= {f"{kind}first_call": first, f"{kind}step": later}
        found[f"{kind}500_steps"] = first + 499 * later
    return found


def measure_network(blocks, layouts, num_calls):
    """All layouts of one network."""
    model = ResNet(16, blocks, jnp.float32, nnx.Rngs(0))

    def loss_fn(model, batch):
        losses = optax.softmax_cross_entropy_with_integer_labels(
            model(batch["images"]), batch["labels"]
        )
        return losses.mean()

    params, value_fn = flatopt.flax.functional(model, loss_fn)
    images = jax.random.normal(jax.random.key(1), (64, 32, 32, 3))
    batch = {"images": images, "labels": jnp.arange(64) % 10}
    rows = {}
    for layout in layouts:
        rows[layout] = measure(value_fn, params, batch, layout, num_calls)
        seconds = (f"{name} {s:.3f} s " for name, s in rows[layout].items())
        print(f"{layout:8s}", *seconds, flush=True)
    return rows


def main():
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--num-calls", type=int, default=15)
    args = parser.parse_args()
    found = {}
    for name, blocks in NETWORKS.items():
        print(name, flush=True)
        # Of the deeper one all at once takes minutes.
        layouts = [n for n in LAYOUTS if n != "vmap" or max(blocks) == 1]
        found[name] = measure_network(blocks, layouts, args.num_calls)
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Train with checkpoints: ``checkpoint_worker.py FOLDER RESULT [PAUSE]``.

Resumes from the latest checkpoint in FOLDER, writes the final parameters to RESULT.
With PAUSE it starts to save at that step, says so and waits to be killed.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import flatopt

NUM_STEPS, SAVE_EVERY, BATCH = 24, 4, 64


def loss_fn(params, batch):
    logits = jnp.tanh(batch["images"] @ params["hidden"]) @ params["output"]
    return optax.softmax_cross_entropy_with_integer_labels(
        logits, batch["labels"]
    ).mean()


def make_optimizer():
    return optax.chain(
        flatopt.track_stability(0.2, BATCH, every=3, key=1),
        flatopt.smooth_gradients(
            flatopt.schedules.cosine_growth(1e-3, 20.0, NUM_STEPS),
            flatopt.kernels.filterwise(),
            num_samples=4,
            batch_argnames=("batch",),
            key=2,
        ),
        optax.sgd(optax.cosine_decay_schedule(0.2, NUM_STEPS), momentum=0.9),
    )


def make_params():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "hidden": jax.random.normal(keys[0], (12, 16)) / 4,
        "output": jax.random.normal(keys[1], (16, 3)) / 4,
    }


def make_step(tx):
    @jax.jit
    def step(params, state, index):
        key = jax.random.fold_in(jax.random.key(3), index)
        images = jax.random.normal(key, (BATCH, 12))
        batch = {"images": images, "labels": jnp.argmax(images[:, :3], axis=1)}
        updates, state = tx.update(None, state, params, value_fn=loss_fn, batch=batch)
        return optax.apply_updates(params, updates), state

    return step


def main(folder, result, pause=None):
    tx = make_optimizer()
    step = make_step(tx)
    carry = {"params": make_params(), "state": tx.init(make_params())}
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, save_interval_steps=SAVE_EVERY
    )
    with ocp.CheckpointManager(folder, options=options) as manager:
        start = manager.latest_step() or 0
        if start:
            like = jax.eval_shape(lambda: carry)
            carry = manager.restore(start, args=ocp.args.StandardRestore(like))
        print("start", start, flush=True)
        for index in range(start, NUM_STEPS):
            params, state = step(carry["params"], carry["state"], index)
            carry = {"params": params, "state": state}
            manager.save(index + 1, args=ocp.args.StandardSave(carry))
            if index + 1 == pause:
                print("paused", flush=True)
                sys.stdin.readline()
    leaves = jax.tree_util.tree_leaves_with_path(carry)
    np.savez(result, **{jax.tree_util.keystr(path): leaf for path, leaf in leaves})


if __name__ == "__main__":
    folder, result, *pause = sys.argv[1:]
    main(folder, result, *map(int, pause))

"""Networks fine-tuned from one start on several tasks, and merged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import again
from .again import turned
from .methods import TUNING_SEED

WEIGHTS = (0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0)
COUNTS = (2, 4)
LINE = np.linspace(0, 1, 11)


def task_images(images, task):
    """Digits turned by one, two or three quarters of a circle; the fourth task mirrors."""
    if task < 3:
        return turned(images, task + 1)
    return images.reshape(*images.shape[:-1], 8, 8)[..., ::-1].reshape(images.shape)


class Training(again.Training):
    """A network that learns upright digits, then other tasks, once for each."""

    def __init__(self, config, network, base, setting):
        super().__init__(config, network)
        self.base_of = functools.cache(lambda seeds: self._base(base, setting, seeds))
        self.tasks = {
            name: [(task_images(split[0], task), split[1]) for task in range(4)]
            for name, split in (("validation", self.validation), ("test", self.test))
        }

    def _base(self, method, setting, seeds):
        """What every fine-tuning of a seed starts from."""
        num_steps = self.num_steps
        return self.networks(method, [(setting, seed) for seed in seeds], num_steps)

    def fine_tune(self, method, num_steps, settings, seeds):
        """Networks of all settings, seeds and tasks, shape (settings, seeds, tasks)."""
        base = jax.tree.map(np.asarray, self.base_of(tuple(seeds)))
        runs = [
            self.run_of(setting, seed, task, jax.tree.map(lambda x, i=i: x[i], base))
            for setting in settings
            for i, seed in enumerate(seeds)
            for task in range(4)
        ]
        runs = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *runs)
        carry = self.init(method, runs)
        params, state = self.advance(method, carry, runs, 0, num_steps, num_steps)
        if method.averaged:
            params = optax.tree.get(state, "average")
        shape = len(settings), len(seeds), 4
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), params)

    def run_of(self, setting, seed, task, start):
        problem, config = self.problem(seed, 0.0), self.config
        images, labels = problem["new"]
        rng = np.random.default_rng([seed, task])
        size = min(config.batch_size, len(labels))
        chosen = [rng.permutation(len(labels))[:size] for _ in range(config.new_steps)]
        # What stands there lies on its side already.
        upright = np.asarray(turned(images, 3))
        return problem | {
            "data": (np.asarray(task_images(upright, task)), labels),
            "batches": np.array(chosen),
            "start": start,
            "seed": np.int32(4 * seed + task),
            "setting": setting,
        }

    @functools.partial(jax.jit, static_argnums=(0, 3))
    def merged(self, params, base, split):
        """Accuracies of the fine-tunes alone, merged, and along the line between two.

        Args:
          params: of all settings, seeds and tasks.
          base: of all seeds.
          split: the name of the images to evaluate on.

        Returns:
          "alone": on the own task, shape (settings, seeds, tasks); for each count of
          tasks their mean accuracy for each weight, (settings, seeds, weights); "line":
          that of the first two tasks, (settings, seeds, points).
        """
        tasks = self.tasks[split]

        def accuracies(params, count):
            return jnp.stack([self.accuracy(params, batch) for batch in tasks[:count]])

        def add(base, params, weights):
            return jax.tree.map(
                lambda b, p: b + jnp.tensordot(weights, p - b, 1), base, params
            )

        def one(params, base):
            alone = jax.vmap(lambda p: accuracies(p, 4))(params)
            found = {"alone": jnp.diagonal(alone)}
            for count in COUNTS:
                chosen = (jnp.arange(4) < count).astype(jnp.float32)
                found[str(count)] = jax.lax.map(
                    lambda w, c=chosen, n=count: accuracies(
                        add(base, params, w * c), n
                    ).mean(),
                    jnp.array([1 / count, *WEIGHTS]),
                )
            found["line"] = jax.lax.map(
                lambda t: accuracies(
                    add(base, params, jnp.array([1 - t, t, 0.0, 0.0])), 2
                ).mean(),
                jnp.asarray(LINE, jnp.float32),
            )
            return found

        return jax.vmap(jax.vmap(one), in_axes=(0, None))(params, base)

    def tune_merged(self, method, num_steps):
        """Validation accuracies of every setting, means over tuning seeds."""
        settings = self.settings(method)
        seeds = range(TUNING_SEED, TUNING_SEED + self.config.tuning_seeds)
        params = self.fine_tune(method, num_steps, settings, seeds)
        found = self.merged(params, self.base_of(tuple(seeds)), "validation")
        return {"settings": settings} | {
            name: np.asarray(x).mean(axis=1) for name, x in found.items()
        }

    def finish_merged(self, method, num_steps, places):
        """Test accuracies of final runs of some settings, by place and seed."""
        settings = [self.settings(method)[place] for place in places]
        seeds = range(1, 1 + self.config.seeds)
        params = self.fine_tune(method, num_steps, settings, seeds)
        found = self.merged(params, self.base_of(tuple(seeds)), "test")
        return {
            place: {name: np.asarray(x)[index] for name, x in found.items()}
            for index, place in enumerate(places)
        }

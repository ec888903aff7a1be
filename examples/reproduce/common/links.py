"""The methods whose networks are changed after training, and the grids they choose from."""

import jax.numpy as jnp

import flatopt

from .after import WEIGHT_NOISE, Method
from .methods import grid

SGD = "SGD"


def sam(radius, key, _):
    return flatopt.sam_gradients(radius, key=key)


def sam_at_the_end(radius, key, num_steps):
    start = jnp.int32(0.9 * num_steps)
    return flatopt.sam_gradients(radius, start_step=start, key=key)


def nso(radius, key, _):
    return flatopt.smooth_gradients(radius, antithetic=True, key=key)


def lpf(kernel):
    """Each of four chunks of the batch sees its own draw of the kernel."""

    def link(radius, key, _):
        return flatopt.smooth_gradients(
            radius, kernel, num_samples=4, batch_argnames=("batch",), key=key
        )

    return link


def lpf_at_the_end(radius, key, num_steps):
    def now(count):
        return jnp.where(count >= 0.9 * num_steps, radius, 0.0)

    return lpf(FILTERWISE)(now, key, num_steps)


FILTERWISE = flatopt.kernels.filterwise()
RATES, DECAYS = (0.03, 0.1, 0.3, 0.6), (1e-3, 3e-3, 1e-2)
MANY_RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.2)
MANY_DECAYS = (3e-4, 1e-3, 3e-3, 6e-3, 1e-2, 3e-2)
AVERAGES = {"radius": (0.99, 0.998), "constant": (0.0, 1.0)}
ASCENTS, GAMMAS = (0.05, 0.1, 0.2, 0.4), (0.02, 0.04, 0.08, 0.12)


def flat_grid(*radii):
    return grid(learning_rate=RATES, weight_decay=DECAYS, radius=radii)


# 48 settings each.
METHODS = {
    SGD: Method(None, grid(learning_rate=MANY_RATES, weight_decay=MANY_DECAYS)),
    "average of weights": Method(
        None,
        grid(learning_rate=RATES, weight_decay=DECAYS, **AVERAGES),
        averaged=True,
    ),
    "SAM": Method(sam, flat_grid(*ASCENTS)),
    "SAM, last 10 %": Method(sam_at_the_end, flat_grid(*ASCENTS)),
    "NSO": Method(nso, flat_grid(0.03, 0.06, 0.1, 0.15)),
    "LPF-SGD": Method(lpf(FILTERWISE), flat_grid(*GAMMAS)),
    "LPF-SGD, last 10 %": Method(lpf_at_the_end, flat_grid(*GAMMAS)),
    "LPF-SGD, rounding": Method(
        lpf(flatopt.kernels.rounding(3)), flat_grid(0.5, 1, 2, 4)
    ),
    "LPF-SGD, weight noise": Method(lpf(WEIGHT_NOISE), flat_grid(0.05, 0.1, 0.2, 0.3)),
}

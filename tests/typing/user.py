"""A user's script for the type checker: it is checked by `make lint`, and never run.

Each line with `type: ignore[...]` is a mistake that the checker must see: an ignore that is
not needed is an error itself (`warn_unused_ignores`).
"""

import jax
import jax.numpy as jnp
import optax

import flatopt
from flatopt import curvature, kernels, sharpness, stability


def loss_fn(params: dict[str, jax.Array], batch: jax.Array) -> jax.Array:
    return jnp.mean((batch @ params["w"]) ** 2)


params = {"w": jnp.ones(3)}
batch = jnp.ones((8, 3))
key = jax.random.key(0)

# Training.
link: optax.GradientTransformationExtraArgs = flatopt.smooth_gradients(
    0.01, kernels.filterwise(kernels.signs), antithetic=True, strategy="scan"
)
tx = optax.chain(link, optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
recipe: optax.GradientTransformationExtraArgs = flatopt.lpf_sgd(0.1, gamma=5e-4)
schedule = optax.linear_schedule(0.0, 0.05, 100)
flatopt.sam_gradients(schedule, mask={"w": True})
counter = flatopt.GradientCounter(loss_fn)
seen: int = counter.count

flatopt.lpf_sdg(0.1)  # type: ignore[attr-defined]
flatopt.lpf_sgd(0.1, momentun=0.9)  # type: ignore[call-arg]
flatopt.smooth_gradients(0.01, strategy="vmpa")  # type: ignore[arg-type]
flatopt.smooth_gradients("0.01")  # type: ignore[arg-type]
flatopt.sam_gradients(0.05, rho=0.1)  # type: ignore[misc]

pair: tuple[object, object] = flatopt.smooth_value_and_grad(loss_fn, 0.01)(
    key, params, batch
)
drawn: dict[str, jax.Array] = flatopt.sample_posterior(key, params, recipe.init(params))
rounded: dict[str, jax.Array] = sharpness.round_filters(params, 3)
text: str = sharpness.round_filters(params, 3)  # type: ignore[assignment]
figure: str = flatopt.smooth_value_and_grad(loss_fn, 0.01)(key, params)  # type: ignore[assignment]

# Analysis.
operator: curvature.Operator = curvature.hessian(loss_fn, params, [batch])
product: dict[str, jax.Array] = operator.matvec(params)
trace: curvature.Estimate = curvature.trace(operator, key)
pairs = curvature.eigenpairs(operator, key, 2, which="smallest")
bound = float(pairs.residuals[0])
rise: curvature.Estimate = sharpness.low_pass(loss_fn, params, key, data=batch)
worst: float = sharpness.worst_case(loss_fn, params, key, rho=0.1, norm="linf")
lin = stability.linearize(lambda p, x: x @ p["w"], params, batch, jnp.ones(8))
limit: float = stability.thresholds(lin, 4, sampling="bernoulli").mean_square

curvature.trace(operator, key, num_probe=8)  # type: ignore[call-arg]
curvature.eigenpairs(operator, key, which="bigest")  # type: ignore[arg-type]
number: float = curvature.trace(operator, key)  # type: ignore[assignment]
sharpness.worst_case(loss_fn, params, key, rho=0.1, norm="l1")  # type: ignore[arg-type]
stability.thresholds(lin, 4, sampling="bernouli")  # type: ignore[arg-type]
words: str = stability.growth_rate(lin, 0.1, 4)  # type: ignore[assignment]

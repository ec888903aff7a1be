"""What the radii of a method do to a loss at given parameters."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from flatopt import kernels
from flatopt._core import (
    binding,
    blocks,
    checks,
    loops,
    parts,
    random,
    trees,
    vectors,
)
from flatopt._core.estimates import Estimate
from flatopt._core.risk import (
    Risk,
    along,
    check_hashable,
    check_loss,
    check_model,
    loss_of,
)
from flatopt._core.types import KernelFn, LossFn, Mask, ModelFn, WeightFn
from flatopt.sharpness._radius_table import Radius

METHODS = ("noise", "sam")
RADII = {"noise": 0.001 * 2.0 ** np.arange(11), "sam": 0.01 * 2.0 ** np.arange(11)}
ISOTROPIC = kernels.isotropic()
RECIPES = {"parameter": "nso", "filter": "lpf"}  # by the unit of a kernel


def radius(
    loss_fn: LossFn,
    params: Any,
    key: jax.Array,
    *,
    method: Literal["noise", "sam"] = "noise",
    kernel: KernelFn | None = None,
    radii: Any = None,
    data: Any = None,
    model_fn: ModelFn | None = None,
    num_samples: int = 8,
    weight_fn: WeightFn | None = None,
    mask: Mask = None,
    constants: Any = None,
    progress: Any = None,
) -> Radius:
    r"""Tell what each radius does to the loss, and which few to train with.

    .. math:: E_U[L(\theta + r U)] - L(\theta) \approx \tfrac{r^2}{2} \operatorname{tr} H
        \quad \text{(noise)}, \qquad
        L(\theta + r\, g / \|g\|) - L(\theta) \quad \text{(SAM)}

    ``print`` shows a table: the rise of the loss, how far the predictions and the gradient
    move, which radii do nothing, which lie beyond the cliff, and the radii to try. The rules
    behind the latter were measured at the parameters that training starts from, on one batch.
    For LPF-SGD give ``kernels.filterwise()``; without a kernel the noise is that of NSO.

    Each draw counts at +U and -U, and all radii see the same draws, so that the curves are
    smooth. Cost: 2 ``num_samples`` gradients and forward passes a radius, 176 of each in all
    by default; for SAM one a radius. On a re-iterable each takes a pass.

    Args:
      loss_fn: the mean loss, ``loss_fn(params)`` or ``loss_fn(params, batch)``.
      params: the parameters, where training starts.
      key: a JAX random key; SAM draws nothing.
      method: "noise", or "sam" for the ascent along the gradient of the data.
      kernel: the noise; default: :func:`flatopt.kernels.isotropic`. Make it once: code is
        compiled for each kernel, as for each loss.
      radii: scales of the noise, or lengths of SAM's step: positive, increasing. Default:
        11 of them, from 0.001 and, for SAM, from 0.01, each twice the last.
      data: one batch, or a re-iterable of batches. SAM climbs along the gradient of all of
        it: give a batch of the size that training takes.
      model_fn: ``model_fn(params, inputs) -> logits``, classes on the last axis, for the
        change of the predictions; data are then pairs ``(inputs, targets)``.
      num_samples: number of pairs of draws; SAM has one step.
      weight_fn: weight of a batch; default: its number of examples. ``kl`` and ``changed``
        count all rows of a batch alike, also those that fill it up: leave these out.
      mask: the leaves that are moved: those that training will perturb. The others are
        constant; gradients and lengths are those of the moved leaves. In the forms of
        :func:`flatopt.curvature.hessian`.
      constants: arrays that ``loss_fn`` and ``model_fn`` take last and that are not moved,
        such as running statistics; networks that differ in them share compiled code.
      progress: True for a bar, a function ``progress(done, total, description)``, or False;
        None: a bar of passes over a re-iterable where they take long.

    Returns:
      A :class:`Radius`.

    Raises:
      TypeError, ValueError: for wrong arguments, and where the loss is not finite.

    Example:
      >>> import jax, jax.numpy as jnp, flatopt
      >>> found = flatopt.radius(
      ...     lambda p: jnp.sum(p ** 2), jnp.ones(3), jax.random.key(0), radii=[0.1, 0.2],
      ...     kernel=flatopt.kernels.isotropic(flatopt.kernels.signs))
      >>> [round(float(rise), 3) for rise in found.rise.value]  # 3 r^2
      [0.03, 0.12]
    """
    start = time.monotonic()
    _check_method(method, kernel)
    checks.check_random_key(key)
    checks.check_count(num_samples)
    radii = _check_radii(RADII[method] if radii is None else radii)
    if method == "noise":
        kernel = ISOTROPIC if kernel is None else kernel
        checks.check_kernel(kernel)
    _check_model(model_fn, data, constants)
    check_loss(loss_fn, data, constants)
    part = parts.choose(params, mask, constants)
    risk = Risk.of_part(part.wrap(loss_fn), part, data, weight_fn)
    # In float32 or wider: bfloat16 would round small moves away.
    risk = risk.at(blocks.widen(risk.params))
    model_fn = None if model_fn is None else part.wrap(model_fn)
    effects = Effects(risk.loss_fn, model_fn, kernel)
    dtype = jnp.result_type(*jax.tree.leaves(risk.params))
    is_noise = method == "noise"
    steps = jnp.asarray(np.concatenate([radii, -radii] if is_noise else [radii]), dtype)
    keys = _keys(key, num_samples) if is_noise else None
    measure, num_passes = _in_one_go, 1
    if risk.stream is not None:
        measure = _in_passes
        num_passes = 1 + len(steps) * (num_samples if is_noise else 1)
    with risk.watched(progress, num_passes, "flatopt.radius"):
        loss, num_classes, samples = measure(risk, effects, keys, steps)
    is_traced = isinstance(loss, jax.core.Tracer)
    seconds = None if is_traced else time.monotonic() - start
    recipe = RECIPES.get(getattr(kernel, "unit", None) or "") if is_noise else "sam"
    return _estimates(samples, radii, is_noise)._replace(
        loss=loss if is_traced else float(loss),
        recipe=recipe,
        num_classes=num_classes,
        seconds=seconds,
    )


def _check_method(method, kernel):
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(
            f"method must be 'noise' or 'sam', got {method!r}; 'noise' is that of NSO and "
            "LPF-SGD."
        )
    if method == "sam" and kernel is not None:
        raise ValueError(
            f"kernel must be None where method='sam', got {checks.described(kernel)}; SAM "
            "climbs along the gradient and draws no noise."
        )


def _check_model(model_fn, data, constants):
    if model_fn is None:
        return
    check_model(model_fn, constants)
    check_hashable(model_fn)
    if data is None:
        raise ValueError(
            "data must be (inputs, targets) where model_fn is given, got None; give a batch "
            "of such pairs."
        )


def _check_radii(radii):
    advice = "give a sequence of positive numbers that increase."
    try:
        found = np.asarray(radii, float)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"radii must be numbers, got {checks.described(radii)}; {advice}"
        ) from error
    if found.ndim != 1 or not found.size:
        raise ValueError(f"radii must be a sequence, got shape {found.shape}; {advice}")
    if not (np.isfinite(found).all() and found[0] > 0 and (np.diff(found) > 0).all()):
        raise ValueError(
            f"radii must be positive and increase, got {found.tolist()}; {advice}"
        )
    return found


@functools.partial(jax.jit, static_argnums=1)
def _keys(key, count):
    return jax.vmap(lambda i: random.fold_in(key, i))(jnp.arange(count))


@dataclasses.dataclass(frozen=True)
class Effects:
    """The loss, its gradient and the effects of all steps along all draws, on one batch.

    As a function of the mean of one batch it is one program; its parts serve passes.
    """

    loss_fn: Callable
    model_fn: Callable | None
    kernel: KernelFn | None

    def __call__(self, params, batch, keys, steps):
        here = self.at(params, batch)
        logits = self.logits(params, batch)

        def along_direction(direction):
            def of_step(step):
                moved = along(step, params, direction)
                return compare(
                    here, self.at(moved, batch, logits), params, direction, step
                )

            return loops.map_rows(of_step, steps)

        if keys is None:
            found = along_direction(vectors.normalize(here["gradient"])[0])
            found = jax.tree.map(lambda x: x[None], found)
        else:
            found = loops.map_rows(
                lambda key: along_direction(
                    self.draw(key, params, parts.whole_of(batch))
                ),
                keys,
            )
        return here["loss"], (here["loss"], found)

    def draw(self, key, params, whole=None):
        """One draw of the noise."""
        return blocks.widen(binding.bind(self.kernel, key, params, whole)(key))

    def logits(self, params, batch):
        """Predictions, None without a model."""
        if self.model_fn is None:
            return None
        pair = parts.batch_of(batch)
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(
                "data must be pairs (inputs, targets) where model_fn is given, got a batch "
                f"of type {type(pair).__name__}; wrap loss_fn to take such a pair."
            )
        return check_logits(self.model_fn(params, parts.replaced(batch, pair[0])))

    def at(self, params, batch, logits=None):
        """The loss and its gradient; with logits the change of the predictions, too."""
        loss, gradient = jax.value_and_grad(
            lambda params: trees.widen(loss_of(self.loss_fn, params, batch))
        )(params)
        found = {"loss": loss, "gradient": gradient}
        if logits is not None:
            moved = self.logits(params, batch)
            is_other = jnp.argmax(logits, -1) != jnp.argmax(moved, -1)
            found["kl"] = jnp.mean(divergence(logits, moved))
            found["changed"] = jnp.mean(is_other, dtype=loss.dtype)
        return found


def check_logits(found):
    """Logits in float32 or wider, from what a model returned."""
    if not hasattr(found, "ndim") or not found.ndim or found.shape[-1] < 2:
        raise ValueError(
            "model_fn must return logits with two or more classes on the last axis, got "
            f"{jax.tree.map(jnp.shape, found)}; leave it out for other models."
        )
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise TypeError(
            f"model_fn must return floating logits, got {found.dtype}; return what the loss "
            "takes the softmax of."
        )
    return trees.widen(found)


def divergence(logits, moved):
    """KL of moved predictions from clean ones, a sum of terms of at least 0.

    A class of probability 0 adds what the others took of it.
    """
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(moved)
    is_possible = log_p > -jnp.inf
    difference = jnp.where(is_possible, log_q - jnp.where(is_possible, log_p, 0.0), 0.0)
    terms = jnp.exp(log_p) * (jnp.expm1(difference) - difference)
    terms = jnp.where(is_possible, terms, jnp.exp(log_q))
    return jnp.sum(terms, axis=-1)


def compare(here, there, params, direction, step):
    """The effects of one step, each a number."""
    unit, size = vectors.normalize(here["gradient"])
    other, other_size = vectors.normalize(there["gradient"])
    cosine = vectors.dot(unit, other)
    length = vectors.normalize(direction)[1] / vectors.normalize(params)[1]
    found = {
        "rise": there["loss"] - here["loss"],
        "cosine": jnp.where(size * other_size > 0, cosine, jnp.nan),
        "noise_over_weight": jnp.abs(step).astype(length.dtype) * length,
    }
    return found | {name: there[name] for name in ("kl", "changed") if name in there}


def _in_one_go(risk, effects, keys, steps):
    """All effects on one batch, in one program."""
    loss, found = risk.mean(effects, keys, steps)
    logits = jax.eval_shape(effects.logits, risk.params, risk.given(risk.batch))
    return loss, None if logits is None else logits.shape[-1], found


@dataclasses.dataclass(frozen=True)
class _Moved:
    """The loss, its gradient and the change of predictions after one step."""

    effects: Effects

    def __call__(self, params, batch, direction, step):
        logits = self.effects.logits(params, batch)
        moved = along(step, params, direction)
        found = self.effects.at(moved, batch, logits)
        return found["loss"], found


def _in_passes(risk, effects, keys, steps):
    """The same on a re-iterable: a pass for each step, with two gradients in memory."""
    loss, gradient = risk.value_and_gradient()
    here = {"loss": loss, "gradient": gradient}
    params, draw = risk.params, jax.jit(effects.draw)
    whole = risk.whole
    climb = [vectors.normalize(gradient)[0]] if keys is None else None
    rows = []
    for direction in climb or (draw(key, params, whole) for key in keys):
        row = [
            _compare(
                here,
                risk.mean(_Moved(effects), direction, step, check=False),
                params,
                direction,
                step,
            )
            for step in steps
        ]
        rows.append(jax.tree.map(lambda *x: jnp.stack(x), *row))
    found = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    if effects.model_fn is None:
        return loss, None, found
    batch = jax.tree.map(jnp.asarray, next(iter(risk.stream.batches)))
    logits = jax.eval_shape(effects.logits, params, risk.given(batch))
    return loss, logits.shape[-1], found


_compare = jax.jit(compare)


def _estimates(samples, radii, is_noise):
    """Means over pairs of draws; SAM's one step has no error of draws."""

    def estimate(values):
        if not is_noise:
            return Estimate(values[0], jnp.zeros_like(values[0]), 1)
        pairs = values.reshape(len(values), 2, len(radii))
        return Estimate.of(jnp.mean(pairs, axis=1))

    return Radius(radii, **{name: estimate(x) for name, x in samples.items()})

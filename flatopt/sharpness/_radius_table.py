"""The effects of radii as a table, and the radii that they suggest."""

from typing import Any, NamedTuple

import numpy as np

from flatopt._core import tables
from flatopt._core.estimates import Estimate

NOTHING = 1e-4  # of the loss: a rise below that does nothing
KL_OF_START, RISE_OF_START = 0.06, 0.5  # nats, for NSO and SAM
START_OF_LPF = 0.08
BRACKETS = {"nso": (1, 3), "sam": (1, 3), "lpf": (0.5, 1, 2)}
CLIFF = {"sam": 2.0}  # of what a guess loses; half of it for noise
NAMES = {"nso": "sigma", "sam": "rho", "lpf": "gamma"}

HEADER = (
    "radius",
    "rise",
    "error",
    "share",
    "KL",
    "changed",
    "cosine",
    "noise",
    "says",
)
MEANINGS = (
    "rise: of the mean loss, with its standard error; nats, if the loss is a cross-entropy.",
    "share: rise over loss.",
    "KL: of the predictions from the clean ones, nats.",
    "changed: share of examples that are put into another class.",
    "cosine: of the gradient with the clean one.",
    "noise: length of the move over that of the parameters.",
)


class Radius(NamedTuple):
    """What radii do at some parameters, from :func:`flatopt.radius`; ``print`` it.

    Each Estimate holds one number a radius, with its error over draws.

    Attributes:
      radii: the radii.
      rise: mean loss after the move less the loss.
      cosine: of the gradient with that at the parameters; not a number where one is zero.
      noise_over_weight: length of the move over that of the parameters.
      kl: Kullback-Leibler divergence of the moved predictions from the clean ones, in nats;
        None without a model, as the next.
      changed: share of examples whose most likely class is another.
      loss: the loss at the parameters.
      recipe: "nso", "lpf" or "sam": whose rule suggests radii; None: that of no other
        kernel is known.
      num_classes: number of classes; None without a model.
      seconds: what it took, with compilation; None inside of ``jax.jit``.

    Example:
      >>> import numpy as np, flatopt
      >>> from flatopt.curvature import Estimate
      >>> rise = Estimate(np.array([1e-6, 0.2, 0.8, 30.0]), np.zeros(4), 1)
      >>> found = flatopt.Radius(np.array([0.001, 0.2, 0.8, 3.2]), rise, rise, rise,
      ...     loss=2.3, recipe="sam", num_classes=10)
      >>> round(found.start, 2), found.does_nothing.tolist(), found.beyond_cliff.tolist()
      (0.5, [True, False, False, False], [False, False, False, True])
    """

    radii: np.ndarray
    rise: Estimate
    cosine: Estimate
    noise_over_weight: Estimate
    kl: Estimate | None = None
    changed: Estimate | None = None
    loss: Any = None
    recipe: str | None = None
    num_classes: int | None = None
    seconds: float | None = None

    @property
    def share(self) -> Estimate:
        """The rise over the loss."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return Estimate(
                self.rise.value / abs(self.loss),
                self.rise.standard_error / abs(self.loss),
                self.rise.num_probes,
            )

    @property
    def does_nothing(self) -> np.ndarray:
        """Radii whose rise is below 1e-4 of the loss, True or False for each."""
        return np.abs(np.asarray(self.rise.value)) <= NOTHING * abs(self.loss)

    @property
    def beyond_cliff(self) -> np.ndarray:
        """Radii whose rise is more than a part of what a guess loses, or no number.

        A guess loses the logarithm of the number of classes, or the loss where that is
        more. The part is one half for noise, and twice that loss for SAM. A loss of at most
        0 without classes tells no height: then only what is no number lies beyond.
        """
        return ~(np.asarray(self.rise.value) < self._height)

    @property
    def start(self) -> float | None:
        """The radius to begin with by the rule of the recipe; None where it tells none.

        NSO: where the mean KL is 0.06 nats. SAM: where the loss rises by 0.5. LPF-SGD: 0.08.
        """
        if self.recipe == "lpf":
            return START_OF_LPF
        if self.recipe == "nso" and self.kl is not None:
            return crossing(self.radii, self.kl.value, KL_OF_START)
        if self.recipe == "sam":
            return crossing(self.radii, self.rise.value, RISE_OF_START)
        return None

    @property
    def bracket(self) -> tuple[float, ...]:
        """The radii to train with, beside none; empty where no rule tells any."""
        start = self.start
        if start is None or self.recipe is None:
            return ()
        return tuple(factor * start for factor in BRACKETS[self.recipe])

    @property
    def _height(self):
        guess = 0.0 if self.num_classes is None else np.log(self.num_classes)
        guess = max(guess, self.loss)
        return CLIFF.get(self.recipe, 0.5) * guess if guess > 0 else np.inf

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists by name; errors as ``NAME_standard_error``."""
        found = {"radii": np.asarray(self.radii).tolist(), "loss": float(self.loss)}
        for name in ("rise", "share", "kl", "changed", "cosine", "noise_over_weight"):
            estimate = getattr(self, name)
            if estimate is not None:
                found[name] = np.asarray(estimate.value).tolist()
                error = np.asarray(estimate.standard_error).tolist()
                found[f"{name}_standard_error"] = error
        return found | {
            "start": self.start,
            "bracket": list(self.bracket),
            "seconds": self.seconds,
        }

    def __str__(self):
        lines = [tables.table((*HEADER, ""), [(*row, "") for row in self._rows()])]
        for sentence in self._notes():
            lines += tables.wrapped(sentence)
        return "\n".join([lines[0], "", *lines[1:]])

    def _repr_html_(self):
        notes = "".join(tables.paragraph(sentence) for sentence in self._notes())
        return tables.html_table(HEADER, self._rows()) + notes

    def _rows(self):
        def cell(estimate, index, form="{:.2g}"):
            return "" if estimate is None else form.format(float(estimate.value[index]))

        return [
            (
                float(radius),
                cell(self.rise, i, "{:.3g}"),
                f"{float(self.rise.standard_error[i]):.1g}",
                cell(self.share, i),
                cell(self.kl, i),
                cell(self.changed, i),
                cell(self.cosine, i, "{:.3f}"),
                cell(self.noise_over_weight, i),
                self._verdict(i),
            )
            for i, radius in enumerate(np.asarray(self.radii))
        ]

    def _verdict(self, index):
        if self.does_nothing[index]:
            return "nothing"
        if self.beyond_cliff[index]:
            return "beyond"
        bracket = self.bracket
        between = bracket and bracket[0] <= self.radii[index] <= bracket[-1]
        return "try" if between else ""

    def _notes(self):
        """Sentences: what the columns are, then what to do."""
        notes = [f"The loss is {self.loss:.4g}. " + " ".join(MEANINGS)]
        beyond = (
            f"the rise is above {self._height:.3g}; more than half of such trainings "
            "collapsed in our study"
            if np.isfinite(self._height)
            else "the loss is not finite; classes, or a loss above 0, would tell more"
        )
        notes.append(
            "nothing: the rise is below 1e-4 of the loss, and training would be that without "
            f"perturbation. beyond: {beyond}."
        )
        notes.append(self._advice())
        if self.seconds is not None:
            notes.append(f"It took {tables.duration(self.seconds)} with compilation.")
        return notes

    def _advice(self):
        where = "See 'Which radius' in docs/choose.md, and docs/reproduce/radius.md."
        if self.recipe is None:
            return (
                f"No rule was measured for this kernel: search by factors of 2. {where}"
            )
        name = NAMES[self.recipe]
        if self.recipe == "nso" and self.kl is None:
            return f"Give model_fn: the rule for {name} needs the predictions. {where}"
        if not self.bracket:
            is_nso = self.recipe == "nso"
            what, values, target = (
                ("KL", self.kl.value, KL_OF_START)
                if is_nso
                else ("rise", self.rise.value, RISE_OF_START)
            )
            other = "larger" if float(values[0]) < target else "smaller"
            return (
                f"No radius has a {what} of {target} nats: give {other} ones. {where}"
            )
        radii = ", ".join(f"{radius:.2g}" for radius in self.bracket)
        reason = {
            "nso": "where the KL is 0.06 nats, and 3 times that",
            "sam": "where the loss rises by 0.5 nats, and 3 times that",
            "lpf": "half of 0.08, 0.08 and twice that, whatever the network",
        }[self.recipe]
        few = "two" if len(self.bracket) == 2 else "three"
        return (
            f"Try {few}, {name} = {radii}, and none, on validation data: {reason}; measured "
            f"where training starts. {where}"
        )


def crossing(radii, values, target):
    """The first radius at which values reach a target, between those measured.

    Along a power of the radius where the values are positive. What is not a number counts
    as above; there the last radius that is a number is taken. None where all are above, or
    none is.
    """
    radii, values = np.asarray(radii, float), np.asarray(values, float)
    above = ~(values < target)
    index = int(np.argmax(above))
    if not above.any() or (index == 0 and values[0] != target):
        return None
    low, high = values[index - 1], values[index]
    if index == 0 or high == target:
        return float(radii[index])
    if not np.isfinite(high):
        return float(radii[index - 1])
    if low > 0:
        low, high, target = np.log([low, high, target])
    share = (target - low) / (high - low)
    return float(radii[index - 1] * (radii[index] / radii[index - 1]) ** share)

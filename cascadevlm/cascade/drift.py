"""Whether a run still looks like the images that its scorer and judge were calibrated on.

Two numbers are watched, each over windows of `WINDOW` images that do not overlap: how sure the calibrated scorer is of its best
label, against how sure it was of the images of the calibration; and how often the judge names that label, against how often its
model expects it to, corrected by what the model was off on the images of the calibration. No prediction is changed, and only sums
are kept.

Images that come sorted, class by class, are unlike those of the calibration window by window.
"""

import warnings
from collections.abc import Sequence
from math import sqrt

import numpy as np

from cascadevlm.base.arrays import NOBODY
from cascadevlm.base.types import Prediction, Scores
from cascadevlm.cascade.observer import Observer
from cascadevlm.cascade.stage import Stage
from cascadevlm.decision.calibration import Calibration, Reference
from cascadevlm.decision.judge_model import Answers
from cascadevlm.scorers.base import Prepared

WINDOW = 500
"""Images after which a number is looked at; then it begins anew."""

DEVIATIONS = 5.0
"""How far a window may be off, in standard deviations. Chance goes beyond with probability 2 (1 - Φ(5)) = 5.7e-7: a million
images, the judge asked about all, are 2 × 2,000 windows; a false alarm comes in at most 4,000 × 5.7e-7 = 0.23 % of such runs."""

LEAST = 0.05
"""How far it must be off at least: no model is exact."""

LEAST_PROBABILITY = float(np.finfo(np.float32).tiny)
"""Of a candidate whose probability is 0 in single precision."""


class Drift(Observer):
    """Looks at one run, and warns once of each of the two numbers.

    A run that goes on where an earlier one was left begins its windows anew.

    Args:
        calibration: what the run is held against. The scorer is watched where labels gave it a `Reference`.
        stages: of the cascade. The judge is watched where it is the only one, and asked once about an image: otherwise a
            prediction does not tell what the first question was, least of all where the answer was a surprise.

    Warns:
        RuntimeWarning: if a number is off by more than `LEAST` and `DEVIATIONS`.
    """

    def __init__(self, calibration: Calibration, stages: Sequence[Stage]) -> None:
        self.calibration = calibration
        self.columns = {name: column for column, name in enumerate(calibration.labels)}
        self.stages = stages
        self.sureness = self.agreement = None
        if calibration.reference is not None:
            self.sureness = _Windows(calibration.reference, "the scorer's mean probability of its best label")
        if len(stages) == len(calibration.judges) == 1 and not stages[0].widen:
            reference = calibration.judges[0].reference
            self.agreement = _Windows(reference, "the share of the judge's answers that are the scorer's best label")

    def scored(self, numbers: Sequence[int], images: Sequence[Prepared], scores: Scores) -> None:
        """Look at the calibrated scores of the next images."""
        if self.sureness is not None:
            for probability in scores.probabilities.max(axis=1).tolist():
                self.sureness.add(probability)

    def predicted(self, number: int, prediction: Prediction) -> None:
        """Look at what the judge said of the next image; errors and spent budgets say nothing."""
        verdict, shown = prediction.verdict, prediction.candidates
        if self.agreement is None or verdict is None or verdict.outcome in ("failed", "skipped"):
            return
        columns = [self.columns[candidate.label.name] for candidate in shown]
        answers = Answers(
            candidates=np.array([columns]),
            answers=np.array([NOBODY if verdict.label is None else self.columns[verdict.label]]),
            none_offered=self.stages[0].offer_none,
        )
        probabilities = np.full((1, len(self.columns)), LEAST_PROBABILITY)
        probabilities[0, columns] = [max(candidate.probability, LEAST_PROBABILITY) for candidate in shown]
        (agreed,), (likely,) = self.calibration.judges[0].model.agreement(np.log(probabilities), answers)
        self.agreement.add(float(agreed), expected=float(likely), variance=float(likely * (1 - likely)))


class _Windows:
    """Numbers held against what is expected of them, window by window.

    Args:
        reference: what they were on the images of the calibration, less what was expected then.
        mean: what their mean is called.
    """

    def __init__(self, reference: Reference, mean: str) -> None:
        self.reference = reference
        self.mean = mean
        self.warned = False
        self._begin()

    def _begin(self) -> None:
        self.count, self.seen, self.expected, self.variance = 0, 0.0, 0.0, 0.0

    def add(self, seen: float, *, expected: float = 0.0, variance: float = 0.0) -> None:
        """Take the next number, and warn if the window that it ends is off.

        Args:
            variance: that is expected; the reference's counts, where that is greater.
        """
        self.count += 1
        self.seen += seen
        self.expected += expected
        self.variance += variance
        if self.count == WINDOW:
            if not self.warned:
                self._compare(self.seen / WINDOW, self.expected / WINDOW + self.reference.mean, self.variance / WINDOW)
            self._begin()

    def _compare(self, seen: float, expected: float, variance: float) -> None:
        variance = max(variance, self.reference.deviation**2)
        deviation = sqrt(variance * (1 / WINDOW + 1 / self.reference.images))  # the reference is a sample, too
        if abs(seen - expected) > max(LEAST, DEVIATIONS * deviation):
            self.warned = True
            warnings.warn(
                f"Over {WINDOW} images, {self.mean} is {seen:.2f} where the calibration expects {expected:.2f}. "
                "Unless the images come sorted, calibrate anew: cascadevlm calibrate.",
                RuntimeWarning,
                stacklevel=4,
            )

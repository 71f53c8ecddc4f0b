"""Detects drift: the images of a run no longer look like the images of the calibration.

Two numbers are watched over windows of `WINDOW` images that do not overlap:

- the mean probability of the scorer's best label, compared with the mean on the images of the calibration;
- the share of images for which the judge names that label, compared with the share that the judge's model expects. The expected
  share is corrected by the model's error on the images of the calibration.

No prediction is changed, and only sums are kept. If the images are sorted by class, each window differs from the calibration.
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
"""Number of images in a window."""

DEVIATIONS = 5.0
"""Largest difference of a window, in standard deviations. By chance, a window exceeds it with probability 2 (1 - Φ(5)) = 5.7e-7.
A million images, all judged, are 2 × 2,000 windows, so at most 4,000 × 5.7e-7 = 0.23 % of such runs have a false alarm."""

LEAST = 0.05
"""Smallest difference that is reported. Smaller differences are normal, because no model is exact."""

LEAST_PROBABILITY = float(np.finfo(np.float32).tiny)
"""Value that replaces the probability of a candidate if it is 0 in single precision."""


class Drift(Observer):
    """Watches one run. Warns at most once about each of the two numbers.

    A run that continues an earlier run begins with new windows.

    Args:
        calibration: the calibration that the run is compared with. The scorer is watched if the calibration has a `Reference`
            for it.
        stages: stages of the cascade. The judge is watched if it is the only judge and is asked once about each image. In all
            other cases, a prediction does not show the first question.

    Warns:
        RuntimeWarning: if a number differs by more than `LEAST` and by more than `DEVIATIONS` standard deviations.
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
        """Add the calibrated scores of the next images."""
        if self.sureness is not None:
            for probability in scores.probabilities.max(axis=1).tolist():
                self.sureness.add(probability)

    def predicted(self, number: int, prediction: Prediction) -> None:
        """Add the judge's verdict on the next image. Errors and spent budgets are not counted."""
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
    """Compares numbers with their expected values, window by window.

    Args:
        reference: the numbers on the images of the calibration, minus their expected values.
        mean: name of the mean of these numbers, for the warning.
    """

    def __init__(self, reference: Reference, mean: str) -> None:
        self.reference = reference
        self.mean = mean
        self.warned = False
        self._begin()

    def _begin(self) -> None:
        self.count, self.seen, self.expected, self.variance = 0, 0.0, 0.0, 0.0

    def add(self, seen: float, *, expected: float = 0.0, variance: float = 0.0) -> None:
        """Add the next number. If it completes a window that differs too much, warn.

        Args:
            seen: the number.
            expected: the expected number.
            variance: the expected variance. If the variance of the reference is larger, it is used instead.
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
        deviation = sqrt(variance * (1 / WINDOW + 1 / self.reference.images))  # the reference is also a sample
        if abs(seen - expected) > max(LEAST, DEVIATIONS * deviation):
            self.warned = True
            warnings.warn(
                f"In {WINDOW} images, {self.mean} is {seen:.2f}; the calibration expects {expected:.2f}. "
                "If the images are not sorted by class, make a new calibration: cascadevlm calibrate.",
                RuntimeWarning,
                stacklevel=4,
            )

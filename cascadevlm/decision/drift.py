"""Whether a run still looks like the images that its scorer and judge were calibrated on.

Two numbers are watched, each over windows of `WINDOW` images that do not overlap: how sure the calibrated scorer is of its best
label, against how sure it was of the images of the calibration; and how often the judge names that label, against how often the
model of the judge expects it to. No prediction is changed by it. Only sums are kept. Images in an order that means something,
as class by class, are not like those of the calibration either, window by window.
"""

import warnings
from math import sqrt

import numpy as np

from cascadevlm.decision.calibration import Calibration
from cascadevlm.stage import Stage
from cascadevlm.types import Prediction, Scores

WINDOW = 500
"""Images after which the two numbers are looked at; then they begin anew."""

DEVIATIONS = 5.0
"""Of a window's number from what is expected, in standard deviations. Chance goes beyond with probability 2 (1 - Φ(5)) = 5.7e-7:
a million images, of which the judge is asked about every one, have 2 × 2,000 windows, and a false alarm in 4,000 × 5.7e-7 = 0.23 %
of such runs at most."""

LEAST = 0.05
"""Of the difference in mean probability or share of answers: no calibration is exact, and with many images to compare with, less
would be found too."""


class Drift:
    """Looks at one run, and warns once of each of the two numbers.

    A run that goes on where an earlier one was left begins its windows anew.

    Args:
        calibration: what the run is held against; without a `Reference`, the scores are not looked at.
        stages: of the cascade. Judges are looked at where there is one that is asked once about an image: with several stages or
            lists that grow wider, a prediction does not tell what the first question was, least of all where its answer
            disagreed.

    Warns:
        RuntimeWarning: if the images are others than those of the calibration.
    """

    def __init__(self, calibration: Calibration, stages: tuple[Stage, ...]) -> None:
        self.calibration = calibration
        self.columns = {name: column for column, name in enumerate(calibration.labels)}
        self.stage = stages[0] if len(stages) == 1 and not stages[0].widen else None
        reference = calibration.reference
        self.sureness = _Windows(reference.images if reference else 0, "the scorer gives its best label a mean probability of")
        self.agreement = _Windows(calibration.images, "the judge names the scorer's best label with a frequency of")

    def scored(self, scores: Scores) -> None:
        """Look at the calibrated scores of the next images."""
        reference = self.calibration.reference
        if reference is not None:
            for sureness in scores.probabilities.max(axis=1).tolist():
                self.sureness.add(sureness, reference.mean, reference.deviation**2)

    def predicted(self, prediction: Prediction) -> None:
        """Look at what the judge said of the next image, if it was asked; errors and spent budgets say nothing."""
        if self.stage is None or prediction.verdict is None or prediction.verdict.outcome in ("failed", "skipped"):
            return
        shown = prediction.candidates
        probabilities = np.array([[candidate.probability for candidate in shown]])
        (likely,) = self.calibration.judges[0].model.naming(
            np.log(np.maximum(probabilities, np.finfo(np.float32).tiny)),
            np.array([[self.columns[candidate.label.name] for candidate in shown]]),
            none_offered=self.stage.offer_none,
        )
        (place,) = (place for place, candidate in enumerate(shown) if candidate.rank == 1)
        expected = float(likely[place])
        self.agreement.add(prediction.verdict.label == shown[place].label.name, expected, expected * (1 - expected))


class _Windows:
    """Numbers against what is expected of them, over one window after another until one differs.

    Args:
        images: that the expectation comes from; its own error counts, too.
        what: the numbers are, for the warning.
    """

    def __init__(self, images: int, what: str) -> None:
        self.images = images
        self.what = what
        self.warned = False
        self._begin()

    def _begin(self) -> None:
        self.count, self.seen, self.expected, self.variance = 0, 0.0, 0.0, 0.0

    def add(self, seen: float, expected: float, variance: float) -> None:
        """Take the next number, and warn if it ends a window that differs."""
        self.count += 1
        self.seen += seen
        self.expected += expected
        self.variance += variance
        if self.count < WINDOW:
            return
        difference = abs(self.seen - self.expected) / WINDOW
        deviation = sqrt(self.variance / WINDOW * (1 / WINDOW + 1 / self.images))
        if difference >= LEAST and difference > DEVIATIONS * deviation and not self.warned:
            self.warned = True
            warnings.warn(
                f"Over {WINDOW} images, {self.what} {self.seen / WINDOW:.2f}; by the calibration it would be "
                f"{self.expected / WINDOW:.2f}. If the images do not just come sorted, calibrate anew: cascadevlm calibrate.",
                RuntimeWarning,
                stacklevel=3,
            )
        self._begin()

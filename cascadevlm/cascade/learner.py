"""The learning of a run, between the engine, which has scores and verdicts, and `Learning`, which is mathematics."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from cascadevlm.base.errors import ConfigError
from cascadevlm.base.types import Scores
from cascadevlm.cascade.candidates import ConformalSet
from cascadevlm.cascade.stage import Stage
from cascadevlm.decision.calibration import Calibration
from cascadevlm.decision.conformal import Conformal
from cascadevlm.decision.distinct import Keys
from cascadevlm.decision.learning import LEAST, Learned, Learning
from cascadevlm.decision.teaching import Labelled, Taught, Transduced

MOST_BYTES = 60_000_000
"""Largest size of what a run keeps of what it learned."""

CROWDED, RARE = 1 / 3, 1 / 10
"""Images that come class by class: one label has more than the first share of a period, and less than the second before."""

CALIBRATE_AGAIN = "Calibrate again, with labels: cascadevlm calibrate."


class Learner:
    """What one run has learned. The scores of each batch are adapted to it, and the beliefs after the verdicts are added to it.

    Args:
        calibration: its labelled images are what learning starts from; its scorer's scores are adapted.
        batch_size: of the run.
        stages: the stages of the cascade. If their candidates have a coverage, the threshold is fitted again for each period.
        start: what the run had learned where it goes on. Default: a new run.
        unlabelled: what all images of the run taught before the run. Default: they were not looked at before.

    Raises:
        ConfigError: as `require_support`.
        InputError: as `Learning`.

    Warns:
        RuntimeWarning: once, if the images seem to come class by class.
    """

    def __init__(
        self,
        calibration: Calibration,
        batch_size: int,
        stages: Sequence[Stage] = (),
        start: Learned | None = None,
        unlabelled: Transduced | None = None,
    ) -> None:
        self.calibration = calibration
        self.stages = stages
        self.labelled = require_support(calibration)
        self.learning = Learning(self.labelled, batch_size, start=start, unlabelled=unlabelled)
        self._scored: dict[int, tuple[Scores, Scores, Keys]] = {}
        self._thresholds: tuple[Taught | None, Mapping[float, float]] = (None, {})
        self._warned = False

    @property
    def learned(self) -> Learned:
        """What the run had learned at the beginning of the period of the latest batch with verdicts."""
        return self.learning.learned

    async def adapted(self, scores: Scores, begin: int, keys: Keys) -> Scores:
        """The scores of a batch with what was learned for its period. Waits until that is known.

        Args:
            scores: the scorer's, not calibrated, with embeddings.
            begin: number of the first image of the batch in the run.
            keys: `(n,)` keys of the images: nothing is learned from an image that came before.

        Raises:
            ConfigError: as `require_teachable`.
            InputError: if the labelled images are too few for the coverage of the candidates.
        """
        require_teachable(scores, self.calibration)
        adapted = self.scores_by(await self.learning.taught(begin), scores)
        self._scored[begin] = scores, adapted, keys
        return adapted

    def scores_by(self, taught: Taught, scores: Scores) -> Scores:
        """The scores, which have embeddings, with what was learned."""
        assert scores.embeddings is not None
        if self._thresholds[0] is not taught:
            self._thresholds = taught, thresholds(self.stages, self.labelled, taught)
        return replace(
            scores,
            log_probs=taught(scores.log_probs, scores.embeddings).astype(np.float32),
            fingerprint=f"{scores.fingerprint}|learning",
            thresholds=self._thresholds[1],
        )

    async def take(
        self, decided: Scores | None, beliefs: Sequence[NDArray[np.float32]], judged: Sequence[bool], begin: int
    ) -> None:
        """Add the n readable images of a batch, which was adapted before. Batches are added in order.

        Args:
            decided: `(n, C)` the scores that decisions were made with: adapted, and shifted to other shares of the classes if
                these are followed. None if n is 0.
            beliefs: n rows `(C,)`, the probabilities after the verdicts.
            judged: for each of the n images, whether a judge answered.
            begin: number of the first image of the batch in the run.
        """
        period = self.learned.images
        if decided is None:
            nothing = self.labelled
            empty = np.empty((0, len(self.calibration.labels)))
            await self.learning.take(empty, nothing.embeddings[:0], empty, np.empty(0, dtype=bool), begin)
        else:
            scores, adapted, keys = self._scored.pop(begin)
            assert scores.embeddings is not None
            said = np.log(np.maximum(np.stack(beliefs), LEAST)) - decided.log_probs
            before_shift = np.exp(log_softmax(adapted.log_probs + said, axis=1))
            await self.learning.take(scores.log_probs, scores.embeddings, before_shift, np.array(judged), begin, keys)
        if self.learned.images != period and self.learning.unlabelled is None:  # else, no order is harmful
            self._warn_if_sorted()

    def _warn_if_sorted(self) -> None:
        """Compare the period that has ended with all that came before it, with the images of the calibration."""
        before = self.learned.before.counts[-1]
        latest, earlier = self.learned.sums.counts[-1] - before, before + self.labelled.support[-1].counts
        crowded = (latest > CROWDED * latest.sum()) & (earlier < RARE * earlier.sum())
        if crowded.any() and not self._warned:
            self._warned = True
            warnings.warn(
                f"The images seem to come class by class: {self.calibration.labels[int(crowded.argmax())]!r} has more than a "
                "third of the latest images and less than a tenth of those before. Learning needs images in random order.",
                RuntimeWarning,
                stacklevel=2,
            )


def thresholds(stages: Sequence[Stage], labelled: Labelled, taught: Taught) -> Mapping[float, float]:
    """For each coverage of the stages' candidates, the threshold for scores by what was learned (`Conformal.threshold`).

    It is fitted to the labelled images, each scored without what its own label taught. The coverage is kept if these images and
    the images of the run are in random order together. In a run that is sorted, or whose images change, it is not kept.

    Raises:
        InputError: if the labelled images are too few for a coverage.
    """
    coverages = {stage.candidates.rule.coverage for stage in stages if isinstance(stage.candidates, ConformalSet)}
    probabilities = np.exp(taught.held_out)
    return {each: Conformal.fit(probabilities, labelled.truths, coverage=each).threshold for each in coverages}


def require_teachable(scores: Scores, calibration: Calibration) -> None:
    """Raises ConfigError if a run cannot learn from scores: they are calibrated already, or have no embeddings."""
    if scores.fingerprint == calibration.calibrated_fingerprint:
        hint = "Give the cascade the scorer itself, without its calibration."
        raise ConfigError("learn = true calibrates the scores itself, and these scores are calibrated already.", hint=hint)
    if scores.embeddings is None:
        hint = "Use an open_clip or hf scorer, or set learn = false."
        raise ConfigError(f"The scorer {scores.fingerprint!r} makes no embeddings, which learn = true needs.", hint=hint)


def require_support(calibration: Calibration) -> Labelled:
    """The labelled images of a calibration, from which a run can learn.

    Raises:
        ConfigError: if it has none, or the classes and dimensions are too many.
    """
    support = calibration.support
    if support is None or not len(support.truths):
        raise ConfigError("learn = true needs a calibration that has labelled images with embeddings.", hint=CALIBRATE_AGAIN)
    classes, dimensions = len(calibration.labels), support.embeddings.shape[1]
    size = 2 * (len(support.calibrations) * classes * dimensions + dimensions**2) * 8
    if size > MOST_BYTES:
        raise ConfigError(
            f"What a run learns about {classes:,} labels and {dimensions:,} dimensions has {size / 1e6:.0f} MB, more than "
            f"{MOST_BYTES // 1_000_000}.",
            hint="Learn for fewer labels, or use a scorer of fewer dimensions.",
        )
    return support

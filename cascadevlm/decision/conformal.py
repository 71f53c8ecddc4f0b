"""Conformal prediction: short lists of labels that hold the truth as often as was asked for, whatever the scorer.

A label's score is the probability of all labels that rank before it, plus u times its own, plus, in RAPS, a penalty for every
rank beyond the first few; u is uniform on 0 to 1 and drawn for each image, or left out. The threshold is the
ceil((n + 1) coverage)-th smallest score of the truths of n labelled images. An image's set is the labels of a score up to it.

- Deterministic, as lists of candidates are made, both scores and sets leave u out: a label's score is what ranks before it. The
  set holds the truth of a new image with a probability of at least the coverage, and at most 1/(n + 1) more but for equal scores:
  where the best label alone is right more often than asked for, sets have one label and cover as often as it is right. It is
  never empty.
- Randomised, with u drawn for the image too, the same holds without exception, and the set can be empty.
- With u drawn for the scores alone, the set that leaves it out holds every randomised one, and covers more than was asked for.

All this needs is that the labelled and the new images come in no particular order (exchangeable), and that the probabilities
were not fitted on these labels: calibrate the scorer on other images, or leave it as it is. With the probabilities that
`fit_scorer` returns of the labelled images, as fitted on the other folds, it holds nearly. It is true on average over images
and draws of the labelled ones; with a threshold for each class, also over the images of each class.

Sources: Romano, Sesia and Candès, "Classification with Valid and Adaptive Coverage", NeurIPS 2020 (APS); Angelopoulos,
Bates, Malik and Jordan, "Uncertainty Sets for Image Classifiers using Conformal Prediction", ICLR 2021 (RAPS); Vovk,
"Conditional validity of inductive conformal predictors", ACML 2012 (a threshold for each class).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cascadevlm.base.arrays import Columns
from cascadevlm.base.errors import InputError
from cascadevlm.decision.judge_model import Bools, JudgeModel
from cascadevlm.decision.scorer_calibration import Floats, StoredFloats

PENALTY, FREE = 0.01, 5
"""RAPS's for a rank, and the ranks that have none: those of Angelopoulos and Bates, "A Gentle Introduction to Conformal
Prediction and Distribution-Free Uncertainty Quantification", 2021."""

ROUNDING = 1e-9
"""How much more than a whole number still is one."""


@dataclass(frozen=True, kw_only=True)
class Conformal:
    """The rule that makes sets of labels of probabilities.

    Attributes:
        coverage: how often, at least, the truth shall be in the set; between 0 and 1.
        threshold: of the scores.
        class_thresholds: C, one for each class; None where all have the same.
        penalty: for a rank, in RAPS; 0 in APS.
        free: the ranks without.
    """

    coverage: float
    threshold: float
    class_thresholds: StoredFloats | None = None
    penalty: float = 0.0
    free: int = FREE

    @classmethod
    def fit(
        cls,
        probabilities: NDArray[np.floating],
        truths: Columns,
        *,
        coverage: float,
        penalty: float = 0.0,
        free: int = FREE,
        class_conditional: bool = False,
        u: Floats | int | None = None,
    ) -> "Conformal":
        """Split-conformal calibration on N labelled images.

        Args:
            probabilities: N x C, rows sum to 1; not fitted on these truths.
            truths: N columns.
            penalty: `PENALTY` is RAPS's, 0 makes it APS.
            class_conditional: whether every class has its own threshold. One with n images where ceil((n + 1) coverage) > n
                has too few for it; it shares the one of all images, and the promise does not hold for it alone.
            u: for randomised sets, N numbers from 0 to 1, or the seed of them.

        Raises:
            InputError: if the coverage is not between 0 and 1, or N images cannot promise it.
        """
        if not 0 < coverage < 1:
            raise InputError(f"coverage is a probability between 0 and 1, not {coverage!r}.")
        size = len(truths)
        if _rank(size, coverage) > size:
            enough = math.ceil(coverage / (1 - coverage) - ROUNDING)
            raise InputError(
                f"{size} labelled images can promise a coverage of at most {size / (size + 1):.3g}, not {coverage!r}.",
                hint=f"Label at least {enough}, or ask for less.",
            )
        rule = cls(coverage=coverage, threshold=math.inf, penalty=penalty, free=free)
        ranking, descending = _ranked(probabilities)
        place = (ranking == truths[:, None]).argmax(axis=1)
        scores = rule._scores(descending, u)[np.arange(size), place]
        threshold = _quantile(scores, coverage)
        own = [_quantile(scores[truths == column], coverage) for column in range(probabilities.shape[1] * class_conditional)]
        return cls(
            coverage=coverage,
            threshold=threshold,
            class_thresholds=np.where(np.isinf(own), threshold, own) if class_conditional else None,
            penalty=penalty,
            free=free,
        )

    def sizes(self, descending: NDArray[np.floating], *, minimum: int = 1, maximum: int | None = None) -> NDArray[np.intp]:
        """How many of the most probable labels the deterministic set of each of N images has.

        Args:
            descending: N x K probabilities of the best labels in descending order; no set has more than K.
            minimum: at least so many, as far as there are labels.
            maximum: at most so many: what is cut off is missing from the coverage.

        Raises:
            InputError: with a threshold for each class, as these sets are not the most probable labels.
        """
        if self.class_thresholds is not None:
            raise InputError("Sets with a threshold for each class are not the most probable labels.", hint="Use sets().")
        inside = self._scores(descending) <= self.threshold
        sizes: NDArray[np.intp] = _bounded(inside, minimum, maximum).sum(axis=1)
        return sizes

    def sets(
        self,
        probabilities: NDArray[np.floating],
        *,
        minimum: int = 0,
        maximum: int | None = None,
        u: Floats | int | None = None,
    ) -> Bools:
        """N x C: whether the label is in the set of the image.

        Args:
            probabilities: N x C.
            minimum: at least so many of the most probable labels are in it, as far as there are labels.
            maximum: at most so many, the most probable ones of the set: what is cut off is missing from the coverage.
            u: for randomised sets, N numbers from 0 to 1, or the seed of them.
        """
        ranking, descending = _ranked(probabilities)
        scores = self._scores(descending, u)
        inside = scores <= (self.threshold if self.class_thresholds is None else self.class_thresholds[ranking])
        found = np.empty_like(inside)
        np.put_along_axis(found, ranking, _bounded(inside, minimum, maximum), axis=1)
        return found

    def _scores(self, descending: NDArray[np.floating], u: Floats | int | None = None) -> Floats:
        """N x C, of the labels in descending order; without u, those that no u makes less."""
        ranks = np.arange(1, descending.shape[1] + 1)
        if u is None:
            return _before(descending) + self._penalties(ranks - 1)
        drawn = np.random.default_rng(u).random(len(descending)) if isinstance(u, int) else u
        return _before(descending) + drawn[:, None] * descending + self._penalties(ranks)

    def _penalties(self, ranks: NDArray[np.intp]) -> Floats:
        penalties: Floats = self.penalty * np.maximum(ranks - self.free, 0)
        return penalties


def best_size(
    log_probs: Floats, model: JudgeModel, sizes: Sequence[int], *, none_offered: bool = False, word_final: bool = False
) -> int:
    """How many of the most probable labels to show, that the expected accuracy after asking about all N images is highest.

    A longer list holds the truth more often, and the judge finds it there less often. The expected accuracy is the mean over
    images of the best label's probability now, which is the same for every size, plus `JudgeModel.gain`. Of equal sizes the
    smallest.

    Args:
        log_probs: N x C, the scorer's, calibrated.
        sizes: to choose from.
        none_offered: whether "none of these" is an option.
        word_final: whether the judge's answer is final.
    """
    ranking = np.argsort(-log_probs, axis=1, kind="stable")
    gains = {
        size: model.gain(log_probs, ranking[:, :size], none_offered=none_offered, word_final=word_final).mean() for size in sizes
    }
    return min(sizes, key=lambda size: (-round(gains[size], 9), size))


def _rank(size: int, coverage: float) -> int:
    """Which of the scores of so many images, from the smallest on, is the threshold; beyond them where they are too few."""
    return math.ceil((size + 1) * coverage - ROUNDING)


def _quantile(scores: Floats, coverage: float) -> float:
    rank = _rank(len(scores), coverage)
    return math.inf if rank > len(scores) else float(np.partition(scores, rank - 1)[rank - 1])


def _ranked(probabilities: NDArray[np.floating]) -> tuple[NDArray[np.intp], NDArray[np.floating]]:
    """N x C columns, best first, and their probabilities; of equal ones the earlier first, as where candidates are chosen."""
    ranking = np.argsort(-probabilities, axis=1, kind="stable")
    return ranking, np.take_along_axis(probabilities, ranking, axis=1)


def _before(descending: NDArray[np.floating]) -> Floats:
    """N x C: the sum of all probabilities that rank higher."""
    return np.pad(descending.cumsum(axis=1, dtype=np.float64)[:, :-1], ((0, 0), (1, 0)))


def _bounded(inside: Bools, minimum: int, maximum: int | None) -> Bools:
    """Of sets of labels in descending order, those of at least and at most so many."""
    inside[:, :minimum] = True
    bounded: Bools = inside if maximum is None else inside & (inside.cumsum(axis=1) <= maximum)
    return bounded

"""Conformal prediction: short lists of labels that contain the truth with a chosen probability, for any scorer.

The score of a label is the total probability of all labels that rank before it. The threshold is the ceil((n + 1) coverage)-th
smallest score of the true labels of n labelled images. The set of an image contains the labels whose score is at most the
threshold. The set contains the truth of a new image with a probability of at least the coverage, and at most 1/(n + 1) more if
no two scores are equal. A set is never empty. So if the best label is right more often than the coverage, every set has one
label, and contains the truth as often as this label is right.

There are two assumptions. First, the labelled and the new images come in random order (they are exchangeable). Second, the
probabilities were not fitted to these labels: the scorer is calibrated on other images, or not at all. With the held-out
probabilities that `fit_scorer` returns, the coverage is reached closely, but is not guaranteed strictly.

The coverage is an average over images and over draws of the labelled images. With one threshold per class, it is also reached on
average over the images of each class.

Sources: Romano, Sesia and Candès, "Classification with Valid and Adaptive Coverage", NeurIPS 2020 (APS, without its random
number); Vovk, "Conditional validity of inductive conformal predictors", ACML 2012 (one threshold per class).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cascadevlm.base.arrays import Columns
from cascadevlm.base.errors import InputError
from cascadevlm.decision.guarantee import require_probability
from cascadevlm.decision.judge_model import Bools, JudgeModel
from cascadevlm.decision.scorer_calibration import Floats, StoredFloats

ROUNDING = 1e-9
"""Tolerance for rounding errors: a number that exceeds a whole number by less than this counts as the whole number."""


@dataclass(frozen=True, kw_only=True)
class Conformal:
    """A rule that makes a set of labels from the probabilities of an image.

    Attributes:
        coverage: probability that the set contains the truth, between 0 and 1.
        threshold: largest score of a label in the set.
        class_thresholds: ``(C,)`` thresholds per class; None if all classes share one threshold.
    """

    coverage: float
    threshold: float
    class_thresholds: StoredFloats | None = None

    @classmethod
    def fit(
        cls,
        probabilities: NDArray[np.floating],
        truths: Columns,
        *,
        coverage: float,
        class_conditional: bool = False,
    ) -> "Conformal":
        """Split-conformal calibration on N labelled images.

        Args:
            probabilities: ``(N, C)``; rows sum to 1. They must not be fitted to these truths.
            truths: ``(N,)`` columns of the true labels.
            coverage: probability that a set contains the truth, between 0 and 1.
            class_conditional: whether every class has its own threshold. A class with n images is too small for its own
                threshold if ceil((n + 1) coverage) > n. Such a class uses the threshold of all images, and its own coverage is
                not guaranteed.

        Raises:
            InputError: if the coverage is not between 0 and 1, or N images are too few for it.
        """
        require_probability("coverage", coverage)
        size = len(truths)
        if _rank(size, coverage) > size:
            enough = math.ceil(coverage / (1 - coverage) - ROUNDING)
            raise InputError(
                f"{size} labelled images support a coverage of at most {size / (size + 1):.3g}, not {coverage!r}.",
                hint=f"Label at least {enough} images, or choose a lower coverage.",
            )
        ranking, descending = _ranked(probabilities)
        place = (ranking == truths[:, None]).argmax(axis=1)
        scores = _before(descending)[np.arange(size), place]
        threshold = _quantile(scores, coverage)
        own = [_quantile(scores[truths == column], coverage) for column in range(probabilities.shape[1] * class_conditional)]
        return cls(
            coverage=coverage,
            threshold=threshold,
            class_thresholds=np.where(np.isinf(own), threshold, own) if class_conditional else None,
        )

    def sizes(self, descending: NDArray[np.floating], *, minimum: int = 1, maximum: int | None = None) -> NDArray[np.intp]:
        """``(N,)`` sizes of the sets. Each set contains the most probable labels of its image.

        Args:
            descending: ``(N, K)`` probabilities of the best labels in descending order. No set has more than K labels.
            minimum: smallest size of a set. A set cannot be larger than the number of labels.
            maximum: largest size of a set. Default: no limit. Labels that are cut off reduce the coverage.

        Raises:
            InputError: if each class has its own threshold, because the sets are then not the most probable labels.
        """
        if self.class_thresholds is not None:
            raise InputError(
                "With one threshold per class, a set may leave out a label that is more probable than another label in the set.",
                hint="Use sets().",
            )
        inside = _before(descending) <= self.threshold
        sizes: NDArray[np.intp] = _bounded(inside, minimum, maximum).sum(axis=1)
        return sizes

    def sets(self, probabilities: NDArray[np.floating], *, minimum: int = 1, maximum: int | None = None) -> Bools:
        """``(N, C)`` booleans: the label is in the set of the image.

        Args:
            probabilities: ``(N, C)``; rows sum to 1.
            minimum: this number of the most probable labels is always in the set.
            maximum: only this number of the most probable labels of the set is kept. Default: no limit. Labels that are cut off
                reduce the coverage.
        """
        ranking, descending = _ranked(probabilities)
        inside = _before(descending) <= (self.threshold if self.class_thresholds is None else self.class_thresholds[ranking])
        found = np.empty_like(inside)
        np.put_along_axis(found, ranking, _bounded(inside, minimum, maximum), axis=1)
        return found


def best_size(
    log_probs: Floats, model: JudgeModel, sizes: Sequence[int], *, none_offered: bool = False, word_final: bool = False
) -> int:
    """The number of candidates with the highest expected accuracy after a question about each of N images.

    A longer list contains the truth more often, but the judge finds the truth in it less often. The expected accuracy is the mean
    probability of the best label without a question, which is the same for every size, plus the mean `JudgeModel.gain`. If
    several sizes are equally good, the smallest is returned.

    Args:
        log_probs: ``(N, C)`` calibrated log-probabilities of the scorer.
        model: the judge's model.
        sizes: the sizes to choose from.
        none_offered: whether "none of these" is an option.
        word_final: whether the judge's answer is the final label.
    """
    ranking = np.argsort(-log_probs, axis=1, kind="stable")
    gains = {
        size: model.gain(log_probs, ranking[:, :size], none_offered=none_offered, word_final=word_final).mean() for size in sizes
    }
    return min(sizes, key=lambda size: (-round(gains[size], 9), size))


def _rank(size: int, coverage: float) -> int:
    """The threshold is the score with this rank, counted from 1 for the smallest. The rank is larger than ``size`` if there are
    too few images.
    """
    return math.ceil((size + 1) * coverage - ROUNDING)


def _quantile(scores: Floats, coverage: float) -> float:
    rank = _rank(len(scores), coverage)
    return math.inf if rank > len(scores) else float(np.partition(scores, rank - 1)[rank - 1])


def _ranked(probabilities: NDArray[np.floating]) -> tuple[NDArray[np.intp], NDArray[np.floating]]:
    """``(N, C)`` columns, best first, and their probabilities. Labels of equal probability stay in column order."""
    ranking = np.argsort(-probabilities, axis=1, kind="stable")
    return ranking, np.take_along_axis(probabilities, ranking, axis=1)


def _before(descending: NDArray[np.floating]) -> Floats:
    """``(N, C)`` sums of all probabilities that rank higher."""
    return np.pad(descending.cumsum(axis=1, dtype=np.float64)[:, :-1], ((0, 0), (1, 0)))


def _bounded(inside: Bools, minimum: int, maximum: int | None) -> Bools:
    """Sets of labels in descending order, enlarged to ``minimum`` labels and cut off after ``maximum`` labels."""
    inside[:, :minimum] = True
    bounded: Bools = inside if maximum is None else inside & (inside.cumsum(axis=1) <= maximum)
    return bounded

"""Conformal prediction: short lists of labels that contain the truth as often as was asked for, whatever the scorer.

The score of a label is the total probability of all labels that rank before it. The threshold is the ceil((n + 1) coverage)-th
smallest score of the true labels of n labelled images. The set of an image holds the labels whose score is at most the threshold.

The set holds the truth of a new image with a probability of at least the coverage, and at most 1/(n + 1) more if no two scores
are equal. Where the best label alone is right more often than asked for, every set has one label and covers as often as that
label is right. A set is never empty.

Two things are assumed. The labelled and the new images come in no particular order (exchangeable). The probabilities were not
fitted to these labels: calibrate the scorer on other images, or leave it as it is. With the probabilities that `fit_scorer`
returns for the labelled images, each fitted on the other folds, the promise holds closely. It holds on average over images and
over draws of the labelled images; with one threshold per class, also on average over the images of each class.

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
"""How much more than a whole number still is one."""


@dataclass(frozen=True, kw_only=True)
class Conformal:
    """The rule that makes sets of labels of probabilities.

    Attributes:
        coverage: how often, at least, the truth shall be in the set; between 0 and 1.
        threshold: of the scores.
        class_thresholds: (C,), one threshold per class; None if all classes share one.
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
            probabilities: N x C, rows sum to 1; not fitted on these truths.
            truths: N columns.
            class_conditional: whether every class has its own threshold. One with n images where ceil((n + 1) coverage) > n
                has too few for it; it shares the one of all images, and the promise does not hold for it alone.

        Raises:
            InputError: if the coverage is not between 0 and 1, or N images cannot promise it.
        """
        require_probability("coverage", coverage)
        size = len(truths)
        if _rank(size, coverage) > size:
            enough = math.ceil(coverage / (1 - coverage) - ROUNDING)
            raise InputError(
                f"{size} labelled images can promise a coverage of at most {size / (size + 1):.3g}, not {coverage!r}.",
                hint=f"Label at least {enough}, or ask for less.",
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
        inside = _before(descending) <= self.threshold
        sizes: NDArray[np.intp] = _bounded(inside, minimum, maximum).sum(axis=1)
        return sizes

    def sets(self, probabilities: NDArray[np.floating], *, minimum: int = 1, maximum: int | None = None) -> Bools:
        """N x C: whether the label is in the set of the image.

        Args:
            probabilities: N x C.
            minimum: at least so many of the most probable labels are in it, as far as there are labels.
            maximum: at most so many, the most probable ones of the set: what is cut off is missing from the coverage.
        """
        ranking, descending = _ranked(probabilities)
        inside = _before(descending) <= (self.threshold if self.class_thresholds is None else self.class_thresholds[ranking])
        found = np.empty_like(inside)
        np.put_along_axis(found, ranking, _bounded(inside, minimum, maximum), axis=1)
        return found


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

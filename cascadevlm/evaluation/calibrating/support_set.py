"""The labelled images of a record as a support set: they teach the scorer through its embeddings."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cascadevlm.base.arrays import Columns
from cascadevlm.decision.adapting import FEWEST_IMAGES, first_alike
from cascadevlm.decision.scorer_calibration import CrossFit, Floats, cross_fit_scorer, fold_of, surely_better
from cascadevlm.decision.teaching import Labelled
from cascadevlm.evaluation.record import Record
from cascadevlm.scorers.adapters import MOST_NUMBERS

MOST_SUPPORT = 5000
"""The most labelled images that a calibration keeps. Its file has about 2.5 kB per image with 512 dimensions and 200 labels."""


@dataclass(frozen=True, kw_only=True)
class SupportSet:
    """The labelled images of a record as a support set.

    Attributes:
        labelled: the images without near-duplicates.
        rows: ``(n,)`` rows of these images in the record.
        held_out: ``(N, C)`` log-probabilities of all images of the record. What is learned for an image is learned without the
            image, its near-duplicates, and the rest of their fold.
        truths: ``(N,)`` columns.
    """

    labelled: Labelled
    rows: NDArray[np.intp]
    held_out: Floats
    truths: Columns

    @classmethod
    def of(cls, record: Record, scorer: CrossFit, prior: Floats | None) -> "SupportSet | None":
        """None without embeddings, if there are too few different images, or too many labels times dimensions.

        Args:
            scorer: the fit of the scorer's calibration to all images.
            prior: ``(C,)`` class shares that the calibration may be matched to. Default: equal shares.
        """
        scores, truths = record.scores, record.truths
        if scores.embeddings is None or len(record.labels) * scores.embeddings.shape[1] > MOST_NUMBERS:
            return None
        first = first_alike(scores.embeddings.astype(np.float32), truths)
        different = np.unique(first)
        if len(different) < FEWEST_IMAGES:
            return None
        rows = np.sort(np.random.default_rng(0).permutation(different)[:MOST_SUPPORT])
        fit = scorer
        if len(rows) < len(record) or scorer.calibration.mixing is not None:  # with a matrix, no adapter could be made later
            known = np.eye(len(record.labels))[truths[rows]]
            fit = cross_fit_scorer(scores.log_probs[rows], known, prior=prior, matrix=False)
        fit = replace(fit, held_out=fit.held_out.astype(np.float32).astype(np.float64))  # as a file keeps them
        labelled = Labelled(embeddings=scores.embeddings[rows], truths=truths[rows], fit=fit)
        taught, folds = labelled.taught(labelled.nothing()), np.full(len(record), -1)
        folds[rows] = fold_of(len(rows))
        folds, held_out = folds[first], np.empty(scores.log_probs.shape)
        for fold in np.unique(folds):
            inside = folds == fold
            held_out[inside] = taught.opinion(fold, scores.log_probs[inside], scores.embeddings[inside])
        return cls(labelled=labelled, rows=rows, held_out=held_out, truths=truths)

    def surely_better_than(self, scorer: CrossFit) -> bool:
        """Whether the images are the better calibration of the scorer, by more than one standard error of the log-likelihood."""
        truths = self.truths[self.rows]
        return surely_better(self.held_out[self.rows, truths], scorer.held_out[self.rows, truths])

"""How often the final answers of a certificate are right, on labelled images. Agreement is not accuracy."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.decision.certifying import Certificate
from cascadevlm.decision.judge_model import Bools
from cascadevlm.decision.opinions import FEWEST_ANSWERS, Images
from cascadevlm.decision.scorer_calibration import cross_fit_scorer, floored


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How often answers are right, on labelled images. Agreement is not accuracy.

    Attributes:
        labelled: number of labelled images.
        certified: share of right final answers of a certificate.
        judge: share of right answers of the judge among the labelled images that it was asked about; None without such images.
        fused: share of right final answers if both opinions are fused for each image that was asked about.
    """

    labelled: int
    certified: float
    judge: float | None
    fused: float

    @property
    def sentence(self) -> str:
        """The shares in words."""
        judge = "" if self.judge is None else f", the judge on {self.judge:.1%} of those that it was asked about"
        return (
            f"On {self.labelled:,} labelled images, the labels are right on {self.certified:.1%}{judge}, and scorer and judge "
            f"together on {self.fused:.1%}."
        )


def certified_accuracy(certificate: Certificate, images: Images, answers: Columns, truths: Columns) -> Accuracy:
    """How often the final answers are right, and how often they would be right if the scorer's opinion counted too.

    Args:
        certificate: of these images.
        images: of the scorer.
        answers: `(N,)` answers of the judge, below 0 where it named no class; those of kept images are not used.
        truths: `(N,)` columns, `NOBODY` where the label is not known.
    """
    labelled = np.flatnonzero(truths != NOBODY)
    asked = np.ones(len(images), dtype=bool)
    asked[certificate.kept] = False
    final = np.where(asked, answers, certificate.labels)[labelled]
    log_probs, _ = images.scored(labelled)
    return accuracy_of(final, asked[labelled], log_probs, answers[labelled], truths[labelled])


def accuracy_of(final: Columns, asked: Bools, log_probs: NDArray[np.floating], answers: Columns, truths: Columns) -> Accuracy:
    """How often N labelled images are right.

    Both opinions are fused as products of probabilities. The scorer is calibrated on these images, each held out. The judge is
    right with its own share of right answers, and otherwise names any other class. That share is measured on the images that
    were asked about.

    Args:
        final: `(N,)` final answers.
        asked: `(N,)`, whether the judge was asked about an image.
        log_probs: `(N, C)` of the scorer.
        answers: `(N,)` answers of the judge, below 0 where it named no class.
        truths: `(N,)` columns.
    """
    named = np.flatnonzero(asked & (answers >= 0))
    right, classes = (float((answers[named] == truths[named]).sum()) + 1) / (len(named) + 2), log_probs.shape[1]
    both = floored(log_probs)
    if len(truths) >= FEWEST_ANSWERS:
        both = cross_fit_scorer(both, np.eye(classes)[truths], matrix=False).held_out
    both[named, answers[named]] += np.log(right * max(classes - 1, 1) / (1 - right))
    fused = np.where(asked, both.argmax(axis=1), final)
    return Accuracy(
        labelled=len(truths),
        certified=float((final == truths).mean()),
        judge=float((answers == truths)[asked].mean()) if asked.any() else None,
        fused=float((fused == truths).mean()),
    )

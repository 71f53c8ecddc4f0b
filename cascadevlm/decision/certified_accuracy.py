"""How often the final answers of a certificate are right, on labelled images. Agreement is not accuracy."""

from dataclasses import dataclass

import numpy as np

from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.decision.certifying import Certificate
from cascadevlm.decision.opinions import Images


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How often answers are right, on labelled images. Agreement is not accuracy.

    Attributes:
        labelled: number of labelled images.
        certified: share of right final answers of a certificate.
        judge: share of right answers of the judge among the labelled images that it was asked about.
        fused: share of right final answers if both opinions are fused for each image that was asked about.
    """

    labelled: int
    certified: float
    judge: float
    fused: float


def certified_accuracy(certificate: Certificate, images: Images, answers: Columns, truths: Columns) -> Accuracy:
    """How often the final answers are right, and how often they would be right if the scorer's opinion counted too.

    Both opinions are fused as products of probabilities. The judge is right with its own share of right answers, and otherwise
    names any other class. That share is measured on the labelled images that were asked about.

    Args:
        certificate: of these images.
        images: of the scorer.
        answers: `(N,)` answers of the judge, below 0 where it named no class; those of kept images are not used.
        truths: `(N,)` columns, `NOBODY` where the label is not known.
    """
    labelled = truths != NOBODY
    asked = np.ones(len(images), dtype=bool)
    asked[certificate.kept] = False
    final = np.where(asked, answers, certificate.labels)
    named = asked & labelled & (answers >= 0)
    right = (float((answers[named] == truths[named]).sum()) + 1) / (named.sum() + 2)
    fused, bonus = certificate.labels.copy(), np.log(right * max(images.classes - 1, 1) / (1 - right))
    for some in images.chunks():
        log_probs = images.log_probs[some] if images.rows is None else images.log_probs[images.rows[some]]
        log_probs = np.array(log_probs, dtype=np.float64)
        told = np.flatnonzero(answers[some] >= 0)
        log_probs[told, answers[some][told]] += bonus
        fused[some] = log_probs.argmax(axis=1)
    fused = np.where(asked, fused, certificate.labels)
    return Accuracy(
        labelled=int(labelled.sum()),
        certified=float((final == truths)[labelled].mean()),
        judge=float((answers == truths)[asked & labelled].mean()),
        fused=float((fused == truths)[labelled].mean()),
    )

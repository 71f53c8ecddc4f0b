"""Calibration with few labels, and further images that a judge was asked about but that nobody labelled.

The labelled images are fitted first. Then expectation and maximisation in turns, as in `without_labels`: what is believed of the
unlabelled images after the judge's answers counts like labels, beside the labels (Nigam et al., "Text classification from
labeled and unlabeled documents using EM", Machine Learning 39, 2000). There are few rounds: further ones only confirm what the
models believe already.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.decision.judge_fit import fit_judge
from cascadevlm.decision.judge_model import Answers, JudgeModel
from cascadevlm.decision.scorer_calibration import CrossFit, Floats, cross_fit_scorer

ROUNDS = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class FewLabels:
    """What was fitted to N images, some of which are labelled.

    Attributes:
        scorer: calibration of the scorer, on all images.
        model: of the judge.
        responsibilities: `(N, C)`, how likely each label is to be the truth: one-hot where it is known.
        after: `(N, C)` log-probabilities after the answers, each by models that were fitted without the image's fold.
    """

    scorer: CrossFit
    model: JudgeModel
    responsibilities: Floats
    after: Floats


def fit_few_labels(
    log_probs: NDArray[np.floating], truths: Columns, answers: Answers, *, prior: Floats | None = None
) -> FewLabels:
    """Fit the calibration of a scorer and the model of a judge.

    Args:
        log_probs: `(N, C)`, the scorer's.
        truths: `(N,)` columns; `NOBODY` where the image is not labelled. At least five images are labelled.
        answers: of N images.
        prior: `(C,)` shares of the classes to match. Default: all classes alike.
    """
    labelled = truths != NOBODY
    known = np.eye(log_probs.shape[1])[truths]
    scorer = cross_fit_scorer(log_probs[labelled], known[labelled], prior=prior)
    model, after = fit_judge(scorer.held_out, known[labelled], answers.rows(labelled))
    responsibilities = known
    for _ in range(ROUNDS if not labelled.all() else 0):
        believed = np.exp(model.posterior(scorer.calibration(log_probs), answers))
        responsibilities = np.where(labelled[:, None], known, believed)
        scorer = cross_fit_scorer(log_probs, responsibilities, prior=prior)
        model, after = fit_judge(scorer.held_out, responsibilities, answers)
    return FewLabels(scorer=scorer, model=model, responsibilities=responsibilities, after=after)


def fit_judge_beside(labelled: Floats, known: Floats, unlabelled: Floats, answers: Answers) -> tuple[JudgeModel, Floats]:
    """Fit the model of a judge, for a scorer whose calibration does not change in the rounds.

    Args:
        labelled: `(n, C)` held-out log-probabilities of the labelled images.
        known: `(n, C)`, one-hot truths.
        unlabelled: `(m, C)` log-probabilities of the others.
        answers: of n + m images, the labelled ones first.

    Returns:
        The model, and `(n, C)` log-probabilities of the labelled images after the answers, each by a model that was fitted
        without the image's fold.
    """
    first, rest = np.split(np.arange(len(answers)), [len(labelled)])
    model, after = fit_judge(labelled, known, answers.rows(first))
    for _ in range(ROUNDS if len(rest) else 0):
        believed = np.exp(model.posterior(unlabelled, answers.rows(rest)))
        model, after = fit_judge(np.concatenate([labelled, unlabelled]), np.concatenate([known, believed]), answers)
    return model, after[first]


def held_out_gain(before: Floats, after: Floats, truths: Columns) -> tuple[float, float]:
    """How many more predictions per image are right after something than before: mean and standard error, on n labelled images.

    What a model expects of itself is optimistic. This compares two predictions of the same image, both by models that were fitted
    without the image's fold.

    Args:
        before: `(n, C)` log-probabilities of the scorer: `CrossFit.held_out`.
        after: `(n, C)` log-probabilities after the answers of a judge who is always asked (the second of what `fit_judge`
            returns, or `FewLabels.after`), or after learning (`Taught.held_out`).
        truths: `(n,)` columns.
    """
    won = (after.argmax(axis=1) == truths).astype(float) - (before.argmax(axis=1) == truths)
    return float(won.mean()), float(won.std(ddof=1) / np.sqrt(len(won)))

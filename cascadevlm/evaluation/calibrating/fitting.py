"""Fits a calibration to a record."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cascadevlm.base.errors import DataError, InputError
from cascadevlm.decision.calibration import SETTINGS, CalibratedJudge, Calibration, Reference
from cascadevlm.decision.conformal import Conformal, best_size
from cascadevlm.decision.few_labels import held_out_gain
from cascadevlm.decision.judge_fit import fit_judge
from cascadevlm.decision.judge_model import JudgeModel
from cascadevlm.decision.scorer_calibration import Floats, ScorerCalibration, cross_fit_scorer
from cascadevlm.decision.shares import Shares
from cascadevlm.decision.teaching import Labelled
from cascadevlm.decision.without_labels import fit_without_labels
from cascadevlm.evaluation.calibrating.recipe import Recipe
from cascadevlm.evaluation.calibrating.support_set import SupportSet
from cascadevlm.evaluation.calibrating.unlabelled import Unlabelled
from cascadevlm.evaluation.deciding import answers_of, heard, images_of, settings_of
from cascadevlm.evaluation.record import Record

SIZES = range(2, 11)
"""Numbers of candidates that are tried."""

FEWEST = 20
"""The fewest images with an answer that a judge's model is fitted to."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """The fitted parts of a calibration.

    Attributes:
        scorer: the scorer's calibration.
        judges: the models of the judges, one per stage.
        conformal: lengths of lists for a coverage; None without labels.
        reference: probability of the best label, by calibrations fitted on the other folds; None without labels.
        shares: mean calibrated probabilities.
        support: the labelled images; None without labels or embeddings, or if there are too few.
        teaches: whether calibrated scores use what the labelled images teach.
    """

    scorer: ScorerCalibration
    judges: Sequence[CalibratedJudge]
    shares: Shares
    conformal: Conformal | None = None
    reference: Reference | None = None
    support: Labelled | None = None
    teaches: bool = False


def fit_calibration(record: Record, recipe: Recipe, beside: Unlabelled | None = None) -> Calibration:
    """Learn from all readable images of a record how far to trust its scorer and its judges.

    Args:
        record: labelled images with the judges' answers.
        beside: further images with the judge's answers and without labels.
        recipe: its labels, fusion, coverage, class thresholds and shares are used. Its size, target and guarantee are not.

    Raises:
        InputError: if the images are too few for the coverage, or the shares do not fit the labels; if labels are not used, and
            there are images without labels beside.
        DataError: if there is no judge, or a judge answered too few images; if the scores are calibrated already; if labels
            are not used, and there are several stages.
    """
    record = record.take(np.flatnonzero(record.readable))
    if record.scores.fingerprint.endswith("|learning"):
        raise DataError(
            "The scores of this record changed while the cascade learned.",
            hint="Evaluate with learn = false, and use that record.",
        )
    if "|calibrated=" in record.scores.fingerprint:
        raise DataError(
            "The scores of this record are calibrated already.", hint="Evaluate without a calibration, and use that record."
        )
    answered = min(int(heard(judged).sum()) for judged in (record.judged, *record.stages))
    if answered < FEWEST:
        raise DataError(
            f"A judge answered only {answered} images; a calibration needs at least {FEWEST}.",
            hint=f"Record or label more images. {len(record):,} are used to calibrate: by default half of all, see --size.",
        )
    if beside is not None and not recipe.labelled:
        raise InputError("A calibration without labels uses the record alone.", hint="Leave the images without labels out.")
    if beside is None:
        fitted = _with_labels(record, recipe) if recipe.labelled else _without_labels(record, recipe)
    else:
        record = record.take(np.flatnonzero(heard(record.judged)))
        fitted = _with_labels(record, recipe, beside)
    return Calibration(
        labels=record.labels.names,
        fingerprint=record.scores.fingerprint,
        scorer=fitted.scorer,
        judges=tuple(fitted.judges),
        images=len(record),
        labelled=recipe.labelled,
        fitted_on=images_of(record),
        conformal=fitted.conformal,
        reference=fitted.reference,
        support=fitted.support,
        teaches=fitted.teaches,
        shares=fitted.shares,
        descriptions=record.labels.descriptions_digest,
        fusion=recipe.fusion,
    )


def _with_labels(record: Record, recipe: Recipe, beside: Unlabelled | None = None) -> Fitted:
    """Fit each judge to the probabilities after the earlier judges. All probabilities come from models fitted on the other
    folds.
    """
    truths = np.eye(len(record.labels))[record.truths]
    scorer = cross_fit_scorer(record.scores.log_probs, truths, prior=recipe.prior(record.labels))
    support = SupportSet.of(record, scorer, recipe.prior(record.labels))
    teaches = support is not None and support.surely_better_than(scorer)
    belief = (support.held_out if support is not None and teaches else scorer.held_out).copy()
    together = None
    if beside is not None and not teaches:
        together = beside.fit_with(record, recipe.prior(record.labels))
        scorer, belief = together.scorer, together.scorer.held_out[: len(record)]
    shares = Shares.of(np.exp(belief if teaches else scorer.calibration(record.scores.log_probs)))
    conformal = Conformal.fit(np.exp(belief), record.truths, coverage=recipe.coverage, class_conditional=recipe.class_conditional)
    reference = Reference.of(np.exp(belief.max(axis=1)))
    judges = []
    for stage, judged in enumerate(record.stages):
        known = heard(judged)
        before, truth = belief[known], truths[known]
        if beside is not None and together is not None:
            model, after = together.model, together.after[: len(record)]
        elif beside is not None and support is not None:
            model, after = beside.fit_judge_with(record, before, support.labelled)
        else:
            model, after = fit_judge(before, truth, answers_of(judged).rows(known))
        belief[known] = after
        fitted = _judge(record, stage, model, before, recipe)
        likelihood, gain = float((truth * after).sum(axis=1).mean()), held_out_gain(before, after, record.truths[known])
        judges.append(replace(fitted, log_likelihood=likelihood, gain=gain))
    return Fitted(
        scorer=scorer.calibration,
        judges=judges,
        shares=shares,
        conformal=conformal,
        reference=reference,
        support=None if support is None else support.labelled,
        teaches=teaches,
    )


def _without_labels(record: Record, recipe: Recipe) -> Fitted:
    """Fit the scorer and its one judge to the judge's answers, treating the judge as an annotator who makes errors."""
    if len(record.stages) != 1:
        raise DataError(
            f"Without labels, a calibration needs a record with one stage; this record has {len(record.stages)}.",
            hint="Evaluate with one stage, or calibrate with labels.",
        )
    known = heard(record.judged)
    log_probs = record.scores.log_probs[known]
    scorer, model = fit_without_labels(log_probs, answers_of(record.judged).rows(known))
    judges = [_judge(record, 0, model, scorer(log_probs), recipe)]
    return Fitted(scorer=scorer, judges=judges, shares=Shares.of(np.exp(scorer(record.scores.log_probs))))


def _judge(record: Record, stage: int, model: JudgeModel, before: Floats, recipe: Recipe) -> CalibratedJudge:
    """The calibrated judge of a stage.

    Args:
        before: ``(n, C)`` log-probabilities before its answers, of the n images that it answered.
    """
    judged = record.stages[stage]
    agreed, likely = model.agreement(before, answers_of(judged).rows(heard(judged)))
    sizes = [size for size in SIZES if size <= len(record.labels)] or [1]
    return CalibratedJudge(
        judge=judged.judge,
        settings=settings_of(record, stage, SETTINGS),
        model=model,
        best_size=best_size(before, model, sizes, none_offered=judged.none_offered, word_final=recipe.fusion == "judge"),
        reference=Reference.of(agreed - likely),
    )

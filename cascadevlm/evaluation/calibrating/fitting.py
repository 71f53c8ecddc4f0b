"""Fits a calibration to a record."""

import numpy as np

from cascadevlm.base.errors import DataError
from cascadevlm.decision.calibration import SETTINGS, CalibratedJudge, Calibration, FusionRule, Reference
from cascadevlm.decision.conformal import Conformal, best_size
from cascadevlm.decision.judge_fit import fit_judge
from cascadevlm.decision.scorer_calibration import Floats, fit_scorer
from cascadevlm.decision.shares import Shares
from cascadevlm.decision.without_labels import fit_without_labels
from cascadevlm.evaluation.deciding import answers_of, heard, images_of, settings_of
from cascadevlm.evaluation.record import Record

COVERAGE = 0.95
"""How often a list of candidates shall hold the truth, unless said otherwise."""


SIZES = range(2, 11)
"""Lengths of the list of candidates that are tried."""


FEWEST = 20
"""Fewer images tell too little of a scorer and a judge."""


def fit_calibration(
    record: Record,
    *,
    labelled: bool = True,
    fusion: FusionRule = "bayes",
    coverage: float = COVERAGE,
    class_conditional: bool = False,
    prior: Floats | None = None,
) -> Calibration:
    """Learn from a record how far to trust its scorer and its judges.

    Args:
        record: its images that could be read are used.
        labelled: whether to look at the truths; without, the judge is the annotator.
        coverage: of the conformal sets. They are fitted on what the scorer's calibrations on other folds say of each image, which
            holds the promise closely, not strictly.
        class_conditional: whether they shall hold the truth so often for every class that has enough images.
        prior: C shares of the classes, for calibrations that match them; even, unless given.

    Raises:
        InputError: if the images cannot promise the coverage.
        DataError: if there is no judge, or one answered about too few images; if the scores are calibrated already; without
            labels, if there are several stages.
    """
    record = record.take(np.flatnonzero(record.readable))
    if "|calibrated=" in record.scores.fingerprint:
        raise DataError("The record's scores are calibrated already.", hint="Evaluate without a calibration.")
    asked = min(int(heard(judged).sum()) for judged in (record.judged, *record.stages))
    if asked < FEWEST:
        raise DataError(f"A judge answered about {asked} images, too few to calibrate on.", hint=f"Ask about {FEWEST} or more.")
    log_probs, conformal, reference = record.scores.log_probs, None, None
    if labelled:
        responsibilities = np.eye(len(record.labels))[record.truths]
        scorer, belief = fit_scorer(log_probs, responsibilities, prior=prior)
        conformal = Conformal.fit(np.exp(belief), record.truths, coverage=coverage, class_conditional=class_conditional)
        reference = Reference.of(np.exp(belief.max(axis=1)))
    else:
        if len(record.stages) != 1:
            raise DataError(f"Without labels, one judge is the annotator: the record has {len(record.stages)} stages.")
        known = heard(record.judged)
        answers = answers_of(record.stages[0])
        scorer, model = fit_without_labels(log_probs[known], answers.rows(known))
        belief = scorer(log_probs)
        responsibilities = np.exp(model.posterior(belief, answers))
    judges = []
    for number, judged in enumerate(record.stages):
        known, likelihood = heard(judged), None
        before, truth, answers = belief[known], responsibilities[known], answers_of(judged).rows(known)
        if labelled:
            model, belief[known] = fit_judge(before, truth, answers)
            likelihood = float((truth * belief[known]).sum(axis=1).mean())
        sizes = [size for size in SIZES if size <= len(record.labels)] or [1]
        agreed, likely = model.agreement(before, answers)
        judges.append(
            CalibratedJudge(
                judge=judged.judge,
                settings=settings_of(record, number, SETTINGS),
                model=model,
                log_likelihood=likelihood,
                best_size=best_size(before, model, sizes, none_offered=judged.none_offered, word_final=fusion == "judge"),
                reference=Reference.of(agreed - likely),
            )
        )
    return Calibration(
        labels=record.labels.names,
        fingerprint=record.scores.fingerprint,
        scorer=scorer,
        judges=tuple(judges),
        images=len(record),
        labelled=labelled,
        fitted_on=images_of(record),
        conformal=conformal,
        reference=reference,
        shares=Shares.of(np.exp(scorer(log_probs))),
        descriptions=record.labels.descriptions_digest,
        fusion=fusion,
    )

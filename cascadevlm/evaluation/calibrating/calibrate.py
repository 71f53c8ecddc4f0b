"""Calibrating on a part of a record, for a target if there is one, and telling what it gives on the rest."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue, NonNegativeFloat, TypeAdapter, ValidationError

from cascadevlm.base.errors import DataError, InputError
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Scores
from cascadevlm.decision.calibration import Calibration, FusionRule
from cascadevlm.decision.guarantee import Acceptance, fit_acceptance
from cascadevlm.decision.scorer_calibration import Floats
from cascadevlm.evaluation.calibrating.fitting import COVERAGE, fit_calibration
from cascadevlm.evaluation.calibrating.targets import Outcome, Target, outcome, policy_for
from cascadevlm.evaluation.deciding import decided, images_of, settings_of
from cascadevlm.evaluation.metrics import expected_calibration_error
from cascadevlm.evaluation.record import Record
from cascadevlm.evaluation.sweep import sweep, under
from cascadevlm.policies.language import parse_policy
from cascadevlm.policies.rules import Always


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A calibration and what it is worth.

    Attributes:
        calibration: to be used.
        before: of the scorer as it is, on held-out images: accuracy, mean log-likelihood in nats, expected calibration error;
            None without labels.
        after: of the calibrated scorer; None without labels.
        agreement: how often the last judge's answer is the label that the scorer as it is finds likeliest.
        areas: under accuracy against deferral rate on held-out images: the entropy gate with the judge's word final, and the gain
            with the opinions fused; None without labels, or where the judge was not asked about everything.
        outcome: of the policy chosen for the target; None without one.
        acceptance: what the images support of the promised error; None if none was promised.
    """

    calibration: Calibration
    before: dict[str, float] | None
    after: dict[str, float] | None
    agreement: float
    areas: tuple[float, float] | None
    outcome: Outcome | None
    acceptance: Acceptance | None


def calibrate(
    record: Record,
    *,
    size: int,
    seed: int = 0,
    labelled: bool = True,
    fusion: FusionRule = "bayes",
    measure: str = "gain",
    target: Target | None = None,
    target_error: float | None = None,
    confidence: float = 0.95,
    coverage: float = COVERAGE,
    class_conditional: bool = False,
    prior: Floats | None = None,
) -> Calibrated:
    """Calibrate on ``size`` images of a record and measure on the others.

    Where a threshold is to be chosen for a target, or an error to be promised, half of these images fit the models and the other
    half chooses or promises; thirds do where both are wanted. On images that the models or the threshold were fitted to, too much
    would be promised.

    Args:
        record: of labelled images.
        labelled: whether to look at the images' labels. Without, nothing is measured on the others but how often scorer and judge
            agree, and there are no targets and no promises.
        measure: the policy's, as the string form calls it.
        prior: C shares of the classes, for calibrations of the scorer that match them; even, unless given.
        target: what the policy shall meet.
        coverage: of the conformal sets of candidates.
        class_conditional: whether they have it for every class.
        target_error: the most that may be wrong of the accepted answers, with ``confidence``.

    Raises:
        DataError: if there are too few images, no other ones, or a target cannot be met or promised; if there is a target or an
            error to be promised without labels.
    """
    wanted = [target is not None, target_error is not None]
    if any(wanted) and not labelled:
        raise DataError(
            "Without labels, there is no target and no guarantee: both are measured on the labels.",
            hint='Leave the target out, and set the policy yourself, for example "calls <= 500".',
        )
    if any(wanted) and len(record.stages) != 1:
        raise DataError(f"A target is for one judge, and the record has {len(record.stages)} stages.", hint="Leave it out.")
    if target_error is not None and fusion == "judge":
        raise DataError("Nothing can be promised of a judge's word without a probability.", hint="Give --fusion bayes.")
    record = record.take(np.flatnonzero(record.readable))
    if not size < len(record):
        raise DataError(f"Of {len(record)} images, {size} leave none to measure on.", hint="Calibrate on fewer: --size.")
    # whatever the classes: shares that are just even are not those of images to come
    drawn = np.random.default_rng(seed).permutation(len(record))
    own, rest = (record.take(np.sort(rows)) for rows in (drawn[:size], drawn[size:]))
    fitting, *further = (record.take(np.sort(rows)) for rows in np.array_split(drawn[:size], 1 + sum(wanted)))
    calibration = fit_calibration(
        fitting,
        labelled=labelled,
        fusion=fusion,
        coverage=coverage,
        class_conditional=class_conditional,
        prior=prior,
    )
    calibration = replace(calibration, fitted_on=images_of(own))
    choosing = [decided(part, calibration) for part in further]
    if target is not None:
        calibration = replace(calibration, policy=policy_for(choosing[0], measure, target))
    policy = parse_policy(calibration.policy) if calibration.policy else Always()
    acceptance = None
    if target_error is not None:
        gated = under(choosing[-1], policy)
        right = gated.predicted == gated.truths
        acceptance = fit_acceptance(gated.probabilities, right, target_error=target_error, confidence=confidence)
        if acceptance.threshold is None:
            raise DataError(acceptance.describe(), hint="Label more images, or promise less.")
        shown = settings_of(choosing[-1], 0, ("candidates", "widen"))
        promised_with = {"policy": str(policy), "fusion": calibration.fusion, "follow_shares": False, **shown}
        calibration = replace(calibration, accept=acceptance.threshold, promised_with=promised_with)
    after = decided(rest, calibration)
    result = Calibrated(
        calibration=calibration,
        before=_quality(rest.scores, rest.truths) if labelled else None,
        after=_quality(after.scores, after.truths) if labelled else None,
        agreement=float((rest.judged.answers == rest.scored)[rest.judged.asked].mean()),
        areas=(sweep(rest).curve("entropy").area, sweep(after).curve("gain").area)
        if labelled and rest.asked_everything
        else None,
        outcome=outcome(after, policy) if target is not None else None,
        acceptance=acceptance,
    )
    return replace(result, calibration=replace(calibration, figures=_figures(result)))


def read_prior(path: Path, labels: LabelSet) -> Floats:
    """C shares of the classes from a JSON object of one number a name, in any unit.

    Raises:
        InputError: if the file is none, or lacks a label, or knows others.
    """
    try:
        given = TypeAdapter(dict[str, NonNegativeFloat]).validate_json(path.read_bytes())
    except OSError as exc:
        raise InputError(f"{str(path)!r} cannot be read: {exc.strerror}.") from exc
    except ValidationError as exc:
        raise InputError(f"{str(path)!r} is no JSON object of shares by name: {exc.errors()[0]['msg']}.") from exc
    if odd := sorted(given.keys() ^ set(labels.names)):
        where = "no label of the record" if odd[0] in given else "missing"
        raise InputError(f"{str(path)!r}: {odd[0]!r} is {where}.", hint="Give every label its share, by its name.")
    shares = np.array([given[name] for name in labels.names])
    if not shares.sum() > 0:
        raise InputError(f"{str(path)!r}: all shares are 0.", hint="Give every label its share.")
    prior: Floats = shares / shares.sum()
    return prior


def _quality(scores: Scores, truths: NDArray[np.int64]) -> dict[str, float]:
    right = scores.log_probs.argmax(axis=1) == truths
    error = expected_calibration_error(scores.probabilities.max(axis=1), right)
    return {
        "accuracy": float(right.mean()),
        "log_likelihood": float(scores.log_probs[np.arange(len(truths)), truths].mean()),
        "calibration_error": error or 0.0,
    }


def _figures(result: Calibrated) -> dict[str, JsonValue]:
    return {
        "scorer_before": dict(result.before) if result.before else None,
        "scorer_after": dict(result.after) if result.after else None,
        "agreement": result.agreement,
        "area_entropy_judge": result.areas and result.areas[0],
        "area_gain_fused": result.areas and result.areas[1],
        "outcome": result.outcome.to_dict() if result.outcome else None,
        "acceptance": result.acceptance.describe() if result.acceptance else None,
    }

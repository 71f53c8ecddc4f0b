"""Calibrates on some images of a record, and measures the result on the other images."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from cascadevlm.base.errors import DataError
from cascadevlm.base.types import Scores
from cascadevlm.decision.calibration import Calibration
from cascadevlm.decision.guarantee import Acceptance, fit_acceptance
from cascadevlm.evaluation.calibrating.fitting import fit_calibration
from cascadevlm.evaluation.calibrating.recipe import Recipe
from cascadevlm.evaluation.calibrating.targets import Outcome, outcome, policy_for
from cascadevlm.evaluation.deciding import decided, images_of, settings_of
from cascadevlm.evaluation.metrics import expected_calibration_error
from cascadevlm.evaluation.record import Record
from cascadevlm.evaluation.sweep import sweep, under
from cascadevlm.policies.language import parse_policy
from cascadevlm.policies.rules import Always


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A calibration, and what it is worth on images that it was not fitted on.

    Attributes:
        calibration: the calibration.
        before: figures of the scorer without calibration: accuracy, mean log-likelihood in nats, expected calibration error;
            None without labels.
        after: the same figures with calibration; None without labels.
        agreement: share of the images with a question where the last judge's answer is the scorer's most probable label.
        areas: area under accuracy against deferral rate for two cascades: entropy policy and judge's answer; gain policy and
            fused answer. None without labels, or if the judge was not asked about every image.
        outcome: what the policy for the target reached; None without a target.
        acceptance: which answers the guarantee accepts; None without a guarantee.
    """

    calibration: Calibration
    before: dict[str, float] | None = None
    after: dict[str, float] | None = None
    agreement: float
    areas: tuple[float, float] | None = None
    outcome: Outcome | None = None
    acceptance: Acceptance | None = None


def calibrate(record: Record, recipe: Recipe) -> Calibrated:
    """Calibrate on some images of a record, and measure the result on the other images.

    One part of the calibration images fits the models. If a policy is chosen for a target, another part of the same size chooses
    it. If a guarantee is wanted, another part of the same size gives it. The images that fitted the models or chose the policy
    would promise too much.

    Args:
        record: labelled images with the judges' answers.
        recipe: what to calibrate for.

    Raises:
        DataError: if there are too few images, no images are left for measuring, the target cannot be reached, or the images do
            not support the guarantee; if the recipe has a target or guarantee, and the record has several stages.
        InputError: if the shares of the recipe do not fit the labels, or the images are too few for the coverage.
    """
    if recipe.parts > 1 and len(record.stages) != 1:
        raise DataError(
            f"Targets and guarantees need a record with one stage; this record has {len(record.stages)}.",
            hint="Calibrate without a target.",
        )
    record = record.take(np.flatnonzero(record.readable))
    own, rest = _drawn(record, recipe)
    fitting, *others = (record.take(np.sort(rows)) for rows in np.array_split(own, recipe.parts))
    calibration = replace(fit_calibration(fitting, recipe), fitted_on=images_of(record.take(np.sort(own))))
    choosing = [decided(part, calibration) for part in others]
    acceptance = None
    if recipe.target is not None:
        calibration = replace(calibration, policy=policy_for(choosing[0], recipe.measure, recipe.target))
    if recipe.target_error is not None:
        calibration, acceptance = _guaranteed(calibration, choosing[-1], recipe.target_error, recipe.confidence)
    result = _measured(record.take(np.sort(rest)), calibration, acceptance)
    return replace(result, calibration=replace(calibration, figures=_figures(result)))


def _drawn(record: Record, recipe: Recipe) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows to calibrate on and rows to measure on, in random order.

    The draw ignores the classes: a sample with equal class shares would not have the shares of images to come.
    """
    size = recipe.size or round(len(record) / 2)
    if not size < len(record):
        raise DataError(
            f"A calibration on {size} images leaves none of the {len(record)} readable images for measuring.",
            hint="Calibrate on fewer images: --size.",
        )
    drawn = np.random.default_rng(recipe.seed).permutation(len(record))
    return drawn[:size], drawn[size:]


def _guaranteed(
    calibration: Calibration, record: Record, target_error: float, confidence: float
) -> tuple[Calibration, Acceptance]:
    """The calibration with the guarantee that the images of a decided record support."""
    policy = parse_policy(calibration.policy) if calibration.policy else Always()
    gated = under(record, policy)
    right = gated.predicted == gated.truths
    acceptance = fit_acceptance(gated.probabilities, right, target_error=target_error, confidence=confidence)
    if acceptance.threshold is None:
        raise DataError(acceptance.describe(), hint="Label more images, or allow more errors.")
    shown = settings_of(record, 0, ("candidates", "widen"))
    of_run: dict[str, JsonValue] = {"policy": str(policy), "fusion": calibration.fusion, "follow_shares": False, "learn": False}
    promised_with = of_run | shown
    return replace(calibration, accept=acceptance.threshold, promised_with=promised_with), acceptance


def _measured(rest: Record, calibration: Calibration, acceptance: Acceptance | None) -> Calibrated:
    """What the calibration is worth on images that it was not fitted on."""
    agreement = float((rest.judged.answers == rest.scored)[rest.judged.asked].mean())
    if not calibration.labelled:
        return Calibrated(calibration=calibration, agreement=agreement)
    after = decided(rest, calibration)
    return Calibrated(
        calibration=calibration,
        before=_quality(rest.scores, rest.truths),
        after=_quality(after.scores, after.truths),
        agreement=agreement,
        areas=(sweep(rest).curve("entropy").area, sweep(after).curve("gain").area) if rest.asked_everything else None,
        outcome=outcome(after, parse_policy(calibration.policy)) if calibration.policy else None,
        acceptance=acceptance,
    )


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

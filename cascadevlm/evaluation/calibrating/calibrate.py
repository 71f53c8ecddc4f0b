"""Calibrates on some images of a record, and measures the result on the other images."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from cascadevlm.base.errors import DataError
from cascadevlm.decision.adapting import first_alike
from cascadevlm.decision.calibration import Calibration
from cascadevlm.decision.guarantee import Acceptance, fit_acceptance
from cascadevlm.evaluation.calibrating.fitting import fit_calibration
from cascadevlm.evaluation.calibrating.recipe import Recipe
from cascadevlm.evaluation.calibrating.targets import Outcome, outcome, policy_for
from cascadevlm.evaluation.calibrating.unlabelled import Unlabelled
from cascadevlm.evaluation.deciding import decided, images_of, settings_of
from cascadevlm.evaluation.metrics import expected_calibration_error
from cascadevlm.evaluation.record import Record
from cascadevlm.evaluation.sweep import sweep, under
from cascadevlm.policies.language import parse_policy
from cascadevlm.policies.rules import Always


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A calibration, and its figures on images that it was not fitted on.

    Attributes:
        calibration: the calibration.
        before: figures of the scorer without calibration: accuracy, mean log-likelihood in nats, expected calibration error;
            None without labels.
        after: the same figures with calibration; None without labels.
        calibrated, supported: the same figures for the labelled images that were calibrated on, without
            near-duplicates, by cross-validation: by the scorer's calibration alone, and with these images as a support set. None
            without labels or embeddings.
        agreement: share of the images with a question where the last judge's answer is the scorer's most probable label.
        areas: area under accuracy against deferral rate for two cascades: entropy policy and judge's answer; gain policy and
            fused answer. None without labels, or if the judge was not asked about every image.
        outcome: what the policy for the target reached; None without a target.
        acceptance: which answers the guarantee accepts; None without a guarantee.
    """

    calibration: Calibration
    before: dict[str, float] | None = None
    after: dict[str, float] | None = None
    calibrated: dict[str, float] | None = None
    supported: dict[str, float] | None = None
    agreement: float
    areas: tuple[float, float] | None = None
    outcome: Outcome | None = None
    acceptance: Acceptance | None = None

    @property
    def foretold(self) -> tuple[float, float] | None:
        """The foretold gain of the last judge: see `CalibratedJudge`; None without labels."""
        return self.calibration.judges[-1].gain


def calibrate(record: Record, recipe: Recipe, beside: Unlabelled | None = None) -> Calibrated:
    """Calibrate on some images of a record, and measure the result on the other images.

    One part of the calibration images fits the models. If a policy is chosen for a target, another part of the same size
    chooses it. If a guarantee is wanted, another part of the same size gives it. The images that fitted the models or chose the
    policy would give too good a result.

    Args:
        record: labelled images with the judges' answers.
        recipe: what to calibrate for.
        beside: further images with the judge's answers and without labels, which help if there are few labels.

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
    fitting, *others = np.array_split(own, recipe.parts)
    calibration = fit_calibration(record.take(np.sort(fitting)), recipe, beside)
    first = _first_alike(record, calibration)
    known = np.isin(first, first[own])
    calibration = replace(calibration, fitted_on=images_of(record.take(np.flatnonzero(known))))
    choosing = [decided(record.take(np.sort(part[~np.isin(first[part], first[fitting])])), calibration) for part in others]
    acceptance = None
    if recipe.target is not None:
        calibration = replace(calibration, policy=policy_for(choosing[0], recipe.measure, recipe.target))
    if recipe.target_error is not None:
        calibration, acceptance = _guaranteed(calibration, choosing[-1], recipe.target_error, recipe.confidence)
    if known[rest].all():
        raise DataError(
            f"The other {len(rest)} images are near-duplicates of images that were calibrated on, and measure nothing.",
            hint="Record other images, or calibrate on fewer images: --size.",
        )
    result = _measured(record.take(np.sort(rest[~known[rest]])), calibration, acceptance)
    return replace(result, calibration=replace(calibration, figures=_figures(result)))


def _first_alike(record: Record, calibration: Calibration) -> NDArray[np.intp]:
    """``(N,)`` for each image, the row of its first near-duplicate.

    If the labelled images of a calibration teach, near-duplicates of these images are known as well as the images themselves, and
    measure nothing. If the labelled images do not teach, every image counts as different.
    """
    if record.scores.embeddings is None or not calibration.teaches:
        return np.arange(len(record))
    return first_alike(record.scores.embeddings.astype(np.float32), record.truths)


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
    """The figures of the calibration on images that it was not fitted on."""
    agreement = float((rest.judged.answers == rest.scored)[rest.judged.asked].mean())
    if not calibration.labelled:
        return Calibrated(calibration=calibration, agreement=agreement)
    after, support = decided(rest, calibration), calibration.support
    return Calibrated(
        calibration=calibration,
        calibrated=None if support is None else _quality(support.fit.held_out, support.truths),
        supported=None if support is None else _quality(support.taught(support.nothing()).held_out, support.truths),
        before=_quality(rest.scores.log_probs, rest.truths),
        after=_quality(after.scores.log_probs, after.truths),
        agreement=agreement,
        areas=(sweep(rest).curve("entropy").area, sweep(after).curve("gain").area) if rest.asked_everything else None,
        outcome=outcome(after, parse_policy(calibration.policy)) if calibration.policy else None,
        acceptance=acceptance,
    )


def _quality(log_probs: NDArray[np.floating], truths: NDArray[np.int64]) -> dict[str, float]:
    right = log_probs.argmax(axis=1) == truths
    error = expected_calibration_error(np.exp(log_probs.max(axis=1)), right)
    return {
        "accuracy": float(right.mean()),
        "log_likelihood": float(log_probs[np.arange(len(truths)), truths].mean()),
        "calibration_error": error or 0.0,
    }


def _figures(result: Calibrated) -> dict[str, JsonValue]:
    return {
        "scorer_before": dict(result.before) if result.before else None,
        "scorer_after": dict(result.after) if result.after else None,
        "cross_validated_calibrated": dict(result.calibrated) if result.calibrated else None,
        "cross_validated_support": dict(result.supported) if result.supported else None,
        "teaches": result.calibration.teaches,
        "foretold_gain": list(result.foretold) if result.foretold else None,
        "agreement": result.agreement,
        "area_entropy_judge": result.areas and result.areas[0],
        "area_gain_fused": result.areas and result.areas[1],
        "outcome": result.outcome.to_dict() if result.outcome else None,
        "acceptance": result.acceptance.describe() if result.acceptance else None,
    }

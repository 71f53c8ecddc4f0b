"""Chooses the threshold of a policy so that the policy reaches a target."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from pydantic import JsonValue

from cascadevlm.base.errors import DataError, InputError
from cascadevlm.evaluation.metrics import Interval, interval
from cascadevlm.evaluation.record import Record
from cascadevlm.evaluation.sweep import MEASURES, final_answers, sweep, under
from cascadevlm.policies.base import Policy

TargetKind = Literal["deferral_rate", "dollars_per_thousand", "accuracy", "judge_share"]
"""What a target limits or requires: the share of escalated images; US dollars per 1,000 images; the accuracy; the accuracy
divided by the accuracy of asking the judge about every image."""

STEPS = 1000
"""Largest number of thresholds that are tried."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a policy must reach.

    Attributes:
        kind: the quantity. The policy stays at or below a ``deferral_rate`` or ``dollars_per_thousand``, and reaches at least
            an ``accuracy`` or ``judge_share``.
        value: its limit. A deferral rate and an accuracy are between 0 and 1; the others are at least 0.

    Raises:
        InputError: if the kind is unknown, or the value is out of its range.
    """

    kind: TargetKind
    value: float

    def __post_init__(self) -> None:
        if self.kind not in get_args(TargetKind):
            raise InputError(f"There is no target {self.kind!r}.", hint=f"Known: {', '.join(get_args(TargetKind))}.")
        most = 1.0 if self.kind in ("deferral_rate", "accuracy") else math.inf
        if not (0 <= self.value <= most):
            limits = "at least 0" if math.isinf(most) else "between 0 and 1"
            raise InputError(f"The target {self.kind} must be {limits}, not {self.value!r}.")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a policy reached on images that its threshold was not chosen on.

    Attributes:
        images: number of images.
        deferral_rate: share of images that were escalated.
        dollars_per_thousand: US dollars per 1,000 images.
        accuracy: share of right predictions.
        accuracy_interval: 95 % confidence interval of the accuracy.
        scorer_accuracy: accuracy without any question.
        judge_accuracy: accuracy after a question about every image.
    """

    images: int
    deferral_rate: float
    dollars_per_thousand: float
    accuracy: float
    accuracy_interval: Interval | None
    scorer_accuracy: float
    judge_accuracy: float

    def to_dict(self) -> dict[str, JsonValue]:
        """The outcome as JSON-serialisable data."""
        ends = None if self.accuracy_interval is None else list(self.accuracy_interval)
        return dict(vars(self)) | {"accuracy_interval": ends}


def policy_for(record: Record, measure: str, target: Target) -> str:
    """A policy with the threshold that reaches a target.

    For an accuracy or a share of the judge's accuracy, this is the threshold with the fewest questions. For a limit on questions
    or dollars, this is the threshold with the most questions.

    Args:
        record: a record in which the judge was asked about every image.
        measure: the policy's measure. "gain" needs a record from `decided`.
        target: what the policy must reach.

    Raises:
        DataError: if no threshold reaches the target. The hint gives the best value that can be reached.
    """
    curve = sweep(record, steps=min(STEPS, len(record))).curve(measure)
    reached = {
        "deferral_rate": curve.deferral_rates,
        "dollars_per_thousand": curve.dollars,
        "accuracy": curve.accuracies,
        "judge_share": curve.accuracies / max(curve.accuracies[-1], 1e-12),
    }[target.kind]
    limited = target.kind in ("deferral_rate", "dollars_per_thousand")
    assert curve.thresholds is not None
    enough = reached <= target.value if limited else reached >= target.value
    meets = np.flatnonzero(enough & ~np.isnan(curve.thresholds))
    if not len(meets):  # only for a quantity that must be reached: without questions, every limit is kept
        raise DataError(
            f"No threshold of {measure} reaches the target {target.kind} = {target.value:g}.",
            hint=f"The highest value on these {len(record)} images is {reached.max():.4g}.",
        )
    point = int(meets[-1] if limited else meets[0])
    if np.isinf(curve.thresholds[point]):
        return "never" if point == 0 else "always"
    comparison = "<" if measure in MEASURES and MEASURES[measure][1] < 0 else ">"
    return f"{measure} {comparison} {float(curve.thresholds[point])!r}"


def outcome(record: Record, policy: Policy) -> Outcome:
    """What a policy reaches on a record in which the judge was asked about every image."""
    record = record.take(np.flatnonzero(record.readable))
    gated = under(record, policy)
    right = gated.predicted == gated.truths
    return Outcome(
        images=len(record),
        deferral_rate=float(gated.judged.asked.mean()),
        dollars_per_thousand=float(1000 * gated.judged.dollars.mean()),
        accuracy=float(right.mean()),
        accuracy_interval=interval(right),
        scorer_accuracy=float((record.scored == record.truths).mean()),
        judge_accuracy=float((final_answers(record) == record.truths).mean()),
    )

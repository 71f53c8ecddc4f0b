"""A threshold for a target: how much to ask so that a run escalates, costs or gets right what was wanted."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import JsonValue

from cascadevlm.base.errors import DataError
from cascadevlm.evaluation.metrics import Interval, interval
from cascadevlm.evaluation.record import Record
from cascadevlm.evaluation.sweep import MEASURES, final_answers, sweep, under
from cascadevlm.policies.base import Policy

TargetKind = Literal["deferral_rate", "dollars_per_thousand", "accuracy", "judge_share"]
"""The share of images escalated; US dollars for a thousand images; the accuracy; the accuracy as a share of that of asking about
everything."""

STEPS = 1000
"""Thresholds looked at."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is wanted of a policy."""

    kind: TargetKind
    value: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a policy gave on images that its threshold was not chosen on."""

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
    """The policy of a measure that meets a target with the fewest questions; of limits on these, with the most.

    Args:
        record: in which the judge was asked about everything.
        measure: as policies call it; "gain" needs a record that was `decided`.

    Raises:
        DataError: if no threshold meets it, telling what can be had.
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
    if not len(meets):
        best = reached.min() if limited else reached.max()
        raise DataError(
            f"No threshold of {measure} gives the {target.kind.replace('_', ' ')} {target.value:g}.",
            hint=f"The {'least' if limited else 'most'} on these {len(record)} images is {best:.4g}.",
        )
    point = int(meets[-1] if limited else meets[0])
    if np.isinf(curve.thresholds[point]):
        return "never" if point == 0 else "always"
    comparison = "<" if measure in MEASURES and MEASURES[measure][1] < 0 else ">"
    return f"{measure} {comparison} {float(curve.thresholds[point])!r}"


def outcome(record: Record, policy: Policy) -> Outcome:
    """What a policy gives on a record in which the judge was asked about everything."""
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

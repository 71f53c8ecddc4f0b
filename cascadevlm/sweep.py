"""Policies tried on a record: what each would have got right, and what it would have cost, at every share of images escalated.

Nothing is asked: a record that holds the judge's answer for every image (``evaluate --judge-all``) holds those of every policy.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from cascadevlm import measures
from cascadevlm.errors import DataError
from cascadevlm.policy import PolicyLike, as_policy
from cascadevlm.record import NOBODY, Columns, Record
from cascadevlm.types import Scores

STEP = 0.05
"""Between the shares of images escalated at which curves are given."""

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One way of ranking images, from asking about none to asking about all.

    Attributes:
        name: of the measure.
        deferral_rates: P shares of images escalated, from 0 to 1.
        accuracies: P.
        dollars: P, per thousand images.
        thresholds: P values of the measure that escalate so many, infinite at the ends; None where the ranking has none.
        area: under accuracy against deferral rate, as the mean over the points.
    """

    name: str
    deferral_rates: Values
    accuracies: Values
    dollars: Values
    thresholds: Values | None
    area: float

    def at(self, deferral_rate: float) -> float:
        """The accuracy at a share of images escalated, between the points."""
        return float(np.interp(deferral_rate, self.deferral_rates, self.accuracies))

    def to_dict(self) -> dict[str, JsonValue]:
        """The curve as JSON-serialisable data."""
        return {name: _as_json(value) for name, value in vars(self).items()}


def _as_json(value: JsonValue | Values) -> JsonValue:
    """Numbers that JSON does not know are null."""
    if not isinstance(value, np.ndarray):
        return value
    return [number if np.isfinite(number) else None for number in value.tolist()]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The curves of a record, with random escalation and an oracle that knows where the judge is right for comparison.

    Attributes:
        scorer_accuracy: with nobody asked.
        judge_accuracy: with everything asked.
        curves: by area, best first.
        pareto: of all points of all curves but the oracle's, those that no other beats in both accuracy and dollars: name of the
            curve, deferral rate, accuracy and dollars per thousand images, from the cheapest on.
    """

    scorer_accuracy: float
    judge_accuracy: float
    curves: tuple[Curve, ...]
    pareto: tuple[tuple[str, float, float, float], ...]

    def to_dict(self) -> dict[str, JsonValue]:
        """The sweep as JSON-serialisable data."""
        return {
            "scorer_accuracy": self.scorer_accuracy,
            "judge_accuracy": self.judge_accuracy,
            "curves": [curve.to_dict() for curve in self.curves],
            "pareto": [list(point) for point in self.pareto],
        }


def final_answers(record: Record) -> Columns:
    """N columns: the judge's answer where it gave one, else the scorer's."""
    answers = record.judged.answers
    return np.where(answers == NOBODY, record.scored, answers)


def under(record: Record, policy: PolicyLike) -> Record:
    """The record as it would be, had its last stage had this policy: questions that it would not have asked are left out.

    Raises:
        DataError: if it would have asked what was not asked.
    """
    wanted = np.zeros(len(record), dtype=bool)
    wanted[record.readable] = as_policy(policy).select(record.scores.rows(record.readable))
    judged = record.judged
    if lacking := int((wanted & ~judged.asked).sum()):
        raise DataError(
            f"The policy {policy} asks about {lacking} images that the judge was not asked about.", hint="Use --judge-all."
        )
    answers = np.where(wanted, judged.answers, NOBODY)
    by_judge = answers != NOBODY
    stage = replace(
        judged,
        asked=wanted,
        answers=answers,
        outcomes=_where(wanted, judged.outcomes),
        rationales=_where(wanted, judged.rationales),
        dollars=judged.dollars * wanted,
        seconds=judged.seconds * wanted,
        input_tokens=judged.input_tokens * wanted,
        output_tokens=judged.output_tokens * wanted,
        paid=judged.paid * wanted,
    )
    probabilities = record.scores.probabilities.max(axis=1).astype(np.float64)
    return replace(
        record,
        stages=(*record.stages[:-1], stage),
        predicted=np.where(by_judge, answers, record.scored),
        probabilities=np.where(by_judge, np.nan, probabilities),
        decided_by=tuple(np.where(by_judge, "judge", np.where(record.readable, "scorer", "")).tolist()),
    )


def _where(wanted: NDArray[np.bool_], texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(text if kept else "" for text, kept in zip(texts, wanted, strict=True))


def sweep(record: Record, *, steps: int = round(1 / STEP)) -> Sweep:
    """Every measure over all its thresholds.

    Args:
        steps: how many points a curve has beside its beginning.

    Raises:
        DataError: if the judge was not asked about every image that could be read.
    """
    if not record.judged.asked[record.readable].all():
        raise DataError("The judge was not asked about every image.", hint="Make the record with: evaluate --judge-all.")
    rows = np.flatnonzero(record.readable)
    scores = record.scores.rows(rows)
    truths = record.truths[rows]
    scorer_right = record.scored[rows] == truths
    judge_right = final_answers(record)[rows] == truths
    gain = judge_right.astype(np.int64) - scorer_right
    dollars = record.judged.dollars[rows]
    curves = [
        _curve(name, doubt, scorer_right, gain, dollars, steps, sign=sign) for name, (doubt, sign) in _rankings(scores).items()
    ]
    rates = np.linspace(0, 1, steps + 1)
    random = scorer_right.mean() + rates * gain.mean()
    curves.append(
        Curve(
            name="random",
            deferral_rates=rates,
            accuracies=random,
            dollars=1000 * rates * dollars.mean(),
            thresholds=None,
            area=float(random.mean()),
        )
    )
    curves.sort(key=lambda curve: -curve.area)
    pareto = _pareto(curves)
    oracle = _curve("oracle", gain.astype(np.float64), scorer_right, gain, dollars, steps, sign=0)
    return Sweep(
        scorer_accuracy=float(scorer_right.mean()),
        judge_accuracy=float(judge_right.mean()),
        curves=(oracle, *curves),
        pareto=pareto,
    )


def _rankings(scores: Scores) -> Mapping[str, tuple[Values, int]]:
    """Doubt by each measure: N numbers, the larger the sooner asked, and what the measure's own values are of it."""
    return {
        "entropy": (measures.entropy(scores).astype(np.float64), 1),
        "margin": (-measures.margin(scores).astype(np.float64), -1),
        "top_probability": (-measures.top_probability(scores).astype(np.float64), -1),
    }


def _curve(
    name: str, doubt: Values, scorer_right: NDArray[np.bool_], gain: NDArray[np.int64], dollars: Values, steps: int, *, sign: int
) -> Curve:
    order = np.argsort(-doubt, kind="stable")
    size = len(order)
    counts = np.round(np.linspace(0, 1, steps + 1) * size).astype(np.int64)
    gained = np.concatenate([[0], np.cumsum(gain[order])])
    spent = np.concatenate([[0], np.cumsum(dollars[order])])
    accuracies = (scorer_right.sum() + gained[counts]) / size
    edges = np.concatenate([[np.inf], doubt[order], [-np.inf]])
    return Curve(
        name=name,
        deferral_rates=counts / size,
        accuracies=accuracies,
        dollars=1000 * spent[counts] / size,
        thresholds=sign * (edges[counts] + edges[counts + 1]) / 2 if sign else None,
        area=float(accuracies.mean()),
    )


def _pareto(curves: list[Curve]) -> tuple[tuple[str, float, float, float], ...]:
    points = sorted(
        (
            (float(dollars), -float(accuracy), curve.name, float(rate))
            for curve in curves
            for dollars, accuracy, rate in zip(curve.dollars, curve.accuracies, curve.deferral_rates, strict=True)
        ),
    )
    kept: list[tuple[str, float, float, float]] = []
    for dollars, lost, name, rate in points:
        if not kept or -lost > kept[-1][2]:
            kept.append((name, rate, -lost, dollars))
    return tuple(kept)

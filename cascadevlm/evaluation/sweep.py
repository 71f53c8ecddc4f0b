"""Policies tried on a record: what each would have got right, and what it would have cost, at every share of images escalated.

Nothing is asked: a record that holds the judge's answer for every image (``evaluate --judge-all``) holds those of every policy.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.base.errors import DataError
from cascadevlm.evaluation.record import Record
from cascadevlm.policies import measures
from cascadevlm.policies.base import PolicyLike, Spending, as_policy

STEP = 0.05
"""Between the shares of images escalated at which curves are given."""

MEASURES: Mapping[str, tuple[measures.Measure, int]] = {
    "entropy": (measures.entropy, 1),
    "margin": (measures.margin, -1),
    "top_probability": (measures.top_probability, -1),
}
"""By the name that policies call them; 1 where the judge is asked above the threshold, -1 where it is asked below."""

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One way of ranking images, from asking about none to asking about all.

    Attributes:
        name: of the measure.
        deferral_rates: P shares of images escalated, from 0 to 1.
        accuracies: P.
        dollars: P, per thousand images.
        thresholds: P values of the measure that escalate so many, infinite at the ends, NaN where equal images cannot be told
            apart; None where the ranking has none.
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
        scorer_accuracy: with nobody asked; of several records, the best one's.
        judge_accuracy: with everything asked; of several records, the best one's.
        curves: the oracle's, of each record, then the others by area, best first.
        pareto: of all points of all curves but the oracle's, those that no other beats in both accuracy and dollars: name of the
            curve, deferral rate, accuracy and dollars per thousand images, from the cheapest on.
    """

    scorer_accuracy: float
    judge_accuracy: float
    curves: tuple[Curve, ...]
    pareto: tuple[tuple[str, float, float, float], ...]

    def curve(self, name: str) -> Curve:
        """The one of a name, in the sweep of one record."""
        return next(curve for curve in self.curves if curve.name == name)

    def to_dict(self) -> dict[str, JsonValue]:
        """The sweep as JSON-serialisable data."""
        return {
            "scorer_accuracy": self.scorer_accuracy,
            "judge_accuracy": self.judge_accuracy,
            "curves": [curve.to_dict() for curve in self.curves],
            "pareto": [list(point) for point in self.pareto],
        }


def final_answers(record: Record) -> Columns:
    """N columns: what is concluded where the judge is asked.

    Its answer where it gave one, else the scorer's, or none in a record of a cascade that abstains; of fused opinions, theirs.
    """
    answers = record.judged.answers
    otherwise = record.scored if record.fused is None else record.fused.labels
    if record.stated.on_failure == "abstain":
        otherwise = np.full(len(record), NOBODY)
    return np.where(answers == NOBODY, otherwise, answers if record.fused is None else record.fused.labels)


def under(record: Record, policy: PolicyLike) -> Record:
    """The record as it would be, had its last stage had this policy: questions that it would not have asked are left out.

    A policy that depends on batches or keeps to a budget sees all images as one batch, and a call at its mean price.

    Raises:
        DataError: if it would have asked what was not asked.
    """
    judged = record.judged
    price = float(judged.dollars.sum() / max(judged.asked.sum(), 1))
    wanted = np.zeros(len(record), dtype=bool)
    gain = None if record.fused is None else tuple(record.fused.gain[record.readable].tolist())
    readable = record.scores.rows(record.readable)
    wanted[record.readable] = as_policy(policy).select(readable, Spending(prices=(price,) * len(readable), gain=gain))
    if lacking := int((wanted & ~judged.asked).sum()):
        raise DataError(
            f"The policy {policy} asks about {lacking} images that the judge was not asked about.", hint="Use --judge-all."
        )
    answers = np.where(wanted, judged.answers, NOBODY)
    predicted = np.where(wanted, final_answers(record), record.scored)
    word_final = record.fused is None or record.fused.word_final
    by_judge, by_whom = (answers != NOBODY, "judge") if word_final else (wanted, "fusion")
    decided_by = np.where(predicted == NOBODY, "", np.where(by_judge, by_whom, "scorer"))
    of_judge = record.probabilities if record.fused is None else record.fused.probabilities
    of_scorer = np.where(decided_by == "scorer", record.scores.probabilities.max(axis=1), np.nan)
    probabilities = np.where(by_judge & (predicted != NOBODY), of_judge, of_scorer)
    refused = probabilities < (record.stated.accept or 0.0)
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
    return replace(
        record,
        stages=(*record.stages[:-1], stage),
        predicted=np.where(refused, NOBODY, predicted),
        probabilities=np.where(refused, np.nan, probabilities),
        decided_by=tuple(np.where(refused, "", decided_by).tolist()),
    )


def _where(wanted: NDArray[np.bool_], texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(text if kept else "" for text, kept in zip(texts, wanted, strict=True))


def sweep(record: Record | Mapping[str, Record], *, steps: int = round(1 / STEP)) -> Sweep:
    """Every measure over all its thresholds.

    Args:
        record: or several by name, of the same images: other candidates, prompts or judges; their curves are then called
            "measure (name)".
        steps: how many points a curve has beside its beginning.

    Raises:
        DataError: if a judge was not asked about every image that could be read, there is none, or several records are not of the
            same images.
    """
    records = {"": record} if isinstance(record, Record) else record
    _require_same_images(records)
    curves = [
        [replace(curve, name=f"{curve.name} ({name})" if len(records) > 1 else curve.name) for curve in _curves(each, steps)]
        for name, each in records.items()
    ]
    oracles = [oracle for oracle, *_ in curves]
    others = sorted((curve for _, *own in curves for curve in own), key=lambda curve: -curve.area)
    return Sweep(
        scorer_accuracy=max(float(oracle.accuracies[0]) for oracle in oracles),
        judge_accuracy=max(float(oracle.accuracies[-1]) for oracle in oracles),
        curves=(*oracles, *others),
        pareto=_pareto(others),
    )


def _require_same_images(records: Mapping[str, Record]) -> None:
    (first, reference), *others = records.items()
    truths = np.array(reference.labels.names)[reference.truths]
    for name, record in others:
        if record.names != reference.names or not np.array_equal(np.array(record.labels.names)[record.truths], truths):
            raise DataError(
                f"The records {first!r} and {name!r} are not of the same images.", hint="Evaluate both on the same data."
            )


def _curves(record: Record, steps: int) -> list[Curve]:
    """The oracle's, the measures', and that of random escalation."""
    if not record.asked_everything:
        raise DataError("The judge was not asked about every image.", hint="Make the record with: evaluate --judge-all.")
    rows = np.flatnonzero(record.readable)
    if not len(rows):
        raise DataError("None of the record's images could be read.")
    scores = record.scores.rows(rows)
    truths = record.truths[rows]
    scorer_right = record.scored[rows] == truths
    gain = (final_answers(record)[rows] == truths).astype(np.int64) - scorer_right
    dollars = record.judged.dollars[rows]
    rankings = {name: (sign * measure(scores).astype(np.float64), sign) for name, (measure, sign) in MEASURES.items()}
    if record.fused is not None:
        rankings["gain"] = record.fused.gain[rows], 1
    rates = np.linspace(0, 1, steps + 1)
    random = scorer_right.mean() + rates * gain.mean()
    return [
        _curve("oracle", gain.astype(np.float64), scorer_right, gain, dollars, steps, sign=0),
        *(_curve(name, doubt, scorer_right, gain, dollars, steps, sign=sign) for name, (doubt, sign) in rankings.items()),
        Curve(
            name="random",
            deferral_rates=rates,
            accuracies=random,
            dollars=1000 * rates * dollars.mean(),
            thresholds=None,
            area=float(random.mean()),
        ),
    ]


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
    above, below = edges[counts], edges[counts + 1]
    return Curve(
        name=name,
        deferral_rates=counts / size,
        accuracies=accuracies,
        dollars=1000 * spent[counts] / size,
        thresholds=sign * np.where(above > below, (above + below) / 2, np.nan) if sign else None,
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

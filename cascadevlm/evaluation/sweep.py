"""Applies policies to a record: the accuracy and cost that each policy would have had, at every share of escalated images.

No judge is asked. A record with the judge's answer for every image (``evaluate --judge-all``) contains the answers that any
policy needs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.base.errors import DataError
from cascadevlm.evaluation.record import Record
from cascadevlm.policies import measures
from cascadevlm.policies.base import PolicyLike, Spending, as_policy

STEP = 0.05
"""Distance between two points of a curve, as a share of escalated images."""

MEASURES: Mapping[str, tuple[measures.Measure, int]] = {
    "entropy": (measures.entropy, 1),
    "margin": (measures.margin, -1),
    "top_probability": (measures.top_probability, -1),
}
"""Measures by their names in policies. 1: images above the threshold are escalated; -1: images below it."""

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The accuracy and cost of one ranking of the images, at P shares of escalated images from 0 to 1.

    Attributes:
        name: name of the measure that ranks the images.
        deferral_rates: ``(P,)`` shares of escalated images, from 0 to 1.
        accuracies: ``(P,)`` accuracies, from 0 to 1.
        dollars: ``(P,)`` US dollars per 1,000 images.
        thresholds: ``(P,)`` thresholds of the measure that escalate these shares. They are infinite at the ends, and NaN if equal
            values on both sides allow no threshold. None for rankings without a threshold.
        area: area under accuracy against deferral rate, computed as the mean over the points.
    """

    name: str
    deferral_rates: Values = field(repr=False)
    accuracies: Values = field(repr=False)
    dollars: Values = field(repr=False)
    thresholds: Values | None = field(repr=False)
    area: float

    def at(self, deferral_rate: float) -> float:
        """The accuracy at a share of escalated images, interpolated between the points."""
        return float(np.interp(deferral_rate, self.deferral_rates, self.accuracies))

    def to_dict(self) -> dict[str, JsonValue]:
        """The curve as JSON-serialisable data."""
        return {name: _as_json(value) for name, value in vars(self).items()}


def _as_json(value: JsonValue | Values) -> JsonValue:
    """Lists in place of arrays. NaN and infinity, which JSON does not have, become null."""
    if not isinstance(value, np.ndarray):
        return value
    return [number if np.isfinite(number) else None for number in value.tolist()]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The curves of one or several records.

    For comparison there are two more curves per record: random escalation, and an oracle that knows when a question helps.

    Attributes:
        scorer_accuracy: accuracy without any question. For several records, the best of them.
        judge_accuracy: accuracy after a question about every image. For several records, the best of them.
        curves: the oracles of all records first, then all other curves with decreasing area.
        pareto: points of all curves except the oracles to which no other point is superior, cheapest first. Each has the name of
            the curve, the deferral rate, the accuracy, and US dollars per 1,000 images.
    """

    scorer_accuracy: float
    judge_accuracy: float
    curves: tuple[Curve, ...]
    pareto: tuple[tuple[str, float, float, float], ...] = field(repr=False)

    def curve(self, name: str) -> Curve:
        """The curve with this name, in the sweep of one record."""
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
    """``(N,)`` columns of the final labels if the judge is asked about every image.

    This is the judge's answer, or the fused label in a record with a calibration. If the judge gave no answer, it is the scorer's
    label or the fused label; or no label, if the cascade abstains on failure.
    """
    answers = record.judged.answers
    otherwise = record.scored if record.fused is None else record.fused.labels
    if record.stated.on_failure == "abstain":
        otherwise = np.full(len(record), NOBODY)
    return np.where(answers == NOBODY, otherwise, answers if record.fused is None else record.fused.labels)


def under(record: Record, policy: PolicyLike) -> Record:
    """The record that this policy in the last stage would have made. Questions that the policy does not ask are left out.

    A policy that depends on batches sees all images as one batch. A policy with a budget sees the mean price for every question.

    Raises:
        DataError: if the policy asks about images that the judge was not asked about.
    """
    judged = record.judged
    price = float(judged.dollars.sum() / max(judged.asked.sum(), 1))
    wanted = np.zeros(len(record), dtype=bool)
    gain = None if record.fused is None else tuple(record.fused.gain[record.readable].tolist())
    readable = record.scores.rows(record.readable)
    wanted[record.readable] = as_policy(policy).select(readable, Spending(prices=(price,) * len(readable), gain=gain))
    if lacking := int((wanted & ~judged.asked).sum()):
        raise DataError(
            f"The policy {policy} asks about {lacking} images that the judge was not asked about.",
            hint="Make the record with: evaluate --judge-all.",
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
    """The curves of every measure over all its thresholds.

    Args:
        record: a record, or several records of the same images by name, for example with other prompts or judges. With several
            records, a curve is named "measure (name)".
        steps: number of steps of a curve; it has one point more.

    Raises:
        DataError: if a judge was not asked about every readable image, no image could be read, a record has no judge, or several
            records have different images.
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
                f"The records {first!r} and {name!r} have different images or truths.", hint="Evaluate both on the same data."
            )


def _curves(record: Record, steps: int) -> list[Curve]:
    """The curves of the oracle, of all measures, and of random escalation, in this order."""
    if not record.asked_everything:
        raise DataError("The judge was not asked about every image.", hint="Make the record with: evaluate --judge-all.")
    rows = np.flatnonzero(record.readable)
    if not len(rows):
        raise DataError("None of the record's images could be read.", hint="Make a record of readable images.")
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

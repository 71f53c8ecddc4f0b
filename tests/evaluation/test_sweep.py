"""Sweeps of a record, compared with runs of the policies and with other computations."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score

from cascadevlm.base.arrays import NOBODY
from cascadevlm.base.errors import DataError
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Scores
from cascadevlm.evaluation.record import Judged, Record
from cascadevlm.evaluation.sweep import sweep, under
from cascadevlm.policies.limits import WithinDollars
from cascadevlm.policies.measures import entropy, margin, top_probability
from cascadevlm.policies.rules import EntropyAbove, MarginBelow, Never, TopProbabilityBelow

LABELS = LabelSet.of(["ant", "bee", "cicada", "dragonfly"])


def record(seed: int, size: int = 60, *, unanswered: float = 0.1, unreadable: int = 0) -> Record:
    """A judge better than the scorer, and some questions without an answer."""
    rng = np.random.default_rng(seed)
    truths = rng.integers(0, len(LABELS), size)
    logits = rng.normal(size=(size, len(LABELS)))
    logits[np.arange(size), truths] += rng.exponential(1.0, size)
    scores = Scores.from_logits(logits, LABELS, fingerprint="x")
    answers = np.where(rng.random(size) < 0.8, truths, rng.integers(0, len(LABELS), size))
    answers[rng.random(size) < unanswered] = NOBODY
    readable = np.arange(size) >= unreadable
    judged = Judged(
        judge="fake:judge",
        asked=readable,
        outcomes=tuple("answered" if answer != NOBODY else "unparsed" for answer in answers),
        answers=np.where(readable, answers, NOBODY),
        candidates=np.tile(np.arange(len(LABELS)), (size, 1)),
        rationales=("",) * size,
        dollars=rng.uniform(0.001, 0.01, size) * readable,
        seconds=np.zeros(size),
        input_tokens=np.zeros(size, dtype=np.int64),
        output_tokens=np.zeros(size, dtype=np.int64),
        paid=np.zeros(size),
    )
    return Record(
        scores=scores,
        readable=readable,
        names=tuple(map(str, range(size))),
        truths=truths,
        stages=(judged,),
        predicted=answers,
        probabilities=np.full(size, np.nan),
        decided_by=("judge",) * size,
    )


@given(st.integers(0, 10_000), st.integers(1, 80))
def test_every_point_is_what_the_policy_gives(seed: int, size: int) -> None:
    given_record = record(seed, size)
    policies = {"entropy": EntropyAbove, "margin": MarginBelow, "top_probability": TopProbabilityBelow}
    for curve in sweep(given_record).curves:
        if curve.thresholds is None:
            continue
        for rate, accuracy, dollars, threshold in zip(
            curve.deferral_rates, curve.accuracies, curve.dollars, curve.thresholds, strict=True
        ):
            if not np.isfinite(threshold):
                continue
            live = under(given_record, policies[curve.name](threshold))
            assert live.judged.asked.mean() == rate
            assert accuracy_score(live.truths, live.predicted) == pytest.approx(accuracy)
            assert live.judged.dollars.sum() * 1000 / size == pytest.approx(dollars)


@given(st.integers(0, 10_000))
def test_curves_begin_with_the_scorer_and_end_with_the_judge(seed: int) -> None:
    result = sweep(record(seed))
    for curve in result.curves:
        assert curve.accuracies[0] == pytest.approx(result.scorer_accuracy)
        assert curve.accuracies[-1] == pytest.approx(result.judge_accuracy)
        assert curve.area == pytest.approx(np.mean(curve.accuracies))
    oracle, *others = result.curves
    assert oracle.name == "oracle"
    assert all((oracle.accuracies >= other.accuracies - 1e-12).all() for other in others)


@given(st.integers(0, 10_000))
def test_no_point_beats_one_of_the_pareto_set(seed: int) -> None:
    result = sweep(record(seed))
    points = [
        (dollars, accuracy)
        for curve in result.curves[1:]
        for dollars, accuracy in zip(curve.dollars, curve.accuracies, strict=True)
    ]
    for _, _, accuracy, dollars in result.pareto:
        assert not any(cost <= dollars and right > accuracy + 1e-12 for cost, right in points)
    for cost, right in points:
        assert any(accuracy >= right - 1e-12 and dollars <= cost + 1e-12 for _, _, accuracy, dollars in result.pareto)


def test_random_escalation_is_the_mean_of_many() -> None:
    given_record = record(1, 400)
    (curve,) = [curve for curve in sweep(given_record).curves if curve.name == "random"]
    rng = np.random.default_rng(0)
    drawn = [
        (under(given_record, lambda scores: rng.random(len(scores)) < 0.5).predicted == given_record.truths).mean()
        for _ in range(300)
    ]
    assert np.mean(drawn) == pytest.approx(curve.at(0.5), abs=0.005)


def test_thresholds_separate_the_images() -> None:
    given_record = record(2)
    for curve in sweep(given_record).curves:
        if curve.thresholds is None:
            continue
        measure, asks_above = {
            "entropy": (entropy, True),
            "margin": (margin, False),
            "top_probability": (top_probability, False),
        }[curve.name]
        values = measure(given_record.scores)
        asked = [np.mean(values > t if asks_above else values < t) for t in curve.thresholds]
        np.testing.assert_allclose(asked, curve.deferral_rates)


def test_nothing_is_swept_that_was_not_asked() -> None:
    gated = under(record(3), EntropyAbove(0.5))
    with pytest.raises(DataError, match="--judge-all"):
        sweep(gated)
    with pytest.raises(DataError, match="was not asked"):
        under(gated, EntropyAbove(0.1))


def test_a_policy_that_never_asks_leaves_the_scorer() -> None:
    alone = under(record(4), Never())
    np.testing.assert_array_equal(alone.predicted, alone.scored)
    assert set(alone.decided_by) == {"scorer"}
    assert alone.judged.dollars.sum() == 0


def test_unreadable_images_are_no_part_of_a_sweep() -> None:
    whole, part = record(5, 50, unreadable=20), record(5, 50)
    result = sweep(whole)
    rows = np.arange(20, 50)
    assert result.scorer_accuracy == pytest.approx((part.scored[rows] == part.truths[rows]).mean())


def test_a_sweep_is_json() -> None:
    data = json.loads(json.dumps(sweep(record(6)).to_dict(), allow_nan=False))
    assert {curve["name"] for curve in data["curves"]} == {"oracle", "entropy", "margin", "top_probability", "random"}


def test_several_records_are_swept_against_each_other() -> None:
    first = record(8)
    answers = np.where(np.arange(60) % 3 == 0, first.truths, first.judged.answers)
    better = replace(first, stages=(replace(first.judged, answers=answers, dollars=first.judged.dollars * 3),))
    alone = {"a": sweep(first), "b/c": sweep(better)}
    both = sweep({"a": first, "b/c": better})
    expected = {f"{curve.name} ({name})": curve for name, result in alone.items() for curve in result.curves}
    assert [curve.name for curve in both.curves[:2]] == ["oracle (a)", "oracle (b/c)"]
    assert {curve.name: replace(curve, name="").to_dict() for curve in both.curves} == {
        name: replace(curve, name="").to_dict() for name, curve in expected.items()
    }
    areas = [curve.area for curve in both.curves[2:]]
    assert areas == sorted(areas, reverse=True)
    assert both.judge_accuracy == alone["b/c"].judge_accuracy > alone["a"].judge_accuracy
    assert {name.rpartition(" ")[2] for name, *_ in both.pareto} == {"(a)", "(b/c)"}
    for _, _, accuracy, dollars in both.pareto:
        for other in (*alone["a"].pareto, *alone["b/c"].pareto):
            assert not (other[3] <= dollars and other[2] > accuracy + 1e-12)
    assert sweep({"a": first}).to_dict() == alone["a"].to_dict()


def test_records_of_other_images_are_not_compared() -> None:
    first = record(8)
    relabelled = LabelSet.of(reversed(LABELS.names))
    scores = Scores(log_probs=first.scores.log_probs[:, ::-1], labels=relabelled, fingerprint="x")
    same = replace(first, scores=scores, truths=len(LABELS) - 1 - first.truths)
    assert len(sweep({"a": first, "b": same}).curves) == 10
    renamed = replace(first, names=(*first.names[1:], first.names[0]))
    for other in (renamed, replace(first, truths=first.truths[::-1]), record(8, 50)):
        with pytest.raises(DataError, match="'a' and 'b' have different images or truths"):
            sweep({"a": first, "b": other})


@given(st.integers(0, 10_000))
def test_a_budget_of_dollars_is_kept_at_the_mean_price(seed: int) -> None:
    given_record = record(seed)
    price = given_record.judged.dollars.mean()
    live = under(given_record, WithinDollars(7.5 * price))
    asked = np.argsort(-entropy(given_record.scores), kind="stable")[:7]
    assert set(np.flatnonzero(live.judged.asked)) == set(asked)


def test_nothing_readable_cannot_be_swept() -> None:
    with pytest.raises(DataError, match="None of the record's images"):
        sweep(record(1, 5, unreadable=5))


def test_records_without_a_judge_are_refused() -> None:
    with pytest.raises(DataError, match="no judge"):
        sweep(replace(record(7), stages=()))

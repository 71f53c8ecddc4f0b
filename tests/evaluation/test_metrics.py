"""Metrics compared with scikit-learn, scipy and simple loops, and with records that are small enough to count by hand."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import accuracy_score, balanced_accuracy_score, recall_score, top_k_accuracy_score

from cascadevlm.base.arrays import NOBODY
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Scores
from cascadevlm.evaluation.metrics import (
    ClassEvaluation,
    accuracy,
    coverage,
    evaluate,
    expected_calibration_error,
    interval,
    latency_percentile,
    macro_average,
    macro_interval,
    mean,
    per_class_accuracy,
    top_k_recall,
)
from cascadevlm.evaluation.record import Judged, Record

seeds = st.integers(0, 10_000)
sizes = st.integers(1, 60)
class_counts = st.integers(2, 12)


def draw(seed: int, size: int, classes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Truths, and predictions that are right in about half of the cases and sometimes abstain."""
    rng = np.random.default_rng(seed)
    truths = rng.integers(0, classes, size)
    predicted = np.where(rng.random(size) < 0.5, truths, rng.integers(NOBODY, classes, size))
    return truths, predicted


def judged(
    outcomes: Sequence[str], answers: Sequence[int], candidates: Sequence[Sequence[int]], seconds: Sequence[float] = ()
) -> Judged:
    """For every question that was asked: a cost of ten cents, of which four were paid, 100 input tokens and 10 output tokens."""
    put = np.array([outcome not in ("", "skipped") for outcome in outcomes])
    return Judged(
        judge="fake:judge",
        asked=put,
        outcomes=tuple(outcomes),
        answers=np.array(answers, dtype=np.int64),
        candidates=np.array(candidates, dtype=np.int64),
        rationales=("",) * len(outcomes),
        dollars=0.1 * put,
        seconds=np.array(seconds or [0.0] * len(outcomes)),
        input_tokens=100 * put.astype(np.int64),
        output_tokens=10 * put.astype(np.int64),
        paid=0.04 * put,
    )


def record(
    probabilities: Sequence[Sequence[float]],
    truths: Sequence[int],
    predicted: Sequence[int],
    *,
    stages: tuple[Judged, ...] = (),
    readable: Sequence[bool] | None = None,
    given: Sequence[float] | None = None,
) -> Record:
    labels = LabelSet.of(["ant", "bee", "cicada", "dragonfly"][: len(probabilities[0])])
    log_probs = np.log(np.array(probabilities, dtype=np.float32))
    size = len(truths)
    return Record(
        scores=Scores(log_probs=log_probs, labels=labels, fingerprint="test"),
        readable=np.ones(size, dtype=bool) if readable is None else np.array(readable),
        names=tuple(map(str, range(size))),
        truths=np.array(truths, dtype=np.int64),
        stages=stages,
        predicted=np.array(predicted, dtype=np.int64),
        probabilities=np.full(size, np.nan) if given is None else np.array(given),
        decided_by=("",) * size,
    )


ANT, BEE, CICADA = 0, 1, 2
SURE_ANT, ANT_OR_BEE, BEE_OR_ANT = (0.9, 0.06, 0.04), (0.5, 0.3, 0.2), (0.3, 0.6, 0.1)


def cascade_record() -> Record:
    """Nine images, the last unreadable:

    ==  ======  ======  =============================  =========  =========
    #   truth   scorer  judge                          cascade
    ==  ======  ======  =============================  =========  =========
    0   ant     ant     not asked                      ant        kept
    1   bee     ant     not asked                      ant        kept
    2   bee     ant     answers bee                    bee        rescued
    3   bee     ant     answers bee (cached)           bee        rescued
    4   ant     ant     answers bee                    bee        harmed
    5   cicada  ant     none of these: not offered     abstains
    6   bee     bee     fails                          abstains   harmed
    7   bee     bee     skipped                        bee
    8   ant     -       -                              -          unreadable
    ==  ======  ======  =============================  =========  =========
    """
    return record(
        [SURE_ANT, SURE_ANT, ANT_OR_BEE, ANT_OR_BEE, ANT_OR_BEE, ANT_OR_BEE, BEE_OR_ANT, BEE_OR_ANT, (1 / 3,) * 3],
        truths=[ANT, BEE, BEE, BEE, ANT, CICADA, BEE, BEE, ANT],
        predicted=[ANT, ANT, BEE, BEE, BEE, NOBODY, NOBODY, BEE, NOBODY],
        readable=[True] * 8 + [False],
        given=[0.9, 0.9] + [math.nan] * 5 + [0.6, math.nan],
        stages=(
            judged(
                ["", "", "answered", "answered", "answered", "none", "failed", "skipped", ""],
                [NOBODY, NOBODY, BEE, BEE, BEE, NOBODY, NOBODY, NOBODY, NOBODY],
                [[NOBODY, NOBODY]] * 2 + [[ANT, BEE]] * 4 + [[BEE, NOBODY]] + [[BEE, ANT]] + [[NOBODY, NOBODY]],
                [0.0, 0.0, 1.0, 0.0, 2.0, 3.0, 10.0, 0.0, 0.0],
            ),
        ),
    )


@given(seeds, sizes, class_counts)
def test_accuracies_are_scikit_learns(seed: int, size: int, classes: int) -> None:
    truths, predicted = draw(seed, size, classes)
    assert accuracy(predicted, truths) == pytest.approx(accuracy_score(truths, predicted))
    per_class = per_class_accuracy(predicted, truths, classes)
    assert len(per_class) == classes
    present = np.unique(truths)
    np.testing.assert_allclose(per_class[present], recall_score(truths, predicted, labels=present, average=None))
    assert np.isnan(np.delete(per_class, present)).all()
    assert macro_average(per_class) == pytest.approx(recall_score(truths, predicted, labels=present, average="macro"))


@given(seeds, sizes, class_counts)
def test_the_macro_average_is_balanced_accuracy(seed: int, size: int, classes: int) -> None:
    truths, _ = draw(seed, size, classes)
    present = np.unique(truths)
    assume(len(present) > 1)  # scikit-learn warns of one class, and of predicted classes that no truth is of
    predicted = np.random.default_rng(seed + 1).choice(present, size)
    found = macro_average(per_class_accuracy(predicted, truths, classes))
    assert found == pytest.approx(balanced_accuracy_score(truths, predicted))


@given(seeds, sizes, class_counts)
def test_top_k_recall_is_scikit_learns(seed: int, size: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    scores, truths = rng.normal(size=(size, classes)), rng.integers(0, classes, size)
    recall = top_k_recall(scores, truths, range(1, classes + 1))
    for k in range(1, classes):
        numbers = np.arange(classes)
        # of two classes scikit-learn wants one score
        if classes > 2:
            assert recall[k] == pytest.approx(top_k_accuracy_score(truths, scores, k=k, labels=numbers))
    assert recall[1] == pytest.approx(accuracy_score(truths, scores.argmax(axis=1)))
    assert recall[classes] == 1


@given(seeds, sizes, class_counts)
def test_of_equal_scores_the_earlier_column_ranks_higher(seed: int, size: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    scores, truths = rng.integers(0, 3, (size, classes)).astype(np.float64), rng.integers(0, classes, size)
    ranking = np.argsort(-scores, axis=1, kind="stable")
    for k, share in top_k_recall(scores, truths, range(1, classes + 1)).items():
        assert share == pytest.approx(np.mean([truth in row[:k] for row, truth in zip(ranking, truths, strict=True)]))
        assert share == coverage(ranking[:, :k], truths)


@pytest.mark.parametrize("k", [0, 4])
def test_a_k_beyond_the_labels_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k = {k} is not from 1 to 3"):
        top_k_recall(np.zeros((2, 3)), np.zeros(2, dtype=np.int64), [k])


def test_coverage_takes_no_notice_of_places_without_candidate() -> None:
    candidates = np.array([[0, 1], [1, NOBODY], [NOBODY, NOBODY], [2, 0]])
    assert coverage(candidates, np.array([1, 1, 0, 1])) == 0.5


def plain_calibration_error(confidences: Sequence[float], right: Sequence[bool], bins: int) -> float:
    error = 0.0
    for number in range(bins):
        low, high = number / bins, (number + 1) / bins
        inside = [i for i, p in enumerate(confidences) if low < p <= high or (number == 0 and p == 0)]
        if inside:
            confidence = sum(confidences[i] for i in inside) / len(inside)
            share = sum(right[i] for i in inside) / len(inside)
            error += len(inside) / len(confidences) * abs(share - confidence)
    return error


on_edges = st.integers(0, 15).map(lambda number: number / 15)


@given(st.lists(st.tuples(st.floats(0, 1) | on_edges, st.booleans()), min_size=1, max_size=80), st.sampled_from([1, 10, 15]))
def test_calibration_error_is_that_of_a_plain_loop(cases: list[tuple[float, bool]], bins: int) -> None:
    confidences, right = zip(*cases, strict=True)
    expected = plain_calibration_error(confidences, right, bins)
    assert expected_calibration_error(np.array(confidences), np.array(right), bins=bins) == pytest.approx(expected, abs=1e-12)


def test_calibration_error_has_fifteen_bins_and_tells_calibrated_from_overconfident() -> None:
    rng = np.random.default_rng(0)
    confidences = rng.uniform(0.2, 1, 50_000)
    calibrated = rng.random(50_000) < confidences
    found = expected_calibration_error(confidences, calibrated)
    assert found == pytest.approx(plain_calibration_error(confidences.tolist(), calibrated.tolist(), 15))
    assert found == pytest.approx(0, abs=0.02)
    always_half = rng.random(50_000) < 0.5
    assert expected_calibration_error(np.full(50_000, 0.9), always_half) == pytest.approx(0.4, abs=0.01)


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=50), st.integers(0, 20), st.sampled_from([0, 50, 95, 100]))
def test_latency_is_of_the_questions_that_were_asked(taken: list[float], cached: int, percent: float) -> None:
    seconds = np.random.default_rng(0).permutation(taken + [0.0] * cached)
    assert latency_percentile(seconds, percent) == pytest.approx(stats.scoreatpercentile(taken, percent))


def test_what_no_image_tells_is_none() -> None:
    nothing, numbers = np.array([], dtype=np.int64), np.array([])
    assert mean(numbers) is None
    assert accuracy(nothing, nothing) is None
    assert macro_average(per_class_accuracy(nothing, nothing, 3)) is None
    assert top_k_recall(np.zeros((0, 3)), nothing, [1, 3]) == {1: None, 3: None}
    assert coverage(np.zeros((0, 2), dtype=np.int64), nothing) is None
    assert expected_calibration_error(numbers, nothing.astype(bool)) is None
    assert latency_percentile(np.zeros(3), 50) is None
    for few in (0, 1):
        assert interval(np.ones(few)) is None
        assert macro_interval(np.ones(few, dtype=bool), np.zeros(few, dtype=np.int64)) is None


def test_an_interval_is_seeded_and_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(1).random(2000) < 0.7
    found = interval(values, seed=3)
    assert found == interval(values, seed=3)
    assert found != interval(values, seed=4)
    expected = stats.norm.interval(0.95, loc=values.mean(), scale=stats.sem(values))
    assert found == pytest.approx(expected, abs=0.003)


def test_an_interval_does_not_depend_on_how_many_values_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).random(200) < 0.7
    truths = np.random.default_rng(2).integers(0, 5, 200)
    whole, whole_macro = interval(values), macro_interval(values, truths)
    monkeypatch.setattr("cascadevlm.evaluation.metrics.BATCH_VALUES", 3000)
    assert interval(values) == pytest.approx(whole)
    assert macro_interval(values, truths) == pytest.approx(whole_macro)


def test_intervals_hold_the_truth_about_95_percent_of_the_time() -> None:
    trials, size, classes = 300, 400, 4
    rng = np.random.default_rng(5)
    shares, accuracies = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.9, 0.5, 0.7, 0.6])
    held = held_macro = 0
    for seed in range(trials):
        truths = rng.choice(classes, size, p=shares)
        right = rng.random(size) < accuracies[truths]
        found, found_macro = interval(right, seed=seed, resamples=400), macro_interval(right, truths, seed=seed, resamples=400)
        assert found is not None
        assert found_macro is not None
        held += found[0] <= shares @ accuracies <= found[1]
        held_macro += found_macro[0] <= accuracies.mean() <= found_macro[1]
    # each bound would be passed by chance one time in a thousand, at a coverage between 93 and 96 %
    low, high = stats.binom.ppf([0.001, 0.999], trials, [0.93, 0.96])
    assert low <= held <= high
    assert low <= held_macro <= high


def test_the_interval_of_a_macro_average_is_that_of_resampled_images() -> None:
    rng = np.random.default_rng(0)
    truths = np.append(rng.choice(4, 199, p=[0.5, 0.2, 0.2, 0.1]), 4)  # more than a third of the resamples lack the last class
    right = np.append(rng.random(199) < 0.6, False)
    averages = []
    for _ in range(4000):
        rows = rng.integers(0, len(truths), len(truths))
        averages.append(macro_average(per_class_accuracy(np.where(right, truths, NOBODY)[rows], truths[rows], 5)))
    expected = np.percentile(np.array(averages, dtype=np.float64), [2.5, 97.5])
    assert macro_interval(right, truths, resamples=20_000) == pytest.approx(expected, abs=0.006)
    assert macro_interval(np.ones(200, dtype=bool), truths) == (1, 1)


def test_a_record_counted_by_hand() -> None:
    found = evaluate(cascade_record())
    assert (found.images, found.unreadable) == (9, 1)
    assert found.scorer_accuracy == 4 / 8
    assert found.cascade_accuracy == 4 / 8
    assert found.macro_accuracy == pytest.approx((1 / 2 + 3 / 5 + 0) / 3)
    assert found.top_k_recall == {1: 4 / 8, 2: 7 / 8, 3: 1.0}
    assert found.coverage == 4 / 5
    assert found.deferral_rate == 6 / 8
    assert (found.scorer_accuracy_kept, found.scorer_accuracy_escalated) == (1 / 2, 3 / 6)
    assert (found.judge_accuracy_kept, found.judge_accuracy_escalated, found.judge_accuracy) == (None, 2 / 5, 2 / 5)
    assert (found.rescued, found.harmed, found.abstained) == (2, 2, 2)
    # of 0.9, 0.5 and 0.6: two with one right, four with one right, two with two right
    assert found.scorer_calibration_error == pytest.approx((2 * 0.4 + 4 * 0.25 + 2 * 0.4) / 8)
    assert found.calibration_error == pytest.approx((2 * 0.4 + 0.4) / 3)
    assert found.dollars == pytest.approx(0.5)
    assert found.dollars_per_thousand == pytest.approx(62.5)
    assert found.paid_dollars == pytest.approx(0.2)
    assert (found.input_tokens, found.output_tokens) == (500, 50)
    assert found.latency_p50 == 2.5
    assert found.latency_p95 == pytest.approx(3 + 0.85 * 7)
    assert found.outcomes == {"answered": 3, "none": 1, "refused": 0, "unparsed": 0, "failed": 1, "skipped": 1}
    assert found.per_class == {
        "ant": ClassEvaluation(images=2, scorer_accuracy=1.0, cascade_accuracy=0.5),
        "bee": ClassEvaluation(images=5, scorer_accuracy=0.4, cascade_accuracy=0.6),
        "cicada": ClassEvaluation(images=1, scorer_accuracy=0.0, cascade_accuracy=0.0),
    }


@pytest.mark.parametrize("seed", [0, 1])
def test_the_intervals_of_a_record_are_seeded(seed: int) -> None:
    given_record = random_record(7, 60, 4)
    found = evaluate(given_record, seed=seed)
    readable = given_record.readable
    truths = given_record.truths[readable]
    right = given_record.predicted[readable] == truths
    assert found.scorer_accuracy_interval == interval(given_record.scored[readable] == truths, seed=seed)
    assert found.cascade_accuracy_interval == interval(right, seed=seed)
    assert found.macro_accuracy_interval == macro_interval(right, truths, seed=seed)
    other = evaluate(given_record, seed=seed + 1)
    assert found.macro_accuracy_interval != other.macro_accuracy_interval


def test_what_the_judge_says_of_kept_images_can_be_known_from_elsewhere() -> None:
    everything = judged(["answered"] * 8 + [""], [ANT, BEE, ANT, ANT, ANT, ANT, ANT, BEE, NOBODY], [[ANT, BEE]] * 9)
    found = evaluate(cascade_record(), everything=everything)
    assert found.judge_accuracy_kept == 1
    assert found.judge_accuracy_escalated == 2 / 5
    assert found.judge_accuracy == 4 / 7
    assert replace(found, judge_accuracy_kept=None, judge_accuracy=2 / 5) == evaluate(cascade_record())


def test_of_several_stages_the_last_answer_counts_and_the_last_candidates() -> None:
    first = judged(["answered", "answered", "answered", "none"], [BEE, BEE, BEE, NOBODY], [[ANT, BEE]] * 4)
    second = judged(["", "answered", "failed", "skipped"], [NOBODY, ANT, NOBODY, NOBODY], [[ANT]] * 4)
    found = evaluate(record([ANT_OR_BEE] * 4, [BEE] * 4, [BEE, ANT, BEE, ANT], stages=(first, second)))
    assert found.judge_accuracy == 2 / 4
    assert found.coverage == 2 / 4  # image 1 and 2 were last shown ANT alone
    assert found.deferral_rate == 1
    assert found.outcomes["answered"] == 4
    assert found.dollars == pytest.approx(0.6)


def test_a_scorer_alone() -> None:
    found = evaluate(record([SURE_ANT, BEE_OR_ANT], [ANT, ANT], [ANT, BEE], given=[0.9, 0.6]))
    assert found.scorer_accuracy == found.cascade_accuracy == found.scorer_accuracy_kept == 0.5
    assert found.deferral_rate == found.dollars == found.input_tokens == found.rescued == found.harmed == 0
    assert found.calibration_error == pytest.approx(found.scorer_calibration_error) == pytest.approx(0.35)
    unknown = (
        found.coverage,
        found.scorer_accuracy_escalated,
        found.judge_accuracy_escalated,
        found.judge_accuracy,
        found.latency_p50,
        found.latency_p95,
    )
    assert unknown == (None,) * 6
    assert set(found.outcomes.values()) == {0}
    assert found.per_class["bee"] == ClassEvaluation(images=0, scorer_accuracy=None, cascade_accuracy=None)


def test_a_stage_that_was_never_asked_is_as_none() -> None:
    alone = record([SURE_ANT, BEE_OR_ANT], [ANT, ANT], [ANT, BEE], given=[0.9, 0.6])
    silent = replace(judged(["", ""], [NOBODY, NOBODY], [[], []]), candidates=np.zeros((2, 0), dtype=np.int64))
    assert evaluate(replace(alone, stages=(silent,))) == evaluate(alone)


def test_nothing_readable() -> None:
    found = evaluate(
        record(
            [(0.5, 0.5)] * 2, [ANT, BEE], [NOBODY] * 2, readable=[False] * 2, stages=(judged(["", ""], [NOBODY] * 2, [[], []]),)
        )
    )
    assert (found.images, found.unreadable, found.abstained, found.dollars) == (2, 2, 0, 0)
    figures = found.to_dict()
    unknown = [name for name in figures if "accuracy" in name or "error" in name or "rate" in name or name == "coverage"]
    assert len(unknown) == 15
    assert {name: figures[name] for name in unknown} == dict.fromkeys(unknown)
    assert found.dollars_per_thousand is None
    assert found.top_k_recall == {1: None, 2: None}


def test_a_single_class() -> None:
    found = evaluate(record([(1.0,)] * 3, [ANT] * 3, [ANT, ANT, NOBODY], given=[1, 1, math.nan]))
    assert found.top_k_recall == {1: 1.0}
    assert found.scorer_accuracy == 1
    assert found.macro_accuracy == found.cascade_accuracy == pytest.approx(2 / 3)
    assert (found.abstained, found.harmed) == (1, 1)
    assert found.calibration_error == 0


def random_record(seed: int, size: int, classes: int) -> Record:
    rng = np.random.default_rng(seed)
    labels = LabelSet.of(f"class {number}" for number in range(classes))
    truths, answers = draw(seed, size, classes)
    scores = Scores.from_logits(rng.normal(size=(size, classes)), labels, "test")
    readable = rng.random(size) < 0.9
    asked = (rng.random(size) < 0.6) & readable
    outcomes = np.where(asked, np.where(answers == NOBODY, rng.choice(["none", "skipped", "failed"], size), "answered"), "")
    answers = np.where(asked, answers, NOBODY)
    width = int(rng.integers(1, classes + 1))
    stage = judged(outcomes.tolist(), answers.tolist(), rng.integers(NOBODY, classes, (size, width)).tolist())
    by_scorer = readable & (answers == NOBODY)
    return Record(
        scores=scores,
        readable=readable,
        names=tuple(map(str, range(size))),
        truths=truths,
        stages=(replace(stage, seconds=rng.exponential(size=size) * asked),),
        predicted=np.where(by_scorer, scores.log_probs.argmax(axis=1), answers),
        probabilities=np.where(by_scorer, scores.probabilities.max(axis=1), np.nan),
        decided_by=("",) * size,
    )


@given(seeds, st.integers(1, 40), st.integers(1, 30))
def test_json_reads_back_as_it_was_and_holds_no_nan(seed: int, size: int, classes: int) -> None:
    values = evaluate(random_record(seed, size, classes)).to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values


@given(seeds, st.integers(1, 40), class_counts)
def test_the_figures_of_a_record_hold_together(seed: int, size: int, classes: int) -> None:
    given_record = random_record(seed, size, classes)
    found = evaluate(given_record)
    readable, (stage,) = given_record.readable, given_record.stages
    assume(readable.any())
    truths, scored, predicted = (
        column[readable] for column in (given_record.truths, given_record.scored, given_record.predicted)
    )
    assert found.scorer_accuracy == pytest.approx(accuracy_score(truths, scored))
    assert found.cascade_accuracy == pytest.approx(accuracy_score(truths, predicted))
    assert found.rescued - found.harmed == (predicted == truths).sum() - (scored == truths).sum()
    asked = [row for row in range(size) if stage.outcomes[row] not in ("", "skipped")]
    if asked:
        assert found.judge_accuracy == pytest.approx(accuracy_score(given_record.truths[asked], stage.answers[asked]))
        assert found.coverage == pytest.approx(np.mean([given_record.truths[row] in stage.candidates[row] for row in asked]))
    assert sum(found.outcomes.values()) == sum(outcome != "" for outcome in stage.outcomes)
    assert sum(kind.images for kind in found.per_class.values()) == readable.sum()

"""Comparisons of records, checked with tests enumerated by hand, scipy's paired bootstrap and simple loops."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.base.errors import DataError
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Scores
from cascadevlm.evaluation.compare import Pair, compare, holm, mcnemar
from cascadevlm.evaluation.record import Judged, Record

LABELS = LabelSet.of(["ant", "bee", "cicada", "dragonfly"])
ANT, BEE, CICADA, DRAGONFLY = range(4)
seeds = st.integers(0, 10_000)


def judged(answers: Sequence[int], *, skipped: Sequence[int] = (), kept: Sequence[int] = ()) -> Judged:
    """A judge that was asked about all images except some. Each question took ten cents and two seconds, and this run paid
    nothing.
    """
    size = len(answers)
    outcomes = ["answered" if answer != NOBODY else "none" for answer in answers]
    for row in (*skipped, *kept):
        outcomes[row] = "skipped" if row in skipped else ""
    asked = np.array([outcome not in ("", "skipped") for outcome in outcomes])
    return Judged(
        judge="fake:judge",
        asked=asked,
        outcomes=tuple(outcomes),
        answers=np.where(asked, answers, NOBODY),
        candidates=np.tile(np.arange(len(LABELS)), (size, 1)),
        rationales=("",) * size,
        dollars=0.1 * asked,
        seconds=2.0 * asked,
        input_tokens=np.zeros(size, dtype=np.int64),
        output_tokens=np.zeros(size, dtype=np.int64),
        paid=np.zeros(size),
    )


def record(
    truths: Sequence[int] | Columns,
    predicted: Sequence[int] | Columns,
    *,
    stages: tuple[Judged, ...] = (),
    labels: LabelSet = LABELS,
) -> Record:
    size = len(truths)
    return Record(
        scores=Scores.from_logits(np.zeros((size, len(labels))), labels, fingerprint="x"),
        readable=np.ones(size, dtype=bool),
        names=tuple(f"image {number}" for number in range(size)),
        truths=np.array(truths, dtype=np.int64),
        stages=stages,
        predicted=np.array(predicted, dtype=np.int64),
        probabilities=np.full(size, np.nan),
        decided_by=("",) * size,
    )


def in_order(given_record: Record, rows: NDArray[np.intp]) -> Record:
    """The same run over the same images, with another order of the images and of the labels."""
    labels = LabelSet(LABELS.labels[::-1])

    def turned(columns: Columns) -> Columns:
        return np.where(columns == NOBODY, NOBODY, len(LABELS) - 1 - columns)[rows]

    return replace(
        given_record,
        scores=Scores.from_logits(np.zeros((len(rows), len(labels))), labels, fingerprint="x"),
        readable=given_record.readable[rows],
        names=tuple(given_record.names[row] for row in rows),
        truths=turned(given_record.truths),
        predicted=turned(given_record.predicted),
        stages=tuple(
            replace(
                stage,
                answers=turned(stage.answers),
                **{name: getattr(stage, name)[rows] for name in ("asked", "dollars", "seconds", "paid")},
                outcomes=tuple(stage.outcomes[row] for row in rows),
            )
            for stage in given_record.stages
        ),
    )


def draw(seed: int, size: int, runs: int = 2) -> dict[str, Record]:
    """Runs over the same images that are right in about half of the cases and sometimes abstain."""
    rng = np.random.default_rng(seed)
    truths = rng.integers(0, len(LABELS), size)
    answers = [np.where(rng.random(size) < 0.5, truths, rng.integers(NOBODY, len(LABELS), size)) for _ in range(runs)]
    return {f"run {n}": record(truths, each, stages=(judged(each.tolist()),)) for n, each in enumerate(answers)}


def only_pair(records: Mapping[str, Record]) -> Pair:
    (pair,) = compare(records).pairs
    return pair


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemars_test_sums_what_is_no_likelier(only_first: int, only_second: int) -> None:
    size = only_first + only_second
    ways = [comb(size, k) for k in range(size + 1)]
    expected = sum(way for way in ways if way <= ways[only_first]) / 2**size
    assert mcnemar(only_first, only_second) == pytest.approx(expected)
    assert mcnemar(only_second, only_first) == pytest.approx(expected)


def test_holms_method_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1, 1]
    assert holm([0.2]) == [0.2]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.sampled_from([0.01, 0.05, 0.2]))
def test_holms_method_rejects_what_its_steps_reject(p_values: list[float], level: float) -> None:
    rejected = set()
    for step, number in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[number] * (len(p_values) - step) > level:
            break
        rejected.add(number)
    assert {number for number, p_value in enumerate(holm(p_values)) if p_value <= level} == rejected


def test_two_runs_counted_by_hand() -> None:
    """Seven images. The second run does not escalate the fifth image and skips the sixth. Neither run has a label for the last
    image.
    """
    truths = [ANT, ANT, BEE, BEE, CICADA, CICADA, DRAGONFLY]
    mine = [ANT, BEE, BEE, BEE, CICADA, ANT, NOBODY]
    its = [ANT, ANT, BEE, ANT, CICADA, CICADA, NOBODY]
    found = compare(
        {
            "a": record(truths, mine, stages=(judged(mine),)),
            "b": record(truths, its, stages=(judged(its, kept=[4], skipped=[5]),)),
        }
    )
    assert (found.images, found.unreadable) == (7, 0)
    a, b = found.runs["a"], found.runs["b"]
    assert (a.accuracy, b.accuracy) == (4 / 7, 5 / 7)
    assert (a.deferral_rate, b.deferral_rate) == (1, 6 / 7)
    assert (a.dollars_per_thousand, b.dollars_per_thousand) == pytest.approx((100, 500 / 7))
    assert (a.paid_dollars, a.latency_p50, a.latency_p95) == (0, 2, 2)
    (pair,) = found.pairs
    assert (pair.only_first, pair.only_second) == (1, 2)
    assert pair.difference == pytest.approx(1 / 7)
    assert pair.p_value == pair.p_value_holm == 1
    assert pair.agreement == found.agreement[0][1] == found.agreement[1][0] == 4 / 7
    by_chance = (2 * 3 + 3 * 1 + 1 * 2 + 1 * 1) / 49  # ant, bee, cicada, no label
    assert pair.kappa == pytest.approx((4 / 7 - by_chance) / (1 - by_chance))
    assert pair.judges is not None
    assert (pair.judges.images, pair.judges.agreement) == (5, 3 / 5)
    assert (pair.judges.first_accuracy, pair.judges.second_accuracy) == (3 / 5, 3 / 5)
    assert [(each.name, each.truth, each.labels) for each in found.disagreements] == [
        ("image 1", "ant", {"a": "bee", "b": "ant"}),
        ("image 3", "bee", {"a": "bee", "b": "ant"}),
        ("image 5", "cicada", {"a": "ant", "b": "cicada"}),
    ]


def test_no_label_is_none_among_the_disagreements() -> None:
    (found,) = compare({"a": record([ANT], [ANT]), "b": record([ANT], [NOBODY])}).disagreements
    assert found.labels == {"a": "ant", "b": None}


def test_the_interval_is_that_of_resampled_pairs() -> None:
    records = draw(1, 500)
    first, second = ((each.predicted == each.truths).astype(np.float64) for each in records.values())
    expected = stats.bootstrap(
        (first, second),
        lambda a, b, axis: b.mean(axis=axis) - a.mean(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=5000,
        method="percentile",
        random_state=np.random.default_rng(9),
    ).confidence_interval
    assert only_pair(records).difference_interval == pytest.approx((expected.low, expected.high), abs=0.008)


@given(seeds, st.integers(1, 40))
def test_a_run_beside_itself_differs_in_nothing(seed: int, size: int) -> None:
    given_record = draw(seed, size)["run 0"]
    found = compare({"a": given_record, "b": given_record})
    (pair,) = found.pairs
    assert (pair.difference, pair.p_value, pair.agreement) == (0, 1, 1)
    assert pair.difference_interval == ((0, 0) if size > 1 else None)
    assert pair.kappa == (pytest.approx(1) if len(set(given_record.predicted.tolist())) > 1 else None)
    assert found.disagreements == ()
    assert found.runs["a"] == found.runs["b"]


@given(seeds, st.integers(2, 40))
def test_the_other_way_round_is_the_same_with_the_sign_changed(seed: int, size: int) -> None:
    a, b = draw(seed, size).values()
    there, back = only_pair({"a": a, "b": b}), only_pair({"b": b, "a": a})
    assert there.difference == pytest.approx(-back.difference)
    assert (there.only_first, there.only_second) == (back.only_second, back.only_first)
    assert there.p_value == pytest.approx(back.p_value)
    assert there.agreement == back.agreement
    assert there.kappa == (None if back.kappa is None else pytest.approx(back.kappa))
    assert there.difference_interval is not None
    assert back.difference_interval is not None
    low, high = there.difference_interval
    assert back.difference_interval == pytest.approx((-high, -low))


@given(seeds, st.integers(1, 30))
def test_images_and_labels_in_another_order_are_aligned(seed: int, size: int) -> None:
    records = draw(seed, size)
    rows = np.random.default_rng(seed).permutation(size)
    assert compare({"run 0": records["run 0"], "run 1": in_order(records["run 1"], rows)}) == compare(records)


@given(seeds, st.integers(1, 30), st.integers(2, 5))
def test_every_two_of_several_are_compared(seed: int, size: int, runs: int) -> None:
    records = draw(seed, size, runs)
    found = compare(records)
    assert [(pair.first, pair.second) for pair in found.pairs] == [*combinations(records, 2)]
    for pair in found.pairs:
        alone = only_pair({name: records[name] for name in (pair.first, pair.second)})
        assert replace(pair, p_value_holm=alone.p_value) == alone
        assert pair.p_value <= pair.p_value_holm <= min(1, pair.p_value * len(found.pairs)) + 1e-12
    whole = [{each.predicted[row] for each in records.values()} for row in range(size)]
    assert [each.name for each in found.disagreements] == [f"image {row}" for row in range(size) if len(whole[row]) > 1]


def test_what_one_run_could_not_read_is_left_out_of_all() -> None:
    records = draw(3, 20)
    unread = np.arange(20) < 4
    records["run 1"] = replace(records["run 1"], readable=~unread, predicted=np.where(unread, NOBODY, records["run 1"].predicted))
    found = compare(records)
    assert (found.images, found.unreadable) == (16, 4)
    read = records["run 0"]
    assert found.runs["run 0"].accuracy == (read.predicted == read.truths)[4:].mean()
    assert not {each.name for each in found.disagreements} & {f"image {row}" for row in range(4)}


def test_a_scorer_alone_has_no_judge_to_compare() -> None:
    records = draw(4, 10)
    records["run 0"] = replace(records["run 0"], stages=())
    found = compare(records)
    assert found.pairs[0].judges is None
    assert (found.runs["run 0"].deferral_rate, found.runs["run 0"].latency_p50) == (0, None)


def test_judges_of_different_images_are_not_compared() -> None:
    labels = [ANT, BEE]
    mine, its = judged(labels, kept=[0]), judged(labels, kept=[1])
    assert only_pair({"a": record(labels, labels, stages=(mine,)), "b": record(labels, labels, stages=(its,))}).judges is None


@given(seeds, st.integers(1, 30), st.integers(2, 4))
def test_a_comparison_is_json_as_it_reads_back(seed: int, size: int, runs: int) -> None:
    values = compare(draw(seed, size, runs)).to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values


def test_the_seed_is_that_of_the_resampling() -> None:
    records = draw(5, 400)
    assert compare(records, seed=1) == compare(records, seed=1)
    assert compare(records, seed=1).pairs[0].difference_interval != compare(records, seed=2).pairs[0].difference_interval


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (record([ANT], [ANT]), "'b' and 'a' have different images: 1 of 2 are only in 'a', and 0 of 1 are only in 'b'"),
        (record([ANT, ANT], [ANT, ANT]), "have different truths: 1 of 2 are only in 'a'"),
        (
            record([ANT, BEE], [ANT, BEE], labels=LabelSet.of(["ant", "bee", "cicada"])),
            "have different labels: 1 of 4 are only in 'a', and 0 of 3 are only in 'b', for example 'dragonfly'",
        ),
    ],
)
def test_runs_over_something_else_are_refused(other: Record, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        compare({"a": record([ANT, BEE], [ANT, BEE]), "b": other})


def test_one_run_and_runs_that_read_nothing_are_refused() -> None:
    records = draw(6, 5)
    with pytest.raises(DataError, match="at least two records"):
        compare({"a": records["run 0"]})
    records["run 1"] = replace(records["run 1"], readable=np.zeros(5, dtype=bool))
    with pytest.raises(DataError, match="There is no image that every run could read"):
        compare(records)

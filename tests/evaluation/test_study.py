"""Studies, compared with other computations on records and with the questions to fake judges."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue
from scipy.stats import chi2
from sklearn.metrics import accuracy_score

from cascadevlm import Stage, TopK, load_prompt
from cascadevlm.base.arrays import NOBODY
from cascadevlm.base.errors import BudgetExhausted, DataError, InputError
from cascadevlm.base.images import load_image
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Question, Scores
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.config.config import Config
from cascadevlm.evaluation.data import Data, read_data
from cascadevlm.evaluation.record import Judged, Record, read_record
from cascadevlm.evaluation.study import (
    position_bias,
    split_errors,
    study_candidates,
    study_errors,
    study_order,
    study_reasoning,
    study_shots,
    study_threshold,
)
from cascadevlm.judges.base import Quote
from cascadevlm.judges.budget import Ledger
from cascadevlm.judges.cache import DiskStore, MemoryStore, key_of, question_payload
from cascadevlm.policies.measures import entropy
from cascadevlm.policies.rules import Always, EntropyAbove
from cascadevlm.runs.run_folder import spent_in
from cascadevlm.testing import FakeJudge, FakeScorer, noise
from cascadevlm.testing.fakes import Reply

NAMES = ["ant", "bee", "cicada", "dragonfly", "earwig", "firefly"]
LABELS = LabelSet.of(NAMES)
STAGE: dict[str, JsonValue] = {"judge": "fake:judge", "policy": "entropy > 0.5", "candidates": 3}
CONFIG = Config.parse({"scorer": {"use": "fake:x"}, "stage": [STAGE]})
GATE = EntropyAbove(0.5)


def record(seed: int, size: int = 60, *, k: int = 3, stages: int = 1) -> Record:
    """Judges that are asked about some images, with outcomes of every kind, and some unreadable images."""
    rng = np.random.default_rng(seed)
    truths = rng.integers(0, len(LABELS), size)
    logits = rng.normal(size=(size, len(LABELS)))
    logits[np.arange(size), truths] += rng.exponential(1.0, size)
    scores = Scores.from_logits(logits, LABELS, fingerprint="x")
    readable = rng.random(size) < 0.9
    readable[0] = True
    ranking = np.argsort(-scores.log_probs, axis=1)[:, :k]
    judges, reached = [], readable
    predicted = np.where(readable, scores.log_probs.argmax(axis=1), NOBODY)
    for number in range(stages):
        reached = reached & (rng.random(size) < 0.7)
        outcomes = np.where(reached, rng.choice(["answered", "none", "failed", "skipped"], size, p=[0.7, 0.1, 0.1, 0.1]), "")
        answered = outcomes == "answered"
        candidates = np.where(reached[:, None], rng.permuted(ranking, axis=1), NOBODY)
        answers = np.where(answered, candidates[np.arange(size), rng.integers(0, k, size)], NOBODY)
        predicted = np.where(answered, answers, predicted)
        put = reached & (outcomes != "skipped")
        judges.append(
            Judged(
                judge=f"fake:{number}",
                asked=put,
                outcomes=tuple(outcomes.tolist()),
                answers=answers,
                candidates=candidates,
                rationales=("",) * size,
                dollars=rng.uniform(0.001, 0.01, size) * put,
                seconds=rng.uniform(1, 2, size) * put,
                input_tokens=100 * put,
                output_tokens=10 * put,
                paid=np.zeros(size),
            )
        )
    return Record(
        scores=scores,
        readable=readable,
        names=tuple(map(str, range(size))),
        truths=truths,
        stages=tuple(judges),
        predicted=predicted,
        probabilities=np.full(size, np.nan),
        decided_by=("",) * size,
    )


def everything(seed: int, size: int = 60) -> Record:
    """One judge that was asked about all images. Some answers came from the cache and have no seconds."""
    rng = np.random.default_rng(seed)
    part = record(seed, size)
    readable = part.readable
    candidates = np.argsort(-part.scores.log_probs, axis=1)[:, :3]
    answers = candidates[np.arange(size), rng.integers(0, 3, size)]
    answers[(rng.random(size) < 0.1) | ~readable] = NOBODY
    judged = replace(
        part.judged,
        asked=readable,
        outcomes=tuple(np.where(readable, np.where(answers != NOBODY, "answered", "unparsed"), "").tolist()),
        answers=answers,
        candidates=np.where(readable[:, None], candidates, NOBODY),
        dollars=rng.uniform(0.001, 0.01, size) * readable,
        seconds=rng.uniform(1, 2, size) * readable * (rng.random(size) < 0.7),
    )
    predicted = np.where(answers == NOBODY, part.scored, answers)
    return replace(part, stages=(judged,), predicted=predicted)


@pytest.fixture
def data(tmp_path: Path) -> Data:
    """Twelve files. The last is not an image."""
    for number in range(12):
        file = tmp_path / "data" / NAMES[number % len(NAMES)] / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        noise(number).save(file)
    file.write_bytes(b"no image")
    return read_data(tmp_path / "data", LABELS)


class CountingScorer(FakeScorer):
    """Counts the images that it gets."""

    scored = 0

    def score(self, images: "list[object]", labels: LabelSet) -> Scores:  # type: ignore[override]
        self.scored += len(images)
        return super().score(images, labels)  # type: ignore[arg-type]


def cascade_of(judge: FakeJudge, *, ledger: Ledger | None = None, store: DiskStore | MemoryStore | None = None) -> Cascade:
    stage = Stage(judge=judge, prompt=load_prompt("select"), policy=GATE, candidates=TopK(k=3))
    return Cascade(CountingScorer(), [stage], labels=LABELS, ledger=ledger, store=store)


def by_content(question: Question) -> Reply:
    """Always gives the same name for an image, at any position in the list. For some images, it gives no answer."""
    names = sorted(label.name for label in question.labels)
    number = int(hashlib.sha256(question.image_digest.encode()).hexdigest()[:8], 16)
    return f"ANSWER: {names[number % len(names)]}" if number % 7 else "ANSWER: a mammoth"


def keys(judge: FakeJudge) -> list[str]:
    return [key_of(question_payload(judge, question)) for question in judge.questions]


@given(st.integers(0, 10_000), st.integers(1, 80), st.integers(0, 2))
def test_every_error_has_the_cause_that_it_has(seed: int, size: int, stages: int) -> None:
    given_record = record(seed, size, stages=stages)
    split = split_errors(given_record)
    for image in range(size):
        found = [name for name, here in split.items() if here[image]]
        if not given_record.readable[image] or given_record.predicted[image] == given_record.truths[image]:
            assert found == []
            continue
        reached = [stage for stage in given_record.stages if stage.outcomes[image]]
        if not reached:
            cause = "not escalated"
        elif given_record.truths[image] not in reached[-1].candidates[image]:
            cause = "truth not among the candidates"
        elif any(stage.outcomes[image] == "answered" for stage in reached):
            cause = "judge wrong"
        else:
            cause = "no answer"
        assert found == [cause]


@given(st.integers(0, 10_000), st.integers(1, 80), st.integers(0, 2))
def test_the_split_of_errors_is_whole(seed: int, size: int, stages: int) -> None:
    given_record = record(seed, size, stages=stages)
    readable = given_record.readable
    rows = study_errors(given_record).rows
    right = accuracy_score(given_record.truths[readable], given_record.predicted[readable])
    errors = sum(row.figures["errors"] or 0 for row in rows)
    assert errors == round((1 - right) * readable.sum())
    assert sum(row.figures["share"] or 0 for row in rows) == pytest.approx(1 if errors else 0)
    assert sum(row.accuracy - right for row in rows) == pytest.approx(1 - right)
    assert rows[0].calls == 0


@given(st.integers(0, 10_000), st.integers(1, 80))
def test_thresholds_are_what_a_loop_over_images_gives(seed: int, size: int) -> None:
    given_record = everything(seed, size)
    judged = given_record.judged
    measured = entropy(given_record.scores)
    images = np.flatnonzero(given_record.readable)
    for row in study_threshold(given_record, thresholds=(0.9, 0.0, 0.4)).rows:
        threshold = row.figures["threshold"]
        assert threshold is not None
        asked = [image for image in images if measured[image] > threshold]
        predicted = [given_record.predicted[i] if i in asked else given_record.scored[i] for i in images]
        assert row.accuracy == pytest.approx(accuracy_score(given_record.truths[images], predicted))
        assert row.calls == len(asked)
        assert row.figures["deferral_rate"] == pytest.approx(len(asked) / len(images))
        assert row.dollars == pytest.approx(sum(judged.dollars[asked]))
        timed = [judged.seconds[image] for image in asked if judged.seconds[image]]
        expected = sum(timed) / len(timed) * len(asked) if timed else None if asked else 0
        assert row.seconds == (expected if expected is None else pytest.approx(expected))
        assert row.variant == f"entropy > {threshold:g}"


def test_unless_given_thresholds_go_from_all_images_to_none() -> None:
    given_record = everything(1)
    rows = study_threshold(given_record).rows
    rates = [row.figures["deferral_rate"] or 0 for row in rows]
    assert rates[0] == 1
    assert rates[-1] == rows[-1].calls == 0
    np.testing.assert_allclose(np.diff(rates), -0.05, atol=0.02)
    readable = given_record.readable
    assert rows[-1].accuracy == accuracy_score(given_record.truths[readable], given_record.scored[readable])


def test_thresholds_want_every_answer_of_one_judge() -> None:
    with pytest.raises(DataError, match="--judge-all"):
        study_threshold(record(0))
    with pytest.raises(DataError, match="this record has 2"):
        study_threshold(record(0, stages=2), thresholds=[0.5])
    with pytest.raises(DataError, match="No image could be read"):
        study_errors(replace(record(0), readable=np.zeros(60, dtype=bool)))


def test_the_p_value_is_that_of_the_textbook() -> None:
    given_record = record(3, 400)
    judged = given_record.judged
    positions = [
        [*candidates].index(answer)
        for candidates, answer in zip(judged.candidates, judged.answers, strict=True)
        if answer != NOBODY
    ]
    counts = np.bincount(positions, minlength=3)
    bias = position_bias(given_record)
    np.testing.assert_array_equal(bias.chosen, counts)
    expected = len(positions) / 3
    assert bias.p_value == pytest.approx(chi2.sf(((counts - expected) ** 2 / expected).sum(), df=2))
    standing = [
        [*candidates].index(truth)
        for candidates, answer, truth in zip(judged.candidates, judged.answers, given_record.truths, strict=True)
        if answer != NOBODY and truth in candidates
    ]
    np.testing.assert_array_equal(bias.true, np.bincount(standing, minlength=3))


def test_of_candidates_of_different_number_each_position_has_its_share() -> None:
    given_record = record(4, 300)
    candidates = given_record.judged.candidates.copy()
    candidates[::2, 2] = NOBODY  # of every other question there were two
    rng = np.random.default_rng(0)
    picked = np.where(np.arange(300) % 2, rng.integers(0, 3, 300), rng.integers(0, 2, 300))
    answers = np.where(given_record.judged.answers == NOBODY, NOBODY, candidates[np.arange(300), picked])
    judged = replace(given_record.judged, candidates=candidates, answers=answers)
    p_value = position_bias(replace(given_record, stages=(judged,))).p_value
    assert p_value is not None
    assert p_value > 0.05


def test_without_answers_there_is_no_position_bias() -> None:
    given_record = record(5)
    silent = replace(given_record.judged, answers=np.full(60, NOBODY))
    assert position_bias(replace(given_record, stages=(silent,))).p_value is None


def many(folder: Path, size: int) -> Data:
    files = []
    for number in range(size):
        noise(number, (4, 4)).save(folder / f"{number}.png")
        files.append(folder / f"{number}.png")
    truths = tuple(NAMES[number % len(NAMES)] for number in range(size))
    return Data(images=files, names=tuple(map(str, files)), truths=truths, splits=("",) * size)


def test_a_judge_that_always_takes_the_first_is_found_out(tmp_path: Path) -> None:
    images = many(tmp_path, 60)
    ranked, backwards, shuffled = study_order(cascade_of(FakeJudge(reply="ANSWER: A")), images, config=CONFIG).rows
    assert shuffled.figures["p_value"] == pytest.approx(chi2.sf(60 * 2, df=2))
    assert [row.figures["chosen_1"] for row in (ranked, backwards, shuffled)] == [1, 1, 1]
    assert shuffled.figures["chosen_2"] == 0
    assert ranked.figures["p_value"] is None
    fair = study_order(cascade_of(FakeJudge(reply=by_content)), images, config=CONFIG).rows[2]
    assert fair.figures["p_value"] is not None
    assert fair.figures["p_value"] > 0.05
    assert 0 < (fair.figures["chosen_1"] or 0) < 0.6


def test_the_order_does_not_matter_to_a_judge_that_goes_by_the_image(data: Data) -> None:
    rows = study_order(cascade_of(FakeJudge(reply=by_content)), data, config=CONFIG).rows
    assert [row.variant for row in rows] == ["ranked", "reversed", "shuffled"]
    assert len({(row.accuracy, row.calls, row.figures["judge_all_accuracy"], row.figures["coverage"]) for row in rows}) == 1
    assert [row.figures["judge_all_difference"] for row in rows] == [None, 0, 0]


@pytest.mark.parametrize("kept", [False, True])
def test_nothing_is_asked_or_scored_twice(data: Data, tmp_path: Path, kept: bool) -> None:
    judge = FakeJudge(reply="ANSWER: A")
    cascade = cascade_of(judge, store=DiskStore(tmp_path / "cache") if kept else None)
    rows = study_order(cascade, data, config=CONFIG).rows
    assert len(set(keys(judge))) == len(judge.questions)
    assert len(judge.questions) < 33  # of eleven images a few are shuffled into an order that they were shown in before
    assert isinstance(cascade.scorer, CountingScorer)
    assert cascade.scorer.scored == 11
    assert [row.figures["judge_all_calls"] for row in rows] == [11, 11, 11]
    asked = len(judge.questions)
    study_candidates(cascade, data, config=CONFIG, ks=[3])
    assert len(judge.questions) == asked + (0 if kept else 11)


def test_candidates_are_as_many_as_said(data: Data, tmp_path: Path) -> None:
    judge = FakeJudge(reply="ANSWER: A", dollars=0.01, seconds=0.001)
    told: list[Cascade] = []
    seen: list[int] = []
    ks, folder = (4, 1, 100, 6), tmp_path / "out"
    study = study_candidates(
        cascade_of(judge),
        data,
        config=CONFIG,
        ks=ks,
        folder=folder,
        begin=told.append,
        progress=lambda tally: seen.append(tally.images),
    )
    assert [row.variant for row in study.rows] == ["k=1", "k=4", "k=6"]
    assert [stage.candidates for stage in told[0].stages] == [TopK(k=k) for k in (1, 4, 6)]
    assert seen == 3 * [*range(1, len(data) + 1)]
    scores = FakeScorer().score([load_image(file) for file in data.images[:-1]], LABELS)
    truths = np.array([NAMES.index(truth) for truth in data.truths[:-1]])
    ranks = [[*row].index(truth) for row, truth in zip(np.argsort(-scores.log_probs, axis=1), truths, strict=True)]
    asked = int(GATE.select(scores).sum())
    scorer = accuracy_score(truths, scores.log_probs.argmax(axis=1))
    for row, k in zip(study.rows, (1, 4, 6), strict=True):
        kept = read_record(folder / row.variant)
        assert kept.info is not None
        assert kept.info.config == {**CONFIG.model_dump(mode="json"), "stage": kept.info.config["stage"]}
        (stage,) = Config.parse(kept.info.config).stage
        assert (stage.candidates.k, stage.policy) == (k, "entropy > 0.5")
        assert row.accuracy == row.figures["judge_all_accuracy"] == scorer  # the first candidate is the scorer's best
        assert row.calls == asked
        assert row.dollars == pytest.approx(0.01 * asked)
        assert row.seconds is not None
        assert row.seconds >= 0.001 * asked
        assert row.figures["coverage"] == pytest.approx(np.mean([rank < k for rank in ranks]))
        first = [rank == 0 for rank in ranks if rank < k]
        assert row.figures["judge_accuracy_covered"] == (pytest.approx(sum(first) / len(first)) if first else None)
        assert row.figures["judge_all_input_tokens"] == 1100
        assert row.figures["judge_all_output_tokens"] == 110
    json.dumps(study.to_dict(), allow_nan=False)
    asked = len(judge.questions)
    again = study_candidates(cascade_of(judge), data, config=CONFIG, ks=(2, 4), folder=folder)
    assert len(judge.questions) == asked + 11  # those of k=4 are in the folder
    assert again.rows[1] == study.rows[1]


def test_the_difference_is_paired(data: Data) -> None:
    def better_with_reasoning(question: Question) -> Reply:
        return by_content(question) if question.prompt.reasoning else "ANSWER: B"

    direct, reasoned = study_reasoning(cascade_of(FakeJudge(reply=better_with_reasoning)), data, config=CONFIG).rows
    assert (direct.variant, reasoned.variant) == ("select", "select_cot")
    gain = reasoned.figures["judge_all_difference"]
    low, high = reasoned.figures["judge_all_difference_low"], reasoned.figures["judge_all_difference_high"]
    assert gain is not None
    assert low is not None
    assert high is not None
    assert gain == pytest.approx((reasoned.figures["judge_all_accuracy"] or 0) - (direct.figures["judge_all_accuracy"] or 0))
    assert low <= gain <= high


def test_exemplars_are_shown_as_many_as_said(data: Data, tmp_path: Path) -> None:
    for number in range(9):
        file = tmp_path / "support" / NAMES[number % 3] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        noise(100 + number).save(file)
    judge = FakeJudge()
    study = study_shots(cascade_of(judge), data, config=CONFIG, support=tmp_path / "support", shots=(2, 0, 1))
    assert [row.variant for row in study.rows] == ["shots=0", "shots=1", "shots=2"]
    assert study.notes == ()
    for number, question in enumerate(judge.questions):
        shots = number // 11
        assert question.prompt.name == ("select_fewshot" if shots else "select_cot")
        shown = [exemplar.label.name for exemplar in question.exemplars]
        assert shown == [name for label in question.labels for name in [label.name] * shots if name in NAMES[:3]]
    noise(0).save(tmp_path / "support" / "ant" / "0.png")
    assert study_shots(cascade_of(judge), data, config=CONFIG, support=tmp_path / "support", shots=[1]).notes
    with pytest.raises(InputError, match="-1 exemplars"):
        study_shots(cascade_of(judge), data, config=CONFIG, support=tmp_path / "support", shots=[-1])


def test_a_study_is_of_one_judge(data: Data) -> None:
    cascade = cascade_of(FakeJudge())
    with pytest.raises(InputError, match="this cascade has 0"):
        study_order(cascade.altered(stages=[]), data, config=CONFIG)
    with pytest.raises(InputError, match="this cascade has 2"):
        study_reasoning(cascade.altered(stages=[*cascade.stages] * 2), data, config=CONFIG)


class Priced(FakeJudge):
    """Costs one cent per question. The price is known before."""

    def quote(self, question: Question) -> Quote:
        return Quote(worst_case=10_000_000)


def test_a_study_that_the_budget_does_not_suffice_for_has_no_figures(data: Data) -> None:
    judge = Priced(dollars=0.01)
    with pytest.raises(BudgetExhausted, match="not asked about 3 images in the variant reversed"):
        study_order(cascade_of(judge, ledger=Ledger(0.195)), data, config=CONFIG)
    assert len(judge.questions) == 19


def test_a_study_that_was_stopped_by_its_budget_goes_on_with_a_higher_one(data: Data, tmp_path: Path) -> None:
    judge = Priced(dollars=0.01)
    with pytest.raises(BudgetExhausted, match="not asked about 3 images in the variant reversed"):
        study_order(cascade_of(judge, ledger=Ledger(0.195)), data, config=CONFIG, folder=tmp_path)
    with pytest.raises(BudgetExhausted, match="not asked about 4 images in the variant shuffled"):
        study_order(cascade_of(judge, ledger=Ledger(0.275)), data, config=CONFIG, folder=tmp_path)
    study_order(cascade_of(judge, ledger=Ledger(1.0)), data, config=CONFIG, folder=tmp_path)
    spent = sum(spent_in(tmp_path / name) for name in ("ranked", "reversed", "shuffled"))
    assert spent == pytest.approx(0.01 * len(judge.questions))
    assert len(set(keys(judge))) == len(judge.questions)


def test_an_abstention_is_wrong_though_the_scorer_be_right(data: Data) -> None:
    cascade = cascade_of(FakeJudge(reply="I cannot tell")).altered(on_failure="abstain")
    (row,) = study_candidates(cascade, data, config=CONFIG, ks=[2]).rows
    assert row.figures["judge_all_accuracy"] == row.figures["answered"] == 0
    always = cascade.altered(stages=[replace(cascade.stages[0], policy=Always())])
    assert study_candidates(always, data, config=CONFIG, ks=[2]).rows[0].accuracy == 0

"""Replays of real runs give the recorded scores and verdicts through the same interfaces."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cascadevlm import Cascade, CumulativeMass, Stage
from cascadevlm.base.errors import BackendError, DataError, FatalError, PermanentError
from cascadevlm.base.labels import Label, LabelSet
from cascadevlm.base.types import Prediction, Question, Scores
from cascadevlm.config.loading import load_judge, load_prompt, load_scorer
from cascadevlm.evaluation.data import Data
from cascadevlm.judges.base import Judge
from cascadevlm.judges.cache import DiskStore, MemoryStore
from cascadevlm.runs import bulk
from cascadevlm.scorers.base import Scorer
from cascadevlm.testing import FakeJudge, FakeScorer, JudgeContract, ScorerContract, noise, question

LABELS = LabelSet.of(["ant", "bee", "cicada", "dragonfly"])


def record(
    folder: Path,
    images: Iterable[Image.Image],
    *,
    scorer: Scorer | None = None,
    stages: Sequence[Stage] = (),
    labels: LabelSet = LABELS,
) -> Path:
    """The record of a cascade over these images."""
    pictures = tuple(images)
    names = tuple(map(str, range(len(pictures))))
    data = Data(images=pictures, names=names, truths=(labels.names[0],) * len(pictures), splits=("",) * len(pictures))
    bulk.run(Cascade(scorer or FakeScorer(), stages, labels=labels), data, folder, config={})
    return folder


def asking(judge: Judge) -> list[Stage]:
    return [Stage(judge=judge, prompt=load_prompt("select"))]


class Ranking(Scorer):
    """For one image after another, ranks the labels of the next question first."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self.names = iter([[label.name for label in each.labels] for each in questions])

    def score(self, images: Sequence[Image.Image], labels: LabelSet) -> Scores:
        logits = np.full((len(images), len(labels)), -50.0)
        for row, names in zip(logits, self.names, strict=False):
            row[[labels.columns[name] for name in names]] = -0.01 * np.arange(len(names))
        return Scores.from_logits(logits, labels, "ranking")


def record_of(folder: Path, questions: Sequence[Question], judge: Judge) -> Path:
    """The record of these questions."""
    labels = LabelSet.of(dict.fromkeys(label.name for each in questions for label in each.labels))
    stage = Stage(judge=judge, prompt=questions[0].prompt, candidates=CumulativeMass(minimum=1, mass=0.999))
    return record(folder, [each.image for each in questions], scorer=Ranking(questions), stages=[stage], labels=labels)


def test_a_cascade_replays_itself(tmp_path: Path) -> None:
    images = [noise(seed) for seed in range(6)]
    judge = FakeJudge(reply="I see wings.\nANSWER: B", dollars=0.01)
    stage = Stage(judge=judge, prompt=load_prompt("select_cot"))
    first = Cascade(FakeScorer(), [stage], labels=LABELS).classify(images)
    path = record(tmp_path / "run", images, stages=[stage])
    replaying = replace(stage, judge=load_judge(f"recorded:{path}"))
    store = MemoryStore()
    second = Cascade(load_scorer(f"recorded:{path}"), [replaying], labels=LABELS, store=store).classify(images)
    assert not store.verdicts
    for replayed, given in zip(second, first, strict=True):
        assert replayed.verdict is not None
        assert given.verdict is not None
        assert (replayed.cost.dollars, replayed.cost.saved_dollars) == (0, 0.01)
        verdict = replace(replayed.verdict, usage=given.verdict.usage)
        assert replace(replayed, verdicts=(verdict,)).to_dict() == given.to_dict()


def test_a_bulk_run_keeps_no_replayed_answers_again(tmp_path: Path) -> None:
    path = record(tmp_path / "record", map(noise, range(6)), stages=asking(FakeJudge()))
    cascade = Cascade(load_scorer(f"recorded:{path}"), asking(load_judge(f"recorded:{path}")), labels=LABELS)
    pictures = [(str(seed), noise(seed)) for seed in range(6)]
    assert bulk.run(cascade, pictures, tmp_path / "run", config={}).counts == {"answered": 6}
    assert [len(DiskStore(folder / "verdicts")) for folder in (path, tmp_path / "run")] == [6, 0]


def test_scores_are_exact_and_keep_their_fingerprint(tmp_path: Path) -> None:
    path = record(tmp_path / "run", [noise(1), noise(2)], scorer=FakeScorer("v1"))
    given = FakeScorer("v1").score([noise(1), noise(2)], LABELS)
    replayed = load_scorer(f"recorded:{path}").score([noise(2)], LABELS)
    np.testing.assert_array_equal(replayed.log_probs[0], given.log_probs[1])
    assert replayed.fingerprint == given.fingerprint == "fake:v1"


def test_scores_of_other_texts_are_refused(tmp_path: Path) -> None:
    scorer = load_scorer("open_clip:aviary", device="cpu")
    path = record(tmp_path / "run", [noise(1)], scorer=scorer)
    replayed = load_scorer(f"recorded:{path}")
    assert replayed.score([noise(1)], LABELS).fingerprint == scorer.score([noise(1)], LABELS).fingerprint
    drawn = LabelSet.of(Label(name=name, text=f"a drawing of a {name}") for name in LABELS.names)
    with pytest.raises(BackendError, match="with other texts"):
        replayed.score([noise(1)], drawn)


def test_nothing_is_made_up(tmp_path: Path) -> None:
    scorer = load_scorer(f"recorded:{record(tmp_path / 'run', [noise(1)])}")
    with pytest.raises(BackendError, match="has no scores of an image"):
        scorer.score([noise(9)], LABELS)
    with pytest.raises(BackendError, match="has no scores of an image"):
        scorer.score([noise(1)], LabelSet.of(["bee", "ant", "cicada", "dragonfly"]))


async def test_another_question_is_not_answered(tmp_path: Path) -> None:
    judge = load_judge(f"recorded:{record_of(tmp_path / 'run', [question(['ant', 'bee'])], FakeJudge())}")
    assert (await judge.judge(question(["ant", "bee"]))).label == "ant"
    others = [
        question(["ant", "bee", "cicada"]),
        question(["ant"]),
        question(["ant", "bee"], image=noise(3)),
        replace(question(["ant", "bee"]), rejected="What?"),
        replace(question(["ant", "bee"]), sample=1),
    ]
    for other in others:
        with pytest.raises(PermanentError, match="no answer to this question"):
            await judge.judge(other)


async def test_the_order_of_the_candidates_decides_only_between_recorded_ones(tmp_path: Path) -> None:
    orders = [question(names) for names in (["ant", "bee", "cicada"], ["bee", "cicada", "ant"])]
    judge = load_judge(f"recorded:{record_of(tmp_path / 'run', orders, FakeJudge())}")  # which chooses the first
    assert (await judge.judge(question(["ant", "bee", "cicada"]))).label == "ant"
    assert (await judge.judge(question(["bee", "cicada", "ant"]))).label == "bee"
    assert (await judge.judge(question(["cicada", "bee", "ant"]))).label in ("ant", "bee")


@pytest.mark.parametrize(
    ("known", "missing", "stops"), [(0, 8, True), (0, 7, False), (3, 10, False), (3, 11, True), (20, 27, False)]
)
def test_a_replay_stops_where_most_answers_are_missing(tmp_path: Path, known: int, missing: int, stops: bool) -> None:
    def classify(judge: Judge, images: range) -> list[Prediction]:
        return Cascade(FakeScorer(), asking(judge), labels=LABELS, batch_size=1).classify([noise(number) for number in images])

    path = record(tmp_path / "run", map(noise, range(known)), stages=asking(FakeJudge()))
    replaying = load_judge(f"recorded:{path}")
    for _ in range(2):  # the second run counts anew
        if stops:
            with pytest.raises(
                FatalError, match=rf"no answer to {missing} of {known + missing} questions\. Use the images, labels"
            ):
                classify(replaying, range(known + missing))
        else:
            outcomes = [each.verdict and each.verdict.outcome for each in classify(replaying, range(known + missing))]
            assert outcomes == ["answered"] * known + ["failed"] * missing


async def test_what_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    bulk.run(Cascade(FakeScorer(), [], labels=LABELS), [("0", noise(0))], tmp_path / "run", config={})
    for name, told in {"none": "it lacks", "file": "it lacks", "run": "is a run without labels, not a record"}.items():
        with pytest.raises(DataError, match=told):
            await load_judge(f"recorded:{tmp_path / name}").prepare()
        with pytest.raises(DataError, match=told):
            load_scorer(f"recorded:{tmp_path / name}").score([noise(0)], LABELS)


class TestRecordedScorer(ScorerContract):
    """Replays a record of the images of all tests."""

    @pytest.fixture(autouse=True)
    def _record(self, tmp_path: Path) -> None:
        images = [noise(1), noise(2, (20, 90)), noise(3, (1, 1)), *(noise(seed, (40 + seed, 30)) for seed in range(5))]
        self.path = record(tmp_path / "run", images, labels=self.labels)

    def make(self) -> Scorer:
        return load_scorer(f"recorded:{self.path}")

    def test_labels_keep_their_columns(self) -> None:
        """A record has one label set, in one order."""
        with pytest.raises(BackendError, match="images and labels of the record, in the same order"):
            self.make().score([noise(1)], LabelSet(self.labels.labels[::-1]))


class TestRecordedJudge(JudgeContract):
    """Each test runs twice: the first run is recorded, and the second run uses the record."""

    @pytest.fixture(autouse=True)
    async def _record(self, tmp_path: Path, request: pytest.FixtureRequest) -> None:
        judge = FakeJudge()
        self.judge: Judge = judge
        running = request.function()
        if running is not None:
            await running
        path = tmp_path / "run"
        await asyncio.to_thread(
            record_of, path, [each for each in judge.questions if not each.rejected] or [question()], FakeJudge()
        )
        self.judge = load_judge(f"recorded:{path}")

    def make(self) -> Judge:
        return self.judge

    async def test_repair_turn_is_understood(self) -> None:
        """A record contains only first questions."""
        if not isinstance(self.judge, FakeJudge):
            with pytest.raises(PermanentError, match="no answer to this question"):
                await self.judge.judge(replace(question(), rejected="A sparrow, I think."))

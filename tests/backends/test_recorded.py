"""What was recorded of real runs comes back through the same interfaces."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cascadevlm import Cascade, Stage
from cascadevlm.base.errors import BackendError, FatalError, PermanentError
from cascadevlm.base.labels import Label, LabelSet
from cascadevlm.base.types import Prediction
from cascadevlm.config.loading import load_judge, load_prompt, load_scorer
from cascadevlm.judges.base import Judge
from cascadevlm.judges.cache import DiskStore, MemoryStore
from cascadevlm.runs import bulk
from cascadevlm.scorers.base import Scorer
from cascadevlm.testing import FakeJudge, FakeScorer, JudgeContract, ScorerContract, noise, question
from cascadevlm_backends.recorded import RecordingJudge, RecordingScorer

LABELS = LabelSet.of(["ant", "bee", "cicada", "dragonfly"])


def test_a_cascade_replays_itself(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    images = [noise(seed) for seed in range(6)]
    judge = RecordingJudge(FakeJudge(reply="I see wings.\nANSWER: B", dollars=0.01), path)
    recording = Cascade(
        RecordingScorer(FakeScorer(), path), [Stage(judge=judge, prompt=load_prompt("select_cot"))], labels=LABELS
    )
    first = recording.classify(images)
    stage = Stage(judge=load_judge(f"recorded:{path}"), prompt=load_prompt("select_cot"))
    store = MemoryStore()
    second = Cascade(load_scorer(f"recorded:{path}"), [stage], labels=LABELS, store=store).classify(images)
    assert not store.verdicts
    for replayed, given in zip(second, first, strict=True):
        assert replayed.verdict is not None
        assert given.verdict is not None
        assert (replayed.cost.dollars, replayed.cost.saved_dollars) == (0, 0.01)
        verdict = replace(replayed.verdict, usage=given.verdict.usage)
        assert replace(replayed, verdicts=(verdict,)).to_dict() == given.to_dict()


def test_a_bulk_run_keeps_no_replayed_answers_again(tmp_path: Path) -> None:
    path, pictures = tmp_path / "record.jsonl", [(str(seed), noise(seed)) for seed in range(6)]
    cascades = [
        Cascade(scorer, [Stage(judge=judge, prompt=load_prompt("select"))], labels=LABELS)
        for scorer, judge in [
            (RecordingScorer(FakeScorer(), path), RecordingJudge(FakeJudge(), path)),
            (load_scorer(f"recorded:{path}"), load_judge(f"recorded:{path}")),
        ]
    ]
    kept = []
    for number, cascade in enumerate(cascades):
        assert bulk.run(cascade, pictures, tmp_path / str(number), config={}).counts == {"answered": 6}
        kept.append(len(DiskStore(tmp_path / str(number) / "verdicts")))
    assert kept == [6, 0]


def test_a_recording_scorer_needs_no_large_file_once_it_is_prepared_and_keeps_no_pixels(tmp_path: Path) -> None:
    noise(1, (1100, 1000)).save(tmp_path / "large.png")
    scorer = RecordingScorer(load_scorer("open_clip:aviary"), tmp_path / "record.jsonl")
    scorer.load()
    prepared = scorer.prepare(tmp_path / "large.png")
    (tmp_path / "large.png").unlink()
    scorer.score_prepared([prepared], LABELS)
    assert not prepared.decoded
    replayed = load_scorer(f"recorded:{tmp_path / 'record.jsonl'}").score([noise(1, (1100, 1000))], LABELS)
    assert replayed.labels == LABELS


def test_scores_are_exact_and_keep_their_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    given = RecordingScorer(FakeScorer("v1"), path).score([noise(1), noise(2)], LABELS)
    replayed = load_scorer(f"recorded:{path}").score([noise(2)], LABELS)
    np.testing.assert_array_equal(replayed.log_probs[0], given.log_probs[1])
    assert replayed.fingerprint == given.fingerprint == "fake:v1"


def test_scores_of_other_texts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    given = RecordingScorer(load_scorer("open_clip:aviary", device="cpu"), path).score([noise(1)], LABELS)
    replayed = load_scorer(f"recorded:{path}")
    assert replayed.score([noise(1)], LABELS).fingerprint == given.fingerprint
    drawn = LabelSet.of(Label(name=name, text=f"a drawing of a {name}") for name in LABELS.names)
    with pytest.raises(BackendError, match="with other texts"):
        replayed.score([noise(1)], drawn)


def test_nothing_is_made_up(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    RecordingScorer(FakeScorer(), path).score([noise(1)], LABELS)
    scorer = load_scorer(f"recorded:{path}")
    with pytest.raises(BackendError, match="has no scores of an image"):
        scorer.score([noise(9)], LABELS)
    with pytest.raises(BackendError, match="has no scores of an image"):
        scorer.score([noise(1)], LabelSet.of(["bee", "ant", "cicada", "dragonfly"]))


async def test_another_question_is_not_answered(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    await RecordingJudge(FakeJudge(), path).judge(question(["ant", "bee"]))
    judge = load_judge(f"recorded:{path}")
    assert (await judge.judge(question(["ant", "bee"]))).label == "ant"
    for other in (question(["ant", "bee", "cicada"]), question(["ant"]), question(["ant", "bee"], image=noise(3))):
        with pytest.raises(PermanentError, match="no answer to this question"):
            await judge.judge(other)


async def test_the_order_of_the_candidates_decides_only_between_recorded_ones(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    recording = RecordingJudge(FakeJudge(), path)  # chooses the first
    for names in (["ant", "bee", "cicada"], ["bee", "cicada", "ant"]):
        await recording.judge(question(names))
    judge = load_judge(f"recorded:{path}")
    assert (await judge.judge(question(["ant", "bee", "cicada"]))).label == "ant"
    assert (await judge.judge(question(["bee", "cicada", "ant"]))).label == "bee"
    assert (await judge.judge(question(["cicada", "bee", "ant"]))).label in ("ant", "bee")


@pytest.mark.parametrize(
    ("known", "missing", "stops"), [(0, 8, True), (0, 7, False), (3, 10, False), (3, 11, True), (20, 27, False)]
)
def test_a_replay_stops_where_most_answers_are_missing(tmp_path: Path, known: int, missing: int, stops: bool) -> None:
    path = tmp_path / "record.jsonl"
    path.touch()

    def classify(judge: Judge, images: range) -> list[Prediction]:
        stage = Stage(judge=judge, prompt=load_prompt("select"))
        return Cascade(FakeScorer(), [stage], labels=LABELS, batch_size=1).classify([noise(number) for number in images])

    classify(RecordingJudge(FakeJudge(), path), range(known))
    replaying = load_judge(f"recorded:{path}")
    for _ in range(2):  # the second run counts anew
        if stops:
            with pytest.raises(FatalError, match=rf"no answer to {missing} of {known + missing} questions\. Replay it with"):
                classify(replaying, range(known + missing))
        else:
            outcomes = [each.verdict and each.verdict.outcome for each in classify(replaying, range(known + missing))]
            assert outcomes == ["answered"] * known + ["failed"] * missing


async def test_only_valid_verdicts_are_recorded(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    await RecordingJudge(FakeJudge(reply="no idea\nat all"), path).judge(question())
    assert not path.exists()


async def test_what_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"image": 1\n')
    for name in ("none.jsonl", "bad.jsonl"):
        with pytest.raises(BackendError, match="cannot be read"):
            await load_judge(f"recorded:{tmp_path / name}").prepare()


class TestRecordedScorer(ScorerContract):
    """Each test runs twice: a first time to be recorded, then against the record."""

    @pytest.fixture(autouse=True)
    def _record(self, tmp_path: Path, request: pytest.FixtureRequest) -> None:
        self.path = tmp_path / "record.jsonl"
        self.path.touch()
        self.scorer: Scorer = RecordingScorer(FakeScorer(), self.path)
        request.function()
        self.scorer = load_scorer(f"recorded:{self.path}")

    def make(self) -> Scorer:
        return self.scorer


class TestRecordedJudge(JudgeContract):
    """As above."""

    @pytest.fixture(autouse=True)
    async def _record(self, tmp_path: Path, request: pytest.FixtureRequest) -> None:
        self.path = tmp_path / "record.jsonl"
        self.path.touch()
        self.judge: Judge = RecordingJudge(FakeJudge(), self.path)
        running = request.function()
        if running is not None:
            await running
        self.judge = load_judge(f"recorded:{self.path}")

    def make(self) -> Judge:
        return self.judge

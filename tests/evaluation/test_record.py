"""Records of real runs: the files contain the predictions, for cascadevlm and for other tools."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from numpy.typing import NDArray
from PIL import Image

from cascadevlm import Cascade, Stage, TopK, load_judge, load_prompt, load_scorer, parse_policy
from cascadevlm.base.arrays import NOBODY
from cascadevlm.base.errors import BackendError, DataError, JudgeError, PermanentError, RunError
from cascadevlm.base.images import ImageSource, load_image, pixel_digest
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Prediction, Question, Scores, Usage, Verdict
from cascadevlm.cascade.item import OnFailure
from cascadevlm.decision.judge_model import JudgeModel
from cascadevlm.evaluation.data import Data, read_data
from cascadevlm.evaluation.evaluate import can_replay, evaluate_replayed
from cascadevlm.evaluation.metrics import evaluate, top_k_recall
from cascadevlm.evaluation.record import Record, read_record, read_verdicts
from cascadevlm.evaluation.sweep import sweep, under
from cascadevlm.judges.base import Judge, Quote
from cascadevlm.judges.budget import Ledger
from cascadevlm.judges.cache import MemoryStore, VerdictStore
from cascadevlm.policies.measures import entropy
from cascadevlm.policies.rules import Always, EntropyAbove
from cascadevlm.runs import bulk
from cascadevlm.scorers.base import Prepared, Scorer
from cascadevlm.testing import FakeJudge, FakeScorer, noise
from cascadevlm.testing.fakes import Reply
from tests.observers import Seen

NAMES = ['the "quoted" ant', "bee\nof two lines", "Zikade, größer als 🦗", "dragonfly", "earwig", "firefly"]
LABELS = LabelSet.of(NAMES)
UNREADABLE = (3, 9)


@pytest.fixture
def data(tmp_path: Path) -> Data:
    """16 files, of which two are not images."""
    rows = []
    for number in range(16):
        file = tmp_path / "images" / f"{number:02} é.png"
        file.parent.mkdir(exist_ok=True)
        noise(number).save(file)
        if number in UNREADABLE:
            file.write_bytes(b"no image")
        split = "test" if number % 2 else "train"
        rows.append({"path": f"images/{file.name}", "label": NAMES[number % len(NAMES)], "split": split})
    table = tmp_path / "data.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_data(table, LABELS)


class Priced(FakeJudge):
    """Costs one cent per question. The price is known before."""

    def quote(self, question: Question) -> Quote:
        return Quote(worst_case=10_000_000)


class Opinionated(Judge):
    """Gives probabilities."""

    spec = "fake:opinionated"

    async def judge(self, question: Question) -> Verdict:
        names = [label.name for label in question.labels]
        opinion = dict(zip(names, [0.2, 0.7, 0.1], strict=False))
        usage = Usage(input_tokens=7, output_tokens=3, cached_input_tokens=2, cache_write_tokens=1, dollars=0.002, requests=1)
        return Verdict(outcome="answered", label=names[1], probabilities=opinion, judge=self.spec, usage=usage)


def replies(question: Question) -> Reply:
    """Gives outcomes of every kind, and always the same outcome for the same question."""
    kinds: list[Reply] = [
        "I see wings.\nANSWER: B",
        "ANSWER: A",
        "ANSWER: none of these",
        "no idea at all",
        PermanentError('It "failed"\nbadly.'),
    ]
    return kinds[int(question.image_digest[:4], 16) % len(kinds)]


def two_stages() -> list[Stage]:
    """The second stage has other candidates, in another order, and money for only some questions."""
    cheap = Priced("cheap", reply=replies, dollars=0.01)
    select = load_prompt("select")
    return [
        Stage(judge=cheap, prompt=load_prompt("select_cot"), policy=EntropyAbove(0.3), candidates=TopK(k=4), offer_none=True),
        Stage(judge=Opinionated(), prompt=select, policy=EntropyAbove(0.2), candidates=TopK(k=3, order="shuffled")),
    ]


def recorded(
    folder: Path,
    data: Data,
    stages: list[Stage],
    *,
    scorer: Scorer | None = None,
    dollars: float | None = None,
    store: VerdictStore | None = None,
    on_failure: OnFailure = "scorer",
    batches: int | None = None,
    labels: LabelSet = LABELS,
) -> list[Prediction]:
    """Run a cascade and record it. With ``batches``, only this number of batches of 5 images is run. Returns the predictions of
    this session.
    """
    seen = Seen()
    cascade = Cascade(
        scorer or FakeScorer(),
        stages,
        labels=labels,
        on_failure=on_failure,
        store=store,
        ledger=Ledger(dollars),
        batch_size=5,
        observers=[seen],
    )
    begun = iter(range(1000))
    stopping = (lambda: next(begun) >= batches) if batches is not None else lambda: False
    bulk.run(cascade, data, folder, config={"on_failure": on_failure}, stopping=stopping)
    return seen.predictions


def columns(names: list[str]) -> list[int]:
    return [NAMES.index(name) for name in names]


def check(record: Record, data: Data, predictions: list[Prediction], judges: list[str]) -> None:
    """Compare the arrays with the predictions, image by image."""
    assert len(record) == len(predictions) == len(data)
    assert record.labels == LABELS
    assert record.names == data.names
    assert [NAMES[truth] for truth in record.truths] == list(data.truths)
    assert record.readable.tolist() == [bool(p.candidates) for p in predictions]
    assert record.predicted.tolist() == [NOBODY if p.label is None else NAMES.index(p.label) for p in predictions]
    np.testing.assert_array_equal(record.probabilities, [np.nan if p.probability is None else p.probability for p in predictions])
    assert record.decided_by == tuple(p.decided_by or "" for p in predictions)
    assert [stage.judge for stage in record.stages] == judges
    for image, prediction in enumerate(predictions):
        best = [candidate for candidate in prediction.candidates if candidate.rank == 1]  # none, where a judge rejected it
        assert best or prediction.verdicts or not prediction.candidates
        assert all(record.scored[image] == NAMES.index(candidate.label.name) for candidate in best)
        assert (record.scored[image] == NOBODY) == (not prediction.candidates)
        for candidate in prediction.candidates:
            column = NAMES.index(candidate.label.name)
            assert record.scores.probabilities[image, column] == np.float32(candidate.probability)
        for number, stage in enumerate(record.stages):
            verdict = next((verdict for verdict in prediction.verdicts if verdict.stage == number), None)
            usage = verdict.usage if verdict else Usage()
            assert stage.asked[image] == (verdict is not None and verdict.outcome != "skipped")
            assert stage.outcomes[image] == (verdict.outcome if verdict else "")
            assert stage.answers[image] == (NAMES.index(verdict.label) if verdict and verdict.label else NOBODY)
            assert stage.dollars[image] == usage.dollars + usage.saved_dollars
            assert stage.paid[image] == usage.dollars
            assert (stage.input_tokens[image], stage.output_tokens[image]) == (usage.input_tokens, usage.output_tokens)
            assert stage.seconds[image] == usage.seconds
        if prediction.verdicts:
            last = record.stages[prediction.verdicts[-1].stage].candidates[image]
            assert last[last != NOBODY].tolist() == columns([c.label.name for c in prediction.candidates])


@pytest.mark.parametrize("on_failure", ["scorer", "abstain"])
@pytest.mark.parametrize("dollars", [None, 0.05])
def test_what_is_read_is_what_the_predictions_said(
    tmp_path: Path, data: Data, on_failure: OnFailure, dollars: float | None
) -> None:
    stages = two_stages()
    predictions = recorded(tmp_path / "run", data, stages, dollars=dollars, on_failure=on_failure)
    record = read_record(tmp_path / "run")
    check(record, data, predictions, ["fake:cheap", "fake:opinionated"])
    outcomes = {verdict.outcome for p in predictions for verdict in p.verdicts}
    assert outcomes >= ({"answered", "none", "unparsed", "failed"} if dollars is None else {"answered", "skipped"})
    assert set(record.decided_by) == {"", "scorer", "judge"}
    assert record.judged is record.stages[1]
    assert record.info is not None
    assert record.info.config == {"on_failure": on_failure}
    assert record.info.fingerprint == record.scores.fingerprint == "fake:fake"
    assert record.info.versions["cascadevlm"]


def test_every_stage_keeps_the_candidates_it_showed(tmp_path: Path, data: Data) -> None:
    shown: dict[str, list[list[int]]] = {}

    def remembering(question: Question) -> str:
        if not question.rejected:
            shown.setdefault(question.image_digest, []).append(columns([label.name for label in question.labels]))
        return "ANSWER: none of these" if question.offer_none else "ANSWER: A"

    stages = [replace(stage, judge=FakeJudge(reply=remembering), policy=EntropyAbove(0)) for stage in two_stages()]
    recorded(tmp_path / "run", data, stages)
    record = read_record(tmp_path / "run")
    for image, digest in enumerate(record.digests):
        kept = [[c for c in stage.candidates[image].tolist() if c != NOBODY] for stage in record.stages]
        assert kept == (shown[digest] if record.readable[image] else [[], []])
    assert record.stages[0].rationales[0] == "ANSWER: none of these"


def test_the_cache_is_counted_as_what_it_saved(tmp_path: Path, data: Data) -> None:
    store = MemoryStore()
    stages = [Stage(judge=Priced(dollars=0.01), prompt=load_prompt("select"))]
    recorded(tmp_path / "first", data, stages, store=store)
    predictions = recorded(tmp_path / "second", data, stages, store=store)
    check(read_record(tmp_path / "second"), data, predictions, ["fake:fake"])
    first, second = (read_record(tmp_path / name).judged for name in ("first", "second"))
    np.testing.assert_array_equal(first.dollars, second.dollars)
    assert first.paid.sum() == pytest.approx(0.14)
    assert second.paid.sum() == 0


def test_others_read_it_without_us(tmp_path: Path, data: Data) -> None:
    predictions = recorded(tmp_path / "run", data, two_stages())
    table = pyarrow.parquet.read_table(tmp_path / "run" / "predictions.parquet")
    assert table["path"].to_pylist() == list(data.names)
    assert table["truth"].to_pylist() == [NAMES[number % len(NAMES)] for number in range(16)]
    assert table["label"].to_pylist() == [p.label for p in predictions]
    told = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["path"] for line in told] == list(data.names)
    assert [line["truth"] for line in told] == list(data.truths)
    assert [line["split"] for line in told] == ["train", "test"] * 8
    assert ["pixels" not in line for line in told] == [row in UNREADABLE for row in range(16)]
    assert [line["label"] for line in told] == [p.label for p in predictions]
    for line, prediction in zip(told, predictions, strict=True):
        said = [*line["earlier_verdicts"], *([line["verdict"]] if line["verdict"] else [])]
        assert [verdict["usage"] for verdict in said] == [asdict(verdict.usage) for verdict in prediction.verdicts]
        assert [each["prompt"] for each in line["questions"]] == ["select_cot", "select"][: len(said)]
        assert [each["offer_none"] for each in line["questions"]] == [True, False][: len(said)]
    assert np.isnan(np.load(tmp_path / "run" / "scores.npy")).any(axis=1).nonzero()[0].tolist() == list(UNREADABLE)


def test_what_a_judge_says_need_not_be_unicode(tmp_path: Path, data: Data) -> None:
    """A hosted judge's JSON may hold half a character."""
    recorded(tmp_path / "run", data, [Stage(judge=FakeJudge(reply="wings \ud83d\nANSWER: A"), prompt=load_prompt("select"))])
    assert read_record(tmp_path / "run").judged.rationales[0] == "wings \\ud83d"


def test_a_scorer_alone_is_a_record_too(tmp_path: Path, data: Data) -> None:
    predictions = recorded(tmp_path / "run", data, [])
    record = read_record(tmp_path / "run")
    check(record, data, predictions, [])
    with pytest.raises(DataError, match="no judge"):
        _ = record.judged


def test_nothing_readable_is_a_record_too(tmp_path: Path, data: Data) -> None:
    broken = data.take(np.array(UNREADABLE))
    predictions = recorded(tmp_path / "run", broken, two_stages())
    record = read_record(tmp_path / "run")
    check(record, broken, predictions, ["fake:cheap", "fake:opinionated"])
    assert not record.readable.any()


class Preprocessing(FakeScorer):
    """Loads a model, and does the preprocessing without it."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded = 0
        self.prepared: list[str] = []

    def load(self) -> None:
        self.loaded += 1

    def prepare(self, source: ImageSource) -> Prepared:
        prepared = super().prepare(source)
        self.prepared.append(threading.current_thread().name)
        prepared.features = np.array([self._logits(prepared.image, LABELS)], dtype=np.float32)
        prepared.forget_large()
        return prepared

    def score_prepared(self, prepared: Sequence[Prepared], labels: LabelSet) -> Scores:
        assert [each.decoded for each in prepared] == [False] * len(prepared)
        features = [each.features for each in prepared if each.features is not None]
        return Scores.from_logits(np.concatenate(features), labels, "fake:fake")


def test_large_images_are_read_and_prepared_beside_the_model(tmp_path: Path) -> None:
    """The pixels are released, also for the digest, and the price is computed without them."""
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        noise(number, (1100, 1000)).save(path)
    names = tuple(path.name for path in paths)
    large = Data(images=tuple(paths), names=names, truths=(NAMES[0],) * 3, splits=("",) * 3)
    scorer = Preprocessing()
    policy = parse_policy("gain_per_dollar > 0")
    stage = Stage(judge=Priced(), prompt=load_prompt("select"), policy=policy, model=JudgeModel.prior(len(LABELS)))
    predictions = recorded(tmp_path / "run", large, [stage], scorer=scorer)
    check(read_record(tmp_path / "run"), large, predictions, ["fake:fake"])
    assert read_record(tmp_path / "run").digests == tuple(pixel_digest(load_image(path)) for path in paths)
    assert any(each.verdicts for each in predictions)
    assert scorer.loaded == 1
    assert all(name.startswith("reading") for name in scorer.prepared)


class Tempered(Scorer):
    """Random scores that are always the same for the same image, from equal labels to one label far above the others. With
    embeddings."""

    def score(self, images: Sequence[Image.Image], labels: LabelSet) -> Scores:
        digests = [int(pixel_digest(image), 16) for image in images]
        logits = [np.random.default_rng(digest).normal(0, (0, 0.1, 3, 100)[digest % 4], len(labels)) for digest in digests]
        embeddings = np.array([np.random.default_rng(digest).normal(size=12) for digest in digests], dtype=np.float16)
        return Scores.from_logits(np.array(logits), labels, fingerprint="tempered", embeddings=embeddings)


def embeddings_of(data: Data, readable: NDArray[np.bool_]) -> NDArray[np.float16]:
    """What `Tempered` gives for the images of a record, and zeros for images that cannot be read."""
    embeddings = np.zeros((len(data), 12), dtype=np.float16)
    found = Tempered().score([Image.open(data.names[row]) for row in np.flatnonzero(readable)], LABELS).embeddings
    embeddings[readable] = found
    return embeddings


def test_embeddings_are_kept_and_replayed(tmp_path: Path, data: Data) -> None:
    recorded(tmp_path / "run", data, [], scorer=Tempered())
    recorded(tmp_path / "again", data, [], scorer=load_scorer(f"recorded:{tmp_path / 'run'}"))
    for name in ("run", "again"):
        record = read_record(tmp_path / name)
        kept = record.scores.embeddings
        assert kept is not None
        np.testing.assert_array_equal(kept, embeddings_of(data, record.readable), strict=True)
        rows = np.array([3, 1])
        np.testing.assert_array_equal(record.take(rows).scores.embeddings, kept[rows])
        assert len(np.load(tmp_path / name / "embeddings.npy")) == len(data)


def test_a_record_of_a_scorer_without_embeddings_has_none(tmp_path: Path, data: Data) -> None:
    recorded(tmp_path / "run", data, [])
    assert not (tmp_path / "run" / "embeddings.npy").exists()
    assert read_record(tmp_path / "run").scores.embeddings is None


class Bare(Tempered):
    """An earlier version of the scorer, without embeddings."""

    def score(self, images: Sequence[Image.Image], labels: LabelSet) -> Scores:
        return replace(super().score(images, labels), embeddings=None)


def test_embeddings_of_some_images_only_are_none(tmp_path: Path, data: Data) -> None:
    recorded(tmp_path / "run", data, [], scorer=Bare(), batches=1)
    recorded(tmp_path / "run", data, [], scorer=Tempered())
    assert len(np.load(tmp_path / "run" / "embeddings.npy")) == len(data)
    assert read_record(tmp_path / "run").scores.embeddings is None
    recorded(tmp_path / "deleted", data, [], scorer=Tempered())
    (tmp_path / "deleted" / "embeddings.npy").unlink()
    assert read_record(tmp_path / "deleted").scores.embeddings is None


def test_embeddings_that_were_lost_are_made_again(tmp_path: Path, data: Data) -> None:
    recorded(tmp_path / "run", data, [], scorer=Tempered())
    file = tmp_path / "run" / "embeddings.npy"
    for left in (file.read_bytes()[:-200], b"nothing"):
        file.write_bytes(left)
        with pytest.raises(DataError, match="does not contain a complete record"):
            read_record(tmp_path / "run")
        with pytest.warns(RuntimeWarning, match="damaged after"):
            recorded(tmp_path / "run", data, [], scorer=Tempered())
        record = read_record(tmp_path / "run")
        np.testing.assert_array_equal(record.scores.embeddings, embeddings_of(data, record.readable))
    rows = np.lib.format.open_memmap(tmp_path / "run" / "embeddings.npy", mode="r+")
    rows[6] = 0
    rows.flush()
    with pytest.raises(DataError, match="has another embedding of image 6 than the embedding from which"):
        read_record(tmp_path / "run")


def test_of_many_labels_the_best_50_are_kept(tmp_path: Path, data: Data) -> None:
    labels = LabelSet.of([f"class {number}" for number in range(1195)] + NAMES)
    predictions = recorded(tmp_path / "run", data, two_stages(), scorer=Tempered(), labels=labels)
    record = read_record(tmp_path / "run")
    rows = np.flatnonzero(record.readable)
    images = [Image.open(data.names[row]) for row in rows]
    whole, read = Tempered().score(images, labels), record.scores.rows(rows)
    ranking, ranking_read = (np.argsort(-scores.log_probs, axis=1, kind="stable")[:, :50] for scores in (whole, read))
    np.testing.assert_array_equal(ranking_read, ranking)
    best, best_read = (np.take_along_axis(scores.log_probs, ranking, axis=1) for scores in (whole, read))
    np.testing.assert_array_equal(best_read, best)
    np.testing.assert_allclose(record.scores.probabilities.sum(axis=1, dtype=np.float64), 1, atol=2e-6)
    truths = record.truths[rows]
    assert top_k_recall(read.log_probs, truths, [1, 20]) == top_k_recall(whole.log_probs, truths, [1, 20])
    assert (entropy(read) >= entropy(whole) - 1e-6).all()
    assert record.readable.tolist() == [row not in UNREADABLE for row in range(16)]
    np.testing.assert_array_equal(record.scored[rows], ranking[:, 0])
    assert [NOBODY if p.label is None else labels.names.index(p.label) for p in predictions] == record.predicted.tolist()

    scores, columns = (np.load(tmp_path / "run" / f"{name}.npy") for name in ("scores", "columns"))
    assert (scores.shape, scores.dtype, columns.shape, columns.dtype) == ((16, 50), np.float32, (16, 50), np.int32)
    assert (np.diff(scores[rows], axis=1) <= 0).all()
    assert (columns[list(UNREADABLE)] == NOBODY).all()
    recorded(tmp_path / "again", data, [], scorer=load_scorer(f"recorded:{tmp_path / 'run'}"), labels=labels)
    np.testing.assert_array_equal(np.load(tmp_path / "again" / "columns.npy"), columns)
    (tmp_path / "run" / "columns.npy").unlink()
    with pytest.raises(DataError, match=r"columns\.npy"):
        read_record(tmp_path / "run")


def test_a_record_is_read_without_pandas(tmp_path: Path, data: Data) -> None:
    recorded(tmp_path / "run", data, two_stages())
    program = """
import sys
class Missing:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in ("pandas", "polars"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing)
from cascadevlm.evaluation.record import read_record, read_verdicts
print(len(read_record(sys.argv[1])), len(read_verdicts(sys.argv[1])))
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "run"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["16", "2"]


FILES = ("manifest.json", "predictions.jsonl", "predictions.parquet", "scores.npy")


def test_a_finished_record_asks_and_scores_nothing(tmp_path: Path, data: Data) -> None:
    recorded(tmp_path / "run", data, two_stages())
    before = {name: (tmp_path / "run" / name).read_bytes() for name in FILES}
    silent = [replace(stage, judge=FakeJudge(stage.judge.spec.partition(":")[2])) for stage in two_stages()]
    assert not recorded(tmp_path / "run", data, silent, scorer=Broken())
    assert before == {name: (tmp_path / "run" / name).read_bytes() for name in FILES}
    assert not [question for stage in silent if isinstance(stage.judge, FakeJudge) for question in stage.judge.questions]


class Broken(Scorer):
    """Cannot score."""

    def score(self, images: Sequence[Image.Image], labels: LabelSet) -> Scores:
        raise AssertionError


def test_a_record_of_another_run_is_refused(tmp_path: Path, data: Data) -> None:
    stages = two_stages()
    recorded(tmp_path / "run", data, stages)
    always = [replace(stage, policy=Always()) for stage in stages]
    with pytest.raises(DataError, match="belongs to another run: its judges were not asked about every image"):
        recorded(tmp_path / "run", data, always)
    with pytest.raises(DataError, match=r"belongs to another run: .*its images have true labels"):
        bulk.run(Cascade(FakeScorer(), [], labels=LABELS), [("a", noise(0))], tmp_path / "run", config={"on_failure": "scorer"})
    relabelled = replace(data, truths=(*data.truths[:5], NAMES[0], *data.truths[6:]))
    with pytest.raises(DataError, match=r"The true label of image 5 of .* was 'firefly' and is now 'the \"quoted\" ant'"):
        recorded(tmp_path / "run", relabelled, stages)
    with pytest.raises(DataError, match=r"Image 0 of .*/00 é\.png' and is now .*/01 é\.png'"):
        recorded(tmp_path / "run", data.take(np.arange(1, 16)), stages)
    assert len(read_record(tmp_path / "run")) == len(data)


def test_a_folder_that_cannot_be_made_is_said_at_once(tmp_path: Path, data: Data) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written to"):
        recorded(tmp_path / "file" / "run", data, [])


def without_usage(folder: Path) -> list[object]:
    """The lines of a record without usage, because a stored answer has no usage."""
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        for verdict in (*line["earlier_verdicts"], line["verdict"] or {}):
            verdict.pop("usage", None)
    return [{name: value for name, value in line.items() if name not in ("cost", "crc32")} for line in lines]


@pytest.mark.parametrize("labels", [LABELS, LabelSet.of([*NAMES, *(f"class {number}" for number in range(1000))])])
def test_an_interrupted_record_goes_on_as_if_it_had_not_been(tmp_path: Path, data: Data, labels: LabelSet) -> None:
    """A row of scores is only written again if its image has no line, because another session may give scores that differ in
    the last digit.
    """
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    recorded(whole, data, two_stages(), scorer=Tempered(), labels=labels)
    recorded(parts, data, two_stages(), scorer=Tempered(), labels=labels, batches=2)
    for read in (read_record, read_verdicts):
        with pytest.raises(
            DataError, match=r"its run was interrupted after 10 of 16 images\. Repeat the command that made the record"
        ):
            read(parts)
    with (parts / "predictions.jsonl").open("r+b") as file:  # the last lines were not written to the disk; rows of scores were
        kept = b"".join(file.read().splitlines(keepends=True)[:7])
        file.truncate(len(kept))
    if labels is LABELS:
        for name in ("scores.npy", "embeddings.npy"):
            rows = np.lib.format.open_memmap(parts / name, mode="r+")
            rows[7:] = -1.0
    stages = two_stages()
    recorded(parts, data, stages, scorer=Tempered(), labels=labels)
    assert without_usage(parts) == without_usage(whole)
    assert (whole / "embeddings.npy").exists()
    for name in ("scores.npy", "columns.npy", "embeddings.npy"):
        assert not (whole / name).exists() or (parts / name).read_bytes() == (whole / name).read_bytes()
    before, after = read_record(whole), read_record(parts)
    np.testing.assert_array_equal(before.scores.log_probs, after.scores.log_probs)
    for old, new in zip(before.stages, after.stages, strict=True):
        np.testing.assert_allclose(old.dollars, new.dollars)


class Inexact(FakeScorer):
    """In another session, the scores differ in the last digit."""

    def __init__(self, session: int) -> None:
        super().__init__()
        self.session = session

    def score(self, images: Sequence[Image.Image], labels: LabelSet) -> Scores:
        scores = super().score(images, labels)
        return replace(scores, log_probs=scores.log_probs + np.float32(1e-6 * self.session))


def test_scores_are_those_of_the_predictions(tmp_path: Path, data: Data) -> None:
    """Images between the last checkpoint and the last line are scored again, but the scores in the file do not change."""
    predictions = recorded(tmp_path / "run", data, [], scorer=Inexact(0), batches=2)
    (tmp_path / "run" / "progress.json").unlink()
    predictions += recorded(tmp_path / "run", data, [], scorer=Inexact(1))[10:]
    check(read_record(tmp_path / "run"), data, predictions, [])


def test_scores_that_were_lost_are_made_again(tmp_path: Path, data: Data) -> None:
    """After a loss of power, a line may be written without its scores."""
    predictions = recorded(tmp_path / "run", data, [])
    rows = np.lib.format.open_memmap(tmp_path / "run" / "scores.npy", mode="r+")
    rows[6] = 0
    rows.flush()
    with pytest.raises(DataError, match="has other scores of image 6 than the scores from which its prediction was made"):
        read_record(tmp_path / "run")
    with pytest.warns(RuntimeWarning, match="damaged after 6 images"):
        recorded(tmp_path / "run", data, [])
    check(read_record(tmp_path / "run"), data, predictions, [])


def test_labelled_images_may_be_added_after_the_last_one(tmp_path: Path, data: Data) -> None:
    first = recorded(tmp_path / "run", data.take(np.arange(11)), two_stages())
    later = recorded(tmp_path / "run", data, two_stages())
    check(read_record(tmp_path / "run"), data, [*first, *later[-5:]], ["fake:cheap", "fake:opinionated"])


def test_a_run_that_fails_leaves_no_record(tmp_path: Path, data: Data) -> None:
    stage = Stage(judge=FakeJudge(reply=PermanentError("no")), prompt=load_prompt("select"))
    with pytest.raises(JudgeError):
        recorded(tmp_path / "run", data, [stage], on_failure="raise")
    with pytest.raises(DataError, match="interrupted"):
        read_record(tmp_path / "run")


def test_an_image_that_is_gone_when_the_judge_is_to_be_asked(tmp_path: Path) -> None:
    """The pixels were released after scoring, so the question is not known."""
    path = tmp_path / "0.png"
    noise(0, (1100, 1000)).save(path)

    class Removing(Preprocessing):
        def score_prepared(self, prepared: Sequence[Prepared], labels: LabelSet) -> Scores:
            path.unlink()
            return super().score_prepared(prepared, labels)

    one = Data(images=(path,), names=(str(path),), truths=(NAMES[0],), splits=("",))
    recorded(tmp_path / "run", one, [Stage(judge=FakeJudge(), prompt=load_prompt("select"))], scorer=Removing())
    judged = read_record(tmp_path / "run").judged
    assert judged.outcomes == ("failed",)
    assert read_verdicts(tmp_path / "run") == ([],)


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("kind", ["objects", "archive", "texts", "another width"])
def test_scores_that_are_no_array_of_numbers_are_no_record(tmp_path: Path, data: Data, kind: str) -> None:
    recorded(tmp_path / "run", data, [])
    scores = np.load(tmp_path / "run" / "scores.npy")
    with (tmp_path / "run" / "scores.npy").open("wb") as file:
        if kind == "archive":
            np.savez(file, scores=scores)
        elif kind == "objects":
            np.save(file, np.full(scores.shape, Harmful(tmp_path / "trace"), dtype=object))
        else:
            np.save(file, scores.astype({"texts": str, "another width": np.float64}[kind]))
    with pytest.raises(DataError, match="does not contain a complete record"):
        read_record(tmp_path / "run")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("part", ["manifest.json", "scores.npy", "predictions.jsonl"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b""), lambda file: file.write_bytes(b"{}")])
def test_what_is_missing_or_damaged_is_one_sentence(
    tmp_path: Path, data: Data, part: str, damage: Callable[[Path], object]
) -> None:
    folder = tmp_path / "run"
    recorded(folder, data, two_stages())
    damage(folder / part)
    with pytest.raises(DataError, match=r"does not contain a complete record|is not the manifest of a run") as caught:
        read_record(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(folder))


def test_parts_of_different_runs_are_no_record(tmp_path: Path, data: Data) -> None:
    recorded(tmp_path / "whole", data, [])
    recorded(tmp_path / "half", data.split("test"), [])
    for part, told in {"scores.npy": "has other scores of image 0", "predictions.jsonl": "other scores of image 0"}.items():
        whole = (tmp_path / "whole" / part).read_bytes()
        (tmp_path / "whole" / part).write_bytes((tmp_path / "half" / part).read_bytes())
        with pytest.raises(DataError, match=told):
            read_record(tmp_path / "whole")
        (tmp_path / "whole" / part).write_bytes(whole)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"it lacks manifest\.json and predictions\.jsonl"):
        read_record(tmp_path / "nowhere")


@pytest.mark.parametrize("on_failure", ["scorer", "abstain"])
def test_a_policy_replayed_is_as_it_would_have_run(tmp_path: Path, data: Data, on_failure: OnFailure) -> None:
    policy = EntropyAbove(0.7)
    everything, gated = (
        replace(two_stages()[0], judge=Priced(reply=replies, dollars=0.01), policy=each) for each in (Always(), policy)
    )
    recorded(tmp_path / "everything", data, [everything], on_failure=on_failure)
    recorded(tmp_path / "gated", data, [gated], on_failure=on_failure)
    record, live = read_record(tmp_path / "everything"), read_record(tmp_path / "gated")
    replayed = under(record, policy)
    assert 0 < live.judged.asked.sum() < record.judged.asked.sum()
    assert evaluate(replayed) == evaluate(live)
    np.testing.assert_array_equal(replayed.predicted, live.predicted)
    np.testing.assert_array_equal(replayed.probabilities, live.probabilities)
    assert replayed.decided_by == live.decided_by
    assert sweep(record).judge_accuracy == (record.predicted == record.truths)[record.readable].mean()
    assert can_replay(record)
    assert not can_replay(live)
    known = evaluate_replayed(record, policy)
    assert known.judge_accuracy == evaluate(record).judge_accuracy_escalated
    assert known.paid_dollars == evaluate(record).paid_dollars > evaluate(live).paid_dollars


@pytest.mark.parametrize("dollars", [None, 0.05])
def test_a_run_replays_from_its_folder_at_no_cost(tmp_path: Path, data: Data, dollars: float | None) -> None:
    first = recorded(tmp_path / "run", data, two_stages(), dollars=dollars, on_failure="abstain")
    replaying = [
        replace(stage, judge=load_judge(f"recorded:{tmp_path / 'run'}#{number}"))
        for number, stage in enumerate(two_stages(), start=1)
    ]
    again = recorded(
        tmp_path / "again", data, replaying, scorer=load_scorer(f"recorded:{tmp_path / 'run'}"), dollars=0, on_failure="abstain"
    )
    for replayed, given in zip(again, first, strict=True):
        assert replayed.cost.dollars == 0
        assert replayed.cost.saved_dollars == pytest.approx(given.cost.dollars)
        verdicts = tuple(
            replace(new, judge=old.judge, usage=old.usage) for new, old in zip(replayed.verdicts, given.verdicts, strict=True)
        )
        assert replace(replayed, verdicts=verdicts).to_dict() == given.to_dict()
    before, after = read_record(tmp_path / "run"), read_record(tmp_path / "again")
    np.testing.assert_array_equal(before.scores.log_probs, after.scores.log_probs)
    assert before.scores.fingerprint == after.scores.fingerprint
    for old, new in zip(before.stages, after.stages, strict=True):
        np.testing.assert_allclose(old.dollars, new.dollars)
        assert new.paid.sum() == 0


async def test_another_question_is_not_answered_from_a_folder(tmp_path: Path, data: Data) -> None:
    stage = Stage(judge=FakeJudge(), prompt=load_prompt("select"), candidates=TopK(k=3))
    (prediction, *_) = await Cascade(FakeScorer(), [stage], labels=LABELS).aclassify([noise(0)])
    ask = stage.question(noise(0), prediction.candidates)
    await asyncio.to_thread(recorded, tmp_path / "run", data, [stage])
    judge = load_judge(f"recorded:{tmp_path / 'run'}")
    for known in (ask, replace(ask, candidates=ask.candidates[::-1])):
        assert (await judge.judge(known)).label == prediction.label
    others = [
        replace(ask, candidates=ask.candidates[:2]),
        replace(ask, prompt=load_prompt("select_cot")),
        replace(ask, offer_none=True),
        stage.question(noise(77), prediction.candidates),
    ]
    for other in others:
        with pytest.raises(PermanentError, match="no answer to this question"):
            await judge.judge(other)


async def test_which_stage_is_meant_must_be_said(tmp_path: Path, data: Data) -> None:
    for count, names in ((2, ["", "#0", "#3"]), (0, ["", "#1"])):
        folder = tmp_path / f"run{count}"
        await asyncio.to_thread(recorded, folder, data, two_stages()[:count])
        for name in names:
            with pytest.raises(BackendError, match=f"has {count} stages"):
                await load_judge(f"recorded:{folder}{name}").prepare()


def test_fewer_images_make_a_shorter_record_only_if_none_of_the_others_has_a_prediction(tmp_path: Path, data: Data) -> None:
    predictions = recorded(tmp_path / "run", data, [], batches=1)
    predictions += recorded(tmp_path / "run", data.take(np.arange(7)), [])
    check(read_record(tmp_path / "run"), data.take(np.arange(7)), predictions, [])
    with pytest.raises(DataError, match=r"Image 5 of .* is now 'gone'"):
        recorded(tmp_path / "run", data.take(np.arange(5)), [])
    check(read_record(tmp_path / "run"), data.take(np.arange(7)), predictions, [])

"""Bulk runs: their files, also after interruptions."""

import asyncio
import hashlib
import json
import os
import re
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
from filelock import FileLock
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import JsonValue

from benchmarks.kills import predictions as lines
from benchmarks.kills import prove
from cascadevlm import Cascade, Stage, load_prompt, parse_policy
from cascadevlm.base import loop
from cascadevlm.base.errors import DataError, FatalError, PermanentError, RunError
from cascadevlm.base.files import write_whole
from cascadevlm.base.images import ImageSource
from cascadevlm.base.labels import Label, LabelSet
from cascadevlm.base.types import Exemplar, Prompt, Question, Scores, Verdict
from cascadevlm.cascade.engine import BEGINNING
from cascadevlm.config.config import Config
from cascadevlm.decision.judge_model import JudgeModel
from cascadevlm.decision.scorer_calibration import ScorerCalibration
from cascadevlm.judges.base import Quote
from cascadevlm.judges.budget import DurableLedger, Ledger, total_in
from cascadevlm.judges.cache import DiskStore
from cascadevlm.judges.support import SupportSet
from cascadevlm.runs import bulk, run_folder
from cascadevlm.runs.inputs import Inputs, Named
from cascadevlm.runs.lines import with_checksum
from cascadevlm.runs.manifest import Manifest
from cascadevlm.runs.run_folder import RunFolder
from cascadevlm.scorers.kept import CachedEmbeddings
from cascadevlm.testing import FakeJudge, FakeScorer, noise, picture
from cascadevlm_backends.open_clip import OpenClipScorer
from tests.calibrations import some_calibration

RED, GREY = (200, 0, 0), (90, 90, 90)
LABELS = ["finch", "owl", "wren", "stork"]


class Pictures:
    """This number of pictures, which all differ."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Named]:
        for number in range(self.count):
            yield f"image {number}", noise(number, (8, 8))


def pictures(count: int) -> list[ImageSource]:
    return [source for _, source in Pictures(count)]


def cascade(judge: FakeJudge | None = None, policy: str = "entropy > 0.6", **options: object) -> Cascade:
    stage = Stage(judge=judge or FakeJudge(reply=second), prompt=load_prompt("select"), policy=parse_policy(policy))
    return Cascade(FakeScorer(), [stage], labels=LABELS, batch_size=4, **options)  # type: ignore[arg-type]


def second(_: Question) -> str:
    return "ANSWER: B"


def stopping_after(batches: int) -> "Iterator[bool]":
    yield from (number >= batches for number in range(1000))


def test_it_says_what_classify_says(tmp_path: Path) -> None:
    tally = bulk.run(cascade(), Pictures(30), tmp_path / "run", config={})
    expected = cascade().classify([noise(number, (8, 8)) for number in range(30)])
    found = lines(tmp_path / "run")
    assert [line["path"] for line in found] == [name for name, _ in Pictures(30)]
    assert [(line["label"], line["decided_by"], line["reasons"]) for line in found] == [
        (each.label, each.decided_by, list(each.reasons)) for each in expected
    ]
    assert tally.images == 30
    assert tally.counts == {
        "kept": sum(not each.escalated for each in expected),
        "answered": sum(each.escalated for each in expected),
    }
    assert 0 < tally.counts["answered"] < 30
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == tally.to_dict()


def test_a_cache_serves_all_runs_from_the_first_on(tmp_path: Path) -> None:
    judges = FakeJudge(reply=second), FakeJudge(reply=second)
    for name, judge in zip(("first", "second"), judges, strict=True):
        bulk.run(cascade(judge, "always", store=DiskStore(tmp_path / "cache")), Pictures(8), tmp_path / name, config={})
        assert not (tmp_path / name / "verdicts").exists()
    assert [len(judge.questions) for judge in judges] == [8, 0]
    assert len(DiskStore(tmp_path / "cache")) == 8


def test_the_table_holds_what_the_lines_hold(tmp_path: Path) -> None:
    bulk.run(cascade(), Pictures(30), tmp_path / "run", config={})
    table = pyarrow.parquet.read_table(tmp_path / "run" / "predictions.parquet").to_pylist()
    found = lines(tmp_path / "run")
    for name in ("path", "label", "probability", "decided_by", "candidates", "reasons"):
        assert [row[name] for row in table] == [line[name] for line in found]
    assert [row["escalated"] for row in table] == [line["verdict"] is not None for line in found]


def test_what_a_judge_says_need_not_be_valid_unicode(tmp_path: Path) -> None:
    judge = FakeJudge(reply="Half a \ud83d smile.\nANSWER: B")
    for images in (2, 3):
        assert bulk.run(cascade(judge, "always"), Pictures(images), tmp_path, config={}).counts == {"answered": images}
    assert len(judge.questions) == 3
    rationales = pyarrow.parquet.read_table(tmp_path / "predictions.parquet")["rationale"].to_pylist()
    assert rationales == ["Half a \\ud83d smile."] * 3


@pytest.mark.parametrize("policy", ["entropy > 0.6", "calls <= 5", "top_fraction(0.5)", "random(0.5)"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path: Path, policy: str) -> None:
    bulk.run(cascade(policy=policy), Pictures(30), tmp_path / "whole", config={})
    judges = [FakeJudge(reply=second) for _ in range(3)]
    for judge, batches in zip(judges, (2, 3, 1000), strict=True):
        stop = stopping_after(batches)
        tally = bulk.run(cascade(judge, policy), Pictures(30), tmp_path / "parts", config={}, stopping=stop.__next__)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert tally.images == 30
    assert judges[0].questions
    assert sum(len(judge.questions) for judge in judges) == tally.counts["answered"]


@pytest.mark.parametrize("batches", [2, 3, 4, 5])
def test_a_run_that_is_left_while_a_later_judge_still_decides_goes_on(tmp_path: Path, batches: int) -> None:
    """The first image delays the later stage. The other images are settled long before."""
    images = [(str(number), picture(RED if number == 0 else GREY)) for number in range(10)]

    def two_stages() -> Cascade:
        judges = FakeJudge("slow", reply=second, seconds=0.1), FakeJudge("never asked")
        stages = [
            Stage(judge=judge, prompt=load_prompt("select"), policy=parse_policy(policy))
            for judge, policy in zip(judges, ("entropy > 0.9", "never"), strict=True)
        ]
        scorer = FakeScorer(table={RED: [1, 1, 1, 1], GREY: [9, 0, 0, 0]})
        return Cascade(scorer, stages, labels=LABELS, batch_size=1)

    stop = stopping_after(batches)
    assert bulk.run(two_stages(), images, tmp_path, config={}, stopping=stop.__next__).images < 10
    assert bulk.run(two_stages(), images, tmp_path, config={}).images == 10
    assert [line["label"] for line in lines(tmp_path)] == ["owl"] + ["finch"] * 9


def test_a_finished_run_asks_and_scores_nothing_and_takes_new_images(tmp_path: Path) -> None:
    bulk.run(cascade(), Pictures(20), tmp_path, config={})
    judge = FakeJudge(reply=second)
    assert bulk.run(cascade(judge), Pictures(20), tmp_path, config={}).images == 20
    assert not judge.questions
    assert bulk.run(cascade(judge), Pictures(30), tmp_path, config={}).images == 30
    bulk.run(cascade(), Pictures(30), tmp_path / "whole", config={})
    assert lines(tmp_path) == lines(tmp_path / "whole")


def test_a_summary_is_of_all_predictions_that_are_there(tmp_path: Path) -> None:
    bulk.run(cascade(), Pictures(20), tmp_path, config={})
    summary, table = tmp_path / "summary.json", tmp_path / "predictions.parquet"
    written = table.stat().st_mtime_ns, summary.read_text()
    bulk.run(cascade(), Pictures(20), tmp_path, config={})
    assert (table.stat().st_mtime_ns, summary.read_text()) == written
    stop = stopping_after(2)
    assert bulk.run(cascade(), Pictures(40), tmp_path, config={}, stopping=stop.__next__).images < 40
    assert not summary.exists()
    bulk.run(cascade(), Pictures(40), tmp_path, config={})
    assert json.loads(summary.read_text())["images"] == pyarrow.parquet.read_metadata(table).num_rows == 40


@pytest.mark.parametrize("left", [0, 1, 700, 5000])
def test_what_is_not_whole_is_worked_out_again(tmp_path: Path, left: int) -> None:
    """A file that is cut at any position, as after a loss of power, and a stored position beyond the end of the file."""
    bulk.run(cascade(), Pictures(20), tmp_path, config={})
    before, path = lines(tmp_path), tmp_path / "predictions.jsonl"
    os.truncate(path, left)
    judge = FakeJudge(reply=second)
    assert bulk.run(cascade(judge), Pictures(20), tmp_path, config={}).images == 20
    assert lines(tmp_path) == before
    assert not judge.questions


def test_a_damaged_line_and_all_after_it_is_worked_out_again(tmp_path: Path) -> None:
    bulk.run(cascade(), Pictures(20), tmp_path, config={})
    before, path = lines(tmp_path), tmp_path / "predictions.jsonl"
    text = path.read_text()
    path.write_text(text.replace('"image 7"', '"image X"'))
    with pytest.warns(RuntimeWarning, match="damaged after 7 images"):
        bulk.run(cascade(), Pictures(20), tmp_path, config={}, stopping=lambda: True)
    assert not (tmp_path / "summary.json").exists()
    bulk.run(cascade(), Pictures(20), tmp_path, config={})
    assert lines(tmp_path) == before


def test_a_line_that_is_whole_and_no_prediction_is_damage(tmp_path: Path) -> None:
    bulk.run(cascade(), Pictures(20), tmp_path, config={})
    before, path = lines(tmp_path), tmp_path / "predictions.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*rows[:7], with_checksum(b'{"path": "image 7"}'), *rows[8:]]))
    with pytest.warns(RuntimeWarning, match="damaged after 7 images"):
        bulk.run(cascade(), Pictures(20), tmp_path, config={})
    assert lines(tmp_path) == before


A: dict[str, JsonValue] = {"scorer": {"use": "a"}}


def test_another_configuration_is_refused_by_its_difference(tmp_path: Path) -> None:
    config: dict[str, JsonValue] = {**A, "stage": [{"judge": "a", "policy": "entropy > 0.3"}], "budget": {"usd": 1.0}}
    bulk.run(cascade(), Pictures(5), tmp_path, config=config)
    other: dict[str, JsonValue] = {**A, "stage": [{"judge": "a", "policy": "entropy > 0.5"}], "budget": {"usd": 2.0}}
    with pytest.raises(DataError, match=r"stage\.0\.policy was 'entropy > 0\.3' and is 'entropy > 0\.5'\. Give another folder"):
        bulk.run(cascade(), Pictures(5), tmp_path, config=other)
    with pytest.raises(DataError, match="labels differ"):
        bulk.run(Cascade(FakeScorer(), [], labels=["finch"]), Pictures(5), tmp_path, config=config)
    bulk.run(cascade(), Pictures(5), tmp_path, config=config | {"budget": {"usd": 2.0}})


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (A | {"stage": [{"judge": "a", "options": {"requests_per_minute": 500, "timeout": 9}}]}, A | {"stage": [{"judge": "a"}]}),
        ({"scorer": {"use": "a", "options": {"device": "cpu"}}}, A),
        (A, Config.parse(A).model_dump(mode="json")),
        (A | {"calibration": "a.json"}, A | {"calibration": "b.json"}),
    ],
)
def test_what_decides_nothing_may_change(tmp_path: Path, before: dict[str, JsonValue], now: dict[str, JsonValue]) -> None:
    """A configuration with a key of a newer version."""
    for config in (before, now):
        bulk.run(cascade(), Pictures(5), tmp_path, config=config)


class Endpoint(FakeJudge):
    """A judge that has its endpoint in its identity after its preparation."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(reply=second)
        self.endpoint = endpoint
        self.ready = False

    async def prepare(self) -> None:
        self.ready = True

    def identity(self) -> Mapping[str, JsonValue]:
        assert self.ready
        return {"judge": self.spec, "endpoint": self.endpoint}


def test_another_judge_is_refused_by_its_identity(tmp_path: Path) -> None:
    bulk.run(cascade(Endpoint("here")), Pictures(5), tmp_path, config={})
    other = Endpoint("there")
    with pytest.raises(DataError, match=r"stage\.0\.judge\.endpoint was 'here' and is 'there'"):
        bulk.run(cascade(other), Pictures(9), tmp_path, config={})
    assert not other.questions
    assert bulk.run(cascade(Endpoint("here")), Pictures(9), tmp_path, config={}).images == 9


def of_contents(*, prompt: Prompt | None = None, shown: int = 1, scale: float = 1.0) -> Cascade:
    scorer = ScorerCalibration(method="bias", scale=scale, bias=np.zeros(len(LABELS)))
    calibration = replace(some_calibration(LABELS, JudgeModel.prior(len(LABELS))), scorer=scorer)
    support = SupportSet({"owl": (Exemplar(image=noise(shown, (8, 8)), label=Label(name="owl")),)})
    stage = Stage(judge=FakeJudge(), prompt=prompt or load_prompt("select_fewshot"), support=support)
    return Cascade(FakeScorer(), [stage], labels=LABELS, calibration=calibration)


def test_other_contents_of_files_are_refused(tmp_path: Path) -> None:
    prompt = load_prompt("select_fewshot")
    others = {
        "stage.0.prompt": of_contents(prompt=replace(prompt, text=prompt.text + "!")),
        "stage.0.support": of_contents(shown=2),
        "calibration": of_contents(scale=2.0),
    }
    bulk.run(of_contents(), Pictures(5), tmp_path, config={})
    for name, other in others.items():
        with pytest.raises(DataError, match=f"run: the content of {name} differs"):
            bulk.run(other, Pictures(5), tmp_path, config={})
    bulk.run(of_contents(), Pictures(5), tmp_path, config={})


def test_another_scorer_is_refused(tmp_path: Path) -> None:
    bulk.run(cascade(), Pictures(5), tmp_path, config={})
    with pytest.raises(DataError, match="belongs to a run with the scorer 'fake:fake'; the scorer is now 'fake:another'"):
        bulk.run(cascade().altered(scorer=FakeScorer("another")), Pictures(9), tmp_path, config={})


def test_other_images_are_refused(tmp_path: Path) -> None:
    bulk.run(cascade(), Pictures(9), tmp_path, config={})
    with pytest.raises(DataError, match=r"Image 5 of .* was 'image 5' and is now 'gone'"):
        bulk.run(cascade(), Pictures(5), tmp_path, config={})


def test_two_writers_are_one_too_many(tmp_path: Path) -> None:
    with FileLock(tmp_path / "lock"), pytest.raises(DataError, match="Another process writes"):
        bulk.run(cascade(), Pictures(5), tmp_path, config={})


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(DataError, match="contains other things"):
        bulk.run(cascade(), Pictures(5), tmp_path, config={})
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_process_killed_before_its_manifest_was_there_leaves_a_folder_to_begin_in(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    (tmp_path / "manifest.json.part").write_text('{"form')
    assert bulk.run(cascade(), Pictures(5), tmp_path, config={}).images == 5


def test_failures_are_told_once(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.png" for number in range(8)]
    for number, file in enumerate(files):
        noise(number, (8, 8)).save(file)
    files[2].write_bytes(b"no image")
    images = [(str(file), file) for file in [*files, tmp_path / "gone.png"]]

    def reply(question: Question) -> str | Exception:
        return PermanentError("cannot be asked") if question.image == noise(5, (8, 8)) else "ANSWER: A"

    for stop in (stopping_after(1), stopping_after(9)):
        tally = bulk.run(cascade(FakeJudge(reply=reply), "always"), images, tmp_path / "run", config={}, stopping=stop.__next__)
    told = [json.loads(line) for line in (tmp_path / "run" / "failures.jsonl").read_text().splitlines()]
    assert [row["image"] for row in told] == [2, 5, 8]
    assert "id" not in told[0]
    assert "is not an image" in told[0]["error"]
    assert told[1]["error"] == "cannot be asked"
    assert "does not exist" in told[2]["error"]
    assert tally.counts == {"answered": 6, "failed": 1, "unreadable": 2}


def test_failures_are_tried_again_if_that_is_wanted(tmp_path: Path) -> None:
    """All images after the first changed image get a new prediction, from stored answers."""
    files = [tmp_path / f"{number}.png" for number in range(12)]
    for number, file in enumerate(files):
        noise(number, (8, 8)).save(file)
    files[7].unlink()
    images = [(str(file), file) for file in files]

    def reply(question: Question) -> str | Exception:
        return PermanentError("no answer") if question.image == noise(5, (8, 8)) else "ANSWER: A"

    run = tmp_path / "run"
    tally = bulk.run(cascade(FakeJudge(reply=reply), "always"), images, run, config={})
    assert (tally.failures, tally.counts) == (2, {"answered": 10, "failed": 1, "unreadable": 1})
    noise(7, (8, 8)).save(files[7])
    judge = FakeJudge()
    assert bulk.run(cascade(judge, "always"), images, run, config={}).failures == 2
    assert not judge.questions
    tally = bulk.run(cascade(judge, "always"), images, run, config={}, retry_failed=True)
    assert (tally.images, tally.counts, tally.failures) == (12, {"answered": 12}, 0)
    assert [question.image for question in judge.questions] == [noise(5, (8, 8)), noise(7, (8, 8))]
    assert (run / "failures.jsonl").read_text() == ""
    assert [line["path"] for line in lines(run)] == [name for name, _ in images]
    assert json.loads((run / "summary.json").read_text()) == tally.to_dict()


def test_a_dead_judge_ends_the_run_and_what_was_done_is_kept(tmp_path: Path) -> None:
    replies = iter(["ANSWER: A"] * 6 + [FatalError("The key is wrong.")] * 99)
    with pytest.raises(FatalError, match="key is wrong"):
        bulk.run(cascade(FakeJudge(reply=lambda _: next(replies)), "always"), Pictures(30), tmp_path, config={})
    kept = len(lines(tmp_path))
    judge = FakeJudge(reply="ANSWER: A")
    tally = bulk.run(cascade(judge, "always"), Pictures(30), tmp_path, config={})
    assert tally.counts == {"answered": 30}
    assert len(judge.questions) == 24
    assert kept <= 6


def test_inputs_that_vanish_end_the_run_and_what_was_done_is_kept(tmp_path: Path) -> None:
    class Vanishing(Pictures):
        def __iter__(self) -> Iterator[Named]:
            for number, each in enumerate(super().__iter__()):
                if number == 13:
                    raise DataError("The disk is gone.")
                yield each

    with pytest.raises(DataError, match="disk is gone"):
        bulk.run(cascade(), Vanishing(30), tmp_path, config={})
    assert len(lines(tmp_path)) == 12
    assert bulk.run(cascade(), Pictures(30), tmp_path, config={}).images == 30


class PaidJudge(FakeJudge):
    """Costs a quarter of a dollar."""

    def __init__(self) -> None:
        super().__init__(reply=second, dollars=0.25)

    def quote(self, question: Question) -> Quote:
        return Quote(worst_case=250_000_000)


def test_the_cap_holds_over_all_sessions(tmp_path: Path) -> None:
    asked = 0
    for batches in (1, 1, 99):
        stop, judge = stopping_after(batches), PaidJudge()
        paid = cascade(judge, "always", ledger=Ledger(2.5))
        tally = bulk.run(paid, Pictures(30), tmp_path, config={}, stopping=stop.__next__)
        asked += len(judge.questions)
        assert tally.spent_dollars == 0.25 * asked
    assert asked == 10
    assert tally.counts == {"answered": 10, "skipped": 20}


@settings(max_examples=12)  # each is several runs
@given(caps=st.lists(st.integers(0, 14), min_size=1, max_size=4))
@example(caps=[5, 5])
@example(caps=[7, 3, 5])
def test_a_raised_cap_asks_about_what_was_skipped(tmp_path_factory: pytest.TempPathFactory, caps: list[int]) -> None:
    """Limits in numbers of questions, of which there are twelve, and no limit at the end."""
    folder, judge, told = tmp_path_factory.mktemp("run"), PaidJudge(), list[str]()

    def run(cap: int | None) -> Mapping[str, int]:
        paid = cascade(judge, "always", ledger=Ledger(None if cap is None else cap * 0.25))
        return bulk.run(paid, Pictures(12), folder, config={}, outlook=told.append).counts

    answered, before = 0, -1
    for cap in [*caps, None]:
        limit = 99 if cap is None else cap
        raised = before >= 0 and limit > before and answered < 12
        answered = max(answered, min(limit, 12)) if raised or before < 0 else answered
        expected = {"answered": answered, "skipped": 12 - answered}
        assert run(cap) == {outcome: count for outcome, count in expected.items() if count}
        assert len(judge.questions) == answered
        if raised:
            assert told.pop().startswith(f"The budget was raised from ${before * 0.25:.2f}: judges are asked about the images")
        elif before >= 0:
            assert told.pop() == "Nothing is left to do: all 12 images have a prediction."
        assert not told
        before = limit
    assert [line["label"] for line in lines(folder)] == [each.label for each in cascade(policy="always").classify(pictures(12))]


def test_a_raised_cap_that_is_interrupted_is_still_raised(tmp_path: Path) -> None:
    for cap, batches in ((1.0, 99), (2.5, 1), (2.5, 99)):
        stop = stopping_after(batches)
        paid = cascade(PaidJudge(), "always", ledger=Ledger(cap))
        tally = bulk.run(paid, Pictures(12), tmp_path, config={}, stopping=stop.__next__)
    assert tally.counts == {"answered": 10, "skipped": 2}
    assert tally.spent_dollars == 2.5


def test_what_is_left_to_do_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    for batches in (0, 2, 99, 99):
        stop = stopping_after(batches)
        bulk.run(cascade(), Pictures(30), tmp_path, config={}, stopping=stop.__next__, outlook=told.append)
    assert told == [
        "8 images have a prediction; the run continues after them.",
        "Nothing is left to do: all 30 images have a prediction.",
    ]


@pytest.mark.parametrize(
    ("replies", "in_vain"), [(["?"], True), (["?", "", PermanentError("no")], True), (["?", "ANSWER: A"], False)]
)
def test_a_run_without_any_answer_is_in_vain(tmp_path: Path, replies: list[str | Exception], in_vain: bool) -> None:
    judge = FakeJudge(reply=lambda asked: replies[int(asked.image_digest, 16) % len(replies)])
    tally = bulk.run(cascade(judge, "always"), Pictures(9), tmp_path / "run", config={})
    assert (tally.asked, tally.in_vain, tally.answered > 0) == (9, in_vain, not in_vain)
    assert bulk.run(cascade(judge, "always"), Pictures(9), tmp_path / "run", config={}) == tally  # by its lines


@given(
    promises=st.lists(st.tuples(st.integers(1, 1000), st.none() | st.integers(0, 1000)), max_size=20),
    cut=st.integers(0, 30),
)
def test_a_ledger_never_forgets(
    tmp_path_factory: pytest.TempPathFactory, promises: list[tuple[int, int | None]], cut: int
) -> None:
    """A ledger that was killed with open reservations and an incomplete last line counts the paid and the reserved amounts as
    spent.
    """
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    ledger = DurableLedger(1.0, path)

    async def spend() -> None:
        for promise, paid in promises:
            await ledger.reserve(promise)
            if paid is not None:
                ledger.settle(promise, min(promise, paid))

    loop.run(spend())
    ledger.close()
    entries = path.read_text()
    last = entries.splitlines()[-1]
    path.write_text(entries[: len(entries) - min(cut, len(last))])
    known = entries.splitlines() if cut == 0 or len(promises) == 0 else entries.splitlines()[:-1]
    expected = sum(json.loads(line)["reserved"] + json.loads(line)["spent"] for line in known)
    again = DurableLedger(1.0, path)
    again.close()
    assert round(again.spent_dollars * 1e9) == (expected if promises else 0)
    if cut == 0:
        assert expected == sum(promise if paid is None else min(promise, paid) for promise, paid in promises)


def test_a_ledger_keeps_no_promise_to_a_batch_which_has_its_own_files(tmp_path: Path) -> None:
    ledger = DurableLedger(1.0, tmp_path / "ledger.jsonl")
    for nanodollars in (30, 50):
        ledger.reserve_now(nanodollars)
    ledger.settle(30, 7, standing=True)
    assert ledger.reserved_dollars == 50e-9
    ledger.close()
    assert total_in(tmp_path / "ledger.jsonl") == 7


def test_a_long_ledger_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"reserved": 5, "spent": 0}\n{"reserved": -5, "spent": 3}\n' * 50_000)
    tracemalloc.start()
    ledger = DurableLedger(None, path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    ledger.close()
    assert round(ledger.spent_dollars * 1e9) == 150_000
    assert most < 500_000


@pytest.mark.parametrize(
    "damage",
    [
        b"\0\0\0\n",
        b'{"reserved": 5, "sp\n{"reserved": 1, "spent": 2}\n',
        b'{"reserved": 5}\n',
        b'{"reserved": 0, "spent": -5000000000}\n',
        b'{"reserved": -5, "spent": 0}\n',
        b'{"reserved": 0, "spent": "5"}\n',
        b'{"reserved": true, "spent": 0}\n',
    ],
)
def test_a_damaged_ledger_is_one_sentence(tmp_path: Path, damage: bytes) -> None:
    bulk.run(cascade(), Pictures(5), tmp_path, config={})
    with (tmp_path / "ledger.jsonl").open("ab") as file:
        file.write(damage)
    with pytest.raises(DataError, match=r"ledger\.jsonl', line 2, is damaged: the spent amount is not known\. Remove the line"):
        bulk.run(cascade(), Pictures(9), tmp_path, config={})


@pytest.mark.parametrize("lost", [Path.unlink, lambda path: path.write_text("")])
def test_a_lost_ledger_gives_no_second_cap(tmp_path: Path, lost: Callable[[Path], None]) -> None:
    judge = FakeJudge(dollars=0.02)
    capped = cascade(judge, "always", ledger=Ledger(1.0))
    bulk.run(capped, Pictures(5), tmp_path, config={})
    before = (tmp_path / "predictions.jsonl").read_bytes()
    lost(tmp_path / "ledger.jsonl")
    with pytest.raises(
        DataError, match=r"cost of the predictions: \$0\.000000 instead of \$0\.100000\. Restore the file"
    ) as told:
        bulk.run(capped, Pictures(6), tmp_path, config={})
    assert (tmp_path / "predictions.jsonl").read_bytes() == before
    assert len(judge.questions) == 5
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write(str(told.value).split("into it: ")[1] + "\n")
    assert bulk.run(capped, Pictures(6), tmp_path, config={}).spent_dollars == pytest.approx(0.12)


@pytest.mark.parametrize("damage", [b"", bytes(30), b'{"images": '])
def test_damaged_progress_is_none(tmp_path: Path, damage: bytes) -> None:
    stop = stopping_after(2)
    bulk.run(cascade(), Pictures(20), tmp_path, config={}, stopping=stop.__next__)
    (tmp_path / "progress.json").write_bytes(damage)
    assert bulk.run(cascade(), Pictures(20), tmp_path, config={}).images == 20
    bulk.run(cascade(), Pictures(20), tmp_path / "whole", config={})
    assert lines(tmp_path) == lines(tmp_path / "whole")


@pytest.mark.parametrize("policy", ["entropy > 0.6", "calls <= 5", "top_fraction(0.5)"])
@pytest.mark.parametrize(
    ("found", "false"),
    [
        (rb'"images":8', b'"images":-8'),
        (rb'"images":8', b'"images":4'),
        (rb'"calls":\d+', b'"calls":-1000'),
        (rb'"spending":\[.*?\],"seen"', b'"spending":[],"seen"'),
        (rb'"recent":\[', b'"recent":[1.5,'),
    ],
)
def test_progress_that_was_changed_is_none(tmp_path: Path, policy: str, found: bytes, false: bytes) -> None:
    stop = stopping_after(2)
    bulk.run(cascade(policy=policy), Pictures(20), tmp_path, config={}, stopping=stop.__next__)
    noted = (tmp_path / "progress.json").read_bytes()
    changed = re.sub(found, false, noted, count=1)
    assert changed != noted
    (tmp_path / "progress.json").write_bytes(changed)
    assert bulk.run(cascade(policy=policy), Pictures(20), tmp_path, config={}).images == 20
    bulk.run(cascade(policy=policy), Pictures(20), tmp_path / "whole", config={})
    assert lines(tmp_path) == lines(tmp_path / "whole")


def test_progress_beyond_what_is_there_is_forgotten(tmp_path: Path) -> None:
    bulk.run(cascade(), Pictures(20), tmp_path, config={})
    os.truncate(tmp_path / "predictions.jsonl", 700)
    with RunFolder.opened(tmp_path, Manifest.of(cascade(), Pictures(20), {}), Pictures(20)) as folder:
        assert folder.checkpoint == BEGINNING
        assert not (tmp_path / "progress.json").exists()


def test_a_table_that_is_gone_is_written_again(tmp_path: Path) -> None:
    bulk.run(cascade(), Pictures(5), tmp_path, config={})
    (tmp_path / "predictions.parquet").unlink()
    bulk.run(cascade(), Pictures(5), tmp_path, config={})
    assert pyarrow.parquet.read_metadata(tmp_path / "predictions.parquet").num_rows == 5


def test_what_is_there_is_made_safe_while_the_next_image_keeps_the_run_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "FLUSH_SECONDS", 0.05)
    known: list[int] = []

    class Slow(FakeJudge):
        async def judge(self, question: Question) -> Verdict:
            if question.image == noise(9, (8, 8)):
                for _ in range(200):
                    await asyncio.sleep(0.05)
                    written = (tmp_path / "predictions.jsonl").read_bytes().count(b"\n")
                    progress = tmp_path / "progress.json"
                    known[:] = [written, json.loads(progress.read_bytes())["images"] if progress.exists() else 0]
                    if known == [9, 8]:
                        break
            return await super().judge(question)

    bulk.run(cascade(Slow(), "always"), Pictures(12), tmp_path, config={})
    assert known == [9, 8]


def test_what_cannot_be_flushed_ends_the_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "FLUSH_SECONDS", 0.05)

    def full(path: Path, text: str) -> None:
        if path.name == "progress.json":
            raise OSError(28, "No space left on device")
        write_whole(path, text)

    monkeypatch.setattr(run_folder, "write_whole", full)
    judge = FakeJudge(seconds=600)
    with pytest.raises(RunError, match="cannot be written to: No space left on device"):
        bulk.run(cascade(judge, "always"), Pictures(5), tmp_path, config={})


def test_an_error_of_another_folder_is_not_of_this_one(tmp_path: Path) -> None:
    class Broken(FakeScorer):
        def score(self, images: Sequence[Image.Image], labels: LabelSet) -> Scores:
            raise OSError(5, "Input/output error", "/embeddings/000000.f32")

    with pytest.raises(OSError, match="embeddings"):
        bulk.run(cascade().altered(scorer=Broken()), Pictures(5), tmp_path, config={})


def test_a_full_disk_is_one_sentence_and_what_was_written_is_kept(tmp_path: Path) -> None:
    """A limit on the size of a file stands for a full disk."""
    script = """
import resource, signal, sys
from pathlib import Path
from tests.runs.test_bulk import Pictures, cascade
from cascadevlm.runs import bulk
from cascadevlm.base.errors import RunError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
try:
    bulk.run(cascade(policy="never"), Pictures(2000), Path(sys.argv[1]), config={})
except RunError as exc:
    print(exc)
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert "cannot be written to: File too large. Its content is kept" in done.stdout
    kept = (tmp_path / "predictions.jsonl").read_text().count("\n")
    assert kept > 100
    assert bulk.run(cascade(policy="never"), Pictures(2000), tmp_path, config={}).images == 2000
    assert [line["path"] for line in lines(tmp_path)] == [name for name, _ in Pictures(2000)]


@pytest.mark.parametrize("full", ["run", "cache"])
def test_before_a_disk_is_full_the_run_stops_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str) -> None:
    judge, store = PaidJudge(), DiskStore(tmp_path / "cache")

    def usage(folder: Path) -> SimpleNamespace:
        return SimpleNamespace(free=1 << 20 if folder == tmp_path / full and len(judge.questions) > 5 else 1 << 40)

    monkeypatch.setattr("shutil.disk_usage", usage)
    with pytest.raises(RunError, match=rf"{full}' has less than 16 MB left\. Free some space"):
        bulk.run(cascade(judge, "always", store=store), Pictures(40), tmp_path / "run", config={})
    asked = len(judge.questions)
    assert 5 < asked < 40
    assert len(lines(tmp_path / "run")) == asked
    monkeypatch.undo()
    assert bulk.run(cascade(judge, "always", store=store), Pictures(40), tmp_path / "run", config={}).images == 40
    assert len(judge.questions) == 40


@pytest.fixture
def files(tmp_path: Path) -> Inputs:
    """Twenty images of one size."""
    (tmp_path / "images").mkdir()
    for number in range(20):
        noise(number, (8, 8)).save(tmp_path / "images" / f"{number:02}.bmp")
    return Inputs(tmp_path / "images")


def test_an_image_that_was_changed_is_noticed_by_its_digest(files: Inputs, tmp_path: Path) -> None:
    judge, stop = FakeJudge(reply=second), stopping_after(3)
    bulk.run(cascade(judge, "always"), files, tmp_path / "run", config={}, stopping=stop.__next__)
    before = lines(tmp_path / "run")
    changed = Path(files.path) / "05.bmp"
    times = changed.stat()
    noise(99, (8, 8)).save(changed)
    os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert changed.stat().st_size == times.st_size
    with pytest.warns(
        RuntimeWarning, match=r"05\.bmp' was changed after its prediction; this and all later predictions are made again"
    ):
        assert bulk.run(cascade(judge, "always"), files, tmp_path / "run", config={}).images == 20
    assert len(judge.questions) == 21
    after = lines(tmp_path / "run")
    assert [now == then for now, then in zip(after, before, strict=False)][:5] == [True] * 5
    assert after[5]["digest"] != before[5]["digest"]
    assert [line["label"] for line in after] == [each.label for each in cascade(policy="always").classify(s for _, s in files)]


def test_an_image_that_was_only_touched_moved_or_deleted_is_not_changed(files: Inputs, tmp_path: Path) -> None:
    judge = FakeJudge(reply=second)
    bulk.run(cascade(judge, "always"), files, tmp_path / "run", config={})
    before = lines(tmp_path / "run")
    (Path(files.path) / "03.bmp").touch()
    content = (Path(files.path) / "04.bmp").read_bytes()
    (Path(files.path) / "04.bmp").unlink()
    (Path(files.path) / "04.bmp").write_bytes(content)
    listed = [name for name, _ in files]
    (Path(files.path) / "05.bmp").unlink()
    (tmp_path / "list.txt").write_text("\n".join(listed))
    assert bulk.run(cascade(judge, "always"), Inputs(tmp_path / "list.txt"), tmp_path / "run", config={}).images == 20
    assert lines(tmp_path / "run") == before
    assert len(judge.questions) == 20


def test_only_files_that_were_changed_since_the_run_began_are_read_again(
    files: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time.sleep(0.02)  # clocks of files are coarse
    bulk.run(cascade(), files, tmp_path / "run", config={})
    monkeypatch.setattr(run_folder, "digest_of", lambda path: pytest.fail(f"{path} is read"))
    bulk.run(cascade(), files, tmp_path / "run", config={})


def test_digests_are_known_where_embeddings_are_kept(files: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = CachedEmbeddings(OpenClipScorer("aviary", device="cpu"), tmp_path / "embeddings")
    bulk.run(Cascade(scorer, [], labels=LABELS), files, tmp_path / "run", config={})
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(files.path).iterdir())]
    assert [line["digest"] for line in lines(tmp_path / "run")] == digests


@pytest.mark.parametrize(("images", "labelled", "learn"), [(150, True, False), (300, False, True)])
def test_killed_runs_lose_nothing_and_pay_twice_only_for_what_was_under_way(images: int, labelled: bool, learn: bool) -> None:
    """`python -m benchmarks.kills` does this a hundred times."""
    proof = prove(3, images=images, labelled=labelled, learn=learn)
    assert (proof.kills, proof.asked_again, proof.different) == (3, 0, 0)
    assert proof.questions > 0
    assert proof.paid_twice <= proof.under_way <= proof.kills * 8


def image_table(folder: Path, column: object) -> Path:
    path = folder / "images.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": column}), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b/2.png", "b/1.JPG", "a.png", "c/é.webp", "c/notes.txt"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        noise(len(name), (8, 8)).save(tmp_path / "images" / name) if not name.endswith("txt") else None
    return tmp_path / "images"


def test_inputs_are_folders_and_lists(folder: Path) -> None:
    files = [folder / name for name in ("a.png", "b/1.JPG", "b/2.png", "c/é.webp")]
    assert list(Inputs(folder)) == [(str(file), file) for file in files]
    relative = [str(file.relative_to(folder.parent)) for file in files]
    (folder.parent / "list.txt").write_text("\n".join(relative) + "\n\n")
    (folder.parent / "list.csv").write_text("id,path\n" + "".join(f"1,{name}\n" for name in relative))
    (folder.parent / "list.jsonl").write_text("".join(json.dumps({"path": name}) + "\n" for name in relative))
    pyarrow.parquet.write_table(pyarrow.table({"path": relative}), folder.parent / "list.parquet")
    for suffix in ("txt", "csv", "jsonl", "parquet"):
        assert list(Inputs(folder.parent / f"list.{suffix}")) == [(str(file), file) for file in files]
        assert len(Inputs(folder.parent / f"list.{suffix}")) == 4


def test_inputs_are_images_in_a_table(folder: Path) -> None:
    content = (folder / "a.png").read_bytes()
    assert list(Inputs(image_table(folder, [content, None]))) == [("#0", content), ("#1", b"")]
    stored = [{"bytes": content, "path": "x.png"}, {"bytes": None, "path": "b/2.png"}]
    assert list(Inputs(image_table(folder, stored)))[1] == (str(folder / "b/2.png"), folder / "b/2.png")


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("list.csv", "file\nx.png\n", r"has no column 'path'\. Its columns: 'file'\."),
        ("list.jsonl", "{", "cannot be read"),
        ("list.parquet", "no table", "cannot be read"),
        ("list.xlsx", "", "neither a folder nor a list"),
        ("gone", None, "does not exist"),
    ],
)
def test_what_is_no_input_says_so(tmp_path: Path, name: str, text: str | None, told: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=told):
        list(Inputs(tmp_path / name))


def test_every_image_is_as_likely_in_a_sample(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("\n".join(f"{number}.png" for number in range(40)))
    inputs, counts = Inputs(tmp_path / "list.txt"), np.zeros(40)
    for seed in range(400):
        sample, total = inputs.sample(10, seed=seed)
        assert (len(set(sample)), total) == (10, 40)
        for source in sample:
            assert isinstance(source, Path)
            counts[int(source.stem)] += 1
    assert abs(counts - 100).max() < 5 * np.sqrt(400 * 0.25 * 0.75)

"""Runs with an audit of the images that their policy keeps."""

import asyncio
import json
import multiprocessing
import os
import re
import signal
import warnings
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from unittest.mock import patch

import markupsafe
import pytest
from pydantic import JsonValue

from cascadevlm import Cascade, Stage, load_prompt, parse_policy
from cascadevlm.base.errors import ConfigError, InputError, PermanentError
from cascadevlm.base.types import AUDITED, PROMISE_BROKEN, Prediction, Question, Verdict
from cascadevlm.cascade.candidates import TopK
from cascadevlm.config.audit import AuditConfig
from cascadevlm.config.config import Config
from cascadevlm.decision.auditing import Watch, Watched
from cascadevlm.evaluation.report import read_bulk_run, render_bulk
from cascadevlm.judges.budget import Ledger
from cascadevlm.runs import bulk
from cascadevlm.runs.lines import Line
from cascadevlm.runs.run_folder import RunFolder
from cascadevlm.runs.tally import Tally
from cascadevlm.testing import FakeJudge, FakeScorer, noise
from tests.learning import cascade, insects
from tests.runs.test_certified import LABELS, PaidJudge, Pictures, lines

AUDIT = AuditConfig(share=0.1, agree=0.9)


def first(_: Question) -> str:
    return "ANSWER: A"


def second(_: Question) -> str:
    return "ANSWER: B"


class UnevenJudge(FakeJudge):
    """Some answers come much later than others."""

    async def judge(self, question: Question) -> Verdict:
        await asyncio.sleep(int(question.image_digest[:2], 16) / 256 * 0.05)
        return await super().judge(question)


def run(
    folder: Path,
    judge: FakeJudge,
    *,
    count: int = 300,
    policy: str = "entropy > 0.6",
    audit: AuditConfig = AUDIT,
    stopping: Callable[[], bool] = lambda: False,
    broken: tuple[int, ...] = (),
) -> Tally:
    stage = Stage(judge=judge, prompt=load_prompt("select"), policy=parse_policy(policy))
    audited = audit.added_to(Cascade(FakeScorer(), [stage], labels=LABELS, batch_size=8))
    return bulk.run(audited, Pictures(count, broken), folder, config={}, audit=audit, stopping=stopping)


def test_none_of_the_first_candidates_differs_whatever_the_next_answer_is() -> None:
    (alone,) = Cascade(FakeScorer(), labels=LABELS).classify([noise(0)])
    judge = FakeJudge(reply=["ANSWER: none of these", f"ANSWER: {alone.candidates[2].label.name}"])
    stage = Stage(
        judge=judge, prompt=load_prompt("select"), candidates=TopK(k=2), offer_none=True, widen=1, policy=parse_policy("never")
    )
    (prediction,) = AuditConfig(share=1).added_to(Cascade(FakeScorer(), [stage], labels=LABELS)).classify([noise(0)])
    assert len(judge.questions) == 2
    assert prediction.label == prediction.candidates[0].label.name
    assert prediction.differing


def test_one_kept_image_per_block_is_asked_about(tmp_path: Path) -> None:
    judge = FakeJudge(reply=first)
    tally = run(tmp_path, judge)
    found = lines(tmp_path)
    drawn = AUDIT.sampling.drawn(0, 300)
    audited = [line for line in found if AUDITED in line["reasons"]]
    assert 5 < len(audited) < 30
    assert all(drawn[found.index(line)] and line["decided_by"] == "judge" for line in audited)
    kept = [line for line in found if line["verdict"] is None]
    assert not any(drawn[found.index(line)] for line in kept)
    assert len(judge.questions) == 300 - len(kept)
    assert tally.audit is not None
    assert (tally.audit.drawn, tally.audit.kept, tally.audit.disagreements, tally.audit.least) == (30, len(audited), 0, 0)
    assert json.loads((tmp_path / "summary.json").read_text())["audit"] == tally.audit.model_dump()
    assert run(tmp_path, FakeJudge(reply=first)) == tally


def test_a_broken_promise_is_told_once_and_nothing_is_kept_after_it(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="but at least 90 % must be the judge's. So the run will escalate all") as told:
        tally = run(tmp_path, FakeJudge(reply=second), count=900, policy="never")
    assert len(told) == 1
    assert tally.audit is not None
    reasons = [line["reasons"][-1] for line in lines(tmp_path)]
    first = reasons.index(PROMISE_BROKEN)
    assert first == 256  # the broken promise is seen in the first period
    assert {*reasons[first:]} == {PROMISE_BROKEN}
    assert all(line["decided_by"] == "judge" for line in lines(tmp_path)[first:])
    assert tally.audit.escalated == 900 - 256
    assert tally.audit.disagreements == tally.audit.kept == AUDIT.sampling.count(256)
    assert 0.1 < tally.audit.least < 0.9 * 256 / 900
    assert "So the judge was asked about 644 more images." in tally.audit.sentence
    assert f"<p>{markupsafe.escape(tally.audit.sentence)}</p>" in render_bulk({"run": read_bulk_run(tmp_path)})
    share = re.search(r"at least ([\d.]+) % of all labels are not", tally.audit.sentence)
    assert share is not None
    assert 0 <= tally.audit.least - float(share[1]) / 100 < 0.001
    with pytest.warns(RuntimeWarning, match="So the judge was asked about 645 more images."):
        tally = run(tmp_path, FakeJudge(reply=second), count=908, policy="never")
    assert tally.audit is not None
    assert tally.audit.escalated == 908 - 256


def test_a_question_without_an_answer_shows_no_broken_promise(tmp_path: Path) -> None:
    tally = run(tmp_path, FakeJudge(reply=lambda _: PermanentError("No answer.")), count=600, policy="never")
    assert tally.audit is not None
    assert (tally.audit.kept, tally.audit.disagreements, tally.audit.escalated) == (60, 0, 0)
    assert tally.counts["failed"] == 60


def test_images_without_a_label_are_not_audited() -> None:
    stage = Stage(judge=FakeJudge(reply=second), prompt=load_prompt("select"), policy=parse_policy("never"))
    images = [noise(number) for number in range(100)]
    plain = Cascade(FakeScorer(), [stage], labels=LABELS, accept=0.6)
    without = [each.label is None for each in plain.classify(images)]
    assert 10 < sum(without) < 90
    audited = AuditConfig(share=1).added_to(plain).classify(images)
    assert [not each.audited for each in audited] == without


@pytest.mark.filterwarnings("ignore:The audit asked:RuntimeWarning")
def test_images_that_the_budget_left_out_are_not_told_as_asked(tmp_path: Path) -> None:
    stage = Stage(judge=PaidJudge(), prompt=load_prompt("select"), policy=parse_policy("never"))
    audited = AUDIT.added_to(Cascade(FakeScorer(), [stage], labels=LABELS, batch_size=8, ledger=Ledger(1.0)))
    audited.stages[0].judge.reply = second  # type: ignore[attr-defined]
    tally = bulk.run(audited, Pictures(900), tmp_path, config={}, audit=AUDIT)
    assert tally.audit is not None
    assert tally.asked == 100
    assert tally.audit.escalated == 100 - AUDIT.sampling.count(256)


@pytest.mark.filterwarnings("ignore:The audit asked:RuntimeWarning")
def test_what_is_escalated_depends_neither_on_the_speed_of_answers_nor_on_stops(tmp_path: Path) -> None:
    audit, broken = AUDIT.model_copy(update={"agree": 0.4}), (3, 70, 200)
    run(tmp_path / "whole", FakeJudge(reply=second), count=700, policy="never", audit=audit, broken=broken)
    whole = lines(tmp_path / "whole")
    escalated = [number for number, line in enumerate(whole) if line["reasons"][-1:] == [PROMISE_BROKEN]]
    assert escalated == [*range(256 + 3, 700)]  # without the three images that cannot be read
    for batches in (5, 30, 34, 1000):
        stop = iter([*repeat(False, batches), *repeat(True, 1000)])
        judge = UnevenJudge(reply=second)
        run(tmp_path / "parts", judge, count=700, policy="never", audit=audit, broken=broken, stopping=stop.__next__)
    assert lines(tmp_path / "parts") == whole


def run_until_killed(folder: Path, images: int) -> None:
    """Kill this process before it writes the prediction of image number ``images``."""
    counted = RunFolder._count

    def writing(opened: RunFolder, path: str, own_id: JsonValue, prediction: Prediction | Line) -> None:
        if opened.tally.images == images:
            os.kill(os.getpid(), signal.SIGKILL)
        counted(opened, path, own_id, prediction)

    with warnings.catch_warnings(), patch.object(RunFolder, "_count", writing), patch.object(bulk, "FLUSH_SECONDS", 0.01):
        warnings.simplefilter("ignore")
        run(folder, FakeJudge(reply=second), count=500, policy="never")


@pytest.mark.filterwarnings("ignore:The audit asked:RuntimeWarning")
def test_an_audit_that_is_killed_escalates_the_same_images(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.runs.test_audit"])
    for images in (30, 200, 300, 499):  # before and after the promise is seen to be broken, and while every image is escalated
        process = processes.Process(target=run_until_killed, args=(tmp_path / "killed", images))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    run(tmp_path / "killed", FakeJudge(reply=second), count=500, policy="never")
    run(tmp_path / "whole", FakeJudge(reply=second), count=500, policy="never")
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


@pytest.mark.parametrize("follow_shares", [False, True])
def test_a_run_learns_nothing_from_an_audit_so_that_no_decision_depends_on_a_draw(follow_shares: bool) -> None:
    images = insects(400, seed=5)
    learning = cascade(policy="gain > 0.05", follow_shares=follow_shares)
    alone = learning.classify(images)
    for seed in (0, 1):
        audited = AuditConfig(share=0.25, seed=seed).added_to(learning).classify(images)
        assert 20 < sum(each.audited for each in audited) < 100
        pairs = list(zip(alone, audited, strict=True))
        assert [each.asked for each in alone] == [each.asked and not each.audited for each in audited]
        assert all(before.probability == after.probability for before, after in pairs if not after.audited)


def test_another_batch_size_that_changes_the_periods_is_refused() -> None:
    with pytest.raises(InputError, match="periods of 128 images, and batch_size = 500 makes periods of 500"):
        Watch(AUDIT.sampling, Watched(length=128, images=300), 500)


def test_without_a_promise_nothing_is_told(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tally = run(tmp_path, FakeJudge(reply=second), policy="never", audit=AuditConfig(share=0.2))
    assert tally.audit is not None
    assert tally.audit.least > 0.5


def test_an_audit_does_not_count_for_the_limits_of_the_policy(tmp_path: Path) -> None:
    tally = run(tmp_path, FakeJudge(reply=first), policy="calls <= 20")
    assert tally.counts["answered"] == 20 + tally.audited
    assert tally.audited > 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"audit.share": 0}, "audit.share: Input should be greater than 0"),
        ({"stage": []}, "one judge, but the configuration has 0 stages"),
        ({"agreement": {"agree": 0.9}}, r"both \[audit\] and \[agreement\]"),
    ],
)
def test_settings_that_do_not_fit_an_audit_are_refused(changes: dict[str, object], message: str) -> None:
    config = Config.parse(
        {
            "scorer": {"use": "open_clip:aviary"},
            "stage": [{"judge": "hf_chat:aviary"}],
            "labels": ["finch", "owl"],
            "audit": {"share": 0.1},
        }
    )
    assert config.build().stages[0].audit == AuditConfig(share=0.1).sampling
    with pytest.raises(ConfigError, match=message):
        config.altered(changes).build()  # type: ignore[arg-type]

"""Runs with a certificate."""

import json
import multiprocessing
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import markupsafe
import pyarrow.parquet
import pytest
from PIL import Image
from pydantic import JsonValue
from pydantic_core import to_json
from scipy.stats import binomtest

from benchmarks.kills import predictions as without_usage
from cascadevlm import Cascade, Stage, load_prompt
from cascadevlm.base import loop
from cascadevlm.base.errors import ConfigError, DataError, PermanentError, RunError
from cascadevlm.base.images import pixel_digest
from cascadevlm.base.labels import Label, LabelSet
from cascadevlm.base.types import Candidate, Prediction, Question
from cascadevlm.cascade.candidates import TopK
from cascadevlm.config.agreement import AgreementConfig, require_certifiable
from cascadevlm.config.config import Config
from cascadevlm.decision.judge_model import JudgeModel
from cascadevlm.evaluation.report import read_bulk_run, render_bulk
from cascadevlm.judges.base import Quote
from cascadevlm.judges.budget import Ledger
from cascadevlm.judges.cache import MemoryStore
from cascadevlm.runs import bulk
from cascadevlm.runs.certificate import Facts, Missing
from cascadevlm.runs.certified import questions_left
from cascadevlm.runs.estimate_agreement import estimate_agreement
from cascadevlm.runs.inputs import Inputs, Named
from cascadevlm.runs.lines import Line, with_checksum
from cascadevlm.runs.run_folder import RunFolder
from cascadevlm.runs.tally import Tally
from cascadevlm.runs.verify import verify
from cascadevlm.testing import FakeJudge, FakeScorer, noise
from tests.calibrations import some_calibration

LABELS = ["finch", "owl", "wren", "stork"]
AGREEMENT = AgreementConfig(agree=0.9)


class Pictures:
    """This number of pictures, which all differ. Those with a number in ``broken`` cannot be read."""

    def __init__(self, count: int, broken: tuple[int, ...] = ()) -> None:
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Named]:
        for number in range(self.count):
            yield f"image {number}", b"no image" if number in self.broken else noise(number, (8, 8))


def plausible(question: Question) -> str:
    """An answer that is the scorer's best label as often as the scorer says."""
    draw = int(question.image_digest[:8], 16) / 16**8
    return "ANSWER: A" if draw < question.candidates[0].probability else "ANSWER: B"


def cascade(judge: FakeJudge, *, offer_none: bool = False, widen: int = 0, **options: object) -> Cascade:
    candidates = TopK(k=2) if widen else TopK(k=10)
    stage = Stage(judge=judge, prompt=load_prompt("select"), offer_none=offer_none, widen=widen, candidates=candidates)
    return Cascade(FakeScorer(), [stage], labels=LABELS, batch_size=8, **options)  # type: ignore[arg-type]


def run(
    folder: Path,
    judge: FakeJudge | None = None,
    *,
    images: Pictures | None = None,
    agreement: AgreementConfig = AGREEMENT,
    stopping: Callable[[], bool] = lambda: False,
    retry_failed: bool = False,
    **options: object,
) -> Tally:
    return bulk.run(
        cascade(judge or FakeJudge(reply=plausible), **options),  # type: ignore[arg-type]
        images or Pictures(300),
        folder,
        config={"agreement": agreement.model_dump()},
        promised=agreement,
        stopping=stopping,
        retry_failed=retry_failed,
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    """The predictions without usage, because an answer from the store has no cost."""
    return [dict(line) for line in without_usage(folder)]


def facts(folder: Path) -> Facts:
    found = Facts.model_validate(json.loads((folder / "summary.json").read_text())["certificate"])
    assert found.kept > found.allowed
    return found


def answers_of(folder: Path) -> dict[str, str | None]:
    """What the judge would say about each image that could be read, by the name of the image."""
    images = dict(Pictures(300))
    judge, prompt = FakeJudge(reply=plausible), load_prompt("select")
    labels = {name: Label(name=name) for name in LABELS}
    found = {}
    for line in lines(folder):
        shown = tuple(
            Candidate(label=labels[each["label"]], probability=each["probability"], rank=each["rank"])
            for each in line["candidates"]
        )
        image = images[line["path"]]
        assert isinstance(image, Image.Image)
        found[line["path"]] = loop.run(judge.judge(Question(image=image, candidates=shown, prompt=prompt))).label
    return found


def test_a_certificate_holds_and_no_question_is_asked_twice(tmp_path: Path) -> None:
    judge, images = FakeJudge(reply=plausible), Pictures(300, broken=(3, 77))
    tally = run(tmp_path, judge, images=images)
    found = facts(tmp_path)
    assert tally.certificate == found
    assert (found.images, found.allowed, tally.images, tally.counts["unreadable"]) == (298, 29, 300, 2)
    assert found.questions == len(judge.questions) == len({each.image_digest for each in judge.questions})
    assert found.sentence.startswith(f"The judge was asked about {found.questions} of 298 images. With 95 % confidence")
    assert verify(tmp_path) == []
    assert [line["path"] for line in lines(tmp_path)] == [name for name, _ in images]
    again = FakeJudge(reply=plausible)
    assert run(tmp_path, again, images=images) == tally
    assert not again.questions


def test_labels_are_the_judges_or_the_taught_ones(tmp_path: Path) -> None:
    run(tmp_path)
    truths, disagreeing = answers_of(tmp_path), 0
    for line in lines(tmp_path):
        standing = line["certificate"]
        if standing["phase"] == "kept":
            assert (line["label"], line["decided_by"], line["verdict"]) == (standing["label"], "scorer", None)
            disagreeing += line["label"] != truths[line["path"]]
        else:
            assert (line["label"], line["decided_by"]) == (truths[line["path"]], "judge")
    assert 0 < disagreeing <= facts(tmp_path).allowed


def test_the_promise_is_kept_over_many_runs() -> None:
    broken, seeds = 0, 8
    for seed in range(seeds):
        with TemporaryDirectory() as folder:
            run(Path(folder), images=Pictures(100), agreement=AgreementConfig(agree=0.8, confidence=0.7, seed=seed))
            truths = answers_of(Path(folder))
            disagreeing = sum(line["label"] != truths[line["path"]] for line in lines(Path(folder)))
            broken += disagreeing > 20
    assert binomtest(broken, seeds, 0.3, alternative="greater").pvalue > 0.01


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    judges = [FakeJudge(reply=plausible) for _ in range(5)]
    for judge, batches in zip(judges, (10, 28, 5, 9, 1000), strict=True):
        stop = iter([*repeat(False, batches), *repeat(True, 1000)]) if batches < 1000 else repeat(False)
        tally = run(tmp_path / "parts", judge, stopping=stop.__next__)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert tally.certificate == facts(tmp_path / "whole")
    assert [bool(judge.questions) for judge in judges] == [False, False, True, True, True]
    asked = [question.image_digest for judge in judges for question in judge.questions]
    assert len(asked) == len(set(asked)) == facts(tmp_path / "whole").questions


KILLS = (("scored", 100), ("asked", 20), ("asked", 100), ("asked", 50), ("asked", 27), ("written", 200), ("none", 0))
"""Before the first question, in the teaching, in its later steps, in the test, after the test, while predictions are written."""


def run_until_killed(folder: Path, where: str, count: int) -> None:
    """Append the digest of each question to a file. Kill this process before it scores, asks or writes image number ``count``."""
    seen = dict.fromkeys(("scored", "asked", "written"), 0)

    def note(what: str) -> None:
        seen[what] += 1
        if (what, seen[what]) == (where, count):
            os.kill(os.getpid(), signal.SIGKILL)

    def reply(question: Question) -> str:
        with (folder / "log").open("a") as log:
            log.write(question.image_digest + "\n")
        note("asked")
        return plausible(question)

    class Judge(FakeJudge):
        concurrency = 1

    logits, counted = FakeScorer._logits, RunFolder._count

    def scoring(scorer: FakeScorer, image: Image.Image, labels: LabelSet) -> Sequence[float]:
        note("scored")
        return logits(scorer, image, labels)

    def writing(opened: RunFolder, path: str, own_id: JsonValue, prediction: Prediction | Line) -> None:
        note("written")
        counted(opened, path, own_id, prediction)

    with patch.object(FakeScorer, "_logits", scoring), patch.object(RunFolder, "_count", writing):
        run(folder / "run", Judge(reply=reply))


def test_a_run_that_is_killed_in_any_phase_goes_on(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.runs.test_certified"])
    for where, count in KILLS:
        process = processes.Process(target=run_until_killed, args=(tmp_path, where, count))
        process.start()
        process.join()
        assert process.exitcode == (0 if where == "none" else -signal.SIGKILL)
    run(tmp_path / "whole")
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert facts(tmp_path / "run") == facts(tmp_path / "whole")
    assert verify(tmp_path / "run") == []
    asked = Counter((tmp_path / "log").read_text().split())
    under_way = sum(where == "asked" for where, _ in KILLS)
    assert len(asked) == facts(tmp_path / "whole").questions
    assert asked.total() == len(asked) + under_way


@pytest.mark.parametrize(("name", "content"), [("summary.json", b""), ("predictions.parquet", b"PAR1")])
def test_a_damaged_result_is_written_again(tmp_path: Path, name: str, content: bytes) -> None:
    run(tmp_path)
    before = facts(tmp_path)
    (tmp_path / name).write_bytes(content)
    judge = FakeJudge(reply=plausible)
    run(tmp_path, judge)
    assert judge.questions == []
    assert (facts(tmp_path), verify(tmp_path)) == (before, [])
    assert pyarrow.parquet.read_table(tmp_path / "predictions.parquet").num_rows == 300


class PaidJudge(FakeJudge):
    """Costs a cent."""

    def __init__(self) -> None:
        super().__init__(reply=plausible, dollars=0.01)

    def quote(self, question: Question) -> Quote:
        return Quote(worst_case=10_000_000)


@pytest.mark.parametrize("dollars", [0.0, 1.2, 1.95])
def test_a_budget_that_ends_leaves_no_certificate_until_it_is_raised(tmp_path: Path, dollars: float) -> None:
    run(tmp_path / "whole")
    questions = facts(tmp_path / "whole").questions
    assert questions > 195
    poor, rich = PaidJudge(), PaidJudge()
    tally = run(tmp_path / "run", poor, ledger=Ledger(dollars))
    missing = tally.certificate
    assert isinstance(missing, Missing)
    assert missing.questions is not None
    assert missing.asked == len(poor.questions) == round(100 * dollars) == tally.counts["answered"]
    assert tally.counts["skipped"] == 300 - missing.asked
    assert abs(missing.asked + missing.questions - questions) < 100
    assert missing.dollars == (pytest.approx(0.01 * missing.questions) if missing.asked else None)
    assert Missing.model_validate(json.loads((tmp_path / "run" / "summary.json").read_text())["certificate"]) == missing
    with pytest.raises(DataError, match="no certificate"):
        verify(tmp_path / "run")
    assert run(tmp_path / "run", PaidJudge(), ledger=Ledger(dollars)) == tally
    run(tmp_path / "run", rich, ledger=Ledger(None))
    assert len(poor.questions) + len(rich.questions) == questions
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert verify(tmp_path / "run") == []


def test_failed_questions_count_as_disagreement_and_can_be_retried(tmp_path: Path) -> None:
    def failing(question: Question) -> str | Exception:
        return PermanentError("No answer.") if int(question.image_digest[-1], 16) < 2 else plausible(question)

    tally = run(tmp_path, FakeJudge(reply=failing))
    found = facts(tmp_path)
    assert found.unanswered == tally.counts["failed"] > 10
    assert f"It gave no label to {found.unanswered} of them" in found.sentence
    assert verify(tmp_path) == []
    failed = [line for line in lines(tmp_path) if line["verdict"] and line["verdict"]["outcome"] == "failed"]
    assert all(line["decided_by"] == "scorer" for line in failed)
    assert questions_left(tmp_path, 300, retry_failed=False) == 300 - found.questions
    assert questions_left(tmp_path, 300, retry_failed=True) == 300 - found.questions + len(failed)
    judge = FakeJudge(reply=plausible)
    assert run(tmp_path, judge, retry_failed=True).counts["failed"] == 0
    assert verify(tmp_path) == []
    run(tmp_path / "whole")
    assert lines(tmp_path) == lines(tmp_path / "whole")


def test_a_stopped_retry_has_no_certificate(tmp_path: Path) -> None:
    run(tmp_path, FakeJudge(reply=sometimes(PermanentError("No answer."))))
    assert run(tmp_path, retry_failed=True, stopping=lambda: True).certificate is None


def sometimes(reply: str | Exception) -> Callable[[Question], str | Exception]:
    """This answer for an eighth of the images."""
    return lambda question: reply if int(question.image_digest[-1], 16) < 2 else plausible(question)


def test_images_that_show_none_of_the_candidates_have_no_label_by_the_judge(tmp_path: Path) -> None:
    tally = run(tmp_path, FakeJudge(reply=sometimes("ANSWER: none")), offer_none=True)
    found, read = facts(tmp_path), lines(tmp_path)
    assert (
        found.unanswered
        == tally.counts["none"]
        == sum(bool(line["verdict"]) and line["decided_by"] != "judge" for line in read)
        > 10
    )
    others = 300 - found.unanswered
    assert f"at least {others - found.allowed} of these {others} labels are the judge's" in found.sentence
    assert "all labels" not in found.sentence
    assert verify(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"kept": 0, "questions": 298},
            "The judge was asked about 298 of 298 images. At least 99.995 % of all labels are the judge's.",
        ),
        (
            {"kept": 20, "questions": 278, "unanswered": 3},
            "The judge was asked about 278 of 298 images. It gave no label to 3 of them; only the labels of the other 295 images "
            "count here. No label of the 20 images without a question needed a test: at least 275 of these 295 labels are the "
            "judge's. This is less than 99.995 %, because the images without a label from the judge count too.",
        ),
    ],
)
def test_a_certificate_says_what_is_true(certified: Path, changes: dict[str, int], sentence: str) -> None:
    plain = {"images": 298, "allowed": 29, "agree": 0.99995, "unanswered": 0}
    assert facts(certified).model_copy(update=plain | changes).in_words() == sentence


def test_a_wider_question_without_money_is_asked_in_a_later_session(tmp_path: Path) -> None:
    class Wide(PaidJudge):
        def _next(self, question: Question) -> str:
            return "ANSWER: none" if question.candidates[0].rank == 1 else "ANSWER: A"

    poor, rich = Wide(), Wide()
    asked: dict[str, Any] = {"offer_none": True, "widen": 1, "images": Pictures(12), "agreement": AgreementConfig(agree=0.99)}
    assert isinstance(run(tmp_path, poor, ledger=Ledger(0.15), **asked).certificate, Missing)
    tally = run(tmp_path, rich, ledger=Ledger(None), **asked)
    assert tally.counts == {"answered": 12}
    assert len(poor.questions) + len(rich.questions) == 24
    assert verify(tmp_path) == []


def test_an_image_that_can_be_read_later_changes_few_questions(tmp_path: Path) -> None:
    run(tmp_path, images=Pictures(300, broken=(3,)))
    judge = FakeJudge(reply=plausible)
    run(tmp_path, judge, retry_failed=True)
    assert len(judge.questions) < 40
    assert verify(tmp_path) == []
    run(tmp_path / "whole")
    assert lines(tmp_path) == lines(tmp_path / "whole")


@pytest.mark.parametrize("count", [1, 2, 3, 5, 12])
def test_few_images_are_all_asked_about_if_no_test_can_pass(tmp_path: Path, count: int) -> None:
    judge = FakeJudge(reply=plausible)
    run(tmp_path, judge, images=Pictures(count), agreement=AgreementConfig(agree=0.99))
    assert len(judge.questions) == count
    assert verify(tmp_path) == []


def test_a_changed_image_is_asked_about_again(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(60):
        noise(number, (8, 8)).save(tmp_path / "images" / f"{number:02}.png")
    arguments = {"config": {"agreement": AGREEMENT.model_dump()}, "promised": AGREEMENT}
    bulk.run(cascade(FakeJudge(reply=plausible)), Inputs(tmp_path / "images"), tmp_path / "run", **arguments)  # type: ignore[arg-type]
    changed = next(line["path"] for line in lines(tmp_path / "run") if line["certificate"]["phase"] == "taught")
    noise(1000, (8, 8)).save(changed)
    judge = FakeJudge(reply=plausible)
    with pytest.warns(RuntimeWarning, match="was changed"):
        bulk.run(cascade(judge), Inputs(tmp_path / "images"), tmp_path / "run", **arguments)  # type: ignore[arg-type]
    assert pixel_digest(noise(1000, (8, 8))) in {question.image_digest for question in judge.questions}
    assert verify(tmp_path / "run") == []


def test_images_cannot_be_added(tmp_path: Path) -> None:
    run(tmp_path, images=Pictures(40))
    with pytest.raises(DataError, match="was started with 40 images; there are now 41"):
        run(tmp_path, images=Pictures(41))


def test_a_stream_without_a_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs all images of a run before the first question"):
        run(tmp_path, images=iter(Pictures(40)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"agreement.agree": 1.0}, "agreement.agree: Input should be less than 1"),
        ({"agreement.confidence": 0.0}, "agreement.confidence: Input should be greater than 0"),
        ({"stage.0.policy": "entropy > 0.3"}, "selects the images to escalate, but the policy is 'entropy > 0.3'"),
        ({"accept": 0.5}, "every image has a label, but accept = 0.5 removes labels"),
        ({"stage.1.judge": "hf_chat:aviary"}, "one judge, but the configuration has 2 stages"),
        ({"stage": []}, "one judge, but the configuration has 0 stages"),
    ],
)
def test_settings_that_break_a_certificate_are_refused(changes: dict[str, JsonValue], message: str) -> None:
    plain = {"scorer": {"use": "open_clip:aviary"}, "stage": [{"judge": "hf_chat:aviary"}], "labels": LABELS}
    config = Config.parse({**plain, "agreement": {"agree": 0.9}})
    assert str(config.build().stages[0].policy) == "always"
    with pytest.raises(ConfigError, match=re.escape(message)):
        config.altered(changes).build()


def test_a_fusion_or_shares_that_overrule_the_judge_are_refused() -> None:
    stage = Stage(judge=FakeJudge(), prompt=load_prompt("select"), fusion="bayes", model=JudgeModel.prior(4))
    fused = Cascade(FakeScorer(), [stage], labels=LABELS)
    with pytest.raises(ConfigError, match="fusion = 'bayes' can overrule the judge"):
        require_certifiable(fused)
    following = Cascade(
        FakeScorer(),
        [replace(stage, fusion="judge")],
        labels=LABELS,
        calibration=some_calibration(LABELS, JudgeModel.prior(4)),
        follow_shares=True,
    )
    with pytest.raises(ConfigError, match="follow_shares = true changes the candidates"):
        require_certifiable(following)


def altered(folder: Path, change: Callable[[list[dict[str, Any]]], None], *, signed: bool = True) -> None:
    """Change the lines of the predictions. With ``signed``, their checksums are made again."""
    path = folder / "predictions.jsonl"
    read = [json.loads(line) for line in path.read_text().splitlines()]
    crcs = [line.pop("crc32") for line in read]
    change(read)
    bodies = [to_json(line) for line in read]
    path.write_bytes(
        b"".join(
            with_checksum(body) if signed else body[:-1] + b',"crc32":%d}\n' % crc
            for body, crc in zip(bodies, crcs, strict=False)
        )
    )


def of_phase(read: list[dict[str, Any]], phase: str) -> list[dict[str, Any]]:
    return [line for line in read if line["certificate"]["phase"] == phase]


def another_label(read: list[dict[str, Any]], phase: str) -> None:
    line = of_phase(read, phase)[0]
    line["label"] = next(name for name in LABELS if name != line["label"])


def a_wrong_order(read: list[dict[str, Any]]) -> None:
    first, second = of_phase(read, "kept")[0]["certificate"], of_phase(read, "asked")[0]["certificate"]
    first["log_odds"], second["log_odds"] = second["log_odds"], first["log_odds"]


def another_draw(read: list[dict[str, Any]]) -> None:
    of_phase(read, "tested")[0]["certificate"]["phase"] = "asked"


def a_hidden_disagreement(read: list[dict[str, Any]]) -> None:
    for line in of_phase(read, "tested"):
        if line["verdict"]["label"] != line["certificate"]["label"]:
            line["certificate"]["label"] = line["verdict"]["label"]


def another_teaching(read: list[dict[str, Any]]) -> None:
    of_phase(read, "taught")[0]["certificate"]["phase"] = "asked"


def no_answer(read: list[dict[str, Any]]) -> None:
    of_phase(read, "asked")[0]["verdict"] = None


def another_decider(read: list[dict[str, Any]], phase: str) -> None:
    of_phase(read, phase)[0]["decided_by"] = "judge" if phase == "kept" else "scorer"


def a_lost_line(read: list[dict[str, Any]]) -> None:
    read.remove(of_phase(read, "kept")[0])


def an_uncertified_line(read: list[dict[str, Any]]) -> None:
    del of_phase(read, "kept")[0]["certificate"]


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certified") / "run"
    run(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (partial(another_label, phase="kept"), "was kept"),
        (partial(another_label, phase="tested"), "but the judge's is"),
        (a_wrong_order, "prefix"),
        (another_draw, "are not the"),
        (a_hidden_disagreement, "found is"),
        (another_teaching, "taught is"),
        (partial(another_decider, phase="kept"), "not decided by the scorer"),
        (partial(another_decider, phase="asked"), "it is decided by 'scorer'"),
        (no_answer, "the judge was not asked about it"),
        (a_lost_line, "images is 300"),
        (an_uncertified_line, "the certificate does not mention it"),
    ],
)
def test_every_edit_of_a_line_is_found(
    certified: Path, tmp_path: Path, change: Callable[[list[dict[str, Any]]], None], message: str
) -> None:
    shutil.copytree(certified, tmp_path / "run")
    altered(tmp_path / "run", lambda read: None)
    assert verify(tmp_path / "run") == []
    altered(tmp_path / "run", change)
    assert message in " ".join(verify(tmp_path / "run"))


def test_an_estimate_without_any_answer_is_refused(tmp_path: Path) -> None:
    for number in range(30):
        noise(number, (8, 8)).save(tmp_path / f"{number}.png")
    failing = cascade(FakeJudge(reply=lambda _: PermanentError("No answer.")), store=MemoryStore())
    with pytest.raises(RunError, match=r"None of the first \d+ questions got a label"):
        estimate_agreement(failing, Inputs(tmp_path), [AGREEMENT])


def test_the_report_page_shows_the_certificate(certified: Path) -> None:
    page = render_bulk({"birds": read_bulk_run(certified)})
    assert f"<p>{markupsafe.escape(facts(certified).sentence)} Agreement with the judge is not accuracy.</p>" in page


def test_an_edit_without_a_checksum_is_found(certified: Path, tmp_path: Path) -> None:
    shutil.copytree(certified, tmp_path / "run")
    altered(tmp_path / "run", partial(another_label, phase="kept"), signed=False)
    assert "its checksum is wrong" in verify(tmp_path / "run")[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("agree", 0.8),
        ("confidence", 0.99),
        ("seed", 5),
        ("kept", 250),
        ("questions", 3),
        ("tested", 299),
        ("most", 40),
        ("prefix", 200),
        ("found", 0),
        ("allowed", 100),
        ("images", 400),
        ("unanswered", 4),
        ("scorer", "another"),
        ("judge", "openai:gpt-5"),
        ("prompt", ""),
        ("labels", ""),
        ("sentence", "All labels are right."),
    ],
)
def test_every_edit_of_the_certificate_is_found(certified: Path, tmp_path: Path, name: str, value: JsonValue) -> None:
    shutil.copytree(certified, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["certificate"][name] != value
    summary["certificate"][name] = value
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    assert any(f"{name} is" in fault for fault in verify(tmp_path / "run"))


def test_fewer_first_images_are_found(certified: Path, tmp_path: Path) -> None:
    shutil.copytree(certified, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    summary["certificate"]["first"] = 0
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    assert verify(tmp_path / "run") == ["In the certificate, first is 0; by the predictions, it is 75."]


@pytest.mark.parametrize("changes", [{"config": {}}, {"stages": []}, {"judges": {}}, {"config": {"agreement": {"agree": 2}}}])
def test_a_manifest_that_does_not_fit_is_a_fault(certified: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    shutil.copytree(certified, tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest | changes))
    assert verify(tmp_path / "run") == ["The manifest is not that of a complete run with a certificate."]


@pytest.mark.parametrize("changes", [{"agree": 2}, {"confidence": 0}, {"seed": -1}, {"first": -1}])
def test_a_certificate_with_impossible_numbers_is_none(certified: Path, tmp_path: Path, changes: dict[str, float]) -> None:
    shutil.copytree(certified, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    summary["certificate"] |= changes
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(DataError, match="contains no certificate"):
        verify(tmp_path / "run")


@pytest.mark.parametrize(("ability", "said"), [(0.2, True), (9.0, False)])
def test_a_run_says_where_its_certificate_is_of_little_use(tmp_path: Path, ability: float, said: bool) -> None:
    model = replace(JudgeModel.prior(4), ability=ability)
    stage = Stage(judge=FakeJudge(reply=plausible), prompt=load_prompt("select"), model=model)
    sentences: list[str] = []
    bulk.run(
        Cascade(FakeScorer(), [stage], labels=LABELS),
        Pictures(40),
        tmp_path,
        config={"agreement": AGREEMENT.model_dump()},
        promised=AGREEMENT,
        outlook=sentences.append,
    )
    assert any("of little use here" in sentence for sentence in sentences) == said

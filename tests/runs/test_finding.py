"""Runs that find nearly all images of one class."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import JsonValue
from scipy.stats import binomtest

from cascadevlm.base.errors import ConfigError, PermanentError
from cascadevlm.base.labels import LabelSet
from cascadevlm.config.config import Config
from cascadevlm.config.finding import FindConfig
from cascadevlm.judges.budget import Ledger
from cascadevlm.runs import bulk
from cascadevlm.runs.certificate import Finding, Missing
from cascadevlm.runs.tally import Tally
from cascadevlm.runs.verify import verify
from cascadevlm.testing import FakeJudge
from tests.runs.test_certified import (
    LABELS,
    PaidJudge,
    Pictures,
    altered,
    answers_of,
    cascade,
    lines,
    of_phase,
    plausible,
    sometimes,
)

FIND = FindConfig(label="owl", recall=0.8)


def run(folder: Path, judge: FakeJudge, find: FindConfig = FIND, *, count: int = 300, **options: object) -> Tally:
    asking = cascade(judge, **options)  # type: ignore[arg-type]
    return bulk.run(asking, Pictures(count), folder, config={"find": find.model_dump()}, promised=find)


@pytest.mark.parametrize("precision", [None, 0.5])
def test_most_images_of_the_class_are_found(tmp_path: Path, precision: float | None) -> None:
    judge, find = FakeJudge(reply=plausible), FIND.model_copy(update={"precision": precision})
    tally = run(tmp_path, judge, find)
    found = tally.certificate
    assert isinstance(found, Finding)
    assert Finding.model_validate(json.loads((tmp_path / "summary.json").read_text())["certificate"]) == found
    assert found.questions == len(judge.questions) < 300
    owls = [line for line in lines(tmp_path) if line["label"] == "owl"]
    assert len(owls) == found.named + found.accepted
    assert sum(line["verdict"] is not None for line in owls) == found.named
    assert (found.accepted > 0) == (precision is not None)
    truths = answers_of(tmp_path)
    right = sum(truths[line["path"]] == "owl" for line in owls)
    assert right >= 0.8 * sum(label == "owl" for label in truths.values())
    assert right >= (precision or 1) * len(owls)
    assert verify(tmp_path) == []
    assert run(tmp_path, FakeJudge(reply=plausible), find) == tally


@pytest.mark.parametrize("reply", ["ANSWER: none", PermanentError("No answer.")])
def test_images_without_an_answer_do_not_have_the_label(tmp_path: Path, reply: str | Exception) -> None:
    tally = run(tmp_path, FakeJudge(reply=sometimes(reply)), offer_none=True)
    found, owls = tally.certificate, [line for line in lines(tmp_path) if line["label"] == "owl"]
    assert isinstance(found, Finding)
    assert len(owls) == found.named
    assert all(line["decided_by"] == "judge" for line in owls)
    rejected = [line for line in lines(tmp_path) if line["verdict"] and line["decided_by"] == "scorer"]
    best = [min(line["candidates"], key=lambda each: each["rank"])["label"] for line in rejected]
    assert "owl" in best
    failed = isinstance(reply, Exception)
    assert found.unanswered == (len(rejected) if failed else 0)
    assert verify(tmp_path) == []
    assert ("which do not count here" in found.sentence) == failed


def test_the_recall_is_kept_over_many_runs(tmp_path: Path) -> None:
    broken = 0
    for seed in range(8):
        find = FIND.model_copy(update={"seed": seed, "confidence": 0.7})
        run(tmp_path / str(seed), FakeJudge(reply=plausible), find, count=120)
        truths = answers_of(tmp_path / str(seed))
        owls = {line["path"] for line in lines(tmp_path / str(seed)) if line["label"] == "owl"}
        every = {path for path, label in truths.items() if label == "owl"}
        broken += len(owls & every) < 0.8 * len(every)
    assert binomtest(broken, 8, 0.3, alternative="greater").pvalue > 0.01


def test_a_budget_that_ends_leaves_no_promise_until_it_is_raised(tmp_path: Path) -> None:
    tally = run(tmp_path / "run", PaidJudge(), ledger=Ledger(0.9))
    assert tally.certificate == Missing(asked=90, questions=None, dollars=None)
    judge = PaidJudge()
    tally = run(tmp_path / "run", judge, ledger=Ledger(None))
    assert isinstance(tally.certificate, Finding)
    assert len(judge.questions) == tally.certificate.questions - 90


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("searched") / "run"
    run(folder, FakeJudge(reply=plausible), FIND.model_copy(update={"recall": 0.85, "precision": 0.5}))
    assert {line["certificate"]["phase"] for line in lines(folder)} == {"taught", "tested", "asked", "kept", "accepted"}
    return folder


def an_accepted_image(read: list[dict[str, Any]]) -> None:
    line = of_phase(read, "kept")[0]
    line["certificate"] |= {"phase": "accepted", "label": "owl"}
    line["label"] = "owl"


def an_image_that_was_not_accepted(read: list[dict[str, Any]]) -> None:
    line = of_phase(read, "accepted")[0]
    line["certificate"] |= {"phase": "kept", "label": "wren"}
    line["label"] = "wren"


def another_label_of_a_kept_image(read: list[dict[str, Any]]) -> None:
    line = of_phase(read, "kept")[0]
    line["label"] = line["certificate"]["label"] = "owl"


def another_answer_in_the_test(read: list[dict[str, Any]]) -> None:
    for line in of_phase(read, "tested"):
        line["label"] = line["verdict"]["label"] = "wren"


def an_answer_less(read: list[dict[str, Any]]) -> None:
    line = of_phase(read, "asked")[0]
    line["verdict"] |= {"outcome": "failed", "label": None}
    line["decided_by"], line["label"] = "scorer", "wren"


def fewer_questions(read: list[dict[str, Any]]) -> None:
    line = of_phase(read, "asked")[0]
    line["verdict"], line["decided_by"], line["label"] = None, "scorer", "wren"
    line["certificate"] |= {"phase": "kept", "label": "wren"}


def another_order(read: list[dict[str, Any]]) -> None:
    first, second = of_phase(read, "kept")[0]["certificate"], of_phase(read, "asked")[0]["certificate"]
    first["log_odds"], second["log_odds"] = second["log_odds"], first["log_odds"]


def another_draw(read: list[dict[str, Any]]) -> None:
    of_phase(read, "tested")[0]["certificate"]["phase"] = "asked"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (an_accepted_image, "are not treated so"),
        (an_image_that_was_not_accepted, "are not treated so"),
        (another_label_of_a_kept_image, "but it was not found to be 'owl'"),
        (another_answer_in_the_test, "are not treated so"),
        (an_answer_less, "unanswered is 0"),
        (fewer_questions, "are not treated so"),
        (another_order, "are not treated so"),
        (another_draw, "that the seed 0 draws"),
        (lambda read: read.pop(), "images is 300"),
    ],
)
def test_every_edit_of_a_search_is_found(
    searched: Path, tmp_path: Path, change: Callable[[list[dict[str, Any]]], None], message: str
) -> None:
    shutil.copytree(searched, tmp_path / "run")
    altered(tmp_path / "run", change)
    assert message in " ".join(verify(tmp_path / "run"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("label", "wren"), ("recall", 0.9), ("precision", None), ("confidence", 0.5), ("seed", 7), ("named", 1), ("accepted", 0)]
    + [("questions", 1), ("taught", 1), ("tested", 1), ("images", 1), ("unanswered", 9), ("scorer", ""), ("identity", "")],
)
def test_every_edit_of_the_promise_is_found(searched: Path, tmp_path: Path, name: str, value: JsonValue) -> None:
    shutil.copytree(searched, tmp_path / "run")
    summary = json.loads((searched / "summary.json").read_text())
    assert summary["certificate"][name] != value
    summary["certificate"][name] = value
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    assert any(f"{name} is" in fault for fault in verify(tmp_path / "run"))


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="'finch' is the only label"):
        FindConfig(label="finch", recall=0.9).column(LabelSet.of(["finch"]))
    with pytest.raises(ConfigError, match="'lark' is not a label"):
        FindConfig(label="lark", recall=0.9).column(LabelSet.of(LABELS))
    plain = {"scorer": {"use": "open_clip:aviary"}, "stage": [{"judge": "hf_chat:aviary"}], "labels": LABELS}
    both = Config.parse({**plain, "find": {"label": "owl", "recall": 0.9}, "agreement": {"agree": 0.9}})
    with pytest.raises(ConfigError, match=r"both \[agreement\] and \[find\]"):
        both.build()

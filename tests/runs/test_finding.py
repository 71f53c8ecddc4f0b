"""Runs that find nearly all images of one class."""

import json
from pathlib import Path

import pytest
from scipy.stats import binomtest

from cascadevlm.base.errors import ConfigError, PermanentError
from cascadevlm.base.labels import LabelSet
from cascadevlm.config.config import Config
from cascadevlm.config.finding import FindConfig
from cascadevlm.judges.budget import Ledger
from cascadevlm.runs import bulk
from cascadevlm.runs.certificate import Finding, Missing
from cascadevlm.runs.tally import Tally
from cascadevlm.testing import FakeJudge
from tests.runs.test_certified import LABELS, PaidJudge, Pictures, answers_of, cascade, lines, plausible, sometimes

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
    assert ("which do not count here" in found.sentence) == failed


def test_the_recall_is_kept_over_many_runs(tmp_path: Path) -> None:
    broken = 0
    for seed in range(12):
        find = FIND.model_copy(update={"seed": seed, "confidence": 0.7})
        run(tmp_path / str(seed), FakeJudge(reply=plausible), find, count=120)
        truths = answers_of(tmp_path / str(seed))
        owls = {line["path"] for line in lines(tmp_path / str(seed)) if line["label"] == "owl"}
        every = {path for path, label in truths.items() if label == "owl"}
        broken += len(owls & every) < 0.8 * len(every)
    assert binomtest(broken, 12, 0.3, alternative="greater").pvalue > 0.01


def test_a_budget_that_ends_leaves_no_promise_until_it_is_raised(tmp_path: Path) -> None:
    tally = run(tmp_path / "run", PaidJudge(), ledger=Ledger(0.9))
    assert tally.certificate == Missing(asked=90, questions=None, dollars=None)
    judge = PaidJudge()
    tally = run(tmp_path / "run", judge, ledger=Ledger(None))
    assert isinstance(tally.certificate, Finding)
    assert len(judge.questions) == tally.certificate.questions - 90


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="'lark' is not a label"):
        FindConfig(label="lark", recall=0.9).column(LabelSet.of(LABELS))
    plain = {"scorer": {"use": "open_clip:aviary"}, "stage": [{"judge": "hf_chat:aviary"}], "labels": LABELS}
    both = Config.parse({**plain, "find": {"label": "owl", "recall": 0.9}, "agreement": {"agree": 0.9}})
    with pytest.raises(ConfigError, match=r"both \[agreement\] and \[find\]"):
        both.build()

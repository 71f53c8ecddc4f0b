"""Runs with an audit of the images that their policy keeps."""

import json
import re
import warnings
from pathlib import Path

import pytest

from cascadevlm import Cascade, Stage, load_prompt, parse_policy
from cascadevlm.base.errors import ConfigError
from cascadevlm.base.types import AUDITED, Question
from cascadevlm.config.audit import AuditConfig
from cascadevlm.config.config import Config
from cascadevlm.runs import bulk
from cascadevlm.runs.tally import Tally
from cascadevlm.testing import FakeJudge, FakeScorer
from tests.runs.test_certified import LABELS, Pictures, lines

AUDIT = AuditConfig(share=0.1, agree=0.9)


def first(_: Question) -> str:
    return "ANSWER: A"


def second(_: Question) -> str:
    return "ANSWER: B"


def run(folder: Path, judge: FakeJudge, *, count: int = 300, policy: str = "entropy > 0.6", audit: AuditConfig = AUDIT) -> Tally:
    stage = Stage(judge=judge, prompt=load_prompt("select"), policy=parse_policy(policy))
    cascade = audit.added_to(Cascade(FakeScorer(), [stage], labels=LABELS, batch_size=8))
    return bulk.run(cascade, Pictures(count), folder, config={}, audit=audit)


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


def test_a_broken_promise_is_told_once_also_by_a_run_that_goes_on(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="but at least 90 % must be the judge's. Escalate more images") as told:
        tally = run(tmp_path, FakeJudge(reply=second), count=900, policy="never")
    assert len(told) == 1
    assert tally.audit is not None
    assert tally.audit.crossed
    assert tally.audit.disagreements == tally.audit.kept == 90
    assert 0.7 < tally.audit.least < 0.9  # the labels of 90 images are the judge's now
    share = re.search(r"at least ([\d.]+) % of all labels are not", tally.audit.sentence)
    assert share is not None
    assert 0 <= tally.audit.least - float(share[1]) / 100 < 0.001
    with pytest.warns(RuntimeWarning, match="must be the judge's. Escalate"):
        assert run(tmp_path, FakeJudge(reply=second), count=908, policy="never").images == 908


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

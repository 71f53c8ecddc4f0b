"""Comparisons on the command line, with the bundled models and images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cascadevlm.evaluation.record import read_record
from tests.cli.test_cli import run
from tests.cli.test_evaluate import CONFIG
from tests.cli.test_money import PRICE
from tests.server import JudgeServer

GATED = CONFIG.read_text()


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight bundled images, three configurations, and the records of a comparison of two configurations that differ only in
    their policy.
    """
    folder = tmp_path_factory.mktemp("compare")
    for bird in sorted((CONFIG.parent / "images").glob("*.jpg"))[:8]:
        (folder / "data" / bird.stem).mkdir(parents=True)
        shutil.copy(bird, folder / "data" / bird.stem)
    (folder / "gated.toml").write_text(GATED)
    (folder / "always.toml").write_text(GATED.replace("entropy > 0.17", "always"))
    (folder / "direct.toml").write_text(GATED.replace("select_cot", "select"))
    run(*("compare", folder / "gated.toml", folder / "always.toml", "--data", folder / "data", "-o", folder / "runs"))
    return folder


def test_no_judge_is_asked_what_another_run_asked(birds: Path) -> None:
    gated, always = (read_record(birds / "runs" / name).judged for name in ("gated", "always"))
    assert 0 < gated.asked.sum() < 8
    assert always.asked.all()
    assert (gated.seconds[gated.asked] > 0).all()
    known = gated.asked & (gated.answers != -1)  # what is no answer is not kept
    np.testing.assert_array_equal(always.seconds > 0, ~known)
    np.testing.assert_array_equal(always.output_tokens > 0, ~known)
    np.testing.assert_array_equal(always.answers[known], gated.answers[known])


def test_equal_scorers_score_once(birds: Path) -> None:
    gated, always = (read_record(birds / "runs" / name) for name in ("gated", "always"))
    np.testing.assert_array_equal(gated.scores.log_probs, always.scores.log_probs)
    assert gated.scores.fingerprint == always.scores.fingerprint != ""


def test_records_and_configurations_beside_each_other(birds: Path) -> None:
    runs = [birds / "runs" / "gated", birds / "direct.toml", birds / "runs" / "always"]
    found = json.loads(run("compare", *runs, "--data", birds / "data", "--json").stdout)
    assert [*found["runs"]] == ["gated", "direct", "always"]
    assert [(pair["first"], pair["second"]) for pair in found["pairs"]] == [
        ("gated", "direct"),
        ("gated", "always"),
        ("direct", "always"),
    ]
    gated = json.loads(run("evaluate", birds / "data", "--config", birds / "gated.toml", "--json").stdout)
    assert found["runs"]["gated"]["accuracy"] == gated["cascade_accuracy"]
    assert found["runs"]["gated"]["accuracy_interval"] == gated["cascade_accuracy_interval"]
    assert found["runs"]["gated"]["deferral_rate"] == gated["deferral_rate"]
    assert found["images"] == 8


def test_records_alone_ask_nobody(birds: Path) -> None:
    shown = run("compare", birds / "runs" / "gated", birds / "runs" / "always").stdout
    assert "8 images that every run could read (0 more" in shown
    assert "p (Holm)" not in shown
    found = json.loads(run("compare", birds / "runs" / "gated", birds / "runs" / "always", "--json").stdout)
    assert f"{len(found['disagreements'])} images on which the runs disagree" in shown
    (pair,) = found["pairs"]
    assert pair["judges"]["agreement"] == 1
    assert pair["difference"] == found["runs"]["always"]["accuracy"] - found["runs"]["gated"]["accuracy"]


def test_the_first_cache_is_everybodys(birds: Path, tmp_path: Path) -> None:
    cached = GATED.replace("enabled = false", f"folder = {str(tmp_path / 'cache')!r}").replace("entropy > 0.17", "always")
    (tmp_path / "first.toml").write_text(cached)
    for _ in range(2):
        records = tmp_path / "runs"
        run("compare", tmp_path / "first.toml", birds / "always.toml", "--data", birds / "data", "--limit", "3", "-o", records)
        first, second = (read_record(records / name).judged for name in ("first", "always"))
        shutil.rmtree(records)
    answered = first.answers != -1
    assert answered.any()
    assert not first.seconds[answered].any()
    assert not second.seconds[answered].any()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["gated.toml"], "A comparison needs at least two runs"),
        (["gated.toml", "always.toml"], "Add --data"),
        (["runs/gated", "runs/always", "--data", "data"], "These options need a configuration"),
        (["gated.toml", "runs/gated", "--data", "data"], "are both named 'gated'"),
        (["gated.toml", "none.toml", "--data", "data"], "cannot be read"),
        (["runs/gated", "data"], "does not contain a complete record"),
        (["runs/gated", "direct.toml", "--data", "data", "--limit", "3"], "5 of 8 are only in 'gated'"),
        (["gated.toml", "direct.toml", "--data", "data", "--limit", "3", "-o", "runs"], "only be added after the last image"),
    ],
)
def test_wrong_calls_are_one_sentence(birds: Path, arguments: list[str], sentence: str) -> None:
    done = run("compare", *(birds / each if (birds / each).exists() else each for each in arguments), check=False)
    assert done.returncode == 2
    assert sentence in done.stderr


def test_money_is_not_spent_unasked_and_not_twice(birds: Path) -> None:
    runs = [birds / "gated.toml", birds / "hosted.toml", birds / "again.toml"]
    compare: list[str | Path] = ["compare", *runs, "--data", birds / "data", "-o", birds / "paid"]
    with JudgeServer(batch_polls=0) as server:
        options = f'[stage.options]\nbase_url = "{server.openai_url}"\nprice = {PRICE}\n\n[cache]'
        hosted = GATED.replace("hf_chat:aviary", "openai:priced").replace("[cache]", options)
        runs[1].write_text(hosted)
        runs[2].write_text(hosted.replace("entropy > 0.17", "always"))
        done = run(*compare, check=False)
        assert done.returncode == 2
        assert "Add --yes" in done.stderr
        assert not (birds / "paid").exists()
        before = len(server.requests)
        found = json.loads(run(*compare, "--yes", "--json").stdout)
        assert len(server.requests) - before == 8
    hosted_run, again = found["runs"]["hosted"], found["runs"]["again"]
    assert hosted_run["paid_dollars"] > 0
    assert hosted_run["paid_dollars"] + again["paid_dollars"] == pytest.approx(again["dollars_per_thousand"] * 8 / 1000)

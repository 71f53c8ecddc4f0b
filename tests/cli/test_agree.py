"""Certificates for a user: ``run --agree``, ``verify`` and ``estimate --agree``, with the bundled models."""

import json
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from cascadevlm.runs.batches import batch
from tests.cli.test_cli import run
from tests.server import JudgeServer

AVIARY = Path(str(resources.files("cascadevlm_backends") / "aviary"))
LOCAL = ("--scorer", "open_clip:aviary", "--judge", "hf_chat:aviary", "--labels", AVIARY / "labels.txt")


@pytest.fixture
def hosted(tmp_path: Path) -> Iterator[list[str | Path]]:
    """Options of a cascade with a judge that costs money."""
    with JudgeServer() as server:
        yield [
            *("--labels", AVIARY / "labels.txt", "--scorer", "open_clip:aviary", "--judge", "openai:priced"),
            *("--set", "stage.0.options.price={ input = 1, output = 1 }"),
            *("--set", f"stage.0.options.base_url={server.openai_url}", "--set", f"cache.folder={tmp_path / 'cache'}"),
        ]


def test_a_run_prints_its_certificate_and_verify_finds_every_edit(tmp_path: Path) -> None:
    call = ("run", AVIARY / "images", "-o", tmp_path / "run", *LOCAL, "--agree", "0.8", "--confidence", "0.9")
    printed = run(*call).stdout
    certificate = json.loads((tmp_path / "run" / "summary.json").read_text())["certificate"]
    assert certificate["sentence"] in printed
    assert "Agreement with the judge is not accuracy" in printed
    assert (certificate["images"], certificate["agree"], certificate["confidence"]) == (48, 0.8, 0.9)
    assert json.loads(run(*call, "--json").stdout)["certificate"] == certificate
    assert run("verify", tmp_path / "run").stdout == f"The certificate holds. {certificate['sentence']}\n"
    shutil.copytree(tmp_path / "run", tmp_path / "edited")
    lines = (tmp_path / "edited" / "predictions.jsonl").read_text()
    (tmp_path / "edited" / "predictions.jsonl").write_text(lines.replace("taught", "tested", 1))
    done = run("verify", tmp_path / "edited", check=False)
    assert done.returncode == 1
    assert "The certificate does not hold." in done.stdout
    assert "its checksum is wrong" in done.stdout
    assert json.loads(run("verify", tmp_path / "run", "--json").stdout) == {"holds": True, "faults": []}


def test_an_estimate_asks_the_first_questions_and_the_run_does_not_ask_them_again(
    tmp_path: Path, hosted: list[str | Path]
) -> None:
    done = run("estimate", AVIARY / "images", *hosted, "--agree", "0.5,0.8,0.95", "--yes", "--json")
    estimates = json.loads(done.stdout)
    assert [each["agree"] for each in estimates] == [0.5, 0.8, 0.95]
    assert [each["asked"] for each in estimates] == [12] * 3
    assert estimates[0]["questions"] <= estimates[1]["questions"] <= estimates[2]["questions"] <= 48
    for each in estimates:
        low, high = each["questions_range"]
        assert 12 <= low <= each["questions"] <= high <= 48
        assert each["dollars"] > 0
    tally = json.loads(run("run", AVIARY / "images", "-o", tmp_path / "run", *hosted, "--agree", "0.8", "--yes", "--json").stdout)
    assert tally["requests"] == tally["certificate"]["questions"] - 12
    printed = run("estimate", AVIARY / "images", *hosted, "--agree", "0.5,0.8", "--yes").stdout
    assert "48 images. The estimate uses the answers to 12 of them." in printed


def test_a_run_and_its_estimates_go_through_batches_at_half_the_price(
    tmp_path: Path, hosted: list[str | Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "POLL_SECONDS", 0.01)
    half = [*hosted, "--set", "stage.0.options.price={ input = 1, output = 1, batch_discount = 0.5 }"]
    (direct,) = json.loads(run("estimate", AVIARY / "images", *half, "--json").stdout)
    (in_batches,) = json.loads(run("estimate", AVIARY / "images", *half, "--batch", "--json").stdout)
    assert in_batches["dollars"] == pytest.approx(direct["dollars"] / 2)
    assert in_batches["minutes"] == 1440
    both = run("estimate", AVIARY / "images", *half, "--batch", "--agree", "0.8", check=False)
    assert both.stderr == "Error: --agree estimates the prices of direct questions. Leave out --batch.\n"
    call = ("run", AVIARY / "images", *half, "--agree", "0.8", "--batch", "--json")
    asked = run(*call, "-o", tmp_path / "run", "--set", "budget.ask_above_usd=0", check=False)
    assert "asks hosted judges about at most 48 questions" in asked.stderr
    done = run(*call, "-o", tmp_path / "run", "--yes")
    tally = json.loads(done.stdout)
    assert tally["requests"] == tally["certificate"]["questions"]
    assert "questions wait for their batches." in done.stderr
    local = run("run", AVIARY / "images", "-o", tmp_path / "local", *LOCAL, "--batch", check=False)
    assert (local.returncode, local.stderr.count("No judge of this cascade has a batch API.")) == (2, 1)


def test_money_is_confirmed_first(tmp_path: Path, hosted: list[str | Path]) -> None:
    asked = ("--agree", "0.8", "--set", "budget.ask_above_usd=0")
    few = run("run", AVIARY / "images", "-o", tmp_path / "run", *hosted, *asked[2:], "--agree", "0.97", check=False)
    assert "48 images are too few for the test of a certificate. The judge is asked about all images except 1." in few.stderr
    assert "asks hosted judges about at most 48 questions" in few.stderr
    done = run("run", AVIARY / "images", "-o", tmp_path / "run", *hosted, *asked, check=False)
    assert done.returncode == 2
    assert "too few" not in done.stderr
    assert "asks hosted judges about at most 48 questions" in done.stderr
    done = run("estimate", AVIARY / "images", *hosted, *asked, check=False)
    assert "asks hosted judges about at most 12 questions" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--agree", "1.5"), "agreement.agree: Input should be less than 1"),
        (("--agree", "0.9", "--policy", "entropy > 0.3"), "the policy is 'entropy > 0.3'"),
        (("--agree", "0.9", "--set", "fusion=bayes"), "fusion = 'bayes' needs a calibration"),
        (("--confidence", "0.9"), "--confidence belongs to a promise, but nothing is promised"),
        (("--confidence", "1.5", "--set", "find.label=owl", "--set", "find.recall=0.9"), "find.confidence: Input should be less"),
        (("--confidence", "1.5", "--audit", "0.1"), "audit.confidence: Input should be less"),
        (("--audit", "0.1", "--agree", "0.9"), "A certificate tests its kept labels itself"),
        (("--recall", "owl=0.9"), "'owl' is not a label"),
        (("--recall", "owl"), "--recall 'owl' has no share. For example"),
        (("--precision", "0.9"), "--precision belongs to a promise of recall"),
        (("--recall", "owl=0.9", "--agree", "0.9"), "both [agreement] and [find]"),
    ],
)
def test_wrong_calls_say_so(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    done = run("run", AVIARY / "images", "-o", tmp_path / "run", *LOCAL, *options, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


def test_verify_checks_a_search_for_a_class(tmp_path: Path) -> None:
    label = (AVIARY / "labels.txt").read_text().splitlines()[0]
    done = run("run", AVIARY / "images", "-o", tmp_path / "run", *LOCAL, "--recall", f"{label}=0.6", "--json")
    assert json.loads(done.stdout)["certificate"]["label"] == label
    assert run("verify", tmp_path / "run").stdout.startswith("The certificate holds. The judge was asked about")


def test_a_run_without_a_certificate_has_nothing_to_verify(tmp_path: Path) -> None:
    run("run", AVIARY / "images", "-o", tmp_path / "run", *LOCAL, "--policy", "never")
    done = run("verify", tmp_path / "run", check=False)
    assert done.returncode == 2
    assert "contains no certificate" in done.stderr

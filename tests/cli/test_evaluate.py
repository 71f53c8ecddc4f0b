"""Evaluations and sweeps on the command line, with the bundled models and images."""

import json
import shutil
from importlib import resources
from pathlib import Path

import pytest

from tests.cli.test_cli import run

CONFIG = Path(str(resources.files("cascadevlm_backends") / "aviary" / "cascade.toml"))


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight bundled images in one folder per class, and the judge's answers about all of them."""
    folder = tmp_path_factory.mktemp("evaluate")
    for bird in sorted((CONFIG.parent / "images").glob("*.jpg"))[:8]:
        (folder / "data" / bird.stem).mkdir(parents=True)
        shutil.copy(bird, folder / "data" / bird.stem)
    run("evaluate", folder / "data", "--config", CONFIG, "--judge-all", "-o", folder / "run")
    return folder


def test_an_evaluation_tells_what_was_right(birds: Path) -> None:
    figures = json.loads(run("evaluate", birds / "data", "--config", CONFIG, "--json").stdout)
    assert figures["images"] == 8
    assert figures["cascade_accuracy"] >= figures["scorer_accuracy"]
    assert 0 < figures["deferral_rate"] < 1
    assert len(figures["per_class"]) == 8


def test_what_the_judge_said_of_everything_can_be_swept(birds: Path) -> None:
    result = json.loads(run("sweep", birds / "run", "--json").stdout)
    summary = json.loads((birds / "run" / "summary.json").read_text())
    assert result["scorer_accuracy"] == summary["scorer_accuracy"]
    assert result["judge_accuracy"] == summary["judge_accuracy"]
    assert "entropy" in run("sweep", birds / "run").stdout


def test_an_interrupted_evaluation_goes_on_with_the_same_command(birds: Path, tmp_path: Path) -> None:
    """The cache is outside the folder. The first session wrote only three lines."""
    command = ("evaluate", birds / "data", "--config", CONFIG, "--judge-all", "-o", tmp_path / "run", "--json")
    shutil.copytree(birds / "run", tmp_path / "run")
    lines = (tmp_path / "run" / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "run" / "predictions.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:40])
    for name in ("summary.json", "predictions.parquet"):
        (tmp_path / "run" / name).unlink()
    done = run(*command)
    assert "3 images have a prediction; the run continues after them." in done.stderr
    summaries = [json.loads((folder / "run" / "summary.json").read_text()) for folder in (birds, tmp_path)]
    took = dict.fromkeys(("paid_dollars", "input_tokens", "output_tokens", "latency_p50", "latency_p95"))
    first, *others = (each | took for each in [*summaries, json.loads(done.stdout)])
    assert others == [first, first]
    assert (tmp_path / "run" / "scores.npy").read_bytes() == (birds / "run" / "scores.npy").read_bytes()
    assert "Nothing is left to do: all 8 images have a prediction." in run(*command).stderr


def test_what_is_reported_of_everything_judged_is_the_policy(birds: Path) -> None:
    gated = json.loads(run("evaluate", birds / "data", "--config", CONFIG, "--json").stdout)
    summary = json.loads((birds / "run" / "summary.json").read_text())
    of_this_run = ("paid_dollars", "input_tokens", "output_tokens", "latency_p50", "latency_p95")
    known_now = ("judge_accuracy", "judge_accuracy_kept")
    assert gated["judge_accuracy_kept"] is None
    assert summary["judge_accuracy_kept"] is not None
    for name in gated.keys() - {*of_this_run, *known_now}:
        assert summary[name] == gated[name], name


def test_the_accuracy_of_the_judge_alone_is_shown(birds: Path) -> None:
    shown = run("evaluate", birds / "data", "--config", CONFIG, "--limit", "3", "--judge-all").stdout
    assert "judge, on every image" in shown


def test_of_several_stages_the_run_is_reported_as_it_was(birds: Path) -> None:
    second = ("--set", "stage.1.judge=hf_chat:aviary", "--set", "stage.1.policy=never")
    done = run("evaluate", birds / "data", "--config", CONFIG, "--limit", "3", *second, "--judge-all", "--json")
    assert len(done.stderr.strip().splitlines()) == 1
    assert "figures are for the judge asked about every image" in done.stderr
    assert json.loads(done.stdout)["deferral_rate"] == 1


def test_several_records_are_swept_as_one(birds: Path) -> None:
    run("evaluate", birds / "data", "--config", CONFIG, "--candidates", "2", "--judge-all", "-o", birds / "two", "--json")
    result = json.loads(run("sweep", birds / "run", birds / "two", "--json").stdout)
    assert {f"entropy ({birds / name})" for name in ("run", "two")} < {curve["name"] for curve in result["curves"]}
    assert "Best accuracy" in run("sweep", birds / "run", birds / "two").stdout


def test_a_part_of_the_data(birds: Path) -> None:
    figures = json.loads(run("evaluate", birds / "data", "--config", CONFIG, "--limit", "3", "--json").stdout)
    assert figures["images"] == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["evaluate", "DATA", "--config", CONFIG, "-o", "RUN"],
            "belongs to another run: its judges were asked about every image",
        ),
        (["evaluate", "DATA", "--config", CONFIG, "--split", "test"], "no split 'test'"),
        (["sweep", "DATA"], "does not contain a complete record"),
    ],
)
def test_wrong_calls_are_one_sentence(birds: Path, arguments: list[str | Path], sentence: str) -> None:
    known: dict[str | Path, Path] = {"DATA": birds / "data", "RUN": birds / "run"}
    done = run(*(known.get(argument, argument) for argument in arguments), check=False)
    assert done.returncode == 2
    assert sentence in done.stderr


def test_a_gated_record_cannot_be_swept(birds: Path) -> None:
    run("evaluate", birds / "data", "--config", CONFIG, "-o", birds / "gated", "--json")
    done = run("sweep", birds / "gated", check=False)
    assert done.returncode == 2
    assert "--judge-all" in done.stderr

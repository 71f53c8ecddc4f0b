"""Measuring and sweeping on the command line, with the bundled models and images."""

import json
import shutil
from importlib import resources
from pathlib import Path

import pytest

from tests.cli.test_cli import run

CONFIG = Path(str(resources.files("cascadevlm_backends") / "aviary" / "cascade.toml"))


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight of the bundled images in a folder of folders, and what a judge asked about all of them said."""
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
    assert result["judge_accuracy"] == summary["cascade_accuracy"]
    assert "entropy" in run("sweep", birds / "run").stdout


def test_a_part_of_the_data(birds: Path) -> None:
    figures = json.loads(run("evaluate", birds / "data", "--config", CONFIG, "--limit", "3", "--json").stdout)
    assert figures["images"] == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["evaluate", "DATA", "--config", CONFIG, "-o", "RUN"], "holds a record already"),
        (["evaluate", "DATA", "--config", CONFIG, "--split", "test"], "no split 'test'"),
        (["sweep", "DATA"], "holds no whole record"),
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

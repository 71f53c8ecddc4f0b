"""Studies on the command line, with the bundled models and images."""

import json
import shutil
from importlib import resources
from pathlib import Path

import pytest

from tests.cli.test_cli import run

CONFIG = Path(str(resources.files("cascadevlm_backends") / "aviary" / "cascade.toml"))


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six bundled images in one folder per class, a support folder with other images, and a study of two values of k."""
    folder = tmp_path_factory.mktemp("study")
    bundled = sorted((CONFIG.parent / "images").glob("*.jpg"))
    for bird in bundled[:6]:
        (folder / "data" / bird.stem).mkdir(parents=True)
        shutil.copy(bird, folder / "data" / bird.stem)
    for bird, other in zip(bundled[:3], bundled[6:9], strict=True):
        (folder / "support" / bird.stem).mkdir(parents=True)
        shutil.copy(other, folder / "support" / bird.stem)
    run("study", "candidates", folder / "data", "--config", CONFIG, "--k", "2,4", "-o", folder / "out")
    return folder


def test_what_is_written_is_what_is_told(birds: Path) -> None:
    study = json.loads((birds / "out" / "study-candidates.json").read_text())
    assert set(study) == {"study", "question", "rows", "notes"}
    assert [row["variant"] for row in study["rows"]] == ["k=2", "k=4"]
    for row in study["rows"]:
        evaluated = json.loads(run("sweep", birds / "out" / row["variant"], "--json").stdout)
        assert row["judge_all_accuracy"] == evaluated["judge_accuracy"]
        assert row["judge_all_calls"] == 6
        assert len(row["interval"]) == 2
        assert row["seconds"] > 0 or row["calls"] == 0


def test_studies_of_a_record(birds: Path) -> None:
    kept = birds / "out" / "k=4"
    rows = json.loads(run("study", "threshold", kept, "--thresholds", "0.3,0", "--json").stdout)["rows"]
    assert [row["threshold"] for row in rows] == [0, 0.3]
    assert rows[0]["accuracy"] == json.loads(run("sweep", kept, "--json").stdout)["judge_accuracy"]
    split = json.loads(run("study", "errors", kept, "--json", "-o", birds / "errors").stdout)
    assert split == json.loads((birds / "errors" / "study-errors.json").read_text())
    assert sum(row["errors"] for row in split["rows"]) == round((1 - rows[0]["accuracy"]) * 6)
    assert "deferral rate" in run("study", "threshold", kept).stdout


@pytest.mark.parametrize(
    ("arguments", "variants"),
    [
        (["order"], ["ranked", "reversed", "shuffled"]),
        (["reasoning", "--candidates", "3"], ["select", "select_cot"]),
        (["shots", "--support", "SUPPORT", "--shots", "0,1"], ["shots=0", "shots=1"]),
    ],
)
def test_studies_of_the_judge(birds: Path, arguments: list[str], variants: list[str]) -> None:
    name, *rest = (argument.replace("SUPPORT", str(birds / "support")) for argument in arguments)
    study = json.loads(run("study", name, birds / "data", "--config", CONFIG, "--limit", "4", *rest, "--json").stdout)
    assert study["study"] == name
    assert [row["variant"] for row in study["rows"]] == variants
    assert all(row["judge_all_calls"] == 4 and row["judge_all_seconds"] > 0 for row in study["rows"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["candidates", "DATA", "--k", "1,some"], "--k must be numbers"),
        (["candidates", "DATA", "--k", "0"], "a whole number of at least 1"),
        (["candidates", "DATA", "--k", "2", "--limit", "3", "-o", "OUT"], "Images may only be added after the last image"),
        (["order", "DATA", "--split", "test"], "no split 'test'"),
        (["shots", "DATA", "--support", "DATA/nothing"], "no image of any label"),
    ],
)
def test_wrong_calls_are_one_sentence(birds: Path, arguments: list[str], sentence: str) -> None:
    given = [each.replace("DATA", str(birds / "data")).replace("OUT", str(birds / "out")) for each in arguments]
    done = run("study", *given, "--config", CONFIG, check=False)
    assert done.returncode == 2
    assert sentence in done.stderr


def test_the_price_of_all_variants_is_one_sum(birds: Path) -> None:
    options = 'stage.0.options={ base_url = "http://127.0.0.1:9/v1", price = { input = 1000, output = 1000 } }'
    hosted = ["--judge", "openai:priced", "--set", options]
    done = run("study", "order", birds / "data", "--config", CONFIG, *hosted, check=False)
    assert done.returncode == 2
    assert "about 18 questions" in done.stderr

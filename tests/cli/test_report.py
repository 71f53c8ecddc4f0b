"""Reports on the command line, of real runs."""

import json
import shutil
from importlib import resources
from pathlib import Path

import pytest

from tests.cli.test_cli import run

CONFIG = Path(str(resources.files("cascadevlm_backends") / "aviary" / "cascade.toml"))


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record of eight bundled images, and a study of it."""
    folder = tmp_path_factory.mktemp("report")
    for bird in sorted((CONFIG.parent / "images").glob("*.jpg"))[:8]:
        (folder / "data" / bird.stem).mkdir(parents=True)
        shutil.copy(bird, folder / "data" / bird.stem)
    run("evaluate", folder / "data", "--config", CONFIG, "--judge-all", "-o", folder / "run")
    run("study", "threshold", folder / "run", "-o", folder / "run")
    return folder


def test_a_real_run_is_a_page_with_its_images(birds: Path) -> None:
    output = birds / "report.html"
    output.write_text("of yesterday")
    assert run("report", birds / "run", "-o", output).stdout.startswith(f"{output}: 0.")
    page = output.read_text(encoding="utf-8")
    found = json.loads((birds / "run" / "summary.json").read_text())
    assert f"<strong>{found['cascade_accuracy']:.1%}</strong> of 8 images" in page
    assert page.count("data:image/webp") == 8
    assert "Above which entropy should the judge be asked?" in page


def test_several_runs_are_one_page(birds: Path) -> None:
    run("evaluate", birds / "data", "--config", CONFIG, "-o", birds / "gated", "--json")
    run("report", birds / "run", birds / "gated", "-o", birds / "both.html")
    assert "Comparison of the runs" in (birds / "both.html").read_text(encoding="utf-8")


def test_a_bulk_run_is_a_page_and_no_record(birds: Path) -> None:
    labels = birds / "labels.txt"
    labels.write_text("".join(f"{folder.name}\n" for folder in sorted((birds / "data").iterdir())))
    run("run", birds / "data", "-o", birds / "bulk", "--config", CONFIG, "--labels", labels)
    run("report", birds / "bulk", "-o", birds / "bulk.html")
    page = (birds / "bulk.html").read_text(encoding="utf-8")
    assert "The run contains 8 images. Their true labels are not known." in page
    assert page.count("data:image/webp") == 8
    refused: list[tuple[list[str | Path], str]] = [
        (["sweep", birds / "bulk"], "is a run without labels, not a record."),
        (["calibrate", birds / "bulk", "-o", birds / "output"], "Nobody labelled an image of the run"),
    ]
    for command, sentence in refused:
        done = run(*command, check=False)
        assert (done.returncode, sentence in done.stderr) == (2, True)
    done = run("report", birds / "bulk", birds / "run", "-o", birds / "both.html", check=False)
    assert (done.returncode, "is a run without labels, and other runs have labels." in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["data", "-o", "report.html"], "does not contain a complete record"),
        (["run", "run", "-o", "report.html"], "2 of the runs are named 'run'"),
        (["run", "-o", "missing/report.html"], "cannot be written: No such file or directory"),
        (["run"], "Missing option '--output'"),
    ],
)
def test_wrong_calls_are_one_sentence(birds: Path, arguments: list[str], sentence: str) -> None:
    given = [argument if argument == "-o" else birds / argument for argument in arguments]
    done = run("report", *given, check=False)
    assert done.returncode == 2
    assert sentence in done.stderr

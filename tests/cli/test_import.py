"""Labels of people on the command line, with the bundled models and images."""

import csv
import json
import shutil
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import pytest

from cascadevlm.runs.corrections import CORRECTIONS
from tests.cli.test_cli import run

AVIARY = Path(str(resources.files("cascadevlm_backends") / "aviary"))


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run over the bundled images, whose names are their true labels. The judge was asked about every image."""
    folder = tmp_path_factory.mktemp("import")
    models = ("--scorer", "open_clip:aviary", "--judge", "hf_chat:aviary", "--policy", "always")
    run("run", AVIARY / "images", "-o", folder / "run", "--labels", AVIARY / "labels.txt", *models)
    return folder


@pytest.fixture
def corrected(birds: Path, tmp_path: Path) -> Path:
    """A copy of the run, in which ann labelled all images."""
    shutil.copytree(birds / "run", tmp_path / "run")
    write(tmp_path / "ann.csv", {path: Path(path).stem for path in labels(tmp_path / "run")})
    run("import", tmp_path / "ann.csv", "--into", tmp_path / "run", "--by", "ann")
    return tmp_path / "run"


def labels(folder: Path) -> dict[str, str]:
    """The labels of the cascade by path."""
    return {each["path"]: each["label"] for each in map(json.loads, (folder / "predictions.jsonl").read_text().splitlines())}


def write(file: Path, said: Mapping[str, str]) -> None:
    with file.open("w", newline="") as lines:
        csv.writer(lines).writerows([("image", "label"), *said.items()])


def test_an_import_tells_what_was_added_and_who_disagrees(corrected: Path, tmp_path: Path) -> None:
    first, second, *_ = labels(corrected)
    write(tmp_path / "bob.csv", {first: "none", second: Path(second).stem})
    shown = run("import", tmp_path / "bob.csv", "--into", corrected, "--by", "bob").stdout
    assert "2 corrections added, 0 known already." in shown
    assert "People labelled 48 images. They disagree about 1." in shown
    assert f"{first}: ann said {Path(first).stem!r}; bob said none of the labels, which counts." in shown
    told = json.loads(run("import", tmp_path / "bob.csv", "--into", corrected, "--by", "bob", "--json").stdout)
    assert told == {"added": 0, "known": 2, "without_label": 0, "images": 48, "conflicts": [first]}


def test_a_review_comes_back_as_a_table(birds: Path, tmp_path: Path) -> None:
    """As the documentation says: export for a review, edit the table, import it."""
    shutil.copytree(birds / "run", tmp_path / "run")
    run("export", tmp_path / "run", "--to", "csv", "--review", "random 10", "-o", tmp_path / "review.csv")
    told = json.loads(run("import", tmp_path / "review.csv", "--into", tmp_path / "run", "--json").stdout)
    assert told["added"] == told["images"] == 10
    run("export", tmp_path / "run", "--to", "csv", "-o", tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as lines:
        assert sum(row["decided_by"] == "person" for row in csv.DictReader(lines)) == 10


def test_a_run_is_evaluated_on_the_labels_of_people(corrected: Path) -> None:
    told = json.loads(run("evaluate", corrected, "--json").stdout)
    right = [Path(path).stem == label for path, label in labels(corrected).items()]
    assert told["cascade_accuracy"] == pytest.approx(sum(right) / 48)
    assert "These are a random sample" in told["holds_for"]
    assert "so the figures hold for the whole run." in run("evaluate", corrected).stdout


def test_a_run_is_calibrated_on_the_labels_of_people(corrected: Path, tmp_path: Path) -> None:
    done = run("calibrate", corrected, "-o", tmp_path / "calibration.json", "--size", "30")
    assert "a random sample" in done.stdout
    made = json.loads((tmp_path / "calibration.json").read_text())
    assert (made["images"], made["labelled"]) == (30, True)
    config = json.loads((corrected / "manifest.json").read_text())["config"]
    assert config["calibration"] is None
    options = ("--labels", AVIARY / "labels.txt", "--scorer", "open_clip:aviary", "--judge", "hf_chat:aviary")
    calibrated = ("--set", f"calibration={tmp_path / 'calibration.json'}")
    run("classify", next((AVIARY / "images").glob("*.jpg")), *options, *calibrated)  # it fits the cascade of the run


@pytest.mark.parametrize(("method", "images"), [("means", 48), ("cache", 48)])
def test_labels_of_people_teach_the_scorer(corrected: Path, tmp_path: Path, method: str, images: int) -> None:
    told = json.loads(run("adapt", corrected, "-o", tmp_path / "a.adapter", "--method", method, "--json").stdout)
    assert (told["images"], told["labelled"]) == (images, images)
    assert (told["gain"] is None) == (method == "means")


def test_a_report_shows_the_labels_of_people(corrected: Path, tmp_path: Path) -> None:
    run("report", corrected, "-o", tmp_path / "report.html")
    other = sum(Path(path).stem != label for path, label in labels(corrected).items())
    assert f"People labelled 48 of them, {other} with another label than the cascade." in (tmp_path / "report.html").read_text()


def test_a_record_is_evaluated_with_the_labels_of_people(tmp_path: Path) -> None:
    for image in sorted((AVIARY / "images").glob("*.jpg"))[:8]:
        (tmp_path / "data" / image.stem).mkdir(parents=True)
        shutil.copy(image, tmp_path / "data" / image.stem)
    figures = json.loads(
        run("evaluate", tmp_path / "data", "--scorer", "open_clip:aviary", "-o", tmp_path / "record", "--json").stdout
    )
    assert json.loads(run("evaluate", tmp_path / "record", "--json").stdout) == figures
    said = labels(tmp_path / "record")
    write(tmp_path / "all.csv", said)  # people agree with every prediction
    run("import", tmp_path / "all.csv", "--into", tmp_path / "record")
    assert (
        figures["cascade_accuracy"] < json.loads(run("evaluate", tmp_path / "record", "--json").stdout)["cascade_accuracy"] == 1
    )
    run("report", tmp_path / "record", "-o", tmp_path / "report.html")
    assert '<th scope="row">Labelled by people</th><td>8</td>' in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["import", "missing.csv", "--into", "run"], "cannot be read: No such file or directory."),
        (["import", "wrong.csv", "--into", "run"], "1 images are not in the run ('x.jpg, line 2')"),
        (["import", "wrong.csv", "--into", "."], "is not the manifest of a run."),
        (["evaluate", "run"], "Nobody labelled an image of the run in 'run'."),
        (["evaluate", "run", "--judge-all"], "A run is evaluated as it was made, so options have no effect."),
        (["calibrate", "run", "-o", "c.json"], "Nobody labelled an image of the run in 'run'."),
        (["adapt", "run", "-o", "a", "--method", "cache"], "The method 'cache' needs labels, and a run has none."),
        (["export", "run", "--to", "csv", "-o", "o", "--review", "doubtful"], "'doubtful' does not select images for a review."),
        (["export", "run", "--to", "csv", "-o", "o", "--review", "5", "--review", "random 5"], "Two numbers of images are given"),
    ],
)
def test_wrong_calls_are_one_sentence(birds: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str) -> None:
    monkeypatch.chdir(birds)
    (birds / "wrong.csv").write_text("image,label\nx.jpg,yellow-crowned rufous-breasted plain owl\n")
    done = run(*arguments, check=False)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (birds / "run" / CORRECTIONS).exists()

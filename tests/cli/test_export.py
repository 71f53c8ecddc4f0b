"""Exports of the commands' results, with the bundled models and images."""

import csv
import json
import shutil
from importlib import resources
from pathlib import Path

import datasets
import pytest
from pycocotools.coco import COCO  # type: ignore[import-untyped]

from tests.cli.test_cli import run

CONFIG = Path(str(resources.files("cascadevlm_backends") / "aviary" / "cascade.toml"))


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight bundled images in one folder per class, one unreadable image, and the record of a cascade that often abstains."""
    folder = tmp_path_factory.mktemp("export")
    for bird in sorted((CONFIG.parent / "images").glob("*.jpg"))[:8]:
        (folder / "data" / bird.stem).mkdir(parents=True)
        shutil.copy(bird, folder / "data" / bird.stem)
    (folder / "data" / bird.stem / "broken.jpg").write_text("no image")
    accept = ("--set", "accept=0.95")
    run("evaluate", folder / "data", "--config", CONFIG, "--policy", "never", *accept, "-o", folder / "run", "--json")
    return folder


def lines(file: Path) -> list[dict[str, str | None]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("to", ["csv", "hf", "coco", "label-studio", "fiftyone"])
def test_a_record_is_exported_in_every_format(birds: Path, tmp_path: Path, to: str) -> None:
    done = json.loads(run("export", birds / "run", "--to", to, "-o", tmp_path / "out", "--json").stdout)
    said = {each["path"]: each["label"] for each in lines(birds / "run" / "predictions.jsonl")}
    assert 0 < sum(label is not None for label in said.values()) < 8
    assert done["labelled"] == sum(label is not None for label in said.values())
    assert done["images"] == (9 if to == "csv" else 8)
    assert done["left_out"] == 9 - done["images"]
    if to != "csv":
        del said[next(path for path in said if path and "broken" in path)]
    assert labels_in(tmp_path / "out", to) == said


def labels_in(out: Path, to: str) -> dict[str, str | None]:
    """The labels by path, read with a reader of the format."""
    match to:
        case "csv":
            with out.open(newline="") as file:
                return {row["path"]: row["label"] or None for row in csv.DictReader(file)}
        case "hf":
            loaded = datasets.load_from_disk(str(out))
            names = loaded.features["label"].names
            return {row["path"]: None if row["label"] is None else names[row["label"]] for row in loaded}
        case "coco":
            coco = COCO(str(out))
            labels: dict[str, str | None] = dict.fromkeys(image["file_name"] for image in coco.imgs.values())
            found = coco.loadAnns(coco.getAnnIds())
            return labels | {coco.imgs[a["image_id"]]["file_name"]: coco.cats[a["category_id"]]["name"] for a in found}
        case "label-studio":
            tasks = json.loads((out / "tasks.json").read_text())
            guesses = {task["data"]["path"]: task.get("predictions") for task in tasks}
            return {path: guess and guess[0]["result"][0]["value"]["choices"][0] for path, guess in guesses.items()}
        case _:
            written = json.loads(out.read_text())
            return {path: target and written["classes"][target["label"]] for path, target in written["labels"].items()}


def test_what_classify_prints_is_exported(birds: Path, tmp_path: Path) -> None:
    images = sorted((birds / "data").rglob("*.jpg"))[:3]
    (tmp_path / "labels.txt").write_text("".join(f"{image.stem}\n" for image in images))
    printed = run("classify", *images, "--labels", tmp_path / "labels.txt", "--scorer", "open_clip:aviary", "--json").stdout
    (tmp_path / "printed.jsonl").write_text(printed)
    shown = run("export", tmp_path / "printed.jsonl", "--to", "coco", "-o", tmp_path / "out.json").stdout
    assert "3 images, 3 with a label" in shown
    assert labels_in(tmp_path / "out.json", "coco") == {str(image): image.stem for image in images}


def test_what_is_left_out_is_told_and_reviews_are_of_the_abstained(birds: Path, tmp_path: Path) -> None:
    shown = run("export", birds / "run", "--to", "label-studio", "-o", tmp_path / "all").stdout
    assert "1 left out" in shown
    run("export", birds / "run", "--to", "csv", "--review", "abstained", "-o", tmp_path / "review.csv")
    said = lines(birds / "run" / "predictions.jsonl")
    assert set(labels_in(tmp_path / "review.csv", "csv")) == {p["path"] for p in said if not p["label"] and p["candidates"]}


@pytest.mark.parametrize(
    ("source", "to", "output", "sentence"),
    [
        ("nowhere", "csv", "out", "does not exist"),
        ("run", "voc", "out", "There is no format 'voc'"),
        ("run", "csv", "run", "exists already"),
        ("data", "csv", "out", "contains no predictions"),
    ],
)
def test_wrong_calls_are_one_sentence(birds: Path, source: str, to: str, output: str, sentence: str) -> None:
    done = run("export", birds / source, "--to", to, "-o", birds / output, check=False)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1

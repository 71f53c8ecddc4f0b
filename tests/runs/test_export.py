"""Exports are read with the packages of their formats, if these packages are installed."""

import csv
import json
import os
import shutil
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote_to_bytes
from xml.etree import ElementTree

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO  # type: ignore[import-untyped]
from pydantic import JsonValue

from cascadevlm import Cascade
from cascadevlm.base.errors import DataError, InputError
from cascadevlm.base.images import load_image
from cascadevlm.base.labels import Label
from cascadevlm.base.tables import ColumnNames
from cascadevlm.base.types import Candidate, Prediction, Usage, Verdict
from cascadevlm.runs import bulk
from cascadevlm.runs.export import FORMATS, FORMULA, export
from cascadevlm.runs.inputs import Inputs
from cascadevlm.runs.lines import Line
from cascadevlm.testing import FakeScorer, noise

NAMES = ("wren", "robin, European", 'the "grey" <heron> & co')
"""The label set, not in alphabetical order."""

SHOWING_IMAGES = [name for name, form in FORMATS.items() if form.images != "none"]


def ranked(*names: str) -> tuple[Candidate, ...]:
    return tuple(Candidate(label=Label(name=name), probability=0.5, rank=rank) for rank, name in enumerate(names, start=1))


def predictions(folder: Path) -> list[Prediction]:
    """One prediction by the scorer, one by the judge, one abstention, one unreadable image, and one image that was deleted
    later.
    """
    answered = Verdict(outcome="answered", label=NAMES[1], usage=Usage(dollars=0.25))
    refused = Verdict(outcome="refused", error="I can't\nsay.", usage=Usage(dollars=0.5))
    shown = ranked(*NAMES[:2])
    return [
        Prediction(path=str(folder / "0.png"), label=NAMES[0], probability=0.1 + 0.2, decided_by="scorer", candidates=shown),
        Prediction(path=str(folder / "b/1.png"), label=NAMES[1], decided_by="judge", candidates=shown, verdicts=(answered,)),
        Prediction(path=str(folder / "b/ü 2.png"), candidates=shown, verdicts=(refused,), error="I can't\nsay."),
        Prediction(path=str(folder / "3.png"), error="Image '3.png' cannot be decoded."),
        Prediction(path=str(folder / "4.png"), label=NAMES[2], probability=0.75, decided_by="fusion", candidates=shown),
    ]


def write_lines(file: Path, said: Sequence[Prediction], **more: JsonValue) -> Path:
    file.write_text("".join(json.dumps({"index": number, **p.to_dict(), **more}) + "\n" for number, p in enumerate(said)))
    return file


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a manifest that contains the label set."""
    folder = tmp_path / "run"
    (folder / "images" / "b").mkdir(parents=True)
    for number, name in enumerate(("0.png", "b/1.png", "b/ü 2.png")):
        noise(number).save(folder / "images" / name)
    (folder / "images" / "3.png").write_text("no image")
    write_lines(folder / "predictions.jsonl", predictions(folder / "images"), truth="wren")
    description: JsonValue = {"labels": [{"name": name, "text": "", "aliases": []} for name in NAMES], "format": 1}
    (folder / "manifest.json").write_text(json.dumps(description))
    return folder


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def test_a_table_tells_of_every_image(run: Path, tmp_path: Path) -> None:
    done = export(run, "csv", tmp_path / "out.csv")
    assert (done.images, done.labelled, done.left_out) == (5, 3, 0)
    rows = table(tmp_path / "out.csv")
    said = predictions(run / "images")
    assert [row["path"] for row in rows] == [p.path for p in said]
    assert [row["label"] or None for row in rows] == [p.label for p in said]
    assert [row["error"] for row in rows] == [p.error for p in said]
    assert [float(row["probability"]) if row["probability"] else None for row in rows] == [p.probability for p in said]
    assert [row["outcome"] for row in rows] == ["", "answered", "refused", "", ""]
    assert [row["escalated"] for row in rows] == ["False", "True", "True", "False", "False"]
    assert [float(row["dollars"]) for row in rows] == [0, 0.25, 0.5, 0, 0]


def test_a_data_set_holds_the_images_themselves(run: Path, tmp_path: Path) -> None:
    done = export(run, "hf", tmp_path / "out")
    assert (done.images, done.labelled, done.left_out) == (3, 2, 2)
    pixels = [load_image(p.path).tobytes() for p in predictions(run / "images")[:3]]
    shutil.rmtree(run)
    loaded = datasets.load_from_disk(str(tmp_path / "out"))
    assert loaded.features["label"].names == list(NAMES)
    assert loaded["label"][:] == [0, 1, None]
    assert loaded["probability"][:] == [0.1 + 0.2, None, None]
    assert loaded["decided_by"][:] == ["scorer", "judge", None]
    assert loaded["error"][2] == "I can't\nsay."
    assert [load_image(row["image"]).tobytes() for row in loaded] == pixels


def test_coco_finds_its_images_and_classes(run: Path, tmp_path: Path) -> None:
    export(run, "coco", tmp_path / "out.json")
    coco = COCO(str(tmp_path / "out.json"))
    assert [each["name"] for each in coco.loadCats(coco.getCatIds())] == list(NAMES)
    labels = {}
    for image in coco.loadImgs(coco.getImgIds()):
        with Image.open(image["file_name"]) as opened:
            assert opened.size == (image["width"], image["height"])
        found = coco.loadAnns(coco.getAnnIds(imgIds=[image["id"]]))
        labels[image["file_name"]] = [(coco.loadCats(each["category_id"])[0]["name"], each["score"]) for each in found]
    first, second, third = (p.path for p in predictions(run / "images")[:3])
    assert labels == {first: [(NAMES[0], 0.1 + 0.2)], second: [(NAMES[1], None)], third: []}


def test_label_studio_shows_the_images_below_one_storage(run: Path, tmp_path: Path) -> None:
    done = export(run, "label-studio", tmp_path / "out")
    assert f"LOCAL_FILES_DOCUMENT_ROOT={run}," in done.how_to_load
    assert f"add {run / 'images'} to it" in done.how_to_load
    tasks = json.loads((tmp_path / "out" / "tasks.json").read_text())
    start = "/data/local-files/?d="
    assert all(task["data"]["image"].startswith(start) for task in tasks)
    files = [os.fsdecode(unquote_to_bytes(task["data"]["image"].removeprefix(start))) for task in tasks]
    assert files == ["images/0.png", "images/b/1.png", "images/b/ü 2.png"]
    view = ElementTree.parse(tmp_path / "out" / "label_config.xml").getroot()
    assert [choice.get("value") for choice in view.iter("Choice")] == list(NAMES)
    (first,), (second,) = (task["predictions"] for task in tasks[:2])
    assert (first["model_version"], first["score"]) == ("run", 0.1 + 0.2)
    assert [part["value"]["choices"] for guess in (first, second) for part in guess["result"]] == [[NAMES[0]], [NAMES[1]]]
    assert "predictions" not in tasks[2]


@pytest.mark.filterwarnings("ignore")
def test_label_studios_own_checks_pass(run: Path, tmp_path: Path) -> None:
    interfaces = pytest.importorskip("label_studio_sdk.label_interface")
    export(run, "label-studio", tmp_path / "out")
    interface = interfaces.LabelInterface((tmp_path / "out" / "label_config.xml").read_text())
    interface.validate()
    for task in json.loads((tmp_path / "out" / "tasks.json").read_text()):
        assert interface.validate_task({"data": task["data"]})
        assert [interface.validate_prediction(guess, return_errors=True) for guess in task.get("predictions", [])] in ([], [[]])


def test_fiftyone_has_classes_and_absolute_paths(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_lines(run / "predictions.jsonl", predictions(Path("../run/images")))
    export(run, "fiftyone", "out.json")
    written = json.loads(Path("out.json").read_text())
    assert written["classes"] == list(NAMES)
    assert list(written["labels"]) == [p.path for p in predictions(run / "images")[:3]]
    shown = {"candidates": [*NAMES[:2]], "probabilities": [0.5, 0.5], "reasoning": ""}
    assert list(written["labels"].values()) == [
        {"label": 0, "confidence": 0.1 + 0.2, "attributes": {"decided_by": "scorer", **shown}},
        {"label": 1, "confidence": None, "attributes": {"decided_by": "judge", **shown}},
        None,
    ]


@pytest.mark.filterwarnings("ignore")
def test_fiftyones_own_importer_reads_it(run: Path, tmp_path: Path) -> None:
    importers = pytest.importorskip("fiftyone.utils.data.importers")
    export(run, "fiftyone", tmp_path / "out.json")
    with importers.FiftyOneImageClassificationDatasetImporter(labels_path=str(tmp_path / "out.json")) as importer:
        found = {path: label and (label.label, label.confidence) for path, _, label in importer}
    first, second, third = (p.path for p in predictions(run / "images")[:3])
    assert found == {first: (NAMES[0], 0.1 + 0.2), second: (NAMES[1], None), third: None}


@pytest.mark.filterwarnings("ignore")
def test_fiftyones_own_importer_reads_ids_and_kept_columns(tmp_path: Path) -> None:
    importers = pytest.importorskip("fiftyone.utils.data.importers")
    noise(0).save(tmp_path / "0.png")
    (tmp_path / "table.csv").write_text("image,sku,unit price,label\n0.png,A-1,3.5,ours\n")
    inputs = Inputs(tmp_path / "table.csv", ColumnNames(id="sku", keep=("unit price", "label")))
    bulk.run(Cascade(FakeScorer(), [], labels=["ant", "bee"]), inputs, tmp_path / "run", config={})
    export(tmp_path / "run", "fiftyone", tmp_path / "out.json")
    with importers.FiftyOneImageClassificationDatasetImporter(labels_path=str(tmp_path / "out.json")) as importer:
        ((path, _, label),) = importer
    assert path == str(tmp_path / "0.png")
    assert (label["input_id"], label["unit price"], label["input_label"]) == ("A-1", "3.5", "ours")
    assert label["decided_by"] == "scorer"


@pytest.mark.parametrize("to", FORMATS)
def test_a_review_is_of_abstained_images(run: Path, tmp_path: Path, to: str) -> None:
    done = export(run, to, tmp_path / "out", review=["abstained"])
    assert (done.images, done.labelled, done.left_out) == (1, 0, 0)
    if to == "csv":
        assert [row["path"] for row in table(tmp_path / "out")] == [predictions(run / "images")[2].path]


def test_what_names_no_label_set_has_the_labels_that_occur(run: Path, tmp_path: Path) -> None:
    printed = write_lines(tmp_path / "printed.jsonl", predictions(run / "images")[:2])
    export(printed, "fiftyone", tmp_path / "out")
    written = json.loads((tmp_path / "out").read_text())
    assert written["classes"] == sorted(NAMES[:2])
    assert [written["classes"][target["label"]] for target in written["labels"].values()] == [*NAMES[:2]]


@pytest.mark.parametrize("to", FORMATS)
def test_names_of_files_need_not_be_text(tmp_path: Path, to: str) -> None:
    image = tmp_path / os.fsdecode(b"\xe9.png")
    noise(0).save(tmp_path / "0.png")
    (tmp_path / "0.png").rename(image)
    said = Prediction(path=str(image), label="wren", decided_by="scorer", candidates=ranked("wren"), error="\udce9")
    printed = write_lines(tmp_path / "printed.jsonl", [said])
    assert export(printed, to, tmp_path / "out").images == 1
    if to == "label-studio":
        assert "/%E9.png" in json.loads((tmp_path / "out" / "tasks.json").read_text())[0]["data"]["image"]
    if to == "fiftyone":
        assert [*json.loads((tmp_path / "out").read_text())["labels"]] == [str(image)]


readable = st.text(st.characters(codec="utf-8"), min_size=1)


@given(st.lists(st.tuples(readable, readable, readable), min_size=1, max_size=5))
def test_a_table_keeps_any_text(tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str, str]]) -> None:
    folder = tmp_path_factory.mktemp("texts")
    said = [Prediction(path=path, label=label, decided_by="judge", error=error) for path, label, error in cells]
    export(write_lines(folder / "printed.jsonl", said), "csv", folder / "out.csv")
    written = [(row["path"], row["label"], row["error"]) for row in table(folder / "out.csv")]
    assert written == [tuple(f"'{text}" if text.startswith(FORMULA) else text for text in row) for row in cells]


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "＝"])
def test_no_cell_of_a_table_is_a_formula(tmp_path: Path, start: str) -> None:
    text = f"{start}HYPERLINK(1)"
    said = [Prediction(path=text, label=text, decided_by="judge", error=text, probability=0.5)]
    export(write_lines(tmp_path / "printed.jsonl", said), "csv", tmp_path / "out.csv")
    (row,) = table(tmp_path / "out.csv")
    assert [row[name] for name in ("path", "label", "error", "probability")] == [f"'{text}"] * 3 + ["0.5"]


@pytest.mark.parametrize("to", [name for name in FORMATS if name != "hf"])
def test_memory_does_not_grow_with_the_predictions(run: Path, tmp_path: Path, to: str) -> None:
    def peak(printed: Path, output: Path) -> int:
        tracemalloc.start()
        export(printed, to, output)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    few = write_lines(tmp_path / "few", predictions(run / "images"))
    many = write_lines(tmp_path / "many", predictions(run / "images") * 400)
    assert many.stat().st_size > 1_000_000
    if to == "parquet":
        export(few, to, tmp_path / "first")  # loads pyarrow
    tries = range(2)  # the interpreter's own tables grow in leaps, now and then
    least = min(peak(few, tmp_path / f"few-{each}") for each in tries)
    assert min(peak(many, tmp_path / f"many-{each}") for each in tries) < least + (2_000_000 if to == "parquet" else 200_000)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "contains no predictions"),
        ('{"path": "x.jpg"}\n', "line 1, is not a prediction: label: Field required"),
        ("[]\n", "line 1, is not a prediction"),
        ("GOOD\nnonsense\n", "line 2, is not JSON"),
        ("GOOD\n\n", "line 2, is not JSON"),
        ("OTHER\n", "line 1: 'eagle' is not in the label set of the run"),
    ],
)
def test_what_is_no_prediction_is_one_sentence(run: Path, tmp_path: Path, text: str, sentence: str) -> None:
    good = predictions(run / "images")[0]
    other = Prediction(path="x.jpg", label="eagle", decided_by="judge")
    text = text.replace("GOOD", json.dumps(good.to_dict())).replace("OTHER", json.dumps(other.to_dict()))
    (run / "predictions.jsonl").write_text(text)
    with pytest.raises(DataError, match=sentence):
        export(run, "csv", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_a_line_that_is_being_written_is_not_exported_yet(run: Path, tmp_path: Path) -> None:
    good = json.dumps(predictions(run / "images")[0].to_dict())
    for text, count in ((f"{good}\n{good[:40]}", 1), (f"{good}\n{good}\n{good[:-1]}", 2)):
        (run / "predictions.jsonl").write_text(text)
        assert export(run, "csv", tmp_path / f"{count}.csv").images == count
    (run / "predictions.jsonl").write_text(good)
    with pytest.raises(DataError, match="contains no predictions"):
        export(run, "csv", tmp_path / "none.csv")


def test_a_printed_file_that_breaks_off_is_told(run: Path, tmp_path: Path) -> None:
    good = json.dumps(predictions(run / "images")[0].to_dict())
    (tmp_path / "printed").write_text(f"{good}\n{good[:40]}")
    with pytest.raises(DataError, match=r"ends in the middle of line 2\."):
        export(tmp_path / "printed", "csv", tmp_path / "out")
    (tmp_path / "printed").write_text(f"{good}\n{good}")
    assert export(tmp_path / "printed", "csv", tmp_path / "out").images == 2


@pytest.mark.parametrize("to", FORMATS)
def test_a_run_that_is_going_on_is_exported_as_it_stood(
    run: Path, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every line that is read, another line is written."""
    (good, *_), read = predictions(run / "images"), Line.model_validate

    def growing(told: dict[str, JsonValue]) -> Line:
        with (run / "predictions.jsonl").open("a") as file:
            file.write(json.dumps(good.to_dict()) + "\n")
        return read(told)

    monkeypatch.setattr(Line, "model_validate", growing)
    done = export(run, to, tmp_path / "out")
    assert done.images == (5 if FORMATS[to].images == "none" else 3)
    if to == "coco":
        written = json.loads((tmp_path / "out").read_text())
        assert [len(written[part]) for part in ("images", "annotations")] == [3, 2]


@pytest.fixture
def table_run(tmp_path: Path) -> Path:
    """A run over images in a table. One of them is not an image, and one is a file."""
    noise(3, (5, 7)).save(tmp_path / "file.png")
    content = (tmp_path / "file.png").read_bytes()
    images = [{"bytes": content, "path": "0.png"}, {"bytes": b"x", "path": None}, {"bytes": None, "path": "file.png"}]
    pyarrow.parquet.write_table(pyarrow.table({"image": images}), tmp_path / "images.parquet")
    bulk.run(Cascade(FakeScorer(), [], labels=["ant", "bee"]), Inputs(tmp_path / "images.parquet"), tmp_path / "run", config={})
    return tmp_path / "run"


def test_images_in_a_table_are_read_from_there(table_run: Path, tmp_path: Path) -> None:
    names = [str(tmp_path / "0.png"), str(tmp_path / "file.png")]
    done = export(table_run, "hf", tmp_path / "hf")
    assert (done.images, done.left_out) == (2, 1)
    loaded = datasets.load_from_disk(str(tmp_path / "hf"))
    assert loaded["path"][:] == names
    assert [load_image(row["image"]).tobytes() for row in loaded] == [noise(3, (5, 7)).tobytes()] * 2
    export(table_run, "coco", tmp_path / "coco.json")
    images = json.loads((tmp_path / "coco.json").read_text())["images"]
    assert [(each["id"], each["file_name"], each["width"], each["height"]) for each in images] == [
        (1, names[0], 5, 7),
        (3, names[1], 5, 7),
    ]
    assert export(table_run, "fiftyone", tmp_path / "fiftyone.json").images == 1


@pytest.mark.parametrize("column", ["image.path", "image", "path"])
def test_a_table_may_be_named_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str) -> None:
    folder = tmp_path / "birds"
    folder.mkdir()
    noise(3, (5, 7)).save(folder / "0.png")
    content = (folder / "0.png").read_bytes()
    rows = {"image.path": {"bytes": content, "path": "0.png"}, "image": "0.png", "path": {"bytes": content}}
    table = {"image": [rows[column]]} | ({"path": ["0.png"]} if column == "path" else {})
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "images.parquet")
    cascade = Cascade(FakeScorer(), [], labels=["ant", "bee"])
    for number, (here, name) in enumerate([(folder, "images.parquet"), (tmp_path, "birds/images.parquet")]):
        monkeypatch.chdir(here)
        assert bulk.run(cascade, Inputs(name), tmp_path / "run", config={}).images == 1
        for to in ("hf", "coco"):
            assert export(tmp_path / "run", to, tmp_path / f"{to} {number}").images == 1


@pytest.mark.parametrize("to", [name for name, form in FORMATS.items() if form.images == "files"])
def test_what_can_only_name_files_says_so_of_images_in_a_table(table_run: Path, tmp_path: Path, to: str) -> None:
    (tmp_path / "file.png").unlink()
    with pytest.raises(
        DataError, match=rf"are inside .*images.parquet', and the format '{to}' can only name files\. .* csv, parquet, hf, coco"
    ):
        export(table_run, to, tmp_path / "out")


def test_a_table_that_is_gone_or_another_one_is_told(table_run: Path, tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"image": [b"1", b"2", b"3"]}), tmp_path / "images.parquet")
    with pytest.raises(DataError, match=r"Row 0 of .*images.parquet' was .*0.png' in the run and is now '#0'"):
        export(table_run, "hf", tmp_path / "out")
    (tmp_path / "images.parquet").unlink()
    (tmp_path / "file.png").unlink()
    with pytest.raises(DataError, match=r"None of the images .* can be read\. The run read them from .*images.parquet'"):
        export(table_run, "coco", tmp_path / "out")


@pytest.mark.parametrize("to", FORMATS)
def test_a_run_over_names_that_are_no_text_is_exported(tmp_path: Path, to: str) -> None:
    (tmp_path / "images").mkdir()
    noise(0).save(tmp_path / "0.png")
    (tmp_path / "0.png").rename(tmp_path / "images" / os.fsdecode(b"\xe9.png"))
    bulk.run(Cascade(FakeScorer(), [], labels=["ant", "bee"]), Inputs(tmp_path / "images"), tmp_path / "run", config={})
    assert export(tmp_path / "run", to, tmp_path / "out").images == 1


def test_an_image_is_no_run(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        export(run / "images" / "0.png", "csv", tmp_path / "out")


def test_what_is_missing_or_there_already_is_one_sentence(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'nowhere' does not exist"):
        export("nowhere", "csv", tmp_path / "out")
    with pytest.raises(DataError, match="images' contains no predictions"):
        export(run / "images", "csv", tmp_path / "out")
    with pytest.raises(InputError, match=r"no format 'xml'\. Use one of: csv"):
        export(run, "xml", tmp_path / "out")
    with pytest.raises(InputError, match="run' exists already"):
        export(run, "hf", run)
    with pytest.raises(InputError, match=r"cannot be written: .*No such file"):
        export(run, "csv", tmp_path / "no" / "out")
    (run / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="does not contain a valid label set"):
        export(run, "csv", tmp_path / "out")


@pytest.mark.parametrize("to", SHOWING_IMAGES)
def test_images_that_are_elsewhere_are_no_export(run: Path, tmp_path: Path, to: str) -> None:
    write_lines(run / "predictions.jsonl", predictions(Path("images")))
    with pytest.raises(DataError, match=r"None of the images .* Repeat the command in the working directory of the run"):
        export(run, to, tmp_path / "out")


def test_without_an_abstained_image_there_is_no_review(run: Path, tmp_path: Path) -> None:
    write_lines(run / "predictions.jsonl", predictions(run / "images")[:2])
    with pytest.raises(DataError, match="nothing to review"):
        export(run, "csv", tmp_path / "out", review=["abstained"])


@pytest.mark.parametrize(("to", "target"), [("coco", "../3.png"), ("hf", "/proc/self/mem")])
def test_an_export_that_fails_leaves_nothing(run: Path, tmp_path: Path, to: str, target: str) -> None:
    image = run / "images" / "b" / "1.png"
    image.unlink()
    image.symlink_to(target)  # the one is no image, the other a file that nobody can read, not even root
    shutil.copy(run / "predictions.jsonl", tmp_path / "run" / "all.jsonl")
    done = export(run / "all.jsonl", to, tmp_path / "out")
    assert (done.images, done.labelled, done.left_out) == (2, 1, 3)
    shutil.rmtree(tmp_path / "out") if to == "hf" else (tmp_path / "out").unlink()
    write_lines(run / "predictions.jsonl", predictions(run / "images")[1:2])
    with pytest.raises(InputError, match="cannot be written"):
        export(run, to, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_a_missing_package_is_named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        export(run, "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", ["[" * 100_000, '{"path": ' + "9" * 5_000 + "}"])
def test_a_line_that_no_reader_takes_is_said(tmp_path: Path, line: str) -> None:
    (tmp_path / "lines.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=r"lines\.jsonl"):
        export(tmp_path / "lines.jsonl", "csv", tmp_path / "out")


@pytest.mark.parametrize("to", [name for name in FORMATS if name != "hf"])
def test_images_to_label_next_are_uncertain_readable_ones(run: Path, tmp_path: Path, to: str) -> None:
    image = run / "images" / "0.png"
    sure = Prediction(path=str(image), label=NAMES[0], probability=0.99, decided_by="scorer", candidates=ranked(NAMES[0]))
    unread = Prediction(path=str(run / "images" / "3.png"), error="Image '3.png' cannot be decoded.")
    unsure = predictions(run / "images")[:3]
    write_lines(run / "predictions.jsonl", [*[sure] * 50, *unsure, *unsure, unread])
    done = export(run, to, tmp_path / "out", review=["2"])
    assert (done.images, done.left_out) == (2, 0)
    if to == "csv":
        assert {row["path"] for row in table(tmp_path / "out")} <= {each.path for each in unsure}
    assert export(run, to, tmp_path / "most", review=["99"]).images == 56
    assert export(run, to, tmp_path / "reviewed", review=["abstained", "5"]).images == 2


def test_images_to_label_next_are_balanced_over_labels(tmp_path: Path) -> None:
    said = [
        Prediction(path=f"{name} {number}", label=name, probability=0.5, decided_by="scorer", candidates=ranked(name))
        for name in ("wren", "robin", "heron")
        for number in range(3)
    ]
    printed = write_lines(tmp_path / "printed.jsonl", said)
    export(printed, "csv", tmp_path / "out.csv", review=["6"])
    assert sorted(row["label"] for row in table(tmp_path / "out.csv")) == ["heron"] * 2 + ["robin"] * 2 + ["wren"] * 2

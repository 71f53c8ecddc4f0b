"""What people say about the images of a run: the file, what counts, and the files that it is imported from."""

import csv
import json
import multiprocessing
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue

from cascadevlm.base.annotation_files import ANOTHER, NONE
from cascadevlm.base.errors import DataError
from cascadevlm.base.tables import shortened
from cascadevlm.runs.correction_files import Imported, import_corrections
from cascadevlm.runs.corrections import CORRECTIONS, Correction, Corrections, add_corrections, read_corrections
from cascadevlm.runs.export import export
from tests.runs.test_export import NAMES, predictions, table, write_lines
from tests.runs.test_export import run as run  # a fixture

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
WREN, ROBIN, HERON = NAMES


def said(image: str, label: str | None, by: str = "", minutes: int = 0, *, skipped: bool = False) -> Correction:
    at = NOON + timedelta(minutes=minutes)
    return Correction(image=image, label=label, skipped=skipped, by=by, at=at, source="somewhere")


def counted(*corrections: Correction) -> dict[str, str | None]:
    return {image: each.label for image, each in Corrections(corrections).counting.items()}


def test_the_latest_label_counts_whatever_the_order_of_the_file() -> None:
    late, early = said("a", WREN, "ann", 5), said("a", ROBIN, "bob", 3)
    assert counted(late, early) == counted(early, late) == {"a": WREN}
    assert counted(late, said("a", None, "bob", 9)) == {"a": None}


def test_who_skips_says_nothing_and_takes_back_what_they_said() -> None:
    ann, skipped = said("a", WREN, "ann", 1), said("a", None, "bob", 5, skipped=True)
    assert counted(ann, skipped) == {"a": WREN}
    assert counted(ann, said("a", None, "ann", 5, skipped=True)) == {}
    found = Corrections((ann, said("b", None, "ann", 5, skipped=True)))
    assert (set(found.standing), set(found.counting)) == ({"a", "b"}, {"a"})


def test_people_who_disagree_are_kept_and_told() -> None:
    ann, bob = said("a", WREN, "ann", 1), said("a", None, "bob", 2)
    found = Corrections(
        (ann, bob, said("b", WREN, "ann"), said("b", WREN, "bob"), said("c", WREN, "ann"), said("c", ROBIN, "ann", 1))
    )
    assert found.conflicts == {"a": [ann, bob]}
    assert found.described_conflicts == ["a: ann said 'wren'; bob said none of the labels, which counts."]


texts = st.text(st.characters(), max_size=9)
statements = st.builds(
    Correction,
    image=texts,
    label=st.none() | texts,
    skipped=st.booleans(),
    by=texts,
    at=st.datetimes(timezones=st.just(UTC)),
    source=texts,
)


@given(st.lists(statements, max_size=6), st.integers(0, 10_000))
def test_a_kill_loses_only_the_last_line_and_what_is_added_again_is_there_once(
    tmp_path_factory: pytest.TempPathFactory, corrections: list[Correction], cut: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    add_corrections(folder, corrections)
    whole = (folder / CORRECTIONS).read_bytes()
    distinct = list({each.statement: each for each in reversed(corrections)}.values())[::-1]
    assert {each.statement for each in read_corrections(folder).all} == {each.statement for each in distinct}
    (folder / CORRECTIONS).write_bytes(whole[: cut % (len(whole) + 1)])
    left = read_corrections(folder).all
    assert len(left) == whole[: cut % (len(whole) + 1)].count(b"\n")
    added = add_corrections(folder, corrections)
    assert len(left) + len(added) == len(distinct) == len(read_corrections(folder).all)


def test_a_damaged_line_is_told(tmp_path: Path) -> None:
    add_corrections(tmp_path, [said("a", WREN), said("b", WREN)])
    content = (tmp_path / CORRECTIONS).read_text()
    (tmp_path / CORRECTIONS).write_text(content.replace('"a"', '"c"'))
    with pytest.raises(DataError, match=r"line 1, is damaged: its checksum is wrong\. Remove the line"):
        read_corrections(tmp_path)


def _add(folder: Path, start: Barrier) -> None:
    for number in range(20):
        start.wait()
        add_corrections(folder, [said(f"image {number}", WREN, "ann")])


def test_several_processes_may_import_the_same_file_at_the_same_time(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(3)
    people = [fork.Process(target=_add, args=(tmp_path, start)) for _ in range(3)]
    for each in people:
        each.start()
    for each in people:
        each.join()
    assert [each.image for each in read_corrections(tmp_path).all] == [f"image {number}" for number in range(20)]


@pytest.fixture
def images(run: Path) -> list[str]:
    """The names of the five images of the run, which has a whole manifest."""
    manifest: JsonValue = {
        "config": {"scorer": {"use": "fake:fake"}},
        "labels": [{"name": name} for name in NAMES],
        "inputs": "",
        "began": NOON.isoformat(),
        "versions": {},
        "machine": "",
        "contents": {},
    }
    (run / "manifest.json").write_text(json.dumps(manifest))
    return [each.path for each in predictions(run / "images")]


def write_rows(file: Path, rows: Sequence[dict[str, str]]) -> Path:
    """A table in the form that its suffix says."""
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        with file.open("w", newline="") as opened:
            delimiter = "\t" if file.suffix == ".tsv" else ";" if "semicolons" in file.name else ","
            writer = csv.DictWriter(opened, [*rows[0]], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    return file


@pytest.mark.parametrize("name", ["a.csv", "semicolons.csv", "a.tsv", "a.jsonl", "a.parquet"])
def test_every_table_is_imported_once(run: Path, images: list[str], tmp_path: Path, name: str) -> None:
    rows = [
        {"image": images[0], "label": ROBIN, "by": "ann", "when": "2026-05-01T12:00:00Z"},
        {"image": images[1], "label": "none", "by": "", "when": "2026-05-01T14:00:00+02:00"},
        {"image": images[2], "label": "skip", "by": "ann", "when": "2026-05-01"},
        {"image": images[4], "label": "", "by": "ann", "when": ""},
    ]
    file = write_rows(tmp_path / name, rows)
    done = import_corrections(file, run, by="bob")
    assert (done.added, done.known, done.without_label) == (3, 0, 1)
    first, second, third = read_corrections(run).all
    assert (first.image, first.label, first.by, first.at, first.source) == (images[0], ROBIN, "ann", NOON, str(file))
    assert (second.label, second.skipped, second.by, second.at) == (None, False, "bob", NOON)
    assert (third.label, third.skipped, third.at) == (None, True, NOON.replace(hour=0))
    again = import_corrections(Path(shutil.copy(file, tmp_path / f"copy of {name}")), run, by="bob")
    assert (again.added, again.known, len(again.corrections.all)) == (0, 3, 3)


def test_rows_without_a_time_are_of_the_time_of_the_file(run: Path, images: list[str], tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.csv", [{"path": images[0], "label": "wren"}])
    os.utime(file, (0, NOON.timestamp()))
    assert import_corrections(file, run).added == 1
    assert import_corrections(file, run).added == 0
    assert read_corrections(run).all[0].at == NOON


def test_images_may_be_named_by_their_absolute_paths(
    run: Path, images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    relative = [each.path for each in predictions(Path("run/images"))]
    write_lines(run / "predictions.jsonl", predictions(Path("run/images")))
    file = write_rows(tmp_path / "a.csv", [{"image": images[0], "label": WREN}, {"image": relative[1], "label": WREN}])
    assert [*import_corrections(file, run).corrections.counting] == relative[:2]


def faulty(run: Path, file: Path, rows: Sequence[dict[str, str]]) -> str:
    """The message about a table with errors. Nothing is imported."""
    with pytest.raises(DataError) as told:
        import_corrections(write_rows(file, rows), run)
    assert not (run / CORRECTIONS).exists()
    return str(told.value)


def test_all_errors_of_a_file_are_one_sentence_and_nothing_is_imported(run: Path, images: list[str], tmp_path: Path) -> None:
    good = {"image": images[0], "label": WREN}
    told = faulty(run, tmp_path / "a.csv", [good, good, {"image": "x.jpg", "label": WREN}, {"image": images[1], "label": "wrem"}])
    assert "1 images are not in the run ('x.jpg, line 4')" in told
    assert "1 labels are not in the label set ('wrem, line 5')" in told
    assert "Did you mean 'wren'?" in told
    assert f"1 images occur more than once ({shortened(images[0])!r})" in told
    assert "Nothing was imported." in told


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"image": "a", "species": WREN}], "has no column 'label'. Its columns: 'image', 'species'."),
        ([{"image": "", "label": WREN}], "line 2 has no image; the columns are 'image', 'label'"),
        (
            [{"image": "a", "label": WREN, "when": "yesterday"}],
            "line 2 has 'yesterday' in the column 'when', which is not a time",
        ),
        ([{"image": "a", "label": WREN, "when": "1712010412345"}], "'1712010412345' in the column 'when', which is not a time"),
    ],
)
def test_tables_of_another_form_are_told(
    run: Path, images: list[str], tmp_path: Path, rows: list[dict[str, str]], sentence: str
) -> None:
    assert sentence in faulty(run, tmp_path / "a.csv", rows)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.json", "{", "cannot be read"),
        ("a.json", '{"a": 1}', "it is not an export of Label Studio or FiftyOne"),
        ("a.json", '[{"id": 1}]', "updated_at: Field required"),
        ("a.json", '{"classes": ["wren"], "labels": {"a": 7}}', "the label of 'a' is neither a name nor a class"),
        ("a.csv", "image,label,label\na,b,c\n", "it contains a column more than once: 'label'"),
        ("a.jsonl", "[]\n", "has no column 'label'. Its columns: 'path'."),
        ("a.parquet", "x", "cannot be read"),
        ("a.xml", "x", "the suffix '.xml' is unknown"),
    ],
)
def test_files_of_another_form_are_told(
    run: Path, images: list[str], tmp_path: Path, name: str, text: str, sentence: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as told:
        import_corrections(tmp_path / name, run)
    assert sentence in str(told.value)
    assert name in str(told.value)
    with pytest.raises(DataError, match="No such file"):
        import_corrections(tmp_path / "missing.csv", run)
    with pytest.raises(DataError, match="is not the manifest of a run"):
        import_corrections(tmp_path / name, tmp_path)
    with pytest.raises(DataError, match=r"The folder '.*nowhere' does not exist\."):
        import_corrections(tmp_path / name, tmp_path / "nowhere")


def task(number: int, image: str, *annotations: JsonValue) -> JsonValue:
    return {"id": number, "data": {"path": image, "image": "/data/x", "label": "robin"}, "annotations": [*annotations]}


def annotation(person: JsonValue, minutes: int, choice: str = "", other: str = "", *, cancelled: bool = False) -> JsonValue:
    """In the form that Label Studio 1.23 exports."""
    result: list[JsonValue] = []
    if choice:
        result.append({"from_name": "choice", "to_name": "image", "type": "choices", "value": {"choices": [choice]}})
    if other:
        result.append({"from_name": "other", "to_name": "image", "type": "taxonomy", "value": {"taxonomy": [[other]]}})
    at = (NOON + timedelta(minutes=minutes)).isoformat()
    return {
        "completed_by": person,
        "result": result,
        "was_cancelled": cancelled,
        "created_at": NOON.isoformat(),
        "updated_at": at,
    }


def imported(run: Path, file: Path, content: JsonValue) -> Imported:
    file.write_text(json.dumps(content))
    return import_corrections(file, run)


def test_label_studios_exports_hold_several_people(run: Path, images: list[str], tmp_path: Path) -> None:
    tasks: list[JsonValue] = [
        task(1, images[0], annotation(1, 0, WREN), annotation({"id": 2, "email": "bob@x.org"}, 1, ANOTHER, HERON)),
        task(2, images[1], annotation(1, 0, NONE), annotation(2, 1, WREN, HERON)),
        task(3, images[2], annotation(1, 0, cancelled=True)),
        task(4, images[4], annotation(1, 0, ANOTHER)),
    ]
    done = imported(run, tmp_path / "a.json", tasks)
    assert (done.added, done.without_label, [*done.corrections.conflicts]) == (5, 1, images[:2])
    found = [(each.image, each.label, each.skipped, each.by) for each in done.corrections.all]
    assert found == [
        (images[0], WREN, False, "user 1"),
        (images[0], HERON, False, "bob@x.org"),
        (images[1], None, False, "user 1"),
        (images[1], WREN, False, "user 2"),
        (images[2], None, True, "user 1"),
    ]
    short: list[JsonValue] = [
        {
            "id": 1,
            "path": images[0],
            "image": "/x",
            "label": ROBIN,
            "choice": WREN,
            "annotator": 1,
            "updated_at": NOON.isoformat(),
        },
        {
            "id": 4,
            "path": images[4],
            "choice": ANOTHER,
            "other": [{"taxonomy": [[HERON]]}],
            "annotator": 2,
            "updated_at": NOON.isoformat(),
        },
    ]
    again = imported(run, tmp_path / "short.json", short)
    assert (again.added, again.known) == (1, 1)
    assert again.corrections.counting[images[4]].label == HERON


def test_classes_that_are_named_none_and_skip_are_no_words_of_ours(run: Path, images: list[str], tmp_path: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["labels"] += [{"name": "none"}, {"name": "skip"}]
    (run / "manifest.json").write_text(json.dumps(manifest))
    tasks: list[JsonValue] = [
        task(1, images[0], annotation(1, 0, cancelled=True)),
        task(2, images[1], annotation(1, 0, NONE)),
        task(3, images[2], annotation(1, 0, "none")),
        task(4, images[4], annotation(1, 0, ANOTHER, "skip")),
    ]
    done = imported(run, tmp_path / "a.json", tasks)
    assert [(each.label, each.skipped) for each in done.corrections.all] == [
        (None, True),
        (None, False),
        ("none", False),
        ("skip", False),
    ]
    add_corrections(tmp_path, [said(images[0], None, "bob", skipped=True), said(images[1], None, "bob")])
    found = import_corrections(tmp_path / CORRECTIONS, run).corrections.all[-2:]
    assert [(each.label, each.skipped) for each in found] == [(None, True), (None, False)]


def test_a_table_that_was_exported_is_imported_whatever_the_names_of_its_images(
    run: Path, images: list[str], tmp_path: Path
) -> None:
    names = ["@a.png", "-b.png", "=c.png", "+d.png", "'e.png"]
    said = [replace(each, path=name) for each, name in zip(predictions(run / "images"), names, strict=True)]
    write_lines(run / "predictions.jsonl", said)
    export(run, "csv", tmp_path / "out.csv")
    assert "'@a.png" in (tmp_path / "out.csv").read_text()
    done = import_corrections(tmp_path / "out.csv", run)
    assert {image: each.label for image, each in done.corrections.counting.items()} == {
        "@a.png": WREN,
        "-b.png": ROBIN,
        "'e.png": HERON,
    }


def test_two_names_of_one_image_are_one_image(
    run: Path, images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(run / "predictions.jsonl", predictions(Path("run/images")))
    name = predictions(Path("run/images"))[0].path
    told = faulty(run, tmp_path / "a.csv", [{"image": images[0], "label": WREN}, {"image": name, "label": ROBIN}])
    assert f"1 images occur more than once ({shortened(name)!r})" in told


def test_an_annotation_with_several_labels_is_refused(run: Path, images: list[str], tmp_path: Path) -> None:
    both: JsonValue = {"value": {"choices": [WREN, ROBIN]}}
    given: JsonValue = {"completed_by": 1, "result": [both], "updated_at": NOON.isoformat()}
    with pytest.raises(DataError, match=r"1 statements name several labels \('task 7'\)"):
        imported(run, tmp_path / "a.json", [task(7, images[0], given)])


def test_fiftyones_labels_are_numbers_names_or_objects(run: Path, images: list[str], tmp_path: Path) -> None:
    labels: JsonValue = {images[0]: {"label": 1, "confidence": None}, images[1]: HERON, images[2]: None, images[4]: 0}
    done = imported(run, tmp_path / "labels.json", {"classes": [*NAMES], "labels": labels})
    assert {image: each.label for image, each in done.corrections.counting.items()} == {
        images[0]: ROBIN,
        images[1]: HERON,
        images[4]: WREN,
    }
    assert done.without_label == 1


def test_another_runs_corrections_are_imported(run: Path, images: list[str], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    given = [said(images[0], WREN, "ann"), said(images[1], None, "ann"), said(images[2], None, "ann", skipped=True)]
    add_corrections(tmp_path / "other", given)
    import_corrections(tmp_path / "other" / CORRECTIONS, run)
    assert [each.statement for each in read_corrections(run).all] == [each.statement for each in given]


def test_an_export_has_the_labels_of_people_and_says_who_decided(run: Path, images: list[str], tmp_path: Path) -> None:
    add_corrections(run, [said(images[0], ROBIN), said(images[1], None), said(images[2], None, skipped=True)])
    export(run, "csv", tmp_path / "out.csv")
    rows = [(row["label"], row["decided_by"], row["probability"]) for row in table(tmp_path / "out.csv")]
    assert rows[:3] == [(ROBIN, "person", ""), ("", "person", ""), ("", "", "")]
    assert rows[4] == (HERON, "fusion", "0.75")


def test_reviewed_images_are_not_reviewed_again_but_belong_to_the_random_sample(
    run: Path, images: list[str], tmp_path: Path
) -> None:
    def selected(number: int, *review: str) -> set[str]:
        export(run, "csv", tmp_path / f"{number}.csv", review=review)
        return {row["path"] for row in table(tmp_path / f"{number}.csv")}

    readable = {images[number] for number in (0, 1, 2, 4)}
    (first,) = selected(1, "random 1")
    assert selected(2, "random 4") == selected(3, "9") == readable
    add_corrections(run, [said(first, None, skipped=True)])
    with pytest.raises(DataError, match="nothing to review"):
        selected(4, "random 1")
    assert selected(5, "random 4") == selected(6, "9") == readable - {first}


@pytest.mark.parametrize(
    ("review", "numbers"),
    [
        (["confidence < 0.6"], [0, 1, 2]),
        (["confidence<0.31"], [0]),
        (["abstained"], [2]),
        (["refused"], [2]),
        (["answered"], [1]),
        (["answered", "confidence < 0.2"], []),
        (["confidence < 0.6", "random 9"], [0, 1, 2]),
    ],
)
def test_a_review_is_selected_by_confidence_or_verdict(
    run: Path, images: list[str], tmp_path: Path, review: list[str], numbers: list[int]
) -> None:
    if not numbers:
        with pytest.raises(DataError, match="nothing to review"):
            export(run, "csv", tmp_path / "out.csv", review=review)
        return
    export(run, "csv", tmp_path / "out.csv", review=review)
    assert [row["path"] for row in table(tmp_path / "out.csv")] == [images[number] for number in numbers]

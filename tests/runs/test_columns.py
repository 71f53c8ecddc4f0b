"""Tables as people have them: any column, ids and kept columns, from the input to every output."""

import csv
import datetime
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue

from cascadevlm import Cascade
from cascadevlm.base.annotation_files import ANOTHER, NONE, AnnotationFile
from cascadevlm.base.errors import DataError
from cascadevlm.base.image_table import ImageTable
from cascadevlm.base.images import load_image
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.tables import ColumnNames
from cascadevlm.evaluation.data import read_data
from cascadevlm.evaluation.record import read_record
from cascadevlm.evaluation.record_frame import record_frame
from cascadevlm.runs import bulk
from cascadevlm.runs.export import export
from cascadevlm.runs.inputs import Inputs
from cascadevlm.runs.lines import KeptTypes, Line
from cascadevlm.runs.tally import Tally
from cascadevlm.testing import FakeScorer, noise

LABELS = LabelSet.of(["ant", "bee"])
TRUTHS = ("bee", "ant", "bee")
SKUS = ("A-1", "A-2", "B-1")
PRICES = (3.5, None, 2.0)
COLUMNS = ColumnNames(image="photo", label="kind", id="sku", keep=("price",))


def files(folder: Path) -> list[str]:
    (folder / "images").mkdir()
    for number in range(3):
        noise(number, (8, 8)).save(folder / "images" / f"{number}.png")
    return [f"images/{number}.png" for number in range(3)]


def rows(folder: Path) -> list[dict[str, JsonValue]]:
    return [
        {"photo": file, "kind": truth, "sku": sku, "price": price}
        for file, truth, sku, price in zip(files(folder), TRUTHS, SKUS, PRICES, strict=True)
    ]


def separated(delimiter: str) -> Callable[[Path, list[dict[str, JsonValue]]], None]:
    def write(path: Path, rows: list[dict[str, JsonValue]]) -> None:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, [*rows[0]], delimiter=delimiter)
            table.writeheader()
            table.writerows(rows)

    return write


def json_lines(path: Path, rows: list[dict[str, JsonValue]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def parquet(path: Path, rows: list[dict[str, JsonValue]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


def with_bytes(path: Path, rows: list[dict[str, JsonValue]]) -> None:
    stored = [{**row, "photo": (path.parent / str(row["photo"])).read_bytes()} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(stored), path, row_group_size=2)


def of_datasets(folder: Path, rows: list[dict[str, JsonValue]]) -> datasets.Dataset:
    kinds = {"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["bee", "ant"])}
    features = datasets.Features({**kinds, "sku": datasets.Value("string"), "price": datasets.Value("float64")})
    columns: dict[str, list[object]] = {name: [row[name] for row in rows] for name in rows[0]}
    columns["photo"] = [{"bytes": (folder / str(name)).read_bytes(), "path": None} for name in columns["photo"]]
    columns["kind"] = [["bee", "ant"].index(str(kind)) for kind in columns["kind"]]
    return datasets.Dataset.from_dict(columns, features=features)


def hub_parquet(path: Path, rows: list[dict[str, JsonValue]]) -> None:
    of_datasets(path.parent, rows).to_parquet(path)


def saved(path: Path, rows: list[dict[str, JsonValue]]) -> None:
    of_datasets(path.parent, rows).save_to_disk(path, num_shards=2)


def hub_folder(path: Path, rows: list[dict[str, JsonValue]]) -> None:
    (path / "data").mkdir(parents=True)
    for shard in range(2):
        of_datasets(path.parent, rows[2 * shard : 2 * shard + 2]).to_parquet(
            path / "data" / f"train-0000{shard}-of-00002.parquet"
        )


def coco(path: Path, rows: list[dict[str, JsonValue]]) -> None:
    images = [{"id": number, "file_name": row["photo"], "photo": row["photo"], **row} for number, row in enumerate(rows)]
    annotations = [{"image_id": each["id"], "category_id": 1 + (each["kind"] == "bee"), "bbox": [0, 0, 1, 1]} for each in images]
    categories = [{"id": 1, "name": "ant"}, {"id": 2, "name": "bee"}]
    for each in images:
        del each["kind"]
    path.write_text(json.dumps({"images": images, "annotations": annotations * 2, "categories": categories}))


def label_studio(path: Path, rows: list[dict[str, JsonValue]]) -> None:
    def given(kind: JsonValue, **more: JsonValue) -> JsonValue:
        return {"result": [{"type": "choices", "value": {"choices": [kind]}}], **more}

    tasks = [
        {
            "id": number,
            "data": {**row, "photo": f"/data/local-files/?d={row['photo']}"},
            "annotations": [given("wasp"), given(row["kind"]), given("wasp", was_cancelled=True)],
        }
        for number, row in enumerate(rows)
    ]
    path.write_text(json.dumps(tasks))


def json_min(path: Path, rows: list[dict[str, JsonValue]]) -> None:
    path.write_text(json.dumps([{**row, "photo": f"/data/local-files/?d={row['photo']}"} for row in rows]))


FORMS: dict[str, Callable[[Path, list[dict[str, JsonValue]]], None]] = {
    "comma.csv": separated(","),
    "semicolon.csv": separated(";"),
    "tab.tsv": separated("\t"),
    "lines.jsonl": json_lines,
    "paths.parquet": parquet,
    "bytes.parquet": with_bytes,
    "hub.parquet": hub_parquet,
    "saved": saved,
    "hub": hub_folder,
    "coco.json": coco,
    "label_studio.json": label_studio,
    "list.json": json_min,
}
LABEL = {"coco.json": "label", "label_studio.json": "label"}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_images_ids_and_truths(tmp_path: Path, name: str) -> None:
    FORMS[name](tmp_path / name, rows(tmp_path))
    columns = COLUMNS.model_copy(update={"label": LABEL.get(name, "kind")})
    inputs, data = Inputs(tmp_path / name, columns), read_data(tmp_path / name, LABELS, columns)
    expected = [noise(number, (8, 8)).tobytes() for number in range(3)]
    assert [load_image(source).tobytes() for _, source in inputs] == expected
    assert [load_image(source).tobytes() for source in data.images] == expected
    assert load_image(data.take(np.array([2, 0])).images[1]).tobytes() == expected[0]
    assert len(inputs) == len(data) == 3
    assert [*inputs.names()] == [*data.names] == [image for image, _ in inputs]
    as_text = name.endswith(("csv", "tsv"))
    prices = ["3.5", "", "2.0"] if as_text else [*PRICES]
    told = [{"id": sku, "kept": {"price": price}} for sku, price in zip(SKUS, prices, strict=True)]
    assert [*inputs.about()] == [*data.about] == told
    assert [*inputs.about(range(1, 9))] == told[1:]
    assert data.truths == TRUTHS
    assert data.splits == (("train",) * 3 if name == "hub" else ("",) * 3)


def test_the_columns_of_a_hub_dataset_need_no_names(tmp_path: Path) -> None:
    hub_parquet(tmp_path / "hub.parquet", rows(tmp_path))
    data = read_data(tmp_path / "hub.parquet", LABELS)
    assert (data.truths, data.names) == (TRUTHS, ("#0", "#1", "#2"))


def run(source: Path, folder: Path, columns: ColumnNames = COLUMNS, *, stop: int = 99) -> Tally:
    calls = iter(range(99))
    cascade = Cascade(FakeScorer(), [], labels=LABELS, batch_size=1)
    return bulk.run(cascade, Inputs(source, columns), folder, config={}, stopping=lambda: next(calls) >= stop)


def test_ids_and_kept_columns_reach_every_output(tmp_path: Path) -> None:
    parquet(tmp_path / "table.parquet", rows(tmp_path))
    keep = ("price", "kind", "photo", "label")
    table = pyarrow.parquet.read_table(tmp_path / "table.parquet").append_column("label", pyarrow.array([1, 2, 3]))
    pyarrow.parquet.write_table(table, tmp_path / "table.parquet")
    columns = COLUMNS.model_copy(update={"keep": keep})
    assert run(tmp_path / "table.parquet", tmp_path / "run", columns, stop=1).images < 3
    assert run(tmp_path / "table.parquet", tmp_path / "run", columns).images == 3
    lines = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [*SKUS]
    assert [line["kept"]["price"] for line in lines] == [*PRICES]
    for to in ("parquet", "csv", "hf", "coco", "label-studio"):
        assert export(tmp_path / "run", to, tmp_path / to).images == 3
    for path in (tmp_path / "run" / "predictions.parquet", tmp_path / "parquet"):
        read = pyarrow.parquet.read_table(path)
        assert read["id"].to_pylist() == [*SKUS]
        assert read["price"].to_pylist() == [*PRICES]
        assert read["price"].type == pyarrow.float64()
        assert read["input.label"].to_pylist() == [1, 2, 3]
        assert read["kind"].to_pylist() == [*TRUTHS]
        assert set(read["label"].to_pylist()) <= {"ant", "bee"}
    with (tmp_path / "csv").open(newline="") as file:
        first = next(csv.DictReader(file))
    assert (first["id"], first["price"], first["input.label"]) == ("A-1", "3.5", "1")
    loaded = datasets.load_from_disk(str(tmp_path / "hf"))
    assert (loaded["id"][:], loaded["price"][:], loaded["input.label"][:]) == ([*SKUS], [*PRICES], [1, 2, 3])
    (image, *_) = json.loads((tmp_path / "coco").read_text())["images"]
    assert (image["id"], image["input.id"], image["price"]) == (1, "A-1", 3.5)


def test_failures_have_ids(tmp_path: Path) -> None:
    parquet(tmp_path / "table.parquet", rows(tmp_path))
    for number in (1, 2):
        (tmp_path / "images" / f"{number}.png").write_text("no image")
    for stop in (2, 99):
        run(tmp_path / "table.parquet", tmp_path / "run", stop=stop)
    told = [json.loads(line) for line in (tmp_path / "run" / "failures.jsonl").read_text().splitlines()]
    assert [(row["image"], row["id"]) for row in told] == [(1, SKUS[1]), (2, SKUS[2])]


@pytest.mark.parametrize("name", ["comma.csv", "paths.parquet"])
def test_shuffled_images_keep_their_own_ids(tmp_path: Path, name: str) -> None:
    FORMS[name](tmp_path / name, rows(tmp_path))
    inputs = Inputs(tmp_path / name, COLUMNS, shuffled=True)
    of_name = dict(zip(Inputs(tmp_path / name, COLUMNS).names(), SKUS, strict=True))
    assert [of_name[image] for image in inputs.names()] == [told["id"] for told in inputs.about()]
    assert [told["id"] for told in inputs.about(range(1, 3))] == [of_name[image] for image in inputs.names()][1:]


def test_a_record_has_the_ids_and_kept_columns(tmp_path: Path) -> None:
    parquet(tmp_path / "table.parquet", rows(tmp_path))
    data = read_data(tmp_path / "table.parquet", LABELS, COLUMNS)
    bulk.run(Cascade(FakeScorer(), [], labels=LABELS), data, tmp_path / "record", config={})
    record = read_record(tmp_path / "record").take(np.array([2, 0]))
    assert [each["id"] for each in record.about] == ["B-1", "A-1"]
    frame = record_frame(record, "pyarrow")
    assert isinstance(frame, pyarrow.Table)
    assert frame["id"].to_pylist() == ["B-1", "A-1"]
    assert frame["price"].to_pylist() == [2.0, 3.5]
    assert frame["truth"].to_pylist() == ["bee", "bee"]


def test_a_run_does_not_continue_with_other_columns_or_ids(tmp_path: Path) -> None:
    listed = rows(tmp_path)
    json_lines(tmp_path / "table.jsonl", listed)
    run(tmp_path / "table.jsonl", tmp_path / "run", stop=2)
    other = COLUMNS.model_copy(update={"keep": ()})
    told = (
        "its images were read with --image photo --label kind --id sku --keep price and are now read with --image photo --label"
    )
    with pytest.raises(DataError, match=told):
        run(tmp_path / "table.jsonl", tmp_path / "run", other)
    json_lines(tmp_path / "table.jsonl", [{**listed[0], "sku": "C-1"}, *listed[1:]])
    with pytest.raises(DataError, match=r"The id of image 0 of .*run' was 'A-1' and is now 'C-1'\. Give another folder\."):
        run(tmp_path / "table.jsonl", tmp_path / "run")
    json_lines(tmp_path / "table.jsonl", [{**listed[0], "price": 99.0}, *listed[1:]])
    assert run(tmp_path / "table.jsonl", tmp_path / "run").images == 3


@pytest.mark.parametrize("name", ["lines.jsonl", "comma.csv", "paths.parquet", "bytes.parquet"])
@pytest.mark.parametrize(
    ("columns", "skus", "told"),
    [
        (
            {"image": "foto"},
            SKUS,
            r"has no column 'foto'\. Did you mean 'photo'\? Its columns: 'photo', 'kind', 'sku', 'price'\.",
        ),
        ({"id": "nothing"}, SKUS, r"has no column 'nothing'\. Its columns: 'photo'"),
        ({"keep": ("price", "prise")}, SKUS, r"has no column 'prise'\. Did you mean 'price'\?"),
        ({"image": None}, SKUS, r"has no column 'path'\."),
        ({}, ("A", "B", "A"), r"1 ids in the column 'sku' of .* occur more than once: 'A'\."),
        ({}, ("A", None, "B"), r"(line [23]|row 1, counted from 0,) has no id in its column 'sku'\."),
    ],
)
def test_what_is_wrong_with_columns_is_told_before_the_run(
    tmp_path: Path, name: str, columns: dict[str, object], skus: tuple[str | None, ...], told: str
) -> None:
    listed = [{**row, "sku": sku} for row, sku in zip(rows(tmp_path), skus, strict=True)]
    FORMS[name](tmp_path / name, listed)
    for read in (Inputs, lambda path, names: read_data(path, LABELS, names)):
        with pytest.raises(DataError, match=told) as caught:
            len(read(tmp_path / name, COLUMNS.model_copy(update=columns)))
        assert str(caught.value).count("\n") == 0


def test_images_are_no_kept_column_and_folders_have_no_columns(tmp_path: Path) -> None:
    with_bytes(tmp_path / "table.parquet", rows(tmp_path))
    with pytest.raises(DataError, match=r"The column 'photo' of .* contains images, which results cannot contain"):
        Inputs(tmp_path / "table.parquet", ColumnNames(image="photo", keep=("photo",)))
    with pytest.raises(DataError, match=r"is a folder of images, which has no columns\. Leave out: --id sku\."):
        Inputs(tmp_path / "images", ColumnNames(id="sku"))


def test_values_that_json_does_not_have_are_texts(tmp_path: Path) -> None:
    day = datetime.date(2026, 1, 2)
    numbers = {"nan": [float("nan")], "inf": [float("-inf")], "big": [2**60]}
    table = pyarrow.table({"path": ["a"], "day": [day], "list": [[1, 2]], **numbers})
    pyarrow.parquet.write_table(table, tmp_path / "table.parquet")
    (told,) = Inputs(tmp_path / "table.parquet", ColumnNames(keep=("day", "nan", "inf", "list", "big"))).about()
    assert told == {"kept": {"day": "2026-01-02", "nan": None, "inf": None, "list": "[1, 2]", "big": 2**60}}


def test_an_image_with_several_labels_is_told(tmp_path: Path) -> None:
    coco(tmp_path / "coco.json", rows(tmp_path))
    told = json.loads((tmp_path / "coco.json").read_text())
    told["annotations"].append({"image_id": 1, "category_id": 2})
    (tmp_path / "coco.json").write_text(json.dumps(told))
    with pytest.raises(DataError, match=r"entry 2 has several labels in its column 'label': \['ant', 'bee'\]"):
        read_data(tmp_path / "coco.json", LABELS)
    assert len(Inputs(tmp_path / "coco.json")) == 3
    (tmp_path / "other.json").write_text('{"images": 5}')
    with pytest.raises(DataError, match="neither COCO, nor an export of Label Studio, nor a list of objects"):
        Inputs(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("ids", "annotated", "told"),
    [
        ([1, 2, 2], [1], r"several images have the same id: '2 \(number\)'\."),
        ([1, 2], [2, 7], r"annotations have an image_id that no image has: '7 \(number\)'; ids of images: '1 \(number\)', '2"),
        (["2"], [2], r"annotations have an image_id that no image has: '2 \(number\)'; ids of images: '2 \(text\)'\."),
        ([], [2], r"no image has: '2 \(number\)'; ids of images: none\."),
    ],
)
def test_annotations_that_belong_to_no_single_image_are_told(
    tmp_path: Path, ids: list[int | str], annotated: list[int], told: str
) -> None:
    images = [{"id": each, "file_name": f"{number}.png"} for number, each in enumerate(ids)]
    annotations = [{"image_id": each, "category_id": 1} for each in annotated]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "ant"}]}
    (tmp_path / "coco.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=told):
        read_data(tmp_path / "coco.json", LABELS)


@pytest.mark.parametrize("short", [True, False])
def test_labels_of_people_in_the_tasks_of_a_run_are_the_truths(tmp_path: Path, short: bool) -> None:
    """The data of a task contain the label of the cascade."""
    chosen: list[tuple[str, str]] = [("ant", ""), (ANOTHER, "bee"), (NONE, "")]
    tasks: list[JsonValue] = []
    for number, (choice, other) in enumerate(chosen):
        data: dict[str, JsonValue] = {"path": f"{number}.png", "image": "/data/local-files/?d=x.png", "label": "wasp"}
        listed: list[JsonValue] = [{"taxonomy": [[other]]}] if other else []
        if short:
            said: dict[str, JsonValue] = {"choice": choice, "other": listed, "updated_at": "2026-05-01T12:00:00Z"}
            tasks.append({**data, "id": number, **said})
        else:
            values: list[JsonValue] = [{"value": {"choices": [choice]}}, *({"value": each} for each in listed)]
            tasks.append({"id": number, "data": data, "annotations": [{"result": values}, {"was_cancelled": True}]})
    (tmp_path / "a.json").write_text(json.dumps(tasks))
    table = ImageTable(AnnotationFile(tmp_path / "a.json"), labelled=True)
    assert [entry.truth for entry in table.entries()] == ["ant", "bee", ""]
    assert [row.cells["image"] for row in table.table.rows(["image"])] == ["x.png"] * 3


def test_large_integers_next_to_fractions_are_numbers(tmp_path: Path) -> None:
    json_lines(tmp_path / "a.jsonl", [{"path": "a", "n": 2**53 + 1}, {"path": "b", "n": 0.5}])
    run(tmp_path / "a.jsonl", tmp_path / "run", ColumnNames(keep=("n",)))
    read = pyarrow.parquet.read_table(tmp_path / "run" / "predictions.parquet")
    assert read["n"].to_pylist() == [float(2**53), 0.5]


def test_text_that_is_not_utf_8_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"path,label\na.png,m\xe9sange\n")
    with pytest.raises(DataError, match="line 2 contains text in its column 'label' that is not UTF-8"):
        read_data(tmp_path / "a.csv", LABELS)
    with pytest.raises(DataError, match="line 2 contains text in its column 'label' that is not UTF-8"):
        len(Inputs(tmp_path / "a.csv", ColumnNames(keep=("label",))))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", "image\tprice,EUR,net\n1,5.png\t3\n"),
        ("a.tsv", 'image;"price,EUR,net"\n1,5.png;3\n'),
        ("a.csv", 'image;"price,EUR,net";sku\n1,5.png;3;\n'),
        ("a.csv", 'sep=;\r\nimage;"price,EUR,net"\r\n1,5.png;3\r\n'),
        ("a.csv", 'image,"price,EUR,net"\n"1,5.png",3,,\n'),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_separator_and_the_encoding_of_a_table_are_found(tmp_path: Path, name: str, content: str, encoding: str) -> None:
    (tmp_path / name).write_bytes(content.encode(encoding))
    inputs = Inputs(tmp_path / name, ColumnNames(keep=("price,EUR,net",)))
    assert [*inputs.names()] == [str(tmp_path / "1,5.png")]
    assert [*inputs.about()] == [{"kept": {"price,EUR,net": "3"}}]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_a_list_of_paths_may_be_written_by_windows(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes("Größe.png\r\nb.png\r\n".encode(encoding))
    assert [*Inputs(tmp_path / "a.txt").names()] == [str(tmp_path / "Größe.png"), str(tmp_path / "b.png")]


def test_the_line_after_a_named_separator_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sep=;\nimage;kind\na.png;b;c\n")
    with pytest.raises(DataError, match="line 3 has 3 cells, and the header has 2"):
        len(Inputs(tmp_path / "a.csv"))


def test_a_column_that_occurs_twice_in_parquet_is_told(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names=["path", "sku", "sku"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"cannot be read: it contains a column more than once: 'sku'\."):
        Inputs(tmp_path / "a.parquet", ColumnNames(id="sku"))


def test_kept_columns_do_not_replace_the_data_of_a_task(tmp_path: Path) -> None:
    listed = [{**row, "choice": "mine", "reasoning": "x", "=n": 1} for row in rows(tmp_path)]
    json_lines(tmp_path / "a.jsonl", listed)
    run(tmp_path / "a.jsonl", tmp_path / "run", COLUMNS.model_copy(update={"keep": ("choice", "reasoning", "=n")}))
    export(tmp_path / "run", "label-studio", tmp_path / "out")
    data = json.loads((tmp_path / "out" / "tasks.json").read_text())[0]["data"]
    assert (data["input.choice"], data["input.reasoning"], data["reasoning"]) == ("mine", "x", "No judge was asked.")
    assert "choice" not in data
    export(tmp_path / "run", "fiftyone", tmp_path / "labels.json")
    target = next(iter(json.loads((tmp_path / "labels.json").read_text())["labels"].values()))
    assert (target["attributes"]["input_id"], target["attributes"]["choice"]) == ("A-1", "mine")
    assert target["attributes"]["input_reasoning"] == "x"
    export(tmp_path / "run", "csv", tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text().splitlines()[0].endswith(",choice,reasoning,'=n")


@given(st.lists(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=3))))
def test_one_type_holds_all_values_of_a_column(values: list[JsonValue]) -> None:
    lines = [Line.model_construct(kept={"c": value}) for value in values]
    kept = KeptTypes(["c"])
    for line in lines:
        kept.add(line)
    schema = pyarrow.schema(kept.schema(()))
    read = pyarrow.Table.from_pylist([kept.cells(line, ()) for line in lines], schema=schema)["c"].to_pylist()
    assert [value is None for value in read] == [value is None for value in values]
    if kept.type_of("c") != "string":
        assert read == values

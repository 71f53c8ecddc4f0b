"""Labelled data from every source: the images, names and truths are the same for all forms."""

import csv
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import datasets
import numpy as np
import pandas
import polars
import pyarrow
import pyarrow.parquet
import pytest
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cascadevlm import Cascade
from cascadevlm.base.errors import DataError
from cascadevlm.base.images import ImageSource, load_image
from cascadevlm.base.labels import Label, LabelSet
from cascadevlm.base.tables import LONGEST_SHOWN, ColumnNames
from cascadevlm.evaluation.data import Data, read_data, stratified
from cascadevlm.judges.support import SupportSet
from cascadevlm.runs.inputs import Inputs
from cascadevlm.testing import FakeScorer, noise

LABELS = LabelSet.of([Label(name="ant", aliases=("Formica",)), "bee", "007"])
TRUTHS = ("007", "007", "ant", "ant", "bee", "bee")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images of each of three classes."""
    for number, truth in enumerate(TRUTHS):
        file = tmp_path / "images" / truth / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        noise(number).save(file)
    return tmp_path / "images"


def pixels(data: Data) -> list[bytes]:
    return [load_image(image).tobytes() for image in data.images]


def expected() -> list[bytes]:
    return [noise(number).tobytes() for number in range(len(TRUTHS))]


def rows(folder: Path) -> list[dict[str, str]]:
    files = sorted(folder.rglob("*.png"))
    splits = ("test", "", "test", "train", "test", "train")
    return [
        {"path": str(file.relative_to(folder.parent)), "label": file.parent.name, "split": split}
        for file, split in zip(files, splits, strict=True)
    ]


def write_csv(path: Path, rows: Sequence[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:  # as spreadsheets save it
        writer = csv.DictWriter(file, ["split", "note", *(set(rows[0]) - {"split"})])
        writer.writeheader()
        writer.writerows({**row, "note": 'a "note",\nof two lines'} for row in rows)


def write_jsonl(path: Path, rows: Sequence[dict[str, str]]) -> None:
    lines = [json.dumps({name: value or None for name, value in row.items()}, ensure_ascii=False) for row in rows]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def write_parquet(path: Path, rows: Sequence[dict[str, str]]) -> None:
    table = pyarrow.Table.from_pylist([{**row, "thumbnail": b"..."} for row in rows])
    label = table.column("label").dictionary_encode()  # as pandas writes categories
    pyarrow.parquet.write_table(table.set_column(table.column_names.index("label"), "label", label), path)


TABLES: dict[str, Callable[[Path, Sequence[dict[str, str]]], None]] = {
    "data.csv": write_csv,
    "data.JSONL": write_jsonl,
    "data.parquet": write_parquet,
}


def test_a_folder_of_folders(folder: Path) -> None:
    (folder / "ant" / ".ipynb_checkpoints").mkdir()
    noise(9).save(folder / "ant" / ".ipynb_checkpoints" / "9.png")
    (folder / ".hidden").mkdir()
    noise(9).save(folder / ".hidden" / "9.png")
    noise(9).save(folder / "ant" / "._2.png")
    noise(9).save(folder / "of no class.png")
    (folder / "ant" / "notes.txt").write_text("no image")
    (folder / "empty").mkdir()
    data = read_data(str(folder), LABELS)
    assert data.truths == TRUTHS
    assert data.names == tuple(str(folder / truth / f"{number}.png") for number, truth in enumerate(TRUTHS))
    assert data.splits == ("",) * 6
    assert pixels(data) == expected()


@pytest.mark.parametrize("name", TABLES)
def test_a_table(folder: Path, name: str) -> None:
    TABLES[name](folder.parent / name, rows(folder))
    data = read_data(folder.parent / name, LABELS)
    assert data.truths == TRUTHS
    assert data.splits == ("test", "", "test", "train", "test", "train")
    assert data.names[0] == str(folder / "007" / "0.png")
    assert pixels(data) == expected()
    test = data.split("test")
    assert test.truths == ("007", "ant", "bee")
    assert pixels(test) == expected()[::2]
    with pytest.raises(DataError, match=r"no split 'val'\. Splits of the data: 'test', 'train'\."):
        data.split("val")


@pytest.mark.parametrize("name", TABLES)
def test_a_table_needs_no_splits_and_takes_absolute_paths(folder: Path, name: str) -> None:
    path = folder.parent / "elsewhere" / name
    path.parent.mkdir()
    TABLES[name](path, [{"path": str(folder.parent / row["path"]), "label": row["label"]} for row in rows(folder)])
    data = read_data(path, LABELS)
    assert data.splits == ("",) * 6
    assert pixels(data) == expected()
    with pytest.raises(DataError, match="Splits of the data: none"):
        data.split("test")


def test_labels_are_as_they_are_written(folder: Path) -> None:
    """Numbers keep their zeros, dates remain text, cells may contain line breaks, and every separator is read."""
    names = ["007", "2024-01-01", "NA", "true", "line\nbreak", "u\u2028v", "Größe, 🦗"]
    labels = LabelSet.of(names)
    file = str(folder / "ant" / "2.png")
    for name, write in TABLES.items():
        for label in names:
            write(folder.parent / name, [{"path": file, "label": label}])
            assert read_data(folder.parent / name, labels).truths == (label,)
    (folder.parent / "numbers.jsonl").write_text(json.dumps({"path": file, "label": 7}))
    assert read_data(folder.parent / "numbers.jsonl", LabelSet.of(["7"])).truths == ("7",)


FRAMES: dict[str, Callable[[Mapping[str, Sequence[object]]], object]] = {
    "pandas": pandas.DataFrame,
    "polars": polars.DataFrame,
    "pyarrow": pyarrow.table,
}


@pytest.mark.parametrize("stored", ["paths", "bytes"])
@pytest.mark.parametrize("kind", FRAMES)
def test_a_frame_is_a_table(folder: Path, kind: str, stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)  # paths are relative to the working directory
    read = rows(folder)
    images = [row["path"] if stored == "paths" else Path(row["path"]).read_bytes() for row in read]
    labels, skus = [row["label"] for row in read], [*range(len(read))]
    columns = ColumnNames(image="photo", label="kind", id="sku", keep=("price",))
    prices = [0.5, None, 2.0, 3.0, 4.0, 5.0]
    frame = FRAMES[kind]({"photo": images, "kind": labels, "sku": skus, "price": prices, "split": ["test"] * 6})
    data = read_data(frame, LABELS, columns)  # type: ignore[arg-type]
    assert data.truths == TRUTHS
    assert data.splits == ("test",) * 6
    assert pixels(data) == pixels(data.split("test")) == expected()
    assert pixels(data.take(np.array([4, 1]))) == [expected()[4], expected()[1]]
    told = [{"id": str(sku), "kept": {"price": price}} for sku, price in zip(skus, prices, strict=True)]
    assert [*data.about] == told


@pytest.mark.parametrize("kind", FRAMES)
@pytest.mark.parametrize(
    ("content", "columns", "told"),
    [
        ({"foto": ["a"], "label": ["ant"]}, {"image": "photo"}, r"has no column 'photo'\. Did you mean 'foto'\?"),
        ({"path": ["a"], "kind": ["ant"]}, {"label": "kinds"}, r"has no column 'kinds'\. Did you mean 'kind'\?"),
        ({"path": [None, "b"], "label": ["ant", "bee"]}, {}, r"1 rows have no image .*1 files do not exist"),
        ({"path": [7], "label": ["ant"]}, {}, r"row 0, counted from 0, contains in its column 'path' 7, which is neither"),
        ({"path": ["a"], "label": ["wasp"]}, {}, r"1 labels are not in the label set \('wasp'\)"),
        (
            {"path": ["a", "b"], "label": ["ant", "bee"], "n": [1, 1]},
            {"id": "n"},
            r"1 ids in the column 'n' of .* more than once",
        ),
        ({"path": ["a", "b"], "label": ["ant", "bee"], "n": ["1", None]}, {"id": "n"}, r"row 1, counted from 0, has no id"),
    ],
)
def test_what_is_wrong_in_a_frame_is_told(
    kind: str, content: Mapping[str, Sequence[object]], columns: dict[str, object], told: str
) -> None:
    with pytest.raises(DataError, match=told) as caught:
        read_data(FRAMES[kind](content), LABELS, ColumnNames.model_validate(columns))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_labels_by_alias(folder: Path) -> None:
    (folder / "ant").rename(folder / "Formica")
    assert read_data(folder, LABELS).truths == ("007", "007", "ant", "ant", "bee", "bee")


def hub(folder: Path) -> datasets.Dataset:
    files = sorted(folder.rglob("*.png"))
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["bee", "Formica", "007"])})
    numbers = [{"bee": 0, "ant": 1, "007": 2}[file.parent.name] for file in files]
    return datasets.Dataset.from_dict({"picture": [str(file) for file in files], "kind": numbers}, features=features)


def test_a_hub_dataset_in_memory_and_on_disk(folder: Path) -> None:
    in_memory = hub(folder)
    in_memory.save_to_disk(str(folder.parent / "saved"))
    for source in (in_memory, folder.parent / "saved"):
        data = read_data(source, LABELS)
        assert data.truths == TRUTHS
        assert data.names == ("#0", "#1", "#2", "#3", "#4", "#5")
        assert pixels(data) == expected()
        assert pixels(data.take(np.array([4, 1]))) == [expected()[4], expected()[1]]


def test_a_hub_dataset_of_several_splits(folder: Path) -> None:
    whole = hub(folder)
    splits = datasets.DatasetDict({"train": whole.select([0, 2, 4]), "test": whole.select([1, 3, 5])})
    splits.save_to_disk(str(folder.parent / "saved"))
    for source in (splits, folder.parent / "saved"):
        data = read_data(source, LABELS)
        assert data.splits == ("train",) * 3 + ("test",) * 3
        assert data.names == ("train#0", "train#1", "train#2", "test#0", "test#1", "test#2")
        assert data.truths == TRUTHS[::2] + TRUTHS[1::2]
        assert pixels(data.split("test")) == expected()[1::2]


def test_a_hub_dataset_with_names_for_labels(folder: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    source = datasets.Dataset.from_dict({"image": [noise(1)], "label": ["bee"]}, features=features)
    data = read_data(source, LABELS)
    assert data.truths == ("bee",)
    assert pixels(data) == [noise(1).tobytes()]


def test_an_unreadable_image_of_a_library_is_a_row_not_an_exception(folder: Path) -> None:
    (folder / "ant" / "2.png").write_bytes(b"no image")
    for source in (hub(folder), torchvision.datasets.ImageFolder(str(folder))):
        predictions = Cascade(FakeScorer(), [], labels=LABELS).classify(read_data(source, LABELS).images)
        assert [bool(p.error) for p in predictions] == [False, False, True, False, False, False]


def test_a_torchvision_folder(folder: Path) -> None:
    data = read_data(torchvision.datasets.ImageFolder(str(folder)), LABELS)
    assert data.truths == TRUTHS
    assert data.names[5] == str(folder / "bee" / "5.png")
    assert pixels(data) == expected()


class Drawn:
    """A dataset in the form of torchvision, which records the images that were read."""

    classes = ("ant", "bee")

    def __init__(self, image: Callable[[int], object] = noise) -> None:
        self.image = image
        self.read: list[int] = []

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> tuple[ImageSource, int]:
        self.read.append(index)
        return self.image(index), index % 2  # type: ignore[return-value]  # what a transform may give


def test_images_are_read_when_they_are_used_one_at_a_time() -> None:
    source = Drawn()
    source.targets = [index % 2 for index in range(50)]  # type: ignore[attr-defined]
    data = read_data(source, LABELS)
    assert source.read == [0]  # to see that it is an image
    assert data.truths[:3] == ("ant", "bee", "ant")
    half = data.subset(20, seed=1).divide(0.5)[1]
    assert source.read == [0]
    images = iter(half.images)
    for count in range(1, 4):
        next(images)
        assert len(source.read) == 1 + count
    assert load_image(half.images[-1]).tobytes() == noise(int(half.names[-1][1:])).tobytes()
    with pytest.raises(IndexError):
        _ = half.images[10]


def test_classes_that_are_not_known_beforehand_are_read() -> None:
    assert read_data(Drawn(), LABELS).truths == ("ant", "bee") * 25


def test_images_are_read_lazily_from_a_hub_dataset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    really = Image.open

    def opening(file: IO[bytes], *, formats: tuple[str, ...]) -> Image.Image:
        opened.append(file)
        return really(file, formats=formats)

    monkeypatch.setattr(Image, "open", opening)
    data = read_data(hub(folder), LABELS)
    assert not opened
    load_image(data.images[3])
    assert len(opened) == 1


def test_a_transform_that_leaves_no_image_is_said() -> None:
    with pytest.raises(DataError, match=r"have the type Tensor\. Remove its transform"):
        read_data(Drawn(lambda index: torchvision.transforms.functional.to_tensor(noise(index))), LABELS)


def test_all_problems_are_told_together(folder: Path) -> None:
    good = rows(folder)
    bad = [{"path": "images/gone.png", "label": "wasp", "split": ""}, good[0], good[1], {**good[2], "label": "hornet"}]
    write_csv(folder.parent / "data.csv", [*good, *bad])
    with pytest.raises(DataError) as caught:
        read_data(folder.parent / "data.csv", LABELS)
    told = str(caught.value)
    assert "2 labels are not in the label set ('hornet', 'wasp')" in told
    assert "1 files do not exist" in told
    assert "gone.png" in told
    assert "3 images occur more than once" in told
    assert told.count(".\n") == told.count("\n") == 0


def test_what_is_told_is_bounded(folder: Path) -> None:
    many = [{"path": f"{'x' * 3000}/{number}", "label": f"{'y' * 3000}\n{number}", "split": ""} for number in range(1000)]
    write_csv(folder.parent / "data.csv", [*many, *many])
    with pytest.raises(DataError, match="1000 labels are not in the label set") as caught:
        read_data(folder.parent / "data.csv", LABELS)
    assert len(str(caught.value)) < 3 * 6 * (LONGEST_SHOWN + 20)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("data.csv", "file,label\nx,ant\n", r"has no column 'path'\. Its columns: 'file', 'label'\."),
        ("data.csv", "paths,label\nx,ant\n", r"has no column 'path'\. Did you mean 'paths'\? Its columns: 'paths', 'label'\."),
        ("data.csv", "path,class\nx,ant\n", r"has no column 'label'"),
        ("data.csv", "", r"has no column 'path'\. Its columns: none\."),
        ("data.csv", "path,label\n", "contains no images"),
        ("data.csv", b"path,label\n\xff,ant\n", "1 files do not exist"),
        ("data.csv", "Image,SKU\nx,1\n", r"has no column 'image'\. Did you mean 'Image'\? Its columns: 'Image', 'SKU'\."),
        ("data.csv", "path,label\nx,owl, barred\n", "line 2 has 3 cells, and the header has 2"),
        ("data.csv", 'path,label\nx,a\ny,"6 in. a\nz,b\nw,5" tall\n', "the row in line 3 is not valid CSV: ',' expected after"),
        ("data.csv", 'path,label\nx,ant\n"y,ant\nz,ant\n', "the row in line 3 is not valid CSV: unexpected end of data"),
        ("data.csv", b"path,gr\xf6sse\n", r"The header of .* is not UTF-8\. Save the file as UTF-8\."),
        ("data.csv", b"path,label,split\nx,ant,\xff\n", "line 2 contains text in its column 'split' that is not UTF-8"),
        ("data.csv", "path,label\nx\n", r"1 images have no label \('/.*/x'\)"),
        ("data.csv", "path,label\n,ant\n", r"1 rows have no image \('#0'\)"),
        ("data.jsonl", '{"path": 1\n', "cannot be read"),
        (
            "data.jsonl",
            '{"label": "ant", "path": "x"}\n[1, 2]\n',
            r"line 2 contains in its column 'path' \[1, 2\], which is neither",
        ),
        ("data.jsonl", '{"image": "x"}\n', "has no column 'label'"),
        ("data.parquet", "no parquet", "cannot be read"),
        ("data.xlsx", "", r"is neither a folder nor a list of images\. The name of a list ends in \.txt, \.csv"),
    ],
)
def test_what_is_no_table(tmp_path: Path, name: str, content: str | bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=told) as caught:
        read_data(tmp_path / name, LABELS)
    assert "\n" not in str(caught.value)


def test_a_parquet_table_without_the_columns(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"path": ["x"], **{f"c{n}": [n] for n in range(100)}}), tmp_path / "data.parquet")
    with pytest.raises(DataError, match=r"has no column 'label'\. Its columns: 'path', 'c0', 'c1', 'c2', 'c3', …\."):
        read_data(tmp_path / "data.parquet", LABELS)


def test_what_is_no_data(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{}")
    no_classes = datasets.Dataset.from_dict({"text": ["x"]})
    for source, told in [
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "empty", r"contains no images\. A folder of labelled images needs one subfolder per class"),
        (tmp_path / "broken", "broken' cannot be read"),
        (no_classes, r"no column of images or no column of classes\. Its columns: 'text'"),
        ({"train": 1}, "are not datasets"),
        (hub(folder).to_iterable_dataset(), "type IterableDataset is not labelled data"),
        (SimpleNamespace(), "type SimpleNamespace is not labelled data"),
    ]:
        with pytest.raises(DataError, match=told):
            read_data(source, LABELS)


truths_of = st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=200)


def made(truths: Sequence[str]) -> Data:
    names = tuple(map(str, range(len(truths))))
    return Data(images=names, names=names, truths=tuple(truths), splits=("",) * len(truths))


@given(truths_of, st.data(), st.integers(0, 10_000))
def test_a_draw_takes_of_every_class_its_share(truths: list[str], draw: st.DataObject, seed: int) -> None:
    size = draw.draw(st.integers(0, len(truths)))
    chosen = stratified(truths, size, seed=seed)
    assert chosen.sum() == size
    taken = Counter(truth for truth, one in zip(truths, chosen, strict=True) if one)
    for truth, count in Counter(truths).items():
        assert abs(taken[truth] - count * size / len(truths)) < 1
    np.testing.assert_array_equal(chosen, stratified(truths, size, seed=seed))


@given(truths_of, st.floats(0, 1), st.integers(0, 10_000))
def test_parts_are_disjoint_complete_and_in_order(truths: list[str], share: float, seed: int) -> None:
    data = made(truths)
    first, rest = data.divide(share, seed=seed)
    assert len(first) == round(share * len(data))
    assert sorted([*first.names, *rest.names], key=int) == list(data.names)
    for part in (first, rest):
        assert list(part.names) == sorted(part.names, key=int)
        assert list(part.images) == list(part.names)
        assert part.truths == tuple(truths[int(name)] for name in part.names)
    assert data.divide(share, seed=seed)[0].names == first.names


@given(truths_of, st.integers(0, 250), st.integers(0, 10_000))
def test_a_subset_is_as_large_as_asked(truths: list[str], size: int, seed: int) -> None:
    subset = made(truths).subset(size, seed=seed)
    assert len(subset) == min(size, len(truths))
    assert list(subset.names) == sorted(subset.names, key=int)


def test_seeds_differ() -> None:
    data = made(["a", "b"] * 100)
    assert len({data.subset(20, seed=seed).names for seed in range(10)}) == 10
    assert data.subset(20).names == data.subset(20, seed=0).names


def test_equal_remainders_fall_on_any_class() -> None:
    """Ten classes with one image each, and one image to draw: not always the first image."""
    data = made("abcdefghij")
    assert len({data.subset(1, seed=seed).truths for seed in range(50)}) > 5


def test_a_draw_that_cannot_be() -> None:
    data = made("ab")
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(DataError, match="between 0 and 1"):
            data.divide(share)
    with pytest.raises(DataError, match="-1 images cannot be drawn"):
        data.subset(-1)


@pytest.mark.parametrize("name", ["Grünfink", "red_finch"])
def test_folders_are_known_by_the_words_of_their_names(tmp_path: Path, name: str) -> None:
    (tmp_path / unicodedata.normalize("NFD", name)).mkdir()
    noise(1).save(tmp_path / unicodedata.normalize("NFD", name) / "1.png")
    (tmp_path / "labels.txt").write_text(f"{name.replace('_', ' ')}\nRotkehlchen\n", encoding="utf-8")
    assert read_data(tmp_path, LabelSet.read(tmp_path / "labels.txt")).truths == (name.replace("_", " "),)


def test_a_support_set_is_found_by_the_words_of_its_folders(tmp_path: Path) -> None:
    (tmp_path / "red_finch").mkdir()
    noise(1).save(tmp_path / "red_finch" / "1.png")
    assert list(SupportSet.read(tmp_path, LabelSet.of(["red finch", "grey owl"])).exemplars) == ["red finch"]


def test_a_line_that_is_too_deep_is_told_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "table.jsonl").write_text('{"path": "x.png", "label": "ant"}\n' + "[" * 100_000)
    with pytest.raises(DataError, match="line 2 is not valid JSON"):
        read_data(tmp_path / "table.jsonl", LABELS)
    with pytest.raises(DataError, match="line 2 is not valid JSON"):
        list(Inputs(tmp_path / "table.jsonl"))


def test_a_pipe_is_no_table(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "table.csv")
    with pytest.raises(DataError, match="is neither a folder nor a list of images"):
        read_data(tmp_path / "table.csv", LABELS)

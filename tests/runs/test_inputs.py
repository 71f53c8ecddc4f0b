"""Rows that are not images, links, names, and the cost of reading a table."""

import gc
import hashlib
import json
import os
import pickle
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from cascadevlm import Cascade
from cascadevlm.base.errors import DataError
from cascadevlm.base.images import ImageSource
from cascadevlm.runs import bulk, inputs
from cascadevlm.runs.inputs import Inputs, after, names
from cascadevlm.testing import FakeScorer, noise


def table(folder: Path, columns: dict[str, Sequence[object]], *, rows_together: int = 10**6) -> Inputs:
    path = folder / "images.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=rows_together, use_dictionary=False)
    return Inputs(path)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("list.jsonl", '"x.png"\n\n["y.png"]\n', r"line 3 contains in its column 'path' \['y.png'\], which is neither an image"),
        ("list.jsonl", '{"path": 5}\n', "line 1 contains in its column 'path' 5, which is neither an image nor the path"),
        ("list.jsonl", '"x.png"\n"y.p', "line 2 is not valid JSON: Unterminated string"),
    ],
)
def test_a_line_that_names_no_image_is_told_by_its_number(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=told):
        list(Inputs(tmp_path / name))


@pytest.mark.parametrize("column", [[1, 2], [[1, 2], [3]], [{"data": b"x"}, None]])
def test_a_row_that_holds_no_image_is_told_by_its_number(tmp_path: Path, column: Sequence[object]) -> None:
    images = table(tmp_path, {"image": column})
    with pytest.raises(DataError, match=r"row 0, counted from 0, contains in its column 'image' .*, which is neither an image"):
        list(images)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_row_without_a_path_is_one_failed_row(tmp_path: Path, suffix: str) -> None:
    noise(0, (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "images.csv").write_text("id,path\n1,a.png\n2,\n")
    table(tmp_path, {"path": ["a.png", None]})
    images = Inputs(tmp_path / f"images.{suffix}")
    assert [*images.names()] == [str(tmp_path / "a.png"), "#1"]
    tally = bulk.run(Cascade(FakeScorer(), [], labels=["ant", "bee"]), images, tmp_path / "run", config={})
    assert tally.counts == {"kept": 1, "unreadable": 1}
    assert "There is no image: the row of the table is empty." in (tmp_path / "run" / "failures.jsonl").read_text()


def test_texts_are_paths(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text('"a.png"\n{"path": "b/c.png"}\n')
    expected = [(str(tmp_path / name), tmp_path / name) for name in ("a.png", "b/c.png")]
    assert list(Inputs(tmp_path / "list.jsonl")) == expected
    assert list(table(tmp_path, {"image": ["a.png", "b/c.png"]})) == expected
    assert list(table(tmp_path, {"image": pyarrow.array(["a.png", "b/c.png"]).dictionary_encode()})) == expected


@pytest.mark.parametrize(
    ("columns", "called"),
    [
        ({"image": [b"x", b"y", None]}, ["#0", "#1", "#2"]),
        ({"image": [b"x", b"y"], "path": ["one", None]}, ["one", "#1"]),
        ({"image": [{"bytes": b"x", "path": "a.png"}, {"bytes": b"y", "path": None}, None]}, ["HERE/a.png", "#1", "#2"]),
        ({"image": [{"bytes": None, "path": "a.png"}]}, ["HERE/a.png"]),
        ({"image": [{"bytes": b"x"}]}, ["#0"]),
        ({"image": ["a.png", None]}, ["HERE/a.png", "#1"]),
        ({"path": ["a.png"]}, ["HERE/a.png"]),
    ],
)
def test_images_in_a_table_have_names_that_are_known_without_reading_them(
    tmp_path: Path, columns: dict[str, Sequence[object]], called: list[str]
) -> None:
    images = table(tmp_path, columns, rows_together=2)
    called = [name.replace("HERE", str(tmp_path)) for name in called]
    assert list(images.names()) == [name for name, _ in images] == called
    assert len(images) == len(called)
    assert list(after(images, 1)) == list(images)[1:]


def test_a_table_is_counted_named_and_sampled_without_reading_all_its_images(tmp_path: Path) -> None:
    """The bytes of some images are overwritten, so that reading their row group fails."""
    images = table(tmp_path, {"image": [{"bytes": bytes(100_000), "path": f"{n}.png"} for n in range(8)]}, rows_together=2)
    metadata = pyarrow.parquet.read_metadata(images.path)
    with Path(images.path).open("r+b") as file:
        for group in range(3):
            column = metadata.row_group(group).column(0)
            file.seek(column.data_page_offset)
            file.write(b"\xff" * column.total_compressed_size)
    assert len(images) == 8
    assert [Path(name).name for name in images.names()] == [f"{n}.png" for n in range(8)]
    assert [source for _, source in after(images, 6)] == [bytes(100_000)] * 2
    assert [source for _, source in images.rows({7})] == [bytes(100_000)]
    with pytest.raises(DataError, match="cannot be read"):
        list(images)


def test_memory_is_that_of_some_rows_however_many_stand_together(tmp_path: Path) -> None:
    images = table(tmp_path, {"image": [os.urandom(2_000) for _ in range(20_000)]})
    before = pyarrow.total_allocated_bytes()
    assert max(pyarrow.total_allocated_bytes() - before for _ in images) < 10_000_000


def test_of_a_folder_only_names_are_in_memory(tmp_path: Path) -> None:
    for number in range(3_000):
        (tmp_path / f"{number:06}.png").touch()
    tracemalloc.start()
    next(found := iter(Inputs(tmp_path)))
    own = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, inputs.__file__)])  # not of other tests' threads
    tracemalloc.stop()
    found.close()  # type: ignore[attr-defined]  # a generator
    assert 3_000 * 50 < sum(trace.size for trace in own.traces) < 3_000 * 150


def test_links_are_followed_and_no_folder_is_searched_twice(tmp_path: Path) -> None:
    for name in ("tree/a/1.png", "tree/b/2.png", "elsewhere/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        noise(0, (8, 8)).save(tmp_path / name)
    tree = tmp_path / "tree"
    (tree / "b" / "loop").symlink_to(tree)
    (tree / "c").symlink_to(tmp_path / "elsewhere")
    (tree / "d").symlink_to(tmp_path / "elsewhere")
    (tree / "file.png").symlink_to(tree / "a" / "1.png")
    (tree / "lost.png").symlink_to(tree / "nowhere.png")
    (tree / "self.png").symlink_to(tree / "self.png")
    (tree / "lost").symlink_to(tree / "nowhere")
    found = ["a/1.png", "b/2.png", "c/3.png", "file.png", "lost.png", "self.png"]
    assert [str(Path(name).relative_to(tree)) for name, _ in Inputs(tree)] == found
    tally = bulk.run(Cascade(FakeScorer(), [], labels=["ant", "bee"]), Inputs(tree), tmp_path / "run", config={})
    assert tally.counts == {"kept": 4, "unreadable": 2}


@pytest.mark.parametrize("listed", [False, True])
def test_names_that_are_no_text_go_through_a_run(tmp_path: Path, listed: bool) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    noise(0, (8, 8)).save(folder / "0.png")
    image = (folder / "0.png").rename(folder / os.fsdecode(b"\xe9.png"))
    (tmp_path / "list.txt").write_bytes(os.fsencode(image) + b"\n")
    images = Inputs(tmp_path / "list.txt" if listed else folder)
    for _ in range(2):
        tally = bulk.run(Cascade(FakeScorer(), [], labels=["ant", "bee"]), images, tmp_path / "run", config={})
        assert tally.counts == {"kept": 1}
    (line,) = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == str(image)
    (row,) = pyarrow.parquet.read_table(tmp_path / "run" / "predictions.parquet").to_pylist()
    assert row["path"] == str(folder / "\\udce9.png")


def test_names_and_numbers_are_those_of_any_inputs() -> None:
    class Made:
        def __iter__(self) -> Iterator[tuple[str, ImageSource]]:
            return iter([("a", b"x"), ("b", b"y")])

    assert list(after(Made(), 1)) == [("b", b"y")]


def test_a_pipe_is_no_list_of_images(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "list.txt")
    with pytest.raises(DataError, match="nor a list of images"):
        Inputs(tmp_path / "list.txt")


def test_a_folder_that_was_counted_is_not_searched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[Path] = []
    search = os.scandir

    def searching(folder: Path) -> object:
        searched.append(folder)
        return search(folder)

    names = ["a.png", "new\nline.png", "\udce9.png"]
    for name in names:
        (tmp_path / name).touch()
    monkeypatch.setattr(os, "scandir", searching)
    images = Inputs(tmp_path)
    searched.clear()
    expected = [*iter(images)]  # list() would count first
    assert (len(images), len(searched)) == (3, 2)
    (tmp_path / "b.png").touch()
    sampled, total = images.sample(3)
    assert list(images) == list(images.rows(range(3))) == list(after(images, 0)) == expected
    assert list(images.names()) == [name for name, _ in expected]
    assert (sampled, total, len(searched)) == ([source for _, source in expected], 3, 2)
    assert len(list(pickle.loads(pickle.dumps(images)))) == 4, "another process searches for itself"
    listing = images._listing
    assert listing is not None
    assert listing.exists()
    del images
    gc.collect()
    assert not listing.exists()


def test_shuffled_images_come_in_the_order_of_a_digest_of_their_names(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.png", "b/3.png", "c/4.png", "c/5.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).touch()
    listed = [str(path) for path in sorted((tmp_path / "images").rglob("*.png"))]
    (tmp_path / "list.txt").write_text("\n".join([*listed, listed[0]]))
    pyarrow.parquet.write_table(pyarrow.table({"path": [*listed, listed[0]]}), tmp_path / "table.parquet")
    for path, expected in (("images", listed), ("list.txt", [*listed, listed[0]]), ("table.parquet", [*listed, listed[0]])):
        images = Inputs(tmp_path / path, shuffled=True)
        read = [name for name, _ in images]
        assert read == sorted(expected, key=lambda name: hashlib.sha256(name.encode()).digest()) != expected
        assert images.order is not None
        assert [expected[place] for place in images.order] == read == [*names(images)]
        assert [name for name, _ in after(pickle.loads(pickle.dumps(images)), 2)] == read[2:]
        assert len(images) == len(expected)


def test_a_table_that_contains_images_is_not_shuffled(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"image": [b"1", b"2", b"3"]}), tmp_path / "table.parquet")
    images = Inputs(tmp_path / "table.parquet", shuffled=True)
    assert not images.shuffled
    assert [*images] == [("#0", b"1"), ("#1", b"2"), ("#2", b"3")]

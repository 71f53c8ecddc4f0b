"""Frames of pandas, Polars and Arrow, in and out."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import polars
import pyarrow
import pytest

from cascadevlm import Cascade
from cascadevlm.base.errors import DataError, InputError
from cascadevlm.base.frames import COLUMNS, Backend, ImageFrame, frame_of, predictions_frame
from cascadevlm.base.tables import ColumnNames
from cascadevlm.base.types import Prediction
from cascadevlm.testing import FakeScorer, noise

CASCADE = Cascade(FakeScorer(), [], labels=["ant", "bee"])
MAKERS: dict[Backend, Callable[[dict[str, list[object]]], object]] = {
    "pandas": pandas.DataFrame,
    "polars": polars.DataFrame,
    "pyarrow": pyarrow.table,
}


def column(frame: object, name: str) -> list[object]:
    values: list[object] = frame[name].to_pylist() if isinstance(frame, pyarrow.Table) else frame[name].to_list()  # type: ignore[index]
    return [None if value != value else value for value in values]  # pandas has NaN for a missing value


def png(seed: int) -> bytes:
    file = io.BytesIO()
    noise(seed).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("stored", ["paths", "bytes"])
def test_a_frame_comes_back_with_predictions(tmp_path: Path, kind: Backend, stored: str) -> None:
    for number in range(2):
        noise(number).save(tmp_path / f"{number}.png")
    images: list[object] = [str(tmp_path / f"{number}.png") if stored == "paths" else png(number) for number in range(2)]
    frame = MAKERS[kind]({"sku": ["A", "B", "C"], "picture": [*images, None], "label": [7, 8, 9]})
    result = CASCADE.classify(frame, image="picture")  # type: ignore[call-overload]
    assert type(result) is type(frame)
    expected = CASCADE.classify([noise(0), noise(1)])
    assert column(result, "label") == [*[each.label for each in expected], None]
    assert column(result, "probability")[:2] == [each.probability for each in expected]
    assert column(result, "escalated") == [False] * 3
    assert column(result, "outcome") == [None] * 3
    assert column(result, "error")[2] == "There is no image: the row of the table is empty. Add the image, or remove the row."
    assert column(result, "sku") == ["A", "B", "C"]
    assert column(result, "input.label") == [7, 8, 9]


async def test_a_frame_keeps_its_index_and_is_classified_asynchronously() -> None:
    frame = pandas.DataFrame({"picture": [png(0), png(1)]}, index=["x", "y"])
    result = await CASCADE.aclassify(frame, image="picture")
    assert [*result.index] == ["x", "y"]
    assert result["label"].notna().all()
    assert "label" not in frame.columns


@pytest.mark.parametrize("kind", MAKERS)
def test_a_frame_is_no_list_of_paths(kind: Backend) -> None:
    frame = MAKERS[kind]({"path": ["a.png"], "label": ["ant"]})
    with pytest.raises(
        InputError, match=r"its column of images is not named\. Add image=COLUMN\. Its columns: 'path', 'label'\."
    ):
        CASCADE.classify(frame)  # type: ignore[call-overload]
    with pytest.raises(InputError, match=r"The table has no column 'paths'\. Did you mean 'path'\?"):
        CASCADE.classify(frame, image="paths")  # type: ignore[call-overload]
    with pytest.raises(InputError, match=r"use classify\(table, image='path'\)"):
        list(CASCADE.stream(frame))  # type: ignore[arg-type]


def test_what_is_no_frame_is_told() -> None:
    with pytest.raises(InputError, match="image='path' names a column, and images is not a table"):
        CASCADE.classify(["a.png"], image="path")  # type: ignore[call-overload]
    with pytest.raises(InputError, match=r"a lazy frame: frame\.collect\(\)"):
        CASCADE.classify(polars.LazyFrame({"path": ["a.png"]}), image="path")  # type: ignore[call-overload]
    with pytest.raises(InputError, match="Row 1 of the table, counted from 0, contains in its column 'path' 5, which is neither"):
        CASCADE.classify(pandas.DataFrame({"path": ["a.png", 5]}), image="path")
    with pytest.raises(InputError, match=r"Row 0 of the table, counted from 0, contains in its column 'path' 2\.5, which is"):
        CASCADE.classify(pandas.DataFrame({"path": [2.5]}), image="path")


@pytest.mark.parametrize("kind", MAKERS)
def test_results_of_earlier_calls_are_kept(kind: Backend) -> None:
    frame = MAKERS[kind]({"picture": [png(0)], "label": ["first"], "input.input.label": ["other"]})
    for _ in range(2):
        frame = CASCADE.classify(frame, image="picture")  # type: ignore[call-overload]
    (expected,) = CASCADE.classify([noise(0)])
    assert column(frame, "label") == column(frame, "input.input.input.label") == [expected.label]
    assert column(frame, "input.label") == ["first"]
    assert column(frame, "input.input.label") == ["other"]


@pytest.mark.parametrize(
    ("frame", "told"),
    [
        (pandas.DataFrame([["a.png"]]), r"a column whose name is not a text: 0\. Rename its columns"),
        (pandas.DataFrame([["a.png", 1]], columns=["image", 7]), "a column whose name is not a text: 7"),
        (pandas.DataFrame([["a.png", 1, 2]], columns=["image", "x", "x"]), "columns with the same name: 'x' 2 times"),
        (pyarrow.table([["a.png"], [1], [2]], names=["image", "x", "x"]), "columns with the same name: 'x' 2 times"),
    ],
)
def test_names_of_columns_are_different_texts(frame: object, told: str) -> None:
    with pytest.raises(DataError, match=told):
        CASCADE.classify(frame, image="image")  # type: ignore[call-overload]
    with pytest.raises(DataError, match=told):
        CASCADE.evaluate(frame, columns=ColumnNames(image="0"))  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [pandas.DataFrame, polars.DataFrame])
def test_a_column_contains_images_in_memory(make: Callable[[dict[str, list[object]]], object]) -> None:
    result = CASCADE.classify(make({"picture": [noise(0), noise(1), None]}), image="picture")  # type: ignore[call-overload]
    assert column(result, "label") == [*[each.label for each in CASCADE.classify([noise(0), noise(1)])], None]


def test_a_column_contains_arrays() -> None:
    arrays = [np.asarray(noise(number)) for number in range(2)]
    result = CASCADE.classify(pandas.DataFrame({"picture": arrays}), image="picture")
    assert column(result, "label") == [each.label for each in CASCADE.classify(arrays)]


def test_an_unknown_library_of_frames_is_told() -> None:
    with pytest.raises(InputError, match=r"no backend 'dask' of frames\. Known: pandas, polars, pyarrow\."):
        predictions_frame([], "dask")  # type: ignore[arg-type]


def test_a_frame_that_changes_its_length_is_refused() -> None:
    frame = pandas.DataFrame({"path": ["a.png", "b.png"]})
    images = ImageFrame(frame, "path")
    frame.loc[2] = ["c.png"]
    with pytest.raises(InputError, match="The table had 2 rows when it was read, and has 3 rows now"):
        images.with_predictions([Prediction(), Prediction()])


@pytest.mark.parametrize("kind", MAKERS)
def test_predictions_are_a_frame(kind: Backend) -> None:
    frame = predictions_frame(CASCADE.classify([noise(0), noise(1)]), kind)
    assert column(frame, "decided_by") == ["scorer", "scorer"]
    empty = predictions_frame([], kind)
    assert isinstance(frame, type(empty))
    names = empty.column_names if isinstance(empty, pyarrow.Table) else [*empty.columns]  # type: ignore[attr-defined]
    assert names == ["path", *COLUMNS]
    mixed = frame_of({"numbers": [1, 2.5, None], "all": [1, "x", True], "probability": [None] * 3}, kind)
    assert column(mixed, "numbers") == [1.0, 2.5, None]
    assert column(mixed, "all") == ["1", "x", "True"]
    assert column(mixed, "probability") == [None] * 3


@pytest.mark.parametrize("kind", MAKERS)
def test_a_path_with_invalid_unicode_is_escaped(kind: Backend) -> None:
    (prediction,) = CASCADE.classify([noise(0)])
    frame = predictions_frame([replace(prediction, path="a\udcff.png")], kind)
    assert column(frame, "path") == ["a\\udcff.png"]

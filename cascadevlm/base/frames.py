"""Data frames of pandas, Polars and Arrow: columns of images in, columns of predictions out."""

from collections.abc import Container, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar, cast, get_args

import numpy as np
from PIL import Image

from cascadevlm.base.errors import DataError, InputError
from cascadevlm.base.files import valid_text
from cascadevlm.base.images import ImageSource
from cascadevlm.base.tables import EVERY, Row, Table, few, nearest_column, own_names, stored_image
from cascadevlm.base.types import Prediction

if TYPE_CHECKING:
    import narwhals
    from narwhals.typing import IntoDataFrame, IntoSeries

FrameT = TypeVar("FrameT", bound="IntoDataFrame")

Backend: TypeAlias = Literal["pandas", "polars", "pyarrow"]
"""The library of a new frame."""

Cells: TypeAlias = str | float | bool | None

COLUMNS = ("label", "probability", "decided_by", "escalated", "outcome", "dollars", "error")
"""The columns that a frame of predictions has."""

KINDS: Mapping[str, type] = {"probability": float, "escalated": bool, "dollars": float}
"""The types of columns without any value that are not texts."""


class ImageFrame:
    """A frame with a column of images.

    Args:
        frame: a pandas or Polars data frame, or an Arrow table.
        column: the column of images: paths, addresses, encoded images, PIL images or arrays. Default: the only column of the
            frame.

    Attributes:
        images: the images. Empty bytes stand for a row without an image.

    Raises:
        InputError: if the argument is not a frame, has no such column, or contains something else than images.
        DataError: if the names of the columns are not different texts.
    """

    def __init__(self, frame: object, column: str | None) -> None:
        self._frame = _read(frame)
        if column is None and len(self._frame.columns) == 1:
            column = self._frame.columns[0]
        if column is None:
            told = f"images is a table ({type(frame).__name__}), and its column of images is not named."
            raise InputError(told, hint=f"Add image=COLUMN. Its columns: {few(self._frame.columns)}.")
        if column not in self._frame.columns:
            raise InputError(f"The table has no column {column!r}.", hint=nearest_column(column, self._frame.columns))
        cells = self._frame[column]
        rows = enumerate(zip(cells.to_list(), cells.is_null().to_list(), strict=True))
        self.images: list[ImageSource] = [b"" if empty else _image(value, column, row) for row, (value, empty) in rows]

    def with_predictions(self, predictions: Sequence[Prediction]) -> object:
        """A frame of the same kind: its own columns with the names `own_names`, and `COLUMNS`.

        Raises:
            InputError: if the number of rows has changed since the images were read.
        """
        if len(self._frame) != len(predictions):
            told = f"The table had {len(predictions)} rows when it was read, and has {len(self._frame)} rows now."
            raise InputError(told, hint="Do not change the table during the call.")
        backend = cast(Backend, self._frame.implementation.value)
        own = self._frame.rename(own_names(self._frame.columns, COLUMNS))
        new = [_series(name, values, backend) for name, values in _columns(predictions).items()]
        return own.with_columns(*new).to_native()


class FrameTable(Table):
    """A frame as a table of images. Paths are relative to the working directory.

    Args:
        frame: a frame (`is_frame`).

    Raises:
        DataError: if the names of the columns are not different texts.
    """

    def __init__(self, frame: object) -> None:
        super().__init__(Path(type(frame).__name__))  # the name of the frame in messages
        self._frame = _read(frame)

    @property
    def columns(self) -> Sequence[str]:
        return self._frame.columns

    def rows(self, columns: Sequence[str], wanted: Container[int] = EVERY, *, whole: bool = True) -> Iterator[Row]:
        cells = [self._cells(name) for name in columns]
        for number in range(len(self._frame)):
            if number in wanted:
                yield Row(number, number, {name: values[number] for name, values in zip(columns, cells, strict=True)})

    def _cells(self, column: str) -> list[object]:
        """The values of a column. Paths become texts, and all kinds of missing values become None."""
        values = self._frame[column]
        pairs = zip(values.to_list(), values.is_null().to_list(), strict=True)
        return [None if empty else str(value) if isinstance(value, Path) else value for value, empty in pairs]

    @cached_property
    def _binary(self) -> frozenset[str]:
        """The columns whose first value contains the bytes of an image."""
        first = {name: self._frame[name].drop_nulls().head(1).to_list() for name in self.columns}
        return frozenset(
            name for name, values in first.items() if values and isinstance(values[0], bytes | Mapping | Image.Image | np.ndarray)
        )

    def is_binary(self, column: str) -> bool:
        return column in self._binary

    def where(self, row: Row) -> str:
        return f"row {row.where}, counted from 0,"


def _read(frame: object) -> "narwhals.DataFrame[IntoDataFrame]":
    import narwhals
    from narwhals.exceptions import DuplicateError

    try:
        read = narwhals.from_native(cast("IntoDataFrame", frame), eager_only=True)
        columns: Sequence[object] = read.columns
    except DuplicateError as exc:
        twice = ", ".join(line.removeprefix("- ") for line in str(exc).splitlines()[1:])
        raise DataError(f"The table has columns with the same name: {twice}.", hint="Rename or remove them.") from exc
    except TypeError as exc:
        raise InputError(
            f"images is a table ({type(frame).__name__}), from which no column can be read.",
            hint="Give a pandas or Polars data frame or an Arrow table; a lazy frame: frame.collect().",
        ) from exc
    if other := [name for name in columns if not isinstance(name, str)]:
        told = f"The table has a column whose name is not a text: {other[0]!r}."
        raise DataError(told, hint="Rename its columns: table.columns = [*map(str, table.columns)].")
    return read


def is_table(images: object) -> bool:
    """Returns True for a data frame, a table, or a mapping of columns."""
    kind = type(images)  # a lazy frame of Polars warns if its own columns are asked for
    return isinstance(images, Mapping) or hasattr(kind, "columns") or hasattr(kind, "column_names")


def is_frame(source: object) -> bool:
    """Returns True for a pandas or Polars data frame and for an Arrow table, but not for a lazy frame."""
    from narwhals.dependencies import is_into_dataframe

    return is_into_dataframe(source)


def _image(value: object, column: str, row: int) -> ImageSource:
    try:
        return value if isinstance(value, Path) else stored_image(value)
    except ValueError as exc:
        raise InputError(f"Row {row} of the table, counted from 0, contains in its column {column!r} {exc}.") from exc


def _columns(predictions: Sequence[Prediction]) -> dict[str, list[Cells]]:
    """The columns of predictions, by name."""
    return {
        "label": [each.label for each in predictions],
        "probability": [each.probability for each in predictions],
        "decided_by": [each.decided_by for each in predictions],
        "escalated": [each.escalated for each in predictions],
        "outcome": [each.verdict.outcome if each.verdict else None for each in predictions],
        "dollars": [each.cost.dollars for each in predictions],
        "error": [each.error for each in predictions],
    }


def _series(name: str, values: Sequence[Cells], backend: Backend) -> "narwhals.Series[IntoSeries]":
    """A column of one type. Whole and other numbers together become floats, and other mixtures become texts."""
    import narwhals

    kinds = {type(value) for value in values} - {type(None)}
    kind = next(iter(kinds)) if len(kinds) == 1 else float if kinds == {int, float} else str if kinds else KINDS.get(name, str)
    types = {bool: narwhals.Boolean(), int: narwhals.Int64(), float: narwhals.Float64(), str: narwhals.String()}
    cells = [None if value is None else valid_text(str(value)) if kind is str else kind(value) for value in values]
    return narwhals.new_series(name, cells, types[kind], backend=backend)


def frame_of(columns: Mapping[str, Sequence[Cells]], backend: Backend) -> object:
    """A new frame of these columns.

    Raises:
        InputError: if the library is unknown or not installed.
    """
    import narwhals

    if backend not in get_args(Backend):
        raise InputError(f"There is no backend {backend!r} of frames.", hint=f"Known: {', '.join(get_args(Backend))}.")
    try:
        series = [_series(name, values, backend) for name, values in columns.items()]
        return narwhals.from_dict({each.name: each for each in series}).to_native()
    except ImportError as exc:
        raise InputError(f"The package {backend!r} is not installed.", hint="Install it, or use backend='pyarrow'.") from exc


def predictions_frame(predictions: Sequence[Prediction], backend: Backend = "pandas") -> object:
    """Predictions as a frame, one row per image: ``path``, and the columns in `COLUMNS`.

    Args:
        predictions: the predictions.
        backend: the library of the frame: "pandas", "polars" or "pyarrow". Default: "pandas".

    Raises:
        InputError: if the library is unknown or not installed.
    """
    return frame_of({"path": [each.path for each in predictions], **_columns(predictions)}, backend)

"""The images of a table, with the ids and the columns that results contain, and with their true labels."""

import hashlib
import json
from array import array
from collections.abc import Container, Iterator, Mapping
from functools import cached_property
from math import isfinite, isnan
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from pydantic import JsonValue

from cascadevlm.base.annotation_files import AnnotationFile
from cascadevlm.base.arrow_tables import ParquetTable, Part, parquet_below, parquet_files, saved_dataset
from cascadevlm.base.entry_points import similar
from cascadevlm.base.errors import DataError
from cascadevlm.base.files import valid_text
from cascadevlm.base.images import SUFFIXES, ImageSource
from cascadevlm.base.remote import Place, files_below, inside, is_address, is_folder, name_of, place_of, suffix_of
from cascadevlm.base.tables import (
    EVERY,
    USUAL,
    ColumnNames,
    CsvTable,
    JsonLines,
    PathList,
    Row,
    Table,
    TextTable,
    few,
    reading,
    stored_image,
)

About: TypeAlias = Mapping[str, JsonValue]
"""What results say about an image in addition to its prediction: its ``id``, and ``kept``, the values of the kept columns. A key
is missing if there is no such column."""

TABLES = (".txt", ".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
"""Suffixes of lists and tables of images."""


class Entry(NamedTuple):
    """One image of a table.

    Attributes:
        name: its path, or its address without credentials. For an image inside the table: the value of the column ``path``, the
            path that is stored with the image or, if there is neither or labels are read, ``#`` and its number.
        source: the image; empty bytes if the row has no image, or if only names are read.
        truth: the true label; "" if there is none.
        split: the split of the data; "" if it is unknown.
    """

    name: str
    source: ImageSource
    about: About
    truth: str = ""
    split: str = ""


class RemoteFolder(TextTable):
    """The image files below a folder at an address. The label of an image is the name of the folder that contains it."""

    columns = ("path", "label")

    @cached_property
    def _files(self) -> list[str]:
        with reading(self.place):
            return [each for each in files_below(str(self.place)) if suffix_of(each) in SUFFIXES]

    def lines(self) -> Iterator[tuple[int, Mapping[str, object]]]:
        return (
            (number, {"path": file, "label": file.rpartition("/")[0].rpartition("/")[2]})
            for number, file in enumerate(self._files, start=1)
        )


def open_table(place: Place) -> Table | None:
    """The table at a place; None for a folder of images on this machine.

    Raises:
        DataError: if the place does not exist, or is neither a folder nor a table.
    """
    if is_address(place):
        return _open_address(place)
    path = Path(place)
    if path.is_dir():
        parts = parquet_below(path)
        return saved_dataset(path) or (parquet_files(path, parts) if parts else None)
    if not path.exists():
        raise DataError(f"{str(path)!r} does not exist.", hint="Check the path.")
    if path.suffix.lower() not in TABLES or not path.is_file():
        raise DataError(
            f"{str(path)!r} is neither a folder nor a list of images.", hint=f"The name of a list ends in {', '.join(TABLES)}."
        )
    return _open_file(path)


def _open_address(address: str) -> Table:
    if suffix_of(address) in TABLES:
        return _open_file(address)
    with reading(address):
        if not is_folder(address):
            hint = f"The name of a list ends in {', '.join(TABLES)}."
            raise DataError(f"{name_of(address)!r} is neither a folder nor a list of images.", hint=hint)
        tables: list[Place] = [each for each in files_below(address) if suffix_of(each) == ".parquet"]
    return parquet_files(address, tables) if tables else RemoteFolder(address)


def _open_file(place: Place) -> Table:
    match suffix_of(place):
        case ".txt":
            return PathList(place)
        case ".csv" | ".tsv":
            return CsvTable(place)
        case ".jsonl" | ".ndjson":
            return JsonLines(place)
        case ".json":
            return AnnotationFile(place)
    return ParquetTable(place, [Part(place=place)])


class ImageTable:
    """The images of a table.

    Args:
        table: the table.
        columns: the columns that are read. Default: the usual columns.
        labelled: true if the labels and splits are read.

    Raises:
        DataError: if a column does not exist, or a kept column contains images.
    """

    def __init__(self, table: Table, columns: ColumnNames = USUAL, *, labelled: bool = False) -> None:
        self.table = table
        self.columns = columns
        close = (name for name in ("image", "path") if similar(name, table.columns))  # for the error
        self.image = table.require(columns.image or table.image or next(close, "path"))
        self.label = table.require(columns.label or table.label) if labelled else None
        for column in columns.told:
            if table.is_binary(table.require(column)):
                told = f"The column {column!r} of {name_of(table.place)!r} contains images, which results cannot contain."
                raise DataError(told, hint="Remove the column from --keep and --id.")
        also = ["path", "split"] if labelled else ["path"]
        wanted = [self.image, *([self.label] if self.label else []), *columns.told]
        self._read = list(dict.fromkeys([*wanted, *(name for name in also if name in table.columns)]))

    @property
    def contains_images(self) -> bool:
        """True if the images are inside the table."""
        return self.table.is_binary(self.image)

    def entries(self, wanted: Container[int] = EVERY, *, whole: bool = True) -> Iterator[Entry]:
        """The images of these rows, in order.

        Args:
            wanted: numbers of rows, from 0. Default: all rows.
            whole: false to read only names, not images that are inside the table.
        """
        with reading(self.table.place):
            for row in self.table.rows(self._read, wanted, whole=whole):
                yield self._entry(row)

    def _entry(self, row: Row) -> Entry:
        name, source = self._image(row)
        split = "" if self.label is None else self._text(row, "split")
        return Entry(name, source, self._about(row), self._truth(row), split)

    def _image(self, row: Row) -> tuple[str, ImageSource]:
        """The name and the image of a row."""
        cell = row.cells.get(self.image)
        try:
            stored = stored_image(cell)
        except ValueError as exc:
            raise ValueError(f"{self.table.where(row)} contains in its column {self.image!r} {exc}") from exc
        path = cell.get("path") if isinstance(cell, Mapping) else cell
        place = inside(self.table.folder, path) if isinstance(path, str) and path else None
        if isinstance(place, Path) and self.image != "path":
            place = place.absolute()  # so that the name does not depend on the working directory
        if place is not None and isinstance(cell, str):
            return name_of(place), place
        if self.label is not None and self.contains_images:  # paths inside a table may be equal, and names of records may not
            name = self.table.unnamed(row)
        elif self.image != "path" and row.cells.get("path"):
            name = str(row.cells["path"])
        elif place is not None:
            name = name_of(place)
        else:
            name = self.table.unnamed(row)
        return name, (place or b"") if isinstance(stored, str) else stored

    def _truth(self, row: Row) -> str:
        cell = row.cells.get(self.label) if self.label else None
        if isinstance(cell, list | dict):
            raise ValueError(f"{self.table.where(row)} has several labels in its column {self.label!r}: {cell!r:.80}")
        return self._text(row, self.label) if self.label else ""

    def _text(self, row: Row, column: str) -> str:
        return text_of(self._cell(row, column))

    def _cell(self, row: Row, column: str) -> object:
        cell = row.cells.get(column)
        if isinstance(cell, str) and valid_text(cell) != cell:
            raise ValueError(f"{self.table.where(row)} contains text in its column {column!r} that is not UTF-8")
        return cell

    def _about(self, row: Row) -> About:
        about: dict[str, JsonValue] = {}
        if (column := self.columns.id) is not None:
            about["id"] = self._text(row, column)
            if not about["id"]:
                raise ValueError(f"{self.table.where(row)} has no id in its column {column!r}")
        if self.columns.keep:
            about["kept"] = {column: kept_value(self._cell(row, column)) for column in self.columns.keep}
        return about

    def require_ids(self) -> None:
        """Check that every row has an id of its own. The memory is 8 bytes per row.

        Raises:
            DataError: if ids are missing, or occur more than once.
        """
        if self.columns.id is None:
            return
        digests = np.sort(np.frombuffer(array("Q", (_digest(each) for each in self._ids())), dtype=np.uint64))
        again = set(digests[1:][digests[1:] == digests[:-1]].tolist())
        if not again:
            return
        seen, doubled = set[str](), dict[str, None]()
        for each in self._ids():
            if _digest(each) in again:
                if each in seen:
                    doubled[each] = None
                seen.add(each)
        if doubled:
            told = f"{len(doubled)} ids in the column {self.columns.id!r} of {name_of(self.table.place)!r} occur more than once"
            raise DataError(f"{told}: {few(doubled)}.", hint="Remove the rows that occur twice, or use another column.")

    def _ids(self) -> Iterator[str]:
        return (str(entry.about["id"]) for entry in self.entries(whole=False))


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest())


def text_of(value: object) -> str:
    """The text of a cell; "" if the cell is empty."""
    return "" if value is None or (isinstance(value, float) and isnan(value)) else str(value)


def kept_value(value: object) -> JsonValue:
    """The value of a kept column. Dates and other values that JSON does not have become text; NaN and infinity become None."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if isfinite(value) else None
    return json.dumps(value, default=str, ensure_ascii=False) if isinstance(value, list | dict) else str(value)


def read_table(text: str | Path, columns: ColumnNames = USUAL, *, labelled: bool = False) -> ImageTable | None:
    """The images of the table at a place; None for a folder of images on this machine.

    Raises:
        DataError: if there is no such table, or it has other columns; if columns are given for a folder.
    """
    table = open_table(place_of(text))
    if table is not None:
        return ImageTable(table, columns, labelled=labelled)
    if columns != USUAL:
        raise DataError(f"{str(text)!r} is a folder of images, which has no columns.", hint=f"Leave out: {columns}.")
    return None

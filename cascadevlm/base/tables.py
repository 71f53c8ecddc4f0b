"""Reads tables of images row by row: text lists, CSV, JSON lines, Parquet, Arrow, and annotation files in JSON."""

import csv
import io
import json
import re
import sys
from abc import ABC, abstractmethod
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from cascadevlm.base.entry_points import similar
from cascadevlm.base.errors import ConfigError, DataError
from cascadevlm.base.files import valid_text
from cascadevlm.base.remote import Place, is_address, name_of, opened, suffix_of

T = TypeVar("T")

EVERY: Container[int] = range(sys.maxsize)
"""The numbers of all rows."""

MOST_SHOWN = 5
"""Number of cases of each problem that a message names. Further cases are only counted."""

LONGEST_SHOWN = 80
"""Largest number of characters of a name in a message."""

MOST_CHARACTERS = 400
"""Largest number of characters of a reason in a message."""


class ColumnNames(BaseModel):
    """The columns of a table of images that are read.

    Attributes:
        image: the column of paths, addresses or encoded images. Default: ``image`` or, if there is no such column, ``path``. In
            a data set of the package ``datasets``: its column of images.
        label: the column of true labels. Default: ``label``. In a data set of the package ``datasets``: its column of classes.
        id: the column of ids. Results contain the id of every image. Default: images have no ids.
        keep: further columns that results contain.
    """

    model_config = ConfigDict(frozen=True)

    image: str | None = None
    label: str | None = None
    id: str | None = None
    keep: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The columns as options of a command."""
        keep = ",".join(self.keep) or None
        named = {"image": self.image, "label": self.label, "id": self.id, "keep": keep}
        return " ".join(f"--{option} {value}" for option, value in named.items() if value is not None) or "the usual columns"

    @property
    def told(self) -> tuple[str, ...]:
        """The columns whose values results contain."""
        return (*([self.id] if self.id is not None else []), *self.keep)


USUAL = ColumnNames()


class Row(NamedTuple):
    """One row of a table: its number, from 0, its place in the file for messages, and its cells by column."""

    number: int
    where: int
    cells: Mapping[str, object]


class Table(ABC):
    """A table of images.

    Args:
        place: the file, or the folder of a saved data set.

    Attributes:
        image: the column of images, if the user names none; None if there is no such column.
        label: the column of true labels, if the user names none.
    """

    def __init__(self, place: Place) -> None:
        self.place = place

    @property
    @abstractmethod
    def columns(self) -> Sequence[str]:
        """The names of the columns."""

    @abstractmethod
    def rows(self, columns: Sequence[str], wanted: Container[int] = EVERY, *, whole: bool = True) -> Iterator[Row]:
        """The rows with these numbers, in order, with the cells of these columns.

        Args:
            columns: names of columns.
            wanted: numbers of rows, from 0. Default: all rows.
            whole: false to leave out the content of images. Cells then contain at most the path of an image.
        """

    @property
    def image(self) -> str | None:
        return next((name for name in ("image", "path") if name in self.columns), None)

    @property
    def label(self) -> str:
        return "label"

    @property
    def folder(self) -> Place:
        """The folder from which relative paths in the table count."""
        return self.place.parent if isinstance(self.place, Path) else self.place.rpartition("/")[0]

    def is_binary(self, column: str) -> bool:
        """True if the cells of a column contain the bytes of images."""
        return False

    def where(self, row: Row) -> str:
        """The place of a row, for messages."""
        return f"line {row.where}"

    def unnamed(self, row: Row) -> str:
        """The name of an image that has no path."""
        return f"#{row.number}"

    def require(self, column: str) -> str:
        """The name of a column that exists.

        Raises:
            DataError: if there is no such column. The message names the most similar column, and all columns.
        """
        if column not in self.columns:
            raise DataError(f"{name_of(self.place)!r} has no column {column!r}.", hint=nearest_column(column, self.columns))
        return column


class TextTable(Table):
    """A table whose file is read line by line. Subclasses read the cells."""

    def rows(self, columns: Sequence[str], wanted: Container[int] = EVERY, *, whole: bool = True) -> Iterator[Row]:
        for number, (line, cells) in enumerate(self.lines()):
            if number in wanted:
                yield Row(number, line, cells)

    @abstractmethod
    def lines(self) -> Iterator[tuple[int, Mapping[str, object]]]:
        """The number of each row's line, and its cells by column."""

    @contextmanager
    def text(self, errors: str = "surrogateescape") -> Iterator[io.TextIOWrapper]:
        """The text of the file, in UTF-8, or in UTF-16 as Windows writes it: with a byte order mark. Invalid bytes become invalid
        Unicode, because paths may contain them.
        """
        with opened(self.place) as file:
            encoding = "utf-16" if file.read(2) in (BOM_UTF16_LE, BOM_UTF16_BE) else "utf-8-sig"
            file.seek(0)
            with io.TextIOWrapper(file, encoding=encoding, errors=errors, newline="") as text:
                yield text


class PathList(TextTable):
    """A text file with one path or address per line."""

    columns = ("path",)

    def lines(self) -> Iterator[tuple[int, Mapping[str, object]]]:
        with self.text() as lines:
            yield from ((number, {"path": line.strip()}) for number, line in enumerate(lines, start=1) if line.strip())


class CsvTable(TextTable):
    """A table with a header. Columns are separated by commas, semicolons or tabs: by the most frequent of these in the header,
    outside quotes. If the name of the file ends in ``.tsv`` and the header contains a tab, they are separated by tabs.
    """

    def lines(self) -> Iterator[tuple[int, Mapping[str, object]]]:
        header, rows = self.columns, self._parsed()
        next(rows, None)
        for line, cells in rows:
            if any(cells[len(header) :]):
                raise ValueError(f"line {line} has {len(cells)} cells, and the header has {len(header)}")
            if cells:
                yield line, dict(zip(header, cells, strict=False))

    @cached_property
    def columns(self) -> Sequence[str]:
        with reading(self.place):
            header = next((cells for _, cells in self._parsed()), [])
            if any(valid_text(name) != name for name in header):
                raise DataError(f"The header of {name_of(self.place)!r} is not UTF-8.", hint="Save the file as UTF-8.")
            require_distinct(name for name in header if name)
            return tuple(header)

    def _parsed(self) -> Iterator[tuple[int, list[str]]]:
        """The number of each row's last line, and its cells. The first row is the header."""
        with self.text() as file:
            head = re.sub('"[^"]*"?', "", file.readline())
            file.seek(0)
            tabs = suffix_of(self.place) == ".tsv" and "\t" in head
            reader = csv.reader(file, delimiter="\t" if tabs else max(",;\t", key=head.count), strict=True)
            if head.startswith("sep="):  # Excel's line that names the separator
                next(reader)
            line = reader.line_num
            try:
                for cells in reader:
                    line = reader.line_num
                    yield line, cells
            except csv.Error as exc:
                raise ValueError(f"the row in line {line + 1} is not valid CSV: {exc}") from exc


def require_distinct(names: Iterable[str]) -> None:
    """Refuse columns with the same name. Raises: ValueError: if there are any."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"it contains a column more than once: {few(twice)}")


class JsonLines(TextTable):
    """A file with one JSON value per line: an object, or the path of an image."""

    def lines(self) -> Iterator[tuple[int, Mapping[str, object]]]:
        with self.text(errors="strict") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    value = json_line(line, number)
                    yield number, value if isinstance(value, dict) else {"path": value}

    @cached_property
    def columns(self) -> Sequence[str]:
        """The keys of the first lines. A key may be missing in a line."""
        with reading(self.place):
            return self._keys()

    def _keys(self) -> Sequence[str]:
        first = (cells for _, (_, cells) in zip(range(JSON_LINES_READ), self.lines(), strict=False))
        return tuple(dict.fromkeys(name for cells in first for name in cells))


JSON_LINES_READ = 1000
"""Number of JSON lines from which the columns are known."""


def json_line(line: str, number: int) -> object:
    """The value of one line.

    Raises:
        ValueError: if the line is not valid JSON. The message names the line.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as exc:
        why = exc.msg if isinstance(exc, json.JSONDecodeError) else exc
        raise ValueError(f"line {number} is not valid JSON: {why}") from exc


@contextmanager
def reading(place: Place) -> Iterator[None]:
    """Turn every error of reading in the block into a DataError."""
    try:
        yield
    except (OSError, ValueError) as exc:  # Arrow's and JSON's errors are ValueErrors
        why = str(exc).partition("\n")[0][:MOST_CHARACTERS].rstrip(".")
        remote = is_address(place) and isinstance(exc, OSError)
        hint = "Check the address, or repeat the command later." if remote else "Check the content of the file."
        raise DataError(f"{name_of(place)!r} cannot be read: {why}.", hint=hint) from exc


def nearest_column(column: str, columns: Sequence[str]) -> str:
    """A hint for a column that does not exist: the most similar column, and the first columns."""
    return f"{similar(column, columns)} Its columns: {few(columns) or 'none'}.".lstrip()


def few(cases: Iterable[str]) -> str:
    """The first `MOST_SHOWN` cases, for messages."""
    shown = [repr(shortened(case)) for case, _ in zip(cases, range(MOST_SHOWN + 1), strict=False)]
    return ", ".join([*shown[:MOST_SHOWN], *["…"] * (len(shown) > MOST_SHOWN)])


def shortened(text: str) -> str:
    """The text without its middle, if it is longer than `LONGEST_SHOWN` characters."""
    half = LONGEST_SHOWN // 2
    return text if len(text) <= LONGEST_SHOWN else f"{text[:half]}…{text[-half:]}"


def own_names(columns: Collection[str], taken: Collection[str]) -> dict[str, str]:
    """The name of each own column in a table that also has the columns ``taken``. If ``taken`` contains the name of a column,
    ``input.`` is put before it, and before that again if another column has this name.
    """

    def free(name: str) -> str:
        return free(f"input.{name}") if name in taken or name in columns else name

    return {column: free(column) if column in taken else column for column in columns}


def stored_image(value: object) -> bytes | str | Image.Image | NDArray[np.uint8]:
    """The bytes or the path of an image, or the image, from a cell of a table.

    Args:
        value: the bytes of an image file, a path, an image in memory, None (there is no image), or a mapping with the keys
            ``bytes`` and ``path`` (the form of the package ``datasets``).

    Returns:
        The bytes of the file, its path, or the image. Empty bytes if there is no image.

    Raises:
        ValueError: if the value has another type.
    """
    stored = value
    if isinstance(value, Mapping) and {"bytes", "path"} & value.keys():
        stored = value.get("bytes") or value.get("path")
    if stored is None:
        return b""
    if not isinstance(stored, bytes | str | Image.Image | np.ndarray):
        raise ValueError(f"{value!r:.80}, which is neither an image nor the path of an image")
    return stored


def read_form(path: Path, form: TypeAdapter[T], *, name: str, again: str) -> T:
    """Read a JSON file that a configuration names.

    Args:
        path: the file.
        form: the type of its content.
        name: what the file is, for messages, such as "calibration".
        again: hint that says how to make such a file.

    Raises:
        ConfigError: if the file cannot be read, or has other content.
    """
    try:
        return form.validate_json(path.read_bytes())
    except OSError as exc:
        raise ConfigError(f"The {name} {str(path)!r} cannot be read: {exc.strerror}.", hint="Check the path.") from exc
    except ValidationError as exc:
        first = exc.errors()[0]
        told = ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))
        raise ConfigError(f"{str(path)!r} is not a {name}: {told}.", hint=again) from exc

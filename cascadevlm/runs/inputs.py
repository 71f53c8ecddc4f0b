"""Images by the million: a folder, a list of files or a table, read one by one and never held as a whole."""

import csv
import os
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

from cascadevlm.base.errors import DataError
from cascadevlm.base.images import SUFFIXES, ImageSource
from cascadevlm.base.tables import json_line, stored_image

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

Named: TypeAlias = tuple[str, ImageSource]
"""The name of an image, which is its path if it is a file, and the image. Names need not be valid Unicode."""

LISTS = (".txt", ".csv", ".jsonl", ".parquet")
"""Suffixes of lists of images and of tables."""

ROWS_AT_ONCE = 64
"""Rows of a Parquet file that are in memory at once, images and all."""

BUFFER_BYTES = 1 << 20
"""Bytes of a Parquet file that are read at once. Without a buffer, Arrow reads all images of a row group."""


@runtime_checkable
class Labelled(Protocol):
    """N images with their true labels, as `cascadevlm.evaluation.data.Data` holds them.

    Attributes:
        names: names of the images: paths where they are files.
        truths: name of each image's true label.
        splits: the part of the data that each image belongs to; "" if that is unknown.
    """

    @property
    def images(self) -> Sequence[ImageSource]: ...

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def truths(self) -> Sequence[str]: ...

    @property
    def splits(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...


class Inputs:
    """The images of a folder, a list or a table, in an order that does not change.

    Args:
        path: a folder, searched to its depths, files by name; a text file with a path a line; a CSV file with a column ``path``;
            JSON lines, each a path or an object with a ``path``; a Parquet file with a column ``path`` or one ``image`` of
            encoded images (bytes, or as the package ``datasets`` writes them) or of paths. Paths are relative to the file they
            stand in. Links are followed, but no folder is searched twice; a link to nothing is an image that cannot be read.

    Raises:
        DataError: if there is no such path or it is none of these; while reading, if it cannot be read or lacks its column.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        kinds: tuple[Callable[[Path], Iterator[Named]], ...] = (_of_list, _of_csv, _of_json_lines, _of_parquet)
        readers = dict(zip(LISTS, kinds, strict=True))
        if not self.path.exists():
            raise DataError(f"{str(path)!r} does not exist.")
        if not self.path.is_dir() and not (self.path.is_file() and self.path.suffix.lower() in readers):
            raise DataError(f"{str(path)!r} is no folder and no list of images.", hint=f"Lists are {', '.join(readers)}.")
        self._read = _of_folder if self.path.is_dir() else readers[self.path.suffix.lower()]
        self._count: int | None = None

    @property
    def is_table(self) -> bool:
        """Whether it is a Parquet file."""
        return self._read is _of_parquet

    @property
    def holds_images(self) -> bool:
        """Whether it is a Parquet file in which images stand."""
        if not self.is_table:
            return False
        with self._told(), _opened(self.path) as file:
            return "image" in file.schema_arrow.names

    def __iter__(self) -> Iterator[Named]:
        with self._told():
            yield from self._read(self.path)

    def __len__(self) -> int:
        """The number of images. It stands in a Parquet table; everything else is read through once."""
        if self._count is None:
            with self._told():
                self._count = _count_of_parquet(self.path) if self.is_table else sum(1 for _ in self._read(self.path))
        return self._count

    def names(self) -> Iterator[str]:
        """The names of the images. Images in a table are not read."""
        with self._told():
            yield from _names_of_parquet(self.path) if self.is_table else (name for name, _ in self._read(self.path))

    def rows(self, wanted: Container[int]) -> Iterator[Named]:
        """The images with some numbers, from 0, in order. In a table, only the row groups with such images are read."""
        with self._told():
            if self.is_table:
                yield from _of_parquet(self.path, wanted)
            else:
                yield from (named for number, named in enumerate(self._read(self.path)) if number in wanted)

    def sample(self, size: int, *, seed: int = 0) -> tuple[list[ImageSource], int]:
        """A uniform random sample of at most ``size`` images, in their order, and the number of all images."""
        total = len(self)
        chosen = set(Random(seed).sample(range(total), min(size, total)))
        return [source for _, source in self.rows(chosen)], total

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Raises DataError for every error of reading."""
        try:
            yield
        except (OSError, ValueError, csv.Error) as exc:  # Arrow's and JSON's errors are ValueErrors
            raise DataError(f"{str(self.path)!r} cannot be read: {str(exc).partition(chr(10))[0]}.") from exc


def names(inputs: Iterable[Named] | Labelled) -> Iterator[str]:
    """The names of images, in order. Images in a table and labelled images are not read."""
    if isinstance(inputs, Labelled):
        return iter(inputs.names)
    return inputs.names() if isinstance(inputs, Inputs) else (name for name, _ in inputs)


def after(inputs: Iterable[Named] | Labelled, first: int) -> Iterator[Named]:
    """The images from number ``first`` on, in order. Earlier images in a table and earlier labelled images are not read."""
    if isinstance(inputs, Labelled):
        return ((inputs.names[number], inputs.images[number]) for number in range(first, len(inputs)))
    return inputs.rows(range(first, sys.maxsize)) if isinstance(inputs, Inputs) else islice(inputs, first, None)


def _of_folder(folder: Path) -> Iterator[Named]:
    return _below(folder, set())


def _below(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Named]:
    """The images below a folder. ``seen``: device and inode of folders that were searched; links may lead to them again."""
    here = folder.stat()
    if (here.st_dev, here.st_ino) in seen:
        return
    seen.add((here.st_dev, here.st_ino))
    folders, found = set(), []  # names, which take a third of the memory of entries
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_folder(entry):
                folders.add(entry.name)
                found.append(entry.name)
            elif Path(entry.name).suffix.lower() in SUFFIXES and (entry.is_symlink() or entry.is_file()):
                found.append(entry.name)
    for name in sorted(found):
        if name in folders:
            yield from _below(folder / name, seen)
        else:
            yield _named(folder / name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _of_list(path: Path) -> Iterator[Named]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        yield from (_named(path.parent / line.strip()) for line in lines if line.strip())


def _of_csv(path: Path) -> Iterator[Named]:
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        table = csv.DictReader(file)
        yield from (_named(path.parent / _path_of(row, f"line {table.line_num}")) for row in table)


def _of_json_lines(path: Path) -> Iterator[Named]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _named(path.parent / _path_of(json_line(line, number), f"line {number}"))


def _of_parquet(path: Path, wanted: Container[int] | None = None) -> Iterator[Named]:
    """The images, or the images with some numbers."""
    with _opened(path) as file:
        columns = [name for name in ("path", "image") if name in file.schema_arrow.names]
        for number, row in _rows(file, columns, wanted):
            name = _name_of(path, row, number, apart="image" not in columns)
            yield name, Path(name) if "image" not in columns else _image_of(path, row, number)


def _names_of_parquet(path: Path) -> Iterator[str]:
    with _opened(path) as file:
        schema = file.schema_arrow
        apart = "image" not in schema.names
        columns = [] if apart else _path_in(schema.field("image"))
        columns += ["path"] if "path" in schema.names else []
        yield from (_name_of(path, row, number, apart=apart) for number, row in _rows(file, columns))


def _path_in(image: "pyarrow.Field") -> list[str]:
    """The columns with the paths of a column of images."""
    import pyarrow.types

    if pyarrow.types.is_struct(image.type):
        return ["image.path"] if image.type.get_field_index("path") >= 0 else []
    return [] if pyarrow.types.is_binary(image.type) or pyarrow.types.is_large_binary(image.type) else ["image"]


def _count_of_parquet(path: Path) -> int:
    with _opened(path) as file:
        return int(file.metadata.num_rows)


def _opened(path: Path) -> "pyarrow.parquet.ParquetFile":
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False)
    if not {"path", "image"} & set(file.schema_arrow.names):
        file.close()
        raise ValueError("it has no column 'path' or 'image'")
    return file


def _rows(
    file: "pyarrow.parquet.ParquetFile", columns: list[str], wanted: Container[int] | None = None
) -> Iterator[tuple[int, Mapping[str, object]]]:
    """Rows with their numbers, a few at a time. Row groups without wanted rows are not read."""
    begin = 0
    for group in range(file.num_row_groups):
        numbers = range(begin, begin + file.metadata.row_group(group).num_rows)
        begin = numbers.stop
        if wanted is None or any(number in wanted for number in numbers):
            batches = file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns)
            found = zip(numbers, (row for batch in batches for row in batch.to_pylist()), strict=True)
            yield from ((number, row) for number, row in found if wanted is None or number in wanted)


def _name_of(table: Path, row: Mapping[str, object], number: int, *, apart: bool) -> str:
    """The name of an image.

    It is the path, if images are files ``apart`` from the table. For images in the table it is the row's path; if there is none,
    the image's own path, made absolute so that the name does not depend on the working directory; else the row's number.
    """
    if apart:
        return str(table.parent / _path_of(row, _row(number)))
    if row.get("path"):
        return str(row["path"])
    image = row.get("image")
    own = image.get("path") if isinstance(image, Mapping) else image
    return str(table.absolute().parent / own) if own and isinstance(own, str) else f"#{number}"


def _image_of(table: Path, row: Mapping[str, object], number: int) -> ImageSource:
    try:
        image = stored_image(row["image"])
    except ValueError as exc:
        raise ValueError(f"{_row(number)} holds in its column 'image' {exc}") from exc
    return table.parent / image if isinstance(image, str) else image


def _row(number: int) -> str:
    return f"row {number}, counted from 0,"


def _path_of(row: object, where: str) -> str:
    path = row.get("path") if isinstance(row, Mapping) else row
    if not isinstance(path, str) or not path:
        raise ValueError(f"{where} has no text in its column 'path': {row!r:.80}")
    return path


def _named(path: Path) -> Named:
    return str(path), path

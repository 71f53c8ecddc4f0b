"""Sources with millions of images: a folder, a list of files or a table. Images are read one by one."""

import csv
import hashlib
import json
import os
import sys
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from random import Random
from tempfile import mkstemp
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from cascadevlm.base.errors import DataError
from cascadevlm.base.images import SUFFIXES, ImageSource
from cascadevlm.base.portable import Live, Portable
from cascadevlm.base.tables import json_line, stored_image

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

Named: TypeAlias = tuple[str, ImageSource]
"""The name of an image, and the image. The name of a file is its path, which may contain invalid Unicode."""

LISTS = (".txt", ".csv", ".jsonl", ".parquet")
"""Suffixes of lists and tables of images."""

ROWS_AT_ONCE = 64
"""Number of rows of a Parquet file that are in memory at the same time, with their images."""

BUFFER_BYTES = 1 << 20
"""Number of bytes of a Parquet file that are read together. Without a buffer, Arrow reads all images of a row group."""


@runtime_checkable
class Labelled(Protocol):
    """N images with their true labels, in the form of `cascadevlm.evaluation.data.Data`.

    Attributes:
        names: names of the images. The name of a file is its path.
        truths: name of each image's true label.
        splits: the split of the data that each image belongs to; "" if it is unknown.
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


class Inputs(Portable):
    """The images of a folder, a list or a table, in an order that does not change.

    The first count of a folder or a list writes the names of the images to a temporary file. The object then uses the names in
    this file. So the folder is searched once, and images that are added later are not seen.

    Attributes:
        order: `(N,)` places of the N images in the folder or list, in the order in which they are read; None before the images
            are counted, and if ``shuffled`` is false.

    Args:
        path: one of the following. Paths in a file are relative to the folder of that file.

            - A folder. All its subfolders are searched, and files are sorted by name. Links are followed, but no folder is
              searched twice. A broken link is an image that cannot be read.
            - A text file with one path per line.
            - A CSV file with a column ``path``.
            - A file of JSON lines. Each line is a path or an object with a ``path``.
            - A Parquet file with a column ``path`` of paths, or with a column ``image`` of paths or encoded images (bytes, or
              the form of the package ``datasets``).
        shuffled: true if the images are read in the order of a digest of their names, which is the same every time. A table that
            contains images is always read in its own order. Default: false.

    Raises:
        DataError: if the path does not exist or is none of these; during reading, if the file cannot be read or has no such
            column.
    """

    live: ClassVar[Live] = (("_listing", lambda: None),)

    def __init__(self, path: str | Path, *, shuffled: bool = False) -> None:
        self.path = Path(path)
        self.order: NDArray[np.int64] | None = None
        kinds: tuple[Callable[[Path], Iterator[Named]], ...] = (_of_list, _of_csv, _of_json_lines, _of_table)
        readers = dict(zip(LISTS, kinds, strict=True))
        if not self.path.exists():
            raise DataError(f"{str(path)!r} does not exist.", hint="Check the path.")
        if not self.path.is_dir() and not (self.path.is_file() and self.path.suffix.lower() in readers):
            raise DataError(
                f"{str(path)!r} is neither a folder nor a list of images.",
                hint=f"The name of a list ends in {', '.join(readers)}.",
            )
        self._read = _of_folder if self.path.is_dir() else readers[self.path.suffix.lower()]
        self.shuffled = shuffled and not self.holds_images
        self._count: int | None = None
        self._listing: Path | None = None

    @property
    def is_table(self) -> bool:
        """True if the path is a Parquet file."""
        return self._read is _of_table

    @property
    def holds_images(self) -> bool:
        """True if the path is a Parquet file that contains images."""
        if not self.is_table:
            return False
        with self._told(), _opened(self.path) as file:
            return "image" in file.schema_arrow.names

    @property
    def _in_rows(self) -> bool:
        """Whether the images are read row by row from a table, and not by their names."""
        return self.is_table and not self.shuffled

    def __iter__(self) -> Iterator[Named]:
        if self.shuffled and self._listing is None:
            self._list()
        with self._told():
            yield from self._read(self.path) if self._listing is None else _of_listing(self._listing)

    def __len__(self) -> int:
        """Number of images. A table contains this number; other sources are read once to count the images."""
        if self._count is None:
            self._count = self._count_of_table() if self._in_rows else self._list()
        return self._count

    def _count_of_table(self) -> int:
        with self._told(), _opened(self.path) as file:
            return int(file.metadata.num_rows)

    def _list(self) -> int:
        """Write the names of all images to the temporary file, and count them."""
        descriptor, name = mkstemp(prefix="cascadevlm-", suffix=".jsonl")
        weakref.finalize(self, Path(name).unlink, missing_ok=True)
        count = 0
        with self._told(), os.fdopen(descriptor, "w", encoding="ascii") as listing:
            paths: Iterable[str] = (path for path, _ in self._read(self.path))
            if self.shuffled:
                found = [*paths]
                self.order = np.array(sorted(range(len(found)), key=lambda number: _digest(found[number])), dtype=np.int64)
                paths = (found[number] for number in self.order)
            for path in paths:
                listing.write(json.dumps(path) + "\n")
                count += 1
        self._listing = Path(name)
        return count

    def rows(self, wanted: Container[int]) -> Iterator[Named]:
        """The images with these numbers, from 0, in order. In a table, only row groups that contain one of these images are
        read.
        """
        if not self._in_rows:
            yield from (named for number, named in enumerate(self) if number in wanted)
            return
        with self._told():
            yield from _images_of_table(self.path, wanted)

    def names(self) -> Iterator[str]:
        """The names of all images, in order. Images in a table are not read."""
        if not self._in_rows:
            yield from (name for name, _ in self)
            return
        with self._told():
            yield from (name for name, _ in _rows_of_table(self.path, ()))

    def sample(self, size: int, *, seed: int = 0) -> tuple[list[ImageSource], int]:
        """A random sample of the images in their order, each image equally likely, and the number of all images."""
        total = len(self)
        chosen = set(Random(seed).sample(range(total), min(size, total)))
        return [source for _, source in self.rows(chosen)], total

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn every error of reading into a DataError."""
        try:
            yield
        except (OSError, ValueError, csv.Error) as exc:  # Arrow's and JSON's errors are ValueErrors
            raise DataError(
                f"{str(self.path)!r} cannot be read: {str(exc).partition(chr(10))[0]}.", hint="Check the content of the file."
            ) from exc


def names(inputs: Iterable[Named] | Labelled) -> Iterator[str]:
    """The names of images, in order. Images in a table and labelled images are not read."""
    if isinstance(inputs, Labelled):
        return iter(inputs.names)
    return inputs.names() if isinstance(inputs, Inputs) else (name for name, _ in inputs)


def after(inputs: Iterable[Named] | Labelled, first: int) -> Iterator[Named]:
    """The images from number ``first``, in order. Earlier images in a table and earlier labelled images are not read."""
    if isinstance(inputs, Labelled):
        return ((inputs.names[number], inputs.images[number]) for number in range(first, len(inputs)))
    return inputs.rows(range(first, sys.maxsize)) if isinstance(inputs, Inputs) else islice(inputs, first, None)


def some(inputs: Iterable[Named], wanted: Container[int]) -> Iterator[Named]:
    """The images with these numbers, from 0, in order."""
    return inputs.rows(wanted) if isinstance(inputs, Inputs) else (each for n, each in enumerate(inputs) if n in wanted)


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogatepass")).digest()


def _of_folder(folder: Path) -> Iterator[Named]:
    return _below(folder, set())


def _below(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Named]:
    """``seen`` contains the device and inode of every searched folder, because several links may lead to the same folder."""
    here = folder.stat()
    if (here.st_dev, here.st_ino) in seen:
        return
    seen.add((here.st_dev, here.st_ino))
    folders, found = set(), []  # names need a third of the memory of entries
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


def _of_listing(path: Path) -> Iterator[Named]:
    """The images of a folder or list whose names are in the temporary file."""
    with path.open(encoding="ascii") as lines:
        yield from (_named(Path(json.loads(line))) for line in lines)


def _of_table(path: Path) -> Iterator[Named]:
    return _images_of_table(path, range(sys.maxsize))


def _images_of_table(path: Path, wanted: Container[int]) -> Iterator[Named]:
    """The images with these numbers. Row groups without any of these images are not read."""
    return ((name, source) for name, source in _rows_of_table(path, wanted, skip=True) if source is not None)


def _rows_of_table(path: Path, wanted: Container[int], *, skip: bool = False) -> Iterator[tuple[str, ImageSource | None]]:
    """Yield all rows, read in small groups. For images that are not wanted, only names are read, and None stands for the image.

    Args:
        path: a Parquet file.
        wanted: numbers of images.
        skip: true to leave out row groups without any wanted image.
    """
    with _opened(path) as file:
        schema = file.schema_arrow
        apart = "image" not in schema.names
        paths = ["path"] if "path" in schema.names else []
        named_by = paths if apart else [*paths, *_path_in(schema.field("image"))]
        begin = 0
        for group in range(file.num_row_groups):
            numbers = range(begin, begin + file.metadata.row_group(group).num_rows)
            begin = numbers.stop
            read = any(number in wanted for number in numbers)
            if skip and not read:
                continue
            columns = [*paths, *([] if apart else ["image"])] if read else named_by
            batches = file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns)
            rows: Iterator[Mapping[str, object]] = (row for batch in batches for row in batch.to_pylist())
            for number, row in zip(numbers, rows, strict=True):
                if number in wanted:
                    name = _name_of(path, row, number, apart=apart)
                    yield name, Path(name) if apart else _image_of(path, row, number)
                elif not skip:
                    yield _name_of(path, row, number, apart=apart), None


def _path_in(image: "pyarrow.Field") -> list[str]:
    """The names of the parts of an image column that contain no image."""
    import pyarrow.types

    if pyarrow.types.is_struct(image.type):
        return ["image.path"] if image.type.get_field_index("path") >= 0 else []
    return [] if pyarrow.types.is_binary(image.type) or pyarrow.types.is_large_binary(image.type) else ["image"]


def _opened(path: Path) -> "pyarrow.parquet.ParquetFile":
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False)
    if not {"path", "image"} & set(file.schema_arrow.names):
        file.close()
        raise ValueError("it has no column 'path' or 'image'")
    return file


def _name_of(table: Path, row: Mapping[str, object], number: int, *, apart: bool) -> str:
    """The name of an image in a table.

    If images are files ``apart`` from the table, the name is the path of the file. If not, the name is the first of these
    values that the row has: its path; the path of the image in the table; its number. The path of the image is made absolute,
    so that the name does not depend on the working directory.
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
        raise ValueError(f"{_row(number)} contains in its column 'image' {exc}") from exc
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

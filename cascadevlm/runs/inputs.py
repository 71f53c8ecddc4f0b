"""Sources with millions of images: a folder, a list of files or a table. Images are read one by one."""

import hashlib
import json
import os
import sys
import weakref
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import islice, repeat
from pathlib import Path
from random import Random
from tempfile import mkstemp
from typing import ClassVar, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from cascadevlm.base.arrow_tables import ColumnarTable
from cascadevlm.base.image_table import About, Entry, read_table
from cascadevlm.base.images import SUFFIXES, ImageSource
from cascadevlm.base.portable import Live, Portable
from cascadevlm.base.remote import Place, place_of
from cascadevlm.base.tables import EVERY, USUAL, ColumnNames, reading

Named: TypeAlias = tuple[str, ImageSource]
"""The name of an image, and the image. The name of a file is its path, which may contain invalid Unicode."""

_NOTHING: About = {}


@runtime_checkable
class Labelled(Protocol):
    """N images with their true labels, in the form of `cascadevlm.evaluation.data.Data`.

    Attributes:
        names: names of the images. The name of a file is its path.
        truths: name of each image's true label.
        splits: the split of the data that each image belongs to; "" if it is unknown.
        about: the id and the kept columns of each image; empty if there are no such columns.
        columns: the columns that were read.
    """

    @property
    def images(self) -> Sequence[ImageSource]: ...

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def truths(self) -> Sequence[str]: ...

    @property
    def splits(self) -> Sequence[str]: ...

    @property
    def about(self) -> Sequence[About]: ...

    @property
    def columns(self) -> ColumnNames: ...

    def __len__(self) -> int: ...


class Inputs(Portable):
    """The images of a folder, a list or a table, in an order that does not change.

    The first count of a folder or a list writes the names of the images to a temporary file. The object then uses the names in
    this file. So the folder is searched once, and images that are added later are not seen.

    Attributes:
        order: `(N,)` places of the N images in the folder or list, in the order in which they are read; None before the images
            are counted, and if ``shuffled`` is false.

    Args:
        path: one of the following. Paths in a file are relative to the folder of that file. A path in a file may also be an
            address, such as ``https://…`` or ``s3://…``.

            - A folder. All its subfolders are searched, and files are sorted by name. Links are followed, but no folder is
              searched twice. A broken link is an image that cannot be read.
            - A text file with one path per line.
            - A table: CSV, TSV, JSON lines, Parquet or a JSON file (COCO, an export of Label Studio, or a list of objects).
            - The folder of a data set: saved by the package ``datasets``, or with Parquet files.
            - The address of one of these, such as ``s3://bucket/table.parquet`` or ``hf://datasets/owner/name``.
        columns: the columns of the table. Default: the usual columns.
        shuffled: true if the images are read in the order of a digest of their names, which is the same every time. A table that
            contains images is always read in its own order. Default: false.

    Raises:
        DataError: if the path does not exist or is none of these, or lacks a column; during reading, if the file cannot be read.
    """

    live: ClassVar[Live] = (("_listing", lambda: None),)

    def __init__(self, path: str | Path, columns: ColumnNames = USUAL, *, shuffled: bool = False) -> None:
        self.path: Place = place_of(path)
        self.columns = columns
        self.order: NDArray[np.int64] | None = None
        self._table = read_table(path, columns)
        self.shuffled = shuffled and not self.holds_images
        self._count: int | None = None
        self._listing: Path | None = None

    @property
    def holds_images(self) -> bool:
        """True if the images are inside a table."""
        return self._table is not None and self._table.contains_images

    @property
    def _in_rows(self) -> bool:
        """Whether the rows of a table are read again, and no temporary file is written."""
        return self._table is not None and isinstance(self._table.table, ColumnarTable) and not self.shuffled

    def __iter__(self) -> Iterator[Named]:
        return self.rows(EVERY)

    def __len__(self) -> int:
        """Number of images. A Parquet table contains this number; other sources are read once to count the images.

        Raises:
            DataError: if the source cannot be read, or if ids are missing or occur more than once.
        """
        if self._count is None:
            if self._table is not None:
                self._table.require_ids()
            self._count = self._count_of_rows() if self._in_rows else self._list()
        return self._count

    def _count_of_rows(self) -> int:
        assert self._table is not None
        assert isinstance(self._table.table, ColumnarTable)
        return len(self._table.table)

    def _list(self) -> int:
        """Write the names of all images to the temporary file, and count them."""
        descriptor, name = mkstemp(prefix="cascadevlm-", suffix=".jsonl")
        weakref.finalize(self, Path(name).unlink, missing_ok=True)
        count = 0
        with os.fdopen(descriptor, "w", encoding="ascii") as listing:
            lines: Iterable[str] = map(_line_of, self._found(whole=False))
            if self.shuffled:
                found = [*lines]
                digests = [_digest(json.loads(line)[0]) for line in found]
                self.order = np.array(sorted(range(len(found)), key=digests.__getitem__), dtype=np.int64)
                lines = (found[number] for number in self.order)
            for line in lines:
                listing.write(line)
                count += 1
        self._listing = Path(name)
        return count

    def _found(self, wanted: Container[int] = EVERY, *, whole: bool = True) -> Iterator[Entry]:
        """The images with these numbers, as they are found in the folder or table. ``whole`` is false to read only names."""
        if self._table is not None:
            yield from self._table.entries(wanted, whole=whole)
            return
        with reading(self.path):
            yield from (_named(path) for number, path in enumerate(_below(Path(self.path), set())) if number in wanted)

    def _entries(self, wanted: Container[int] = EVERY, *, whole: bool = True) -> Iterator[Entry]:
        """The images with these numbers, in order."""
        if self.shuffled and self._listing is None:
            self._list()
        if self._listing is None:
            yield from self._found(wanted, whole=whole)
        else:
            yield from (entry for number, entry in enumerate(_of_listing(self._listing)) if number in wanted)

    def rows(self, wanted: Container[int]) -> Iterator[Named]:
        """The images with these numbers, from 0, in order. In a Parquet table, only row groups that contain one of these images
        are read.
        """
        return ((entry.name, entry.source) for entry in self._entries(wanted))

    def names(self) -> Iterator[str]:
        """The names of all images, in order. Images in a table are not read."""
        return (entry.name for entry in self._entries(whole=False))

    def about(self, wanted: Container[int] = EVERY) -> Iterator[About]:
        """What results say about the images with these numbers, in order. Images in a table are not read."""
        if not self.columns.told:
            return repeat(_NOTHING)
        return (entry.about for entry in self._entries(wanted, whole=False))

    def sample(self, size: int, *, seed: int = 0) -> tuple[list[ImageSource], int]:
        """A random sample of the images in their order, each image equally likely, and the number of all images."""
        total = len(self)
        chosen = set(Random(seed).sample(range(total), min(size, total)))
        return [source for _, source in self.rows(chosen)], total


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


def about(inputs: Iterable[Named] | Labelled, first: int = 0) -> Iterator[About]:
    """The ids and kept columns of the images from number ``first``, in order. Images are not read."""
    if isinstance(inputs, Labelled):
        return islice(inputs.about, first, None) if inputs.about else repeat(_NOTHING)
    return inputs.about(range(first, sys.maxsize)) if isinstance(inputs, Inputs) else repeat(_NOTHING)


def columns_of(inputs: Iterable[Named] | Labelled) -> ColumnNames:
    """The columns of a table that the images were read from."""
    return inputs.columns if isinstance(inputs, Inputs | Labelled) else USUAL


def some(inputs: Iterable[Named], wanted: Container[int]) -> Iterator[Named]:
    """The images with these numbers, from 0, in order."""
    return inputs.rows(wanted) if isinstance(inputs, Inputs) else (each for n, each in enumerate(inputs) if n in wanted)


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogatepass")).digest()


def _below(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
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
            yield folder / name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _named(path: Path) -> Entry:
    return Entry(str(path), path, _NOTHING)


def _line_of(entry: Entry) -> str:
    """The line of an image in the temporary file. Only this process reads the file."""
    return json.dumps([entry.name, str(entry.source) if entry.source else "", entry.about]) + "\n"


def _of_listing(path: Path) -> Iterator[Entry]:
    """The images of a folder or table whose names are in the temporary file."""
    with path.open(encoding="ascii") as lines:
        for name, source, told in map(json.loads, lines):
            yield Entry(name, place_of(source) if source else b"", told)

"""Images without labels, by the million: a folder, a list of files or a table, read one by one and never held as a whole."""

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from random import Random
from typing import TypeAlias

from cascadevlm.data import stored_image
from cascadevlm.errors import DataError
from cascadevlm.images import SUFFIXES, ImageSource, file_name

Named: TypeAlias = tuple[str, ImageSource]
"""An image and what it is called: its path, where it is a file."""

ROWS_AT_ONCE = 64
"""Rows of a Parquet file that are in memory at once, images and all."""


class Inputs:
    """The images of a folder, a list or a table, in an order that does not change.

    Args:
        path: a folder, searched to its depths, files by name; a text file with a path a line; a CSV or JSON-lines file with a
            column ``path``; a Parquet file with a column ``path`` or one ``image`` of encoded images (bytes, or as the package
            ``datasets`` writes them). Paths are relative to the file they stand in.

    Raises:
        DataError: if there is no such path or it is none of these; while reading, if it cannot be read or lacks its column.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        readers: dict[str, Callable[[Path], Iterator[Named]]] = {
            ".txt": _of_list,
            ".csv": _of_csv,
            ".jsonl": _of_json_lines,
            ".parquet": _of_parquet,
        }
        if not self.path.exists():
            raise DataError(f"{str(path)!r} does not exist.")
        if not self.path.is_dir() and self.path.suffix.lower() not in readers:
            raise DataError(f"{str(path)!r} is no folder and no list of images.", hint=f"Lists are {', '.join(readers)}.")
        self._read = _of_folder if self.path.is_dir() else readers[self.path.suffix.lower()]

    def __iter__(self) -> Iterator[Named]:
        try:
            yield from self._read(self.path)
        except (OSError, ValueError, csv.Error) as exc:  # Arrow's and JSON's errors are ValueErrors
            raise DataError(f"{str(self.path)!r} cannot be read: {str(exc).partition(chr(10))[0]}.") from exc

    def __len__(self) -> int:
        """How many images there are, by going through them all, once."""
        return self._count

    @cached_property
    def _count(self) -> int:
        return sum(1 for _ in self)

    def sample(self, size: int, *, seed: int = 0) -> tuple[list[ImageSource], int]:
        """That many images at random, every one as likely as any other, and how many there are (Vitter 1985, algorithm R)."""
        chosen: list[ImageSource] = []
        draw, total = Random(seed), 0
        for total, (_, source) in enumerate(self, start=1):
            place = draw.randrange(total)
            if len(chosen) < size:
                chosen.append(source)
            elif place < size:
                chosen[place] = source
        return chosen, total


def _of_folder(folder: Path) -> Iterator[Named]:
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _of_folder(Path(entry.path))
        elif Path(entry.name).suffix.lower() in SUFFIXES and entry.is_file():
            yield _named(Path(entry.path))


def _of_list(path: Path) -> Iterator[Named]:
    with path.open(encoding="utf-8-sig") as lines:
        yield from (_named(path.parent / line.strip()) for line in lines if line.strip())


def _of_csv(path: Path) -> Iterator[Named]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        yield from (_named(path.parent / _path_of(row)) for row in csv.DictReader(file))


def _of_json_lines(path: Path) -> Iterator[Named]:
    with path.open(encoding="utf-8-sig") as lines:
        yield from (_named(path.parent / _path_of(json.loads(line))) for line in lines if line.strip())


def _of_parquet(path: Path) -> Iterator[Named]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        columns = [name for name in ("path", "image") if name in file.schema_arrow.names]
        if not columns:
            raise ValueError("it has no column 'path' or 'image'")
        rows = (row for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns) for row in batch.to_pylist())
        for number, row in enumerate(rows):
            yield _stored(path, row, number) if "image" in columns else _named(path.parent / _path_of(row))


def _stored(table: Path, row: Mapping[str, object], number: int) -> Named:
    """An image that stands in the table itself, named by its path where it has one, else by its row."""
    image = row["image"]
    source = image if isinstance(image, bytes) else stored_image(image)
    if isinstance(source, str):
        source = table.parent / source
    name = row.get("path") or (source if isinstance(source, Path) else f"#{number}")
    return str(name), source


def _path_of(row: Mapping[str, object]) -> str:
    path = row.get("path")
    if not isinstance(path, str) or not path:
        raise ValueError(f"a row has no text in its column 'path': {dict(row)!r:.80}")
    return path


def _named(path: Path) -> Named:
    return file_name(path), path

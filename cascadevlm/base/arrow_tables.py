"""Reads Parquet files, and the folders of data sets of the package ``datasets``. This package itself is not needed."""

import os
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from pydantic import BaseModel, Field, ValidationError

from cascadevlm.base.images import SUFFIXES
from cascadevlm.base.remote import Place, is_address, opened, suffix_of
from cascadevlm.base.tables import EVERY, Row, Table, reading, require_distinct

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

ROWS_AT_ONCE = 64
"""Number of rows that are in memory at the same time, with their images."""

BUFFER_BYTES = 1 << 20
"""Number of bytes of a Parquet file that are read together. Without a buffer, Arrow reads all images of a row group."""

Batches: TypeAlias = Callable[[Sequence[str]], "Iterator[pyarrow.RecordBatch]"]
"""Reads columns of a group of rows, a few rows at a time. ``image.path`` names a part of the column ``image``."""

_SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}")
"""The name of a file of a data set on the Hugging Face hub, which begins with the split."""


class _Feature(BaseModel):
    """A column in the metadata of the package ``datasets``."""

    kind: str | None = Field(default=None, alias="_type")
    names: list[str] = []


class _Info(BaseModel):
    features: dict[str, _Feature | list[object]] = {}


class _Metadata(BaseModel):
    info: _Info = _Info()


class _DataFile(BaseModel):
    filename: str


class _State(BaseModel):
    """``state.json`` of a saved data set."""

    files: list[_DataFile] = Field(alias="_data_files")


class _Splits(BaseModel):
    """``dataset_dict.json`` of a saved data set with several splits."""

    splits: list[str]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One file of a table.

    Attributes:
        place: the file.
        split: the split of the data that the rows belong to; "" if it is unknown.
    """

    place: Place
    split: str = ""


class ColumnarTable(Table):
    """A table whose rows are stored in groups, and whose columns are read separately.

    Args:
        place: the file, or the folder of the files.
        parts: the files, in the order in which they are read. All have the same columns.
    """

    def __init__(self, place: Place, parts: Sequence[Part]) -> None:
        super().__init__(place)
        self.parts = parts

    @abstractmethod
    def _groups(self, part: Part) -> "Iterator[tuple[int, Batches]]":
        """The number of rows of each group of a file, and a function that reads the group."""

    @abstractmethod
    def _read_schema(self) -> "pyarrow.Schema":
        """The columns of the first file."""

    def __len__(self) -> int:
        with reading(self.place):
            return sum(size for part in self.parts for size, _ in self._groups(part))

    @cached_property
    def _schema(self) -> "pyarrow.Schema":
        with reading(self.place):
            schema = self._read_schema()
            require_distinct(schema.names)
            return schema

    @property
    def columns(self) -> Sequence[str]:
        names: list[str] = self._schema.names
        return [*names, "split"] if self._has_splits else names

    @property
    def _has_splits(self) -> bool:
        return any(part.split for part in self.parts) and "split" not in self._schema.names

    @cached_property
    def _features(self) -> Mapping[str, _Feature]:
        """The columns in the metadata of the package ``datasets``; empty without metadata."""
        try:
            stated = _Metadata.model_validate_json((self._schema.metadata or {}).get(b"huggingface", b"{}"))
        except ValidationError:
            return {}
        return {name: feature for name, feature in stated.info.features.items() if isinstance(feature, _Feature)}

    def _of_kind(self, kind: str) -> str | None:
        return next((name for name, feature in self._features.items() if feature.kind == kind), None)

    @property
    def image(self) -> str | None:
        return self._of_kind("Image") or super().image

    @property
    def label(self) -> str:
        return self._of_kind("ClassLabel") or super().label

    @property
    def folder(self) -> Place:
        return super().folder if self.parts[0].place == self.place else self.place

    def where(self, row: Row) -> str:
        return f"row {row.where}, counted from 0,"

    def unnamed(self, row: Row) -> str:
        return f"{row.cells.get('split', '')}#{row.where}" if self._has_splits else super().unnamed(row)

    def is_binary(self, column: str) -> bool:
        return column in self._schema.names and self._without_images(column) != [column]

    def _without_images(self, column: str) -> list[str]:
        """The parts of a column that contain no image."""
        import pyarrow.types

        kind = self._schema.field(column).type
        if pyarrow.types.is_struct(kind) and {"bytes", "path"} & {field.name for field in kind}:
            return [f"{column}.path"] if kind.get_field_index("path") >= 0 else []
        return [] if pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind) else [column]

    def rows(self, columns: Sequence[str], wanted: Container[int] = EVERY, *, whole: bool = True) -> Iterator[Row]:
        stored = [name for name in columns if name in self._schema.names]
        read = stored if whole else [part for name in stored for part in self._without_images(name)]
        classes = {name: feature.names for name, feature in self._features.items() if name in stored and feature.names}
        begin = 0
        before = Counter[str]()
        for part in self.parts:
            added = {"split": part.split} if self._has_splits else {}
            for size, batches in self._groups(part):
                numbers = range(begin, begin + size)
                shift = begin - before[part.split]
                begin, before[part.split] = numbers.stop, before[part.split] + size
                if wanted is EVERY or any(number in wanted for number in numbers):
                    rows: Iterator[Mapping[str, object]] = (row for batch in batches(read) for row in batch.to_pylist())
                    if not read:
                        rows = repeat({}, size)
                    for number, cells in zip(numbers, rows, strict=True):
                        if number in wanted:
                            yield Row(number, number - shift, {**cells, **added, **_named(cells, classes)})


def _named(cells: Mapping[str, object], classes: Mapping[str, list[str]]) -> dict[str, str]:
    """The names of classes, in place of their numbers. A negative number stands for no class."""
    numbers = {column: cells.get(column) for column in classes}
    return {
        column: classes[column][number] if 0 <= number < len(classes[column]) else ""
        for column, number in numbers.items()
        if isinstance(number, int)
    }


class ParquetTable(ColumnarTable):
    """One or more Parquet files."""

    def _groups(self, part: Part) -> "Iterator[tuple[int, Batches]]":
        with _parquet(part.place) as file:
            for group in range(file.num_row_groups):
                yield (
                    file.metadata.row_group(group).num_rows,
                    partial(_row_group, file, group),
                )

    def _read_schema(self) -> "pyarrow.Schema":
        with _parquet(self.parts[0].place) as file:
            return file.schema_arrow


@contextmanager
def _parquet(place: Place) -> "Iterator[pyarrow.parquet.ParquetFile]":
    import pyarrow.parquet

    source = opened(place) if is_address(place) else place
    with pyarrow.parquet.ParquetFile(source, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
        yield file


def _row_group(file: "pyarrow.parquet.ParquetFile", group: int, columns: Sequence[str]) -> "Iterator[pyarrow.RecordBatch]":
    batches: Iterator[pyarrow.RecordBatch] = file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns)
    return batches


class SavedDataset(ColumnarTable):
    """A folder that ``save_to_disk`` of the package ``datasets`` wrote. Its files are mapped into memory."""

    def _groups(self, part: Part) -> "Iterator[tuple[int, Batches]]":
        with _arrow(part.place) as stream:
            for batch in stream:
                yield batch.num_rows, partial(_slices, batch)

    def _read_schema(self) -> "pyarrow.Schema":
        with _arrow(self.parts[0].place) as stream:
            return stream.schema


@contextmanager
def _arrow(place: Place) -> "Iterator[pyarrow.RecordBatchStreamReader]":
    import pyarrow

    with pyarrow.memory_map(str(place)) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
        yield stream


def _slices(batch: "pyarrow.RecordBatch", columns: Sequence[str]) -> "Iterator[pyarrow.RecordBatch]":
    """Columns of a batch, a few rows at a time."""
    import pyarrow

    arrays, names = [], []
    for column in columns:
        name, _, part = column.rpartition(".") if column not in batch.schema.names else (column, "", "")
        values = batch.column(name)
        arrays.append(pyarrow.StructArray.from_arrays([values.field(part)], [part]) if part else values)
        names.append(name)
    chosen = pyarrow.RecordBatch.from_arrays(arrays, names=names)
    return (chosen.slice(start, ROWS_AT_ONCE) for start in range(0, len(chosen), ROWS_AT_ONCE))


def parquet_files(place: Place, files: Sequence[Place]) -> ParquetTable:
    """A table of several Parquet files. On the Hugging Face hub, the names of the files begin with the split."""
    found = [(file, _SHARD.match(Path(str(file)).name)) for file in files]
    return ParquetTable(place, [Part(place=file, split=shard[1] if shard else "") for file, shard in found])


def parquet_below(folder: Path) -> list[Place]:
    """The Parquet files in a folder or in its sub-folder ``data``, as on the Hugging Face hub. Empty if there are images."""
    found: list[Place] = []
    for below in (folder, folder / "data"):
        with os.scandir(below) if below.is_dir() else nullcontext(()) as entries:
            for entry in entries:
                suffix = suffix_of(Path(entry.name))
                if suffix in SUFFIXES:
                    return []
                if suffix == ".parquet":
                    found.append(below / entry.name)
    return sorted(found)


def saved_dataset(folder: Path) -> SavedDataset | None:
    """The saved data set in a folder; None if the folder contains none.

    Raises:
        DataError: if the folder of a saved data set is damaged.
    """
    if not ((folder / "state.json").exists() or (folder / "dataset_dict.json").exists()):
        return None
    with reading(folder):
        return SavedDataset(folder, [*_saved_parts(folder)])


def _saved_parts(folder: Path) -> Iterator[Part]:
    if (folder / "state.json").exists():
        yield from _files_of(folder, "")
        return
    for split in _Splits.model_validate_json((folder / "dataset_dict.json").read_bytes()).splits:
        yield from _files_of(folder / split, split)


def _files_of(folder: Path, split: str) -> Iterator[Part]:
    state = _State.model_validate_json((folder / "state.json").read_bytes())
    return (Part(place=folder / file.filename, split=split) for file in state.files)

"""Labelled images from folders, tables and datasets of other libraries."""

import csv
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cascadevlm.base.errors import DataError
from cascadevlm.base.images import ImageSource, file_name, image_files
from cascadevlm.base.labels import LabelSet, words
from cascadevlm.base.tables import json_line, stored_image

MOST_SHOWN = 5
"""Number of cases of each problem that a message names. Further cases are only counted."""

LONGEST_SHOWN = 80
"""Largest number of characters of a name in a message."""


@runtime_checkable
class ImageDataset(Protocol):
    """A dataset in the form of torchvision: items are an image and its class number, and ``classes`` has the class names."""

    @property
    def classes(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[ImageSource, int]: ...


@runtime_checkable
class HubDataset(Protocol):
    """A ``datasets.Dataset`` with a column of images and a column of classes."""

    @property
    def features(self) -> Mapping[str, object]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, object]: ...

    def cast_column(self, column: str, feature: object, /) -> "HubDataset":
        """The same dataset; the column is read with another feature."""


Source: TypeAlias = Path | ImageDataset | HubDataset | Mapping[str, HubDataset]


@dataclass(frozen=True, kw_only=True)
class Data:
    """N images with their true labels.

    Attributes:
        images: the N images. Each image is read when it is used.
        names: N names of the images. The name of a file is its path.
        truths: N names of the true labels.
        splits: N names of the splits that the images belong to; "" if the source has no splits.
    """

    images: Sequence[ImageSource]
    names: tuple[str, ...]
    truths: tuple[str, ...]
    splits: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.truths)

    def take(self, rows: NDArray[np.intp]) -> "Data":
        """The images of these rows, in the order of the rows."""
        chosen = rows.tolist()
        names, truths, splits = (tuple(column[row] for row in chosen) for column in (self.names, self.truths, self.splits))
        return Data(images=_Read(self.images.__getitem__, chosen), names=names, truths=truths, splits=splits)

    def split(self, name: str) -> "Data":
        """The images of one split.

        Raises:
            DataError: if the data has no split with this name.
        """
        if name not in self.splits:
            known = sorted(set(self.splits) - {""})
            raise DataError(f"The data has no split {name!r}.", hint=f"Splits of the data: {_few(known) or 'none'}.")
        return self.take(np.flatnonzero(np.array(self.splits) == name))

    def subset(self, size: int, *, seed: int = 0) -> "Data":
        """``size`` random images with the class shares of the data, in the order of the data; all images if there are fewer."""
        return self if size >= len(self) else self.take(np.flatnonzero(stratified(self.truths, size, seed=seed)))

    def divide(self, share: float, *, seed: int = 0) -> "tuple[Data, Data]":
        """A random share of the images, and all other images. Both parts have the class shares and the order of the data.

        Raises:
            DataError: if the share is not between 0 and 1.
        """
        if not 0 <= share <= 1:
            raise DataError(f"A share of the data must be between 0 and 1, not {share!r}.")
        first = stratified(self.truths, round(share * len(self)), seed=seed)
        return self.take(np.flatnonzero(first)), self.take(np.flatnonzero(~first))


def stratified(truths: Sequence[str], size: int, *, seed: int) -> NDArray[np.bool_]:
    """``(N,)`` booleans, ``size`` of them true, drawn at random with the class shares of the truths.

    The method of largest remainders gives the number per class. Equal remainders are ordered at random.

    Raises:
        DataError: if ``size`` is not between 0 and N.
    """
    if not 0 <= size <= len(truths):
        raise DataError(
            f"{size} images cannot be drawn from {len(truths)}.",
            hint="Use a number that is not larger than the number of images.",
        )
    rng = np.random.default_rng(seed)
    kinds, of_kind, counts = np.unique(np.array(truths, dtype=str), return_inverse=True, return_counts=True)
    quotas, remainders = np.divmod(counts * size, max(len(truths), 1))
    quotas[np.lexsort((rng.random(len(kinds)), -remainders))[: size - quotas.sum()]] += 1
    chosen = np.zeros(len(truths), dtype=bool)
    for kind, quota in enumerate(quotas):
        chosen[rng.permutation(np.flatnonzero(of_kind == kind))[:quota]] = True
    return chosen


def read_data(source: Source | str, labels: LabelSet) -> Data:
    """Read labelled images, and check all of them.

    Args:
        source: one of these:

            - a folder with one subfolder per class;
            - a table (CSV, JSON lines or Parquet) with the columns ``path`` (relative to the table), ``label`` and, optionally,
              ``split``;
            - a folder written by ``save_to_disk`` of ``datasets``;
            - a ``datasets.Dataset``, or a mapping of several by the names of their splits;
            - a dataset in the form of torchvision.
        labels: the label set. Truths may be names or aliases.

    Raises:
        DataError: if the source is not labelled data. One message names labels that are not in the label set, missing files, and
            images that occur more than once.
    """
    if isinstance(source, str):
        source = Path(source)
    if isinstance(source, Path):
        data = _of_path(source)
    elif isinstance(source, ImageDataset):
        data = _of_image_dataset(source)
    elif isinstance(source, HubDataset | Mapping):
        data = _of_hub(source)
    else:
        hint = "Use a folder, a table, a datasets.Dataset, or an object with classes, a length and (image, class number) items."
        raise DataError(f"An object of type {type(source).__name__} is not labelled data.", hint=hint)
    return _checked(data, labels)


def _of_path(path: Path) -> Data:
    if not path.exists():
        raise DataError(f"{str(path)!r} does not exist.", hint="Check the path.")
    if not path.is_dir():
        return _of_table(path)
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return _of_hub(_load_saved(path))
    files = [
        (file, folder.name)
        for folder in sorted(path.iterdir())
        if folder.is_dir()
        for file in image_files(folder)
        if not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    return _of_files([file for file, _ in files], [name for _, name in files], [""] * len(files))


def _of_files(files: Sequence[Path], truths: Sequence[str], splits: Sequence[str]) -> Data:
    return Data(images=tuple(files), names=tuple(map(file_name, files)), truths=tuple(truths), splits=tuple(splits))


def _of_table(path: Path) -> Data:
    readers = {".csv": _csv_columns, ".jsonl": _jsonl_columns, ".parquet": _parquet_columns}
    if not path.is_file() or path.suffix.lower() not in readers:
        raise DataError(f"{str(path)!r} is not a folder and not a table.", hint=f"Known tables: {', '.join(readers)}.")
    try:
        columns = readers[path.suffix.lower()](path)
    except (OSError, ValueError, csv.Error) as exc:  # errors of Arrow and JSON are ValueErrors
        raise DataError(
            f"{str(path)!r} cannot be read: {_shortened(str(exc).partition(chr(10))[0])}.", hint="Check the content of the file."
        ) from exc
    for column in ("path", "label"):
        if column not in columns:
            raise DataError(f"{str(path)!r} has no column {column!r}.", hint=f"Its columns: {_few([*columns]) or 'none'}.")
    files, truths = ([_text(value) for value in columns[name]] for name in ("path", "label"))
    splits = [_text(value) for value in columns.get("split", [None] * len(files))]
    return _of_files([path.parent / file for file in files], truths, splits)


def _csv_columns(path: Path) -> dict[str, list[object]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        return {name: [row[name] for row in rows] for name in reader.fieldnames or ()}


def _jsonl_columns(path: Path) -> dict[str, list[object]]:
    with path.open(encoding="utf-8-sig") as file:
        rows = [_json_object(line, number) for number, line in enumerate(file, start=1) if line.strip()]
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def _json_object(line: str, number: int) -> dict[str, object]:
    row = json_line(line, number)
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is not a JSON object")
    return row


def _parquet_columns(path: Path) -> dict[str, list[object]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        columns: dict[str, list[object]] = {name: [] for name in file.schema_arrow.names}
        wanted = [name for name in ("path", "label", "split") if name in columns]  # other columns may contain images
        columns.update(file.read(columns=wanted).to_pydict())
        return columns


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _of_image_dataset(source: ImageDataset) -> Data:
    samples = getattr(source, "samples", None)  # paths of an ImageFolder, because its items raise errors for unreadable files
    if samples is not None:
        truths = [source.classes[number] for _, number in samples]
        return _of_files([Path(file) for file, _ in samples], truths, [""] * len(truths))
    rows = range(len(source))
    targets = getattr(source, "targets", None)  # the classes, without reading the images
    numbers = targets if targets is not None else [source[row][1] for row in rows]
    if rows and not isinstance(first := source[0][0], str | Path | bytes | Image.Image | np.ndarray):
        raise DataError(f"The images of the dataset have the type {type(first).__name__}.", hint="Remove its transform.")
    return Data(
        images=_Read(lambda row: source[row][0], rows),
        names=tuple(f"#{row}" for row in rows),
        truths=tuple(source.classes[int(number)] for number in numbers),
        splits=("",) * len(rows),
    )


def _of_hub(source: HubDataset | Mapping[str, HubDataset]) -> Data:
    if isinstance(source, HubDataset):
        return _of_hub_dataset(source, str(getattr(source, "split", None) or ""))
    if not all(isinstance(part, HubDataset) for part in source.values()):
        raise DataError(
            "The splits are not datasets of the package 'datasets'.",
            hint="Use datasets.Dataset objects by the names of their splits.",
        )
    parts = [_of_hub_dataset(part, split) for split, part in source.items()]
    images = [(part.images, row) for part in parts for row in range(len(part))]
    return Data(
        images=_Read(lambda row: images[row][0][images[row][1]], range(len(images))),
        names=tuple(f"{split}{name}" for split, part in zip(source, parts, strict=True) for name in part.names),
        truths=tuple(truth for part in parts for truth in part.truths),
        splits=tuple(split for part in parts for split in part.splits),
    )


def _of_hub_dataset(source: HubDataset, split: str) -> Data:
    kinds = {name: type(feature).__name__ for name, feature in source.features.items()}
    image = next((name for name, kind in kinds.items() if kind == "Image"), None)
    label = next((name for name, kind in kinds.items() if kind == "ClassLabel"), "label" if "label" in kinds else None)
    if image is None or label is None:
        raise DataError("The dataset has no column of images or no column of classes.", hint=f"Its columns: {_few([*kinds])}.")
    names = getattr(source.features[label], "names", None)
    column = cast(Mapping[str, Sequence[object]], source)[label]  # reads this column only
    truths = (names[value] if names and isinstance(value, int) and value >= 0 else _text(value) for value in column)
    as_stored = cast(Callable[..., object], type(source.features[image]))(
        decode=False
    )  # decoding would raise for unreadable images
    stored = source.cast_column(image, as_stored)
    return Data(
        images=_Read(lambda row: stored_image(stored[row][image]), range(len(source))),
        names=tuple(f"#{row}" for row in range(len(source))),
        truths=tuple(truths),
        splits=(split,) * len(source),
    )


def _load_saved(path: Path) -> HubDataset | Mapping[str, HubDataset]:
    try:
        import datasets
    except ModuleNotFoundError as exc:
        raise DataError(f"{str(path)!r} needs the package 'datasets'.", hint="Install it: pip install datasets") from exc
    try:
        return cast(HubDataset, datasets.load_from_disk(str(path)))
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise DataError(
            f"{str(path)!r} is not a saved dataset: {_shortened(str(exc).partition(chr(10))[0])}.",
            hint="Write the folder with save_to_disk of the package datasets.",
        ) from exc


def _checked(data: Data, labels: LabelSet) -> Data:
    """The data. Truths are replaced by their names in the label set."""
    if not len(data):
        raise DataError("The data contains no images.", hint="A folder of labelled images needs one subfolder per class.")
    known = labels.by_words
    files = () if isinstance(data.images, _Read) else cast(Sequence[Path], data.images)
    problems = {
        "labels are not in the label set": sorted(truth for truth in set(data.truths) if words(truth) not in known),
        "files do not exist": [str(file) for file in dict.fromkeys(files) if not _is_file(file)],
        "images occur more than once": [name for name, count in Counter(data.names).items() if count > 1],
    }
    found = [f"{len(cases)} {what} ({_few(cases)})" for what, cases in problems.items() if cases]
    if found:
        raise DataError(f"The labelled data has errors: {'; '.join(found)}.", hint="Correct the data, or use another label set.")
    truths = tuple(known[words(truth)] for truth in data.truths)
    return Data(images=data.images, names=data.names, truths=truths, splits=data.splits)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long for a file
        return False


def _few(cases: Sequence[str]) -> str:
    shown = ", ".join(repr(_shortened(case)) for case in cases[:MOST_SHOWN])
    return f"{shown}, …" if len(cases) > MOST_SHOWN else shown


def _shortened(text: str) -> str:
    half = LONGEST_SHOWN // 2
    return text if len(text) <= LONGEST_SHOWN else f"{text[:half]}…{text[-half:]}"


class _Read(Sequence[ImageSource]):
    """Images from rows of another sequence. Each image is read when it is used."""

    def __init__(self, read: Callable[[int], ImageSource], rows: Sequence[int]) -> None:
        self.read, self.rows = read, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> ImageSource:  # type: ignore[override]  # no slices
        return self.read(self.rows[index])

"""Labelled images from folders, tables and datasets of other libraries."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cascadevlm.base.errors import DataError
from cascadevlm.base.files import valid_text
from cascadevlm.base.frames import FrameTable, is_frame
from cascadevlm.base.image_table import About, ImageTable, read_table, text_of
from cascadevlm.base.images import ImageSource, image_files
from cascadevlm.base.labels import LabelSet, words
from cascadevlm.base.remote import name_of
from cascadevlm.base.tables import USUAL, ColumnNames, few, stored_image

if TYPE_CHECKING:
    from narwhals.typing import IntoDataFrame

STEPS = 1_000
"""Number of rows of a table that are read over. For a larger step, the rows between are left out."""


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


Source: TypeAlias = "Path | ImageDataset | HubDataset | Mapping[str, HubDataset] | IntoDataFrame"


@dataclass(frozen=True, kw_only=True)
class Data:
    """N images with their true labels.

    Attributes:
        images: the N images. Each image is read when it is used.
        names: N names of the images. The name of a file is its path.
        truths: N names of the true labels.
        splits: N names of the splits that the images belong to; "" if the source has no splits.
        about: the id and the kept columns of each image; empty if there are no such columns.
        columns: the columns of the table that were read.
    """

    images: Sequence[ImageSource]
    names: tuple[str, ...]
    truths: tuple[str, ...]
    splits: tuple[str, ...]
    about: tuple[About, ...] = ()
    columns: ColumnNames = USUAL

    def __len__(self) -> int:
        return len(self.truths)

    def take(self, rows: NDArray[np.intp]) -> "Data":
        """The images of these rows, in the order of the rows."""
        chosen = rows.tolist()
        names, truths, splits = (tuple(column[row] for row in chosen) for column in (self.names, self.truths, self.splits))
        about = tuple(self.about[row] for row in chosen) if self.about else ()
        images = _Read(self.images.__getitem__, chosen)
        return replace(self, images=images, names=names, truths=truths, splits=splits, about=about)

    def split(self, name: str) -> "Data":
        """The images of one split.

        Raises:
            DataError: if the data has no split with this name.
        """
        if name not in self.splits:
            known = sorted(set(self.splits) - {""})
            raise DataError(f"The data has no split {name!r}.", hint=f"Splits of the data: {few(known) or 'none'}.")
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


def read_data(source: "Source | str", labels: LabelSet, columns: ColumnNames = USUAL) -> Data:
    """Read labelled images, and check all of them.

    Args:
        source: one of these:

            - a folder with one subfolder per class;
            - a table in one of the forms that `cascadevlm.runs.inputs.Inputs` reads, with a column of images, a column of labels
              and, optionally, a column ``split``;
            - a pandas or Polars data frame or an Arrow table, with the same columns. Paths are relative to the working directory;
            - a ``datasets.Dataset``, or a mapping of several by the names of their splits;
            - a dataset in the form of torchvision.
        labels: the label set. Truths may be names or aliases.
        columns: the columns of a table or a frame. Default: the usual columns.

    Raises:
        DataError: if the source is not labelled data. One message names labels that are not in the label set, missing files, and
            images that occur more than once.
    """
    if isinstance(source, str | Path):
        data = _of_path(source, columns)
    elif is_frame(source):
        data = _of_table(ImageTable(FrameTable(source), columns, labelled=True))
    elif columns != USUAL:
        raise DataError("Columns can only be named for a table.", hint="Give a data frame, or the path of a table.")
    elif isinstance(source, ImageDataset):
        data = _of_image_dataset(source)
    elif isinstance(source, HubDataset | Mapping):
        data = _of_hub(source)
    else:
        hint = "Use a folder, a table, a frame, a datasets.Dataset, or an object with classes, a length and (image, class) items."
        raise DataError(f"An object of type {type(source).__name__} is not labelled data.", hint=hint)
    return _checked(data, labels)


def _of_path(path: str | Path, columns: ColumnNames) -> Data:
    table = read_table(path, columns, labelled=True)
    if table is not None:
        return _of_table(table)
    folder = Path(path)
    files = [
        (file, below.name)
        for below in sorted(folder.iterdir())
        if below.is_dir()
        for file in image_files(below)
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    return _of_files([file for file, _ in files], [name for _, name in files])


def _of_files(files: Sequence[Path], truths: Sequence[str]) -> Data:
    names = tuple(valid_text(str(file)) for file in files)
    return Data(images=tuple(files), names=names, truths=tuple(truths), splits=("",) * len(files))


def _of_table(table: ImageTable) -> Data:
    table.require_ids()
    entries = [*table.entries(whole=False)]
    return Data(
        images=_InTable(table, len(entries)) if table.contains_images else tuple(entry.source for entry in entries),
        names=tuple(valid_text(entry.name) for entry in entries),
        truths=tuple(entry.truth for entry in entries),
        splits=tuple(entry.split for entry in entries),
        about=tuple(entry.about for entry in entries) if table.columns.told else (),
        columns=table.columns,
    )


def _of_image_dataset(source: ImageDataset) -> Data:
    samples = getattr(source, "samples", None)  # paths of an ImageFolder, because its items raise errors for unreadable files
    if samples is not None:
        truths = [source.classes[number] for _, number in samples]
        return _of_files([Path(file) for file, _ in samples], truths)
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
        raise DataError("The dataset has no column of images or no column of classes.", hint=f"Its columns: {few([*kinds])}.")
    names = getattr(source.features[label], "names", None)
    column = cast(Mapping[str, Sequence[object]], source)[label]  # reads this column only
    truths = (names[value] if names and isinstance(value, int) and value >= 0 else text_of(value) for value in column)
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


def _checked(data: Data, labels: LabelSet) -> Data:
    """The data. Truths are replaced by their names in the label set."""
    if not len(data):
        raise DataError("The data contains no images.", hint="A folder of labelled images needs one subfolder per class.")
    known = labels.by_words
    images = data.images if isinstance(data.images, tuple) else ()
    files = [image for image in images if isinstance(image, Path)]
    same: Sequence[object] = data.images if images and not data.about else data.names
    problems = {
        "images have no label": [name for name, truth in zip(data.names, data.truths, strict=True) if not truth],
        "labels are not in the label set": sorted(truth for truth in {*data.truths} - {""} if words(truth) not in known),
        "rows have no image": [name for name, image in zip(data.names, images, strict=False) if image == b""],
        "files do not exist": [str(file) for file in dict.fromkeys(files) if not _is_file(file)],
        "images occur more than once": [name_of(str(image)) for image, count in Counter(same).items() if count > 1],
    }
    found = [f"{len(cases)} {what} ({few(cases)})" for what, cases in problems.items() if cases]
    if found:
        raise DataError(f"The labelled data has errors: {'; '.join(found)}.", hint="Correct the data, or use another label set.")
    return replace(data, truths=tuple(known[words(truth)] for truth in data.truths))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long for a file
        return False


class _Read(Sequence[ImageSource]):
    """Images from rows of another sequence. Each image is read when it is used."""

    def __init__(self, read: Callable[[int], ImageSource], rows: Sequence[int]) -> None:
        self.read, self.rows = read, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> ImageSource:  # type: ignore[override]  # no slices
        return self.read(self.rows[index])


class _InTable(Sequence[ImageSource]):
    """The images inside a table. Rows are read forwards, so images that are used in their order are read once."""

    def __init__(self, table: ImageTable, size: int) -> None:
        self.table, self.size = table, size
        self._next = 0
        self._ahead: Iterator[ImageSource] | None = None
        self._turn = threading.Lock()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> ImageSource:  # type: ignore[override]  # no slices
        row = range(self.size)[index]
        with self._turn:
            if self._ahead is None or not self._next <= row < self._next + STEPS:
                self._ahead = (entry.source for entry in self.table.entries(range(row, self.size)))
                self._next = row
            source = next(islice(self._ahead, row - self._next, None))
            self._next = row + 1
            return source

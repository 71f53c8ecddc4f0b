"""Predictions of a run in the formats of other tools.

Lines of ``predictions.jsonl`` are written as they are read, so memory grows by only one byte per prediction, or by at most 26
bytes if images are selected for a review. If the run is not finished, the predictions that exist at the start of the export are
exported. Relative paths count from the working directory, as in the run.

- If a person corrected an image, the image has the label of the person, and ``decided_by`` is "person".
- Images that the run could not read, or that have disappeared since then, are exported only to CSV and Parquet.
- Images without a label are unlabelled images in every format.
- Images in a table are read from the table. Formats that can only name files cannot export them.
"""

import csv
import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import compress, islice
from pathlib import Path
from typing import Literal, TextIO, TypeAlias, TypeVar
from urllib.parse import quote
from xml.etree import ElementTree

import numpy as np
from pydantic import BaseModel, JsonValue, ValidationError

from cascadevlm.base.annotation_files import LOCAL_FILES
from cascadevlm.base.errors import DataError, ImageError, InputError
from cascadevlm.base.files import valid_text
from cascadevlm.base.images import read_bytes, size_of
from cascadevlm.base.remote import Place, is_address
from cascadevlm.base.secrets import HIDDEN
from cascadevlm.base.secrets import is_address as is_web_address
from cascadevlm.base.tables import USUAL, ColumnNames
from cascadevlm.runs.corrections import Corrections, read_corrections
from cascadevlm.runs.label_studio import TAKEN, config_of, task_of
from cascadevlm.runs.lines import ROWS_AT_ONCE, KeptTypes, Line
from cascadevlm.runs.manifest import NAME
from cascadevlm.runs.predictions import Predictions, predictions_of, table_of
from cascadevlm.runs.review import Review

T = TypeVar("T")

COLUMNS = ("path", "id", "label", "probability", "decided_by", "escalated", "outcome", "dollars", "error")
"""The columns of tables. The column ``id`` exists only if the images have ids. Kept columns follow."""

RESERVED = (*COLUMNS, "image", "by", "when")
"""Names that kept columns do not have in a table: those of `COLUMNS`, and those that an import of corrections reads."""

LEFT_OUT, UNLABELLED, LABELLED = range(3)
"""What becomes of a line: it is left out, or exported without or with a label."""

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
"""First characters of texts that a spreadsheet may read as a formula (OWASP, "CSV Injection")."""


class _Named(BaseModel):
    name: str


class _Described(BaseModel):
    """The part of a run's manifest that is used: the labels, the path of the inputs ("" if it is not known), the columns."""

    labels: list[_Named]
    inputs: str = ""
    columns: ColumnNames = USUAL


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The predictions that are exported.

    Attributes:
        name: name of the run.
        labels: names of the label set.
        predictions: all predictions of the run.
        corrections: the corrections of the run. Predictions are given with the labels of people.
        wanted: for each line, `LEFT_OUT`, `UNLABELLED` or `LABELLED`.
        kept: the types of the kept columns.
        columns: those of `COLUMNS` that tables have.
    """

    name: str
    labels: tuple[str, ...]
    predictions: Predictions
    corrections: Corrections
    wanted: bytearray
    kept: KeptTypes
    columns: tuple[str, ...]

    def __iter__(self) -> Iterator[tuple[int, Line]]:
        """The lines with their numbers in the file, from 1."""
        return ((number, self.corrections.applied(line)) for number, line in compress(self.predictions, self.wanted))

    def with_images(self) -> Iterator[tuple[int, Line, Place | bytes]]:
        """The lines with their numbers, and the path, the address or the bytes of the image."""
        lines = compress(self.predictions.with_images(), self.wanted)
        return ((number, self.corrections.applied(line), image) for number, line, image in lines)

    def reading(self, read: Callable[[Place | bytes], T]) -> Iterator[tuple[int, Line, T]]:
        """The lines with their numbers, and what a function reads from the image. If an image cannot be read, it becomes
        `LEFT_OUT`.

        Raises:
            ImageError: if no image can be read.
        """
        failure = None
        for number, line, image in self.with_images():
            try:
                content = read(image)
            except ImageError as exc:
                failure = exc
                self.wanted[number - 1] = LEFT_OUT
            else:
                yield number, line, content
        if failure and not any(self.wanted):
            raise failure

    @property
    def counts(self) -> tuple[int, int]:
        """The number of images that are exported, and how many of them have a label."""
        labelled = self.wanted.count(LABELLED)
        return labelled + self.wanted.count(UNLABELLED), labelled

    def cells(self, line: Line, taken: Collection[str] = RESERVED) -> dict[str, JsonValue]:
        """The row of a line in a table: the values of `columns`, and of the kept columns. ``taken`` as in `KeptTypes.names`."""
        return {name: getattr(line, name) for name in self.columns} | self.kept.cells(line, taken)


Images: TypeAlias = Literal["none", "any", "web", "files"]
"""What a format needs from images: nothing, their content, the paths of their files or their web addresses, or the paths of their
files.
"""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format of an export.

    Attributes:
        write: function that gets the predictions and the path of the new file or folder. It returns one sentence that says how
            to load the result.
        images: what the format needs from each image.
    """

    write: Callable[[Chosen, Path], str]
    images: Images


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The result of an export.

    Attributes:
        images: number of images.
        labelled: number of these images that have a label.
        left_out: number of images that were not exported because they cannot be read.
        how_to_load: one sentence that says how to load the export.
    """

    images: int
    labelled: int
    left_out: int
    how_to_load: str


def export(run: str | Path, to: str, output: str | Path, *, review: Sequence[str] = ()) -> Exported:
    """Write the predictions of a run in the format of another tool. After an error, nothing is left at ``output``.

    Args:
        run: a folder that `cascadevlm run` or `cascadevlm evaluate` wrote, or a file with the output of `cascadevlm classify
            --json`. The label set of a folder is the label set of its run. The label set of a file is the sorted list of all
            labels in the file.
        to: one of `FORMATS`.
        output: the new file or folder.
        review: export only images that a person should look at. All of these must hold: "confidence < P", "abstained", an outcome
            of a question, a number of images ("200": those whose labels would teach most), or the size of a random sample
            ("random 200"). Default: all images.

    Raises:
        InputError: if the format is unknown, if the review is not valid, or if the output exists already or cannot be written.
        DataError: if there are no predictions, if a line is not a prediction, or if no image can be read.
    """
    run, output = Path(run), Path(output)
    if to not in FORMATS:
        raise InputError(f"There is no format {to!r}.", hint=f"Use one of: {', '.join(FORMATS)}.")
    selection = Review.parse(review) if review else None
    if output.exists():
        raise InputError(f"{str(output)!r} exists already.", hint="Use another name, or delete it first.")
    chosen, left_out = _choose(run, to, selection)
    all_images, _ = chosen.counts
    try:
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as scratch:
            unfinished = Path(scratch) / output.name
            how_to_load = FORMATS[to].write(chosen, unfinished)
            unfinished.rename(output)
    except (OSError, ImageError) as exc:
        raise InputError(
            f"The export {str(output)!r} cannot be written: {exc}.",
            hint="Check the path, its permissions and the free space on the disk.",
        ) from exc
    images, labelled = chosen.counts
    return Exported(images=images, labelled=labelled, left_out=left_out + all_images - images, how_to_load=how_to_load)


def _choose(run: Path, to: str, review: Review | None) -> tuple[Chosen, int]:
    """The predictions to export, and the number of images that are left out because they cannot be read."""
    form, described = FORMATS[to], _description_of(run)
    said = predictions_of(run, table_of(described.inputs, described.columns) if form.images == "any" else None)
    corrections = read_corrections(run)
    labels = tuple(label.name for label in described.labels)
    known, occurring, left_out, remote, wanted = set(labels), set[str](), 0, "", bytearray()
    kept, have_ids = KeptTypes(), False
    for number, original, image in said.with_images():
        line = corrections.applied(original)
        named = {line.label} if line.label is not None else set()
        if known and not named <= known:
            raise DataError(
                f"{str(said.file)!r}, line {number}: {line.label!r} is not in the label set of the run.",
                hint="Use the unchanged folder of a run.",
            )
        kept.add(line)
        have_ids = have_ids or line.id is not None
        occurring |= named | {candidate.label for candidate in line.candidates}
        readable = form.images == "none" or (bool(line.candidates) and _is_there(image, form.images))
        left_out += not readable
        remote = remote or (image if is_address(image) else "")
        wanted.append(LEFT_OUT if not readable else UNLABELLED if line.label is None else LABELLED)
        if review and readable and line.candidates:
            review.add(number - 1, original, seen=line.key in corrections.standing)
    if not wanted:
        raise DataError(f"{str(said.file)!r} contains no predictions.", hint="Continue the run first.")
    if left_out == len(wanted):
        raise _remote(remote, to) if remote else _unreadable(said.file, to, described)
    if review:
        selected = np.zeros(len(wanted), dtype=np.uint8)
        selected[review.rows()] = 1
        if not selected.any():
            told = f"{str(said.file)!r} has nothing to review: no image that a person has not looked at fits the selection."
            raise DataError(told, hint="Export with another --review, or without it.")
        wanted, left_out = bytearray((selected * np.frombuffer(wanted, dtype=np.uint8)).tobytes()), 0
    chosen = Chosen(
        name=run.resolve().name,
        labels=labels or tuple(sorted(occurring)),
        predictions=said,
        corrections=corrections,
        wanted=wanted,
        kept=kept,
        columns=tuple(name for name in COLUMNS if have_ids or name != "id"),
    )
    return chosen, left_out


def _is_there(image: Place | bytes, needed: Images) -> bool:
    """Whether an image can be exported. An image at an address is not downloaded to find this out."""
    if isinstance(image, Path):
        return image.is_file()
    if isinstance(image, bytes):
        return bool(image)
    return HIDDEN not in image and (needed == "any" or (needed == "web" and is_web_address(image)))


def _description_of(run: Path) -> _Described:
    """The part of the manifest in a folder; empty if there is no manifest."""
    found = run / NAME
    if not found.is_file():
        return _Described(labels=[])
    try:
        return _Described.model_validate_json(found.read_bytes())
    except ValidationError as exc:
        raise DataError(
            f"{str(found)!r} does not contain a valid label set: {exc.errors()[0]['msg']}.",
            hint="Use the unchanged folder of a run.",
        ) from exc


def _remote(address: str, to: str) -> DataError:
    """The error if no image can be exported in a format because the images are at addresses."""
    hint = "Download the images and repeat the run, or use the formats csv or parquet."
    if HIDDEN in address:
        told = f"The images cannot be read again, because results do not contain the credentials in their addresses: {address!r}"
        return DataError(f"{told}.", hint=hint)
    named = "files on this machine" + " and addresses with http:// or https://" * (FORMATS[to].images == "web")
    return DataError(f"The images are at addresses such as {address!r}, and the format {to!r} names only {named}.", hint=hint)


def _unreadable(file: Path, to: str, described: _Described) -> DataError:
    """The error if no image can be exported in a format."""
    needs_files = ("web", "files")
    if table_of(described.inputs, described.columns) is not None and FORMATS[to].images in needs_files:
        others = ", ".join(name for name, form in FORMATS.items() if form.images not in needs_files)
        told = f"The images are inside {described.inputs!r}, and the format {to!r} can only name files."
        return DataError(told, hint=f"Formats that need no files are {others}.")
    read = f"The run read them from {described.inputs!r}" if described.inputs else "Only files can be read again"
    hint = f"{read}, and relative paths start at the working directory. Repeat the command in the working directory of the run."
    return DataError(f"None of the images in {str(file)!r} can be read.", hint=hint)


def absolute(line: Line) -> Path:
    """The absolute path of an image. Links are not resolved."""
    return Path(os.path.normpath(Path(line.path).absolute()))


def write_csv(chosen: Chosen, output: Path) -> str:
    """Write a table with `COLUMNS` and the kept columns. A text that a spreadsheet would read as a formula gets an apostrophe in
    front.
    """

    def cell(value: JsonValue) -> JsonValue:
        return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value

    with output.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        names = [*chosen.columns, *chosen.kept.names(RESERVED).values()]
        table = csv.DictWriter(file, names)
        table.writerow({name: cell(name) for name in names})
        table.writerows({name: cell(value) for name, value in chosen.cells(line).items()} for _, line in chosen)
    return "It is UTF-8 with a header line."


_TYPES = {"probability": "float64", "escalated": "bool", "dollars": "float64"}
"""The types of `COLUMNS` that are not texts, by their names in Arrow and ``datasets``."""


def write_parquet(chosen: Chosen, output: Path) -> str:
    """Write a Parquet table with `COLUMNS` and the kept columns, which keep their types."""
    import pyarrow
    import pyarrow.parquet

    kinds = {name: pyarrow.type_for_alias(_TYPES.get(name, "string")) for name in chosen.columns}
    schema = pyarrow.schema(kinds | chosen.kept.schema(RESERVED))
    rows = (_valid(chosen.cells(line)) for _, line in chosen)
    with pyarrow.parquet.ParquetWriter(output, schema) as writer:
        while some := list(islice(rows, ROWS_AT_ONCE)):
            writer.write_table(pyarrow.Table.from_pylist(some, schema=schema))
    return "Load it: pandas.read_parquet(FILE)."


def _valid(cells: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    return {name: valid_text(value) if isinstance(value, str) else value for name, value in cells.items()}


def write_hf(chosen: Chosen, output: Path) -> str:
    """Write a folder in the form of ``save_to_disk`` of ``datasets``: the unchanged image files, with `COLUMNS`.

    During the export, the folder needs twice its size on disk. ``datasets`` maps its files into memory; other memory does not
    grow.

    Raises:
        DataError: if the package is missing, or the data set cannot be written.
    """
    try:
        import datasets
    except ModuleNotFoundError as exc:
        raise DataError("The format 'hf' needs the package 'datasets'.", hint="Install it: pip install datasets") from exc
    columns = {name: datasets.Value(_TYPES.get(name, "string")) for name in chosen.columns}
    columns |= {name: datasets.Value(chosen.kept.type_of(column)) for column, name in chosen.kept.names(RESERVED).items()}
    columns |= {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(chosen.labels))}

    def examples() -> Iterator[dict[str, object]]:
        for _, line, content in chosen.reading(lambda image: image if isinstance(image, bytes) else read_bytes(image)):
            stored = {"bytes": content, "path": valid_text(Path(line.path).name)}
            yield {**_valid(chosen.cells(line)), "image": stored}

    try:
        made = datasets.Dataset.from_generator(
            examples, features=datasets.Features(columns), cache_dir=str(output.parent / "cache"), writer_batch_size=100
        )
        made.save_to_disk(output)
    except datasets.exceptions.DatasetGenerationError as exc:
        raise DataError(
            f"The data set cannot be written: {exc.__cause__}.",
            hint="Check the path, its permissions and the free space on the disk.",
        ) from exc
    return "Load it: datasets.load_from_disk(FOLDER)."


def write_coco(chosen: Chosen, output: Path) -> str:
    """Write one JSON file with ``images``, ``categories`` and ``annotations``.

    Sizes of images are the sizes before an EXIF rotation. Annotations have a category and a score, and no box. Ids start at 1.
    The id of an image and of its annotation is the number of its line in the predictions.
    """
    category = {name: number for number, name in enumerate(chosen.labels, start=1)}

    def image(number: int, line: Line, size: tuple[int, int]) -> dict[str, JsonValue]:
        width, height = size
        fields: dict[str, JsonValue] = {"id": number, "file_name": line.path, "width": width, "height": height}
        ids = {} if line.id is None else {"input.id": line.id}
        return fields | ids | chosen.kept.cells(line, fields)

    with output.open("w", encoding="utf-8") as file:
        file.write(f'{{"info": {json.dumps({"description": f"Predictions of {chosen.name}"})},\n"categories": ')
        _write_list(file, ({"id": number, "name": name} for name, number in category.items()))
        file.write(',\n"images": ')
        _write_list(file, (image(number, line, size) for number, line, size in chosen.reading(size_of)))
        file.write(',\n"annotations": ')
        annotations = (
            {"id": number, "image_id": number, "category_id": category[line.label], "score": line.probability}
            for number, line in chosen
            if line.label is not None
        )
        _write_list(file, annotations)
        file.write("}\n")
    return "Load it: pycocotools.coco.COCO(FILE)."


def write_label_studio(chosen: Chosen, output: Path) -> str:
    """Write a folder with ``tasks.json`` and ``label_config.xml``. The ``model_version`` of predictions is the name of the run.

    Images are local files, or have web addresses, which Label Studio shows. The paths of files are relative to the parent of the
    folder that contains all files: Label Studio serves only files in a local storage of the project, and the storage must be
    inside the document root.
    """
    output.mkdir()
    folders = (absolute(line).parent for _, line in chosen if not is_address(line.path))
    storage = reduce(_common, folders, None)
    taken = (*RESERVED, *TAKEN)

    def task(line: Line) -> dict[str, JsonValue]:
        image = line.path
        if storage is not None and not is_address(line.path):
            image = LOCAL_FILES + "?d=" + quote(os.fsencode(absolute(line).relative_to(storage.parent).as_posix()))
        return task_of(line, chosen.cells(line, taken), image=image, run=chosen.name)

    with (output / "tasks.json").open("w", encoding="utf-8") as file:
        _write_list(file, (task(line) for _, line in chosen))
    config = ElementTree.ElementTree(config_of(chosen.labels))
    config.write(output / "label_config.xml", encoding="utf-8")
    if storage is None:
        return "Make a project of Label Studio with label_config.xml, and import tasks.json."
    serving = f"LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={storage.parent}"
    steps = (
        f"make a project with label_config.xml, add {storage} to it as a local storage without syncing it, and import tasks.json"
    )
    return f"Start Label Studio with {serving}, {steps}."


def _common(folder: Path | None, other: Path) -> Path:
    return other if folder is None else Path(os.path.commonpath((folder, other)))


_FIFTYONE = ("id", "label", "confidence", "logits", "tags")
"""The fields that a label in FiftyOne has."""


def write_fiftyone(chosen: Chosen, output: Path) -> str:
    """Write the ``labels.json`` of a ``FiftyOneImageClassificationDataset``. It contains the classes and, by the absolute path
    of each image, the label, the confidence, who decided, the candidates with their probabilities, the last judge's reasoning,
    the id as ``input_id``, and the kept columns. Unlabelled images have null.

    FiftyOne refuses points in the names of fields, so each point becomes "_". If two fields have one name, "_" is added. Of a
    file that occurs several times, FiftyOne keeps the last prediction.
    """
    number_of = {name: number for number, name in enumerate(chosen.labels)}

    def target(line: Line) -> JsonValue:
        if line.label is None:
            return None
        attributes: dict[str, JsonValue] = {
            "decided_by": line.decided_by,
            "candidates": [candidate.label for candidate in line.ranked],
            "probabilities": [candidate.probability for candidate in line.ranked],
            "reasoning": line.verdict.rationale or line.verdict.text if line.verdict else "",
        }
        if line.id is not None:
            attributes["input.id"] = line.id
        fields: dict[str, JsonValue] = {}
        for name, value in (attributes | chosen.kept.cells(line, (*attributes, *_FIFTYONE))).items():
            field = name.replace(".", "_")
            while field in fields:
                field += "_"
            fields[field] = value
        return {"label": number_of[line.label], "confidence": line.probability, "attributes": fields}

    with output.open("w", encoding="utf-8") as file:
        file.write(f'{{"classes": {json.dumps(chosen.labels)},\n"labels": ')
        targets = (f"{json.dumps(str(absolute(line)))}: {json.dumps(target(line))}" for _, line in chosen)
        _write_joined(file, "{", targets, "}")
        file.write("}\n")
    dataset_type = "fiftyone.types.FiftyOneImageClassificationDataset"
    return f'Load it: fiftyone.Dataset.from_dir(dataset_type={dataset_type}, labels_path=FILE, label_field="predictions").'


def _write_list(file: TextIO, items: Iterable[Mapping[str, JsonValue]]) -> None:
    _write_joined(file, "[", map(json.dumps, items), "]")


def _write_joined(file: TextIO, opening: str, items: Iterable[str], closing: str) -> None:
    """Write JSON texts one by one, one per line."""
    file.write(opening)
    for number, item in enumerate(items):
        file.write(f",\n{item}" if number else f"\n{item}")
    file.write(f"\n{closing}")


FORMATS: Mapping[str, Format] = {
    "csv": Format(write=write_csv, images="none"),
    "parquet": Format(write=write_parquet, images="none"),
    "hf": Format(write=write_hf, images="any"),
    "coco": Format(write=write_coco, images="any"),
    "label-studio": Format(write=write_label_studio, images="web"),
    "fiftyone": Format(write=write_fiftyone, images="files"),
}
"""The formats by the names that `export` takes."""

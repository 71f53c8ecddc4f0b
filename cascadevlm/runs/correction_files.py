"""Reads corrections from files: exports of Label Studio and FiftyOne, tables, and the corrections of another run.

Nothing is guessed: every image must be in the run, and every label must be in the label set. If anything in the file is wrong,
nothing is added to the run.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

from pydantic import JsonValue, ValidationError

from cascadevlm.base.entry_points import similar
from cascadevlm.base.errors import DataError
from cascadevlm.base.image_table import TABLES, open_table, text_of
from cascadevlm.base.labels import LabelSet, words
from cascadevlm.base.tables import USUAL, ColumnNames, Table, few
from cascadevlm.runs.corrections import CORRECTIONS, Correction, Corrections, add_corrections, read_corrections
from cascadevlm.runs.export import FORMULA, absolute
from cascadevlm.runs.label_studio import Said, read_annotations
from cascadevlm.runs.manifest import Manifest
from cascadevlm.runs.predictions import predictions_of

NONE, SKIP = "none", "skip"
"""Words in place of a label: the image shows none of the labels; the person did not decide. If a label has this name, the word
is the label.
"""

FORMS = "Label Studio's or FiftyOne's JSON, or a CSV, TSV, JSON lines or Parquet file with the columns image and label"


_Row: TypeAlias = tuple[str, str | None, str]
"""The path of an image of the run, its id, and its digest."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """The result of an import.

    Attributes:
        added: number of corrections that are new.
        known: number of corrections that the run contained already.
        without_label: number of rows without a label. They say nothing.
        corrections: all corrections of the run after the import.
    """

    added: int
    known: int
    without_label: int
    corrections: Corrections


def import_corrections(file: str | Path, run: str | Path, *, by: str = "", columns: ColumnNames = USUAL) -> Imported:
    """Add the corrections in a file to a run. A second import of the same file adds nothing.

    Args:
        file: one of these. A statement without a time has the time at which the file was changed last.

            - an export of Label Studio, in the form JSON or JSON_MIN;
            - an export of FiftyOne: the ``labels.json`` of a ``FiftyOneImageClassificationDataset``;
            - a CSV, TSV, JSON lines or Parquet file with the columns ``image`` (or ``path``), ``label`` and, optionally, ``by``
              and ``when``;
            - the ``corrections.jsonl`` of another run.
        run: folder of a run or a record.
        by: name of the person, for statements without a name.
        columns: the columns of a table: ``label``, and either ``image`` or ``id``. With ``id``, the table names images by the ids
            that they have in the run. Default: the columns above.

    Raises:
        DataError: if the file cannot be read, lacks a column, or the folder is not a run; if columns are named for a file that is
            not a table, or ids for a run without ids; if an image is not in the run, a label is not in the label set, or a person
            has two labels for an image at the same time. One message names all of these. Nothing is added then.
        RunError: if the folder cannot be written.
    """
    file, run = Path(file), Path(run)
    manifest = Manifest.read(run)
    if columns.id is not None and manifest.columns.id is None:
        raise DataError(f"The images of the run in {str(run)!r} have no ids.", hint="Name the column of images: --image COLUMN.")
    labels = LabelSet(tuple(manifest.labels))
    said = [each._replace(by=each.by or by) for each in _read(file, labels, columns)]
    stated = [each for each in said if each.labels or each.skipped]
    rows = _rows_in(run, {each.image for each in stated}, ids=columns.id is not None)
    source = str(file.absolute())
    _require_no_faults(file, stated, rows, labels, ids=columns.id is not None)
    found = [
        Correction(
            image=image,
            id=id,
            label=_label(each.labels[0], labels) if each.labels and each.labels[0] is not None else None,
            skipped=each.skipped,
            by=each.by,
            at=each.at,
            source=source,
        )
        for each in stated
        for image, id, _ in rows[each.image]
    ]
    added = add_corrections(run, found)
    return Imported(
        added=len(added),
        known=len(found) - len(added),
        without_label=len(said) - len(stated),
        corrections=read_corrections(run),
    )


def _label(text: str, labels: LabelSet) -> str | None:
    """The name of a label; None if there is no such label."""
    return labels.by_words.get(words(text))


def _require_no_faults(file: Path, stated: list[Said], rows: Mapping[str, set[_Row]], labels: LabelSet, *, ids: bool) -> None:
    missing = {each.image: each.where for each in stated if each.image not in rows}
    shared = {each.image: each.where for each in stated if len(rows.get(each.image, ())) > 1}
    named = {name: each.where for each in stated for name in each.labels if name is not None}
    unknown = {name: where for name, where in named.items() if _label(name, labels) is None}
    twice = Counter((row, each.by, each.at) for each in stated for row in rows.get(each.image, {(each.image, None, "")}))
    problems = {
        f"{'ids' if ids else 'images'} are not in the run": [f"{image}, {where}" for image, where in missing.items()],
        "labels are not in the label set": [f"{name}, {where}" for name, where in unknown.items()],
        "names belong to several images of the run, which only ids can tell apart": [
            f"{image}, {where}" for image, where in shared.items()
        ],
        "statements name several labels": [each.where for each in stated if len(each.labels) > 1],
        "images occur more than once": [id or image for ((image, id, _), *_), count in twice.items() if count > 1],
    }
    found = [f"{len(cases)} {what} ({few(cases)})" for what, cases in problems.items() if cases]
    if found:
        meant = " ".join(["", *filter(None, (similar(name, labels.names) for name in [*unknown][:1]))])
        names_are = "by their ids in the run"
        if not ids:
            names_are = "as in the run, or by their absolute paths; relative paths of the run start at this working directory"
        hint = f"Nothing was imported. Images are named {names_are}.{meant}"
        raise DataError(f"The corrections in {str(file)!r} have errors: {'; '.join(found)}.", hint=hint)


def _rows_in(run: Path, wanted: set[str], *, ids: bool) -> Mapping[str, set[_Row]]:
    """The images of the run that a file names by their ids or, without ``ids``, in the same way or by their absolute paths."""
    found: defaultdict[str, set[_Row]] = defaultdict(set)
    for _, line in predictions_of(run, None):
        for name in {line.id} if ids else {line.path, str(absolute(line))}:
            if name in wanted:
                found[name].add((line.path, line.id, line.digest or line.content))
    return found


def _read(file: Path, labels: LabelSet, columns: ColumnNames) -> list[Said]:
    """The statements in a file."""
    if columns != USUAL and (file.name == CORRECTIONS or file.suffix.lower() == ".json"):
        raise DataError(f"{str(file)!r} is not a table, so it has no columns.", hint=f"Leave out: {columns}.")
    try:
        changed = datetime.fromtimestamp(file.stat().st_mtime, UTC)
        if file.name == CORRECTIONS:
            return [_again(number, each) for number, each in enumerate(read_corrections(file.parent).all, start=1)]
        if file.suffix.lower() == ".json":
            return [*_of_json(json.loads(file.read_bytes()), changed, labels)]
        table = open_table(file) if file.suffix.lower() in TABLES else None
        if table is None:
            raise ValueError(f"the suffix {file.suffix!r} is unknown")
        return [*_of_table(table, changed, labels, columns)]
    except (OSError, ValueError, RecursionError) as exc:  # errors of pydantic, Arrow and JSON are ValueErrors
        why = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc).partition("\n")[0].rstrip(".")
        if isinstance(exc, ValidationError):
            first = exc.errors()[0]
            why = f"it is not an export of Label Studio ({'.'.join(map(str, first['loc']))}: {first['msg']})"
        raise DataError(f"The corrections in {str(file)!r} cannot be read: {why}.", hint=f"Give {FORMS}.") from exc


def _again(number: int, each: Correction) -> Said:
    """The statement of a correction."""
    return Said(f"line {number}", each.image, () if each.skipped else (each.label,), each.skipped, each.by, each.at)


def _said(where: str, image: str, text: str, by: str, at: datetime, labels: LabelSet) -> Said:
    """The statement of a text: a label, `NONE`, `SKIP`, or "" if the text says nothing."""
    if not text or _label(text, labels) is not None or text not in (NONE, SKIP):
        return Said(where, image, (text,) if text else (), skipped=False, by=by, at=at)
    return Said(where, image, () if text == SKIP else (None,), skipped=text == SKIP, by=by, at=at)


def _of_json(content: JsonValue, changed: datetime, names: LabelSet) -> Iterator[Said]:
    if isinstance(content, list):
        return read_annotations(content, changed)
    labels = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(labels, dict):
        raise ValueError("it is not an export of Label Studio or FiftyOne")
    classes = content.get("classes")
    return _of_fiftyone(labels, classes if isinstance(classes, list) else [], changed, names)


def _of_fiftyone(labels: Mapping[str, JsonValue], classes: list[JsonValue], changed: datetime, names: LabelSet) -> Iterator[Said]:
    """The statements in ``labels.json`` of a ``FiftyOneImageClassificationDataset``.

    A label is null, a name or the number of a class, or an object that contains one of these as ``label``.
    """
    for image, target in labels.items():
        label = target.get("label") if isinstance(target, dict) else target
        if isinstance(label, int) and 0 <= label < len(classes):
            label = classes[label]
        if not (label is None or isinstance(label, str)):
            raise ValueError(f"the label of {image!r} is neither a name nor a class")
        yield _said(repr(image), image, label or "", "", changed, names)


def _of_table(table: Table, changed: datetime, labels: LabelSet, columns: ColumnNames) -> Iterator[Said]:
    label = table.require(columns.label or "label")
    named = columns.id or columns.image
    places = [table.require(named)] if named else [name for name in ("image", "path") if name in table.columns]
    read = dict.fromkeys([*places, label, *(name for name in ("by", "when") if name in table.columns)])
    for row in table.rows([*read]):
        cells = (row.cells.get(place) for place in places)
        image = next((text for cell in cells if not isinstance(cell, bytes | Mapping | list) and (text := text_of(cell))), "")
        if not image:
            raise ValueError(f"{table.where(row)} has no {'id' if columns.id else 'image'}; the columns are {few(table.columns)}")
        at = _time(row.cells.get("when"), table.where(row)) or changed
        said, by = (_without_apostrophe(text_of(row.cells.get(name))) for name in (label, "by"))
        yield _said(table.where(row), _without_apostrophe(image), said, by, at, labels)


def _time(when: object, where: str) -> datetime | None:
    """The time in a cell; None if the cell is empty. Numbers are refused, because they can be seconds, milliseconds or days."""
    try:
        if not isinstance(when, datetime):
            if not (text := text_of(when)):
                return None
            if "-" not in text:
                raise ValueError
            when = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{where} has {when!r} in the column 'when', which is not a time such as 2026-01-31T12:00:00Z") from None
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def _without_apostrophe(text: str) -> str:
    """A text as it was before `cascadevlm.runs.export.write_csv` protected it from a spreadsheet."""
    return text[1:] if text.startswith("'") and text[1:].startswith(FORMULA) else text

"""Reads corrections from files: exports of Label Studio and FiftyOne, tables, and the corrections of another run.

Nothing is guessed: every image must be in the run, and every label must be in the label set. If anything in the file is wrong,
nothing is added to the run.
"""

import csv
import difflib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import JsonValue, ValidationError

from cascadevlm.base.errors import DataError
from cascadevlm.base.labels import LabelSet, words
from cascadevlm.base.tables import json_line
from cascadevlm.runs.corrections import CORRECTIONS, Correction, Corrections, add_corrections, read_corrections
from cascadevlm.runs.export import absolute
from cascadevlm.runs.label_studio import NONE, SKIP, Said, read_annotations
from cascadevlm.runs.manifest import Manifest
from cascadevlm.runs.predictions import predictions_of

MOST_SHOWN = 5
"""Number of cases of each problem that a message names."""

FORMS = "Label Studio's or FiftyOne's JSON, or a CSV, TSV, JSON lines or Parquet file with the columns image and label"


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


def import_corrections(file: str | Path, run: str | Path, *, by: str = "") -> Imported:
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

    Raises:
        DataError: if the file cannot be read, or the folder is not a run; if an image is not in the run, a label is not in the
            label set, or a person has two labels for an image at the same time. One message names all of these. Nothing is added
            then.
        RunError: if the folder cannot be written.
    """
    file, run = Path(file), Path(run)
    labels = LabelSet(tuple(Manifest.read(run).labels))
    said = [each._replace(by=each.by or by) for each in _read(file)]
    stated = [each for each in said if each.labels]
    names, source = _names_in(run, {each.image for each in stated}), str(file.absolute())
    _require_no_faults(file, stated, names, labels)
    found = [
        Correction(
            image=names[each.image],
            label=_label(each.labels[0], labels),
            skipped=each.labels[0] == SKIP and _label(SKIP, labels) is None,
            by=each.by,
            at=each.at,
            source=source,
        )
        for each in stated
    ]
    added = add_corrections(run, found)
    return Imported(
        added=len(added),
        known=len(found) - len(added),
        without_label=len(said) - len(stated),
        corrections=read_corrections(run),
    )


def _label(text: str, labels: LabelSet) -> str | None:
    """The name of a label; None for `NONE` and `SKIP`."""
    return labels.by_words.get(words(text))


def _require_no_faults(file: Path, stated: list[Said], names: Mapping[str, str], labels: LabelSet) -> None:
    missing = {each.image: each.where for each in stated if each.image not in names}
    named = {name: each.where for each in stated for name in each.labels if name not in (NONE, SKIP)}
    unknown = {name: where for name, where in named.items() if _label(name, labels) is None}
    twice = Counter((each.image, each.by, each.at) for each in stated)
    problems = {
        "images are not in the run": [f"{image!r} in {where}" for image, where in missing.items()],
        "labels are not in the label set": [
            f"{name!r} in {where}, the nearest label is {_nearest(name, labels)!r}" for name, where in unknown.items()
        ],
        "statements name several labels": [each.where for each in stated if len(each.labels) > 1],
        "images occur more than once": [repr(image) for (image, _, _), count in twice.items() if count > 1],
    }
    found = [
        f"{len(cases)} {what} ({', '.join(cases[:MOST_SHOWN])}{', …' * (len(cases) > MOST_SHOWN)})"
        for what, cases in problems.items()
        if cases
    ]
    if found:
        hint = "Nothing was imported. Images are named as in the run, or by their absolute paths."
        raise DataError(f"The corrections in {str(file)!r} have errors: {'; '.join(found)}.", hint=hint)


def _nearest(name: str, labels: LabelSet) -> str:
    return difflib.get_close_matches(name, labels.names, n=1, cutoff=0)[0]


def _names_in(run: Path, wanted: set[str]) -> dict[str, str]:
    """The names in the run of the images that a file names in the same way, or by their absolute paths."""
    found = {}
    for _, line in predictions_of(run, None):
        for name in (line.path, str(absolute(line))):
            if name in wanted:
                found[name] = line.path
    return found


def _read(file: Path) -> list[Said]:
    """The statements in a file."""
    try:
        changed = datetime.fromtimestamp(file.stat().st_mtime, UTC)
        if file.name == CORRECTIONS:
            return [
                Said(f"line {number}", each.image, (SKIP if each.skipped else each.label or NONE,), each.by, each.at)
                for number, each in enumerate(read_corrections(file.parent).all, start=1)
            ]
        if file.suffix.lower() == ".json":
            return [*_of_json(json.loads(file.read_bytes()), changed)]
        return [_of_row(number, row, changed) for number, row in _rows(file)]
    except (OSError, ValueError, RecursionError, csv.Error) as exc:  # errors of pydantic, Arrow and JSON are ValueErrors
        why = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc).partition("\n")[0].rstrip(".")
        if isinstance(exc, ValidationError):
            first = exc.errors()[0]
            why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise DataError(f"The corrections in {str(file)!r} cannot be read: {why}.", hint=f"Give {FORMS}.") from exc


def _of_json(content: JsonValue, changed: datetime) -> Iterator[Said]:
    if isinstance(content, list):
        return read_annotations(content)
    labels = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(labels, dict):
        raise ValueError("it is not an export of Label Studio or FiftyOne")
    classes = content.get("classes")
    return _of_fiftyone(labels, classes if isinstance(classes, list) else [], changed)


def _of_fiftyone(labels: Mapping[str, JsonValue], classes: list[JsonValue], changed: datetime) -> Iterator[Said]:
    """The statements in ``labels.json`` of a ``FiftyOneImageClassificationDataset``.

    A label is null, a name or the number of a class, or an object that contains one of these as ``label``.
    """
    for image, target in labels.items():
        label = target.get("label") if isinstance(target, dict) else target
        if isinstance(label, int) and 0 <= label < len(classes):
            label = classes[label]
        if not (label is None or isinstance(label, str)):
            raise ValueError(f"the label of {image!r} is neither a name nor a class")
        yield Said(repr(image), image, (label,) if label else (), "", changed)


def _rows(file: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    """The rows of a table with their numbers of lines or, in a Parquet file, of rows, from 1."""
    suffix = file.suffix.lower()
    if suffix in (".csv", ".tsv"):
        with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
            head = lines.readline()
            lines.seek(0)
            reader = csv.DictReader(lines, delimiter=max(",;\t", key=head.count))
            yield from ((reader.line_num, row) for row in reader)
    elif suffix == ".jsonl":
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                row = json_line(line, number)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is not a JSON object")
                yield number, row
    elif suffix == ".parquet":
        import pyarrow.parquet

        yield from enumerate(pyarrow.parquet.read_table(file).to_pylist(), start=1)
    else:
        raise ValueError(f"the suffix {suffix!r} is unknown")


def _of_row(number: int, row: Mapping[str, object], changed: datetime) -> Said:
    image = row.get("image") or row.get("path")
    if not isinstance(image, str) or "label" not in row:
        raise ValueError(f"row {number} has no image or no column 'label'; its columns are {', '.join(map(str, row))}")
    label, by, when = (row.get(name) for name in ("label", "by", "when"))
    at = changed if when in (None, "") else when if isinstance(when, datetime) else datetime.fromisoformat(str(when))
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return Said(f"row {number}", image, (str(label),) if label not in (None, "") else (), str(by or ""), at)

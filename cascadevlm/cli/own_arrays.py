"""The options of ``cascadevlm import`` for scores and answers that were recorded elsewhere."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cascadevlm.base.errors import InputError
from cascadevlm.cli.options import Labels

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cascadevlm.base.labels import LabelSet

WHOLE = re.compile(r"-?[0-9]{1,9}")
"""A number of a column of the scores. Negative numbers stand for no answer."""


@dataclass(frozen=True, kw_only=True)
class ArrayOptions:
    """The arrays of a new record."""

    scores: Annotated[
        Path | None,
        typer.Option(help="Scores of N images for C labels: a .npy file of (N, C) logits or probabilities."),
    ] = None
    labels: Labels = None
    truths: Annotated[str | None, typer.Option(metavar="FILE", help="N true labels.")] = None
    answers: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="N answers of a judge. Empty or -1: the judge was not asked. 'none of these' or -2: it chose no candidate.",
            show_default="no judge",
        ),
    ] = None
    candidates: Annotated[
        str | None,
        typer.Option(
            metavar="K|FILE",
            help="Candidates that the judge saw: K for the K best labels of the scorer, or a .npy file of (N, K) labels.",
            show_default="all labels",
        ),
    ] = None
    dollars: Annotated[float, typer.Option(min=0, help="Cost of each question, in US dollars.")] = 0.0
    names: Annotated[str | None, typer.Option(metavar="FILE", help="N names of the images.", show_default="#0, #1, …")] = None
    judge: Annotated[str, typer.Option(help="Name of the judge.")] = "own:answers"
    output: Annotated[Path | None, typer.Option("--output", "-o", help="New folder for the record.")] = None

    def write(self, *, as_json: bool) -> None:
        """Write the record, and print what it contains.

        Raises:
            InputError: if an option is missing, or the arrays contradict each other.
        """
        from cascadevlm.base.labels import LabelSet
        from cascadevlm.evaluation.record import Record
        from cascadevlm.evaluation.write_record import write_record

        if self.scores is None or self.labels is None or self.truths is None or self.output is None:
            told = "A record needs --scores, --labels, --truths and --output."
            raise InputError(told, hint="For labels from people, give a file and --into RUN.")
        candidates, labels = self.candidates, LabelSet.read(self.labels)
        record = Record.from_arrays(
            _array(self.scores),
            labels,
            _labels_in(self.truths, labels),
            answers=None if self.answers is None else _labels_in(self.answers, labels),
            candidates=None if candidates is None else int(candidates) if candidates.isdecimal() else _array(Path(candidates)),
            dollars=self.dollars,
            names=None if self.names is None else [str(name) for name in _values(self.names)],
            judge=self.judge,
        )
        write_record(record, self.output)
        asked = int(record.judged.asked.sum()) if record.stages else 0
        if as_json:
            counts = {"images": len(record), "labels": len(record.labels), "asked": asked}
            typer.echo(json.dumps({"output": str(self.output), **counts}))
            return
        told = f"a record of {len(record):,} images and {len(record.labels):,} labels, with {asked:,} answers"
        typer.echo(f"{self.output}: {told}.")


def _array(path: Path) -> "NDArray[np.generic]":
    """The array in a .npy file. Arrays of objects are refused, because NumPy would unpickle them."""
    import numpy as np

    from cascadevlm.base.errors import DataError

    try:
        array: NDArray[np.generic] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as exc:
        why = f"{exc}".partition("\n")[0].rstrip(".")
        raise DataError(f"{str(path)!r} is not an array: {why}.", hint="Write it with numpy.save.") from exc
    return array


def _labels_in(text: str, labels: "LabelSet") -> "NDArray[np.generic] | list[str]":
    """The labels in a file. Texts are numbers of columns if all of them are whole numbers or empty, and none is a label."""
    import numpy as np

    from cascadevlm.base.arrays import NOBODY
    from cascadevlm.base.labels import words

    values = _values(text)
    if not isinstance(values, list) or not any(values):
        return values
    if any(value and (not WHOLE.fullmatch(value) or words(value) in labels.by_words) for value in values):
        return values
    return np.array([int(value) if value else NOBODY for value in values])


def _values(text: str) -> "NDArray[np.generic] | list[str]":
    """The values in a .npy file, in the lines of a text file, or in a column of a table, written as FILE:COLUMN."""
    from cascadevlm.base.image_table import open_table, text_of
    from cascadevlm.base.tables import reading

    path = Path(text)
    if path.suffix.lower() == ".npy":
        return _array(path)
    file, colon, column = text.rpartition(":")
    if not path.exists() and colon and (table := open_table(Path(file))) is not None:
        with reading(table.place):
            cells = [row.cells.get(column) for row in table.rows([table.require(column)])]
        return [f"{cell:.0f}" if isinstance(cell, float) and cell.is_integer() else text_of(cell) for cell in cells]
    with reading(path):
        return path.read_text(encoding="utf-8-sig").splitlines()

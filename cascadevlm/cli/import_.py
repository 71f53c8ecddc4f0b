"""``cascadevlm import``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cascadevlm.cli import options

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def import_(
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the record.")],
    scores: Annotated[
        Path,
        typer.Option(help="Scores of N images for C labels: a .npy file, (N, C) logits, log-probabilities or probabilities."),
    ],
    labels: Annotated[
        Path, typer.Option(help="The C class names, in the order of the scores. The forms are the same as for run.")
    ],
    truths: Annotated[str, typer.Option(metavar="FILE", help="N true labels.")],
    answers: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="N answers of a judge. Empty or -1: the judge was not asked. 'none of these' or -2: it chose no candidate.",
            show_default="no judge",
        ),
    ] = None,
    candidates: Annotated[
        str | None,
        typer.Option(
            metavar="K|FILE",
            help="Candidates that the judge saw: K for the K best labels of the scorer, or a .npy file of (N, K) labels.",
            show_default="all labels",
        ),
    ] = None,
    dollars: Annotated[float, typer.Option(min=0, help="Cost of each question, in US dollars.")] = 0.0,
    names: Annotated[str | None, typer.Option(metavar="FILE", help="N names of the images.", show_default="#0, #1, …")] = None,
    judge: Annotated[str, typer.Option(help="Name of the judge.")] = "own:answers",
    as_json: options.AsJson = False,
) -> None:
    """Make a record from scores and answers that were recorded elsewhere. All commands that read records can use it: sweep,
    calibrate, compare, study and report.

    FILE is a text file with one value per line, a column of a table (write FILE:COLUMN), or a .npy file of names or numbers.
    Numbers are columns of the scores, from 0.
    """
    from cascadevlm.base.labels import LabelSet
    from cascadevlm.evaluation.record import Record
    from cascadevlm.evaluation.write_record import write_record

    said = None if answers is None else _values(answers)
    shown = None if candidates is None else int(candidates) if candidates.isdecimal() else _array(Path(candidates))
    record = Record.from_arrays(
        _array(scores),
        LabelSet.read(labels),
        _values(truths),
        answers=said,
        candidates=shown,
        dollars=dollars,
        names=None if names is None else [str(name) for name in _values(names)],
        judge=judge,
    )
    write_record(record, output)
    asked = int(record.judged.asked.sum()) if record.stages else 0
    if as_json:
        typer.echo(json.dumps({"output": str(output), "images": len(record), "labels": len(record.labels), "asked": asked}))
        return
    typer.echo(f"{output}: a record of {len(record):,} images and {len(record.labels):,} labels, with {asked:,} answers.")


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


def _values(text: str) -> "NDArray[np.generic] | list[str]":
    """The values in a .npy file, in the lines of a text file, or in a column of a table, written as FILE:COLUMN."""
    from cascadevlm.base.image_table import open_table
    from cascadevlm.base.tables import reading

    path = Path(text)
    if path.suffix.lower() == ".npy":
        return _array(path)
    file, colon, column = text.rpartition(":")
    if not path.exists() and colon and (table := open_table(Path(file))) is not None:
        with reading(table.place):
            cells = [row.cells.get(column) for row in table.rows([table.require(column)])]
        return ["" if cell is None else str(cell) for cell in cells]
    with reading(path):
        return path.read_text(encoding="utf-8-sig").splitlines()

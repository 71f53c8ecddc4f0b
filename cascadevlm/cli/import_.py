"""``cascadevlm import``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from cascadevlm.cli import options
from cascadevlm.cli.own_arrays import ArrayOptions


@options.grouped()
def import_(
    given: ArrayOptions,
    file: Annotated[
        Path | None,
        typer.Argument(
            help="Labels from people: an export of Label Studio (JSON or JSON_MIN) or of FiftyOne (labels.json), a CSV, TSV, "
            "JSON lines or Parquet file with the columns image, label and, optionally, by and when, or the corrections.jsonl of "
            "another run. In place of a label: none (none of the labels) or skip."
        ),
    ] = None,
    into: Annotated[
        Path | None, typer.Option("--into", metavar="RUN", help="Folder of the run or record that gets the corrections.")
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Column of images in the table.", show_default="image; if there is none, path"),
    ] = None,
    id: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="Column of ids in the table, in place of a column of images. The run must have been made with --id.",
        ),
    ] = None,
    label: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of labels in the table.", show_default="label")
    ] = None,
    by: Annotated[
        str, typer.Option(metavar="NAME", help="Name of the person, for labels without a name.", show_default="unknown")
    ] = "",
    as_json: options.AsJson = False,
) -> None:
    """Import labels from people into a run (FILE --into RUN). They count in evaluate, calibrate, adapt, export and report.

    The latest label of an image counts. If anything in the file is wrong, nothing is imported. A second import of the same file
    adds nothing.

    With --scores, make a record from scores and answers that were recorded elsewhere. The commands sweep, calibrate, compare,
    study and report read it. Values are in a text file with one value per line, in a column of a table (write FILE:COLUMN), or
    in a .npy file of names or numbers. Numbers are columns of the scores, from 0.
    """
    from cascadevlm.base.errors import InputError
    from cascadevlm.base.files import visible
    from cascadevlm.base.tables import MOST_SHOWN, USUAL, ColumnNames
    from cascadevlm.runs.correction_files import import_corrections

    columns = ColumnNames(image=image, id=id, label=label)
    if given != ArrayOptions():
        if file or into or by or columns != USUAL:
            told = "A record is made from arrays, without FILE, --into, --image, --id, --label and --by."
            raise InputError(told, hint="Remove these, or --scores.")
        given.write(as_json=as_json)
        return
    if file is None or into is None:
        raise InputError("Labels from people need FILE and --into RUN.", hint="To make a record, add --scores.")
    if image and id:
        raise InputError("Two columns name the images: --image and --id.", hint="Remove one of them.")
    done = import_corrections(file, into, by=by, columns=columns)
    corrections, conflicts = done.corrections, done.corrections.described_conflicts
    if as_json:
        counts = {"added": done.added, "known": done.known, "without_label": done.without_label}
        labelled = {"images": len(corrections.counting), "conflicts": [*corrections.conflicts]}
        typer.echo(json.dumps(counts | labelled))
        return
    without = f", {done.without_label:,} rows without a label" if done.without_label else ""
    typer.echo(f"{into}: {done.added:,} corrections added, {done.known:,} known already{without}.")
    typer.echo(f"People labelled {len(corrections.counting):,} images. They disagree about {len(conflicts):,}.")
    for sentence in conflicts[:MOST_SHOWN]:
        typer.echo(f"  {visible(sentence)}")
    if len(conflicts) > MOST_SHOWN:
        typer.echo(f"  {len(conflicts) - MOST_SHOWN:,} more: cascadevlm report {into} -o report.html")

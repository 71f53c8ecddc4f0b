"""``cascadevlm classify``."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cascadevlm.cli import options

if TYPE_CHECKING:
    from cascadevlm.base.types import Prediction
    from cascadevlm.cascade.cascade import Cascade


@options.grouped()
def classify(
    paths: options.Paths,
    given: options.CascadeOptions,
    batch: Annotated[
        bool, typer.Option("--batch", help="Use the batch APIs of hosted judges: cheaper, but answers may take hours.")
    ] = False,
    yes: options.Yes = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")] = False,
) -> None:
    """Classify images.

    The exit code is 1 if an image cannot be read, or if no question gets an answer.
    """
    from rich.console import Console

    from cascadevlm.base.types import Usage
    from cascadevlm.cli.money import confirm
    from cascadevlm.cli.show import outcome_rows, prediction_block, print_summary, spending_rows

    parsed = given.parse()
    cascade, files = given.build(parsed), options.image_files(paths)
    options.tell(cascade.labels, paths)
    if not yes:
        confirm(parsed, cascade, files)
    console = Console(highlight=False)
    total = Usage()
    counts: Counter[str] = Counter()
    for number, prediction in enumerate(_predictions(cascade, files, batch=batch), start=1):
        if as_json:
            typer.echo(json.dumps(prediction.to_dict()))
        else:
            console.print(prediction_block(prediction, title=f"{number}/{len(files)} {prediction.path}"))
        total += prediction.cost
        counts["asked"] += prediction.asked
        counts["with an answer"] += prediction.answered
        counts["unreadable"] += not prediction.candidates
        counts[prediction.verdict.outcome if prediction.verdict else "kept"] += bool(prediction.candidates)
    spent = cascade.ledger.spent_dollars
    rows = {"images": str(len(files)), "judge calls": str(total.requests)}
    rows |= outcome_rows(counts) | spending_rows(total, spent=spent, asked=counts["asked"], images=len(files))
    print_summary(Console(highlight=False, stderr=True) if as_json else console, "Summary", rows)
    if counts["unreadable"] or (counts["asked"] and not counts["with an answer"]):
        raise typer.Exit(1)


def _predictions(cascade: "Cascade", files: list[Path], *, batch: bool) -> "Iterator[Prediction]":
    if not batch:
        return cascade.stream(files)
    from cascadevlm.base import loop
    from cascadevlm.runs.batches.batch import stream_in_batches

    def progress(line: str) -> None:
        typer.echo(line, err=True)

    return loop.iterate(stream_in_batches(cascade, files, progress=progress))

"""``cascadevlm classify``."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from cascadevlm.cli import options

if TYPE_CHECKING:
    from cascadevlm.base.images import ImageSource
    from cascadevlm.base.types import Prediction
    from cascadevlm.cascade.cascade import Cascade
    from cascadevlm.runs.inputs import Inputs, Named


@options.grouped()
def classify(
    paths: options.Paths,
    given: options.CascadeOptions,
    named: options.ColumnOptions,
    batch: options.Batch = False,
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
    from cascadevlm.runs.inputs import Inputs, about, names

    parsed = given.parse()
    cascade, images = given.build(parsed), options.images_in(paths, named.columns())
    options.tell(cascade.labels, paths)
    if not yes:
        confirm(parsed, cascade, images if isinstance(images, Inputs) else [source for _, source in images], batch=batch)
    console = Console(highlight=False)
    total = Usage()
    counts: Counter[str] = Counter()
    predictions = zip(names(images), about(images), _predictions(cascade, _Sources(images), batch=batch), strict=False)
    for number, (name, told, prediction) in enumerate(predictions, start=1):
        if as_json:
            typer.echo(json.dumps({**replace(prediction, path=name).to_dict(), **told}))
        else:
            console.print(prediction_block(prediction, title=f"{number}/{len(images)} {told.get('id', name)}"))
        total += prediction.cost
        counts["asked"] += prediction.asked
        counts["with an answer"] += prediction.answered
        counts["unreadable"] += not prediction.candidates
        counts[prediction.verdict.outcome if prediction.verdict else "kept"] += bool(prediction.candidates)
    spent = cascade.ledger.spent_dollars
    rows = {"images": str(len(images)), "judge calls": str(total.requests)}
    rows |= outcome_rows(counts) | spending_rows(total, spent=spent, asked=counts["asked"], images=len(images))
    print_summary(Console(highlight=False, stderr=True) if as_json else console, "Summary", rows)
    if counts["unreadable"] or (counts["asked"] and not counts["with an answer"]):
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Sources:
    """The images without their names."""

    images: "Inputs | list[Named]"

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> "Iterator[ImageSource]":
        return (source for _, source in self.images)


def _predictions(cascade: "Cascade", images: _Sources, *, batch: bool) -> "Iterator[Prediction]":
    if not batch:
        return cascade.stream(images)
    from cascadevlm.base import loop
    from cascadevlm.runs.batches.batch import stream_in_batches

    def progress(line: str) -> None:
        typer.echo(line, err=True)

    return loop.iterate(stream_in_batches(cascade, [*images], progress=progress))

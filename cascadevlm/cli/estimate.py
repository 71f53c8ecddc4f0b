"""``cascadevlm estimate``."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from cascadevlm.cli import options


@options.grouped()
def estimate(
    paths: options.Paths,
    given: options.CascadeOptions,
    named: options.ColumnOptions,
    sample: Annotated[int, typer.Option(min=1, help="Number of images to score for the estimate.")] = 200,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array with one object per stage.")] = False,
) -> None:
    """Estimate the number of questions, the cost and the time of classifying images. No judge is asked."""
    from rich.console import Console
    from rich.table import Table

    from cascadevlm.cli.money import prices
    from cascadevlm.runs.estimate import estimate as estimated
    from cascadevlm.runs.inputs import Inputs

    parsed = given.parse()
    cascade = given.build(parsed)
    options.tell(cascade.labels, paths)
    found = options.images_in(paths, named.columns())
    images, total = found.sample(sample) if isinstance(found, Inputs) else ([source for _, source in found], len(found))
    estimates = estimated(cascade, images, total=total, sample=sample)
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in estimates]))
        return
    table = Table("judge", "escalated", "questions", "dollars", "minutes", box=None, header_style="bold")
    for each in estimates:
        low, high = each.deferral_range
        cheap, dear = each.dollars_range
        table.add_row(
            each.judge,
            f"{each.deferral_rate:.0%} ({low:.0%} to {high:.0%})",
            str(each.calls),
            f"{each.dollars:.2f} ({cheap:.2f} to {dear:.2f})",
            f"{each.minutes:.0f}" if each.minutes else "depends on this machine",
        )
    console = Console(highlight=False)
    console.print(f"{total} images. The estimate uses a random sample of at most {sample} of them.")
    console.print(table)
    for line in prices(cascade):
        console.print(line, markup=False, soft_wrap=True)

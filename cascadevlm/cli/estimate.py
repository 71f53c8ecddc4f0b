"""``cascadevlm estimate``."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cascadevlm.cli import options

if TYPE_CHECKING:
    from cascadevlm.base.images import ImageSource


@options.grouped()
def estimate(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH…", help="Image files, folders with images, or one list of images (the same forms as for run)."
        ),
    ],
    given: options.CascadeOptions,
    sample: Annotated[int, typer.Option(min=1, help="Number of images to score for the estimate.")] = 200,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array with one object per stage.")] = False,
) -> None:
    """Estimate the number of questions, the cost and the time of classifying images. No judge is asked."""
    from rich.console import Console
    from rich.table import Table

    from cascadevlm.base.errors import InputError
    from cascadevlm.cli.money import prices
    from cascadevlm.runs.estimate import estimate as estimated
    from cascadevlm.runs.inputs import LISTS, Inputs

    parsed = given.parse()
    cascade = given.build(parsed)
    options.tell(cascade.labels, paths)
    images: Sequence[ImageSource]
    if len(paths) == 1 and (paths[0].is_dir() or paths[0].suffix.lower() in LISTS):
        images, total = Inputs(paths[0]).sample(sample)
    else:
        if lists := [path for path in paths if path.suffix.lower() in LISTS]:
            raise InputError(
                f"{str(lists[0])!r} is a list of images, but other paths are given, too.", hint="Give only the list."
            )
        images = options.image_files(paths)
        total = len(images)
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

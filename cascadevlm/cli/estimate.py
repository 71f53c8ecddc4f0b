"""``cascadevlm estimate``."""

import json
from dataclasses import asdict, replace
from typing import Annotated

import typer

from cascadevlm.cli import options


@options.grouped()
def estimate(
    paths: options.Paths,
    given: options.CascadeOptions,
    named: options.ColumnOptions,
    sample: Annotated[int, typer.Option(min=1, help="Number of images to score for the estimate.")] = 200,
    agree: Annotated[
        str | None,
        typer.Option(
            metavar="SHARES",
            help="Estimate certificates of these shares, for example 0.9,0.95. All images are scored, and the judge is asked "
            "about the first 100 images of the run. The answers are kept in the cache.",
            show_default="no certificate",
        ),
    ] = None,
    confidence: Annotated[
        float | None, typer.Option(help="Least probability that the certificates are true.", show_default="0.95")
    ] = None,
    batch: Annotated[bool, typer.Option("--batch", help="Estimate for the batch APIs of hosted judges.")] = False,
    yes: options.Yes = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array with one object per stage or share.")] = False,
) -> None:
    """Estimate the number of questions, the cost and the time of classifying images. Without --agree, no judge is asked."""
    from rich.console import Console
    from rich.table import Table

    from cascadevlm.base.errors import InputError
    from cascadevlm.cli.money import prices
    from cascadevlm.runs.batches.batch import LONGEST_MINUTES, at_batch_prices
    from cascadevlm.runs.estimate import estimate as estimated
    from cascadevlm.runs.inputs import Inputs

    if agree is not None:
        if batch:
            raise InputError("--agree estimates the prices of direct questions.", hint="Leave out --batch.")
        _certificates(paths, given, named, _shares(agree), confidence, yes=yes, as_json=as_json)
        return
    if confidence is not None:
        raise InputError("--confidence is that of certificates.", hint="Add --agree, or leave it out.")
    parsed = given.parse()
    cascade = given.build(parsed)
    options.tell(cascade.labels, paths)
    found = options.images_in(paths, named.columns())
    images, total = found.sample(sample) if isinstance(found, Inputs) else ([source for _, source in found], len(found))
    if parsed.agreement or parsed.find:
        told = "The run asks about a part of the images, to keep its promise. The estimate is of questions about all of them."
        typer.echo(f"{told} For certificates, estimate the part: --agree 0.9.", err=True)
    estimates = estimated(at_batch_prices(cascade) if batch else cascade, images, total=total, sample=sample)
    if batch:
        estimates = [replace(each, minutes=LONGEST_MINUTES if each.dollars else each.minutes) for each in estimates]
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


def _shares(text: str) -> list[float]:
    from cascadevlm.base.errors import InputError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--agree {text!r} is not a list of shares.", hint="For example: --agree 0.9,0.95,0.99.") from None


def _certificates(
    paths: list[str],
    given: options.CascadeOptions,
    named: options.ColumnOptions,
    shares: list[float],
    confidence: float | None,
    *,
    yes: bool,
    as_json: bool,
) -> None:
    """Print what certificates of several shares cost."""
    from rich.console import Console
    from rich.table import Table

    from cascadevlm.base.errors import InputError
    from cascadevlm.base.progress import progress_bar
    from cascadevlm.cli.money import confirm, prices
    from cascadevlm.decision.certifying import opening
    from cascadevlm.runs.estimate_agreement import estimate_agreement
    from cascadevlm.runs.inputs import Inputs

    if len(paths) != 1:
        raise InputError("A certificate is about one folder or one list of images.", hint="Give one path.")
    parsed = [given.parse({"agreement.agree": share, "agreement.confidence": confidence}) for share in shares]
    cascade = given.build(parsed[0], bulk=True)
    options.tell(cascade.labels, paths)
    images = Inputs(paths[0], named.columns())
    if not yes:
        confirm(parsed[0], cascade, images, min(opening(len(images)), len(images)))
    agreements = [each.agreement for each in parsed if each.agreement is not None]
    with progress_bar(len(images)) as show:
        estimates = estimate_agreement(
            cascade,
            images,
            agreements,
            scored=lambda number: show(number, None),
            asked=show,
        )
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in estimates]))
        return
    table = Table("agreement", "questions", "of all images", "dollars", box=None, header_style="bold")
    for each in estimates:
        (low, high), (cheap, dear) = each.questions_range, each.dollars_range
        table.add_row(
            f"{100 * each.agree:.4g} %",
            f"{each.questions} ({low} to {high})",
            f"{each.questions / each.images:.0%}",
            f"{each.dollars:.2f} ({cheap:.2f} to {dear:.2f})",
        )
    console = Console(highlight=False)
    console.print(f"{estimates[0].images} images. The estimate uses the answers to {estimates[0].asked} of them.")
    console.print(table)
    for line in prices(cascade):
        console.print(line, markup=False, soft_wrap=True)

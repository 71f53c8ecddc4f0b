"""``cascadevlm run``."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

import typer

from cascadevlm.cli import options

Engine = Literal["local", "ray"]

SIGNALLED = 128
"""With the number of the signal that ended it, the exit code of a program: 130 after Ctrl-C."""

SHOWN_A_SECOND = 10
"""How often the bar is moved."""

LOG_SECONDS = 10
"""How often a log, which shows no bar, is told where the run stands."""


@options.grouped()
def run(
    inputs: Annotated[Path, typer.Argument(help="A folder of images, or a list of them: text, CSV, JSON lines, Parquet.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the run; goes on with what is in it.")],
    given: options.CascadeOptions,
    engine: Annotated[Engine, typer.Option(help="This process, or a Ray cluster: $RAY_ADDRESS, or one begun here.")] = "local",
    workers: Annotated[int | None, typer.Option(min=1, help="Of the cluster. [default: one a GPU, or one a machine]")] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Do anew what failed, and all after it, with the answers that are kept.")
    ] = False,
    yes: options.Yes = False,
    as_json: options.AsJson = False,
) -> None:
    """Classify any number of images into a folder. Killed or interrupted, the same command goes on where it stood.

    Where no image could be read, or no question asked got an answer, the exit code is 1.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from cascadevlm.base.errors import DataError, InputError, RunError
    from cascadevlm.cli.money import confirm
    from cascadevlm.cli.show import print_summary, tally_rows
    from cascadevlm.runs import bulk
    from cascadevlm.runs import ray as cluster
    from cascadevlm.runs.inputs import Inputs
    from cascadevlm.runs.run_folder import FAILURES, Tally, images_left

    parsed = given.parse()
    cascade, images = given.build(parsed, bulk=True), Inputs(inputs)
    options.tell(cascade.labels, [inputs])
    if workers and engine == "local":
        raise InputError("--workers are those of a cluster.", hint="Give --engine ray.")
    total = len(images)
    if not total:
        raise DataError(f"{str(inputs)!r} holds no images.")
    if not yes:
        left = images_left(output, total, dollars=cascade.ledger.cap_dollars, retry_failed=retry_failed)
        confirm(parsed, cascade, images, left)
    errors = Console(stderr=True)
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
    with (
        cluster.on_ray(cascade, parsed, images, workers=workers) if engine == "ray" else nullcontext(cascade) as running,
        Progress(*columns, console=errors, transient=True) as progress,
        _stopping_in_order() as stopping,
    ):
        task = progress.add_task("", total=total)
        told_at = time.monotonic()

        def told(tally: Tally) -> None:
            nonlocal told_at
            if time.monotonic() - told_at < (1 / SHOWN_A_SECOND if errors.is_terminal else LOG_SECONDS):
                return
            told_at = time.monotonic()
            if errors.is_terminal:
                progress.update(task, completed=tally.images, description=f"${tally.spent_dollars:.2f}")
            else:
                typer.echo(f"{tally.images} of {total} images, ${tally.spent_dollars:.2f} spent.", err=True)

        tally = bulk.run(
            running,
            images,
            output,
            config=parsed.frozen(cascade).model_dump(mode="json"),
            retry_failed=retry_failed,
            stopping=lambda: bool(stopping),
            progress=told,
            outlook=lambda sentence: errors.print(sentence, markup=False, soft_wrap=True),
        )
    if as_json:
        typer.echo(json.dumps(tally.to_dict()))
    else:
        failures = {"failures": f"{tally.failures}, in {FAILURES}"} if tally.failures else {}
        print_summary(Console(highlight=False), f"Run in {output}", tally_rows(tally) | failures)
    if skipped := tally.counts["skipped"]:
        hint = "The same command with a higher budget, --set budget.usd=DOLLARS, asks about them."
        typer.echo(f"{skipped} images were skipped for want of money. {hint}", err=True)
    if stopping and tally.images < total:
        without = ", without --retry-failed," if retry_failed else ""
        typer.echo(f"Stopped in order. The same command{without} goes on from here.", err=True)
        raise typer.Exit(SIGNALLED + stopping[0])
    if tally.in_vain:
        raise RunError(f"Nothing came of it: {output / FAILURES} tells why.", hint="Once that is mended, add --retry-failed.")


@contextmanager
def _stopping_in_order() -> Iterator[list[int]]:
    """The signals received: the first Ctrl-C, or SIGTERM, as clusters send it, lets what is in flight finish; the second ends at
    once."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, _: FrameType | None) -> None:
        received.append(number)
        for each in before:
            signal.signal(each, signal.default_int_handler)
        typer.echo("Finishing what is in flight; Ctrl-C again ends at once.", err=True)

    for number in before:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

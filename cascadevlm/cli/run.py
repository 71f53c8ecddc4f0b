"""``cascadevlm run``."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cascadevlm.cli import options

if TYPE_CHECKING:
    from pydantic import JsonValue

    from cascadevlm.base.labels import LabelSet
    from cascadevlm.config.config import Config
    from cascadevlm.runs.inputs import Inputs
    from cascadevlm.runs.tally import Tally

Output = Annotated[
    Path, typer.Option("--output", "-o", help="Folder of the run. If it contains an unfinished run, that run continues.")
]
Engine = Annotated[
    Literal["local", "ray"],
    typer.Option(help="local: this process. ray: the Ray cluster at $RAY_ADDRESS, or a new cluster if this variable is not set."),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1, help="Number of scoring workers of the cluster.", show_default="one per GPU; without GPUs, one per machine"
    ),
]
RetryFailed = Annotated[
    bool,
    typer.Option(
        "--retry-failed",
        help="Classify failed images again. Later images also get a new prediction, with the stored answers.",
    ),
]

Agree = Annotated[
    float | None,
    typer.Option(
        help="Certify that at least this share of the labels are the judge's, for example 0.95. The run then selects the images "
        "to escalate itself.",
        show_default="no certificate",
    ),
]
Confidence = Annotated[
    float | None,
    typer.Option(help="Least probability that what --agree, --recall or --audit says is true.", show_default="0.95"),
]

Recall = Annotated[
    str | None,
    typer.Option(
        metavar="LABEL=SHARE",
        help="Find at least this share of the images to which the judge would give a label, for example lynx=0.95.",
        show_default="all labels are equal",
    ),
]
Precision = Annotated[
    float | None,
    typer.Option(
        help="With --recall: accept images without a question, if at least this share of the found images are right.",
        show_default="the judge is asked about every found image",
    ),
]
Audit = Annotated[
    float | None,
    typer.Option(
        help="Also ask about this share of the images whose label is kept, for example 0.01. The summary tells how many labels "
        "are not the judge's.",
        show_default="no audit",
    ),
]


@dataclass(frozen=True, kw_only=True)
class PromiseOptions:
    """The options that promise something about the labels of a run."""

    agree: Agree = None
    confidence: Confidence = None
    recall: Recall = None
    precision: Precision = None
    audit: Audit = None

    def keys(self) -> "dict[str, JsonValue]":
        """The values of the options by their keys in the configuration; None for an option that is not given."""
        label, _, share = self.recall.rpartition("=") if self.recall is not None else (None, "", None)
        return {
            "agreement.agree": self.agree,
            "audit.share": self.audit,
            "find.label": label,
            "find.recall": share,
            "find.precision": self.precision,
        }

    def parse(self, given: options.CascadeOptions) -> "Config":
        """The configuration with these options.

        Raises:
            InputError: if there is a confidence or a precision without a promise that it belongs to, or a recall without a share.
        """
        from cascadevlm.base.errors import InputError

        if self.recall is not None and "=" not in self.recall:
            raise InputError(f"--recall {self.recall!r} has no share.", hint='For example: --recall "lynx=0.95".')
        if self.precision is not None and self.recall is None and given.parse().find is None:
            raise InputError("--precision belongs to a promise of recall.", hint='Add it, for example: --recall "lynx=0.95".')
        parsed = given.parse(self.keys())
        if self.confidence is None:
            return parsed
        for section in ("agreement", "find", "audit"):
            if getattr(parsed, section) is not None:
                return given.parse(self.keys() | {f"{section}.confidence": self.confidence})
        raise InputError("--confidence belongs to a promise, but nothing is promised.", hint="Add --agree, --recall or --audit.")


SIGNALLED = 128
"""Added to the number of the signal that ended a program, this is the exit code of the program: 130 after Ctrl-C."""

QUESTIONS_END = "The run stops when all open questions are finished."
BATCHES_STAY = "The run stops. Its batches stay at the provider, and the same command reads them later."

AGREEMENT_IS_NOT_ACCURACY = "Agreement with the judge is not accuracy: where the judge is wrong, the labels are wrong."


Images = Annotated[
    str,
    typer.Argument(
        metavar="INPUTS",
        help="Folder of images, or a list or table of images: text, CSV, TSV, JSON, JSON lines, Parquet or a saved dataset. An "
        "address such as s3:// or hf:// is possible.",
    ),
]


@options.grouped()
def run(
    inputs: Images,
    output: Output,
    given: options.CascadeOptions,
    named: options.ColumnOptions,
    promises: PromiseOptions,
    engine: Engine = "local",
    workers: Workers = None,
    batch: options.Batch = False,
    retry_failed: RetryFailed = False,
    yes: options.Yes = False,
    as_json: options.AsJson = False,
) -> None:
    """Classify any number of images into a folder. If the run is interrupted, the same command continues it.

    The exit code is 1 if no image could be read, or if no question got an answer.
    """
    from rich.console import Console

    from cascadevlm.base.errors import InputError
    from cascadevlm.base.progress import progress_bar
    from cascadevlm.cli.money import confirm
    from cascadevlm.runs import bulk
    from cascadevlm.runs import ray as cluster
    from cascadevlm.runs.batches.batch import questions_in

    parsed = promises.parse(given)
    cascade = given.build(parsed, bulk=True)
    if workers and engine == "local":
        raise InputError("--workers is an option of the cluster.", hint="Add --engine ray, or remove --workers.")
    images = _images(inputs, parsed, cascade.labels, named)
    total = len(images)
    _warn_if_untestable(parsed, total)
    if not yes:
        left = _left(output, total, parsed, cascade.ledger.cap_dollars, retry_failed=retry_failed)
        left = max(0, left - questions_in(output)) if batch else left
        confirm(parsed, cascade, images, left, batch=batch)
    console = Console(stderr=True)
    with (
        cluster.on_ray(cascade, parsed, images, workers=workers, batch=batch)
        if engine == "ray"
        else nullcontext(cascade) as running,
        progress_bar(total) as show,
        _stopping_in_order(BATCHES_STAY if batch else QUESTIONS_END) as stopping,
    ):
        tally = bulk.run(
            running,
            images,
            output,
            config=parsed.frozen(cascade).model_dump(mode="json"),
            promised=parsed.agreement or parsed.find,
            audit=parsed.audit,
            batch=batch,
            retry_failed=retry_failed,
            stopping=lambda: bool(stopping),
            progress=lambda tally: show(tally.images, tally.spent_dollars),
            scored=lambda images: show(images, None),
            asked=show,
            outlook=lambda sentence: console.print(sentence, markup=False, soft_wrap=True),
        )
    _show(tally, output, as_json=as_json)
    if stopping and tally.images < total:
        without = ", without --retry-failed," if retry_failed else ""
        typer.echo(f"The run was stopped. The same command{without} continues it.", err=True)
        raise typer.Exit(SIGNALLED + stopping[0])
    _require_a_result(tally, output)


def _images(inputs: str, config: "Config", labels: "LabelSet", named: options.ColumnOptions) -> "Inputs":
    """The images of a run. Tells which files are left out.

    Raises:
        DataError: if there are no images.
    """
    from cascadevlm.base.errors import DataError
    from cascadevlm.runs.inputs import Inputs

    learns = config.learn and not (config.agreement or config.find)
    images = Inputs(inputs, named.columns(), shuffled=learns)
    if learns and not images.shuffled:
        typer.echo("Images in a table are taken in its order: with learn = true, shuffle the rows of the table first.", err=True)
    options.tell(labels, [inputs])
    if not len(images):
        raise DataError(f"{inputs!r} contains no images.", hint="Check the path and the formats of the images.")
    return images


def _left(output: Path, total: int, config: "Config", dollars: float | None, *, retry_failed: bool) -> int:
    """Number of images that judges may still be asked about."""
    from cascadevlm.runs.certified import questions_left
    from cascadevlm.runs.run_folder import images_left

    left = images_left(output, total, dollars=dollars, retry_failed=retry_failed)
    if not left or not (config.agreement or config.find):
        return left
    possible = questions_left(output, total, retry_failed=retry_failed)
    return possible if retry_failed else min(left, possible)  # another answer may change which images are asked about


def _warn_if_untestable(config: "Config", total: int) -> None:
    """Say that the images are too few for the test of a certificate."""
    from cascadevlm.decision.certifying import opening, testable

    if config.agreement is not None and not testable(total, promise := config.agreement.promise):
        kept = min(promise.allowed(total), total - min(opening(total), total))
        told = f"{total} images are too few for the test of a certificate. The judge is asked about all images except {kept}."
        typer.echo(told, err=True)


def _require_a_result(tally: "Tally", output: Path) -> None:
    from cascadevlm.base.errors import RunError
    from cascadevlm.runs.run_folder import FAILURES

    if tally.in_vain:
        what = "No image could be read" if tally.images == tally.counts["unreadable"] else "No question got an answer"
        raise RunError(
            f"{what}: {output / FAILURES} lists the reasons.",
            hint="Correct the cause, and run the same command with --retry-failed.",
        )


def _show(tally: "Tally", output: Path, *, as_json: bool) -> None:
    from rich.console import Console

    from cascadevlm.cli.show import print_summary, tally_rows
    from cascadevlm.runs.certificate import Missing
    from cascadevlm.runs.run_folder import FAILURES

    if as_json:
        typer.echo(json.dumps(tally.to_dict()))
    else:
        failures = {"failures": f"{tally.failures}, in {FAILURES}"} if tally.failures else {}
        print_summary(Console(highlight=False), f"Run in {output}", tally_rows(tally) | failures)
        if tally.certificate:
            typer.echo(tally.certificate.sentence)
            if not isinstance(tally.certificate, Missing):
                typer.echo(AGREEMENT_IS_NOT_ACCURACY)
        if tally.audit:
            typer.echo(tally.audit.sentence)
    if skipped := tally.counts["skipped"]:
        what = "To ask the missing questions"
        if tally.certificate is None:
            what = f"{skipped} images were escalated but not asked about, because the budget was used up. To ask about them"
        typer.echo(f"{what}, run the same command with a higher budget: --set budget.usd=DOLLARS.", err=True)


@contextmanager
def _stopping_in_order(what_happens: str) -> Iterator[list[int]]:
    """A list of the numbers of the signals received.

    After the first Ctrl-C or SIGTERM (clusters send SIGTERM), open questions are finished. A second signal ends the program at
    once.

    Args:
        what_happens: what is printed after the first signal.
    """
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, _: FrameType | None) -> None:
        received.append(number)
        for each in before:
            signal.signal(each, signal.default_int_handler)
        typer.echo(f"{what_happens} Press Ctrl-C again to stop at once.", err=True)

    for number in before:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

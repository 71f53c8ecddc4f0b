"""``cascadevlm evaluate``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cascadevlm.base.errors import InputError
from cascadevlm.cli import options

if TYPE_CHECKING:
    from cascadevlm.evaluation.record import Record

JudgeAll = Annotated[
    bool,
    typer.Option(
        "--judge-all",
        help="Ask the judge about every image, for sweep and calibrate. The figures are still the figures of the policy.",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Folder for the record. The command continues a run that the folder contains.",
        show_default="the record is not kept",
    ),
]

NOT_OF_THE_POLICY = (
    "These figures are for the judge asked about every image. "
    "Figures of the policy need a record with one judge that was asked about every image."
)


CONFIDENCE = 0.95
"""Least probability that what ``--accurate`` says is true."""

Source = Annotated[
    Path,
    typer.Argument(
        help="Labelled images: a folder with one subfolder per class, a table with columns path and label, or a saved dataset. "
        "Or the folder of a run with labels from people (see the command import), or of a record. These need no options."
    ),
]


@options.grouped()
def evaluate(
    data: Source,
    given: options.CascadeOptions,
    part: options.DataOptions,
    judge_all: JudgeAll = False,
    accurate: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="For a run with a random sample of labels from people: of how many of the surest labels at least this share is "
            "right, with 95 % confidence.",
            show_default="not said",
        ),
    ] = None,
    output: Output = None,
    yes: options.Yes = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure a cascade on labelled images: accuracy, share of escalated images, errors that the judge corrects and makes,
    calibration and cost. For a run, these are the images that people labelled.

    If the command is killed or interrupted, the same command with --output continues. The exit code is 1 if no question gets an
    answer.
    """
    from rich.console import Console

    from cascadevlm.base.progress import progress_bar
    from cascadevlm.cli.money import confirm
    from cascadevlm.cli.show import evaluation_rows, print_summary
    from cascadevlm.evaluation.evaluate import asking_everything, measure
    from cascadevlm.runs.manifest import NAME
    from cascadevlm.runs.run_folder import images_left

    if (data / NAME).is_file():
        if (given, part, judge_all, output) != (options.CascadeOptions(), options.DataOptions(), False, None):
            raise InputError("A run is evaluated as it was made, so options have no effect.", hint="Leave all options out.")
        _of_run(data, accurate, as_json=as_json)
        return
    if accurate is not None:
        raise InputError("--accurate is for the folder of a run with labels from people.", hint="Leave it out.")
    parsed = given.parse()
    cascade, labelled = part.build(parsed, data, given.labels)
    options.tell(cascade.labels, [data])
    if not yes:
        total, dollars = len(labelled), cascade.ledger.cap_dollars
        left = images_left(output, total, dollars=dollars, retry_failed=False) if output else total
        confirm(parsed, asking_everything(cascade) if judge_all else cascade, labelled.images, left)
    errors = Console(stderr=True)
    with progress_bar(len(labelled)) as show:
        measured = measure(
            cascade,
            labelled,
            output,
            config=parsed.frozen(cascade).model_dump(mode="json"),
            judge_all=judge_all,
            progress=lambda tally: show(tally.images, tally.spent_dollars),
            outlook=lambda sentence: errors.print(sentence, markup=False, soft_wrap=True),
        )
    evaluation = measured.evaluation
    if not measured.of_policy:
        typer.echo(NOT_OF_THE_POLICY, err=True)
    if as_json:
        typer.echo(json.dumps(evaluation.to_dict()))
    else:
        rows = evaluation_rows(evaluation)
        if judge_all and measured.of_policy and evaluation.judge_accuracy is not None:
            rows["judge, on every image"] = f"{evaluation.judge_accuracy:.1%}"
        print_summary(Console(highlight=False), "Evaluation", rows)
    _require_an_answer(measured.record)


def _of_run(folder: Path, accurate: float | None, *, as_json: bool) -> None:
    """Show the metrics of a finished run: of a record, or of the images that people labelled."""
    from rich.console import Console

    from cascadevlm.cli.show import evaluation_rows, print_summary
    from cascadevlm.evaluation.corrected import read_corrected
    from cascadevlm.evaluation.evaluate import as_configured, evaluate_part, read_decided
    from cascadevlm.runs.certificate import Facts, read_certificate
    from cascadevlm.runs.corrections import read_corrections
    from cascadevlm.runs.manifest import Manifest
    from cascadevlm.runs.run_folder import SUMMARY

    more: dict[str, object] = {}
    if Manifest.read(folder).labelled:
        record = read_decided(folder)
        if accurate is not None:
            raise InputError("--accurate is for a run without true labels.", hint="Leave it out: a record has true labels.")
        evaluation, told = evaluate_part(as_configured(record), record), []
        outside = sum(each.label is None for each in read_corrections(folder).counting.values())
        if outside:
            told.append(f"People said that {outside:,} other images show none of the labels. The figures are without these.")
            more["outside"] = outside
    else:
        corrected = read_corrected(folder)
        evaluation, told = corrected.evaluate(), [corrected.describe()]
        more["holds_for"] = told[0]
        if isinstance(certificate := read_certificate(folder / SUMMARY), Facts):
            right = corrected.of_certificate()
            told += [f"Agreement is not accuracy: {certificate.sentence}", right.sentence]
            more["certificate"] = {"agree": certificate.agree, **asdict(right)}
        if accurate is not None:
            surest = corrected.surest(accurate, CONFIDENCE)
            told.append(surest.sentence)
            more["surest"] = asdict(surest)
    if as_json:
        typer.echo(json.dumps(evaluation.to_dict() | more))
        return
    print_summary(Console(highlight=False), "Evaluation", evaluation_rows(evaluation))
    for sentence in told:
        typer.echo(sentence)


def _require_an_answer(record: "Record") -> None:
    from cascadevlm.base.errors import RunError

    asked = [outcome for stage in record.stages for outcome in stage.outcomes if outcome not in ("", "skipped")]
    if asked and not {"answered", "none"} & set(asked):
        hint = "To see the reason, classify one of the images: cascadevlm classify IMAGE."
        raise RunError(f"None of {len(asked)} questions got an answer.", hint=hint)

"""``cascadevlm study``."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from cascadevlm.base.errors import InputError
from cascadevlm.cli import options

if TYPE_CHECKING:
    from cascadevlm.cascade.cascade import Cascade
    from cascadevlm.evaluation.results import Study

app = typer.Typer(help="Repeat the studies of the CascadeVLM paper with your data and models.", no_args_is_help=True)

Run = Annotated[Path, typer.Argument(help="Folder of a record from: cascadevlm evaluate --judge-all -o FOLDER.")]
AnyRun = Annotated[Path, typer.Argument(help="Folder of a record from: cascadevlm evaluate -o FOLDER.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        file_okay=False,
        help="Folder for study-NAME.json and the records.",
        show_default="nothing is written",
    ),
]
Result = Annotated[
    Path | None,
    typer.Option("--output", "-o", file_okay=False, help="Folder for study-NAME.json.", show_default="nothing is written"),
]

Number = TypeVar("Number", int, float)


@app.command()
@options.grouped("candidates")
def candidates(
    data: options.LabelledData,
    given: options.CascadeOptions,
    part: options.DataOptions,
    k: Annotated[str, typer.Option(help="Numbers of candidates, for example 1,3,5.")] = "1,2,3,5,10",
    output: Output = None,
    yes: options.Yes = False,
    as_json: options.AsJson = False,
) -> None:
    """Study the effect of the number of candidates."""
    from cascadevlm.evaluation.study import study_candidates

    studied = partial(study_candidates, ks=_numbers("--k", k, int))
    _study(studied, given, part, data, output, yes=yes, as_json=as_json)


@app.command()
@options.grouped()
def order(
    data: options.LabelledData,
    given: options.CascadeOptions,
    part: options.DataOptions,
    output: Output = None,
    yes: options.Yes = False,
    as_json: options.AsJson = False,
) -> None:
    """Study the effect of the order of the candidates (ranked, reversed, shuffled), and the judge's position bias."""
    from cascadevlm.evaluation.study import study_order

    _study(study_order, given, part, data, output, yes=yes, as_json=as_json)


@app.command()
@options.grouped("prompt")
def reasoning(
    data: options.LabelledData,
    given: options.CascadeOptions,
    part: options.DataOptions,
    output: Output = None,
    yes: options.Yes = False,
    as_json: options.AsJson = False,
) -> None:
    """Study the effect of chain-of-thought: compare the prompts select_cot and select."""
    from cascadevlm.evaluation.study import study_reasoning

    _study(study_reasoning, given, part, data, output, yes=yes, as_json=as_json)


@app.command()
@options.grouped("prompt")
def shots(
    data: options.LabelledData,
    support: Annotated[Path, typer.Option(help="Folder of exemplars, with one subfolder per class.")],
    given: options.CascadeOptions,
    part: options.DataOptions,
    shots: Annotated[str, typer.Option(help="Numbers of exemplars per class, for example 0,1,2.")] = "0,1,2",
    output: Output = None,
    yes: options.Yes = False,
    as_json: options.AsJson = False,
) -> None:
    """Study the effect of exemplars: compare the prompt select_fewshot with select_cot, which shows no exemplars."""
    from cascadevlm.evaluation.study import study_shots

    studied = partial(study_shots, support=support, shots=_numbers("--shots", shots, int))
    _study(studied, given, part, data, output, yes=yes, as_json=as_json)


@app.command()
def threshold(
    run: Run,
    thresholds: Annotated[
        str | None,
        typer.Option(
            help="Thresholds of the entropy, for example 0.1,0.2.",
            show_default="thresholds that escalate 0, 5, …, 100 % of the images",
        ),
    ] = None,
    output: Result = None,
    as_json: options.AsJson = False,
) -> None:
    """Study the effect of the entropy threshold on a record. No judge is asked."""
    from cascadevlm.evaluation.record import read_record
    from cascadevlm.evaluation.study import study_threshold

    chosen = _numbers("--thresholds", thresholds, float) if thresholds else None
    _finish(study_threshold(read_record(run), thresholds=chosen), output, as_json=as_json)


@app.command()
def errors(run: AnyRun, output: Result = None, as_json: options.AsJson = False) -> None:
    """Count the errors of a record by their causes, under its policy. No judge is asked."""
    from cascadevlm.evaluation.evaluate import as_configured, read_decided
    from cascadevlm.evaluation.study import study_errors

    _finish(study_errors(as_configured(read_decided(run))), output, as_json=as_json)


def _numbers(option: str, text: str, number: Callable[[str], Number]) -> list[Number]:
    try:
        return [number(part) for part in text.split(",")]
    except ValueError as exc:
        raise InputError(f"{option} must be numbers separated by commas, not {text!r}.") from exc


def _study(
    studied: "Callable[..., Study]",
    given: options.CascadeOptions,
    part: options.DataOptions,
    data: str,
    output: Path | None,
    *,
    yes: bool,
    as_json: bool,
) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from cascadevlm.cli.money import confirm

    parsed = given.parse()
    if parsed.calibration is not None:
        hint = "Remove the calibration: a study changes the settings that a calibration was made for."
        raise InputError("A study cannot use a calibration.", hint=hint)
    cascade, labelled = part.build(parsed, data, given.labels)
    options.tell(cascade.labels, [data])
    progress = Progress(console=Console(stderr=True), transient=True)
    task = progress.add_task("questions")

    def begin(together: "Cascade") -> None:
        if not yes:
            confirm(parsed, together, labelled.images)
        progress.update(task, total=len(labelled) * len(together.stages))
        progress.start()

    try:
        study = studied(cascade, labelled, config=parsed, folder=output, begin=begin, progress=lambda _: progress.advance(task))
    finally:
        progress.stop()
    _finish(study, output, as_json=as_json)


def _finish(study: "Study", output: Path | None, *, as_json: bool) -> None:
    """Write the study to the output folder, if it is given, and print the study."""
    if output:
        output.mkdir(parents=True, exist_ok=True)
        (output / f"study-{study.study}.json").write_text(json.dumps(study.to_dict(), indent=2) + "\n", encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(study.to_dict()))
    else:
        _show(study)


def _show(study: "Study") -> None:
    from rich.console import Console
    from rich.table import Table

    (first, *headings), *lines = study.table
    table = Table(box=None, header_style="bold", padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    for line in lines:
        table.add_row(*line)
    console = Console(highlight=False)
    console.print(study.question + "\n")
    console.print(table)
    for note in study.notes:
        console.print(f"\n{note}")

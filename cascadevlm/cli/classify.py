"""``cascadevlm classify``."""

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from cascadevlm.cli import options
from cascadevlm.errors import InputError

if TYPE_CHECKING:
    from cascadevlm.types import Prediction


def classify(
    paths: options.Paths,
    labels: options.Labels = None,
    config: options.ConfigFile = None,
    scorer: options.ScorerSpec = None,
    judge: options.JudgeSpec = None,
    policy: options.PolicyText = None,
    candidates: options.CandidateCount = None,
    prompt: options.PromptName = None,
    settings: options.Settings = None,
    batch: Annotated[bool, typer.Option("--batch", help="Ask hosted judges through their batch APIs: cheaper, hours.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before spending money.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Classify images."""
    from rich.console import Console

    from cascadevlm.cli.show import prediction_block, print_summary, spending_rows
    from cascadevlm.types import Usage

    chosen = options.choose(
        paths=paths,
        labels=labels,
        config=config,
        scorer=scorer,
        judge=judge,
        policy=policy,
        candidates=candidates,
        prompt=prompt,
        settings=settings,
    )
    if not yes:
        _confirm(chosen)
    console = Console(highlight=False)
    total = Usage()
    escalated = failed = 0
    for number, prediction in enumerate(_predictions(chosen, batch=batch), start=1):
        if as_json:
            typer.echo(json.dumps(prediction.to_dict()))
        else:
            console.print(prediction_block(prediction, title=f"{number}/{len(chosen.files)} {prediction.path}"))
        total += prediction.cost
        escalated += prediction.escalated
        failed += not prediction.candidates
    if not as_json:
        rows = {"images": str(len(chosen.files)), "escalated": str(escalated), "judge calls": str(total.requests)}
        rows |= spending_rows(total, escalated=escalated, images=len(chosen.files))
        print_summary(console, "Summary", rows | {"unreadable": str(failed)})
    if failed:
        raise typer.Exit(1)


def _predictions(chosen: options.Chosen, *, batch: bool) -> "Iterator[Prediction]":
    if not batch:
        return chosen.cascade.stream(chosen.files)
    from cascadevlm import loop
    from cascadevlm.batch import stream_in_batches

    def progress(line: str) -> None:
        typer.echo(line, err=True)

    return loop.iterate(stream_in_batches(chosen.cascade, chosen.files, progress=progress))


def _confirm(chosen: options.Chosen) -> None:
    """Ask, where the run may cost more than the configuration lets pass.

    Raises:
        InputError: if there is nobody to ask.
    """
    from cascadevlm.estimate import estimate

    limit = chosen.config.budget.ask_above_usd
    cap = chosen.config.budget.usd
    if (cap is not None and cap <= limit) or not any(stage.judge.costs_money for stage in chosen.cascade.stages):
        return
    estimates = estimate(chosen.cascade, chosen.files)
    usual, most = sum(each.dollars for each in estimates), sum(each.dollars_range[1] for each in estimates)
    most = most if cap is None else min(most, cap)
    if most <= limit:
        return
    calls = sum(each.calls for each in estimates)
    message = f"About {calls} questions to hosted judges, ${usual:.2f}, at most ${most:.2f}."
    if not sys.stdin.isatty():
        raise InputError(message, hint="Give --yes to go on.")
    typer.confirm(f"{message} Go on?", abort=True, err=True)

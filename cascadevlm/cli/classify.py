"""``cascadevlm classify``."""

import json
import sys
from collections import Counter
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
    """Classify images. Fails (exit code 1) if an image cannot be read or no question gets an answer."""
    from typing import get_args

    from rich.console import Console

    from cascadevlm.cli.show import prediction_block, print_summary, spending_rows
    from cascadevlm.types import Outcome, Usage

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
    counts: Counter[str] = Counter()
    for number, prediction in enumerate(_predictions(chosen, batch=batch), start=1):
        if as_json:
            typer.echo(json.dumps(prediction.to_dict()))
        else:
            console.print(prediction_block(prediction, title=f"{number}/{len(chosen.files)} {prediction.path}"))
        total += prediction.cost
        counts["asked"] += prediction.asked
        counts["unreadable"] += not prediction.candidates
        counts[prediction.verdict.outcome if prediction.verdict else "kept"] += bool(prediction.candidates)
    spent = chosen.cascade.ledger.spent_dollars
    rows = {"images": str(len(chosen.files)), "judge calls": str(total.requests)}
    rows |= {outcome: str(counts[outcome]) for outcome in ("kept", *get_args(Outcome), "unreadable") if counts[outcome]}
    rows |= spending_rows(total, spent=spent, asked=counts["asked"], images=len(chosen.files))
    print_summary(Console(highlight=False, stderr=True) if as_json else console, "Summary", rows)
    if counts["unreadable"] or counts["failed"] == counts["asked"] > 0:
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
    from cascadevlm import loop
    from cascadevlm.estimate import estimate

    limit, cap = chosen.config.budget.ask_above_usd, chosen.config.budget.usd
    paid = [stage.judge for stage in chosen.cascade.stages if stage.judge.costs_money]
    for judge in paid:  # a missing key is told before anything is read
        loop.run(judge.prepare())
        loop.run(judge.aclose())
    if not paid or (cap is not None and cap <= limit):
        return
    estimates = estimate(chosen.cascade, chosen.files)
    usual, most = sum(each.dollars for each in estimates), sum(each.dollars_range[1] for each in estimates)
    most = most if cap is None else min(most, cap)
    if most <= limit:
        return
    calls = sum(each.calls for each in estimates)
    message = f"About {calls} questions to hosted judges, ${usual:.2f}, up to about ${most:.2f}."
    if not sys.stdin.isatty():
        raise InputError(message, hint="Give --yes to go on, or a cap: --set budget.usd=5.")
    typer.confirm(f"{message} Go on?", abort=True, err=True)

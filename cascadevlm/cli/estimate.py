"""``cascadevlm estimate``."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from cascadevlm.cli import options


def estimate(
    paths: options.Paths,
    labels: options.Labels = None,
    config: options.ConfigFile = None,
    scorer: options.ScorerSpec = None,
    judge: options.JudgeSpec = None,
    policy: options.PolicyText = None,
    candidates: options.CandidateCount = None,
    prompt: options.PromptName = None,
    settings: options.Settings = None,
    sample: Annotated[int, typer.Option(min=1, help="How many images to score for it.")] = 200,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array, an object for each stage.")] = False,
) -> None:
    """Say what classifying images would take: calls, dollars and minutes. No judge is asked."""
    from rich.console import Console
    from rich.table import Table

    from cascadevlm.estimate import estimate as estimated

    parsed = options.parse(config, scorer, judge, policy, candidates, prompt, settings)
    cascade, files = options.build(parsed, labels), options.image_files(paths)
    options.tell(cascade.labels, paths)
    estimates = estimated(cascade, files, sample=sample)
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in estimates]))
        return
    table = Table("judge", "escalated", "calls", "dollars", "minutes", box=None, header_style="bold")
    for each in estimates:
        low, high = each.deferral_range
        cheap, dear = each.dollars_range
        table.add_row(
            each.judge,
            f"{each.deferral_rate:.0%} ({low:.0%} to {high:.0%})",
            str(each.calls),
            f"{each.dollars:.2f} ({cheap:.2f} to {dear:.2f})",
            f"{each.minutes:.0f}" if each.minutes else "as fast as this machine",
        )
    console = Console(highlight=False)
    console.print(f"{estimates[0].images if estimates else len(files)} images, by a sample of {sample} of them at most.")
    console.print(table)

"""Asks the user before money is spent."""

import sys
from collections.abc import Sequence

import typer

from cascadevlm.base import loop
from cascadevlm.base.errors import InputError
from cascadevlm.base.images import ImageSource
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.config.config import Config
from cascadevlm.judges.hosted.base import HostedJudge
from cascadevlm.runs.batches.batch import at_batch_prices
from cascadevlm.runs.estimate import SAMPLE, estimate
from cascadevlm.runs.inputs import Inputs


def confirm(
    config: Config,
    cascade: Cascade,
    images: Sequence[ImageSource] | Inputs,
    left: int | None = None,
    *,
    batch: bool = False,
) -> None:
    """Ask the user, if the run may cost more than the configuration's ``budget.ask_above_usd``.

    Args:
        config: configuration of the cascade.
        cascade: the cascade.
        images: all images of the run.
        left: number of these images that have no prediction yet. Default: all.
        batch: true if the questions are asked through batch APIs.

    Raises:
        InputError: if the user must be asked, but the input is not a terminal.
        BackendError: if a judge that costs money cannot work, for example without an API key. This is checked first.
    """
    limit, cap = config.budget.ask_above_usd, config.budget.usd
    paid = [stage.judge for stage in cascade.stages if stage.judge.costs_money]
    for judge in paid:
        loop.run(judge.prepare())
        loop.run(judge.aclose())
    if not paid or left == 0 or (cap is not None and cap <= limit):
        return
    sample, total = images.sample(SAMPLE) if isinstance(images, Inputs) else (images, len(images))
    estimates = estimate(at_batch_prices(cascade) if batch else cascade, sample, total=total if left is None else left)
    usual, most = sum(each.dollars for each in estimates), sum(each.dollars_range[1] for each in estimates)
    most = most if cap is None else min(most, cap)
    if most <= limit:
        return
    calls = sum(each.calls for each in estimates)
    number = f"at most {calls}" if config.agreement or config.find else calls
    message = f"This run asks hosted judges about {number} questions, for about ${usual:.2f}, and at most about ${most:.2f}."
    for line in prices(cascade):
        typer.echo(line, err=True)
    if not sys.stdin.isatty():
        raise InputError(message, hint=f"Add --yes to continue, or a cap that needs no confirmation: --set budget.usd={limit:g}.")
    typer.confirm(f"{message} Continue?", abort=True, err=True)


def prices(cascade: Cascade) -> list[str]:
    """One line per judge that costs money: its price, and the table of prices that it comes from."""
    judges = [stage.judge for stage in cascade.stages if isinstance(stage.judge, HostedJudge)]
    return [f"Price of {judge.spec}: {judge.price}" for judge in judges if judge.costs_money]

"""Writes figures as text, for the terminal and the report."""

from cascadevlm.evaluation.metrics import Interval


def share(value: float | None, interval: Interval | None = None, *, unknown: str) -> str:
    """A share from 0 to 1 in percent, with its interval if there is one. None gives ``unknown``."""
    if value is None:
        return unknown
    return f"{value:.1%}" + (f" ({interval[0]:.1%} to {interval[1]:.1%})" if interval else "")

"""Figures as texts, for the terminal and the report."""

from typing import Literal

from cascadevlm.evaluation.metrics import Interval


def share(value: float | None, interval: Interval | None = None, *, unknown: str) -> str:
    """A share from 0 to 1 in percent, with its interval where there is one."""
    if value is None:
        return unknown
    return f"{value:.1%}" + (f" ({interval[0]:.1%} to {interval[1]:.1%})" if interval else "")


def study_figure(name: str, value: float | None, *, grouping: Literal["", ","] = "") -> str:
    """A figure of a study, by the last word of its name: what is nothing else is a share. Empty, if it is not known."""
    if value is None:
        return ""
    match name.rpartition("_")[2]:
        case "dollars":
            return f"${value:{grouping}.4f}"
        case "seconds":
            return f"{value:{grouping}.1f}"
        case "calls" | "tokens" | "errors":
            return f"{value:{grouping}.0f}"
        case "value" | "threshold":
            return f"{value:.3g}"
    return f"{value:.1%}"

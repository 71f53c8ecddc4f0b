"""Writes figures as text, for the terminal, notebooks and the report."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cascadevlm.evaluation.metrics import Evaluation, Interval

UNKNOWN = "–"
"""Stands for a figure without images to compute it from."""


def share(value: float | None, interval: "Interval | None" = None, *, unknown: str = UNKNOWN) -> str:
    """A share from 0 to 1 in percent, with its interval if there is one. None gives ``unknown``."""
    if value is None:
        return unknown
    return f"{value:.1%}" + (f" ({interval[0]:.1%} to {interval[1]:.1%})" if interval else "")


def number(value: float | None, digits: int = 3) -> str:
    """A number with this number of decimal places; `UNKNOWN` for None."""
    return UNKNOWN if value is None else f"{value:,.{digits}f}"


def figures(of: "Evaluation") -> dict[str, str]:
    """All figures as text, by name."""
    recall = ", ".join(f"k = {k}: {share(found)}" for k, found in of.top_k_recall.items())
    return {
        "Images (unreadable)": f"{of.images:,} ({of.unreadable:,})",
        "Cascade, accuracy": share(of.cascade_accuracy, of.cascade_accuracy_interval),
        "Cascade, mean accuracy of the classes": share(of.macro_accuracy, of.macro_accuracy_interval),
        "Scorer alone, accuracy": share(of.scorer_accuracy, of.scorer_accuracy_interval),
        "Scorer, accuracy on kept images": share(of.scorer_accuracy_kept),
        "Scorer, accuracy on escalated images": share(of.scorer_accuracy_escalated),
        "Judge, accuracy of its answers": share(of.judge_accuracy),
        "Judge, accuracy on kept images": share(of.judge_accuracy_kept),
        "Judge, accuracy on escalated images": share(of.judge_accuracy_escalated),
        "Escalated": share(of.deferral_rate),
        "Rescued, harmed, abstained": f"{of.rescued:,}, {of.harmed:,}, {of.abstained:,}",
        "Truth among the scorer's k best": recall,
        "Truth among the candidates": share(of.coverage),
        "Calibration error, scorer": number(of.scorer_calibration_error),
        "Calibration error, cascade": number(of.calibration_error),
        "Dollars per 1,000 images": "–" if of.dollars_per_thousand is None else f"${of.dollars_per_thousand:,.4f}",
        "Paid in this run": f"${of.paid_dollars:,.4f}",
        "Tokens in, out": f"{of.input_tokens:,}, {of.output_tokens:,}",
        "Seconds per question, median, p95": f"{number(of.latency_p50)}, {number(of.latency_p95)}",
        "Outcomes of questions": ", ".join(f"{name} {count:,}" for name, count in of.outcomes.items() if count) or "–",
    }

"""Prints predictions and figures on a terminal."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, get_args

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cascadevlm.base.files import visible
from cascadevlm.base.types import Outcome, Prediction, Usage, Verdict
from cascadevlm.evaluation.texts import share

if TYPE_CHECKING:
    from cascadevlm.evaluation.calibrating.calibrate import Calibrated
    from cascadevlm.evaluation.metrics import Evaluation
    from cascadevlm.runs.tally import Tally

BAR_WIDTH = 12

_share = partial(share, unknown="unknown")


def prediction_block(prediction: Prediction, *, title: str, truth: str | None = None) -> RenderableType:
    """The lines about one image: its candidates with bars, the reason of the policy, the verdicts, and the result."""
    if not prediction.candidates:
        return Group(Text(visible(title), style="bold"), _indented(Text(visible(prediction.error), style="red")), "")
    lines: list[RenderableType] = [Text(visible(title), style="bold"), _candidates(prediction, truth)]
    decision = "escalated" if prediction.escalated else "kept"
    if prediction.reasons:
        lines.append(_indented(Text(f"{decision}: {visible('; '.join(prediction.reasons))}", style="dim")))
    lines += [_indented(_verdict(verdict)) for verdict in prediction.verdicts]
    lines += [_indented(_outcome(prediction, truth)), ""]
    return Group(*lines)


def _indented(text: Text) -> Padding:
    return Padding(text, (0, 0, 0, 2))


def _candidates(prediction: Prediction, truth: str | None) -> Table:
    table = Table.grid(padding=(0, 1))
    for candidate in sorted(prediction.candidates, key=lambda candidate: candidate.rank):
        full = round(candidate.probability * BAR_WIDTH)
        bar = Text("█" * full, style="cyan").append("░" * (BAR_WIDTH - full), style="dim")
        name = Text(visible(candidate.label.name), style="underline" if candidate.label.name == truth else "")
        table.add_row(" ", bar, f"{candidate.probability:.2f}", name)
    return table


def _verdict(verdict: Verdict) -> Text:
    said = verdict.rationale or verdict.text or verdict.error
    line = Text(f"{visible(verdict.judge)}: ", style="magenta")
    line.append(visible(" ".join(said.split())) or verdict.outcome, style="italic default")
    return line.append(f" ({verdict.outcome})", style="dim") if verdict.outcome != "answered" else line


def _outcome(prediction: Prediction, truth: str | None) -> Text:
    line = Text("→ ")
    if prediction.label is None:
        return line.append(f"no label: {visible(prediction.error)}", style="yellow")
    style = "bold" if truth is None else "bold green" if prediction.label == truth else "bold red"
    line.append(visible(prediction.label), style=style).append(f"  by {prediction.decided_by}", style="dim")
    if truth is not None and prediction.label != truth:
        line.append(f"  (truth: {visible(truth)})", style="dim")
    return line


def spending_rows(total: Usage, *, spent: float, asked: int, images: int) -> dict[str, str]:
    """Dollars spent and saved, and the estimated cost of asking about every image at the mean price of a question."""
    everything = (total.dollars + total.saved_dollars) / asked * images if asked else None
    return {
        "spent": f"${spent:.4f}",
        "saved by the cache": f"${total.saved_dollars:.4f}",
        "estimate for every image": "unknown" if everything is None else f"${everything:.4f}",
    }


def outcome_rows(counts: Mapping[str, int]) -> dict[str, str]:
    """Numbers of images that were kept, that had each outcome of a question, and that could not be read; without zeros."""
    return {name: str(counts[name]) for name in ("kept", *get_args(Outcome), "unreadable") if counts.get(name)}


def tally_rows(tally: "Tally") -> dict[str, str]:
    """The headline figures of a bulk run."""
    rows = {"images": str(tally.images), "judge calls": str(tally.requests)} | outcome_rows(tally.counts)
    if tally.abstained:
        rows["without a label"] = str(tally.abstained)
    return rows | {"spent": f"${tally.spent_dollars:.4f}", "saved by the cache": f"${tally.saved_dollars:.4f}"}


def evaluation_rows(evaluation: "Evaluation") -> dict[str, str]:
    """The headline figures of an evaluation."""
    kept, escalated = evaluation.scorer_accuracy_kept, evaluation.scorer_accuracy_escalated
    before, after = evaluation.scorer_calibration_error, evaluation.calibration_error
    return {
        "images": f"{evaluation.images} ({evaluation.unreadable} unreadable)",
        "scorer, accuracy": _share(evaluation.scorer_accuracy, evaluation.scorer_accuracy_interval),
        "cascade, accuracy": _share(evaluation.cascade_accuracy, evaluation.cascade_accuracy_interval),
        "cascade, mean accuracy of the classes": _share(evaluation.macro_accuracy, evaluation.macro_accuracy_interval),
        "truth among the scorer's k best": ", ".join(f"k = {k}: {_share(x)}" for k, x in evaluation.top_k_recall.items()),
        "truth among the candidates": _share(evaluation.coverage),
        "escalated": _share(evaluation.deferral_rate),
        "scorer, accuracy on kept and escalated": f"{_share(kept)}, {_share(escalated)}",
        "judge, accuracy on escalated": _share(evaluation.judge_accuracy_escalated),
        "rescued, harmed, abstained": f"{evaluation.rescued}, {evaluation.harmed}, {evaluation.abstained}",
        "calibration error, scorer and cascade": f"{_number(before)}, {_number(after)}",
        "outcomes": ", ".join(f"{outcome} {count}" for outcome, count in evaluation.outcomes.items() if count) or "none",
        "dollars, in total and per 1,000 images": f"${evaluation.dollars:.4f}, ${evaluation.dollars_per_thousand or 0:.4f}",
        "paid in this run": f"${evaluation.paid_dollars:.4f}",
        "seconds per question, median and p95": f"{_number(evaluation.latency_p50)}, {_number(evaluation.latency_p95)}",
    }


def calibration_rows(result: "Calibrated") -> dict[str, str]:
    """The figures of a calibration, on images that it was not fitted on."""
    if result.before and result.after:
        rows = {
            name: f"{what.format(result.before[key])} → {what.format(result.after[key])}"
            for name, key, what in (
                ("scorer, accuracy", "accuracy", "{:.1%}"),
                ("scorer, log-likelihood in nats", "log_likelihood", "{:.3f}"),
                ("scorer, calibration error", "calibration_error", "{:.3f}"),
            )
        }
    else:
        rows = {"judge agrees with the scorer's best label": _share(result.agreement)}
    if result.calibrated and result.supported:
        used = "used" if result.calibration.teaches else "not used"
        rows["cross-validated: calibrated"] = _right_and_likely(result.calibrated)
        rows[f"cross-validated: with support set ({used})"] = _right_and_likely(result.supported)
    if result.foretold:
        rows["gain if every image is asked about, foretold"] = "{:+.1%} ± {:.1%}".format(*result.foretold)
    if result.areas:
        rows["area, entropy and judge's answer → gain and fusion"] = f"{result.areas[0]:.3f} → {result.areas[1]:.3f}"
    if (fused := result.calibration.judges[-1].log_likelihood) is not None:
        rows["fused, cross-validated log-likelihood in nats"] = f"{fused:.3f}"
    if (conformal := result.calibration.conformal) and conformal.class_thresholds is not None:
        own = int((conformal.class_thresholds != conformal.threshold).sum())
        rows["classes with their own conformal threshold"] = f"{own} of {len(conformal.class_thresholds)}"
    for judge in result.calibration.judges:
        rows[f"best number of candidates, {judge.judge}"] = str(judge.best_size)
    if (policy := result.calibration.policy) and (found := result.outcome):
        rows |= {
            "policy": policy,
            "escalated": _share(found.deferral_rate),
            "dollars per 1,000 images": f"${found.dollars_per_thousand:.4f}",
            "accuracy": _share(found.accuracy, found.accuracy_interval),
            "scorer alone, judge on every image": f"{_share(found.scorer_accuracy)}, {_share(found.judge_accuracy)}",
        }
    if result.acceptance:
        rows["guarantee"] = result.acceptance.describe()
    return rows


def _right_and_likely(quality: dict[str, float]) -> str:
    return f"{quality['accuracy']:.1%}, {quality['log_likelihood']:.3f} nats"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def print_summary(console: Console, title: str, rows: dict[str, str]) -> None:
    """Print a table with one figure per line."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
    for name, value in rows.items():
        table.add_row(Text(visible(name)), Text(visible(value), justify="right"))
    console.print(table)

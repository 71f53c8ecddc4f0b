"""Plots of records. Each function returns a ``matplotlib.figure.Figure``; its ``savefig`` writes PNG or SVG.

The plots do not use pyplot, so no figure stays in memory and no window opens. The colours come from Okabe and Ito, "Color
Universal Design", 2008, which readers with any colour vision can distinguish. Lines also differ in their dashes.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.decision.calibration import Calibration
from cascadevlm.evaluation.deciding import decided, held_out
from cascadevlm.evaluation.evaluate import as_configured, policies
from cascadevlm.evaluation.metrics import BINS, Interval, evaluate, expected_calibration_error
from cascadevlm.evaluation.record import Record
from cascadevlm.evaluation.sweep import Sweep, sweep
from cascadevlm.policies import measures
from cascadevlm.policies.base import Policy
from cascadevlm.policies.rules import EntropyAbove

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOREGROUND = "#23272f"
"""Colour of axes and texts."""

BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"

CURVES = {
    "oracle": (ORANGE, (0, (6, 2))),
    "entropy": (BLUE, "-"),
    "margin": (GREEN, (0, (3, 1))),
    "top_probability": (PURPLE, (0, (4, 1, 1, 1))),
    "gain": (FOREGROUND, "-"),
    "random": (FOREGROUND, (0, (1, 2))),
}
"""Colour and dashes of each ranking of `sweep`."""

WIDTH = 4.8
"""Width of all figures, in inches."""

MOST_CONFUSED = 12
"""Largest number of classes that `confusion` shows."""

HISTOGRAM_BINS = 25


def accuracy_deferral(record: Record) -> "Figure":
    """Accuracy against the share of escalated images, for every ranking of `sweep` and for the run.

    If the judge was not asked about every image, only the points of the scorer alone and of the run are shown.
    """
    figure, axes = _figure("share of escalated images (%)", "accuracy (%)")
    swept, own = _swept(record), evaluate(as_configured(record))
    for curve in swept.curves if swept else ():
        _line(axes, curve.name, 100 * curve.deferral_rates, 100 * curve.accuracies, f" (area {curve.area:.3f})")
    _points(axes, swept, (own.scorer_accuracy, own.cascade_accuracy), own.deferral_rate, 1)
    axes.set_xlim(-4, 104)
    _legend(figure)
    return figure


def decision_layer(record: Record, calibration: Calibration) -> "Figure":
    """Accuracy against the share of escalated images, with and without a calibration, on images that it was not fitted on.

    Raises:
        DataError: if the calibration was fitted on all images, or the judge was not asked about every image.
    """
    figure, axes = _figure("share of escalated images (%)", "accuracy (%)")
    rest = held_out(record, calibration)
    fused = sweep(decided(rest, calibration))
    for name, curve, what in (
        ("entropy", sweep(rest).curve("entropy"), "entropy, judge decides"),
        ("gain", fused.curve("gain"), "gain, scorer and judge decide"),
        ("oracle", fused.curve("oracle"), "oracle, scorer and judge decide"),
    ):
        colour, dashes = CURVES[name]
        label = f"{what} (area {curve.area:.3f})"
        axes.plot(100 * curve.deferral_rates, 100 * curve.accuracies, color=colour, linestyle=dashes, linewidth=1.7, label=label)
    axes.set_xlim(-4, 104)
    _legend(figure, columns=1)
    return figure


def accuracy_dollars(record: Record) -> "Figure":
    """Accuracy against US dollars per 1,000 images. Everything else is the same as in `accuracy_deferral`."""
    figure, axes = _figure("US dollars per 1,000 images", "accuracy (%)")
    swept, own = _swept(record), evaluate(as_configured(record))
    for curve in swept.curves if swept else ():
        _line(axes, curve.name, curve.dollars, 100 * curve.accuracies)
    everything = float(swept.curves[0].dollars[-1]) if swept else None
    _points(axes, swept, (own.scorer_accuracy, own.cascade_accuracy), own.dollars_per_thousand, everything, scale=1)
    _legend(figure)
    return figure


def _swept(record: Record) -> Sweep | None:
    """The sweep of the record; None if the judge was not asked about every image."""
    known = record.stages and record.readable.any() and record.asked_everything
    return sweep(record) if known else None


def _line(axes: "Axes", name: str, across: NDArray[np.float64], up: NDArray[np.float64], remark: str = "") -> None:
    colour, dashes = CURVES[name]
    axes.plot(across, up, color=colour, linestyle=dashes, linewidth=1.7, label=name.replace("_", " ") + remark)


def _points(
    axes: "Axes",
    swept: Sweep | None,
    accuracies: tuple[float | None, float | None],
    own_cost: float | None,
    everything_cost: float | None,
    *,
    scale: float = 100,
) -> None:
    """Points of the scorer alone, the judge on every image, and the run. Unknown points are left out."""
    scorer, own = accuracies
    points = [
        ("scorer alone", 0.0, scorer, "o"),
        ("judge on every image", everything_cost, swept.judge_accuracy if swept else None, "s"),
        ("this run", own_cost, own, "D"),
    ]
    for name, cost, accuracy, marker in points:
        if cost is not None and accuracy is not None:
            colour = ORANGE if name == "this run" else FOREGROUND
            label = f"{name} ({accuracy:.1%})"
            axes.plot([scale * cost], [100 * accuracy], marker, color=colour, markersize=7, label=label, zorder=3)


def runs(records: Mapping[str, Record]) -> "Figure":
    """Accuracy of several runs with 95 % intervals, against dollars per 1,000 images.

    If no run cost anything, the accuracy is shown against the share of escalated images.
    """
    evaluations = {name: evaluate(as_configured(record)) for name, record in records.items()}
    paid = any(each.dollars for each in evaluations.values())
    figure, axes = _figure("US dollars per 1,000 images" if paid else "share of escalated images (%)", "accuracy (%)")
    markers = "oDs^vP"
    for number, (name, each) in enumerate(evaluations.items()):
        cost = each.dollars_per_thousand if paid else 100 * (each.deferral_rate or 0)
        if each.cascade_accuracy is not None and cost is not None:
            colour, marker = (BLUE, ORANGE, GREEN, PURPLE)[number % 4], markers[number % len(markers)]
            _interval(axes, cost, each.cascade_accuracy, each.cascade_accuracy_interval, colour, marker, name)
    axes.margins(x=0.15)
    _legend(figure)
    return figure


def _interval(axes: "Axes", across: float, accuracy: float, ends: Interval | None, colour: str, marker: str, name: str) -> None:
    low, high = ends or (accuracy, accuracy)
    axes.plot([across, across], [100 * low, 100 * high], color=colour, linewidth=1.7)
    axes.plot(
        [across], [100 * accuracy], marker, color=colour, markersize=7, label=_plain(name.lstrip("_"), 60)
    )  # matplotlib hides labels that begin with "_"


def reliability(record: Record) -> "Figure":
    """Reliability diagram: accuracy against confidence, for the scorer and for the final predictions that have a probability.

    Each mark is a bin of confidences; its size shows the number of images.

    Source: Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017.
    """
    figure, axes = _figure("confidence (%)", "accuracy (%)")
    final = as_configured(record)
    read = record.readable
    told = read & ~np.isnan(final.probabilities)
    axes.plot([0, 100], [0, 100], color=FOREGROUND, linestyle=(0, (1, 2)), linewidth=1, label="calibrated")
    confidence = record.scores.probabilities[read].max(axis=1)
    _reliability(axes, "scorer", confidence, (record.scored == record.truths)[read], BLUE, "o")
    if record.stages:
        _reliability(axes, "final", final.probabilities[told], (final.predicted == final.truths)[told], ORANGE, "D")
    axes.set_xlim(-2, 102)
    axes.set_ylim(-2, 102)
    _legend(figure, columns=1)
    return figure


def _reliability(
    axes: "Axes", name: str, confidence: NDArray[np.floating], right: NDArray[np.bool_], colour: str, marker: str
) -> None:
    error = expected_calibration_error(confidence, right)
    if error is None:
        return
    of_bin = np.searchsorted(np.arange(1, BINS) / BINS, confidence, side="left")
    counts = np.bincount(of_bin, minlength=BINS)
    used = counts > 0
    means, shares = (np.bincount(of_bin, weights=values, minlength=BINS)[used] / counts[used] for values in (confidence, right))
    sizes = 16 + 400 * counts[used] / len(right)
    axes.scatter(100 * means, 100 * shares, sizes, color=colour, marker=marker, alpha=0.75, linewidths=0, zorder=3)
    axes.plot([], [], marker, color=colour, label=f"{name}: {len(right):,} images, calibration error {error:.3f}")


def entropy_histogram(record: Record) -> "Figure":
    """Histogram of the entropy, for images that the scorer got right and wrong, with the policies' entropy thresholds."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure("entropy of the scorer's probabilities (0 certain, 1 uniform)", "images")
    entropy = measures.entropy(record.scores)
    right = record.scored == record.truths
    groups = [("scorer right", right & record.readable, BLUE), ("scorer wrong", ~right & record.readable, ORANGE)]
    axes.hist(
        [entropy[rows] for _, rows, _ in groups],
        bins=np.linspace(0, 1, HISTOGRAM_BINS + 1).tolist(),
        stacked=True,
        color=[colour for _, _, colour in groups],
        label=[f"{name} ({rows.sum():,})" for name, rows, _ in groups],
        rwidth=0.88,
    )
    for threshold in {t for policy in policies(record) for t in _thresholds(policy, len(record.labels))}:
        axes.axvline(threshold, color=FOREGROUND, linestyle=(0, (4, 2)), linewidth=1.3, label=f"threshold {threshold:.3g}")
    axes.set_xlim(0, 1)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure)
    return figure


def confidence(counts: Mapping[str, NDArray[np.int64]]) -> "Figure":
    """Histogram of the probabilities of the labels of a run, by the part that decided.

    Args:
        counts: for each part that decides, the number of images in each of `HISTOGRAM_BINS` equal intervals from 0 to 1.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure("probability of the label", "images")
    colours = {"scorer": BLUE, "judge": ORANGE, "fusion": GREEN}
    middles = (np.arange(HISTOGRAM_BINS) + 0.5) / HISTOGRAM_BINS
    below = np.zeros(HISTOGRAM_BINS, dtype=np.int64)
    for name, inside in counts.items():
        label = f"by the {name} ({inside.sum():,})"
        axes.bar(middles, inside, 0.88 / HISTOGRAM_BINS, bottom=below, color=colours[name], label=label)
        below = below + inside
    axes.set_xlim(0, 1)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure)
    return figure


def _thresholds(policy: Policy, classes: int) -> list[float]:
    """All thresholds of a policy on normalised entropy."""
    match policy:
        case EntropyAbove(threshold=threshold, unit="nats"):
            return [threshold / float(np.log(max(classes, 2)))]
        case EntropyAbove(threshold=threshold):
            return [threshold]
    return [threshold for part in policy.parts for threshold in _thresholds(part, classes)]


def confused_classes(truths: Columns, predicted: Columns, most: int = MOST_CONFUSED) -> list[int]:
    """The columns of the classes that are confused most often, most frequent pair first. Both classes of a pair are included."""
    wrong = (predicted != truths) & (predicted != NOBODY)
    pairs = np.sort(np.stack([truths[wrong], predicted[wrong]], axis=1), axis=1)
    found, counts = np.unique(pairs, axis=0, return_counts=True)
    chosen: dict[int, None] = {}
    for pair in found[np.argsort(-counts, kind="stable")].tolist():
        if len(chosen.keys() | pair) > most:
            break
        chosen |= dict.fromkeys(pair)
    return [*chosen]


def confusion(record: Record) -> "Figure":
    """Confusion matrix of the classes that are confused most often. Rows are truths, and columns are final labels."""
    from matplotlib.patches import Rectangle

    final = as_configured(record)
    classes = confused_classes(final.truths[record.readable], final.predicted[record.readable])
    size = len(classes)
    figure, axes = _figure("final label (by number)", "", height=0.8 + 0.34 * max(size, 2))
    counts = np.array([[((final.truths == row) & (final.predicted == column)).sum() for column in classes] for row in classes])
    most = max((counts[row, column] for row in range(size) for column in range(size) if row != column), default=0)
    for row, column in zip(*np.nonzero(counts), strict=True) if size else ():
        count, right = int(counts[row, column]), row == column
        colour, alpha = (BLUE, 0.12) if right else (ORANGE, 0.15 + 0.5 * count / most)
        axes.add_patch(Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, facecolor=colour, alpha=alpha, linewidth=0))
        axes.text(column, row, f"{count:,}", ha="center", va="center", fontsize=8.5, color=FOREGROUND)
    if not size:
        axes.text(0.5, 0.5, "No class was confused with another.", ha="center", color=FOREGROUND, transform=axes.transAxes)
    names = [_plain(f"{number} {record.labels.names[column]}", 28, lines=2) for number, column in enumerate(classes, start=1)]
    axes.set_yticks(range(size), names, parse_math=False, fontsize=8)
    axes.set_xticks(range(size), [str(number) for number in range(1, size + 1)])
    axes.set_xlim(-0.5, max(size, 1) - 0.5)
    axes.set_ylim(max(size, 1) - 0.5, -0.5)
    axes.grid(False)
    axes.tick_params(length=0)
    return figure


def study(variants: Sequence[str], accuracies: Sequence[float], intervals: Sequence[Interval | None]) -> "Figure":
    """Accuracy of each variant of a study with its 95 % interval. The first variant is at the top."""
    figure, axes = _figure("accuracy (%)", "", height=1 + 0.27 * max(len(variants), 2))
    for row, (accuracy, ends) in enumerate(zip(accuracies, intervals, strict=True)):
        low, high = ends or (accuracy, accuracy)
        axes.plot([100 * low, 100 * high], [row, row], color=BLUE, linewidth=1.7, solid_capstyle="butt")
        axes.plot([100 * accuracy], [row], "o", color=BLUE, markersize=6)
    axes.set_yticks(range(len(variants)), [_plain(name, 40) for name in variants], parse_math=False)
    axes.set_ylim(len(variants) - 0.5, -0.5)
    axes.grid(False, axis="y")
    return figure


def _figure(across: str, up: str, *, height: float = 3.7) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(across, color=FOREGROUND)
    axes.set_ylabel(up, color=FOREGROUND)
    axes.tick_params(colors=FOREGROUND, labelsize=9)
    axes.grid(True, color=FOREGROUND, alpha=0.12, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FOREGROUND)
    return figure, axes


def _legend(figure: "Figure", *, columns: int = 2) -> None:
    """Put the legend below the axes, where it covers nothing."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=8.5, columnspacing=1)
    for text in legend.get_texts():
        text.set_parse_math(False)
        text.set_color(FOREGROUND)


def _plain(text: str, width: int, *, lines: int = 1) -> str:
    """The text, shortened to ``lines`` lines of ``width`` characters."""
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …"))

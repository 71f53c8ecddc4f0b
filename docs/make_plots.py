"""Draws the plots for the pages about deciding: ``python -m docs.make_plots RUN CALIBRATION [--recorded FOLDER]``.

With ``--certified RUN``, the folder of a run with a certificate, the plot of the page about certificates is drawn, too.

RUN is a record of ``evaluate --judge-all``. CALIBRATION is a file that ``calibrate`` made from this record. With the folder
``../shared/recorded/artdl``, the same plots are drawn for one pair of `benchmarks.sweep`, calibrated on 200 random images.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import typer
from matplotlib.figure import Figure

from benchmarks.sweep import pairs
from cascadevlm.decision.calibration import Calibration, read_calibration
from cascadevlm.evaluation import plots
from cascadevlm.evaluation.calibrating.fitting import fit_calibration
from cascadevlm.evaluation.calibrating.recipe import Recipe
from cascadevlm.evaluation.deciding import decided, held_out
from cascadevlm.evaluation.record import Record, read_record
from cascadevlm.runs.certificate import Standing
from cascadevlm.runs.run_folder import PREDICTIONS

PAIR = "siglip-base→gpt-4o-mini"
"""The recorded pair whose scorer has the largest differences of bias between classes."""


PHASES = (
    ("kept", plots.BLUE, "kept"),
    ("tested", plots.ORANGE, "asked: the test"),
    ("asked", plots.FOREGROUND, "asked after the test"),
    ("taught", plots.GREEN, "asked before the test"),
)
"""Phases of a certificate, with colours and names."""

BARS = 32


def reliability(record: Record, calibration: Calibration) -> Figure:
    """A plot of accuracy against confidence, for images that were not used for the calibration.

    It shows the scorer, the calibrated scorer and the fused opinions.
    """
    rest = held_out(record, calibration)
    after = decided(rest, calibration)
    assert after.fused is not None
    figure, axes = plots._figure("confidence (%)", "accuracy (%)")
    axes.plot([0, 100], [0, 100], color=plots.FOREGROUND, linestyle=(0, (1, 2)), linewidth=1, label="calibrated")
    for name, confidence, predicted, colour, marker in (
        ("scorer", rest.scores.probabilities.max(axis=1), rest.scored, plots.BLUE, "o"),
        ("calibrated scorer", after.scores.probabilities.max(axis=1), after.scored, plots.GREEN, "s"),
        ("fused, everything asked", after.fused.probabilities, after.fused.labels, plots.ORANGE, "D"),
    ):
        plots._reliability(axes, name, confidence, predicted == rest.truths, colour, marker)
    axes.set_xlim(-2, 102)
    axes.set_ylim(-2, 102)
    plots._legend(figure, columns=1)
    return figure


def kept_and_asked(standings: Sequence[Standing]) -> Figure:
    """A plot of what a certificate did with its images, surest first, in `BARS` groups of the same size."""
    figure, axes = plots._figure("images, surest label first (%)", "share of these images (%)")
    ordered = sorted(standings, key=lambda standing: -standing.log_odds)
    group = np.arange(len(ordered)) * BARS // len(ordered)
    below, sizes = np.zeros(BARS), np.bincount(group, minlength=BARS)
    for phase, colour, name in PHASES:
        inside = np.array([standing.phase == phase for standing in ordered])
        share = 100 * np.bincount(group[inside], minlength=BARS) / sizes
        axes.bar((np.arange(BARS) + 0.5) * 100 / BARS, share, 90 / BARS, below, color=colour, label=name)
        below += share
    plots._legend(figure)
    return figure


def main(
    run: Path,
    calibration: Path,
    recorded: Annotated[Path | None, typer.Option(help="Folder of recorded predictions, in the form of artdl.")] = None,
    certified: Annotated[Path | None, typer.Option(help="Folder of a run with a certificate.")] = None,
) -> None:
    """Write the SVG files to the folder of this module."""
    known = {"birds": (read_record(run), read_calibration(calibration))}
    if recorded:
        record = pairs(recorded)[PAIR]
        drawn = np.sort(np.random.default_rng(0).permutation(len(record))[:200])
        known["artdl"] = record, fit_calibration(record.take(drawn), Recipe())
    for name, (record, learned) in known.items():
        record = record.take(np.flatnonzero(record.readable))
        for what, draw in (("accuracy", plots.decision_layer), ("reliability", reliability)):
            _save(draw(record, learned), f"{what}-{name}.svg")
    if certified:
        lines = (certified / PREDICTIONS).read_text().splitlines()
        read = (json.loads(line).get("certificate") for line in lines)
        _save(kept_and_asked([Standing.model_validate(each) for each in read if each]), "certificate.svg")


def _save(figure: Figure, name: str) -> None:
    path = Path(__file__).with_name(name)
    with matplotlib.rc_context({"svg.hashsalt": "cascadevlm"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
    print(path)


if __name__ == "__main__":
    typer.run(main)

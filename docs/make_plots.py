"""The plots of the pages on deciding better: ``python -m docs.make_plots RUN CALIBRATION [--recorded FOLDER]``.

RUN is a record of ``evaluate --judge-all``, CALIBRATION a file that ``calibrate`` made of it. With ``../shared/recorded/artdl``,
the same is drawn of one of its pairs of `benchmarks.sweep`, calibrated on 200 images drawn at random.
"""

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

PAIR = "siglip-base→gpt-4o-mini"
"""Of those recorded: the scorer whose classes are most unevenly biased."""


def reliability(record: Record, calibration: Calibration) -> Figure:
    """Accuracy against confidence on images not fitted on: of the scorer before and after, and of the opinions fused."""
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


def main(
    run: Path,
    calibration: Path,
    recorded: Annotated[Path | None, typer.Option(help="A folder of recorded predictions, as artdl.")] = None,
) -> None:
    """Write the SVG files beside this one."""
    known = {"birds": (read_record(run), read_calibration(calibration))}
    if recorded:
        record = pairs(recorded)[PAIR]
        drawn = np.sort(np.random.default_rng(0).permutation(len(record))[:200])
        known["artdl"] = record, fit_calibration(record.take(drawn), Recipe())
    for name, (record, learned) in known.items():
        record = record.take(np.flatnonzero(record.readable))
        for what, draw in (("accuracy", plots.decision_layer), ("reliability", reliability)):
            with matplotlib.rc_context({"svg.hashsalt": "cascadevlm"}):
                path = Path(__file__).with_name(f"{what}-{name}.svg")
                draw(record, learned).savefig(path, format="svg", metadata={"Date": None})
            print(path)


if __name__ == "__main__":
    typer.run(main)

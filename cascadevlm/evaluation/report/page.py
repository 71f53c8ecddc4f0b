"""The page about runs over labelled images: figures, plots, studies and cases, made from ``templates``."""

import base64
import hashlib
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from cascadevlm.decision.calibration import Calibration
from cascadevlm.evaluation import plots
from cascadevlm.evaluation.deciding import calibration_beside
from cascadevlm.evaluation.evaluate import as_configured, evaluate_part, read_decided
from cascadevlm.evaluation.metrics import Evaluation
from cascadevlm.evaluation.record import Record
from cascadevlm.evaluation.report.cases import cases
from cascadevlm.evaluation.results import Study, read_studies
from cascadevlm.evaluation.texts import figures, number, share
from cascadevlm.runs.corrections import Corrections, read_corrections

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

COLOURS = {
    plots.FOREGROUND: "currentColor",
    plots.BLUE: "var(--blue)",
    plots.ORANGE: "var(--orange)",
    plots.GREEN: "var(--green)",
    plots.PURPLE: "var(--purple)",
}
"""The CSS names of the plots' colours, so that the page can choose them for a light or dark background."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the page shows about one run.

    Attributes:
        record: the record as it was made.
        final: the record under its policy. It differs from ``record`` if the judge was asked about every image.
        evaluation: figures of ``final``, including the judge's answers about kept images. ``paid_dollars`` is taken from
            ``record``.
        studies: the studies in the folder of the record.
        calibration: the calibration in the folder, if it was fitted on images of this record.
        corrections: what people said about images of the record. Their labels are the true labels.
    """

    record: Record
    final: Record
    evaluation: Evaluation
    studies: tuple[Study, ...] = ()
    calibration: Calibration | None = None
    corrections: Corrections = Corrections()

    @classmethod
    def of(cls, record: Record, studies: Sequence[Study] = (), calibration: Calibration | None = None) -> "Run":
        """The run of a record."""
        final = as_configured(record)
        evaluation = evaluate_part(final, record)
        return cls(record=record, final=final, evaluation=evaluation, studies=tuple(studies), calibration=calibration)


def read_run(folder: Path) -> Run:
    """The record, the studies, the calibration and the corrections in a folder.

    Raises:
        DataError: if the folder has no complete record, or a study cannot be read.
    """
    record, calibration = read_decided(folder), calibration_beside(folder)
    fitted_here = calibration is not None and record.scores.fingerprint == calibration.fingerprint
    run = Run.of(record, read_studies(folder), calibration if fitted_here else None)
    return replace(run, corrections=read_corrections(folder))


def render(runs: Mapping[str, Run], *, seed: int = 0) -> str:
    """The page as HTML. It loads nothing from the network.

    Args:
        runs: the runs by name.
        seed: seed of the random choice of cases, if there are more than a page can contain.
    """
    draw = Drawing()
    return rendered(
        "report.html.j2",
        runs=runs,
        figures={name: figures(run.evaluation) | _of_people(run.corrections) for name, run in runs.items()},
        plots={name: _plots(run, draw) for name, run in runs.items()},
        beside=draw(plots.runs({name: run.record for name, run in runs.items()}), "Accuracy of the runs")
        if len(runs) > 1
        else "",
        studies={name: [(study, _study(study, draw)) for study in run.studies] for name, run in runs.items()},
        cases=cases({name: (run.record, run.final) for name, run in runs.items()}, seed=seed),
        conflicts={name: run.corrections.described_conflicts for name, run in runs.items()},
    )


def rendered(template: str, **given: object) -> str:
    """A page with the style and the script that all pages share."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("cascadevlm.evaluation.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(share=share, number=number)
    templates = resources.files("cascadevlm.evaluation.report") / "templates"
    style, script = ((templates / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(**given, style=Markup(style), script=Markup(script), script_digest=digest)


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot, its title, and a sentence about what it shows."""

    title: str
    text: str
    svg: "Markup"


def _plots(run: Run, draw: "Drawing") -> list[Plot]:
    """The plots of a run. Plots without data are left out."""
    found = run.evaluation
    judged, read = bool(run.record.stages), found.images > found.unreadable
    swept = not judged or run.record.asked_everything
    everything = "" if swept else " There are no curves, because the judge was not asked about every image."
    known: list[tuple[bool, str, str, Callable[[Record], Figure]]] = [
        (
            judged and read,
            "Accuracy against questions",
            "Accuracy of each way to choose the images for the judge." + everything,
            plots.accuracy_deferral,
        ),
        (
            judged and read and found.dollars > 0,
            "Accuracy against dollars",
            "Accuracy against the cost of the questions." + everything,
            plots.accuracy_dollars,
        ),
        (
            read,
            "Entropy",
            "Entropy of the scorer's probabilities, for images that the scorer got right and wrong.",
            plots.entropy_histogram,
        ),
        (
            read,
            "Reliability",
            "Share of right predictions for each level of confidence. Larger marks stand for more images.",
            plots.reliability,
        ),
        (
            read and found.cascade_accuracy != 1,
            "Confusion",
            "The classes that are confused most often. Rows are truths, columns are final labels.",
            plots.confusion,
        ),
    ]
    if run.calibration is not None and swept:
        text = "Accuracy with and without the calibration in the run's folder, on images that it was not fitted on."
        decision = partial(plots.decision_layer, calibration=run.calibration)
        known.insert(2, (True, "Decision layer", text, decision))
    return [Plot(title=title, text=text, svg=draw(plot(run.record), title)) for shown, title, text, plot in known if shown]


def _study(study: Study, draw: "Drawing") -> "Markup":
    rows = study.rows
    figure = plots.study([row.variant for row in rows], [row.accuracy for row in rows], [row.interval for row in rows])
    return draw(figure, f"Accuracy by variant: {study.question}")


class Drawing:
    """Turns figures into SVG for one page. Text stays text, colours are CSS variables, and every id is unique on the page."""

    def __init__(self) -> None:
        self.drawn = 0

    def __call__(self, figure: "Figure", title: str) -> "Markup":
        import matplotlib
        from markupsafe import Markup, escape

        self.drawn += 1
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with warnings.catch_warnings(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "cascadevlm"}):
            warnings.filterwarnings("ignore", "Glyph")  # missing glyphs do not matter: the browser has its own fonts
            figure.savefig(file, format="svg", transparent=True, metadata=nothing)
        svg = file.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>plot{self.drawn}-", svg)
        svg = re.sub("|".join(COLOURS), lambda colour: COLOURS[colour[0]], svg)
        opening = f'<svg class="plot" role="img" aria-label="{escape(title)}" '
        svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', lambda found: f"{opening}{found[1]}>", svg)
        return Markup(svg)


def _of_people(corrections: Corrections) -> dict[str, str]:
    return {
        "Labelled by people": f"{len(corrections.counting):,}",
        "Images about which people disagree": f"{len(corrections.conflicts):,}",
    }

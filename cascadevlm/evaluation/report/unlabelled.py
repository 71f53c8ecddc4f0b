"""The page about bulk runs, whose images have no labels: the decisions, who made them, their probabilities and costs, and the
images with the lowest probability first."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from heapq import nsmallest
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, JsonValue, ValidationError

from cascadevlm.base.errors import BackendError, ImageError
from cascadevlm.base.html import thumbnail
from cascadevlm.base.images import ImageSource, load_image
from cascadevlm.base.remote import place_of
from cascadevlm.base.types import DecidedBy, Outcome
from cascadevlm.evaluation import plots
from cascadevlm.evaluation.report.cases import MOST_CASES, MOST_IN_ALL
from cascadevlm.evaluation.report.page import Drawing, rendered
from cascadevlm.runs.audit import AuditFigures
from cascadevlm.runs.certificate import read_certificate
from cascadevlm.runs.corrections import Corrections, read_corrections
from cascadevlm.runs.lines import Line
from cascadevlm.runs.manifest import NAME, Manifest
from cascadevlm.runs.predictions import predictions_of, table_of
from cascadevlm.runs.run_folder import SUMMARY
from cascadevlm.runs.tally import Tally

SURE = 0.9
"""Labels with at least this probability count as sure."""

KINDS = ("abstained", "unanswered", "skipped", "overruled", "escalated", "kept", "unreadable", "reviewed", "corrected")
"""Kinds of images. An image can be of several kinds."""

Numbered = tuple[int, Line]
"""The number of an image, from 0, and its line."""


@dataclass(kw_only=True)
class Given:
    """Totals of the images that got one label.

    Attributes:
        images: number of images.
        decided: number of images by the part that decided.
        probability: sum of the probabilities of the label.
    """

    images: int = 0
    decided: Counter[str] = field(default_factory=Counter)
    probability: float = 0.0


@dataclass(kw_only=True)
class BulkRun:
    """What the page shows about one run.

    Attributes:
        folder: folder of the run.
        manifest: settings of the run.
        finished: whether all images have a prediction.
        tally: totals of the run.
        kinds: number of images of each kind.
        labels: totals of each label that was given.
        sure: number of labels with a probability of at least `SURE`.
        probabilities: for each part that decides, the number of labels in equal intervals of the probability from 0 to 1.
        doubtful: the images with the lowest probabilities, lowest first.
        corrections: what people said about images.
    """

    folder: Path
    manifest: Manifest
    finished: bool
    corrections: Corrections
    tally: Tally = field(default_factory=Tally)
    kinds: Counter[str] = field(default_factory=Counter)
    labels: dict[str, Given] = field(default_factory=dict)
    sure: int = 0
    probabilities: dict[str, NDArray[np.int64]] = field(
        default_factory=lambda: {by: np.zeros(plots.HISTOGRAM_BINS, dtype=np.int64) for by in get_args(DecidedBy)}
    )
    doubtful: list[Numbered] = field(default_factory=list)

    @property
    def readable(self) -> int:
        return self.tally.images - self.tally.counts["unreadable"]

    @property
    def labelled(self) -> int:
        """Number of images with a label."""
        return sum(given.images for given in self.labels.values())

    @property
    def decided(self) -> dict[str, int]:
        """Number of labels by the part that decided."""
        return {by: int(parts.sum()) for by, parts in self.probabilities.items() if parts.any()}

    @property
    def by_label(self) -> list[tuple[str, Given]]:
        """The labels and their totals, most frequent label first."""
        return sorted(self.labels.items(), key=lambda each: (-each[1].images, each[0]))

    @property
    def never_given(self) -> list[str]:
        """The labels that no image got."""
        return [label.name for label in self.manifest.labels if label.name not in self.labels]

    def kinds_of(self, line: Line) -> list[str]:
        """The kinds of an image."""
        best = next((candidate.label for candidate in line.candidates if candidate.rank == 1), None)
        said = self.corrections.counting.get(line.key)
        holds = {
            "abstained": line.abstained,
            "unanswered": line.asked and not line.answered,
            "skipped": line.skipped,
            "overruled": line.label not in (best, None),
            "escalated": line.escalated,
            "kept": bool(line.candidates) and not line.escalated,
            "unreadable": not line.candidates,
            "reviewed": said is not None,
            "corrected": said is not None and said.label != line.label,
        }
        return [kind for kind in KINDS if holds[kind]]

    def add(self, line: Line) -> None:
        """Add one prediction to the totals."""
        self.tally.add(line)
        self.tally.spent_dollars += line.cost.dollars
        self.kinds.update(self.kinds_of(line))
        if line.label is None or line.decided_by is None:
            return
        probability = min(max(line.confidence, 0.0), 1.0)
        given = self.labels.setdefault(line.label, Given())
        given.images += 1
        given.decided[line.decided_by] += 1
        given.probability += probability
        self.sure += probability >= SURE
        parts = self.probabilities[line.decided_by]
        parts[min(int(probability * len(parts)), len(parts) - 1)] += 1


class _Summary(BaseModel):
    spent_dollars: float
    audit: AuditFigures | None = None


def is_bulk_run(folder: Path) -> bool:
    """True if a folder contains a run over images without labels."""
    return (folder / NAME).is_file() and not Manifest.read(folder).labelled


def read_bulk_run(folder: Path) -> BulkRun:
    """Read the run in a folder, finished or not. The memory used does not grow with the number of images.

    Raises:
        DataError: if the manifest or a prediction cannot be read.
    """
    try:
        summary = _Summary.model_validate_json((folder / SUMMARY).read_bytes())
    except (OSError, ValidationError):  # the summary is written last
        summary = None
    run = BulkRun(
        folder=folder, manifest=Manifest.read(folder), finished=summary is not None, corrections=read_corrections(folder)
    )

    def doubted() -> Iterator[tuple[float, int, Line]]:
        for number, line in predictions_of(folder, None):
            run.add(line)
            yield _certainty(line), number - 1, line

    run.doubtful = [(number, line) for _, number, line in nsmallest(MOST_CASES, doubted())]
    if summary is not None:
        run.tally.spent_dollars = summary.spent_dollars
        run.tally.certificate, run.tally.audit = read_certificate(folder / SUMMARY), summary.audit
    return run


def render_bulk(runs: Mapping[str, BulkRun]) -> str:
    """The page as HTML. It loads nothing from the network.

    Args:
        runs: the runs by name.
    """
    draw = Drawing()
    drawings = {
        name: draw(plots.confidence({by: run.probabilities[by] for by in run.decided}), "Probability of the labels")
        for name, run in runs.items()
    }
    shown, missing = _cases(runs)
    return rendered(
        "unlabelled.html.j2",
        runs=runs,
        figures={name: _figures(run) for name, run in runs.items()},
        plots=drawings,
        cases=shown,
        missing=missing,
        conflicts={name: run.corrections.described_conflicts for name, run in runs.items()},
    )


def _certainty(line: Line) -> float:
    """The sort key of an image. Images without a label are first, and images that could not be read are last."""
    if not line.candidates:
        return 2.0
    return -1.0 if line.label is None else line.confidence


def _cases(runs: Mapping[str, BulkRun]) -> tuple[dict[str, JsonValue], int]:
    """The cases of all runs in the form of `report.cases.cases`, and the number of readable images without a picture."""
    told: list[JsonValue] = []
    thumbnails: list[JsonValue] = []
    missing = 0
    for name, run in runs.items():
        rows = run.doubtful[: MOST_IN_ALL // len(runs)]
        pictures = _thumbnails(run, rows)
        labels: dict[str, int] = {}
        shown: list[JsonValue] = []
        for number, line in rows:
            missing += bool(line.candidates) and not pictures.get(number)
            shown.append(_case(run, line, labels) | {"thumbnail": len(thumbnails)})
            thumbnails.append(pictures.get(number, ""))
        totals: dict[str, JsonValue] = {"all": run.tally.images, **{kind: run.kinds[kind] for kind in KINDS}}
        told.append({"name": name, "labels": [*labels], "totals": totals, "cases": shown})
    return {"runs": told, "thumbnails": thumbnails, "kinds": ["all", *KINDS], "chosen": "with the lowest probability"}, missing


def _case(run: BulkRun, line: Line, labels: dict[str, int]) -> dict[str, JsonValue]:
    """The data of one image. Its truth is the label that a person gave.

    Labels are numbers; a label without a number gets the next one in ``labels``.
    """

    def numbered(label: str | None) -> int:
        return -1 if label is None else labels.setdefault(label, len(labels))

    said = run.corrections.counting.get(line.key)
    verdicts: list[JsonValue] = [
        {
            "judge": verdict.judge,
            "outcome": verdict.outcome,
            "label": numbered(verdict.label),
            "said": verdict.rationale or verdict.text or verdict.error,
            "counts": True,
        }
        for verdict in line.verdicts
    ]
    return {
        "name": Path(line.path).name,
        "id": line.id or "",
        "readable": bool(line.candidates),
        "truth": numbered(said.label if said else None),
        "label": numbered(line.label),
        "by": line.decided_by or "",
        "probability": None if line.probability is None else round(line.probability, 4),
        "reasons": [*line.reasons],
        "error": line.error,
        "candidates": [[numbered(each.label), round(each.probability, 4)] for each in line.candidates],
        "verdicts": verdicts,
        "kinds": [*run.kinds_of(line)],
    }


def _thumbnails(run: BulkRun, rows: list[Numbered]) -> dict[int, str]:
    """Thumbnails by the number of the image. Images that were removed or replaced have no thumbnail."""
    names = {number: line.path for number, line in rows if line.candidates}
    table = table_of(run.manifest.inputs, run.manifest.columns)
    images: Iterator[tuple[int, tuple[str, ImageSource]]]
    if table is None:
        images = ((number, (name, place_of(name))) for number, name in names.items())
    else:
        images = zip(sorted(names), table.rows(names), strict=False)
    return {number: _thumbnail(source) for number, (name, source) in images if name == names[number]}


def _thumbnail(source: ImageSource) -> str:
    try:
        return thumbnail(load_image(source))
    except (BackendError, ImageError):
        return ""


def _figures(run: BulkRun) -> dict[str, str]:
    """All figures as text, by name."""
    tally = run.tally
    outcomes = ", ".join(f"{outcome} {tally.counts[outcome]:,}" for outcome in get_args(Outcome) if tally.counts[outcome])
    return {
        "Images (unreadable)": f"{tally.images:,} ({tally.counts['unreadable']:,})",
        "Labels given, of all labels": f"{len(run.labels):,} of {len(run.manifest.labels):,}",
        **{f"Decided by the {by}": f"{run.decided.get(by, 0):,}" for by in get_args(DecidedBy)},
        "Without a label": f"{tally.abstained:,}",
        "Kept, escalated": f"{run.kinds['kept']:,}, {run.kinds['escalated']:,}",
        "Overruled: final label is not the scorer's best": f"{run.kinds['overruled']:,}",
        f"Probability of {SURE} or more": f"{run.sure:,}",
        "Labelled by people (with another label)": f"{run.kinds['reviewed']:,} ({run.kinds['corrected']:,})",
        "Images about which people disagree": f"{len(run.corrections.conflicts):,}",
        "Outcomes of questions": outcomes or "–",
        "Requests to judges": f"{tally.requests:,}",
        "Spent": f"${tally.spent_dollars:,.4f}",
        "Saved by the cache": f"${tally.saved_dollars:,.4f}",
        "Dollars per 1,000 images": f"${1000 * (tally.spent_dollars + tally.saved_dollars) / tally.images:,.4f}"
        if tally.images
        else "–",
    }

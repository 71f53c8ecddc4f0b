"""A record as a data frame."""

from collections.abc import Sequence

import numpy as np

from cascadevlm.base.arrays import Columns
from cascadevlm.base.frames import Backend, Cells, frame_of
from cascadevlm.base.image_table import About
from cascadevlm.evaluation.record import Record

COLUMNS = (
    "name",
    "id",
    "truth",
    "label",
    "probability",
    "decided_by",
    "readable",
    "scored",
    "outcome",
    "answer",
    "dollars",
    "seconds",
)
"""The columns of a frame. A kept column with one of these names gets ``input.`` in front of its name."""


def record_frame(record: Record, backend: Backend = "pandas") -> object:
    """A record as a frame, one row per image.

    Columns: ``name``, the kept columns and ``id`` (if the images have them), ``truth``, ``label``, ``probability``,
    ``decided_by``, ``readable``, ``scored`` (the scorer's best label), and for each stage ``outcome``, ``answer``, ``dollars``
    and ``seconds``; from the second stage on with the number of the stage, such as ``outcome.1``.

    Args:
        record: the record.
        backend: the library of the frame: "pandas", "polars" or "pyarrow". Default: "pandas".

    Raises:
        InputError: if the library is not installed.
    """

    def names(columns: Columns) -> list[Cells]:
        return [None if column < 0 else record.labels.names[column] for column in columns.tolist()]

    frame: dict[str, list[Cells]] = {"name": [*record.names], **_told(record.about)}
    frame |= {"truth": names(record.truths), "label": names(record.predicted)}
    frame["probability"] = [None if np.isnan(each) else each for each in record.probabilities.tolist()]
    frame["decided_by"] = [each or None for each in record.decided_by]
    frame |= {"readable": record.readable.tolist(), "scored": names(record.scored)}
    for number, stage in enumerate(record.stages):
        suffix = f".{number}" if number else ""
        frame[f"outcome{suffix}"] = [each or None for each in stage.outcomes]
        frame[f"answer{suffix}"] = names(stage.answers)
        frame |= {f"dollars{suffix}": stage.dollars.tolist(), f"seconds{suffix}": stage.seconds.tolist()}
    return frame_of(frame, backend)


def _told(about: Sequence[About]) -> dict[str, list[Cells]]:
    """The kept columns and the ids, if there are any."""
    columns: dict[str, list[Cells]] = {}
    for number, each in enumerate(about):
        kept = each.get("kept")
        told = (
            {f"input.{name}" if name in COLUMNS else name: value for name, value in kept.items()}
            if isinstance(kept, dict)
            else {}
        )
        for name, value in {**told, "id": each.get("id")}.items():
            cell = value if isinstance(value, str | int | float | None) else str(value)
            columns.setdefault(name, [None] * len(about))[number] = cell
    if all(each.get("id") is None for each in about):
        columns.pop("id", None)
    return columns

"""Writes a record that was made of arrays into a folder, in the form that every command reads."""

from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from cascadevlm.base.arrays import NOBODY
from cascadevlm.base.environment import machine, versions
from cascadevlm.base.errors import InputError
from cascadevlm.base.files import writing_to
from cascadevlm.base.types import Candidate, Prediction, Usage, Verdict
from cascadevlm.evaluation.record import Judged, Record
from cascadevlm.runs.lines import line_of, write_table
from cascadevlm.runs.manifest import Manifest
from cascadevlm.runs.run_folder import PREDICTIONS, TABLE
from cascadevlm.runs.scores_file import ScoresFile

SHOWN = 5
"""Number of the scorer's best labels that are stored as candidates of an image without a question."""


def write_record(record: Record, folder: str | Path) -> None:
    """Write a record that `Record.from_arrays` made.

    Args:
        record: the record.
        folder: a new or empty folder.

    Raises:
        InputError: if the folder contains something.
        RunError: if the folder cannot be written to.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{str(folder)!r} exists already.", hint="Give a new folder.")
    manifest = Manifest(
        config={},
        labels=list(record.labels),
        inputs="arrays",
        labelled=True,
        stages=[stage.judge for stage in record.stages],
        asks_all=all(bool(stage.asked.all()) for stage in record.stages),
        began=datetime.now(UTC),
        versions=versions(),
        machine=machine(),
        contents={},
        fingerprint=record.scores.fingerprint,
    )
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with closing(ScoresFile(folder, record.labels)) as scores, (folder / PREDICTIONS).open("wb") as lines:
            scores.resize(len(record))
            for number, log_probs in enumerate(record.scores.log_probs):
                lines.write(_line(record, number, scores.write(number, log_probs, None)))
        write_table(folder / PREDICTIONS, folder / TABLE)
        manifest.write(folder)


def _line(record: Record, number: int, checksums: Mapping[str, JsonValue]) -> bytes:
    verdicts = tuple(_verdict(record, place, number) for place, stage in enumerate(record.stages) if stage.outcomes[number])
    asked: list[JsonValue] = [
        {"candidates": _shown(record, stage, number), "prompt": "", "offer_none": stage.none_offered, "exemplars": []}
        for stage in record.stages
        if stage.outcomes[number]
    ]
    probability = float(record.probabilities[number])
    predicted = int(record.predicted[number])
    prediction = Prediction(
        path=record.names[number],
        label=record.labels.names[predicted],
        probability=None if np.isnan(probability) else probability,
        decided_by="judge" if record.decided_by[number] == "judge" else "scorer",
        candidates=_candidates(record, number),
        verdicts=verdicts,
    )
    truth = record.labels.names[int(record.truths[number])]
    return line_of(prediction, {"truth": truth, "split": "", "questions": asked, **checksums})


def _shown(record: Record, stage: Judged, number: int) -> list[JsonValue]:
    return [record.labels.names[column] for column in stage.candidates[number].tolist() if column != NOBODY]


def _candidates(record: Record, number: int) -> tuple[Candidate, ...]:
    """The candidates of the last question. If there was no question, the scorer's best labels."""
    log_probs = record.scores.log_probs[number]
    columns = next((stage.candidates[number] for stage in reversed(record.stages) if stage.outcomes[number]), None)
    if columns is None:
        columns = np.argsort(-log_probs, kind="stable")[:SHOWN]
    ranks = np.argsort(np.argsort(-log_probs, kind="stable"))
    return tuple(
        Candidate(label=record.labels[column], probability=float(np.exp(log_probs[column])), rank=int(ranks[column]) + 1)
        for column in columns.tolist()
        if column != NOBODY
    )


def _verdict(record: Record, place: int, number: int) -> Verdict:
    stage = record.stages[place]
    usage = Usage(dollars=float(stage.dollars[number]), requests=1)
    if stage.answers[number] == NOBODY:
        return Verdict(outcome="none", judge=stage.judge, stage=place, usage=usage)
    label = record.labels.names[int(stage.answers[number])]
    return Verdict(outcome="answered", label=label, judge=stage.judge, stage=place, usage=usage)

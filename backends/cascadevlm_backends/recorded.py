"""``recorded:``: scores and verdicts from a file, through the same interfaces as the models that gave them.

A record is JSON lines, two kinds of them: ``{"scores": …}`` and ``{"verdict": …}``, each with the digest of the image's pixels.
`RecordingScorer` and `RecordingJudge` write one around any scorer and judge; ``recorded:FILE`` replays it. So does
``recorded:FOLDER`` what `cascadevlm.evaluation.record` wrote of a run; of several stages, ``recorded:FOLDER#2`` is the second
stage's judge.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, JsonValue

from cascadevlm.base.errors import BackendError, BudgetExhausted, FatalError, PermanentError
from cascadevlm.base.images import pixel_digest
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Question, Scores, Verdict
from cascadevlm.evaluation.record import read_record, read_verdicts
from cascadevlm.evaluation.recording import NotingScorer, asked_of
from cascadevlm.judges.base import Judge, WrapperJudge
from cascadevlm.judges.cache import key_of
from cascadevlm.scorers.base import Scorer

MOST_MISSING = 8
"""By how many the questions without an answer may outnumber the others: the record is of other questions then."""


class _RecordedScores(BaseModel):
    labels: tuple[str, ...]
    log_probs: list[float]
    fingerprint: str


class _RecordLine(BaseModel):
    """Scores or a verdict; beside a verdict, what was asked."""

    model_config = ConfigDict(extra="allow")

    image: str
    candidates: list[str] = []
    scores: _RecordedScores | None = None
    verdict: Verdict | None = None


class RecordingScorer(NotingScorer):
    """Scores as another scorer does and appends what it gave to a record."""

    def __init__(self, wrapped: Scorer, path: str | Path) -> None:
        super().__init__(wrapped)
        self.path = Path(path)

    def note(self, digests: Sequence[str], scores: Scores) -> None:
        for digest, row in zip(digests, scores.log_probs, strict=True):
            line = {"labels": list(scores.labels.names), "fingerprint": scores.fingerprint, "log_probs": row.tolist()}
            _append(self.path, {"image": digest, "scores": line})


class RecordingJudge(WrapperJudge):
    """Judges as another judge does and appends its valid verdicts to a record."""

    def __init__(self, wrapped: Judge, path: str | Path) -> None:
        super().__init__(wrapped)
        self.path = Path(path)

    async def judge(self, question: Question) -> Verdict:
        verdict = await self.wrapped.judge(question)
        if verdict.valid:
            _append(self.path, {**asked_of(question), "verdict": verdict.to_dict()})
        return verdict


class RecordedScorer(Scorer):
    """Replays the scores of a record.

    Raises:
        BackendError: when scoring, if the file is no record, holds no scores of an image for this label set, or holds those for
            other texts of the labels.
        DataError: when scoring, if the folder is no whole record.
    """

    def __init__(self, model: str) -> None:
        self.path = Path(model)

    def score(self, images: Sequence[Image.Image], labels: LabelSet) -> Scores:
        rows = [self._row(image, labels) for image in images]
        log_probs = np.array([row for row, _ in rows], dtype=np.float32).reshape(len(images), len(labels))
        return Scores(log_probs=log_probs, labels=labels, fingerprint=rows[0][1] if rows else "")

    def _row(self, image: Image.Image, labels: LabelSet) -> tuple[Sequence[float], str]:
        key = pixel_digest(image), labels.names
        if key not in self._rows:
            raise BackendError(
                f"Record {str(self.path)!r} has no scores of an image ({key[0][:12]}…) for these {len(labels)} labels.",
                hint="Give the images and labels it was recorded with, in their order.",
            )
        row, fingerprint = self._rows[key]
        if "|texts=" in fingerprint and labels.texts_part not in fingerprint.split("|"):
            raise BackendError(
                f"Record {str(self.path)!r} has scores of these labels with other texts.",
                hint="Give the labels with the texts it was recorded with.",
            )
        return row, fingerprint

    @cached_property
    def _rows(self) -> Mapping[tuple[str, tuple[str, ...]], tuple[Sequence[float], str]]:
        if self.path.is_dir():
            record = read_record(self.path)
            given = zip(record.digests, record.scores.log_probs, record.readable, strict=True)
            return {
                (digest, record.labels.names): (row, record.scores.fingerprint) for digest, row, readable in given if readable
            }
        rows = {}
        for line in _read(self.path):
            if line.scores is not None:
                rows[line.image, line.scores.labels] = line.scores.log_probs, line.scores.fingerprint
        return rows


class RecordedJudge(Judge):
    """Replays the verdicts of a record, at no cost. A question that was recorded with the candidates in another order gets that
    verdict; a question that was never asked fails.

    What failed or was skipped in a run does so again.

    Raises:
        BackendError: when first asked, if the file is no record, or it is not said which of several stages is meant.
        DataError: when first asked, if the folder is no whole record.
        FatalError: when asked, if most questions were never asked.
    """

    replays = True
    concurrency = 256

    def __init__(self, model: str) -> None:
        self.spec = f"recorded:{model}"
        self.model = model
        self._found = self._missing = 0

    async def judge(self, question: Question) -> Verdict:
        asked = asked_of(question)
        verdict = self._verdicts.get(key_of(asked)) or self._in_any_order.get(_set_key(asked))
        if verdict is None:
            self._missing += 1
            if self._missing - self._found >= MOST_MISSING:
                raise FatalError(
                    f"Record {self.model!r} has no answer to {self._missing} of {self._missing + self._found} questions.",
                    hint="Replay it with the images, labels, prompt and number of candidates that it was recorded with.",
                )
            raise PermanentError(f"Record {self.model!r} has no answer to this question.")
        self._found += 1
        if verdict.outcome == "failed":
            raise PermanentError(verdict.error)
        if verdict.outcome == "skipped":
            raise BudgetExhausted(verdict.error)
        usage = verdict.usage
        if not usage.dollars:
            return verdict
        return replace(verdict, usage=replace(usage, dollars=0.0, saved_dollars=usage.dollars + usage.saved_dollars))

    def identity(self) -> Mapping[str, JsonValue]:
        return {"judge": self.spec, "verdicts": self._digest}

    async def prepare(self) -> None:
        self._found = self._missing = 0
        self._verdicts  # noqa: B018  # reads the record

    @cached_property
    def _digest(self) -> str:
        return key_of({key: verdict.to_dict() for key, verdict in self._verdicts.items()})

    @cached_property
    def _verdicts(self) -> dict[str, Verdict]:
        return {key_of(asked): verdict for asked, verdict in self._recorded}

    @cached_property
    def _in_any_order(self) -> dict[str, Verdict]:
        return {_set_key(asked): verdict for asked, verdict in self._recorded}

    @cached_property
    def _recorded(self) -> list[tuple[dict[str, JsonValue], Verdict]]:
        """What was asked and what the judge said."""
        folder, _, stage = self.model.rpartition("#")
        if stage.isdecimal() and Path(folder).is_dir():
            return self._of_run(Path(folder), int(stage))
        if Path(self.model).is_dir():
            return self._of_run(Path(self.model), None)
        return [
            ({"image": line.image, "candidates": [*line.candidates], **(line.model_extra or {})}, line.verdict)
            for line in _read(Path(self.model))
            if line.verdict is not None
        ]

    def _of_run(self, folder: Path, stage: int | None) -> list[tuple[dict[str, JsonValue], Verdict]]:
        stages = read_verdicts(folder)
        number = 1 if stage is None and len(stages) == 1 else stage or 0
        if not 1 <= number <= len(stages):
            hint = f"Say which: recorded:{folder}#1 is the first's judge." if stages else "Give one whose cascade had a judge."
            raise BackendError(f"Record {str(folder)!r} has {len(stages)} stages.", hint=hint)
        return stages[number - 1]


def _set_key(asked: Mapping[str, JsonValue]) -> str:
    """The key of a question, whatever the order of its candidates."""
    candidates = asked["candidates"]
    assert isinstance(candidates, list)
    return key_of({**asked, "candidates": sorted(candidates, key=str)})


def _append(path: Path, line: Mapping[str, object]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _read(path: Path) -> list[_RecordLine]:
    try:
        lines = path.read_bytes().split(b"\n")  # not splitlines of a text, which knows other ends of lines
        return [_RecordLine.model_validate_json(line) for line in lines if line.strip()]
    except (OSError, ValueError) as exc:
        raise BackendError(f"Record {str(path)!r} cannot be read: {str(exc).splitlines()[0]}.") from exc

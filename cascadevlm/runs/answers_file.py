"""``asked.jsonl``: the predictions of the images that a certified run asked its judge about, in the order of the answers.

From these lines, an interrupted run goes through the steps of its certificate again without a question. Refused and failed
questions have a line, too, because they count as disagreement.
"""

import json
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.base.files import writing_to
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Prediction, Question, Scores, Verdict
from cascadevlm.cascade.observer import Observer
from cascadevlm.decision.judge_model import NONE_CHOSEN
from cascadevlm.judges.base import Judge
from cascadevlm.runs.lines import Line, checked, line_of
from cascadevlm.runs.run_folder import RunFolder, digest_key, has_changed
from cascadevlm.scorers.base import Prepared

ASKED = "asked.jsonl"


class _AskedLine(Line):
    """A line of the file.

    Attributes:
        number: number of the image.
    """

    number: int


class AnswersFile(Observer):
    """Writes the lines, as an observer of runs over some of the images.

    Args:
        folder: the locked folder of the run.
        labels: the labels.
        total: M, number of images of the run.
        retry_failed: true to remove all lines from the first failed question.

    Attributes:
        answers: `(M,)` columns; `NONE_CHOSEN` for "none of these", `NOBODY` for an image without an answer.
        asked: number of images with a line.
        skipped: number of images with a question that was not asked, because the budget was used up.
        dollars: what the answers cost or would have cost, in US dollars.
        numbers: the numbers of the images of the current run.
    """

    def __init__(self, folder: RunFolder, labels: LabelSet, total: int, *, retry_failed: bool) -> None:
        self.folder, self.labels = folder, labels
        self.answers: Columns = np.full(total, NOBODY, dtype=np.int64)
        self.asked = self.skipped = 0
        self.dollars = 0.0
        self.numbers: NDArray[np.intp] = np.zeros(0, dtype=np.intp)
        self._begins = np.full(total, -1, dtype=np.int64)
        self._digests: dict[int, dict[str, JsonValue]] = {}
        self._unfinished: set[int] = set()
        self._end = 0
        self._file: BinaryIO = (folder.folder / ASKED).open("a+b")
        self._keep_what_is_sound(folder.manifest.began, retry_failed)

    def _keep_what_is_sound(self, began: datetime, retry_failed: bool) -> None:
        """Read the lines. Remove all lines from the first that is damaged, of a changed file, or failed and to be retried."""
        self._file.seek(0)
        for line in self._file:
            body = checked(line)
            read = None if body is None else _AskedLine.read(body)
            if read is None or (retry_failed and read.failed) or (read.digest and has_changed(read.path, read.digest, began)):
                break
            self._note(read.number, read, len(line))
        self._file.truncate(self._end)

    def _note(self, number: int, prediction: Prediction | Line, length: int) -> None:
        verdict, cost = prediction.verdict, prediction.cost
        if verdict is not None and verdict.label is not None:
            self.answers[number] = self.labels.columns[verdict.label]
        elif verdict is not None and verdict.outcome == "none":
            self.answers[number] = NONE_CHOSEN
        self.asked += 1
        self.dollars += cost.dollars + cost.saved_dollars
        self._begins[number] = self._end
        self._end += length

    def has(self, numbers: NDArray[np.intp]) -> NDArray[np.bool_]:
        """`(n,)` booleans: the image has a line."""
        return self._begins[numbers] >= 0

    def ready(self, stage: int, judge: Judge) -> None:
        self.folder.ready(stage, judge)

    def scored(self, numbers: Sequence[int], images: Sequence[Prepared], scores: Scores) -> None:
        for number, image in zip(numbers, images, strict=True):
            self._digests[number] = {digest_key(isinstance(image.source, str | Path)): image.digest}

    def judged(self, number: int, stage: int, question: Question, verdict: Verdict) -> None:
        """Note an image whose question was skipped, also if it is a further question after "none of these"."""
        if verdict.outcome == "skipped":
            self._unfinished.add(number)

    def predicted(self, number: int, prediction: Prediction) -> None:
        """Write the line of an image, unless a question about it was skipped. A later session with more budget asks again."""
        digest, own = self._digests.pop(number), int(self.numbers[number])
        if not prediction.asked or number in self._unfinished:
            self.skipped += 1
            return
        line = line_of(prediction, {"number": own, **digest})
        with writing_to(self.folder.folder):
            self._file.write(line)
            self._file.flush()
        self._note(own, prediction, len(line))

    def content(self, number: int) -> dict[str, JsonValue]:
        """The fields of the line of an image, for its line in ``predictions.jsonl``."""
        self._file.seek(self._begins[number])
        content: dict[str, JsonValue] = json.loads(self._file.readline())
        return {name: value for name, value in content.items() if name not in ("number", "crc32")}

    def sync(self) -> None:
        """Flush the lines to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

"""``recorded:FOLDER``: a scorer and a judge that repeat the scores and verdicts of a record.

``cascadevlm evaluate -o FOLDER`` makes a record. If its cascade had several stages, ``recorded:FOLDER#2`` is the judge of the
second stage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import JsonValue

from cascadevlm.base.errors import BackendError, BudgetExhausted, FatalError, PermanentError
from cascadevlm.base.images import pixel_digest
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Question, Scores, Verdict
from cascadevlm.evaluation.record import Record, read_record, read_verdicts
from cascadevlm.judges.base import Judge
from cascadevlm.judges.cache import key_of
from cascadevlm.runs.lines import Asked
from cascadevlm.scorers.base import Scorer

MOST_MISSING = 8
"""A replay stops if the number of questions without an answer exceeds the number of answered questions by this number. The
record then belongs to other questions.
"""


class RecordedScorer(Scorer):
    """Replays the scores of a record, with their embeddings if the record has them.

    Raises:
        BackendError: during scoring, if the record has no scores of an image for this label set, or has scores for other texts
            of the labels.
        DataError: during scoring, if the folder does not contain a complete record.
    """

    def __init__(self, model: str) -> None:
        self.path = Path(model)

    def score(self, images: Sequence[Image.Image], labels: LabelSet) -> Scores:
        if not images:
            return Scores(log_probs=np.empty((0, len(labels)), np.float32), labels=labels, fingerprint="")
        rows = [self._row(pixel_digest(image), labels) for image in images]
        scores = self._record.scores.rows(np.array(rows, dtype=np.intp))
        if "|texts=" in scores.fingerprint and labels.texts_part not in scores.fingerprint.split("|"):
            raise BackendError(
                f"Record {str(self.path)!r} has scores of these labels with other texts.",
                hint="Use the labels with the texts of the record.",
            )
        return replace(scores, labels=labels)

    def _row(self, digest: str, labels: LabelSet) -> int:
        if labels.names != self._record.labels.names or digest not in self._rows:
            raise BackendError(
                f"Record {str(self.path)!r} has no scores of an image ({digest[:12]}…) for these {len(labels)} labels.",
                hint="Use the images and labels of the record, in the same order.",
            )
        return self._rows[digest]

    @cached_property
    def _record(self) -> Record:
        return read_record(self.path)

    @cached_property
    def _rows(self) -> Mapping[str, int]:
        """The row of each image that could be read."""
        return {digest: row for row, digest in enumerate(self._record.digests) if self._record.readable[row]}


class RecordedJudge(Judge):
    """Replays the verdicts of a record, at no cost. If a question was recorded with another order of the candidates, it gets
    the recorded verdict. If a question was not recorded, it fails. If a question failed or was skipped in the run, it fails or
    is skipped again.

    Raises:
        BackendError: at the first question, if the record has several stages and the spec does not name one of them.
        DataError: at the first question, if the folder does not contain a complete record.
        FatalError: at a question, if most questions were not recorded.
    """

    replays = True
    concurrency = 256

    def __init__(self, model: str) -> None:
        self.spec = f"recorded:{model}"
        self.model = model
        self._found = self._missing = 0

    async def judge(self, question: Question) -> Verdict:
        asked = Asked.of(question)
        said = None
        if not question.rejected and not question.sample:  # a record contains only first questions
            image = question.image_digest
            said = self._verdicts.get(_key(image, asked)) or self._in_any_order.get(_key(image, _in_one_order(asked)))
        if said is None:
            self._missing += 1
            if self._missing - self._found >= MOST_MISSING:
                raise FatalError(
                    f"Record {self.model!r} has no answer to {self._missing} of {self._missing + self._found} questions.",
                    hint="Use the images, labels, prompt and number of candidates of the record.",
                )
            raise PermanentError(f"Record {self.model!r} has no answer to this question.", hint="Use the settings of the record.")
        self._found += 1
        if said.outcome == "failed":
            raise PermanentError(said.error)
        if said.outcome == "skipped":
            raise BudgetExhausted(said.error)
        usage = said.usage
        if not usage.dollars:
            return said
        return replace(said, usage=replace(usage, dollars=0.0, saved_dollars=usage.dollars + usage.saved_dollars))

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
        return {_key(image, asked): verdict for image, asked, verdict in self._recorded}

    @cached_property
    def _in_any_order(self) -> dict[str, Verdict]:
        return {_key(image, _in_one_order(asked)): verdict for image, asked, verdict in self._recorded}

    @cached_property
    def _recorded(self) -> list[tuple[str, Asked, Verdict]]:
        """The answers of the stage that the spec names."""
        folder, _, number = self.model.rpartition("#")
        named = number.isdecimal() and Path(folder).is_dir()
        folder = folder if named else self.model
        stages = read_verdicts(folder)
        stage = int(number) if named else 1 if len(stages) == 1 else 0
        if not 1 <= stage <= len(stages):
            hint = (
                f"Name one of them: recorded:{folder}#1 is the judge of the first stage."
                if stages
                else "Use a record of a cascade with a judge."
            )
            raise BackendError(f"Record {folder!r} has {len(stages)} stages.", hint=hint)
        return stages[stage - 1]


def _key(image: str, asked: Asked) -> str:
    return key_of({"image": image, **vars(asked)})


def _in_one_order(asked: Asked) -> Asked:
    """A key of the question that does not depend on the order of its candidates."""
    return replace(asked, candidates=sorted(asked.candidates))

"""Images with a judge's answers and without labels, beside the labelled images of a record."""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cascadevlm.base.arrays import NOBODY
from cascadevlm.base.errors import DataError
from cascadevlm.base.types import Scores
from cascadevlm.decision.calibration import SETTINGS
from cascadevlm.decision.few_labels import FewLabels, fit_few_labels, fit_judge_beside
from cascadevlm.decision.judge_model import Answers, JudgeModel
from cascadevlm.decision.scorer_calibration import Floats
from cascadevlm.decision.teaching import Labelled
from cascadevlm.evaluation.adapting_to_runs import Said
from cascadevlm.evaluation.deciding import answers_of, settings_of
from cascadevlm.evaluation.record import Record

Number = TypeVar("Number", bound=np.generic)

HINT = "Give a run with the scorer, labels, judge and prompt of the record."


@dataclass(frozen=True, kw_only=True)
class Unlabelled:
    """M images that a judge answered.

    Attributes:
        scores: ``(M, C)``, of the scorer without a calibration.
        answers: of the M images.
    """

    scores: Scores
    answers: Answers

    @classmethod
    def of(cls, record: Record, scores: Scores, said: Said) -> "Unlabelled":
        """The images of a run that its judge answered.

        Args:
            record: the labelled images that they stand beside.
            scores: of all images of the run that could be read.
            said: what the judge said about these images.

        Raises:
            DataError: if the record has several stages; if the run has another scorer, label set, judge, prompt or other settings
                that change answers; if the judge answered none of its images.
        """
        if len(record.stages) != 1:
            raise DataError(f"A run can stand beside a record with one stage; this record has {len(record.stages)}.")
        given = said.config.stage[0].model_dump(mode="json") if said.config.stage else {}
        for name, value in settings_of(record, 0, SETTINGS).items():
            if given.get(name) != value:
                told = f"The record was made with {name} = {value!r}, and the run with {given.get(name)!r}."
                raise DataError(told, hint=HINT)
        if scores.labels.names != record.labels.names or scores.fingerprint != record.scores.fingerprint:
            raise DataError("The run has another scorer or other labels than the record.", hint=HINT)
        if not said.heard.any():
            raise DataError("The judge of the run answered none of its images.", hint=HINT)
        return cls(scores=scores.rows(said.heard), answers=said.answers.rows(said.heard))

    def fit_with(self, record: Record, prior: Floats | None) -> FewLabels:
        """The calibration of the scorer and the model of the judge, fitted to the images of the record and these images.

        Args:
            record: n images that the judge answered; they come first in the result.
            prior: ``(C,)`` class shares that the calibration may be matched to. Default: equal shares.
        """
        log_probs = np.concatenate([record.scores.log_probs, self.scores.log_probs])
        truths = np.concatenate([record.truths, np.full(len(self.scores), NOBODY)])
        return fit_few_labels(log_probs, truths, self._joined(record), prior=prior)

    def fit_judge_with(self, record: Record, before: Floats, support: Labelled) -> tuple[JudgeModel, Floats]:
        """The model of the judge, if the labelled images teach; and ``(n, C)`` log-probabilities after the answers.

        Args:
            record: n images that the judge answered.
            before: ``(n, C)`` held-out log-probabilities of these images.
            support: the labelled images that teach.
        """
        assert self.scores.embeddings is not None
        unlabelled = support.taught(support.nothing())(self.scores.log_probs, self.scores.embeddings)
        return fit_judge_beside(before, np.eye(len(record.labels))[record.truths], unlabelled, self._joined(record))

    def _joined(self, record: Record) -> Answers:
        """The answers about the images of the record, and then about these images."""
        parts = [answers_of(record.judged), self.answers]
        longest = max(part.candidates.shape[1] for part in parts)
        return Answers(
            candidates=np.concatenate([_widened(part.candidates, longest, NOBODY) for part in parts]),
            answers=np.concatenate([part.answers for part in parts]),
            none_offered=parts[0].none_offered,
            probabilities=np.concatenate([_widened(_probabilities(part), longest, np.nan) for part in parts]),
        )


def _probabilities(answers: Answers) -> Floats:
    return np.full(answers.candidates.shape, np.nan) if answers.probabilities is None else answers.probabilities


def _widened(rows: NDArray[Number], width: int, value: float) -> NDArray[Number]:
    return np.pad(rows, ((0, 0), (0, width - rows.shape[1])), constant_values=value)

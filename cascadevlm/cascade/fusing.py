"""The decision layer in a running cascade: calibrated scores, the gain from a question, and the fusion of both opinions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cascadevlm.base.arrays import NOBODY
from cascadevlm.base.types import Candidate, Scores, Verdict
from cascadevlm.cascade.candidates import CandidateRule
from cascadevlm.decision.calibration import Calibration
from cascadevlm.decision.judge_model import NONE_CHOSEN, Answers, JudgeModel
from cascadevlm.scorers.base import Scorer, WrapperScorer


class CalibratedScorer(WrapperScorer):
    """A scorer whose probabilities are calibrated.

    Args:
        wrapped: the scorer.
        calibration: a calibration of this scorer.

    Raises:
        ConfigError: while scoring, if the calibration was made with another scorer or label set.
    """

    def __init__(self, wrapped: Scorer, calibration: Calibration) -> None:
        super().__init__(wrapped)
        self.calibration = calibration

    def altered(self, scores: Scores) -> Scores:
        return self.calibration.calibrated(scores)


@dataclass(frozen=True, kw_only=True)
class Asking:
    """The expected gain from a question to the judge of a stage, and the effect of the answer.

    Attributes:
        model: the model of the judge.
        word_final: true if the judge's answer is the final label.
        candidates: the rule for the candidates that the judge sees.
        none_offered: true if "none of these" is one of the options.
    """

    model: JudgeModel
    candidates: CandidateRule
    none_offered: bool
    word_final: bool

    def gain(self, scores: Scores) -> NDArray[np.floating]:
        """``(N,)`` expected increases of the probability that the final label is right, if the judge is asked. A gain is
        negative if the judge's answer is the final label and the scorer knows better.
        """
        columns = self.candidates.columns(scores)
        if self.candidates.order == "reversed":
            columns = columns[:, ::-1]
        return self.model.gain(
            scores.log_probs.astype(np.float64), columns, none_offered=self.none_offered, word_final=self.word_final
        )

    def fuse(self, scores: Scores, shown: Sequence[Candidate], verdict: Verdict) -> Scores:
        """`(1, C)` scores after a verdict.

        Args:
            scores: `(1, C)` scores before the verdict.
            shown: the candidates of the question.
            verdict: the judge's verdict.
        """
        column = scores.labels.columns
        said = NONE_CHOSEN if verdict.outcome == "none" else NOBODY if verdict.label is None else column[verdict.label]
        opinion = verdict.probabilities
        answers = Answers(
            candidates=np.array([[column[candidate.label.name] for candidate in shown]]),
            answers=np.array([said]),
            none_offered=self.none_offered,
            probabilities=None if opinion is None else np.array([[opinion.get(each.label.name, 0.0) for each in shown]]),
        )
        after = self.model.posterior(scores.log_probs.astype(np.float64), answers)
        return replace(scores, log_probs=after.astype(np.float32))

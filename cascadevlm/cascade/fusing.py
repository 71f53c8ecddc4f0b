"""The decision layer in a running cascade: calibrated scores, the gain from asking, and both opinions fused."""

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
    """Scores as another scorer does, with calibrated probabilities.

    Raises:
        ConfigError: when scoring, if the calibration is of another scorer or label set.
    """

    def __init__(self, wrapped: Scorer, calibration: Calibration) -> None:
        super().__init__(wrapped)
        self.calibration = calibration

    def altered(self, scores: Scores) -> Scores:
        return self.calibration.calibrated(scores)


@dataclass(frozen=True, kw_only=True)
class Asking:
    """What asking one stage's judge is worth, and what its answer means.

    Attributes:
        model: of the judge.
        word_final: whether its answer is final.
        candidates: what it is shown.
        none_offered: whether "none of these" is one of the options.
    """

    model: JudgeModel
    candidates: CandidateRule
    none_offered: bool
    word_final: bool

    def gain(self, scores: Scores) -> NDArray[np.floating]:
        """N: how much more likely the final label is to be right, in expectation, once the judge has answered; less than 0 where
        its word is final and the scorer knows better."""
        columns = self.candidates.columns(scores)
        if self.candidates.order == "reversed":
            columns = columns[:, ::-1]
        return self.model.gain(
            scores.log_probs.astype(np.float64), columns, none_offered=self.none_offered, word_final=self.word_final
        )

    def fuse(self, scores: Scores, shown: Sequence[Candidate], verdict: Verdict) -> Scores:
        """1 x C: what to believe after a verdict, from what was believed before."""
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

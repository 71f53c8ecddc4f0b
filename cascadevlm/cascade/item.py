"""An image on its way through the stages: what is believed of it, what it was shown with, what judges said, what is concluded."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from scipy.special import log_softmax

from cascadevlm.base.errors import JudgeError
from cascadevlm.base.labels import Label
from cascadevlm.base.types import Candidate, DecidedBy, Prediction, Scores, Verdict
from cascadevlm.cascade.candidates import CandidateRule, as_scored
from cascadevlm.cascade.stage import Stage
from cascadevlm.scorers.base import Prepared

OnFailure = Literal["scorer", "raise", "abstain"]
"""What a prediction is where no judge asked gave an answer: the scorer's label, an error, or no label."""


@dataclass(eq=False)
class Item:
    """One image under way.

    Attributes:
        scores: the scorer's, 1 x C.
        belief: 1 x C, what candidates are chosen by: the scores, less what judges rejected, or fused with what they said.
        fused: whether the belief is what the last judge that was heard said, too.
    """

    path: str
    prepared: Prepared
    scores: Scores
    belief: Scores
    fused: bool = False
    candidates: tuple[Candidate, ...] = ()
    reasons: list[str] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    def current_scores(self) -> Scores:
        """1 x C: the last judge's opinion if it gave one that stands alone, else the belief."""
        verdict = self.verdicts[-1] if self.verdicts else None
        if self.fused or verdict is None or verdict.label is None:
            return self.belief
        opinion = verdict.probabilities or {verdict.label: 1.0}
        probabilities = np.array([[opinion.get(name, 0.0) for name in self.scores.labels.names]])
        with np.errstate(divide="ignore"):
            return replace(self.scores, log_probs=np.log(probabilities).astype(np.float32))

    def hear(self, stage: Stage, verdict: Verdict) -> None:
        """Learn from what a judge said of the candidates; errors and spent budgets say nothing."""
        if verdict.outcome in ("failed", "skipped"):
            return
        if stage.fusion != "judge" and stage.asking is not None:
            self.belief, self.fused = stage.asking.fuse(self.belief, self.candidates, verdict), True
        elif verdict.label is not None:
            self.fused = False
        elif verdict.outcome == "none":
            self.belief = _without(self.belief, {candidate.label.name for candidate in self.candidates})

    def widen(self, rule: CandidateRule, seen: Collection[Label]) -> bool:
        """Show further candidates; whether there are any that were not seen."""
        shown = self.candidates
        rank(rule, [self])
        if all(candidate.label in seen for candidate in self.candidates):
            self.candidates = shown
            return False
        return True

    def concluded(self, on_failure: OnFailure, accept: float) -> Prediction:
        """What is to be said of the image after the verdicts, of which the last answer counts.

        Raises:
            JudgeError: if there is none, and ``on_failure`` is "raise".
        """
        answered = next((verdict for verdict in reversed(self.verdicts) if verdict.label is not None), None)
        asked = [verdict for verdict in self.verdicts if verdict.outcome != "skipped"]
        label, probability, decided_by = self._opinion(answered)
        prediction = Prediction(
            path=self.path,
            label=label,
            probability=probability,
            decided_by=decided_by,
            candidates=self.candidates,
            reasons=tuple(self.reasons),
            verdicts=tuple(self.verdicts),
        )
        if answered is None and asked:
            chose_none = any(verdict.valid for verdict in asked)
            why = "The judge chose none of the candidates." if chose_none else asked[-1].error
            if on_failure == "abstain":
                prediction = _abstained(prediction, why)
            elif on_failure == "raise" and not chose_none:
                raise JudgeError(f"{asked[-1].judge} on {self.path or 'an image'}: {why}")
        if prediction.probability is not None and prediction.probability < accept:
            why = f"{prediction.label!r} has a probability of {prediction.probability:.2f}, below {accept:g}."
            prediction = _abstained(prediction, why)
        return prediction

    def _opinion(self, answered: Verdict | None) -> tuple[str | None, float | None, DecidedBy]:
        """The label, its probability and whose opinion that is; ``answered`` is the last verdict that names one."""
        if answered is not None and not self.fused:
            probabilities = answered.probabilities or {}
            return answered.label, probabilities.get(answered.label or ""), "judge"
        decisive = self.belief if self.fused else self.scores
        best = int(decisive.log_probs[0].argmax())
        return decisive.labels[best].name, float(decisive.probabilities[0, best]), "fusion" if self.fused else "scorer"


def _abstained(prediction: Prediction, why: str) -> Prediction:
    return replace(prediction, label=None, probability=None, decided_by=None, error=why)


def stacked(rows: Sequence[Scores]) -> Scores:
    """N x C, of N images' 1 x C."""
    return Scores.joined(rows)


def believed_candidates(rule: CandidateRule, items: Sequence[Item]) -> list[tuple[Candidate, ...]]:
    """Each image's, by what is believed now."""
    return rule.choose(stacked([item.belief for item in items]))


def rank(rule: CandidateRule, items: Sequence[Item]) -> None:
    """Give each image its candidates by what is believed now, without those that judges rejected; their probabilities and ranks
    are the scorer's."""
    if not items:
        return
    for item, candidates in zip(items, believed_candidates(rule, items), strict=True):
        if item.belief is not item.scores:
            candidates = tuple(as_scored(item.scores, candidate) for candidate in candidates if candidate.probability > 0)
        item.candidates = candidates


def _without(scores: Scores, rejected: Collection[str]) -> Scores:
    """1 x C, some labels impossible; unchanged, where there would be none left."""
    impossible = np.isin(scores.labels.names, list(rejected)) | (scores.probabilities[0] == 0)
    if impossible.all():
        return scores
    log_probs = log_softmax(np.where(impossible, -np.inf, scores.log_probs.astype(np.float64)), axis=1)
    return replace(scores, log_probs=log_probs.astype(np.float32))

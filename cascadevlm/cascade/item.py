"""One image on its way through the stages: its current scores, its candidates, the verdicts, and the prediction."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from cascadevlm.base.errors import JudgeError
from cascadevlm.base.labels import Label
from cascadevlm.base.types import Candidate, DecidedBy, Prediction, Scores, Verdict
from cascadevlm.cascade.candidates import CandidateRule, as_scored
from cascadevlm.cascade.stage import Stage
from cascadevlm.scorers.base import Prepared

OnFailure = Literal["scorer", "raise", "abstain"]
"""How an image is predicted if judges were asked and gave no answer: with the scorer's label, with an error, or without a
label.
"""


@dataclass(eq=False, kw_only=True)
class Item:
    """One image on its way through the stages.

    Attributes:
        number: position of the image in the input, from 0.
        chunk: `(N, C)` the scorer's scores of all images that were scored together.
        row: the row of this image in the chunk.
        own: `(1, C)` scores after a judge changed them: without the labels that judges rejected, or fused with the judges'
            answers. None until a judge changes the scorer's scores.
        fused: true if ``own`` includes the answer of the last judge.
    """

    number: int
    path: str
    prepared: Prepared
    chunk: Scores
    row: int
    own: Scores | None = None
    fused: bool = False
    candidates: tuple[Candidate, ...] = ()
    reasons: list[str] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    @cached_property
    def scores(self) -> Scores:
        """`(1, C)` the scorer's scores."""
        return self.chunk.rows(slice(self.row, self.row + 1))

    @property
    def belief(self) -> Scores:
        """`(1, C)` the scores by which candidates are chosen."""
        return self.scores if self.own is None else self.own

    def opinion(self) -> Scores | None:
        """`(1, C)` the last judge's answer if this answer is the final label; in all other cases ``own``."""
        verdict = self.verdicts[-1] if self.verdicts else None
        if self.fused or verdict is None or verdict.label is None:
            return self.own
        opinion = verdict.probabilities or {verdict.label: 1.0}
        probabilities = np.array([[opinion.get(name, 0.0) for name in self.chunk.labels.names]])
        with np.errstate(divide="ignore"):
            return replace(self.scores, log_probs=np.log(probabilities).astype(np.float32))

    def probabilities(self) -> NDArray[np.float32]:
        """`(C,)` the probabilities that the policy of the next stage sees."""
        opinion = self.opinion()
        row: NDArray[np.float32] = self.chunk.probabilities[self.row] if opinion is None else opinion.probabilities[0]
        return row

    def hear(self, stage: Stage, verdict: Verdict) -> None:
        """Update the scores with a judge's verdict on the candidates. Errors and a used-up budget change nothing."""
        if verdict.outcome in ("failed", "skipped"):
            return
        if stage.fusion != "judge" and stage.asking is not None:
            self.own, self.fused = stage.asking.fuse(self.belief, self.candidates, verdict), True
        elif verdict.label is not None:
            self.fused = False
        elif verdict.outcome == "none":
            self._reject({candidate.label.name for candidate in self.candidates})

    def _reject(self, names: Collection[str]) -> None:
        """Set the probability of labels to 0, unless no label would be left."""
        scores = self.belief
        impossible = np.isin(scores.labels.names, list(names)) | (scores.probabilities[0] == 0)
        if not impossible.all():
            log_probs = log_softmax(np.where(impossible, -np.inf, scores.log_probs.astype(np.float64)), axis=1)
            self.own = replace(scores, log_probs=log_probs.astype(np.float32))

    def widen(self, rule: CandidateRule, seen: Collection[Label]) -> bool:
        """Choose the next candidates. If the judge has seen all of them before, return False and change nothing."""
        shown = self.candidates
        rank(rule, [self])
        if all(candidate.label in seen for candidate in self.candidates):
            self.candidates = shown
            return False
        return True

    def concluded(self, on_failure: OnFailure, accept: float) -> Prediction:
        """The prediction after all verdicts. The last answer counts.

        Args:
            on_failure: how the label is chosen if there is no answer.
            accept: minimum probability of a predicted label.

        Raises:
            JudgeError: if there is no answer and ``on_failure`` is "raise".
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
        """The label, its probability, and the part that decided. ``answered`` is the last verdict with a label."""
        if answered is not None and not self.fused:
            probabilities = answered.probabilities or {}
            return answered.label, probabilities.get(answered.label or ""), "judge"
        decisive, row = (self.chunk, self.row) if self.own is None or not self.fused else (self.own, 0)
        best = int(decisive.log_probs[row].argmax())
        return decisive.labels[best].name, float(decisive.probabilities[row, best]), "fusion" if self.fused else "scorer"


def _abstained(prediction: Prediction, why: str) -> Prediction:
    return replace(prediction, label=None, probability=None, decided_by=None, error=why)


def believed(items: Sequence[Item]) -> Scores:
    """`(n, C)` current scores of n images of one chunk, in the order of the chunk."""
    return _with_changes(items, [item.own for item in items])


def current(items: Sequence[Item]) -> Scores:
    """`(n, C)` scores that the policy of the next stage sees, of n images of one chunk, in the order of the chunk."""
    return _with_changes(items, [item.opinion() for item in items])


def _with_changes(items: Sequence[Item], changed: Sequence[Scores | None]) -> Scores:
    """`(n, C)` the scores of n images. A `(1, C)` row replaces the scores of each image that changed."""
    chunk = items[0].chunk
    scores = chunk if len(items) == len(chunk) else chunk.rows(np.array([item.row for item in items]))
    if all(row is None for row in changed):
        return scores
    log_probs = scores.log_probs.copy()
    for place, row in enumerate(changed):
        if row is not None:
            log_probs[place] = row.log_probs[0]
    return replace(scores, log_probs=log_probs)


def rank(rule: CandidateRule, items: Sequence[Item]) -> None:
    """Give each image its candidates by its current scores, without the labels that judges rejected. The probabilities and
    ranks of the candidates come from the scorer.
    """
    if not items:
        return
    for item, candidates in zip(items, rule.choose(believed(items)), strict=True):
        if item.own is not None:
            candidates = tuple(as_scored(item.scores, candidate) for candidate in candidates if candidate.probability > 0)
        item.candidates = candidates

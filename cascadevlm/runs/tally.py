"""The counts of a run."""

from collections import Counter
from dataclasses import dataclass, field

from pydantic import JsonValue

from cascadevlm.base.types import PROMISE_BROKEN, Prediction
from cascadevlm.runs.audit import AuditFigures
from cascadevlm.runs.certificate import Statement
from cascadevlm.runs.lines import Line, failure_of


@dataclass(kw_only=True)
class Tally:
    """Counts of a run so far.

    Attributes:
        images: number of images that have a line in the predictions.
        counts: numbers of images by result: "kept" if no policy escalated the image, the outcome of the last verdict, or
            "unreadable".
        failures: number of images that could not be read or whose question got no answer.
        abstained: number of readable images without a label.
        asked: number of images that a judge was asked about. Answers from the cache are counted, too.
        answered: number of images for which a judge gave an answer.
        requests: number of requests to judges.
        saved_dollars: dollars that answers from the cache would have cost.
        spent_dollars: dollars in the ledger, over all sessions of the run.
        audited: number of images that the judge was asked about because of an audit.
        differing: number of these to which the judge did not give the scorer's label.
        escalated_by_audit: number of images that were escalated because the audit showed a broken promise.
        certificate: the certificate of the run, or what is missing for it; None if the run has no certificate.
        audit: what the audit found; None if the run has no audit, or is not complete.
    """

    images: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    failures: int = 0
    abstained: int = 0
    asked: int = 0
    answered: int = 0
    requests: int = 0
    saved_dollars: float = 0.0
    spent_dollars: float = 0.0
    audited: int = 0
    differing: int = 0
    escalated_by_audit: int = 0
    certificate: Statement | None = None
    audit: AuditFigures | None = None

    def to_dict(self) -> dict[str, JsonValue]:
        """The counts as JSON-serialisable data."""
        stated = {"certificate": self.certificate, "audit": self.audit}
        counts = {
            name: value
            for name, value in vars(self).items()
            if name not in (*stated, "audited", "differing", "escalated_by_audit")
        }
        told = {name: each.model_dump(mode="json") for name, each in stated.items() if each is not None}
        return counts | {"counts": dict(self.counts)} | told

    @property
    def in_vain(self) -> bool:
        """True if no image could be read, or no question got an answer."""
        return 0 < self.images == self.counts["unreadable"] or (self.asked > 0 and not self.answered)

    def add(self, prediction: Prediction | Line) -> None:
        """Count one more prediction."""
        verdict, cost = prediction.verdict, prediction.cost
        self.images += 1
        self.counts[verdict.outcome if verdict else "kept" if prediction.candidates else "unreadable"] += 1
        self.failures += bool(failure_of(prediction))
        self.abstained += bool(prediction.candidates) and prediction.label is None
        self.asked += prediction.asked
        self.answered += prediction.answered
        self.requests += cost.requests
        self.audited += prediction.audited and prediction.asked
        self.differing += prediction.differing
        self.escalated_by_audit += PROMISE_BROKEN in prediction.reasons and prediction.asked
        self.saved_dollars += cost.saved_dollars

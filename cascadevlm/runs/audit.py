"""What the audit of a run found."""

import math

from pydantic import BaseModel

from cascadevlm.config.audit import AuditConfig
from cascadevlm.decision.agreement import Promise
from cascadevlm.decision.auditing import Audit
from cascadevlm.runs.certificate import percent


class AuditFigures(BaseModel):
    """What the audit of a run found, as ``summary.json`` contains it.

    Attributes:
        share: share of the images that are drawn.
        drawn: number of drawn images.
        kept: number of these whose label was kept, so that the judge was asked about them.
        disagreements: number of these to which the judge did not give the kept label.
        least: at least this share of all labels are kept and not the judge's, with the given confidence at all times together.
            Audited images do not count, because the audit corrected their labels.
        confidence: see ``least``.
        agree: share of the labels that must be the judge's; None if no share is required.
    """

    share: float
    drawn: int
    kept: int
    disagreements: int
    least: float
    confidence: float
    agree: float | None

    @classmethod
    def of(cls, config: AuditConfig, *, images: int, kept: int, disagreements: int) -> "AuditFigures":
        """The figures after a number of images that could be read."""
        drawn = config.sampling.count(images)
        level = Promise(agreement=0.5, confidence=config.confidence).level
        lower = Audit(asked=drawn, disagreements=disagreements).lower(level)
        return cls(
            share=config.share,
            drawn=drawn,
            kept=kept,
            disagreements=disagreements,
            least=max(0.0, lower - disagreements / images) if images else 0.0,
            confidence=config.confidence,
            agree=config.agree,
        )

    @property
    def crossed(self) -> bool:
        """True if the audit shows that fewer labels are the judge's than must be."""
        return self.agree is not None and self.least > 1 - self.agree

    @property
    def sentence(self) -> str:
        """The figures in words."""
        found = (
            f"The audit asked about {self.kept:,} kept images; the judge did not give the kept label to "
            f"{self.disagreements:,} of them."
        )
        least = math.floor(1000 * self.least) / 10
        sure = f"With {percent(self.confidence)} % confidence, at least {least} % of all labels are not the judge's"
        if not self.crossed or self.agree is None:
            return f"{found} {sure}."
        wanted = f"at least {percent(self.agree)} % must be the judge's"
        return f"{found} {sure}, but {wanted}. Escalate more images, or certify a new run with --agree."

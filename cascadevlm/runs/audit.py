"""What the audit of a run found."""

import math

from pydantic import BaseModel

from cascadevlm.config.audit import AuditConfig
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
        escalated: number of images that the policy would have kept, and that were escalated because the promise was broken.
    """

    share: float
    drawn: int
    kept: int
    disagreements: int
    least: float
    confidence: float
    agree: float | None
    escalated: int

    @classmethod
    def of(cls, config: AuditConfig, *, images: int, kept: int, disagreements: int, escalated: int) -> "AuditFigures":
        """The figures after a number of images that could be read."""
        drawn = config.sampling.count(images)
        return cls(
            share=config.share,
            drawn=drawn,
            kept=kept,
            disagreements=disagreements,
            least=config.sampling.least(images, disagreements),
            confidence=config.confidence,
            agree=config.agree,
            escalated=escalated,
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
        if self.agree is None or not (self.crossed or self.escalated):
            return f"{found} {sure}."
        wanted = f"at least {percent(self.agree)} % must be the judge's"
        if self.escalated:
            return (
                f"{found} {sure}. The audit showed that the policy keeps too many: {wanted}. So the judge was asked about "
                f"{self.escalated:,} more images."
            )
        return f"{found} {sure}, but {wanted}. So the run will escalate all later images."

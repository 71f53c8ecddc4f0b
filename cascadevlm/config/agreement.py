"""``[agreement]``: a certificate of how many labels of a run are the judge's."""

from typing import Annotated

from pydantic import Field

from cascadevlm.base.errors import ConfigError
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.config.section import Section
from cascadevlm.decision.agreement import Promise
from cascadevlm.policies.base import as_policy
from cascadevlm.policies.rules import Always

Share = Annotated[float, Field(gt=0, lt=1)]


class AgreementConfig(Section):
    """``[agreement]``: a run certifies that at least a share of its labels are the judge's.

    Attributes:
        agree: the share, above 0 and below 1.
        confidence: least probability that the certificate is true, above 0 and below 1.
        seed: seed of all draws.
    """

    agree: Share
    confidence: Share = 0.95
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def promise(self) -> Promise:
        """What is certified."""
        return Promise(agreement=self.agree, confidence=self.confidence)


def require_certifiable(cascade: Cascade) -> None:
    """Refuse a cascade that cannot keep a promise of ``[agreement]`` or ``[find]``.

    Raises:
        ConfigError: if a setting changes which images are asked about, or lets another part than the judge decide.
    """
    if len(cascade.stages) != 1:
        raise ConfigError(
            f"[agreement] and [find] are about the answers of one judge, but the configuration has {len(cascade.stages)} stages.",
            hint="Use exactly one [[stage]], or promise nothing.",
        )
    (stage,) = cascade.stages
    if not isinstance(policy := as_policy(stage.policy), Always):
        raise ConfigError(
            f"With [agreement] or [find], the run itself selects the images to escalate, but the policy is '{policy}'.",
            hint="Remove the policy, or promise nothing.",
        )
    if stage.fusion != "judge":
        raise ConfigError(
            f"[agreement] and [find] need the judge's answer as the label, but fusion = {stage.fusion!r} can overrule the judge.",
            hint='Use fusion = "judge", or promise nothing.',
        )
    if cascade.accept > 0:
        raise ConfigError(
            f"With [agreement] or [find], every image has a label, but accept = {cascade.accept:g} removes labels.",
            hint="Use accept = 0, or promise nothing.",
        )
    if cascade.follow_shares:
        raise ConfigError(
            "With [agreement] or [find], no question may depend on other images, but follow_shares = true changes the "
            "candidates.",
            hint="Use follow_shares = false, or promise nothing.",
        )

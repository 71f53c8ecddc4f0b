"""``[audit]``: the judge is also asked about a share of the images whose label was kept without a question."""

from dataclasses import replace
from typing import Annotated, TypeVar

from pydantic import Field

from cascadevlm.base.errors import ConfigError
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.config.section import Section
from cascadevlm.decision.auditing import Sampling

AnyCascade = TypeVar("AnyCascade", bound=Cascade)


class AuditConfig(Section):
    """``[audit]``: one of each 1 / ``share`` images is drawn. If its label was kept, the judge is asked about it.

    Attributes:
        share: share of the images that are drawn.
        agree: least share of the labels of a run that must be the judge's. If the audit shows that fewer are, the run warns, and
            escalates every image from then on. Default: nothing is promised.
        confidence: least probability that a promise that is kept is never said to be broken.
        seed: seed of the draws.
    """

    share: Annotated[float, Field(gt=0, le=1)]
    agree: Annotated[float, Field(gt=0, lt=1)] | None = None
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def sampling(self) -> Sampling:
        """The images that are drawn."""
        return Sampling(**self.model_dump())

    def added_to(self, cascade: AnyCascade) -> AnyCascade:
        """A copy of the cascade with this audit.

        Raises:
            ConfigError: if the cascade does not have exactly one stage.
        """
        if len(cascade.stages) != 1:
            raise ConfigError(
                f"An audit is about the answers of one judge, but the configuration has {len(cascade.stages)} stages.",
                hint="Use exactly one [[stage]], or remove [audit].",
            )
        return cascade.altered(stages=[replace(cascade.stages[0], audit=self.sampling)])

"""``[find]``: a run finds nearly all images of one class."""

from typing import Annotated

from pydantic import Field

from cascadevlm.base.errors import ConfigError
from cascadevlm.base.labels import LabelSet
from cascadevlm.config.section import Section
from cascadevlm.decision.finding import Wanted

Share = Annotated[float, Field(gt=0, lt=1)]


class FindConfig(Section):
    """``[find]``: a run finds at least a share of the images that the judge would give a label to, at few questions.

    Attributes:
        label: name of the class.
        recall: least share of these images that is found, above 0 and below 1.
        precision: least share of these images among the found ones. Default: the judge is asked about every found image.
        confidence: least probability that the promises are kept.
        seed: seed of all draws.
    """

    label: str
    recall: Share
    precision: Share | None = None
    confidence: Share = 0.95
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def wanted(self) -> Wanted:
        """What is promised."""
        return Wanted(recall=self.recall, precision=self.precision, confidence=self.confidence)

    def column(self, labels: LabelSet) -> int:
        """The column of the class.

        Raises:
            ConfigError: if there is no such label, or no other one.
        """
        if self.label not in labels.columns:
            raise ConfigError(f"find.label: {self.label!r} is not a label.", hint="Use the exact name of a label.")
        if len(labels) < 2:
            raise ConfigError(f"find.label: {self.label!r} is the only label.", hint="Add a label for all other images.")
        return labels.columns[self.label]

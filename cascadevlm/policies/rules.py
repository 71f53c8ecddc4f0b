"""Rules: policies that look at each image, whatever was spent."""

import math
from dataclasses import dataclass, field

import numpy as np

from cascadevlm.base.errors import PolicyError
from cascadevlm.base.types import Scores
from cascadevlm.policies import measures
from cascadevlm.policies.base import START, Policy, Priority, Selection, Spending, number, require_whole, uncalibrated
from cascadevlm.policies.measures import EntropyUnit, Measure, Values


@dataclass(frozen=True)
class Always(Policy):
    """Ask about every image."""

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        return np.ones(len(scores), dtype=bool)

    def __str__(self) -> str:
        return "always"


@dataclass(frozen=True)
class Never(Policy):
    """Ask about none."""

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        return np.zeros(len(scores), dtype=bool)

    def __str__(self) -> str:
        return "never"


@dataclass(frozen=True)
class Random(Policy):
    """Ask about each image with probability ``rate``; the same images for a seed however they are batched."""

    rate: float
    seed: int = 0

    def __post_init__(self) -> None:
        _require_share("random", self.rate)
        require_whole("The seed of random", self.seed)

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        bits = np.random.PCG64(int(self.seed)).advance(spending.images)  # one draw an image, wherever its batch begins
        return np.random.Generator(bits).random(len(scores)) < self.rate

    def __str__(self) -> str:
        return f"random({number(self.rate)}, {int(self.seed)})"


@dataclass(frozen=True)
class EntropyAbove(Policy):
    """CascadeVLM's gate: ask where the entropy is above a threshold, from 0 to 1 or, with ``unit="nats"``, to log C."""

    comparison = ">"
    threshold: float
    unit: EntropyUnit = "normalized"

    def __post_init__(self) -> None:
        if self.unit == "nats":
            _require_from_0("entropy", self.threshold)
        else:
            hint = f'In nats: "entropy > {number(self.threshold)} nats".' if self.threshold > 1 else ""
            _require_share("entropy", self.threshold, hint=hint)

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        return measures.entropy(scores, self.unit) > self.threshold

    def priority(self, scores: Scores, spending: Spending = START) -> Priority:
        return Priority(values=measures.entropy(scores))

    def reasons(self, scores: Scores, spending: Spending = START) -> list[str]:
        return _reasons("entropy", measures.entropy(scores, self.unit), self)

    def __str__(self) -> str:
        return f"entropy > {number(self.threshold)}" + " nats" * (self.unit == "nats")


@dataclass(frozen=True)
class MarginBelow(Policy):
    """Ask where the two best labels are closer in probability than a threshold from 0 to 1."""

    comparison = "<"
    threshold: float

    def __post_init__(self) -> None:
        _require_share("margin", self.threshold)

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        return measures.margin(scores) < self.threshold

    def priority(self, scores: Scores, spending: Spending = START) -> Priority:
        return Priority(values=-measures.margin(scores))

    def reasons(self, scores: Scores, spending: Spending = START) -> list[str]:
        return _reasons("margin", measures.margin(scores), self)

    def __str__(self) -> str:
        return f"margin < {number(self.threshold)}"


@dataclass(frozen=True)
class TopProbabilityBelow(Policy):
    """Ask where the best label is less probable than a threshold from 0 to 1."""

    comparison = "<"
    threshold: float

    def __post_init__(self) -> None:
        _require_share("top_probability", self.threshold)

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        return measures.top_probability(scores) < self.threshold

    def priority(self, scores: Scores, spending: Spending = START) -> Priority:
        return Priority(values=-measures.top_probability(scores))

    def reasons(self, scores: Scores, spending: Spending = START) -> list[str]:
        return _reasons("top_probability", measures.top_probability(scores), self)

    def __str__(self) -> str:
        return f"top_probability < {number(self.threshold)}"


@dataclass(frozen=True)
class GainAbove(Policy):
    """Ask where the expected gain in accuracy is above a threshold from -1 (certain loss, by a judge whose word is final) to 1:
    `cascadevlm.decision.JudgeModel.gain`.

    Raises:
        PolicyError: when deciding, if the stage has no model of its judge.
    """

    comparison = ">"
    by_gain = True
    threshold: float

    def __post_init__(self) -> None:
        if not -1 <= self.threshold <= 1:
            raise PolicyError(f"gain takes a number from -1 to 1, not {self.threshold!r}.")

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        return self.surplus(spending) > 0

    def surplus(self, spending: Spending) -> Values:
        """(N,) how far the expected gain is above what the policy wants. Where several judges can be chosen, an image goes to the
        judge with the largest surplus."""
        return self.expected(spending) - self.threshold

    def priority(self, scores: Scores, spending: Spending = START) -> Priority:
        return Priority(values=self.expected(spending), is_gain=True)

    def expected(self, spending: Spending) -> Values:
        """(N,) the expected gain.

        Raises:
            PolicyError: if it is not known.
        """
        if spending.gain is None:
            raise uncalibrated(self)
        return np.array(spending.gain)

    def reasons(self, scores: Scores, spending: Spending = START) -> list[str]:
        return _reasons("gain", self.expected(spending), self)

    def __str__(self) -> str:
        return f"gain > {number(self.threshold)}"


@dataclass(frozen=True)
class GainPerDollarAbove(GainAbove):
    """Ask where the expected gain in accuracy is worth its price: above a threshold of expected right answers per dollar. Where
    asking costs nothing, wherever there is a gain."""

    by_price = True

    def __post_init__(self) -> None:
        _require_from_0("gain_per_dollar", self.threshold)

    def surplus(self, spending: Spending) -> Values:
        return self.expected(spending) - self.threshold * np.array(spending.prices or 0.0)

    def __str__(self) -> str:
        return f"gain_per_dollar > {number(self.threshold)}"


@dataclass(frozen=True)
class TopFraction(Policy):
    """Ask about the least certain ``fraction`` of every batch, rounded to the nearest whole image, by entropy or another measure
    that grows with doubt. It depends on the batches: a stream is cut into them as it comes."""

    fraction: float
    measure: Measure = field(default=measures.entropy, kw_only=True)

    def __post_init__(self) -> None:
        _require_share("top_fraction", self.fraction)
        if not callable(self.measure):
            raise PolicyError(f"The measure of top_fraction is a function of scores, not {self.measure!r}.")

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        selected = np.zeros(len(scores), dtype=bool)
        selected[np.argsort(-self.measure(scores), kind="stable")[: round(self.fraction * len(scores))]] = True
        return selected

    def priority(self, scores: Scores, spending: Spending = START) -> Priority:
        return Priority(values=self.measure(scores))

    def __str__(self) -> str:
        return f"top_fraction({number(self.fraction)})"


def _reasons(measure: str, values: Values, policy: Policy) -> list[str]:
    return [f"{measure} {value:z.2f} (asks for {policy})" for value in values]


def _require_share(name: str, value: float, hint: str = "") -> None:
    if not 0 <= value <= 1:
        raise PolicyError(f"{name} takes a number from 0 to 1, not {value!r}.", hint=hint)


def _require_from_0(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise PolicyError(f"{name} takes a number from 0 on, not {value!r}.")

"""Rules: policies that decide about images by their scores, without a limit."""

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
    """Escalates every image."""

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        return np.ones(len(scores), dtype=bool)

    def __str__(self) -> str:
        return "always"


@dataclass(frozen=True)
class Never(Policy):
    """Escalates no image."""

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        return np.zeros(len(scores), dtype=bool)

    def __str__(self) -> str:
        return "never"


@dataclass(frozen=True)
class Random(Policy):
    """Escalates each image with probability ``rate``. The selection depends on the seed, but not on the batches."""

    rate: float
    seed: int = 0

    def __post_init__(self) -> None:
        _require_share("random", self.rate)
        require_whole("The seed of random", self.seed)

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        bits = np.random.PCG64(int(self.seed)).advance(spending.images)  # one draw per image, so that batches do not matter
        return np.random.Generator(bits).random(len(scores)) < self.rate

    def __str__(self) -> str:
        return f"random({number(self.rate)}, {int(self.seed)})"


@dataclass(frozen=True)
class EntropyAbove(Policy):
    """Escalates images whose entropy is above a threshold. This is the gate of the CascadeVLM paper.

    Attributes:
        threshold: from 0 to 1, or in nats from 0 to log C.
        unit: "normalized" or "nats".
    """

    comparison = ">"
    threshold: float
    unit: EntropyUnit = "normalized"

    def __post_init__(self) -> None:
        if self.unit == "nats":
            _require_from_0("entropy", self.threshold)
        else:
            hint = f'For a threshold in nats, write "entropy > {number(self.threshold)} nats".' if self.threshold > 1 else ""
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
    """Escalates images whose two best labels differ in probability by less than a threshold from 0 to 1."""

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
    """Escalates images whose best label has a probability below a threshold from 0 to 1."""

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
    """Escalates images whose expected gain in accuracy is above a threshold from -1 to 1.

    The gain is computed by `cascadevlm.decision.JudgeModel.gain`. It is negative if the judge probably makes the result worse.

    Raises:
        PolicyError: in `select`, if the stage has no model of its judge.
    """

    comparison = ">"
    by_gain = True
    threshold: float

    def __post_init__(self) -> None:
        if not -1 <= self.threshold <= 1:
            raise PolicyError(f"gain must be a number from -1 to 1, not {self.threshold!r}.")

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        return self.surplus(spending) > 0

    def surplus(self, spending: Spending) -> Values:
        """``(N,) float``: the expected gain minus the gain that the policy requires.

        If several judges can be chosen, an image is escalated to the judge with the largest surplus.
        """
        return self.expected(spending) - self.threshold

    def priority(self, scores: Scores, spending: Spending = START) -> Priority:
        return Priority(values=self.expected(spending), is_gain=True)

    def expected(self, spending: Spending) -> Values:
        """``(N,) float``: the expected gain.

        Raises:
            PolicyError: if the stage has no model of its judge.
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
    """Escalates images whose expected gain in accuracy per US dollar is above a threshold of at least 0.

    If a question costs nothing, every image with a positive gain is escalated.
    """

    by_price = True

    def __post_init__(self) -> None:
        _require_from_0("gain_per_dollar", self.threshold)

    def surplus(self, spending: Spending) -> Values:
        return self.expected(spending) - self.threshold * np.array(spending.prices or 0.0)

    def __str__(self) -> str:
        return f"gain_per_dollar > {number(self.threshold)}"


@dataclass(frozen=True)
class TopFraction(Policy):
    """Escalates the least certain ``fraction`` of each batch. The number of images is rounded to the nearest whole number.

    The selection depends on how the images are divided into batches.

    Attributes:
        fraction: from 0 to 1.
        measure: a function from scores to ``(N,) float``; higher values are less certain. Default: the entropy.
    """

    fraction: float
    measure: Measure = field(default=measures.entropy, kw_only=True)

    def __post_init__(self) -> None:
        _require_share("top_fraction", self.fraction)
        if not callable(self.measure):
            raise PolicyError(
                f"The measure of top_fraction must be a function of scores, not {self.measure!r}.",
                hint="For example: cascadevlm.policies.measures.entropy.",
            )

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        selected = np.zeros(len(scores), dtype=bool)
        selected[np.argsort(-self.measure(scores), kind="stable")[: round(self.fraction * len(scores))]] = True
        return selected

    def priority(self, scores: Scores, spending: Spending = START) -> Priority:
        return Priority(values=self.measure(scores))

    def __str__(self) -> str:
        return f"top_fraction({number(self.fraction)})"


def _reasons(measure: str, values: Values, policy: Policy) -> list[str]:
    return [f"{measure} {value:z.2f} (rule: {policy})" for value in values]


def _require_share(name: str, value: float, hint: str = "") -> None:
    if not 0 <= value <= 1:
        raise PolicyError(f"{name} must be a number from 0 to 1, not {value!r}.", hint=hint)


def _require_from_0(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise PolicyError(f"{name} must be a number of at least 0, not {value!r}.")

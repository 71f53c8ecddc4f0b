"""Policies decide, from scores alone, which images are worth asking a judge.

A policy is one method over a batch, composes with ``&``, ``|`` and ``~``, and a plain function from `Scores` to a boolean
array serves as one. ``&`` with a budget spends the budget on the best of what the other side selects.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import ClassVar, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cascadevlm import measures
from cascadevlm.budget import NANODOLLARS
from cascadevlm.errors import PolicyError
from cascadevlm.measures import EntropyUnit, Measure
from cascadevlm.types import Scores

Selection: TypeAlias = NDArray[np.bool_]
"""N booleans, true where the judge shall be asked."""

WINDOW = 1024
"""How many priorities of the latest images are remembered: what share of them is above a threshold is known to 1 to 2 points."""

LEAST = float(np.finfo(np.float32).min)
"""The priority of what another part of a policy leaves out; JSON knows no infinity."""


@dataclass(frozen=True, kw_only=True)
class Spending:
    """Where a run stands when a batch is decided on.

    Attributes:
        images: how many images were decided on before.
        calls: how many of them were escalated at this stage.
        dollars: what those calls are expected to cost.
        dollars_for_all: what asking about all images before would have cost.
        prices: dollars that asking about each of the N images of the batch is expected to cost; none where the policy does not go
            by them.
        remaining: how many images are expected to follow the batch; 0 if that is not known.
        recent: what the policy wanted to be remembered of earlier batches.
    """

    images: int = 0
    calls: int = 0
    dollars: float = 0.0
    dollars_for_all: float = 0.0
    prices: tuple[float, ...] = ()
    remaining: float = 0.0
    recent: tuple[float, ...] = ()


START = Spending()


class Policy(ABC):
    """Which images to escalate.

    Attributes:
        comparison: the operator that stands between this policy's name and its number in the string form, as in
            ``entropy > 0.35``; None where the string form is a call, as in ``random(0.1)``.
    """

    comparison: ClassVar[Literal[">", "<", "<="] | None] = None

    @property
    def by_price(self) -> bool:
        """Whether the policy goes by `Spending.prices`, which take time to find out."""
        return False

    @abstractmethod
    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        """N booleans for N images."""

    def priority(self, scores: Scores) -> NDArray[np.floating]:
        """N numbers: where not all can be asked, the highest come first. Entropy, unless a policy knows better."""
        return measures.entropy(scores)

    def surplus(self, scores: Scores, spending: Spending = START) -> NDArray[np.floating]:
        """N numbers: by how much the gain from asking is above what this policy wants for it; an image whose judge may be chosen
        goes to the one of the most. Above 0 where the policy selects: an image that is left to a later judge is to be asked
        about there.

        Raises:
            PolicyError: if the policy does not go by gain alone.
        """
        raise PolicyError(
            f"The policy '{self}' cannot choose between judges.",
            hint='With routing, go by gain alone, as in "gain > 0.02"; what may be spent in all is [budget] usd.',
        )

    def remembered(self, scores: Scores, spending: Spending) -> tuple[float, ...]:
        """What is to be `Spending.recent` when the next batch is decided on."""
        return ()

    def reasons(self, scores: Scores) -> list[str]:
        """For each of N images, what this policy goes by, in words."""
        return [str(self)] * len(scores)

    def informed(self, gain: Measure) -> "Policy":
        """The same policy, knowing the expected gain in accuracy from asking; itself, unless it goes by that."""
        return self

    def __and__(self, other: "PolicyLike") -> "Policy":
        return All((self, as_policy(other)))

    def __or__(self, other: "PolicyLike") -> "Policy":
        return AnyOf((self, as_policy(other)))

    def __invert__(self) -> "Policy":
        return Not(self)


PolicyLike: TypeAlias = Policy | Callable[[Scores], Selection]


def as_policy(policy: PolicyLike) -> Policy:
    """The policy itself, or a function made one."""
    return policy if isinstance(policy, Policy) else Function(policy)


@dataclass(frozen=True)
class Function(Policy):
    """A plain function as a policy."""

    function: Callable[[Scores], Selection]

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        selected = np.asarray(self.function(scores))
        if selected.shape != (len(scores),) or selected.dtype != bool:
            name = getattr(self.function, "__name__", repr(self.function))
            raise PolicyError(
                f"Policy {name!r} returned {selected.dtype} of shape {selected.shape} for {len(scores)} images.",
                hint=f"Return {len(scores)} booleans.",
            )
        return selected

    def __str__(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


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
        if self.seed != int(self.seed) or self.seed < 0:
            raise PolicyError(f"random takes a whole number as its seed, not {self.seed!r}.")

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        bits = np.random.PCG64(int(self.seed)).advance(spending.images)  # one draw an image, wherever its batch begins
        return np.random.Generator(bits).random(len(scores)) < self.rate

    def __str__(self) -> str:
        return f"random({self.rate}, {self.seed})"


@dataclass(frozen=True)
class EntropyAbove(Policy):
    """CascadeVLM's gate: ask where the entropy is above a threshold, from 0 to 1 or, with ``unit="nats"``, to log C."""

    comparison = ">"
    threshold: float
    unit: EntropyUnit = "normalized"

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        return measures.entropy(scores, self.unit) > self.threshold

    def reasons(self, scores: Scores) -> list[str]:
        return _reasons("entropy", measures.entropy(scores, self.unit), self)

    def __str__(self) -> str:
        return f"entropy > {_number(self.threshold)}" + " nats" * (self.unit == "nats")


@dataclass(frozen=True)
class MarginBelow(Policy):
    """Ask where the two best labels are closer in probability than a threshold from 0 to 1."""

    comparison = "<"
    threshold: float

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        return measures.margin(scores) < self.threshold

    def priority(self, scores: Scores) -> NDArray[np.floating]:
        return -measures.margin(scores)

    def reasons(self, scores: Scores) -> list[str]:
        return _reasons("margin", measures.margin(scores), self)

    def __str__(self) -> str:
        return f"margin < {_number(self.threshold)}"


@dataclass(frozen=True)
class TopProbabilityBelow(Policy):
    """Ask where the best label is less probable than a threshold from 0 to 1."""

    comparison = "<"
    threshold: float

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        return measures.top_probability(scores) < self.threshold

    def priority(self, scores: Scores) -> NDArray[np.floating]:
        return -measures.top_probability(scores)

    def reasons(self, scores: Scores) -> list[str]:
        return _reasons("top_probability", measures.top_probability(scores), self)

    def __str__(self) -> str:
        return f"top_probability < {_number(self.threshold)}"


@dataclass(frozen=True)
class GainAbove(Policy):
    """Ask where the expected gain in accuracy is above a threshold from 0 to 1: `cascadevlm.decision.JudgeModel.gain`.

    Raises:
        PolicyError: when deciding, if the stage has no model of its judge.
    """

    comparison = ">"
    threshold: float
    gain: Measure | None = field(default=None, kw_only=True, repr=False)

    def informed(self, gain: Measure) -> Policy:
        return replace(self, gain=gain)

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        return self.surplus(scores, spending) > 0

    def surplus(self, scores: Scores, spending: Spending = START) -> NDArray[np.floating]:
        return self.priority(scores) - self.threshold

    def priority(self, scores: Scores) -> NDArray[np.floating]:
        if self.gain is None:
            raise PolicyError(
                f"The policy '{self}' needs a calibration.", hint='Make one with cascadevlm calibrate; calibration = "FILE".'
            )
        return self.gain(scores)

    def reasons(self, scores: Scores) -> list[str]:
        return _reasons("gain", self.priority(scores), self)

    def __str__(self) -> str:
        return f"gain > {_number(self.threshold)}"


@dataclass(frozen=True)
class GainPerDollarAbove(GainAbove):
    """Ask where the expected gain in accuracy is worth its price: above a threshold of expected right answers per dollar. Where
    asking costs nothing, wherever there is a gain."""

    by_price = True

    def surplus(self, scores: Scores, spending: Spending = START) -> NDArray[np.floating]:
        return self.priority(scores) - self.threshold * np.array(spending.prices or 0.0)

    def __str__(self) -> str:
        return f"gain_per_dollar > {_number(self.threshold)}"


@dataclass(frozen=True)
class TopFraction(Policy):
    """Ask about the least certain ``fraction`` of every batch, rounded to the nearest whole image, by entropy or another measure
    that grows with doubt. It depends on the batches: a stream is cut into them as it comes."""

    fraction: float
    measure: Measure = field(default=measures.entropy, kw_only=True)

    def __post_init__(self) -> None:
        _require_share("top_fraction", self.fraction)

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        return _highest(self.measure(scores), round(self.fraction * len(scores)))

    def priority(self, scores: Scores) -> NDArray[np.floating]:
        return self.measure(scores)

    def __str__(self) -> str:
        return f"top_fraction({self.fraction:g})"


@dataclass(frozen=True)
class WithinBudget(Policy):
    """Ask about the least certain images, as many as ``calls`` questions or ``dollars`` suffice for over the whole run; about
    those of the highest gain, where the stage has a model of its judge.

    Over a batch this is exact. Where more are to come, a batch gets what it would have a right to if they were like the latest
    ones: all above the quantile of the priorities that leaves as large a share as there is budget for. Where it is not known how
    many are to come, the budget is spent as they come. Dollars are spent as far as they reach, images to come counted at the
    mean price so far. They are an expectation; what may be spent in fact is the ledger's to enforce.
    """

    calls: int | None = None
    dollars: float | None = None
    gain: Measure | None = field(default=None, kw_only=True, repr=False)

    @property
    def by_price(self) -> bool:
        return self.dollars is not None

    def informed(self, gain: Measure) -> Policy:
        return WithinBudget(self.calls, self.dollars, gain=gain)

    def priority(self, scores: Scores) -> NDArray[np.floating]:
        return super().priority(scores) if self.gain is None else self.gain(scores)

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        return self.limit(np.ones(len(scores), dtype=bool), self.priority(scores), spending)

    def remembered(self, scores: Scores, spending: Spending) -> tuple[float, ...]:
        return _latest(spending.recent, self.priority(scores))

    def limit(self, selected: Selection, priority: NDArray[np.floating], spending: Spending) -> Selection:
        """Of the selected, the highest in priority that the budget has room for; some of it is kept for images to come."""
        ranked = np.where(selected, priority, LEAST)
        to_come = len(ranked) + spending.remaining
        reach, room = len(ranked), to_come
        if self.calls is not None:
            reach = max(self.calls - spending.calls, 0)
            room = min(room, reach)
        if self.dollars is not None and any(spending.prices):
            prices, left = np.array(spending.prices), self.dollars - spending.dollars
            affordable = np.cumsum(prices[_best_first(ranked)]) <= left + 0.5 / NANODOLLARS
            usual = (spending.dollars_for_all + prices.sum()) / (spending.images + len(prices))
            reach, room = min(reach, int(affordable.sum())), min(room, max(left / usual, 0))
        entitled = _entitled(spending.recent, ranked, room / max(to_come, 1))
        left_over = math.ceil(room - spending.remaining) if spending.remaining else reach
        return selected & _highest(ranked, min(max(entitled, left_over), reach))

    def __str__(self) -> str:
        limits = {"calls": self.calls, "dollars": self.dollars}
        return " & ".join(f"{name} <= {limit:g}" for name, limit in limits.items() if limit is not None)


class WithinCalls(WithinBudget):
    """``calls <= N``: `WithinBudget` on the number of questions."""

    comparison = "<="

    def __init__(self, calls: int) -> None:
        if calls != int(calls):
            raise PolicyError(f"calls takes a whole number, not {calls!r}.")
        super().__init__(calls=int(calls))


class WithinDollars(WithinBudget):
    """``dollars <= X``: `WithinBudget` on the money."""

    comparison = "<="

    def __init__(self, dollars: float) -> None:
        super().__init__(dollars=dollars)


@dataclass(frozen=True)
class All(Policy):
    """Ask where every part would; budgets among them are spent on what the others select. Ranks as its first part."""

    parts: tuple[Policy, ...]

    @property
    def by_price(self) -> bool:
        return any(part.by_price for part in self.parts)

    def informed(self, gain: Measure) -> Policy:
        return All(tuple(part.informed(gain) for part in self.parts))

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        selected = self._but_for_budgets(scores, spending)
        for budget in self._budgets():
            selected = budget.limit(selected, self.priority(scores), spending)
        return selected

    def priority(self, scores: Scores) -> NDArray[np.floating]:
        return (self._others() or self.parts)[0].priority(scores)

    def remembered(self, scores: Scores, spending: Spending) -> tuple[float, ...]:
        if not self._budgets():
            return ()
        return _latest(spending.recent, np.where(self._but_for_budgets(scores, spending), self.priority(scores), LEAST))

    def _but_for_budgets(self, scores: Scores, spending: Spending) -> Selection:
        selected = [part.select(scores, spending) for part in self._others()]
        return reduce(np.logical_and, selected, np.ones(len(scores), dtype=bool))

    def _budgets(self) -> list[WithinBudget]:
        return [part for part in self._flat() if isinstance(part, WithinBudget)]

    def _others(self) -> list[Policy]:
        return [part for part in self._flat() if not isinstance(part, WithinBudget)]

    def _flat(self) -> tuple[Policy, ...]:
        return tuple(leaf for part in self.parts for leaf in (part._flat() if isinstance(part, All) else (part,)))

    def reasons(self, scores: Scores) -> list[str]:
        return _joined(" & ", self.parts, scores)

    def __str__(self) -> str:
        return " & ".join(f"({part})" if isinstance(part, AnyOf) else str(part) for part in self.parts)


@dataclass(frozen=True)
class AnyOf(Policy):
    """Ask where any part would. Ranks as its first part."""

    parts: tuple[Policy, ...]

    @property
    def by_price(self) -> bool:
        return any(part.by_price for part in self.parts)

    def informed(self, gain: Measure) -> Policy:
        return AnyOf(tuple(part.informed(gain) for part in self.parts))

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        return reduce(np.logical_or, [part.select(scores, spending) for part in self.parts])

    def priority(self, scores: Scores) -> NDArray[np.floating]:
        return self.parts[0].priority(scores)

    def remembered(self, scores: Scores, spending: Spending) -> tuple[float, ...]:
        memories = list(filter(None, (part.remembered(scores, spending) for part in self.parts)))
        return memories[0] if len(memories) == 1 else ()  # two budgets may rank otherwise: each gets its share batch by batch

    def reasons(self, scores: Scores) -> list[str]:
        return _joined(" | ", self.parts, scores)

    def __str__(self) -> str:
        return " | ".join(map(str, self.parts))


@dataclass(frozen=True)
class Not(Policy):
    """Ask where the other policy would not."""

    part: Policy

    @property
    def by_price(self) -> bool:
        return self.part.by_price

    def informed(self, gain: Measure) -> Policy:
        return Not(self.part.informed(gain))

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        return ~self.part.select(scores, spending)

    def priority(self, scores: Scores) -> NDArray[np.floating]:
        return -self.part.priority(scores)

    def reasons(self, scores: Scores) -> list[str]:
        return [f"not ({reason})" for reason in self.part.reasons(scores)]

    def __str__(self) -> str:
        return f"~({self.part})"


def _highest(values: NDArray[np.floating], number: int) -> Selection:
    """True for the ``number`` highest values; among equals the first."""
    selected = np.zeros(len(values), dtype=bool)
    selected[_best_first(values)[:number]] = True
    return selected


def _best_first(values: NDArray[np.floating]) -> NDArray[np.intp]:
    return np.argsort(-values, kind="stable")


def _entitled(recent: tuple[float, ...], ranked: NDArray[np.floating], share: float) -> int:
    """How many of a batch are among the highest ``share`` of it and what came before; of equals, the same part everywhere."""
    stream = np.concatenate([recent, ranked])
    number = share * len(stream)
    threshold = np.append(np.sort(stream)[::-1], -np.inf)[int(number)]
    part = (number - (stream > threshold).sum()) / max((stream == threshold).sum(), 1)
    return round(float((ranked > threshold).sum() + part * (ranked == threshold).sum()))


def _latest(recent: tuple[float, ...], priority: NDArray[np.floating]) -> tuple[float, ...]:
    """The last of what was remembered and what is new."""
    return (*recent, *priority.tolist())[-WINDOW:]


def _reasons(measure: str, values: NDArray[np.floating], policy: Policy) -> list[str]:
    return [f"{measure} {value:.2f} (asks for {policy})" for value in values]


def _joined(operator: str, parts: tuple[Policy, ...], scores: Scores) -> list[str]:
    return [operator.join(reasons) for reasons in zip(*(part.reasons(scores) for part in parts), strict=True)]


def _number(value: float) -> str:
    """Short, where that is exact."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def _require_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise PolicyError(f"{name} takes a share from 0 to 1, not {value!r}.")

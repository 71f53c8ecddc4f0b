"""Policies decide, from scores alone, which images are worth asking a judge.

A policy is one method over a batch, composes with ``&``, ``|`` and ``~``, and a plain function from `Scores` to a boolean
array serves as one. ``&`` with a limit on calls or dollars spends it on the best of what the other side selects.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cascadevlm.base.errors import PolicyError
from cascadevlm.base.types import Scores
from cascadevlm.policies.measures import Measure

Selection: TypeAlias = NDArray[np.bool_]
"""N booleans, true where the judge shall be asked."""


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


@dataclass(frozen=True)
class Priority:
    """What images are ranked by where not all can be asked about.

    Attributes:
        measure: the images of the highest come first.
        is_gain: whether it is the expected gain in accuracy, of which money is to buy the most.
    """

    measure: Measure
    is_gain: bool = False


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

    @property
    def lacks_gain(self) -> bool:
        """Whether it goes by the expected gain from asking and was not `informed` of it."""
        return False

    @abstractmethod
    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        """N booleans for N images."""

    @property
    def priority(self) -> Priority | None:
        """What it ranks images by; None where it holds no image more worth asking about than another."""
        return None

    @property
    def limits(self) -> tuple["Limit", ...]:
        """Those on calls and dollars that it keeps to."""
        return ()

    @property
    def unlimited(self) -> "Policy":
        """What it would ask about without its limits."""
        return self

    def surplus(self, scores: Scores, spending: Spending = START) -> NDArray[np.floating]:
        """N numbers: by how much the gain from asking is above what this policy wants for it; an image whose judge may be chosen
        goes to the one of the most. Above 0 where the policy selects: an image that is left to a later judge is to be asked
        about there. A policy that does not go by gain alone has none, and cannot choose between judges."""
        raise NotImplementedError

    @property
    def can_route(self) -> bool:
        """Whether it can choose between judges."""
        return type(self).surplus is not Policy.surplus

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
        return All(_flat(All, self, as_policy(other)))

    def __or__(self, other: "PolicyLike") -> "Policy":
        return AnyOf(_flat(AnyOf, self, as_policy(other)))

    def __invert__(self) -> "Policy":
        return Not(self)


PolicyLike: TypeAlias = Policy | str | Callable[[Scores], Selection]


def as_policy(policy: PolicyLike) -> Policy:
    """The policy itself, or made of its string form or a function.

    Raises:
        PolicyError: if the string form is wrong, or it is none of these.
    """
    from cascadevlm.policies.language import parse_policy

    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, str):
        return parse_policy(policy)
    if callable(policy) and not isinstance(policy, type):
        return Function(policy)
    raise PolicyError(f"A policy is not {policy!r}.", hint='Give one, a function of scores, or text such as "entropy > 0.3".')


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


class Limit(Policy):
    """A policy that asks about the best of all images or, behind ``&``, of what the others select, as far as something suffices
    over the whole run."""

    @property
    def limits(self) -> tuple["Limit", ...]:
        return (self,)

    @property
    def unlimited(self) -> Policy:
        return All(())

    @abstractmethod
    def most_calls(self, price: float) -> float:
        """How many questions it suffices for, at so many dollars each."""

    @abstractmethod
    def within(self, wanted: Selection, priority: Priority | None, scores: Scores, spending: Spending) -> Selection:
        """Of the wanted, the highest in priority that there is room for; some of it is kept for images to come. Where the others
        rank none above another, the limit has a priority of its own."""

    @abstractmethod
    def memory(self, wanted: Selection, priority: Priority | None, scores: Scores, spending: Spending) -> tuple[float, ...]:
        """What is to be `Spending.recent` after a batch."""


@dataclass(frozen=True)
class All(Policy):
    """Ask where every part would; limits among them are spent on what the others select. Ranks as the first part that does."""

    parts: tuple[Policy, ...]

    @property
    def by_price(self) -> bool:
        return any(part.by_price for part in self.parts)

    @property
    def lacks_gain(self) -> bool:
        return any(part.lacks_gain for part in self.parts)

    @property
    def priority(self) -> Priority | None:
        return _first_priority(part.unlimited for part in self.parts)

    @property
    def limits(self) -> tuple[Limit, ...]:
        return tuple(limit for part in self.parts for limit in part.limits)

    @property
    def unlimited(self) -> Policy:
        return All(tuple(part.unlimited for part in self.parts))

    def informed(self, gain: Measure) -> Policy:
        return All(tuple(part.informed(gain) for part in self.parts))

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        selected = self._wanted(scores, spending)
        for limit in self.limits:
            selected = limit.within(selected, self.priority, scores, spending)
        return selected

    def remembered(self, scores: Scores, spending: Spending) -> tuple[float, ...]:
        if not self.limits:
            return ()
        return self.limits[0].memory(self._wanted(scores, spending), self.priority, scores, spending)  # one for all

    def _wanted(self, scores: Scores, spending: Spending) -> Selection:
        selected = [part.unlimited.select(scores, spending) for part in self.parts]
        return reduce(np.logical_and, selected, np.ones(len(scores), dtype=bool))

    def reasons(self, scores: Scores) -> list[str]:
        return _joined(" & ", self.parts, scores)

    def __str__(self) -> str:
        return " & ".join(f"({part})" if isinstance(part, AnyOf) else str(part) for part in self.parts)


@dataclass(frozen=True)
class AnyOf(Policy):
    """Ask where any part would. Ranks as the first part that does.

    Raises:
        PolicyError: if a part has limits.
    """

    parts: tuple[Policy, ...]

    def __post_init__(self) -> None:
        _refuse_limits(self, self.parts)

    @property
    def by_price(self) -> bool:
        return any(part.by_price for part in self.parts)

    @property
    def lacks_gain(self) -> bool:
        return any(part.lacks_gain for part in self.parts)

    @property
    def priority(self) -> Priority | None:
        return _first_priority(self.parts)

    def informed(self, gain: Measure) -> Policy:
        return AnyOf(tuple(part.informed(gain) for part in self.parts))

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        return reduce(np.logical_or, [part.select(scores, spending) for part in self.parts])

    def reasons(self, scores: Scores) -> list[str]:
        return _joined(" | ", self.parts, scores)

    def __str__(self) -> str:
        return " | ".join(map(str, self.parts))


@dataclass(frozen=True)
class Not(Policy):
    """Ask where the other policy would not. Ranks the other way round.

    Raises:
        PolicyError: if it has limits.
    """

    part: Policy

    def __post_init__(self) -> None:
        _refuse_limits(self, (self.part,))

    @property
    def by_price(self) -> bool:
        return self.part.by_price

    @property
    def lacks_gain(self) -> bool:
        return self.part.lacks_gain

    @property
    def priority(self) -> Priority | None:
        if (priority := self.part.priority) is None:
            return None
        return Priority(lambda scores: -priority.measure(scores))

    def informed(self, gain: Measure) -> Policy:
        return Not(self.part.informed(gain))

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        return ~self.part.select(scores, spending)

    def reasons(self, scores: Scores) -> list[str]:
        return [f"not ({reason})" for reason in self.part.reasons(scores)]

    def __str__(self) -> str:
        return f"~({self.part})"


def uncalibrated(policy: Policy) -> PolicyError:
    """What to raise where a policy goes by gain and it is not known."""
    return PolicyError(
        f"The policy '{policy}' needs a calibration.", hint='Make one: cascadevlm calibrate; calibration = "FILE".'
    )


def _flat(kind: type[All] | type[AnyOf], *policies: Policy) -> tuple[Policy, ...]:
    """The policies, parts in the place of those that are composed in the same way."""
    return tuple(part for policy in policies for part in (policy.parts if isinstance(policy, kind) else (policy,)))


def _first_priority(policies: Iterable[Policy]) -> Priority | None:
    return next((policy.priority for policy in policies if policy.priority is not None), None)


def _refuse_limits(policy: Policy, parts: Iterable[Policy]) -> None:
    """What is left of a limit behind ``|`` or ``~`` depends on how a run is cut into batches."""
    if any(part.limits for part in parts):
        raise PolicyError(
            f"A limit on calls or dollars stands alone or behind &, not as in '{policy}'.",
            hint="For example: (entropy > 0.3 | margin < 0.1) & calls <= 500.",
        )


def _joined(operator: str, parts: tuple[Policy, ...], scores: Scores) -> list[str]:
    return [operator.join(reasons) for reasons in zip(*(part.reasons(scores) for part in parts), strict=True)]


def number(value: float) -> str:
    """A number in the string form: short, where that is exact."""
    short = f"{value:g}"
    return short if float(short) == value else str(value)


def require_whole(name: str, value: float) -> None:
    """Refuse what is no whole number from 0 on.

    Raises:
        PolicyError: naming the parameter.
    """
    if not (0 <= value < math.inf and value == int(value)):
        raise PolicyError(f"{name} takes a whole number from 0 on, not {value!r}.")

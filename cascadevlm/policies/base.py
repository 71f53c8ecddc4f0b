"""Policies decide which images are worth a question to a judge.

A policy is one method over a batch of images. Policies compose with ``&``, ``|`` and ``~``. A plain function from `Scores` to a
boolean array serves as a policy. A limit such as ``calls <= 500`` behind ``&`` makes a `Budgeted` policy: the limit is spent on
the best of the images that the other side selects.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cascadevlm.base.errors import PolicyError
from cascadevlm.base.types import Scores
from cascadevlm.policies import measures
from cascadevlm.policies.measures import Values

Selection: TypeAlias = NDArray[np.bool_]
"""Boolean mask (N,): true where the judge is asked."""

WINDOW = 1024
"""Number of images that a `Budgeted` policy remembers: the share of images above a threshold is then known to 1 to 2 points."""

LEAST = float(np.finfo(np.float32).min)
"""The value of an image that the policy does not select; JSON has no infinity."""


@dataclass(frozen=True, kw_only=True)
class Spending:
    """What a policy is told beside the scores: where the run stands, and what the images of the batch cost and gain.

    Attributes:
        images: number of images decided on before this batch.
        calls: number of those that were escalated at this stage.
        dollars: expected cost of those calls.
        dollars_for_all: expected cost if all images before this batch had been escalated.
        recent: what a `Budgeted` policy remembers of earlier batches: value, price and probability of the best label of one image
            after another.
        remaining: expected number of images after this batch; None if it is not known.
        prices: (N,) expected dollars of a question about each image; empty if the policy does not need them.
        gain: (N,) expected gain in accuracy from a question about each image; None if the stage has no model of its judge.
    """

    images: int = 0
    calls: int = 0
    dollars: float = 0.0
    dollars_for_all: float = 0.0
    recent: tuple[float, ...] = ()
    remaining: float | None = 0.0
    prices: tuple[float, ...] = ()
    gain: tuple[float, ...] | None = None


START = Spending()


@dataclass(frozen=True, kw_only=True, eq=False)
class Priority:
    """The order of images where not all can be asked about.

    Attributes:
        values: (N,) the highest come first.
        is_gain: whether the values are the expected gain in accuracy, of which money buys as much as possible.
    """

    values: Values
    is_gain: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Latest:
    """What a limit compares the N images of a batch with: the M images that are remembered, then these N images.

    Attributes:
        values: (M + N,) the highest come first; `LEAST` for images that are not wanted.
        prices: (M + N,) expected dollars of a question about each image.
        sure: (M + N,) probability of each image's best label before a question.
        is_gain: whether the values are expected gains in accuracy.
    """

    values: Values
    prices: Values
    sure: Values
    is_gain: bool


class Policy(ABC):
    """Which images to escalate.

    Attributes:
        comparison: the operator between the name and the number in the string form, as in ``entropy > 0.35``; None if the string
            form is a call, as in ``random(0.1)``.
    """

    comparison: ClassVar[Literal[">", "<", "<="] | None] = None

    @property
    def parts(self) -> tuple["Policy", ...]:
        """The policies that this one is composed of."""
        return ()

    @property
    def by_price(self) -> bool:
        """Whether `select` needs ``spending.prices``, which take time to find out."""
        return any(part.by_price for part in self.parts)

    @property
    def by_gain(self) -> bool:
        """Whether `select` needs ``spending.gain``."""
        return any(part.by_gain for part in self.parts)

    @abstractmethod
    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        """Boolean mask (N,) of the images to escalate."""

    def priority(self, scores: Scores, spending: Spending = START) -> Priority | None:
        """The order of N images, from the first part that has one; None if no image is more worth a question than another."""
        found = (part.priority(scores, spending) for part in self.parts)
        return next((priority for priority in found if priority is not None), None)

    def reasons(self, scores: Scores, spending: Spending = START) -> list[str]:
        """For each of N images, in words: the value that decides, and the rule."""
        return [str(self)] * len(scores)

    def __and__(self, other: "PolicyLike") -> "Policy":
        return _both(self, as_policy(other))

    def __or__(self, other: "PolicyLike") -> "Policy":
        return AnyOf(_flat(AnyOf, self, as_policy(other)))

    def __invert__(self) -> "Policy":
        return Not(self)


class Limit(ABC):
    """What may be spent over a whole run. A limit alone is a policy, too: it asks about the best of all images (`as_policy`)."""

    comparison: ClassVar[Literal["<=", ">="]] = "<="
    by_price: ClassVar[bool] = False
    by_gain: ClassVar[bool] = False

    @abstractmethod
    def within(self, wanted: Selection, latest: Latest, spending: Spending) -> Selection:
        """The part of the wanted images that the limit allows; some of it is kept for images to come.

        Args:
            wanted: boolean mask (N,).
            latest: the M images that are remembered and the N images.
            spending: where the run stands.
        """

    @abstractmethod
    def most_calls(self, price: float, images: int) -> float:
        """Number of questions that the limit allows about so many images, at so many dollars each."""

    def __and__(self, other: "PolicyLike") -> Policy:
        return as_policy(self) & other

    def __or__(self, other: "PolicyLike") -> Policy:
        return as_policy(self) | other

    def __invert__(self) -> Policy:
        return ~as_policy(self)


PolicyLike: TypeAlias = Policy | Limit | str | Callable[[Scores], Selection]


def as_policy(policy: PolicyLike) -> Policy:
    """The policy itself, or the policy that a limit, a text such as ``"entropy > 0.3"`` or a function makes.

    Raises:
        PolicyError: if the text is wrong, or if it is none of these.
    """
    from cascadevlm.policies.language import parse_policy

    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, Limit):
        return Budgeted(EVERY, (policy,))
    if isinstance(policy, str):
        return parse_policy(policy)
    if callable(policy) and not isinstance(policy, type):
        return Function(policy)
    raise PolicyError(f"A policy is not {policy!r}.", hint='Give one, a function of scores, or text such as "entropy > 0.3".')


def as_budgeted(policy: PolicyLike) -> "Budgeted":
    """The policy with its limits, if it has any."""
    whole = as_policy(policy)
    return whole if isinstance(whole, Budgeted) else Budgeted(whole)


@dataclass(frozen=True)
class Function(Policy):
    """A plain function as a policy."""

    function: Callable[[Scores], Selection]

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        selected = np.asarray(self.function(scores))
        if selected.shape != (len(scores),) or selected.dtype != bool:
            raise PolicyError(
                f"Policy {str(self)!r} returned {selected.dtype} of shape {selected.shape} for {len(scores)} images.",
                hint=f"Return {len(scores)} booleans.",
            )
        return selected

    def __str__(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


@dataclass(frozen=True)
class All(Policy):
    """Asks where every part would."""

    policies: tuple[Policy, ...]

    @property
    def parts(self) -> tuple[Policy, ...]:
        return self.policies

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        selected = (part.select(scores, spending) for part in self.parts)
        return reduce(np.logical_and, selected, np.ones(len(scores), dtype=bool))

    def reasons(self, scores: Scores, spending: Spending = START) -> list[str]:
        return _joined(" & ", [part.reasons(scores, spending) for part in self.parts])

    def __str__(self) -> str:
        return " & ".join(f"({part})" if isinstance(part, AnyOf) else str(part) for part in self.parts)


EVERY = All(())
"""Asks about every image, and has no name in the string form."""


@dataclass(frozen=True)
class AnyOf(Policy):
    """Asks where any part would.

    Raises:
        PolicyError: if a part has limits.
    """

    policies: tuple[Policy, ...]

    def __post_init__(self) -> None:
        _refuse_limits(self)

    @property
    def parts(self) -> tuple[Policy, ...]:
        return self.policies

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        return reduce(np.logical_or, [part.select(scores, spending) for part in self.parts])

    def reasons(self, scores: Scores, spending: Spending = START) -> list[str]:
        return _joined(" | ", [part.reasons(scores, spending) for part in self.parts])

    def __str__(self) -> str:
        return " | ".join(map(str, self.parts))


@dataclass(frozen=True)
class Not(Policy):
    """Asks where the other policy would not, and orders images the other way round.

    Raises:
        PolicyError: if the other policy has limits.
    """

    policy: Policy

    def __post_init__(self) -> None:
        _refuse_limits(self)

    @property
    def parts(self) -> tuple[Policy, ...]:
        return (self.policy,)

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        return ~self.policy.select(scores, spending)

    def priority(self, scores: Scores, spending: Spending = START) -> Priority | None:
        priority = self.policy.priority(scores, spending)
        return None if priority is None else Priority(values=-priority.values)

    def reasons(self, scores: Scores, spending: Spending = START) -> list[str]:
        return [f"not ({reason})" for reason in self.policy.reasons(scores, spending)]

    def __str__(self) -> str:
        return f"~({self.policy})"


@dataclass(frozen=True)
class Budgeted(Policy):
    """Asks about the best of the images that a policy selects, as far as limits allow over the whole run.

    The policy orders the images. If it has no order, the expected gain does or, without a model of the judge, the entropy. A
    limit on the accuracy always orders them by the expected gain.
    """

    policy: Policy
    limits: tuple[Limit, ...] = ()

    @property
    def parts(self) -> tuple[Policy, ...]:
        return (self.policy,)

    @property
    def by_price(self) -> bool:
        return self.policy.by_price or any(limit.by_price for limit in self.limits)

    @property
    def by_gain(self) -> bool:
        return self.policy.by_gain or any(limit.by_gain for limit in self.limits)

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        selected = self.policy.select(scores, spending)
        if not self.limits or not selected.any():
            return selected
        priority = self.priority(scores, spending)
        for limit in self.limits:
            values, prices, sure = _stream(selected, priority, scores, spending).T
            latest = Latest(values=values, prices=prices, sure=sure, is_gain=priority.is_gain)
            selected = limit.within(selected, latest, spending)
        return selected

    def priority(self, scores: Scores, spending: Spending = START) -> Priority:
        needs_gain = any(limit.by_gain for limit in self.limits)
        if not needs_gain and (own := self.policy.priority(scores, spending)) is not None:
            return own
        if spending.gain is None and needs_gain:
            raise uncalibrated(self)
        if spending.gain is not None:
            return Priority(values=np.array(spending.gain), is_gain=True)
        return Priority(values=measures.entropy(scores))

    def remembered(self, scores: Scores, spending: Spending) -> tuple[float, ...]:
        """``spending.recent`` for the next batch."""
        if not self.limits:
            return ()
        stream = _stream(self.policy.select(scores, spending), self.priority(scores, spending), scores, spending)
        return tuple(stream[-WINDOW:].ravel().tolist())

    def reasons(self, scores: Scores, spending: Spending = START) -> list[str]:
        limits = [[str(limit)] * len(scores) for limit in self.limits]
        own = [] if self.policy == EVERY else [self.policy.reasons(scores, spending)]
        return _joined(" & ", [*own, *limits])

    def __str__(self) -> str:
        own = [] if self.policy == EVERY else [f"({self.policy})" if isinstance(self.policy, AnyOf) else str(self.policy)]
        return " & ".join([*own, *map(str, self.limits)])


def uncalibrated(policy: Policy) -> PolicyError:
    """The error for a policy that goes by the expected gain where the stage has no model of its judge."""
    return PolicyError(
        f"The policy '{policy}' needs a calibration.", hint='Make one: cascadevlm calibrate; calibration = "FILE".'
    )


def _both(*policies: Policy) -> Policy:
    """Every part of the policies, with all their limits."""
    selecting = [policy.policy if isinstance(policy, Budgeted) else policy for policy in policies]
    limits = tuple(limit for policy in policies if isinstance(policy, Budgeted) for limit in policy.limits)
    every = All(_flat(All, *selecting))
    return Budgeted(every, limits) if limits else every


def _flat(kind: type[All] | type[AnyOf], *policies: Policy) -> tuple[Policy, ...]:
    """The policies; those that are composed in the same way are replaced by their parts."""
    return tuple(part for policy in policies for part in (policy.parts if isinstance(policy, kind) else (policy,)))


def _refuse_limits(policy: Policy) -> None:
    """Raises PolicyError if a part has limits: behind ``|`` or ``~``, what a limit leaves depends on the batches of a run."""
    if any(isinstance(part, Budgeted) for part in policy.parts):
        raise PolicyError(
            f"A limit such as calls or deferral stands alone or behind &, not as in '{policy}'.",
            hint="For example: (entropy > 0.3 | margin < 0.1) & calls <= 500.",
        )


def _stream(wanted: Selection, priority: Priority, scores: Scores, spending: Spending) -> NDArray[np.float64]:
    """(M + N, 3): the columns of `Latest`."""
    prices, sure = spending.prices or np.zeros(len(wanted)), measures.top_probability(scores)
    batch = np.column_stack([np.where(wanted, priority.values, LEAST), prices, sure])
    return np.concatenate([np.reshape(spending.recent, (-1, 3)), batch])


def _joined(operator: str, reasons: list[list[str]]) -> list[str]:
    return [operator.join(each) for each in zip(*reasons, strict=True)]


def number(value: float) -> str:
    """A number in the string form: short, if that is exact."""
    short = f"{value:g}"
    return short if float(short) == value else str(value)


def require_whole(name: str, value: float) -> None:
    """Refuse a value that is not a whole number from 0 on.

    Raises:
        PolicyError: naming the parameter.
    """
    if not (0 <= value < math.inf and value == int(value)):
        raise PolicyError(f"{name} takes a whole number from 0 on, not {value!r}.")

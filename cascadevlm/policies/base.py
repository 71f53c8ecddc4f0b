"""Policies decide which images are escalated to a judge.

A policy has one method, which selects images of a batch. Policies are combined with ``&``, ``|`` and ``~``. A plain function from
`Scores` to a boolean array is also a policy. A policy ``& calls <= N``, or with another limit, is a `Budgeted` policy: the limit
is spent on the best of the images that the policy selects.
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
"""``(N,) bool``: True for each image that is escalated."""

WINDOW = 1024
"""Number of images that a `Budgeted` policy remembers. With this number, the share of images above a threshold is known to within
1 to 2 percentage points."""

LEAST = float(np.finfo(np.float32).min)
"""The value of an image that the policy does not select. It is finite because JSON has no infinity."""


@dataclass(frozen=True, kw_only=True)
class Spending:
    """The state of the run so far, and the expected price and gain of each image in the batch.

    Attributes:
        images: number of images before this batch.
        calls: number of these images that were escalated at this stage.
        dollars: expected cost of these calls, in US dollars.
        dollars_for_all: expected cost, in US dollars, if all images before this batch had been escalated.
        recent: value, price and probability of the best label of each image that a `Budgeted` policy remembers, as one flat
            sequence.
        remaining: expected number of images after this batch; None if the number is unknown.
        prices: N numbers, the expected price of a question about each image, in US dollars. Empty if the policy needs no prices.
        gain: N numbers, the expected gain in accuracy from a question about each image. None if the stage has no model of its
            judge.
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
    """The order in which images are escalated if a limit does not allow all of them.

    Attributes:
        values: ``(N,) float``, images with higher values come first.
        is_gain: True if the values are expected gains in accuracy. A limit in dollars then prefers the highest gain per dollar.
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
    """Base class of policies. A policy selects the images to escalate.

    Attributes:
        comparison: the operator between the name and the number in the string form, such as ``>`` in ``entropy > 0.35``. None if
            the string form is a call, such as ``random(0.1)``.
    """

    comparison: ClassVar[Literal[">", "<", "<="] | None] = None

    @property
    def parts(self) -> tuple["Policy", ...]:
        """The policies that this policy is made of."""
        return ()

    @property
    def by_price(self) -> bool:
        """True if `select` needs ``spending.prices``, which take time to compute."""
        return any(part.by_price for part in self.parts)

    @property
    def by_gain(self) -> bool:
        """True if `select` needs ``spending.gain``."""
        return any(part.by_gain for part in self.parts)

    @abstractmethod
    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        """Return ``(N,) bool``: True for each image to escalate."""

    def priority(self, scores: Scores, spending: Spending = START) -> Priority | None:
        """The order of N images. The first part that has an order decides. None if no part has an order."""
        found = (part.priority(scores, spending) for part in self.parts)
        return next((priority for priority in found if priority is not None), None)

    def reasons(self, scores: Scores, spending: Spending = START) -> list[str]:
        """N texts, one per image: the value that decides, and the rule."""
        return [str(self)] * len(scores)

    def __and__(self, other: "PolicyLike") -> "Policy":
        return _both(self, as_policy(other))

    def __or__(self, other: "PolicyLike") -> "Policy":
        return AnyOf(_flat(AnyOf, self, as_policy(other)))

    def __invert__(self) -> "Policy":
        return Not(self)


class Limit(ABC):
    """A limit on what a whole run spends. A limit alone is also a policy: it escalates the best of all images (`as_policy`)."""

    comparison: ClassVar[Literal["<=", ">="]] = "<="
    by_price: ClassVar[bool] = False
    by_gain: ClassVar[bool] = False

    @abstractmethod
    def within(self, wanted: Selection, latest: Latest, spending: Spending) -> Selection:
        """Select the images of a batch that the limit allows. A part of the limit is kept for later images.

        Args:
            wanted: ``(N,) bool``, True for each image that the policy selects.
            latest: M remembered images, then the N images.
            spending: the state of the run.

        Returns:
            ``(N,) bool``: True for each wanted image that is escalated.
        """

    @abstractmethod
    def most_calls(self, price: float, images: int) -> float:
        """Number of questions that the limit allows about ``images`` images if each question costs ``price`` US dollars; may be
        infinite."""

    def __and__(self, other: "PolicyLike") -> Policy:
        return as_policy(self) & other

    def __or__(self, other: "PolicyLike") -> Policy:
        return as_policy(self) | other

    def __invert__(self) -> Policy:
        return ~as_policy(self)


PolicyLike: TypeAlias = Policy | Limit | str | Callable[[Scores], Selection]


def as_policy(policy: PolicyLike) -> Policy:
    """Convert a limit, a text such as ``"entropy > 0.3"`` or a function to a policy. A policy is returned unchanged.

    Raises:
        PolicyError: if the text is not a valid policy, or if the argument has another type.
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
    raise PolicyError(
        f"{policy!r} is not a policy.", hint='Use a Policy, a function of scores, or a text such as "entropy > 0.3".'
    )


def as_budgeted(policy: PolicyLike) -> "Budgeted":
    """The policy as a `Budgeted` policy, which may have no limits."""
    whole = as_policy(policy)
    return whole if isinstance(whole, Budgeted) else Budgeted(whole)


@dataclass(frozen=True)
class Function(Policy):
    """A policy made from a plain function.

    Raises:
        PolicyError: if the function does not return ``(N,) bool``.
    """

    function: Callable[[Scores], Selection]

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        selected = np.asarray(self.function(scores))
        if selected.shape != (len(scores),) or selected.dtype != bool:
            raise PolicyError(
                f"Policy {str(self)!r} returned {selected.dtype} of shape {selected.shape} for {len(scores)} images.",
                hint=f"Return an array of {len(scores)} booleans, one per image.",
            )
        return selected

    def __str__(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


@dataclass(frozen=True)
class All(Policy):
    """Escalates the images that all parts select."""

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
"""Escalates every image. It does not appear in the string form."""


@dataclass(frozen=True)
class AnyOf(Policy):
    """Escalates the images that at least one part selects.

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
    """Escalates the images that the other policy does not select, and reverses the order of images.

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
    """Escalates the best images among the images that a policy selects, within limits for the whole run.

    The images are ordered by the policy. If the policy has no order, they are ordered by the expected gain or, without a model of
    the judge, by the entropy. A limit on the accuracy always orders them by the expected gain.
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
        """The value of ``spending.recent`` for the next batch."""
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
    """The error for a policy that needs the expected gain in a stage that has no model of its judge."""
    return PolicyError(
        f"The policy '{policy}' needs a calibration.",
        hint='Make a calibration with cascadevlm calibrate, and set calibration = "FILE" in the configuration.',
    )


def _both(*policies: Policy) -> Policy:
    """All parts of the policies, joined by ``&``, with all limits of the policies."""
    selecting = [policy.policy if isinstance(policy, Budgeted) else policy for policy in policies]
    limits = tuple(limit for policy in policies if isinstance(policy, Budgeted) for limit in policy.limits)
    every = All(_flat(All, *selecting))
    return Budgeted(every, limits) if limits else every


def _flat(kind: type[All] | type[AnyOf], *policies: Policy) -> tuple[Policy, ...]:
    """The policies. A policy of the given kind is replaced by its parts."""
    return tuple(part for policy in policies for part in (policy.parts if isinstance(policy, kind) else (policy,)))


def _refuse_limits(policy: Policy) -> None:
    """Raise PolicyError if a part has limits. With ``|`` or ``~``, the effect of a limit would depend on the batches of a run."""
    if any(isinstance(part, Budgeted) for part in policy.parts):
        raise PolicyError(
            f"'{policy}' has a limit such as calls or deferral inside | or ~; a limit must stand alone or after &.",
            hint="For example: (entropy > 0.3 | margin < 0.1) & calls <= 500.",
        )


def _stream(wanted: Selection, priority: Priority, scores: Scores, spending: Spending) -> NDArray[np.float64]:
    """``(M + N, 3) float64``: value, price and probability of the best label, of M remembered images, then of the N images."""
    prices, sure = spending.prices or np.zeros(len(wanted)), measures.top_probability(scores)
    batch = np.column_stack([np.where(wanted, priority.values, LEAST), prices, sure])
    return np.concatenate([np.reshape(spending.recent, (-1, 3)), batch])


def _joined(operator: str, reasons: list[list[str]]) -> list[str]:
    return [operator.join(each) for each in zip(*reasons, strict=True)]


def number(value: float) -> str:
    """A number in the string form: in short notation if this notation is exact."""
    short = f"{value:g}"
    return short if float(short) == value else str(value)


def require_whole(name: str, value: float) -> None:
    """Check that a value is a whole number of at least 0.

    Raises:
        PolicyError: if it is not. The message names the parameter.
    """
    if not (0 <= value < math.inf and value == int(value)):
        raise PolicyError(f"{name} must be a whole number of at least 0, not {value!r}.")

"""Limits on calls and dollars: policies that spend them on the best of what others want, over a whole run.

Over a batch this is exact. Where more are to come, a batch gets what it would have a right to if they were like the latest ones:
all above the quantile of what is ranked that leaves as large a share, of calls or of dollars, as there is left. Where it is not
known how many are to come, a limit is spent as they come.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cascadevlm.base.errors import PolicyError
from cascadevlm.base.types import NANODOLLARS, Scores
from cascadevlm.policies import measures
from cascadevlm.policies.base import START, Limit, Priority, Selection, Spending, number, require_whole
from cascadevlm.policies.measures import Measure, Values

WINDOW = 1024
"""How many of the latest images are remembered: what share of them is above a threshold is known to 1 to 2 points."""

LEAST = float(np.finfo(np.float32).min)
"""The priority of what another part of a policy leaves out; JSON knows no infinity."""

HALF = 0.5 / NANODOLLARS
"""Half the least price, in dollars: sums of prices are exact to that."""


@dataclass(frozen=True)
class WithinBudget(Limit):
    """Ask about the least certain images, as many as there is left for over the whole run; about those of the highest gain, where
    the stage has a model of its judge."""

    gain: Measure | None = field(default=None, kw_only=True, repr=False)

    @abstractmethod
    def share_out(self, wanted: Selection, ranked: Values, prices: Values, spending: Spending, *, by_gain: bool) -> Selection:
        """Whom of the N wanted to ask.

        Args:
            wanted: N booleans.
            ranked: the priorities of M images remembered and of the N.
            prices: M + N dollars.
            spending: where the run stands.
            by_gain: whether the priorities are expected gains.
        """

    @property
    def priority(self) -> Priority:
        return Priority(measures.entropy) if self.gain is None else Priority(self.gain, is_gain=True)

    def informed(self, gain: Measure) -> Self:
        return replace(self, gain=gain)

    def select(self, scores: Scores, spending: Spending = START) -> Selection:
        return self.within(np.ones(len(scores), dtype=bool), None, scores, spending)

    def within(self, wanted: Selection, priority: Priority | None, scores: Scores, spending: Spending) -> Selection:
        if not wanted.any():
            return wanted
        priority = priority or self.priority
        ranked, prices = _stream(wanted, priority, scores, spending).T
        return self.share_out(wanted, ranked, prices, spending, by_gain=priority.is_gain)

    def remembered(self, scores: Scores, spending: Spending) -> tuple[float, ...]:
        return self.memory(np.ones(len(scores), dtype=bool), None, scores, spending)

    def memory(self, wanted: Selection, priority: Priority | None, scores: Scores, spending: Spending) -> tuple[float, ...]:
        return tuple(_stream(wanted, priority or self.priority, scores, spending)[-WINDOW:].ravel().tolist())


@dataclass(frozen=True)
class WithinCalls(WithinBudget):
    """``calls <= N``: `WithinBudget` of so many questions."""

    comparison = "<="
    calls: int

    def __post_init__(self) -> None:
        require_whole("calls", self.calls)

    def most_calls(self, price: float) -> float:
        return self.calls

    def share_out(self, wanted: Selection, ranked: Values, prices: Values, spending: Spending, *, by_gain: bool) -> Selection:
        left, to_come = self.calls - spending.calls, spending.remaining
        return _shared_out(wanted, ranked, np.ones(len(ranked)), left=left, to_come=to_come, surely=to_come)

    def __str__(self) -> str:
        return f"calls <= {number(self.calls)}"


@dataclass(frozen=True)
class WithinDollars(WithinBudget):
    """``dollars <= X``: `WithinBudget` of so much money. Of gains it buys the most it can: the highest for its price comes first.

    Images to come are counted at the mean price so far. Prices are expectations; what may be spent in fact is the ledger's to
    enforce. Judges that cost nothing are not kept from anything.
    """

    comparison = "<="
    dollars: float

    def __post_init__(self) -> None:
        if not 0 <= self.dollars < math.inf:
            raise PolicyError(f"dollars takes an amount from 0 on, not {self.dollars!r}.")

    @property
    def by_price(self) -> bool:
        return True

    def most_calls(self, price: float) -> float:
        return self.dollars / price if price else math.inf

    def share_out(self, wanted: Selection, ranked: Values, prices: Values, spending: Spending, *, by_gain: bool) -> Selection:
        if not any(spending.prices):
            return wanted
        if by_gain:
            ranked = ranked / np.maximum(prices, HALF)
        usual = (spending.dollars_for_all + sum(spending.prices)) / (spending.images + len(wanted))
        to_come = usual * spending.remaining
        surely = max(to_come - 2 * float(prices.std()) * math.sqrt(spending.remaining), 0.0)  # two standard deviations less
        left = self.dollars - spending.dollars + HALF
        return _shared_out(wanted, ranked, prices, left=left, to_come=to_come, surely=surely)

    def __str__(self) -> str:
        return f"dollars <= {number(self.dollars)}"


def _stream(wanted: Selection, priority: Priority, scores: Scores, spending: Spending) -> NDArray[np.float64]:
    """(M + N) x 2: the priority and the price of M images remembered and of the N of a batch."""
    ranked = np.where(wanted, priority.measure(scores), LEAST)
    latest = np.column_stack([ranked, spending.prices or np.zeros(len(scores))])
    return np.concatenate([np.reshape(spending.recent, (-1, 2)), latest])


def _shared_out(wanted: Selection, ranked: Values, costs: Values, *, left: float, to_come: float, surely: float) -> Selection:
    """Of the wanted, the best that ``left`` is spent on now, if asking about all images to come costs ``to_come``, and ``surely``
    no less than that: those that the batch is entitled to, at least what could not be spent later, and none that there is too
    little left for."""
    own, cost = ranked[-len(wanted) :], costs[-len(wanted) :]
    entitled = _entitled(ranked, costs, len(wanted), left / max(cost.sum() + to_come, HALF))
    asked, spent = np.zeros(len(wanted), dtype=bool), 0.0
    for index in np.argsort(-own, kind="stable"):
        if spent + cost[index] / 2 > entitled and spent >= left - surely:
            break
        if wanted[index] and spent + cost[index] <= left:
            asked[index] = True
            spent += cost[index]
    return asked


def _entitled(ranked: Values, costs: Values, batch: int, share: float) -> float:
    """What the images of a batch, the last ones, cost that are among the best ``share`` of all; of equals, the same part
    everywhere."""
    best_first = np.argsort(-ranked, kind="stable")
    reached = np.cumsum(costs[best_first])
    reach = min(share, 1) * reached[-1]
    threshold = np.append(ranked[best_first], -np.inf)[np.searchsorted(reached, reach, side="right")]
    above, equal = ranked > threshold, ranked == threshold
    part = (reach - costs[above].sum()) / max(costs[equal].sum(), HALF)
    return float((costs * (above + part * equal))[-batch:].sum())

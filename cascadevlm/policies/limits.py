"""Limits on calls and dollars, spent on the best of the images that a policy selects over a whole run.

Over a single batch a limit is exact. If more images are to come, a batch gets its fair share: the images above the quantile of
the latest images that leaves as large a share, of calls or of dollars, as is left for the rest of the run. If the number of
images is not known, a limit is spent as the images come.
"""

import math
from dataclasses import dataclass

import numpy as np

from cascadevlm.base.errors import PolicyError
from cascadevlm.base.types import NANODOLLARS
from cascadevlm.policies.base import Limit, Selection, Spending, number, require_whole
from cascadevlm.policies.measures import Values

HALF = 0.5 / NANODOLLARS
"""Half of the smallest price, in dollars: sums of prices are exact to this amount."""


@dataclass(frozen=True)
class WithinCalls(Limit):
    """``calls <= N``: at most N questions."""

    calls: int

    def __post_init__(self) -> None:
        require_whole("calls", self.calls)

    def most_calls(self, price: float) -> float:
        return self.calls

    def within(self, wanted: Selection, ranked: Values, prices: Values, spending: Spending, *, by_gain: bool) -> Selection:
        left, to_come = self.calls - spending.calls, spending.remaining
        return _shared_out(wanted, ranked, np.ones(len(ranked)), left=left, to_come=to_come, surely=to_come)

    def __str__(self) -> str:
        return f"calls <= {number(self.calls)}"


@dataclass(frozen=True)
class WithinDollars(Limit):
    """``dollars <= X``: questions for at most X dollars. If images are ranked by gain, the highest gain per dollar comes first.

    Images to come are counted at the mean price so far. Prices are expectations; the ledger of the run enforces what is really
    spent. Judges that cost nothing are not limited.
    """

    by_price = True
    dollars: float

    def __post_init__(self) -> None:
        if not 0 <= self.dollars < math.inf:
            raise PolicyError(f"dollars takes an amount from 0 on, not {self.dollars!r}.")

    def most_calls(self, price: float) -> float:
        return self.dollars / price if price else math.inf

    def within(self, wanted: Selection, ranked: Values, prices: Values, spending: Spending, *, by_gain: bool) -> Selection:
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


def _shared_out(wanted: Selection, ranked: Values, costs: Values, *, left: float, to_come: float, surely: float) -> Selection:
    """Boolean mask (N,) of the wanted images that are asked about now.

    A batch spends what it is entitled to, and at least what could not be spent later. Images that cost more than is left are
    passed over.

    Args:
        left: what may be spent from now on.
        to_come: expected cost of all images to come.
        surely: what all images to come cost at least.
    """
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
    """Cost of the images of a batch, the last ones, that are among the best ``share`` of all. If several images are equal at the
    border, the same part of each counts."""
    best_first = np.argsort(-ranked, kind="stable")
    reached = np.cumsum(costs[best_first])
    reach = min(share, 1) * reached[-1]
    threshold = np.append(ranked[best_first], -np.inf)[np.searchsorted(reached, reach, side="right")]
    above, equal = ranked > threshold, ranked == threshold
    part = (reach - costs[above].sum()) / max(costs[equal].sum(), HALF)
    return float((costs * (above + part * equal))[-batch:].sum())

"""Limits on calls and dollars. A limit is spent on the best of the images that a policy selects over a whole run.

The last batch may spend all that is left of the limit. An earlier batch gets a share. Let s be the calls (or dollars) left,
divided by the calls (or dollars) that all images of this batch and of later batches would need. An image of the batch is
escalated if it is among the best share s of the latest images. If the number of images is unknown, each batch may spend all
that is left.
"""

import math
from dataclasses import dataclass

import numpy as np

from cascadevlm.base.errors import PolicyError
from cascadevlm.base.types import NANODOLLARS
from cascadevlm.policies.base import Limit, Selection, Spending, number, require_whole
from cascadevlm.policies.measures import Values

HALF = 0.5 / NANODOLLARS
"""Half of the smallest price, in US dollars. Sums of prices are exact to this amount."""


@dataclass(frozen=True)
class WithinCalls(Limit):
    """``calls <= N``: at most N questions in a run."""

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
    """``dollars <= X``: questions for at most X US dollars in a run.

    If images are ordered by gain, the highest gain per dollar comes first. The price of a later image is estimated by the mean
    price so far. All prices are expected prices; the run's ledger limits the money that is really spent. A judge that costs
    nothing is not limited.
    """

    by_price = True
    dollars: float

    def __post_init__(self) -> None:
        if not 0 <= self.dollars < math.inf:
            raise PolicyError(f"dollars must be an amount of at least 0, not {self.dollars!r}.")

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
    """Select the wanted images that are escalated in this batch.

    A batch spends its share of the limit, and at least the amount that later images could not spend. An image that costs more
    than the amount left is skipped.

    Args:
        wanted: ``(N,) bool``, True for each image that the policy selects.
        ranked: ``(M + N,) float``, values of M remembered images, then of the N images.
        costs: ``(M + N,) float``, costs of the same images, in calls or US dollars.
        left: the amount that the limit still allows.
        to_come: expected cost of all later images.
        surely: minimum cost of all later images.

    Returns:
        ``(N,) bool``: True for each image that is escalated now.
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
    """The cost of the images of a batch that are among the best ``share`` of all images. The last ``batch`` images are the batch.

    If several images have the value at the boundary, an equal part of each image is counted.
    """
    best_first = np.argsort(-ranked, kind="stable")
    reached = np.cumsum(costs[best_first])
    reach = min(share, 1) * reached[-1]
    threshold = np.append(ranked[best_first], -np.inf)[np.searchsorted(reached, reach, side="right")]
    above, equal = ranked > threshold, ranked == threshold
    part = (reach - costs[above].sum()) / max(costs[equal].sum(), HALF)
    return float((costs * (above + part * equal))[-batch:].sum())

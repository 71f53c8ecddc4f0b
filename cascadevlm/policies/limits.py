"""Limits on calls, dollars, the share of escalated images and the accuracy.

A limit is spent on the best of the images that a policy selects over a whole run.

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
from cascadevlm.policies.base import Latest, Limit, Selection, Spending, number, require_whole
from cascadevlm.policies.measures import Values

RECENT = 256
"""Number of remembered images that `deferral` and `accuracy` use. If a scorer learns, the gain changes little over so few."""

ROUNDING = 1e-9
"""A number of calls that is smaller than a whole number by at most this amount counts as the whole number."""

HALF = 0.5 / NANODOLLARS
"""Half of the smallest price, in US dollars. Sums of prices are exact to this amount."""


@dataclass(frozen=True)
class WithinCalls(Limit):
    """``calls <= N``: at most N questions in a run."""

    calls: int

    def __post_init__(self) -> None:
        require_whole("calls", self.calls)

    def most_calls(self, price: float, images: int) -> float:
        return self.calls

    def within(self, wanted: Selection, latest: Latest, spending: Spending) -> Selection:
        left, to_come = self.calls - spending.calls, spending.remaining or 0.0
        share = left / max(len(wanted) + to_come, 1)
        return _shared_out(wanted, latest.values, np.ones(len(latest.values)), left=left, share=share, surely=to_come)

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

    def most_calls(self, price: float, images: int) -> float:
        return self.dollars / price if price else math.inf

    def within(self, wanted: Selection, latest: Latest, spending: Spending) -> Selection:
        if not any(spending.prices):
            return wanted
        prices, remaining = latest.prices, spending.remaining or 0.0
        ranked = latest.values / np.maximum(prices, HALF) if latest.is_gain else latest.values
        usual = (spending.dollars_for_all + sum(spending.prices)) / (spending.images + len(wanted))
        to_come = usual * remaining
        surely = max(to_come - 2 * float(prices.std()) * math.sqrt(remaining), 0.0)  # two standard deviations less
        left = self.dollars - spending.dollars + HALF
        share = left / max(sum(spending.prices) + to_come, HALF)
        return _shared_out(wanted, ranked, prices, left=left, share=share, surely=surely)

    def __str__(self) -> str:
        return f"dollars <= {number(self.dollars)}"


@dataclass(frozen=True)
class WithinShare(Limit):
    """``deferral <= S``: at most the share S of the images, from 0 to 1, is escalated.

    If the number of images is known, the share is exact at the end, rounded down to a whole image, as far as the policy selects
    enough images. If the number is unknown, a batch escalates its images that are among the best share S of the latest images.
    The share of all images so far is then never above S. If that share is below S, the next `RECENT` images get more.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise PolicyError(f"deferral must be a share from 0 to 1, not {self.share!r}.")

    def most_calls(self, price: float, images: int) -> float:
        return self.share * images

    def within(self, wanted: Selection, latest: Latest, spending: Spending) -> Selection:
        decided, ahead = spending.images + len(wanted), spending.remaining
        left = math.floor(self.share * (decided + (ahead or 0.0)) + ROUNDING) - spending.calls
        later = RECENT if ahead is None else ahead
        share = (self.share * (decided + later) - spending.calls) / (len(wanted) + later)
        surely = math.inf if ahead is None else ahead
        values = latest.values[-(RECENT + len(wanted)) :]
        return _shared_out(wanted, values, np.ones(len(values)), left=left, share=share, surely=surely)

    def __str__(self) -> str:
        return f"deferral <= {number(self.share)}"


@dataclass(frozen=True)
class AccuracyAtLeast(Limit):
    """``accuracy >= T``: escalates as few images as needed for a mean expected accuracy of T, from 0 to 1.

    The mean is over the latest images and the batch. The expected accuracy of an image is the probability of its best label, plus
    the expected gain if the judge is asked; its quality is that of the calibration. Images with the highest expected gain come
    first. If T is out of reach, every image with a positive gain is escalated.

    Raises:
        PolicyError: when deciding, if the stage has no model of its judge.
    """

    comparison = ">="
    by_gain = True
    accuracy: float

    def __post_init__(self) -> None:
        if not 0 <= self.accuracy <= 1:
            raise PolicyError(f"accuracy must be a number from 0 to 1, not {self.accuracy!r}.")

    def most_calls(self, price: float, images: int) -> float:
        return images

    def within(self, wanted: Selection, latest: Latest, spending: Spending) -> Selection:
        values, sure = latest.values[-(RECENT + len(wanted)) :], latest.sure[-(RECENT + len(wanted)) :]
        missing = self.accuracy * len(sure) - float(sure.sum())
        best_first = np.argsort(-values, kind="stable")
        gained = np.cumsum(np.maximum(values[best_first], 0.0))
        needed = best_first[: np.searchsorted(gained, missing) + 1] if missing > 0 else best_first[:0]
        asked = np.zeros(len(values), dtype=bool)
        asked[needed] = values[needed] > 0
        return wanted & asked[-len(wanted) :]

    def __str__(self) -> str:
        return f"accuracy >= {number(self.accuracy)}"


def _shared_out(wanted: Selection, ranked: Values, costs: Values, *, left: float, share: float, surely: float) -> Selection:
    """Select the wanted images that are escalated in this batch.

    A batch spends its share of the limit, and at least the amount that later images could not spend. An image that costs more
    than the amount left is skipped.

    Args:
        wanted: ``(N,) bool``, True for each image that the policy selects.
        ranked: ``(M + N,) float``, values of M remembered images, then of the N images.
        costs: ``(M + N,) float``, costs of the same images, in calls or US dollars.
        left: the amount that the limit still allows.
        share: the part of the cost of this batch and of all later images that may be spent.
        surely: minimum cost of all later images.

    Returns:
        ``(N,) bool``: True for each image that is escalated now.
    """
    own, cost = ranked[-len(wanted) :], costs[-len(wanted) :]
    entitled = _entitled(ranked, costs, len(wanted), share)
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

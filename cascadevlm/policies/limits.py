"""Limits on calls, dollars, the share of images asked about and the accuracy, over what a policy selects in a whole run.

Over a single batch a limit is exact. If more images are to come, a batch gets its fair share: the images above the quantile of
the latest images that leaves as large a share, of calls or of dollars, as is left for the rest of the run. If the number of
images is not known, a limit on calls or dollars is spent as the images come.
"""

import math
from dataclasses import dataclass

import numpy as np

from cascadevlm.base.errors import PolicyError
from cascadevlm.base.types import NANODOLLARS
from cascadevlm.policies.base import Latest, Limit, Selection, Spending, number, require_whole
from cascadevlm.policies.measures import Values

RECENT = 256
"""Number of remembered images that a share and an accuracy look at: what a scorer learns has changed little over them."""

ROUNDING = 1e-9
"""How much less than a whole number of questions still is one."""

HALF = 0.5 / NANODOLLARS
"""Half of the smallest price, in dollars: sums of prices are exact to this amount."""


@dataclass(frozen=True)
class WithinCalls(Limit):
    """``calls <= N``: at most N questions."""

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
    """``dollars <= X``: questions for at most X dollars. If images are ranked by gain, the highest gain per dollar comes first.

    Images to come are counted at the mean price so far. Prices are expectations; the ledger of the run enforces what is really
    spent. Judges that cost nothing are not limited.
    """

    by_price = True
    dollars: float

    def __post_init__(self) -> None:
        if not 0 <= self.dollars < math.inf:
            raise PolicyError(f"dollars takes an amount from 0 on, not {self.dollars!r}.")

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
    """``deferral <= S``: at most the share S of the images, from 0 to 1, and no less as far as the policy selects so many.

    If the number of images is known, the share is exact at the end, rounded down to a whole image. If the number is not known, a
    batch gets the images above the quantile of the latest images, and no more than S of the images so far were ever asked about;
    what was not asked about is made up for over the next `RECENT` images.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise PolicyError(f"deferral takes a share from 0 to 1, not {self.share!r}.")

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
    """``accuracy >= T``: the fewest questions by which the mean expected accuracy of the latest images and the batch reaches T,
    from 0 to 1; those of the highest expected gain. If T is out of reach, every question that has a gain is asked.

    The expected accuracy of an image is the probability of its best label and, if the judge is asked, the expected gain. It is as
    good as the calibration.

    Raises:
        PolicyError: when deciding, if the stage has no model of its judge.
    """

    comparison = ">="
    by_gain = True
    accuracy: float

    def __post_init__(self) -> None:
        if not 0 <= self.accuracy <= 1:
            raise PolicyError(f"accuracy takes a number from 0 to 1, not {self.accuracy!r}.")

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
    """Boolean mask (N,) of the wanted images that are asked about now.

    A batch spends what it is entitled to, and at least what could not be spent later. Images that cost more than is left are
    passed over.

    Args:
        left: what may be spent from now on.
        share: part of the cost of all images from now on that may be spent.
        surely: what all images to come cost at least.
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
    """Cost of the images of a batch, the last ones, that are among the best ``share`` of all. If several images are equal at the
    border, the same part of each counts."""
    best_first = np.argsort(-ranked, kind="stable")
    reached = np.cumsum(costs[best_first])
    reach = min(share, 1) * reached[-1]
    threshold = np.append(ranked[best_first], -np.inf)[np.searchsorted(reached, reach, side="right")]
    above, equal = ranked > threshold, ranked == threshold
    part = (reach - costs[above].sum()) / max(costs[equal].sum(), HALF)
    return float((costs * (above + part * equal))[-batch:].sum())

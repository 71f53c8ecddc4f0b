"""What a run will take, told before it begins: calls, dollars and minutes, from a sample of the images."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress

import numpy as np
from scipy.stats import binomtest

from cascadevlm.base.errors import ImageError, InputError
from cascadevlm.base.images import ImageSource
from cascadevlm.base.types import NANODOLLARS, Question, Scores
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.judges.base import Judge
from cascadevlm.policies.base import Spending, as_budgeted
from cascadevlm.scorers.base import Prepared, prepared_or_error, scored_or_errors

SAMPLE = 200
"""Images scored, unless asked otherwise: the share escalated is then known to about seven points."""

SECONDS_PER_CALL = 4.0
"""What a hosted model takes over an image and a short answer, for want of a measurement."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one stage will take.

    Attributes:
        judge: its spec.
        images: that the run has.
        sample: how many of them were looked at.
        deferral_rate: the share that the policy escalates, within its limits; images that cannot be read are not.
        deferral_range: its 95 % confidence interval (Wilson 1927), but for limits.
        calls: how many questions that is; those already in the cache are not taken off.
        dollars: what they usually cost, by the rules for images, four bytes of text a token and answers a third of their limit.
        dollars_range: from the interval's lower end at that price to its upper end at the worst case of every question.
        minutes: at the judge's concurrency and rate limits; 0 where the judge charges nothing, as nothing is known of its speed.
    """

    judge: str
    images: int
    sample: int
    deferral_rate: float
    deferral_range: tuple[float, float]
    calls: int
    dollars: float
    dollars_range: tuple[float, float]
    minutes: float


def estimate(
    cascade: Cascade, images: Sequence[ImageSource], *, total: int | None = None, sample: int = SAMPLE, seed: int = 0
) -> list[Estimate]:
    """What every stage will take, by a random sample of the images; no judge is asked.

    ``total`` is how many images there will be, where these are themselves drawn at random from them.

    A later stage is taken to get all that its predecessor was asked about or, with routing, all images. Of limits on calls and
    dollars all is taken to be left, and spent at the mean price. The cache, and answers that have to be asked for twice, are left
    out of account.

    Raises:
        InputError: if there are no images.
        ImageError: if none of the sample can be read.
        BackendError: if the price of a judge is unknown.
        PermanentError: if a question may take more tokens than the price is known for.
    """
    if not images:
        raise InputError("There are no images.")
    total = len(images) if total is None else total
    looked_at = np.sort(np.random.default_rng(seed).permutation(len(images))[:sample])
    readable, scores = _scored(cascade, [images[index] for index in looked_at])
    escalated, kept = np.ones(len(readable), dtype=bool), 1.0
    estimates = []
    for stage in cascade.stages:
        judge, budgeted = stage.by_votes(stage.judge), as_budgeted(stage.policy)
        questions = [
            stage.question(prepared.unread, candidates)
            for prepared, candidates in zip(readable, stage.candidates.choose(scores), strict=True)
        ]
        prices = _usual(judge, questions) if budgeted.policy.by_price else ()
        selected = budgeted.policy.select(scores, Spending(prices=prices, gain=stage.gain(scores)))
        escalated = selected & (escalated | cascade.routing)
        priced = escalated if escalated.any() else ~escalated  # where none is asked about, all say what one would cost
        usual, worst, tokens = _mean_price(judge, list(compress(questions, priced)))
        rate = float(escalated.sum() / len(looked_at)) * kept
        interval = binomtest(int(escalated.sum()), len(looked_at)).proportion_ci(method="wilson")
        most = min((limit.most_calls(usual, total) / total for limit in budgeted.limits), default=1.0)
        low, high = (min(float(end) * kept, most) for end in (interval.low, interval.high))
        calls = round(min(rate, most) * total)
        estimates.append(
            Estimate(
                judge=stage.judge.spec,
                images=total,
                sample=len(looked_at),
                deferral_rate=min(rate, most),
                deferral_range=(low, high),
                calls=calls,
                dollars=calls * usual,
                dollars_range=(low * total * usual, math.ceil(high * total) * worst * (1 + stage.widen)),
                minutes=_minutes(judge, calls, tokens) if worst else 0.0,
            )
        )
        if rate > most and not cascade.routing:
            kept *= most / rate
    return estimates


def _scored(cascade: Cascade, images: Sequence[ImageSource]) -> tuple[list[Prepared], Scores]:
    """Those that can be read, and their scores; no more of them decoded at once than the cascade would have."""
    readable: list[Prepared] = []
    parts: list[Scores] = []
    cascade.scorer.load()
    with ThreadPoolExecutor() as readers:
        for start in range(0, len(images), cascade.batch_size):
            batch = images[start : start + cascade.batch_size]
            read = list(readers.map(partial(prepared_or_error, cascade.scorer), batch))
            if prepared := [each for each in read if isinstance(each, Prepared)]:
                scores, errors = scored_or_errors(cascade.scorer, prepared, cascade.labels)
                parts += [scores] if scores else []
                readable += [Prepared(source=each.source) for each, error in zip(prepared, errors, strict=True) if error is None]
    if not parts:
        raise ImageError("None of the images sampled can be read.")
    return readable, replace(parts[0], log_probs=np.concatenate([part.log_probs for part in parts]))


def _usual(judge: Judge, questions: Sequence[Question]) -> tuple[float, ...]:
    """What each question usually costs, in dollars."""
    return tuple(judge.usual_case(question) / NANODOLLARS for question in questions)


def _mean_price(judge: Judge, questions: Sequence[Question]) -> tuple[float, float, float]:
    """Of some questions: usual dollars, most dollars, most tokens."""
    worst = [(judge.worst_case(question) / NANODOLLARS, judge.worst_case_tokens(question)) for question in questions]
    dollars, tokens = (float(mean) for mean in np.mean(worst, axis=0))
    return float(np.mean(_usual(judge, questions))), dollars, tokens


def _minutes(judge: Judge, calls: int, tokens: float) -> float:
    minutes = [calls * SECONDS_PER_CALL / judge.concurrency / 60]
    if judge.requests_per_minute:
        minutes.append(calls / judge.requests_per_minute)
    if judge.tokens_per_minute:
        minutes.append(calls * tokens / judge.tokens_per_minute)
    return max(minutes)

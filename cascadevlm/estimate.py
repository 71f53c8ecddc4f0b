"""What a run will take, told before it begins: calls, dollars and minutes, from a sample of the images."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from cascadevlm.budget import NANODOLLARS
from cascadevlm.cascade import Cascade
from cascadevlm.errors import ImageError, InputError
from cascadevlm.images import ImageSource, load_image
from cascadevlm.judge import Judge
from cascadevlm.stage import Stage
from cascadevlm.types import Scores

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
        deferral_rate: the share that the policy escalates; images that cannot be read are not.
        deferral_range: its 95 % confidence interval (Wilson 1927).
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

    A later stage is taken to get all that its predecessor was asked about or, with routing, all images. Limits on calls and
    dollars, the cache, and answers that have to be asked for twice are left out of account.

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
    readable, scores = _score(cascade, [images[index] for index in looked_at])
    escalated = np.ones(len(readable), dtype=bool)
    estimates = []
    for stage in cascade.stages:
        judge = stage.by_votes(stage.judge)
        escalated = stage.informed_policy.select(scores) & (escalated | cascade.routing)
        priced = escalated if escalated.any() else ~escalated  # where none is asked about, all say what one would cost
        usual, worst, tokens = _mean_price(stage, judge, readable, scores, priced)
        rate = int(escalated.sum()) / len(looked_at)
        interval = binomtest(int(escalated.sum()), len(looked_at)).proportion_ci(method="wilson")
        calls = round(rate * total)
        estimates.append(
            Estimate(
                judge=stage.judge.spec,
                images=total,
                sample=len(looked_at),
                deferral_rate=rate,
                deferral_range=(float(interval.low), float(interval.high)),
                calls=calls,
                dollars=calls * usual,
                dollars_range=(
                    float(interval.low) * total * usual,
                    math.ceil(float(interval.high) * total) * worst * (1 + stage.widen),
                ),
                minutes=_minutes(judge, calls, tokens) if worst else 0.0,
            )
        )
    return estimates


def _score(cascade: Cascade, images: Sequence[ImageSource]) -> tuple[list[ImageSource], Scores]:
    """Those that can be read, and their scores; no more of them decoded at once than the cascade would have."""
    readable: list[ImageSource] = []
    parts: list[Scores] = []
    for start in range(0, len(images), cascade.batch_size):
        pictures = []
        for source in images[start : start + cascade.batch_size]:
            try:
                pictures.append(load_image(source))
            except ImageError:
                continue
            readable.append(source)
        if pictures:
            parts.append(cascade.scorer.score(pictures, cascade.labels))
    if not parts:
        raise ImageError("None of the images sampled can be read.")
    return readable, replace(parts[0], log_probs=np.concatenate([part.log_probs for part in parts]))


def _mean_price(
    stage: Stage, judge: Judge, images: Sequence[ImageSource], scores: Scores, priced: NDArray[np.bool_]
) -> tuple[float, float, float]:
    """Of the questions about some of the images: usual dollars, most dollars, most tokens."""
    prices = []
    for source, candidates, wanted in zip(images, stage.candidates.choose(scores), priced, strict=True):
        if wanted:
            question = stage.question(load_image(source), candidates)
            prices.append((judge.usual_case(question), judge.worst_case(question), judge.worst_case_tokens(question)))
    usual, worst, tokens = (float(mean) for mean in np.mean(prices, axis=0))
    return usual / NANODOLLARS, worst / NANODOLLARS, tokens


def _minutes(judge: Judge, calls: int, tokens: float) -> float:
    minutes = [calls * SECONDS_PER_CALL / judge.concurrency / 60]
    if judge.requests_per_minute:
        minutes.append(calls / judge.requests_per_minute)
    if judge.tokens_per_minute:
        minutes.append(calls * tokens / judge.tokens_per_minute)
    return max(minutes)

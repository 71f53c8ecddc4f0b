"""What a run will take, told before it begins: calls, dollars and minutes, from a sample of the images."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from cascadevlm.budget import NANODOLLARS
from cascadevlm.cascade import Cascade
from cascadevlm.engine import Stage
from cascadevlm.errors import ImageError
from cascadevlm.images import ImageSource, load_image
from cascadevlm.policy import as_policy

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
        sample: how many of them were scored.
        deferral_rate: the share that the policy escalates.
        deferral_range: its 95 % confidence interval (Wilson 1927).
        calls: how many questions that is; those already in the cache are not taken off.
        dollars: what they usually cost, by the rules for images, four bytes of text a token and answers a third of their limit.
        dollars_range: from the interval's lower end at that price to its upper end at the worst case of every question.
        minutes: at the judge's concurrency and rate limits; 0 where the judge runs on this machine.
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


def estimate(cascade: Cascade, images: Sequence[ImageSource], *, sample: int = SAMPLE, seed: int = 0) -> list[Estimate]:
    """What every stage will take, by a random sample of the images; no judge is asked.

    A later stage is taken to get all that its predecessor was asked about. Limits on calls and dollars, the cache, and answers
    that have to be asked for twice are left out of account.

    Raises:
        ImageError: if none of the sample can be read.
        BackendError: if the price of a judge is unknown.
    """
    pictures = []
    for index in sorted(np.random.default_rng(seed).permutation(len(images))[:sample]):
        try:
            pictures.append(load_image(images[index]))
        except ImageError:
            continue
    if not pictures:
        raise ImageError("None of the images sampled can be read.")
    scores = cascade.scorer.score(pictures, cascade.labels)
    escalated = np.ones(len(pictures), dtype=bool)
    estimates = []
    for stage in cascade.stages:
        escalated &= as_policy(stage.policy).select(scores)
        asked = zip(pictures, stage.candidates.choose(scores), escalated, strict=True)
        questions = [stage.question(picture, candidates) for picture, candidates, chosen in asked if chosen]
        usual = np.mean([stage.judge.usual_case(question) for question in questions] or [0]) / NANODOLLARS
        worst = np.mean([stage.judge.worst_case(question) for question in questions] or [0]) / NANODOLLARS
        rate = float(escalated.mean())
        interval = binomtest(int(escalated.sum()), len(pictures)).proportion_ci(method="wilson")
        calls = round(rate * len(images))
        estimates.append(
            Estimate(
                judge=stage.judge.spec,
                images=len(images),
                sample=len(pictures),
                deferral_rate=rate,
                deferral_range=(float(interval.low), float(interval.high)),
                calls=calls,
                dollars=float(calls * usual),
                dollars_range=(
                    float(interval.low * len(images) * usual),
                    float(math.ceil(interval.high * len(images)) * worst),
                ),
                minutes=_minutes(stage, calls) if worst else 0.0,
            )
        )
    return estimates


def _minutes(stage: Stage, calls: int) -> float:
    minutes = calls * SECONDS_PER_CALL / stage.judge.concurrency / 60
    limit = stage.judge.requests_per_minute
    return max(minutes, calls / limit) if limit else minutes

"""Estimates the calls, dollars and minutes of a run from a sample of its images, before the run starts."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, compress

import numpy as np

from cascadevlm.base.errors import ImageError, InputError
from cascadevlm.base.images import ImageSource
from cascadevlm.base.types import NANODOLLARS, Scores
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.cascade.learner import require_support, thresholds
from cascadevlm.cascade.stage import Stage
from cascadevlm.judges.base import Judge, Quote
from cascadevlm.policies.base import Selection, Spending, as_budgeted
from cascadevlm.scorers.base import Prepared, load_once, prepare_in, score_together

SAMPLE = 200
"""Default number of images to score. The escalated share is then known to about 7 percentage points."""

SECONDS_PER_CALL = 4.0
"""Assumed time of a hosted model for an image and a short answer, in seconds. It is not measured."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The estimate for one stage.

    Attributes:
        judge: spec of the judge.
        images: number of images of the run.
        sample: number of images that were scored for the estimate.
        deferral_rate: share of images that the policy escalates, within its limits, or that an audit draws. Images that cannot be
            read are not escalated.
        deferral_range: 95 % confidence interval of the escalated share (Wilson 1927), capped by the policy's limits. If an audit
            shows a broken promise, all later images are escalated: then the upper end is 1.
        calls: number of questions. Questions that are already in the cache are counted, too.
        dollars: usual cost of the calls. Images are counted by the provider's rule, a text has one token per four bytes, and an
            answer has a third of its maximum length.
        dollars_range: lowest and highest cost. The lowest cost is the lower end of ``deferral_range`` at the usual price; the
            highest is its upper end at the worst-case price.
        minutes: time of the run, computed from the judge's concurrency and rate limits. It is 0 if the judge charges nothing,
            because its speed is then not known.
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


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """The images that were scored for an estimate.

    Attributes:
        size: number of images, readable or not.
        total: number of images of the run.
        readable: the n images that can be read.
        scores: `(n, C)` scores of these images.
    """

    size: int
    total: int
    readable: Sequence[Prepared]
    scores: Scores


def estimate(
    cascade: Cascade, images: Sequence[ImageSource], *, total: int | None = None, sample: int = SAMPLE, seed: int = 0
) -> list[Estimate]:
    """The estimate for every stage, from a random sample of the images. No judge is asked.

    There are three assumptions. First, a later stage gets all images that the judge before it was asked about or, with routing,
    all images. Second, nothing is spent yet of a limit on calls or dollars, and every question has the mean price. Third, the
    cache is empty, and no question is asked twice.

    If the cascade learns, the estimate treats all images as the first images of a run. With ``gain > g``, a run that learns
    mostly asks fewer questions.

    Args:
        cascade: the cascade.
        images: the images, or a random sample of them.
        total: number of images of the run. Default: the number of ``images``.
        sample: number of images to score.
        seed: seed of the random sample.

    Raises:
        InputError: if there are no images.
        ImageError: if no image of the sample can be read.
        BackendError: if the price of a judge is unknown.
        PermanentError: if a question may take more tokens than the price is known for.
    """
    if not images:
        raise InputError("There are no images.")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(images))[:sample])
    readable, scores = _scored(cascade, [images[index] for index in chosen])
    if cascade.learns_from is not None:
        labelled = require_support(cascade.learns_from)
        fitted = thresholds(cascade.stages, labelled, labelled.taught(labelled.nothing()))
        scores = replace(replace(cascade.learns_from, teaches=True).calibrated(scores), thresholds=fitted)
    scored = _Sample(size=len(chosen), total=len(images) if total is None else total, readable=readable, scores=scores)
    reached, kept = np.ones(len(readable), dtype=bool), 1.0
    estimates = []
    for stage in cascade.stages:
        found, reached, rate = _of_stage(stage, scored, reached | cascade.routing, kept)
        estimates.append(found)
        if rate > found.deferral_rate and not cascade.routing:
            kept *= found.deferral_rate / rate
    return estimates


def _of_stage(stage: Stage, sample: _Sample, reached: Selection, kept: float) -> tuple[Estimate, Selection, float]:
    """The estimate of a stage, the images of the sample that its policy escalates, and their share without the policy's limits.

    Args:
        stage: the stage.
        sample: n readable images and their scores.
        reached: ``(n,)`` booleans: the image reaches the stage.
        kept: share of these images that the limits of earlier stages allow.
    """
    from scipy.stats import binomtest

    judge, budgeted = stage.by_votes(stage.judge), as_budgeted(stage.policy)
    questions = [
        stage.question(prepared.unread, candidates)
        for prepared, candidates in zip(sample.readable, stage.candidates.choose(sample.scores), strict=True)
    ]
    quotes = [judge.quote(question) for question in questions]
    prices = tuple(quote.usual_case / NANODOLLARS for quote in quotes) if budgeted.policy.by_price else ()
    escalated = reached & budgeted.policy.select(sample.scores, Spending(prices=prices, gain=stage.gain(sample.scores)))
    priced = escalated if escalated.any() else ~escalated  # if no image is escalated, the price is the mean over all images
    usual, worst, tokens = _means(list(compress(quotes, priced)))
    found = float(escalated.sum() / sample.size)
    interval = binomtest(int(escalated.sum()), sample.size).proportion_ci(method="wilson")
    most = min((limit.most_calls(usual, sample.total) / sample.total for limit in budgeted.limits), default=1.0)
    drawn = 0.0 if stage.audit is None else stage.audit.share
    share, low, high = (
        end + drawn * (1 - end) for end in (min(end * kept, most) for end in (found, interval.low, interval.high))
    )
    if stage.audit is not None and stage.audit.agree is not None:
        high = 1.0
    calls = round(share * sample.total)
    estimated = Estimate(
        judge=stage.judge.spec,
        images=sample.total,
        sample=sample.size,
        deferral_rate=share,
        deferral_range=(low, high),
        calls=calls,
        dollars=calls * usual,
        dollars_range=(low * sample.total * usual, math.ceil(high * sample.total) * worst * (1 + stage.widen)),
        minutes=_minutes(judge, calls, tokens) if worst else 0.0,
    )
    return estimated, escalated, found * kept


def _scored(cascade: Cascade, images: Sequence[ImageSource]) -> tuple[list[Prepared], Scores]:
    """The n images that can be read, and their `(n, C)` scores. One chunk of the cascade is decoded at a time."""
    readable: list[Prepared] = []
    chunks: list[Scores] = []
    load_once(cascade.scorer)
    with ThreadPoolExecutor() as readers:
        for start in range(0, len(images), cascade.batch_size):
            reading = prepare_in(readers, cascade.scorer, images[start : start + cascade.batch_size])
            read = list(chain.from_iterable(share.result() for share in reading))
            scored = score_together(cascade.scorer, read, cascade.labels)
            readable += [Prepared(source=each.source, size=each.size) for each in scored.images]
            chunks += [scored.scores] if scored.scores is not None else []
    if not chunks:
        raise ImageError("None of the images in the sample can be read.", hint="Check the paths and the formats of the images.")
    return readable, Scores.joined(chunks)


def _means(quotes: Sequence[Quote]) -> tuple[float, float, float]:
    """The means of usual dollars, worst-case dollars and tokens."""
    figures = [(quote.usual_case / NANODOLLARS, quote.worst_case / NANODOLLARS, quote.tokens) for quote in quotes]
    usual, worst, tokens = (float(mean) for mean in np.mean(figures, axis=0))
    return usual, worst, tokens


def _minutes(judge: Judge, calls: int, tokens: float) -> float:
    minutes = [calls * SECONDS_PER_CALL / judge.concurrency / 60]
    if judge.requests_per_minute:
        minutes.append(calls / judge.requests_per_minute)
    if judge.tokens_per_minute:
        minutes.append(calls * tokens / judge.tokens_per_minute)
    return max(minutes)

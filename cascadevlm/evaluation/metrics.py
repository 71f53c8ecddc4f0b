"""Metrics: how good a cascade, its scorer and its judge were, and what they took. Pure functions of arrays and of a `Record`.

Columns are columns of the score matrix, as in `cascadevlm.evaluation.record`: a prediction of `NOBODY` is an abstention and
never right.
A figure that no image tells anything about is None, or NaN within an array; never 0.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TypeAlias, cast, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.base.types import Outcome
from cascadevlm.evaluation.record import Judged, Record

DEPTHS = (1, 2, 3, 5, 10, 20)
"""The k of top-k recall that `evaluate` reports, as far as there are as many labels."""

BINS = 15
"""Of the expected calibration error, as Guo et al. 2017 have it."""

BATCH_VALUES = 4_000_000
"""How many resampled values are held at a time; more is slower and takes more memory."""

Bools: TypeAlias = NDArray[np.bool_]
Values: TypeAlias = NDArray[np.floating] | NDArray[np.bool_]

Interval: TypeAlias = tuple[float, float]
"""The lower and the upper end of a 95 % confidence interval."""


def mean(values: Values) -> float | None:
    """Of N numbers or booleans; None if there are none."""
    return float(values.mean()) if values.size else None


def accuracy(predicted: Columns, truths: Columns) -> float | None:
    """Share of N predictions that are the truth, from 0 to 1; abstentions are wrong."""
    return mean(predicted == truths)


def per_class_accuracy(predicted: Columns, truths: Columns, classes: int) -> NDArray[np.float64]:
    """The recall of each class: C numbers from 0 to 1, NaN for a class that none of the N images is of."""
    images = np.bincount(truths, minlength=classes)
    right = np.bincount(truths[predicted == truths], minlength=classes)
    shares: NDArray[np.float64] = np.divide(right, images, out=np.full(classes, np.nan), where=images > 0)
    return shares


def macro_average(per_class: NDArray[np.float64]) -> float | None:
    """The unweighted mean over the classes that have a figure; of per-class accuracy, this is balanced accuracy."""
    return mean(per_class[~np.isnan(per_class)])


def top_k_recall(scores: NDArray[np.floating], truths: Columns, ks: Sequence[int]) -> dict[int, float | None]:
    """How often the truth is among the k labels of the highest score: the ceiling of any cascade with k candidates.

    Of equal scores the one in the earlier column ranks higher, as it does where candidates are chosen.

    Args:
        scores: N x C, the higher the better.
        truths: N columns.
        ks: each from 1 to C.

    Returns:
        for every k a share of the N images, from 0 to 1.

    Raises:
        ValueError: if a k is not from 1 to C.
    """
    classes = scores.shape[1]
    if wrong := [k for k in ks if not 1 <= k <= classes]:
        raise ValueError(f"k = {wrong[0]} is not from 1 to {classes}")
    of_truth = np.take_along_axis(scores, truths[:, None], axis=1)
    before = np.arange(classes) < truths[:, None]
    ranks = (scores > of_truth).sum(axis=1) + ((scores == of_truth) & before).sum(axis=1)
    return {k: mean(ranks < k) for k in ks}


def coverage(candidates: Columns, truths: Columns) -> float | None:
    """How often the truth is among the candidates: N x K columns, `NOBODY` beyond the last. A share of N, from 0 to 1."""
    return mean(covered_by(candidates, truths))


def covered_by(candidates: Columns, truths: Columns) -> Bools:
    """N: whether the truth is among the candidates."""
    covered: Bools = (candidates == truths[:, None]).any(axis=1)
    return covered


def expected_calibration_error(confidences: NDArray[np.floating], right: Bools, *, bins: int = BINS) -> float | None:
    """How far confidence is from accuracy: |mean confidence - accuracy| of every bin, weighted by its share of the images.

    The bins are of equal width, each with its upper end and without its lower, except that the first holds 0 as well
    (Naeini, Cooper and Hauskrecht, "Obtaining Well Calibrated Probabilities Using Bayesian Binning", AAAI 2015;
    Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, equations 2 to 5).

    Args:
        confidences: N probabilities of the predicted labels, from 0 to 1.
        right: N, whether the predicted label is the truth.

    Returns:
        a number from 0 (calibrated) to 1.
    """
    if not confidences.size:
        return None
    of_bin = np.searchsorted(np.arange(1, bins) / bins, confidences, side="left")
    gaps = np.bincount(of_bin, weights=confidences.astype(np.float64) - right, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidences))


def latency_percentile(seconds: NDArray[np.float64], percent: float) -> float | None:
    """A percentile (0 to 100, linearly interpolated) of the seconds that questions took; zeros, from the cache, do not count."""
    taken = seconds[seconds > 0]
    return float(np.percentile(taken, percent)) if taken.size else None


def interval(values: Values, *, seed: int = 0, resamples: int = 1000) -> Interval | None:
    """A 95 % confidence interval of the mean of N values, one an image: the bootstrap's percentile interval.

    Memory is bounded whatever N is. From fewer than two values there is none.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    from scipy import stats  # takes longer to import than a small record to evaluate

    if len(values) < 2:
        return None
    found = stats.bootstrap(
        (values.astype(np.float64),),
        np.mean,
        n_resamples=resamples,
        batch=max(1, BATCH_VALUES // len(values)),
        vectorized=True,
        method="percentile",
        random_state=np.random.default_rng(seed),  # called rng from scipy 1.15 on, which takes both
    ).confidence_interval
    return float(found.low), float(found.high)


def macro_interval(right: Bools, truths: Columns, *, seed: int = 0, resamples: int = 1000) -> Interval | None:
    """As `interval`, of the macro average over classes; a class that a resample has no image of is left out of its average.

    Images drawn with replacement differ only in their class and in being right or wrong, so that their counts are
    multinomial: they are drawn directly, in 2 C numbers a resample instead of N.
    """
    if len(truths) < 2:
        return None
    present, classes = np.unique(truths, return_inverse=True)
    cells = np.bincount(2 * classes + right, minlength=2 * len(present))
    rng = np.random.default_rng(seed)
    batch = max(1, BATCH_VALUES // len(cells))
    averages = [
        _macro_averages(rng.multinomial(len(truths), cells / len(truths), size=min(batch, resamples - done)))
        for done in range(0, resamples, batch)
    ]
    low, high = np.percentile(np.concatenate(averages), [2.5, 97.5])
    return float(low), float(high)


def _macro_averages(cells: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of R x 2 C counts of the wrong and the right of each class."""
    wrong, right = cells[:, ::2], cells[:, 1::2]
    images = wrong + right
    averages: NDArray[np.float64] = (right / np.maximum(images, 1)).sum(axis=1) / (images > 0).sum(axis=1)
    return averages


@dataclass(frozen=True, kw_only=True)
class ClassEvaluation:
    """Of the ``images`` of one class that could be read: the shares that scorer and cascade got right; None without images."""

    images: int
    scorer_accuracy: float | None
    cascade_accuracy: float | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a record tells of a cascade.

    All shares are from 0 to 1 and of the images that could be read. The judge's answer is the last label that any stage's
    judge named; where it was asked and named none, it is wrong. Money and tokens are of the questions that were put, be it
    to a judge or to the cache.

    Attributes:
        images: how many there are, with those that could not be read.
        unreadable: how many could not be read.
        scorer_accuracy: of the scorer's best label.
        scorer_accuracy_interval: 95 % bootstrap, as all intervals.
        cascade_accuracy: of the prediction; an abstention is wrong.
        cascade_accuracy_interval: of it.
        macro_accuracy: the cascade's accuracy, every class counted the same (balanced accuracy).
        macro_accuracy_interval: of it.
        top_k_recall: of the scorer, for every k: how often the truth is among its best k.
        coverage: share of the images a judge was asked about whose truth was among the candidates it was last shown.
        deferral_rate: share of the images escalated, whether the judge was then asked or the budget was spent.
        scorer_accuracy_kept: on the images not escalated.
        scorer_accuracy_escalated: on those escalated.
        judge_accuracy_kept: on the images not escalated, if it is known from elsewhere what the judge says of them.
        judge_accuracy_escalated: on those escalated that the judge was asked about.
        judge_accuracy: on all that the judge is known to have been asked about, escalated or kept.
        rescued: images that the cascade got right and the scorer wrong.
        harmed: images that the scorer got right and the cascade wrong, be it by abstaining.
        abstained: images read and left without a label.
        scorer_calibration_error: expected calibration error of the scorer's best label.
        calibration_error: the same of the predictions that have a probability.
        dollars: what the questions cost, answers from the cache at what they cost when they were asked.
        dollars_per_thousand: the same for a thousand images.
        paid_dollars: what this very run cost.
        input_tokens: of the questions that were asked in this run; answers from the cache take none.
        output_tokens: of the same.
        latency_p50: median seconds of the questions that were asked in this run, not answered from the cache.
        latency_p95: their 95th percentile.
        outcomes: how many questions ended with each outcome; several to an image if there are several stages.
        per_class: by the name of the class.
    """

    images: int
    unreadable: int
    scorer_accuracy: float | None
    scorer_accuracy_interval: Interval | None
    cascade_accuracy: float | None
    cascade_accuracy_interval: Interval | None
    macro_accuracy: float | None
    macro_accuracy_interval: Interval | None
    top_k_recall: dict[int, float | None]
    coverage: float | None
    deferral_rate: float | None
    scorer_accuracy_kept: float | None
    scorer_accuracy_escalated: float | None
    judge_accuracy_kept: float | None
    judge_accuracy_escalated: float | None
    judge_accuracy: float | None
    rescued: int
    harmed: int
    abstained: int
    scorer_calibration_error: float | None
    calibration_error: float | None
    dollars: float
    dollars_per_thousand: float | None
    paid_dollars: float
    input_tokens: int
    output_tokens: int
    latency_p50: float | None
    latency_p95: float | None
    outcomes: dict[str, int]
    per_class: dict[str, ClassEvaluation]

    def to_dict(self) -> dict[str, JsonValue]:
        """The evaluation as JSON-serialisable data, as it reads back: intervals are lists, the k of recall are texts."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        recall: dict[str, JsonValue] = {str(k): share for k, share in self.top_k_recall.items()}
        return cast(dict[str, JsonValue], values) | {"top_k_recall": recall}


def evaluate(record: Record, *, seed: int = 0, everything: Judged | None = None) -> Evaluation:
    """Evaluate a run.

    Args:
        record: of N images; without stages, of the scorer alone.
        seed: of the resampling.
        everything: what the judge said of images that were kept too, where it was asked about them in another run
            (``--judge-all``), in the order of the record.
    """
    readable = record.readable
    truths, scored, predicted = record.truths[readable], record.scored[readable], record.predicted[readable]
    scorer_right, right = scored == truths, predicted == truths
    escalated, asked, answers, covered = _last_asked(record)
    judge_right = answers == truths
    probabilities, log_probs = record.probabilities[readable], record.scores.log_probs[readable]
    told = ~np.isnan(probabilities)
    size, classes = len(truths), len(record.labels)

    known, known_right = asked, judge_right
    if everything is not None:
        elsewhere = ~escalated & everything.asked[readable]
        known, known_right = asked | elsewhere, np.where(elsewhere, everything.answers[readable] == truths, judge_right)
    seconds = np.concatenate([np.zeros(0), *(stage.seconds[stage.asked] for stage in record.stages)])
    dollars = _total(record, "dollars")
    per_class = per_class_accuracy(predicted, truths, classes)
    return Evaluation(
        images=len(record),
        unreadable=len(record) - size,
        scorer_accuracy=mean(scorer_right),
        scorer_accuracy_interval=interval(scorer_right, seed=seed),
        cascade_accuracy=mean(right),
        cascade_accuracy_interval=interval(right, seed=seed),
        macro_accuracy=macro_average(per_class),
        macro_accuracy_interval=macro_interval(right, truths, seed=seed),
        top_k_recall=top_k_recall(log_probs, truths, [k for k in DEPTHS if k <= classes]),
        coverage=mean(covered[asked]),
        deferral_rate=mean(escalated),
        scorer_accuracy_kept=mean(scorer_right[~escalated]),
        scorer_accuracy_escalated=mean(scorer_right[escalated]),
        judge_accuracy_kept=mean(known_right[known & ~escalated]),
        judge_accuracy_escalated=mean(judge_right[asked]),
        judge_accuracy=mean(known_right[known]),
        rescued=int((right & ~scorer_right).sum()),
        harmed=int((scorer_right & ~right).sum()),
        abstained=int((predicted == NOBODY).sum()),
        scorer_calibration_error=expected_calibration_error(np.exp(log_probs.max(axis=1)), scorer_right),
        calibration_error=expected_calibration_error(probabilities[told], right[told]),
        dollars=dollars,
        dollars_per_thousand=1000 * dollars / size if size else None,
        paid_dollars=_total(record, "paid"),
        input_tokens=int(_total(record, "input_tokens")),
        output_tokens=int(_total(record, "output_tokens")),
        latency_p50=latency_percentile(seconds, 50),
        latency_p95=latency_percentile(seconds, 95),
        outcomes=_outcome_counts(record),
        per_class=_by_class(record, per_class_accuracy(scored, truths, classes), per_class),
    )


def _last_asked(record: Record) -> tuple[Bools, Bools, Columns, Bools]:
    """Of the readable images, over all stages: whether escalated, whether a judge was asked, the last answer (as the cascade
    concludes from it), and whether the candidates that were shown last held the truth."""
    readable = record.readable
    truths = record.truths[readable]
    escalated, asked, covered = np.zeros((3, len(truths)), dtype=bool)
    answers = np.full(len(truths), NOBODY, dtype=np.int64)
    for stage in record.stages:
        put, given = stage.asked[readable], stage.answers[readable]
        escalated = escalated | (np.array(stage.outcomes, dtype=str)[readable] != "")
        asked = asked | put
        answers = np.where(given != NOBODY, given, answers)
        covered = np.where(put, covered_by(stage.candidates[readable], truths), covered)
    return escalated, asked, answers, covered


def _total(record: Record, field: str) -> float:
    return float(sum(getattr(stage, field).sum() for stage in record.stages))


def _outcome_counts(record: Record) -> dict[str, int]:
    counts = Counter(outcome for stage in record.stages for outcome in stage.outcomes)
    return {outcome: counts[outcome] for outcome in get_args(Outcome)}


def _by_class(record: Record, of_scorer: NDArray[np.float64], of_cascade: NDArray[np.float64]) -> dict[str, ClassEvaluation]:
    images = np.bincount(record.truths[record.readable], minlength=len(record.labels)).tolist()
    return {
        name: ClassEvaluation(
            images=count, scorer_accuracy=scorer if count else None, cascade_accuracy=cascade if count else None
        )
        for name, count, scorer, cascade in zip(record.labels.names, images, of_scorer.tolist(), of_cascade.tolist(), strict=True)
    }

"""Metrics: accuracy, cost and time of a cascade, its scorer and its judge. Pure functions of arrays and of a `Record`.

Columns are columns of the score matrix, as in `cascadevlm.evaluation.record`. A prediction of `NOBODY` is an abstention, which is
never right. A figure without images to compute it from is None, or NaN in an array, but never 0.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TypeAlias, cast, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.base.html import card
from cascadevlm.base.types import Outcome
from cascadevlm.evaluation.record import Judged, Record
from cascadevlm.evaluation.texts import figures

DEPTHS = (1, 2, 3, 5, 10, 20)
"""The values of k for which `evaluate` reports top-k recall. Values above the number of labels are left out."""

BINS = 15
"""Number of bins of the expected calibration error, as in Guo et al. 2017."""

BATCH_VALUES = 4_000_000
"""Number of resampled values in memory at a time. A larger number is slower and takes more memory."""

Bools: TypeAlias = NDArray[np.bool_]
Values: TypeAlias = NDArray[np.floating] | NDArray[np.bool_]

Interval: TypeAlias = tuple[float, float]
"""The lower and the upper end of a 95 % confidence interval."""


def mean(values: Values) -> float | None:
    """The mean of N numbers or booleans; None if N is 0."""
    return float(values.mean()) if values.size else None


def accuracy(predicted: Columns, truths: Columns) -> float | None:
    """Share of N predictions that are the truth, from 0 to 1. Abstentions are wrong. None if N is 0."""
    return mean(predicted == truths)


def per_class_accuracy(predicted: Columns, truths: Columns, classes: int) -> NDArray[np.float64]:
    """``(C,)`` recalls of the classes, from 0 to 1; NaN for a class without images."""
    images = np.bincount(truths, minlength=classes)
    right = np.bincount(truths[predicted == truths], minlength=classes)
    shares: NDArray[np.float64] = np.divide(right, images, out=np.full(classes, np.nan), where=images > 0)
    return shares


def macro_average(per_class: NDArray[np.float64]) -> float | None:
    """The unweighted mean over the classes, without NaN. The macro average of the per-class accuracy is the balanced accuracy."""
    return mean(per_class[~np.isnan(per_class)])


def top_k_recall(scores: NDArray[np.floating], truths: Columns, ks: Sequence[int]) -> dict[int, float | None]:
    """Share of the images whose truth is among the k labels with the highest scores, for several k.

    If the judge chooses among these k candidates, the accuracy of the cascade cannot be higher than this share. If scores are
    equal, the earlier column ranks higher, as in the choice of candidates.

    Args:
        scores: ``(N, C)`` scores; higher is better.
        truths: ``(N,)`` columns.
        ks: values of k, each from 1 to C.

    Returns:
        For every k, a share of the N images from 0 to 1; None if N is 0.

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
    """Share of the images whose truth is among the candidates, from 0 to 1; None if N is 0.

    Args:
        candidates: ``(N, K)`` columns; `NOBODY` after the last candidate of an image.
        truths: ``(N,)`` columns.
    """
    return mean(covered_by(candidates, truths))


def covered_by(candidates: Columns, truths: Columns) -> Bools:
    """``(N,)`` booleans: the truth is among the candidates."""
    covered: Bools = (candidates == truths[:, None]).any(axis=1)
    return covered


def expected_calibration_error(confidences: NDArray[np.floating], right: Bools, *, bins: int = BINS) -> float | None:
    """The absolute difference of mean confidence and accuracy in a bin, averaged over bins by their numbers of images.

    The bins have equal width. Each bin contains its upper end and not its lower end; the first bin also contains 0.

    Sources: Naeini, Cooper and Hauskrecht, "Obtaining Well Calibrated Probabilities Using Bayesian Binning", AAAI 2015;
    Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, equations 2 to 5.

    Args:
        confidences: ``(N,)`` probabilities of the predicted labels, from 0 to 1.
        right: ``(N,)`` booleans: the predicted label is the truth.
        bins: number of bins.

    Returns:
        A number from 0 (calibrated) to 1; None if N is 0.
    """
    if not confidences.size:
        return None
    of_bin = np.searchsorted(np.arange(1, bins) / bins, confidences, side="left")
    gaps = np.bincount(of_bin, weights=confidences.astype(np.float64) - right, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidences))


def latency_percentile(seconds: NDArray[np.float64], percent: float) -> float | None:
    """A percentile (0 to 100, linearly interpolated) of the seconds of questions.

    Zeros are left out: they are answers from the cache. None if nothing remains.
    """
    taken = seconds[seconds > 0]
    return float(np.percentile(taken, percent)) if taken.size else None


def interval(values: Values, *, seed: int = 0, resamples: int = 1000) -> Interval | None:
    """A 95 % confidence interval of the mean of N values, one per image: the percentile interval of the bootstrap.

    The memory used does not grow with N. The result is None for fewer than two values.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    from scipy import stats  # the import takes longer than evaluating a small record

    if len(values) < 2:
        return None
    found = stats.bootstrap(
        (values.astype(np.float64),),
        np.mean,
        n_resamples=resamples,
        batch=max(1, BATCH_VALUES // len(values)),
        vectorized=True,
        method="percentile",
        random_state=np.random.default_rng(seed),  # scipy from 1.15 calls it rng, and accepts both
    ).confidence_interval
    return float(found.low), float(found.high)


def macro_interval(right: Bools, truths: Columns, *, seed: int = 0, resamples: int = 1000) -> Interval | None:
    """A 95 % bootstrap interval of the macro average over classes; None for fewer than two images.

    A class without images in a resample is left out of the average of this resample. Resampled images differ only in their class
    and in being right or wrong. So their counts are multinomial, and are drawn directly: 2 C numbers per resample instead of N.
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
    """``(R,)`` macro averages, from ``(R, 2 C)`` counts: for each class, the number of wrong images, then the number of right
    images.
    """
    wrong, right = cells[:, ::2], cells[:, 1::2]
    images = wrong + right
    averages: NDArray[np.float64] = (right / np.maximum(images, 1)).sum(axis=1) / (images > 0).sum(axis=1)
    return averages


@dataclass(frozen=True, kw_only=True)
class ClassEvaluation:
    """Accuracies on the readable images of one class; None without images."""

    images: int
    scorer_accuracy: float | None
    cascade_accuracy: float | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The figures of a cascade on the labelled images of a record.

    All shares are from 0 to 1. They are shares of the readable images. The judge's answer is the last label that the judge of
    any stage named. A judge that was asked and named no label is wrong. All intervals are 95 % bootstrap intervals. A figure is
    None without images to compute it from.

    Attributes:
        images: number of images, including unreadable images.
        unreadable: number of images that could not be read.
        scorer_accuracy: accuracy of the scorer's best label.
        scorer_accuracy_interval: interval of the scorer's accuracy.
        cascade_accuracy: accuracy of the predictions. An abstention is wrong.
        cascade_accuracy_interval: interval of the cascade's accuracy.
        macro_accuracy: mean accuracy of the classes with the cascade (balanced accuracy).
        macro_accuracy_interval: interval of the macro accuracy.
        top_k_recall: for every k, the share of the images whose truth is among the scorer's k best labels.
        coverage: share of the images with a question whose truth was among the candidates of the last question.
        deferral_rate: share of the images that were escalated. This includes images not asked about because of the budget.
        scorer_accuracy_kept: accuracy of the scorer on images that were not escalated.
        scorer_accuracy_escalated: accuracy of the scorer on escalated images.
        judge_accuracy_kept: accuracy of the judge on images that were not escalated, if its answers are known from another run.
        judge_accuracy_escalated: accuracy of the judge on escalated images that it was asked about.
        judge_accuracy: accuracy of the judge on all images with a known answer, escalated or not.
        rescued: number of images on which the cascade is right and the scorer is wrong.
        harmed: number of images on which the scorer is right and the cascade is wrong. This includes abstentions.
        abstained: number of readable images without a label.
        scorer_calibration_error: expected calibration error of the scorer's best label.
        calibration_error: expected calibration error of the predictions that have a probability.
        dollars: US dollars for all questions. An answer from the cache has its original cost.
        dollars_per_thousand: these dollars per 1,000 readable images.
        paid_dollars: US dollars paid in this run. Answers from the cache count 0.
        input_tokens: tokens of the questions asked in this run. Answers from the cache count 0.
        output_tokens: tokens of the answers in this run. Answers from the cache count 0.
        latency_p50: median time in seconds of the questions in this run, without answers from the cache.
        latency_p95: 95th percentile of these seconds.
        outcomes: number of questions with each outcome. With several stages, an image can have several questions.
        per_class: figures of each class by its name.
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

    def __repr__(self) -> str:
        accuracies = f"cascade_accuracy={self.cascade_accuracy}, scorer_accuracy={self.scorer_accuracy}"
        return f"Evaluation(images={self.images}, {accuracies}, deferral_rate={self.deferral_rate}, dollars={self.dollars})"

    def _repr_html_(self) -> str:
        return card("Evaluation", figures(self))

    def to_dict(self) -> dict[str, JsonValue]:
        """The evaluation as JSON-serialisable data. Intervals are lists, and the keys of ``top_k_recall`` are strings."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        recall: dict[str, JsonValue] = {str(k): share for k, share in self.top_k_recall.items()}
        return cast(dict[str, JsonValue], values) | {"top_k_recall": recall}


def evaluate(record: Record, *, seed: int = 0, everything: Judged | None = None) -> Evaluation:
    """Evaluate a record.

    Args:
        record: N labelled images. A record without stages has figures of the scorer alone.
        seed: seed of the bootstrap intervals.
        everything: the judge's answers in a run that asked about every image (``--judge-all``), in the order of the record.
            Default: the judge's accuracy on kept images is not known.
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
    """Four ``(N,)`` arrays over the N readable images: escalated; a judge was asked; the last label that a judge named; the
    truth was among the candidates of the last question.
    """
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

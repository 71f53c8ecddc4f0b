"""Compares records of the same images: which images each run got right, and whether the difference can be chance."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue, TypeAdapter

from cascadevlm.base.arrays import Columns
from cascadevlm.base.errors import DataError
from cascadevlm.base.labels import LabelSet
from cascadevlm.evaluation.metrics import Bools, Interval, interval, latency_percentile
from cascadevlm.evaluation.record import Record

Labelled: TypeAlias = tuple[LabelSet, Sequence[str], Sequence[str]]
"""A label set, the names of N images, and the names of their N true labels."""

Names: TypeAlias = NDArray[np.str_]
"""Names of labels; "" for no label."""


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """Figures of one record on the compared images.

    Attributes:
        accuracy: share of right predictions, from 0 to 1. An abstention is wrong.
        accuracy_interval: 95 % bootstrap interval; None for a single image.
        deferral_rate: share of the images that were escalated, from 0 to 1.
        dollars_per_thousand: US dollars per 1,000 images. An answer from the cache has its original cost.
        paid_dollars: US dollars paid in this run. Answers from the cache count 0.
        latency_p50: median time in seconds of the questions in this run, without answers from the cache; None if there are no
            such questions.
        latency_p95: 95th percentile of these seconds.
    """

    accuracy: float
    accuracy_interval: Interval | None
    deferral_rate: float
    dollars_per_thousand: float
    paid_dollars: float
    latency_p50: float | None
    latency_p95: float | None


@dataclass(frozen=True, kw_only=True)
class JudgePair:
    """Figures of the last stages' judges of two records, on the images that both judges were asked about.

    Attributes:
        images: number of these images.
        agreement: share of them with the same answer. Two missing answers agree.
        first_accuracy: share of right answers of the first judge. A missing answer is wrong.
        second_accuracy: share of right answers of the second judge.
    """

    images: int
    agreement: float
    first_accuracy: float
    second_accuracy: float


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The difference between two records of the same images.

    Attributes:
        first: name of the first record.
        second: name of the second record.
        difference: accuracy of the second record minus accuracy of the first.
        difference_interval: 95 % bootstrap interval of the difference, with paired images; None for a single image.
        only_first: number of images that only the first record got right.
        only_second: number of images that only the second record got right.
        p_value: p-value of McNemar's exact test: the probability of a difference at least this large if the two runs are
            equally good.
        p_value_holm: the p-value, adjusted for the number of pairs by Holm's method.
        agreement: share of the images with the same prediction. Two abstentions agree.
        kappa: Cohen's kappa, the agreement beyond chance; None if both records give one and the same label to every image.
        judges: figures of the judges; None if no image was judged in both records.
    """

    first: str
    second: str
    difference: float
    difference_interval: Interval | None
    only_first: int
    only_second: int
    p_value: float
    p_value_holm: float
    agreement: float
    kappa: float | None
    judges: JudgePair | None


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """An image on which the records disagree.

    Attributes:
        name: name of the image.
        truth: its true label.
        labels: predicted label by the name of the record; None for an abstention.
    """

    name: str
    truth: str
    labels: dict[str, str | None]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The comparison of R records of the same images.

    Attributes:
        images: number of images compared.
        unreadable: number of images that are left out because not every run could read them.
        runs: figures of each record, by its name.
        pairs: all pairs of records, in the order of the records.
        agreement: ``(R, R)`` shares of the images with the same prediction, in the order of the records.
        disagreements: the images on which the records disagree, in the order of the first record.
    """

    images: int
    unreadable: int
    runs: dict[str, RunFigures]
    pairs: tuple[Pair, ...]
    agreement: tuple[tuple[float, ...], ...]
    disagreements: tuple[Disagreement, ...]

    def to_dict(self) -> dict[str, JsonValue]:
        """The comparison as JSON-serialisable data."""
        return cast(dict[str, JsonValue], TypeAdapter(Comparison).dump_python(self, mode="json"))


def compare(records: Mapping[str, Record], *, seed: int = 0) -> Comparison:
    """Compare records of the same images. The images may be in any order.

    Args:
        records: the records by name.
        seed: seed of the bootstrap intervals.

    Raises:
        DataError: if there are fewer than two records; if they differ in images, truths or label set; or if no image could be
            read in all of them.
    """
    if len(records) < 2:
        raise DataError("A comparison needs at least two records.", hint="Give two or more records.")
    require_same({name: labelled(record) for name, record in records.items()})
    first, *_ = records.values()
    rows = {name: _aligned(record.names, first.names) for name, record in records.items()}
    readable = np.all([record.readable[rows[name]] for name, record in records.items()], axis=0)
    if not readable.any():
        raise DataError("There is no image that every run could read.", hint="Compare runs over the same readable images.")
    rows = {name: each[readable] for name, each in rows.items()}
    own = np.flatnonzero(readable)
    truths = _named(first.labels, first.truths[own])
    said = np.array([_named(record.labels, record.predicted[rows[name]]) for name, record in records.items()])
    right = said == truths
    return Comparison(
        images=len(own),
        unreadable=len(first) - len(own),
        runs={name: _figures(record, rows[name], right[number], seed) for number, (name, record) in enumerate(records.items())},
        pairs=_pairs(records, rows, said, truths, seed),
        agreement=tuple(map(tuple, (said[:, None] == said).mean(axis=2).tolist())),
        disagreements=tuple(
            Disagreement(
                name=first.names[own[image]],
                truth=str(truths[image]),
                labels={name: str(label) or None for name, label in zip(records, said[:, image], strict=True)},
            )
            for image in np.flatnonzero((said != said[0]).any(axis=0))
        ),
    )


def _pairs(
    records: Mapping[str, Record], rows: Mapping[str, NDArray[np.intp]], said: Names, truths: Names, seed: int
) -> tuple[Pair, ...]:
    """All pairs of R records.

    Args:
        rows: the rows of the N images in each record.
        said: ``(R, N)`` predictions.
        truths: ``(N,)``.
    """
    names, right = [*records], said == truths
    two = list(combinations(range(len(records)), 2))
    counts = [(int((right[i] & ~right[j]).sum()), int((right[j] & ~right[i]).sum())) for i, j in two]
    p_values = [mcnemar(*each) for each in counts]
    return tuple(
        Pair(
            first=names[i],
            second=names[j],
            difference=float(right[j].mean() - right[i].mean()),
            difference_interval=interval(right[j].astype(np.float64) - right[i], seed=seed),
            only_first=only_first,
            only_second=only_second,
            p_value=p_value,
            p_value_holm=p_value_holm,
            agreement=float((said[i] == said[j]).mean()),
            kappa=_kappa(said[i], said[j]),
            judges=_judges([(records[name], rows[name]) for name in (names[i], names[j])], truths),
        )
        for (i, j), (only_first, only_second), p_value, p_value_holm in zip(two, counts, p_values, holm(p_values), strict=True)
    )


def labelled(record: Record) -> Labelled:
    """The label set, image names and truths of a record."""
    return record.labels, record.names, _named(record.labels, record.truths).tolist()


def require_same(runs: Mapping[str, Labelled]) -> None:
    """Refuse runs that differ in their images, truths or labels. The order does not matter.

    Args:
        runs: label set, image names and truths of each run, by its name.

    Raises:
        DataError: if a run differs from the first run. The message names the run, the difference and the counts.
    """
    (name, (labels, images, truths)), *others = runs.items()
    for other, (its_labels, its_images, its_truths) in others:
        for what, mine, its in (
            ("labels", labels.names, its_labels.names),
            ("images", images, its_images),
            ("truths", [*zip(images, truths, strict=True)], [*zip(its_images, its_truths, strict=True)]),
        ):
            missing, added = Counter(mine) - Counter(its), Counter(its) - Counter(mine)
            if missing or added:
                raise DataError(
                    f"{other!r} and {name!r} have different {what}: {missing.total()} of {len(mine)} are only in {name!r}, "
                    f"and {added.total()} of {len(its)} are only in {other!r}, for example {next(iter(missing | added))!r}.",
                    hint="Run both over the same data.",
                )


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided p-value of McNemar's exact test.

    Source: McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
    Psychometrika 12, 1947. The test is exact: it uses the binomial distribution, which McNemar approximates.

    Args:
        only_first: number of images that only the first run got right.
        only_second: number of images that only the second run got right.
    """
    from scipy.stats import binomtest

    return float(binomtest(only_first, only_first + only_second).pvalue) if only_first + only_second else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number P.

    The smallest is multiplied by P, the next by P - 1, and so on. No result is smaller than the one before it, or larger than 1.

    Source: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 6, 1979.
    """
    order = np.argsort(p_values)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(np.array(p_values)[order] * np.arange(len(order), 0, -1)), 1)
    return [float(p_value) for p_value in adjusted]


def _aligned(names: Sequence[str], order: Sequence[str]) -> NDArray[np.intp]:
    """``(N,)`` rows in ``names`` of the names in ``order``."""
    rows = np.empty(len(names), dtype=np.intp)
    rows[sorted(range(len(order)), key=order.__getitem__)] = sorted(range(len(names)), key=names.__getitem__)
    return rows


def _named(labels: LabelSet, columns: Columns) -> Names:
    return np.array([*labels.names, ""])[columns]  # `NOBODY` is -1, the last element


def _figures(record: Record, rows: NDArray[np.intp], right: Bools, seed: int) -> RunFigures:
    size = len(rows)
    escalated = np.zeros(size, dtype=bool)
    seconds, dollars, paid = np.zeros((3, 0))
    for stage in record.stages:
        escalated = escalated | (np.array(stage.outcomes, dtype=str)[rows] != "")
        seconds = np.append(seconds, stage.seconds[rows])
        dollars = np.append(dollars, stage.dollars[rows])
        paid = np.append(paid, stage.paid[rows])
    return RunFigures(
        accuracy=float(right.mean()),
        accuracy_interval=interval(right, seed=seed),
        deferral_rate=float(escalated.mean()),
        dollars_per_thousand=float(1000 * dollars.sum() / size),
        paid_dollars=float(paid.sum()),
        latency_p50=latency_percentile(seconds, 50),
        latency_p95=latency_percentile(seconds, 95),
    )


def _kappa(first: Names, second: Names) -> float | None:
    from sklearn.metrics import cohen_kappa_score

    if (first == first[0]).all() and (second == first[0]).all():
        return None
    return float(cohen_kappa_score(first, second))


def _judges(pair: Sequence[tuple[Record, NDArray[np.intp]]], truths: Names) -> JudgePair | None:
    if not all(record.stages for record, _ in pair):
        return None
    both = np.all([record.judged.asked[rows] for record, rows in pair], axis=0)
    if not both.any():
        return None
    first, second = (_named(record.labels, record.judged.answers[rows][both]) for record, rows in pair)
    return JudgePair(
        images=int(both.sum()),
        agreement=float((first == second).mean()),
        first_accuracy=float((first == truths[both]).mean()),
        second_accuracy=float((second == truths[both]).mean()),
    )

"""Records of the same images beside each other: what the one got right and the other wrong, and whether that may be chance."""

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
"""A label set, the names of N images, and those of their true labels."""

Names: TypeAlias = NDArray[np.str_]
"""Of labels; "" where there is none."""


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """Of one record, on the images compared.

    Attributes:
        accuracy: of the predictions; an abstention is wrong.
        accuracy_interval: 95 % bootstrap, as all intervals; None of a single image.
        deferral_rate: share of the images escalated.
        dollars_per_thousand: what a thousand images cost, answers from the cache at what they cost when they were asked.
        paid_dollars: what this very run cost.
        latency_p50: median seconds of the questions that were asked in this run, not answered from the cache; None if none was.
        latency_p95: their 95th percentile.
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
    """The last stage's judges of two records, on the ``images`` that both were asked about.

    Attributes:
        images: how many.
        agreement: share of them with the same answer; no answer agrees with no answer.
        first_accuracy: of the first's answers; none is wrong.
        second_accuracy: of the second's.
    """

    images: int
    agreement: float
    first_accuracy: float
    second_accuracy: float


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two records, image by image.

    Attributes:
        first: its name.
        second: its name.
        difference: the second's accuracy less the first's.
        difference_interval: of it, the images being resampled in pairs.
        only_first: images that only the first got right.
        only_second: images that only the second got right.
        p_value: how likely it is that these two counts are so far apart by chance, by McNemar's exact test.
        p_value_holm: the same, adjusted for the number of pairs.
        agreement: share of the images with the same prediction; an abstention agrees with an abstention.
        kappa: Cohen's, the agreement beyond chance; None where both say one and the same of everything.
        judges: None unless both judges were asked about some of the same images.
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
    """An image of which not all say the same: its truth, and by the name of the record each one's label, None for none."""

    name: str
    truth: str
    labels: dict[str, str | None]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What R records of the same images tell beside each other.

    Attributes:
        images: how many were compared.
        unreadable: how many were left out, since not every run could read them.
        runs: by the name of the record.
        pairs: every two of them, in the order of the records.
        agreement: R x R shares of the images with the same prediction, in the order of the records.
        disagreements: in the order of the first record's images.
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
    """Compare runs over the same images, which need not be in the same order.

    Args:
        records: by name.
        seed: of the resampling.

    Raises:
        DataError: if there are fewer than two, they are not of the same images, truths and label set, or no image could be read
            in all of them.
    """
    if len(records) < 2:
        raise DataError("There is nothing to compare with.", hint="Give two records or more.")
    require_same({name: labelled(record) for name, record in records.items()})
    first, *_ = records.values()
    rows = {name: _aligned(record.names, first.names) for name, record in records.items()}
    readable = np.all([record.readable[rows[name]] for name, record in records.items()], axis=0)
    if not readable.any():
        raise DataError("No image could be read in all of the runs.")
    rows = {name: each[readable] for name, each in rows.items()}
    own = np.flatnonzero(readable)
    truths = _named(first.labels, first.truths[own])
    said = np.array([_named(record.labels, record.predicted[rows[name]]) for name, record in records.items()])
    right = said == truths
    agreement = (said[:, None] == said).mean(axis=2)
    two = list(combinations(range(len(records)), 2))
    counts = [(int((right[i] & ~right[j]).sum()), int((right[j] & ~right[i]).sum())) for i, j in two]
    p_values = [mcnemar(*each) for each in counts]
    names = [*records]
    pairs = tuple(
        Pair(
            first=names[i],
            second=names[j],
            difference=float(right[j].mean() - right[i].mean()),
            difference_interval=interval(right[j].astype(np.float64) - right[i], seed=seed),
            only_first=only_first,
            only_second=only_second,
            p_value=p_value,
            p_value_holm=p_value_holm,
            agreement=float(agreement[i, j]),
            kappa=_kappa(said[i], said[j]),
            judges=_judges([(records[name], rows[name]) for name in (names[i], names[j])], truths),
        )
        for (i, j), (only_first, only_second), p_value, p_value_holm in zip(two, counts, p_values, holm(p_values), strict=True)
    )
    return Comparison(
        images=len(own),
        unreadable=len(first) - len(own),
        runs={name: _figures(record, rows[name], right[number], seed) for number, (name, record) in enumerate(records.items())},
        pairs=pairs,
        agreement=tuple(map(tuple, agreement.tolist())),
        disagreements=tuple(
            Disagreement(
                name=first.names[own[image]],
                truth=str(truths[image]),
                labels={name: str(label) or None for name, label in zip(names, said[:, image], strict=True)},
            )
            for image in np.flatnonzero((said != said[0]).any(axis=0))
        ),
    )


def labelled(record: Record) -> Labelled:
    """What a record is of."""
    return record.labels, record.names, _named(record.labels, record.truths).tolist()


def require_same(runs: Mapping[str, Labelled]) -> None:
    """Refuse to compare what is not of the same images, truths and label set, in whatever order.

    Args:
        runs: what each is of, by name.

    Raises:
        DataError: naming the first that differs from the one before all others, in what, and of how many images.
    """
    (name, (labels, images, truths)), *others = runs.items()
    for other, (its_labels, its_images, its_truths) in others:
        for what, mine, its in (
            ("label set", labels.names, its_labels.names),
            ("images", images, its_images),
            ("truths", [*zip(images, truths, strict=True)], [*zip(its_images, its_truths, strict=True)]),
        ):
            missing, added = Counter(mine) - Counter(its), Counter(its) - Counter(mine)
            if missing or added:
                raise DataError(
                    f"{other!r} and {name!r} differ in their {what}: {missing.total()} of {len(mine)} are only in {name!r}, "
                    f"{added.total()} of {len(its)} only in {other!r} (among them {next(iter(missing | added))!r}).",
                    hint="Run both over the same data.",
                )


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided p-value of McNemar's exact test, from how many images only the one and only the other got right.

    Source: McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
    Psychometrika 12, 1947; exact by the binomial distribution that it approximates.
    """
    from scipy.stats import binomtest

    return float(binomtest(only_first, only_first + only_second).pvalue) if only_first + only_second else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for there being P of them: the smallest times P, the next times P - 1, never falling, at most 1.

    Source: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 6, 1979.
    """
    order = np.argsort(p_values)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(np.array(p_values)[order] * np.arange(len(order), 0, -1)), 1)
    return [float(p_value) for p_value in adjusted]


def _aligned(names: Sequence[str], order: Sequence[str]) -> NDArray[np.intp]:
    """For each of N names in the order that is wanted, its row."""
    rows = np.empty(len(names), dtype=np.intp)
    rows[sorted(range(len(order)), key=order.__getitem__)] = sorted(range(len(names)), key=names.__getitem__)
    return rows


def _named(labels: LabelSet, columns: Columns) -> Names:
    return np.array([*labels.names, ""])[columns]  # `NOBODY` is the last


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

"""The data in plots, compared with sweeps, scikit-learn and counts; also for unusual records."""

import io
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix

from cascadevlm.base.arrays import NOBODY
from cascadevlm.base.errors import PolicyError
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Scores
from cascadevlm.evaluation import plots
from cascadevlm.evaluation.evaluate import as_configured, evaluate_replayed
from cascadevlm.evaluation.record import Record
from cascadevlm.evaluation.sweep import sweep, under
from cascadevlm.policies.rules import EntropyAbove, Never
from cascadevlm.runs.manifest import Manifest
from tests.evaluation.test_sweep import record

OF_A_RECORD = (
    plots.accuracy_deferral,
    plots.accuracy_dollars,
    plots.reliability,
    plots.entropy_histogram,
    plots.confusion,
)


def with_policy(given_record: Record, *policies: str) -> Record:
    """The record with a configuration that has these policies of the stages."""
    info = Manifest(
        config={
            "scorer": {"use": "fake:scorer"},
            "stage": [{"judge": "fake:judge", "policy": policy, "prompt": "select"} for policy in policies],
        },
        labels=list(given_record.labels),
        inputs="Data",
        labelled=True,
        fingerprint="x",
        stages=["fake:judge"] * len(policies),
        began=datetime(2026, 1, 2, tzinfo=UTC),
        versions={"cascadevlm": "0"},
        machine="none",
        contents={},
    )
    return replace(given_record, info=info)


def of_classes(labels: LabelSet, *, right: bool, size: int = 30) -> Record:
    """A record without a stage."""
    rng = np.random.default_rng(0)
    scores = Scores.from_logits(rng.normal(size=(size, len(labels))), labels, fingerprint="x")
    best = scores.log_probs.argmax(axis=1)
    return Record(
        scores=scores,
        readable=np.ones(size, dtype=bool),
        names=tuple(map(str, range(size))),
        truths=best if right else (best + 1) % len(labels),
        stages=(),
        predicted=best,
        probabilities=scores.probabilities.max(axis=1).astype(np.float64),
        decided_by=("scorer",) * size,
    )


def points(line: Line2D) -> NDArray[np.float64]:
    """``(P, 2)``."""
    return np.array(line.get_xydata(), dtype=np.float64)


def axes_of(figure: Figure) -> Axes:
    (axes,) = figure.axes
    return axes


EDGES = {
    "judged": with_policy(record(0), "entropy > 0.6"),
    "gated": with_policy(under(record(0), EntropyAbove(0.6)), "entropy > 0.6"),
    "no stage": of_classes(LabelSet.of(["ant", "bee", "cicada"]), right=False),
    "one class": of_classes(LabelSet.of(["ant"]), right=True),
    "all right": of_classes(LabelSet.of(["ant", "bee"]), right=True),
    "nothing escalated": under(record(0), Never()),
    "nothing readable": record(0, 9, unreadable=9),
    "2,000 classes": of_classes(LabelSet.of(f"class {n}" for n in range(2000)), right=False),
    "names": of_classes(LabelSet.of(["$x^{", "<b>&amp;", "a_very_long_name_" * 20, "$\\frac{1}{2}$"]), right=False),
    "one image": record(0, 1),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("plot", OF_A_RECORD)
def test_there_is_a_plot_of_every_record(edge: str, plot: Callable[[Record], Figure]) -> None:
    file = io.BytesIO()
    plot(EDGES[edge]).savefig(file, format="svg")
    assert file.getvalue().startswith(b"<?xml")


def test_no_plot_needs_pyplot() -> None:
    program = """
import sys
from cascadevlm.evaluation import plots
assert "matplotlib" not in sys.modules and "torch" not in sys.modules
plots.study(["a"], [0.5], [None]).savefig("/dev/null", format="svg")
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_curves_are_those_of_the_sweep_and_the_run_is_where_its_policy_puts_it() -> None:
    given_record = EDGES["judged"]
    swept, own = sweep(given_record), evaluate_replayed(given_record, EntropyAbove(0.6))
    assert own.deferral_rate is not None
    assert own.cascade_accuracy is not None
    assert 0 < own.deferral_rate < 1
    for plot, costs, cost in (
        (plots.accuracy_deferral, [100 * curve.deferral_rates for curve in swept.curves], 100 * own.deferral_rate),
        (plots.accuracy_dollars, [curve.dollars for curve in swept.curves], own.dollars_per_thousand),
    ):
        *curves, scorer, judge, run = axes_of(plot(given_record)).lines
        for line, curve, across in zip(curves, swept.curves, costs, strict=True):
            assert points(line) == pytest.approx(np.stack([across, 100 * curve.accuracies], axis=1))
        assert points(scorer) == pytest.approx(np.array([[0, 100 * swept.scorer_accuracy]]))
        assert points(judge) == pytest.approx(np.array([[costs[0][-1], 100 * swept.judge_accuracy]]))
        assert points(run) == pytest.approx(np.array([[cost, 100 * own.cascade_accuracy]]))


def test_of_a_gated_record_only_points_are_known() -> None:
    lines = axes_of(plots.accuracy_deferral(EDGES["gated"])).lines
    assert [str(line.get_label()).partition(" (")[0] for line in lines] == ["scorer alone", "this run"]


def test_a_record_of_everything_and_a_gated_one_are_the_same_run() -> None:
    judged, gated = (axes_of(plots.accuracy_deferral(EDGES[name])).lines[-1] for name in ("judged", "gated"))
    np.testing.assert_array_equal(points(judged), points(gated))


def test_a_policy_that_is_not_installed_is_named() -> None:
    with pytest.raises(PolicyError, match="moonphase"):
        as_configured(with_policy(record(0), "moonphase > 0.3"))


def test_a_calibrated_run_is_told_as_it_was() -> None:
    given_record = EDGES["judged"]
    assert given_record.info is not None
    info = given_record.info.model_copy(update={"config": {**given_record.info.config, "calibration": "learned.json"}})
    calibrated = replace(given_record, info=info)
    assert as_configured(calibrated) is calibrated


def test_reliability_is_that_of_scikit_learn() -> None:
    given_record = EDGES["judged"]
    (scorer, final) = (each for each in axes_of(plots.reliability(given_record)).collections if isinstance(each, PathCollection))
    confidence = given_record.scores.probabilities.max(axis=1)
    right = given_record.scored == given_record.truths
    shares, means = calibration_curve(right, confidence, n_bins=15)
    drawn = np.array(scorer.get_offsets(), dtype=np.float64)
    assert drawn == pytest.approx(100 * np.stack([means, shares], axis=1), rel=1e-5)
    assert len(np.asarray(final.get_offsets()))


@pytest.mark.parametrize(
    ("policy", "thresholds"),
    [
        ("entropy > 0.6", [0.6]),
        ("entropy > 0.6932 nats", [0.5]),
        ("~(entropy > 0.2 & margin < 0.3) | entropy > 0.7", [0.2, 0.7]),
        ("margin < 0.3", []),
    ],
)
def test_the_histogram_counts_all_images_and_shows_thresholds(policy: str, thresholds: list[float]) -> None:
    given_record = with_policy(record(0), policy)
    axes = axes_of(plots.entropy_histogram(given_record))
    drawn = sum(patch.get_height() for container in axes.containers for patch in container)
    assert drawn == len(given_record)
    assert sorted(float(points(line)[0, 0]) for line in axes.lines) == pytest.approx(thresholds, abs=1e-3)


@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(2, 30))
def test_the_most_confused_classes_are_whole_pairs_of_the_most_frequent(seed: int, size: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    truths, predicted = rng.integers(0, classes, size), rng.integers(NOBODY, classes, size)
    chosen = plots.confused_classes(truths, predicted)
    pairs = Counter(frozenset(pair) for pair in zip(truths.tolist(), predicted.tolist(), strict=True) if NOBODY not in pair)
    pairs = Counter({pair: count for pair, count in pairs.items() if len(pair) == 2})
    assert len(chosen) == len(set(chosen)) <= plots.MOST_CONFUSED
    assert all(any(set(pair) <= set(chosen) for pair in pairs if column in pair) for column in chosen)
    if pairs:
        assert any(pair <= set(chosen) for pair, count in pairs.items() if count == max(pairs.values()))


def test_confusions_are_those_of_scikit_learn() -> None:
    given_record = record(3, 400)
    classes = plots.confused_classes(given_record.truths, given_record.predicted)
    drawn = {
        (int(text.get_position()[0]), int(text.get_position()[1])): text.get_text()
        for text in axes_of(plots.confusion(given_record)).texts
    }
    expected = confusion_matrix(given_record.truths, given_record.predicted, labels=classes)
    assert drawn == {
        (column, row): str(count) for row, counts in enumerate(expected) for column, count in enumerate(counts) if count
    }


def test_runs_stand_beside_each_other() -> None:
    axes = axes_of(plots.runs({"a $x^{ run": EDGES["judged"], "free": EDGES["no stage"]}))
    assert axes.get_xlabel().startswith("US dollars")
    free = {"one": EDGES["no stage"], "other": EDGES["all right"]}
    assert axes_of(plots.runs(free)).get_xlabel().startswith("share of escalated images")


def test_a_study_shows_its_variants_from_the_top_with_intervals() -> None:
    figure = plots.study(["k=1", "k=5 $x^{"], [0.5, 0.75], [(0.4, 0.6), None])
    axes = axes_of(figure)
    figure.savefig(io.BytesIO())
    bar, point, *_ = axes.lines
    assert points(bar) == pytest.approx(np.array([[40, 0], [60, 0]]))
    assert points(point) == pytest.approx(np.array([[50, 0]]))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["k=1", "k=5 $x^{"]
    assert axes.yaxis_inverted()

"""What an adapter is said to gain."""

import numpy as np
import pytest
from scipy.special import softmax

from cascadevlm.base.errors import DataError
from cascadevlm.base.types import Scores
from cascadevlm.decision.adapting import columns_of, linear_adapter
from cascadevlm.decision.means import Sums
from cascadevlm.decision.teaching import Linear
from cascadevlm.evaluation import adapting
from cascadevlm.evaluation.adapting import adapt
from cascadevlm.scorers.adapters import METHODS, LinearAdapter, Made, Method
from tests.decision.test_adapting import LABELS, C, accuracy, names, toy, unit


@pytest.mark.parametrize("method", METHODS)
def test_a_gain_is_measured_on_images_left_out(method: Method) -> None:
    scores, truths = toy(120)
    result = adapt(scores, names(truths), method=method)
    test, test_truths = toy(600, seed=1)
    assert result.gains
    assert result.before == pytest.approx(accuracy(None, scores, truths))
    assert result.after == pytest.approx(accuracy(result.adapter, test, test_truths), abs=0.05)
    assert result.gain == pytest.approx((result.after or 0) - (result.before or 0))
    assert result.measured == 120
    assert result.adapter.made.figures == {"before": result.before, "after": result.after, "measured": 120}


def test_near_duplicates_count_once() -> None:
    """One image of the first label, which the scorer gets wrong, a hundred times."""
    scores, truths = toy(40)
    rows = np.concatenate([np.arange(40), np.zeros(100, dtype=int)])
    once, often = adapt(scores, names(truths)), adapt(scores.rows(rows), names(truths[rows]))
    assert often.measured == once.measured == 40
    assert (often.before, often.after) == (once.before, once.after)


def test_without_labels_no_gain_is_told() -> None:
    scores, _ = toy(60, sure=1.5)
    result = adapt(scores, [""] * 60)
    assert (result.before, result.after, result.gain, result.gain_interval, result.measured) == (None, None, None, None, 0)
    assert not result.gains
    assert 0 < result.changed < 1


def test_some_labels_among_many_images_measure_the_gain() -> None:
    scores, truths = toy(300, sure=1.0)
    result = adapt(scores, [*names(truths[:40]), *[""] * 260])
    assert result.gains
    assert result.measured == 40
    with pytest.raises(DataError, match="19 different images with labels are too few to measure a gain: at least 20"):
        adapt(scores, [*names(truths[:19]), *[""] * 281])


def test_labels_without_an_image_are_counted_and_no_gain_is_claimed() -> None:
    scores, truths = toy(300)
    rows = np.flatnonzero(truths != 3)
    result = adapt(scores.rows(rows), names(truths[rows]))
    assert result.gain_interval is not None
    assert result.gain_interval[0] > 0
    assert (result.unseen, result.gains) == (1, False)
    assert adapt(scores, names(truths)).unseen == adapt(scores, [""] * 300).unseen == 0


def by_heart(scores: Scores, truths: list[str], *, method: Method) -> LinearAdapter:
    """The means of the images at full strength, which knows its own images far better than others; quick."""
    assert scores.embeddings is not None
    columns = columns_of(truths, LABELS)
    means = Sums.of(scores.embeddings, np.eye(C)[columns], np.ones(len(columns))).means()
    bias = means.offsets - means.mean @ means.directions
    linear = Linear(own=1.0, weights=means.directions.T.astype(np.float32), bias=bias)
    return linear_adapter(linear, LABELS, "noise", Made(method=method, images=len(columns), labelled=len(columns)))


def test_where_nothing_can_be_gained_a_gain_is_seldom_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scorer is as sure as it is right and the embeddings are noise, so no adapter is better. The lower end of a 95 %
    interval is above 0 for one draw in forty; more than twelve of 200 have a probability of .2 %."""
    monkeypatch.setattr(adapting, "fit_adapter", by_heart)
    told = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        logits = rng.normal(scale=2, size=(60, C))
        truths = np.array([rng.choice(C, p=softmax(row)) for row in logits])
        scores = Scores.from_logits(logits, LABELS, "noise", embeddings=unit(rng.normal(size=(60, 6))))
        told += adapt(scores, names(truths)).gains
    assert told <= 12

"""Guarantees: simulations of the promise, a comparison of the figures with scipy, and targets that the images do not support."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.special import expit, logit

from cascadevlm.base.errors import InputError
from cascadevlm.decision.guarantee import GRID, LEAST_SHARE, Acceptance, fit_acceptance, least_images
from cascadevlm.decision.judge_model import Bools
from cascadevlm.decision.scorer_calibration import Floats

Model = Callable[[np.random.Generator, int], tuple[Floats, Floats]]
"""Confidences of N images, and the probability that each image is right."""

seeds = st.integers(0, 10_000)
targets = st.floats(0.02, 0.5)


def calibrated(rng: np.random.Generator, size: int) -> tuple[Floats, Floats]:
    confidences = rng.beta(6, 0.6, size)
    return confidences, confidences


def overconfident(rng: np.random.Generator, size: int) -> tuple[Floats, Floats]:
    right = rng.beta(6, 0.8, size)
    return expit(2 * logit(right.clip(1e-9, 1 - 1e-9))), right


def right_nearly_everywhere(rng: np.random.Generator, size: int) -> tuple[Floats, Floats]:
    """All images could be accepted, because 3 % are wrong. Of the most probable images, 1 % are wrong. One of these errors must
    not end the sequence of tests.
    """
    confidences = rng.beta(8, 0.4, size)
    return confidences, 0.99 * (0.6 + 0.4 * confidences)


def underconfident_with_ties(rng: np.random.Generator, size: int) -> tuple[Floats, Floats]:
    """Three votes: 5.5 % of the images with two or more votes are wrong, which is slightly too many."""
    votes = rng.integers(0, 4, size)
    return votes / 4, np.array([0.3, 0.8, 0.91, 0.98])[votes]


def uninformative(rng: np.random.Generator, size: int) -> tuple[Floats, Floats]:
    """At every confidence, 5.5 % are wrong, so every threshold is slightly too low."""
    return rng.random(size), np.full(size, 0.945)


def worst_where_surest(rng: np.random.Generator, size: int) -> tuple[Floats, Floats]:
    """A violation of the assumption: 6 % of the most probable images are wrong, 2.3 % with the next images included, and 5.02 %
    with further images.
    """
    block = rng.choice(4, size, p=[0.05, 0.55, 0.3, 0.1])
    return np.array([0.9, 0.7, 0.5, 0.1])[block], 1 - np.array([0.06, 0.02, 0.104, 0.9])[block]


def true_errors(model: Model, thresholds: Sequence[float]) -> Floats:
    """For each threshold, the mean probability that an accepted image is wrong, over a million images."""
    confidences, right = model(np.random.default_rng(99), 1_000_000)
    order = np.argsort(confidences)
    accepted = len(order) - np.searchsorted(confidences[order], thresholds)
    errors: Floats = 1 - np.cumsum(right[order[::-1]])[accepted - 1] / accepted
    return errors


@pytest.mark.parametrize("size", [200, 1000])
@pytest.mark.parametrize(
    ("model", "accepted"),
    [
        (calibrated, {200: 0.25, 1000: 0.55}),
        (overconfident, {200: 0.1, 1000: 0.3}),
        (right_nearly_everywhere, {200: 0.35, 1000: 0.95}),
        (underconfident_with_ties, {200: 0.0, 1000: 0.1}),
        (uninformative, {200: 0.0, 1000: 0.0}),
        (worst_where_surest, {200: 0.15, 1000: 0.4}),
    ],
)
def test_the_target_is_missed_in_at_most_one_of_twenty_calibrations(model: Model, accepted: dict[int, float], size: int) -> None:
    trials, target = 500, 0.05
    rng = np.random.default_rng(3)
    found = []
    for _ in range(trials):
        confidences, right = model(rng, size)
        found.append(fit_acceptance(confidences, rng.random(size) < right, target_error=target))
    thresholds = [each.threshold for each in found if each.threshold is not None]
    missed = int((true_errors(model, thresholds) > target).sum()) if thresholds else 0
    assert missed <= trials * 0.05 + 3 * np.sqrt(trials * 0.05 * 0.95)
    assert np.mean([each.accepted for each in found]) >= accepted[size]


def test_the_closed_form_of_calibrated_confidences() -> None:
    """Uniform and calibrated: a share of (1 - t) / 2 is wrong above t. With many images, the threshold becomes 1 - 2 x the
    target.
    """
    rng = np.random.default_rng(0)
    confidences = rng.random(200_000)
    found = fit_acceptance(confidences, rng.random(200_000) < confidences, target_error=0.2)
    assert found.threshold == pytest.approx(0.6, abs=0.03)
    assert found.threshold is not None
    assert found.threshold > 0.6


def draw(seed: int, size: int) -> tuple[Floats, Bools]:
    rng = np.random.default_rng(seed)
    confidences, right = calibrated(rng, size)
    return confidences, rng.random(size) < right


@given(seeds, st.integers(1, 400), targets, st.floats(0.5, 0.99))
def test_the_figures_are_those_of_the_exact_binomial_test(seed: int, size: int, target: float, confidence: float) -> None:
    confidences, right = draw(seed, size)
    found = fit_acceptance(confidences, right, target_error=target, confidence=confidence)
    tested = [
        (threshold, confidences >= threshold)
        for threshold in GRID
        if (confidences >= threshold).sum() >= max(least_images(target, confidence), LEAST_SHARE * size)
    ]
    expected, most = None, 0
    for threshold, accepted in tested:
        if stats.binom.cdf((~right[accepted]).sum(), accepted.sum(), target) > 1 - confidence:
            break
        if accepted.sum() > most:
            expected, most = threshold, accepted.sum()
    assert found.threshold == expected
    if expected is None:
        assert (found.accepted, found.error, found.bound) == (0, None, None)
        assert not found.accepts(confidences).any()
        return
    accepted = found.accepts(confidences)
    assert (accepted == (confidences >= expected)).all()
    assert found.accepted == accepted.mean()
    assert found.error == pytest.approx((~right[accepted]).mean())
    test = stats.binomtest(int((~right[accepted]).sum()), int(accepted.sum()))
    assert found.bound == pytest.approx(test.proportion_ci(2 * confidence - 1, "exact").high, abs=1e-6)
    assert found.bound is not None
    assert found.bound <= target + 1e-9


@given(seeds, st.integers(1, len(GRID) - 1), targets, targets, st.floats(0.5, 0.99), st.floats(0.5, 0.99))
def test_a_stricter_target_or_more_confidence_never_lowers_the_threshold(
    seed: int, size: int, one: float, other: float, surely: float, more_surely: float
) -> None:
    rng = np.random.default_rng(seed)
    confidences = rng.choice(GRID[:-1], size, replace=False)
    right = rng.random(size) < 0.5 + 0.5 * confidences
    (low, high), (less, more) = sorted((one, other)), sorted((surely, more_surely))
    thresholds = {
        (target, confidence): fit_acceptance(confidences, right, target_error=target, confidence=confidence).threshold
        for target in (low, high)
        for confidence in (less, more)
    }

    def none_is_above_all(target: float, confidence: float) -> float:
        threshold = thresholds[target, confidence]
        return np.inf if threshold is None else threshold

    for confidence in (less, more):
        assert none_is_above_all(low, confidence) >= none_is_above_all(high, confidence)
    for target in (low, high):
        assert none_is_above_all(target, more) >= none_is_above_all(target, less)


@pytest.mark.parametrize(("target", "confidence", "least"), [(0.05, 0.95, 59), (0.1, 0.95, 29), (0.01, 0.99, 459)])
def test_too_few_images_support_nothing_even_if_all_are_right(target: float, confidence: float, least: int) -> None:
    assert least_images(target, confidence) == least
    enough = fit_acceptance(np.full(least, 0.9), np.ones(least, dtype=bool), target_error=target, confidence=confidence)
    assert enough.threshold is not None
    assert enough.threshold == max(threshold for threshold in GRID if threshold <= 0.9)
    assert (enough.accepted, enough.error) == (1, 0)
    assert "100.0% of" in enough.describe()
    few = fit_acceptance(np.full(least - 1, 0.9), np.ones(least - 1, dtype=bool), target_error=target, confidence=confidence)
    assert few.threshold is None
    assert few.describe() == (
        f"With {least - 1} labelled images, no threshold guarantees that at most {100 * target:.4g} % of the accepted answers "
        f"are wrong, with {100 * confidence:.4g} % confidence. The guarantee needs at least {least} accepted images without a "
        "wrong answer, or more with some wrong answers."
    )


def test_answers_that_are_missing_are_never_accepted() -> None:
    confidences = np.append(np.full(100, 0.9), np.full(50, np.nan))
    right = np.append(np.ones(100, dtype=bool), np.zeros(50, dtype=bool))
    found = fit_acceptance(confidences, right, target_error=0.05)
    assert found.accepted == pytest.approx(100 / 150)
    assert (found.accepts(confidences) == right).all()
    assert fit_acceptance(confidences[:0], right[:0], target_error=0.05) == Acceptance(
        target_error=0.05, confidence=0.95, images=0, threshold=None
    )


@pytest.mark.parametrize(("target", "confidence"), [(0.0, 0.95), (1.0, 0.95), (0.05, 1.0), (0.05, 0.0)])
def test_target_and_confidence_are_between_0_and_1(target: float, confidence: float) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        fit_acceptance(np.ones(100), np.ones(100, dtype=bool), target_error=target, confidence=confidence)


def test_answers_that_are_missing_are_not_even_accepted_at_0() -> None:
    confidences = np.array([1e-4] * 100 + [np.nan] * 20)
    found = fit_acceptance(confidences, ~np.isnan(confidences), target_error=0.05)
    assert (found.threshold, found.accepted, found.error) == (0.0, 100 / 120, 0.0)

"""Calibration of a scorer: fits compared with other minimisers and with simulated values, and the choice of the method."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.metrics import log_loss

from benchmarks.decision import made_up
from cascadevlm.decision.scorer_calibration import (
    FLOOR,
    MATCHING_PRECISION,
    MOST_CLASSES_MIXED,
    SCALE_PRECISION,
    Floats,
    ScorerCalibration,
    Shape,
    centre,
    cross_fit_scorer,
    fit_scorer,
    fit_shapes,
    floored,
    fold_of,
    match_prior,
)

seeds = st.integers(0, 10_000)


def truly(seed: int, size: int, classes: int = 8, spread: float = 2.0) -> tuple[Floats, Floats]:
    """Log-probabilities of N images, and one-hot truths drawn from them."""
    rng = np.random.default_rng(seed)
    log_probs = log_softmax(rng.normal(0, spread, (size, classes)), axis=1)
    drawn = (np.exp(log_probs).cumsum(axis=1) > rng.random((size, 1))).argmax(axis=1)
    return log_probs, np.eye(classes)[drawn]


def start_of(shape: Shape, log_probs: Floats) -> Floats:
    return match_prior(log_probs) if shape.matched else np.zeros(log_probs.shape[1])


def penalised(calibration: ScorerCalibration, log_probs: Floats, truths: Floats, shape: Shape) -> float:
    """The function that a fit minimises, written again: the loss and the normal priors. The prior of W is for scores with a
    standard deviation of 1.
    """
    start = start_of(shape, log_probs)
    shifted = centre(log_probs) + start
    bias = calibration.bias - calibration.scale * start
    loss = log_loss(truths, np.exp(calibration(log_probs)), normalize=False)
    loss += SCALE_PRECISION * np.log(calibration.scale) ** 2 / 2
    if calibration.mixing is not None:
        assert shape.mixing is not None
        bias = bias - (start - shifted.mean(axis=0)) @ calibration.mixing
        loss += shape.mixing * ((shifted.std() * calibration.mixing) ** 2).sum() / 2
    return float(loss + (shape.bias or 0.0) * (bias**2).sum() / 2)


@settings(max_examples=25)
@given(seeds, st.integers(2, 60), st.floats(0.05, 20), st.booleans())
def test_calibrated_rows_are_distributions(seed: int, classes: int, spread: float, certain: bool) -> None:
    log_probs, truths = truly(seed, 40, classes, spread)
    if certain:
        log_probs = np.where(log_probs < np.sort(log_probs, axis=1)[:, -2:-1], -np.inf, log_probs)
    for shape in (Shape(), Shape(matched=True, bias=1.0, mixing=3.0)):
        (calibration,) = fit_shapes(log_probs, truths, [shape])
        calibrated = calibration(log_probs)
        np.testing.assert_allclose(np.exp(calibrated).sum(axis=1), 1)
        np.testing.assert_allclose(calibration(log_probs.astype(np.float32)), calibrated, atol=1e-3)


def test_a_probability_of_0_is_as_small_as_the_floor_or_the_least_other() -> None:
    rows = floored(np.array([[0.0, -3.0, -np.inf], [0.0, -200.0, -np.inf], [0.0, -np.inf, -np.inf]]))
    np.testing.assert_array_equal(rows, [[0, -3, FLOOR], [0, -200, -200], [0, FLOOR, FLOOR]])


@pytest.mark.parametrize(
    "shape",
    [
        Shape(),
        Shape(matched=True),
        Shape(bias=1.0),
        Shape(matched=True, bias=3.0, mixing=3.0),
    ],
    ids=["temperature", "matched prior", "bias", "matrix"],
)
def test_no_neighbour_of_a_fit_is_better(shape: Shape) -> None:
    log_probs, truths = truly(1, 150, 5)
    log_probs = log_softmax(2.5 * log_probs + np.arange(5), axis=1)
    (fit,) = fit_shapes(log_probs, truths, [shape])
    least = penalised(fit, log_probs, truths, shape)
    rng = np.random.default_rng(0)
    for size in (0.3, 0.03):
        for _ in range(40):
            factor = np.exp(size * rng.normal())
            other = replace(fit, scale=fit.scale * factor, bias=fit.bias + fit.scale * (factor - 1) * start_of(shape, log_probs))
            if shape.bias is not None:
                other = replace(other, bias=other.bias + size * rng.normal(size=5))
            if fit.mixing is not None:
                other = replace(other, mixing=fit.mixing + size * rng.normal(size=(5, 5)))
            assert penalised(other, log_probs, truths, shape) > least - 1e-3


@settings(max_examples=30)
@given(seeds, st.floats(0.2, 5))
def test_the_temperature_is_that_of_a_scalar_minimiser(seed: int, temperature: float) -> None:
    log_probs, truths = truly(seed, 100)
    scaled = log_softmax(log_probs * temperature, axis=1)
    (fit,) = fit_shapes(scaled, truths, [Shape()])

    def loss(log_scale: float) -> float:
        unexplained = log_loss(truths, np.exp(log_softmax(scaled * np.exp(log_scale), axis=1)), normalize=False)
        return float(unexplained + SCALE_PRECISION * log_scale**2 / 2)

    found = minimize_scalar(loss, bounds=(-4, 4), method="bounded", options={"xatol": 1e-8})
    assert np.log(fit.scale) == pytest.approx(found.x, abs=2e-3)


def test_a_known_temperature_and_bias_are_found() -> None:
    """With 20,000 images, a scale is known to about 1 %, and a bias to about .03 nats."""
    log_probs, truths = truly(2, 20_000)
    bias = np.linspace(-1, 1, 8)
    given_scores = log_softmax(3.0 * log_probs - bias, axis=1)
    (fit,) = fit_shapes(given_scores, truths, [Shape(bias=0.01)])
    assert fit.scale == pytest.approx(1 / 3, rel=0.03)
    np.testing.assert_allclose(fit.bias - fit.bias.mean(), bias / 3, atol=0.1)
    np.testing.assert_allclose(np.exp(fit(given_scores)), np.exp(log_probs), atol=0.05)


@pytest.mark.parametrize("prior", [None, np.array([0.4, 0.3, 0.2, 0.05, 0.05])])
def test_marginals_match_the_prior(prior: Floats | None) -> None:
    log_probs = log_softmax(np.random.default_rng(3).normal(0, 2, (5000, 5)) + [0, 1, 2, -1, -2], axis=1)
    bias = match_prior(log_probs, prior)
    marginals = np.exp(log_softmax(log_probs + bias, axis=1)).mean(axis=0)
    np.testing.assert_allclose(marginals, np.full(5, 0.2) if prior is None else prior, atol=2e-3)


@pytest.mark.parametrize("images", [1, 20])
def test_few_images_bring_marginals_a_part_of_the_way(images: int) -> None:
    """The point at which the gain of the matching equals the cost of the prior of the biases."""
    seen = np.log(np.tile([0.98, 0.01, 0.01], (images, 1)))
    bias = match_prior(seen)
    marginals = softmax(seen + bias, axis=1).mean(axis=0)
    np.testing.assert_allclose(images * (1 / 3 - marginals), MATCHING_PRECISION * bias, atol=1e-2)
    assert 1 / 3 + 0.1 < marginals[0] < 0.98


def test_calibrated_scores_stay_so() -> None:
    """By chance, a richer method is chosen sometimes, which changes little. If no method is better, nothing is changed."""
    fits = [fit_scorer(*truly(seed, 200))[0] for seed in range(10)]
    log_probs, truths = truly(99, 5000)
    lost = [log_loss(truths, np.exp(fit(log_probs))) - log_loss(truths, np.exp(log_probs)) for fit in fits]
    assert np.mean(lost) < 0.01
    assert max(lost) < 0.04
    unchanged = next(fit for fit in fits if fit.method == "none")
    np.testing.assert_allclose(unchanged(log_probs), log_probs)


@settings(max_examples=6)
@given(st.floats(1e-3, 1e3))
def test_the_unit_of_the_scores_does_not_matter(unit: float) -> None:
    log_probs, truths = truly(3, 300)
    fit, held_out = fit_scorer(log_softmax(unit * log_probs, axis=1), truths)
    best, _ = fit_scorer(log_probs, truths)
    assert log_loss(truths, np.exp(fit(log_softmax(unit * log_probs, axis=1)))) < log_loss(truths, np.exp(best(log_probs))) + 0.03
    assert np.isfinite(held_out).all()


@pytest.mark.parametrize(
    ("skew", "mixed", "methods"),
    [(0.0, False, {"temperature", "bias"}), (1.5, False, {"bias", "matrix"}), (0.0, True, {"matrix"})],
    ids=["overconfident", "biased", "mixed"],
)
def test_what_is_wrong_is_put_right(skew: float, mixed: bool, methods: set[str]) -> None:
    """On new images, the result is close to the distribution of the truths. All tried methods are reported."""
    log_probs, truths = truly(4, 3000)
    rng = np.random.default_rng(4)
    mixing = np.eye(8) + 0.4 * rng.normal(size=(8, 8)) * mixed
    wrong = log_softmax(2.5 * log_probs @ mixing + skew * rng.normal(size=8), axis=1)
    fit, held_out = fit_scorer(wrong[:400], truths[:400])
    assert fit.method in methods
    assert fit.log_likelihoods is not None
    assert {"none", "temperature", "matched prior", "bias", "matrix"} == set(fit.log_likelihoods)
    own, best = (-log_loss(truths[400:], np.exp(scores[400:])) for scores in (wrong, log_probs))
    reached = -log_loss(truths[400:], np.exp(fit(wrong[400:])))
    assert reached > own + 0.75 * (best - own)
    assert max(fit.log_likelihoods.values()) - fit.log_likelihoods["none"] > 0.1
    assert -log_loss(truths[:400], np.exp(held_out)) == pytest.approx(reached, abs=0.15)


def test_a_matrix_has_to_be_better_by_more_than_a_standard_error() -> None:
    """With few images, it is sometimes better by chance. It is then not chosen."""
    passed_over = 0
    for seed in range(12):
        record = made_up(seed, 150, 4, 3)
        fit, _ = fit_scorer(record.scores.log_probs, np.eye(4)[record.truths])
        assert fit.log_likelihoods is not None
        matrix = fit.log_likelihoods.pop("matrix")
        assert fit.method != "matrix"
        passed_over += matrix > max(fit.log_likelihoods.values())
    assert passed_over >= 2


def test_held_out_probabilities_do_not_know_their_own_truth() -> None:
    """A fit on pure noise looks good on the images of the fit, and on no other images."""
    rng = np.random.default_rng(5)
    log_probs, truths = log_softmax(rng.normal(0, 3, (100, 10)), axis=1), np.eye(10)[rng.integers(0, 10, 100)]
    fit, held_out = fit_scorer(log_probs, truths)
    assert log_loss(truths, np.exp(held_out)) >= log_loss(truths, np.exp(fit(log_probs)))
    assert log_loss(truths, np.exp(held_out)) == pytest.approx(np.log(10), abs=0.15)


def test_each_fold_has_a_calibration_that_does_not_know_its_truths() -> None:
    log_probs, truths = truly(3, 100, 5)
    fit, folds = cross_fit_scorer(log_probs, truths), fold_of(100)
    for fold, without in enumerate(fit.without):
        np.testing.assert_allclose(without(log_probs[folds == fold]), fit.held_out[folds == fold], atol=1e-9)
    assert cross_fit_scorer(log_probs, truths, matrix=False).calibration.mixing is None


def test_many_classes_are_not_mixed() -> None:
    for classes, mixed in ((MOST_CLASSES_MIXED, True), (MOST_CLASSES_MIXED + 1, False)):
        fit, _ = fit_scorer(*truly(6, 60, classes))
        assert fit.log_likelihoods is not None
        assert ("matrix" in fit.log_likelihoods) == mixed


def test_a_prior_that_is_known_helps() -> None:
    """With biased scores and few labels, the shares of the classes show the bias."""
    log_probs, truths = truly(7, 3000, 20)
    skewed = log_softmax(log_probs + np.linspace(-3, 3, 20), axis=1)
    tried = {}
    for prior in (truths.mean(axis=0), np.exp(skewed[:60]).mean(axis=0)):
        fit, _ = fit_scorer(skewed[:60], truths[:60], prior=prior)
        assert fit.log_likelihoods is not None
        tried[prior[0]] = fit.log_likelihoods
    right, wrong = tried.values()
    assert right["matched prior"] > right["temperature"] + 0.1
    assert wrong["matched prior"] < wrong["temperature"] + 0.01
    assert {**right, "matched prior": 0} == {**wrong, "matched prior": 0}


@settings(max_examples=25)
@given(seeds, st.integers(5, 30), st.integers(1, 6))
def test_whatever_is_given_something_finite_is_fitted(seed: int, size: int, classes: int) -> None:
    """Also for one class, a single truth and equal scores."""
    rng = np.random.default_rng(seed)
    log_probs = log_softmax(np.round(rng.normal(0, 1, (size, classes))) * rng.integers(0, 2), axis=1)
    fit, held_out = fit_scorer(log_probs, np.eye(classes)[np.zeros(size, dtype=int)])
    assert np.isfinite(fit(log_probs)).all()
    assert np.isfinite(held_out).all()

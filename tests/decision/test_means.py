"""What images teach about embeddings: one mean per class, and one covariance."""

from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

from cascadevlm.decision.means import PRIOR_IMAGES, SHRINKAGE, STRENGTH, Sums, fit_strength
from cascadevlm.decision.scorer_calibration import Floats


def some(seed: int, images: int = 60, classes: int = 5, dimensions: int = 8) -> tuple[Floats, Floats, Floats]:
    """Unit embeddings, responsibilities and weights."""
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(size=(images, dimensions)) + 0.5
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings, rng.dirichlet(np.full(classes, 0.3), images), rng.uniform(0.1, 1, images)


def test_two_gaussians_have_the_evidence_of_the_closed_form() -> None:
    rng, centres = np.random.default_rng(0), np.array([[1.0, 0.0, 0.0], [-1.0, 0.5, 0.0]])
    truths = rng.integers(0, 2, 400_000)
    images = centres[truths] + rng.normal(size=(len(truths), 3))
    means = Sums.of(images, np.eye(2)[truths], np.ones(len(truths))).means()
    middle = centres.mean(axis=0)
    np.testing.assert_allclose(means.directions, (centres - middle).T, atol=0.02)
    np.testing.assert_allclose(means.offsets, -((centres - middle) ** 2).sum(axis=1) / 2, atol=0.02)
    logits = means.evidence(np.array([[0.3, -0.2, 5.0]]))
    assert logits[0, 0] - logits[0, 1] == pytest.approx((centres[0] - centres[1]) @ [0.3, -0.2, 5.0] - (1 - 1.25) / 2, abs=0.05)


@given(st.integers(0, 10_000), st.integers(3, 30), st.integers(2, 6), st.integers(2, 10))
def test_the_estimate_is_that_of_its_definition_in_loops(seed: int, images: int, classes: int, dimensions: int) -> None:
    embeddings, responsibilities, weights = some(seed, images, classes, dimensions)
    mean = sum(w * x for w, x in zip(weights, embeddings, strict=True)) / weights.sum()
    centres, scatter = [], np.zeros((dimensions, dimensions))
    for column in range(classes):
        share = weights * responsibilities[:, column]
        centres.append(sum(s * (x - mean) for s, x in zip(share, embeddings, strict=True)) / (share.sum() + PRIOR_IMAGES))
        scatter -= share.sum() * np.outer(centres[-1], centres[-1])
    for weight, x in zip(weights, embeddings, strict=True):
        scatter += weight * np.outer(x - mean, x - mean)
    covariance = scatter / weights.sum()
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * np.trace(covariance) / dimensions * np.eye(dimensions)
    inverse = np.linalg.inv(covariance)
    expected = [[x @ inverse @ c - c @ inverse @ c / 2 for c in centres] for x in embeddings - mean]
    found = Sums.of(embeddings, responsibilities, weights).means().evidence(embeddings)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


@given(st.integers(0, 10_000), st.integers(1, 59))
def test_sums_add_and_the_same_order_gives_the_same_bits(seed: int, cut: int) -> None:
    embeddings, responsibilities, weights = some(seed)
    whole = Sums.of(embeddings, responsibilities, weights)
    parts = [Sums.of(embeddings[r], responsibilities[r], weights[r]) for r in (slice(cut), slice(cut, None))]
    for found, expected in zip(astuple(parts[0] + parts[1]), astuple(whole), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-9)
    for found, expected in zip(astuple(parts[0] + parts[1]), astuple(parts[0] + parts[1]), strict=True):
        np.testing.assert_array_equal(found, expected)
    for found, expected in zip(astuple(Sums.of(embeddings, responsibilities, weights)), astuple(whole), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_opinions_side_by_side_are_those_one_by_one() -> None:
    embeddings, _, weights = some(0)
    opinions = np.stack([some(seed)[1] for seed in (1, 2)])
    both = Sums.zero(2, 5, 8) + Sums.of(embeddings, opinions, weights)
    for number in (0, 1):
        for found, expected in zip(
            astuple(both.opinion(number)), astuple(Sums.of(embeddings, opinions[number], weights)), strict=True
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_responsibilities_that_are_all_alike_and_no_images_say_nothing() -> None:
    embeddings, _, weights = some(0)
    alike = Sums.of(embeddings, np.full((60, 5), 0.2), weights).means()
    np.testing.assert_allclose(alike.evidence(embeddings), 0, atol=1e-9)
    np.testing.assert_array_equal(Sums.zero(5, 8).means().evidence(embeddings), 0)


@pytest.mark.parametrize("images", [1, 2, 7])
def test_images_that_are_all_alike_say_nothing(images: int) -> None:
    embeddings, responsibilities, weights = some(0, images)
    same = np.repeat(embeddings[:1], images, axis=0)
    found = Sums.of(same, responsibilities, weights).means().evidence(embeddings)
    np.testing.assert_allclose(found, 0, atol=1e-5)


def test_a_class_without_images_has_no_evidence_for_or_against_it() -> None:
    embeddings, responsibilities, weights = some(0)
    responsibilities = np.column_stack([responsibilities, np.zeros(60)])
    np.testing.assert_allclose(Sums.of(embeddings, responsibilities, weights).means().evidence(embeddings)[:, 5], 0)


@pytest.mark.parametrize(("own", "strength"), [(1.0, 0.5), (0.6, 0.1), (1.5, 1.0)])
def test_scale_and_strength_are_found(own: float, strength: float) -> None:
    rng = np.random.default_rng(0)
    log_probs, evidence = log_softmax(rng.normal(0, 2, (5000, 4)), axis=1), rng.normal(0, 3, (5000, 4))
    probabilities = np.exp(log_softmax(own * log_probs + strength * evidence, axis=1))
    truths = np.array([rng.choice(4, p=row) for row in probabilities])
    assert fit_strength(log_probs, evidence, np.eye(4)[truths]) == pytest.approx((own, strength), rel=0.1)
    assert fit_strength(log_probs, evidence, probabilities) == pytest.approx((own, strength), rel=0.03)


def test_evidence_that_says_nothing_gets_no_strength_and_without_images_there_is_a_default() -> None:
    rng = np.random.default_rng(0)
    log_probs, truths = log_softmax(rng.normal(0, 2, (2000, 4)), axis=1), rng.integers(0, 4, 2000)
    _, strength = fit_strength(log_probs, rng.normal(0, 3, (2000, 4)), np.eye(4)[truths])
    assert strength < 0.02
    assert fit_strength(np.empty((0, 4)), np.empty((0, 4)), np.empty((0, 4))) == (1.0, STRENGTH)

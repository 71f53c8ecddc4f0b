"""The weight of a judge: against the formula written out, against a search, and for judges whose worth is known."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

from benchmarks.decision import made_up
from cascadevlm.base.arrays import NOBODY
from cascadevlm.decision.judge_model import NONE_CHOSEN, Answers
from cascadevlm.decision.pool import MOST, Pool, fit_pool
from cascadevlm.decision.scorer_calibration import Floats
from cascadevlm.evaluation.calibrating.fitting import fit_calibration
from cascadevlm.evaluation.deciding import answers_of, decided
from tests.decision.test_judge_model import some_questions

seeds = st.integers(0, 10_000)


@given(seeds, st.booleans())
def test_opinions_are_multiplied(seed: int, none_offered: bool) -> None:
    """Every label alone: the scorer's probability times what the judge says of it to the weight."""
    rng = np.random.default_rng(seed)
    log_probs, answers = some_questions(rng, 8, 6, 4, none_offered=none_offered)
    own = np.where(answers.shown, rng.dirichlet(np.full(4, 0.5), 8), np.nan)
    own[:4] = np.nan
    pool = Pool(accuracy=rng.uniform(0.1, 0.95), weight=rng.uniform(0, 2))
    after = np.exp(pool.posterior(log_probs, replace(answers, probabilities=own)))
    for row in range(8):
        shown = answers.candidates[row][answers.shown[row]].tolist()
        said = np.zeros(6)
        if answers.answers[row] == NONE_CHOSEN:
            said[np.setdiff1d(np.arange(6), shown)] = 1
        elif row >= 4:
            said[shown] = own[row, : len(shown)]
        elif answers.answers[row] != NOBODY:
            said[answers.answers[row]] = 1
        expected = np.exp(log_probs[row]) * (pool.accuracy * said + (1 - pool.accuracy) / len(shown)) ** pool.weight
        np.testing.assert_allclose(after[row], expected / expected.sum(), atol=1e-12)


@given(seeds)
def test_a_judge_without_weight_and_one_that_is_silent_change_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    log_probs, answers = some_questions(rng, 8, 6, 4, none_offered=True)
    np.testing.assert_allclose(Pool(accuracy=0.9, weight=0).posterior(log_probs, answers), log_softmax(log_probs, axis=1))
    silent = replace(answers, answers=np.full(8, NOBODY))
    np.testing.assert_allclose(Pool(accuracy=0.9, weight=2).posterior(log_probs, silent), log_softmax(log_probs, axis=1))


def independent(size: int, accuracy: float) -> tuple[Answers, Floats, list[int]]:
    """A judge that errs evenly among six, whatever a calibrated scorer thinks."""
    rng = np.random.default_rng(3)
    log_probs = log_softmax(rng.normal(0, 2, (size, 6)), axis=1)
    truths = (np.exp(log_probs).cumsum(axis=1) > rng.random((size, 1))).argmax(axis=1)
    said = np.where(rng.random(size) < accuracy, truths, (truths + rng.integers(1, 6, size)) % 6)
    candidates = np.tile(np.arange(6), (size, 1))
    return Answers(candidates=candidates, answers=said, none_offered=False), log_probs, truths.tolist()


@pytest.mark.parametrize(("accuracy", "weight"), [(0.9, 1.0), (0.5, 1.0), (1 / 6, 0.0)])
def test_a_judge_that_errs_independently_counts_as_much_as_the_scorer(accuracy: float, weight: float) -> None:
    """All but one that guesses: the even share is of all candidates, so that its accuracy is a little above what it knows."""
    answers, log_probs, truths = independent(4000, accuracy)
    pool, held_out = fit_pool(log_probs, np.eye(6)[truths], answers)
    assert pool.accuracy == pytest.approx(accuracy, abs=0.02)
    assert pool.weight == pytest.approx(weight, abs=0.25)
    after = pool.posterior(log_probs, answers)
    at = np.arange(4000), truths
    assert held_out[at].mean() == pytest.approx(after[at].mean(), abs=0.005)
    weights = np.linspace(0, MOST, 501)
    tried = [replace(pool, weight=each).posterior(log_probs, answers)[at].sum() - (each - 1) ** 2 / 2 for each in weights]
    assert weights[int(np.argmax(tried))] == pytest.approx(pool.weight, abs=0.011)


def test_own_probabilities_count_where_they_say_more() -> None:
    answers, log_probs, truths = independent(1000, 0.7)
    rng = np.random.default_rng(0)
    evidence = rng.normal(0, 1, (1000, 6)) + 3 * np.eye(6)[truths]
    for own, informed in ((rng.dirichlet(np.ones(6), 1000), False), (np.exp(log_softmax(evidence, axis=1)), True)):
        told = replace(answers, probabilities=own)
        pool, held_out = fit_pool(log_probs, np.eye(6)[truths], told)
        plain, before = fit_pool(log_probs, np.eye(6)[truths], answers)
        assert pool.own is informed
        assert not plain.own
        if informed:
            assert held_out[np.arange(1000), truths].mean() > before[np.arange(1000), truths].mean()
        else:
            np.testing.assert_array_equal(pool.posterior(log_probs, told), plain.posterior(log_probs, answers))


def test_a_judge_that_repeats_the_scorer_has_little_weight() -> None:
    answers, log_probs, truths = independent(4000, 0.5)
    repeating = replace(answers, answers=log_probs.argmax(axis=1))
    assert fit_pool(log_probs, np.eye(6)[truths], repeating)[0].weight < 0.1


@pytest.mark.parametrize(("classes", "shown"), [(10, 10), (200, 5)])
def test_weighted_opinions_are_not_below_the_better(classes: int, shown: int) -> None:
    """After 200 labels, on 1,000 fresh images of three made-up data sets; and by how much the
    artifact says that one rule is better is so."""
    beyond, told, measured = [], [], []
    for seed in range(3):
        record = made_up(seed, 1200, classes, shown)
        own, rest = record.take(np.arange(200)), record.take(np.arange(200, 1200))
        calibration = fit_calibration(own, fusion="weighted")
        fused = decided(rest, calibration).fused
        assert fused is not None
        alone = max((decided(rest, calibration).scored == rest.truths).mean(), (rest.predicted == rest.truths).mean())
        beyond.append((fused.labels == rest.truths).mean() - alone)
        (judge,) = calibration.judges
        before = calibration.calibrated(rest.scores).log_probs.astype(float)
        likelihoods = judge.log_likelihoods
        assert likelihoods is not None
        told.append([likelihoods["bayes"], likelihoods["weighted"]])
        measured.append(
            [
                judge.fuser(rule).posterior(before, answers_of(rest.judged))[np.arange(1000), rest.truths].mean()
                for rule in ("bayes", "weighted")
            ]
        )
    assert np.mean(beyond) > -0.01
    differences = [np.mean(each, axis=0) @ [1, -1] for each in (told, measured)]
    assert differences[0] == pytest.approx(differences[1], abs=0.06)

"""Few labels, and images with a judge's answers beside them."""

from functools import cache

import numpy as np

from benchmarks.decision import made_up
from cascadevlm.base.arrays import NOBODY
from cascadevlm.decision.few_labels import FewLabels, fit_few_labels, held_out_gain
from cascadevlm.decision.judge_fit import fit_judge
from cascadevlm.decision.scorer_calibration import Floats, cross_fit_scorer
from cascadevlm.evaluation.deciding import answers_of
from cascadevlm.evaluation.record import Record


@cache
def record(seed: int) -> Record:
    """With a weak judge."""
    return made_up(seed, 1200, 10, 10, judge_noise=2.0)


def fitted(seed: int, images: int, labelled: int) -> FewLabels:
    own = record(seed).take(np.arange(images))
    truths = np.where(np.arange(images) < labelled, own.truths, NOBODY)
    return fit_few_labels(own.scores.log_probs, truths, answers_of(own.judged))


def before_and_after(fit: FewLabels, rest: Record) -> tuple[Floats, Floats]:
    before = fit.scorer.calibration(rest.scores.log_probs)
    return before, fit.model.posterior(before, answers_of(rest.judged))


def test_unlabelled_images_help_few_labels() -> None:
    """Mean log-likelihood of the truth after the answers, on other images, over four made-up data sets."""
    gained = []
    for seed in range(4):
        rest = record(seed).take(np.arange(400, 1200))
        one, both = (before_and_after(fitted(seed, images, 20), rest)[1] for images in (20, 400))
        rows = np.arange(len(rest))
        gained.append((both - one)[rows, rest.truths].mean())
    assert np.mean(gained) > 0.05
    assert np.mean(np.array(gained) > 0) > 0.6


def test_where_all_images_are_labelled_nothing_else_is_fitted() -> None:
    own = record(0).take(np.arange(100))
    fit, known = fitted(0, 100, 100), np.eye(10)[own.truths]
    scorer = cross_fit_scorer(own.scores.log_probs, known)
    model, after = fit_judge(scorer.held_out, known, answers_of(own.judged))
    np.testing.assert_array_equal(fit.after, after)
    assert fit.model.ability == model.ability


def test_the_held_out_gain_is_the_real_one_on_average() -> None:
    """Over 12 made-up data sets: within two standard errors and a point."""
    apart = []
    for seed in range(12):
        own, rest = record(seed).take(np.arange(100)), record(seed).take(np.arange(400, 1200))
        fit = fitted(seed, 100, 100)
        foretold, error = held_out_gain(fit.scorer.held_out, fit.after, own.truths)
        real, _ = held_out_gain(*before_and_after(fit, rest), rest.truths)
        assert abs(foretold - real) < 4 * error
        apart.append(foretold - real)
    assert abs(np.mean(apart)) < 0.01 + 2 * np.std(apart) / np.sqrt(len(apart))

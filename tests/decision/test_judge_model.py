"""The model of a judge compared with an enumeration of all answers, its fit compared with simulated judges, and calibration
without labels.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import TypeAdapter
from scipy.optimize import check_grad
from scipy.special import expit, log_softmax, softmax

from benchmarks.decision import made_up, worth
from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.base.types import Scores
from cascadevlm.decision.calibration import Calibration
from cascadevlm.decision.judge_fit import CONSTANTS, PRECISIONS, JudgeFitting, fit_judge
from cascadevlm.decision.judge_model import ABILITY, LEAST_PROBABILITY, NONE_BIAS, NONE_CHOSEN, Answers, JudgeModel
from cascadevlm.decision.scorer_calibration import Floats
from cascadevlm.evaluation.calibrating.fitting import fit_calibration
from cascadevlm.evaluation.calibrating.recipe import Recipe
from cascadevlm.evaluation.deciding import answers_of, decided
from cascadevlm.evaluation.metrics import expected_calibration_error
from cascadevlm.evaluation.sweep import sweep

seeds = st.integers(0, 10_000)


def some_model(rng: np.random.Generator, classes: int, positions: int) -> JudgeModel:
    return JudgeModel(
        ability=rng.normal(2, 1.5),
        abilities=rng.normal(0, 0.5, classes),
        following=rng.uniform(-0.2, 1.2),
        class_bias=rng.normal(0, 0.7, classes),
        position_bias=rng.normal(0, 0.5, positions),
        none_bias=rng.normal(-1, 1),
        none_ability=rng.normal(2, 1),
        silence=rng.normal(-2, 1),
        silence_ability=rng.normal(0, 1),
    )


def some_questions(
    rng: np.random.Generator, size: int, classes: int, shown: int, *, none_offered: bool
) -> tuple[Floats, Answers]:
    """Log-probabilities and answers of every kind: candidates in any order, lists of different lengths, "none", missing
    answers.
    """
    log_probs = np.log(rng.dirichlet(np.full(classes, 0.7), size).clip(1e-12))
    candidates = np.array([rng.permutation(classes)[:shown] for _ in range(size)])
    lengths = rng.integers(1, shown + 1, size)
    candidates[np.arange(shown) >= lengths[:, None]] = NOBODY
    answers = candidates[np.arange(size), rng.integers(0, lengths)]
    answers[rng.random(size) < 0.15] = NOBODY
    if none_offered:
        answers[rng.random(size) < 0.2] = NONE_CHOSEN
    return log_probs, Answers(candidates=candidates, answers=answers, none_offered=none_offered)


def options(answers: Answers, row: int) -> list[int]:
    """A possible answer of the judge about one image."""
    shown = [int(column) for column in answers.candidates[row] if column != NOBODY]
    return [*shown, *[NONE_CHOSEN] * answers.none_offered, NOBODY]


def enumerated(model: JudgeModel, log_probs: Floats, answers: Answers, row: int) -> Floats:
    """``(C, O)``: the probability of each option according to the description of the model, if the class is the truth."""
    shown, said = answers.candidates[row], options(answers, row)[:-1]
    utilities = np.zeros((log_probs.shape[1], len(said)))
    for truth in range(log_probs.shape[1]):
        for number, option in enumerate(said):
            if option == NONE_CHOSEN:
                utility = model.none_bias + model.none_ability * (truth not in shown)
            else:
                utility = model.following * log_probs[row, option] + model.class_bias[option]
                utility += model.position_bias[number] if number < len(model.position_bias) else 0
                utility += (model.ability + model.abilities[option]) * (option == truth)
            utilities[truth, number] = utility
    shown_or_not = np.isin(np.arange(log_probs.shape[1]), shown)
    silent = expit(model.silence + np.where(shown_or_not, 0.0, model.silence_ability))
    likelihood: Floats = np.column_stack([softmax(utilities, axis=1) * (1 - silent)[:, None], silent])
    return likelihood


cases = st.tuples(seeds, st.integers(1, 7), st.integers(1, 7), st.integers(0, 7), st.booleans())


@given(cases)
def test_posterior_and_gain_are_those_of_all_answers_enumerated(case: tuple[int, int, int, int, bool]) -> None:
    seed, classes, shown, positions, none_offered = case
    rng = np.random.default_rng(seed)
    model = some_model(rng, classes, positions)
    log_probs, answers = some_questions(rng, 6, classes, min(shown, classes), none_offered=none_offered)
    after = np.exp(model.posterior(log_probs, answers))
    gain, if_final = (
        model.gain(log_probs, answers.candidates, none_offered=none_offered, word_final=word_final)
        for word_final in (False, True)
    )
    for row in range(len(answers)):
        prior = np.exp(log_probs[row])
        joint = prior[:, None] * enumerated(model, log_probs, answers, row)
        assert joint.max(axis=0).sum() - prior.max() == pytest.approx(gain[row], abs=1e-9)
        final = [option if option >= 0 else prior.argmax() for option in options(answers, row)]
        assert joint[final, range(len(final))].sum() - prior.max() == pytest.approx(if_final[row], abs=1e-9)
        given_answer = joint[:, options(answers, row).index(int(answers.answers[row]))]
        np.testing.assert_allclose(after[row], given_answer / given_answer.sum(), atol=1e-12)


@given(cases)
def test_agreement_is_that_of_all_truths_enumerated(case: tuple[int, int, int, int, bool]) -> None:
    seed, classes, shown, positions, none_offered = case
    rng = np.random.default_rng(seed)
    model = some_model(rng, classes, positions)
    log_probs, answers = some_questions(rng, 6, classes, min(shown, classes), none_offered=none_offered)
    agreed, likely = model.agreement(log_probs, answers)
    others = np.full_like(log_probs, -np.inf)
    for row in range(len(answers)):
        columns = answers.candidates[row][answers.shown[row]]
        best = columns[log_probs[row, columns].argmax()]
        expected = np.exp(log_probs[row]) @ enumerated(model, log_probs, answers, row)[:, options(answers, row).index(best)]
        assert likely[row] == pytest.approx(expected, abs=1e-12)
        assert agreed[row] == (answers.answers[row] == best)
        others[row, columns] = log_probs[row, columns]
    np.testing.assert_allclose(model.agreement(others, answers)[1], likely, atol=1e-12)


@given(cases)
def test_asking_never_loses_and_gains_no_more_than_there_is(case: tuple[int, int, int, int, bool]) -> None:
    seed, classes, shown, positions, none_offered = case
    rng = np.random.default_rng(seed)
    log_probs, answers = some_questions(rng, 8, classes, min(shown, classes), none_offered=none_offered)
    gain = some_model(rng, classes, positions).gain(log_probs, answers.candidates, none_offered=none_offered)
    assert (gain >= 0).all()
    assert (gain <= 1 - np.exp(log_probs).max(axis=1) + 1e-9).all()


@given(seeds, st.booleans())
def test_a_judge_that_cannot_tell_is_worth_nothing(seed: int, none_offered: bool) -> None:
    rng = np.random.default_rng(seed)
    useless = replace(some_model(rng, 6, 4), ability=0.0, abilities=np.zeros(6), none_ability=0.0, silence_ability=0.0)
    log_probs, answers = some_questions(rng, 8, 6, 4, none_offered=none_offered)
    for model in (useless, replace(useless, following=0.0)):
        np.testing.assert_allclose(model.gain(log_probs, answers.candidates, none_offered=none_offered), 0, atol=1e-12)
        np.testing.assert_allclose(model.posterior(log_probs, answers), log_softmax(log_probs, axis=1), atol=1e-12)


@given(seeds)
def test_asking_about_nothing_is_worth_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    log_probs, _ = some_questions(rng, 8, 6, 4, none_offered=False)
    for width in (0, 4):
        assert (some_model(rng, 6, 4).gain(log_probs, np.full((8, width), NOBODY)) == 0).all()


@given(seeds)
def test_a_perfect_judge_is_worth_all_that_is_shown(seed: int) -> None:
    rng = np.random.default_rng(seed)
    log_probs, answers = some_questions(rng, 8, 6, 4, none_offered=False)
    perfect = replace(JudgeModel.prior(6), ability=60.0, following=0.0, silence=-60.0)
    shown = np.where(answers.shown, np.take_along_axis(np.exp(log_probs), np.maximum(answers.candidates, 0), axis=1), 0)
    everything = np.tile(np.arange(6), (8, 1))
    np.testing.assert_allclose(perfect.gain(log_probs, everything), 1 - np.exp(log_probs).max(axis=1), atol=1e-9)
    assert (perfect.gain(log_probs, answers.candidates) <= shown.sum(axis=1) + 1e-9).all()


@given(seeds, st.booleans())
def test_names_and_padding_mean_nothing(seed: int, none_offered: bool) -> None:
    """Columns in another order, an empty place in a list, and a wider array give the same result."""
    rng = np.random.default_rng(seed)
    model = some_model(rng, 6, 3)
    log_probs, answers = some_questions(rng, 8, 6, 4, none_offered=none_offered)
    after, gain = model.posterior(log_probs, answers), model.gain(log_probs, answers.candidates, none_offered=none_offered)
    wider = replace(answers, candidates=np.hstack([answers.candidates, np.full((8, 2), NOBODY)]))
    np.testing.assert_allclose(model.posterior(log_probs, wider), after)
    np.testing.assert_allclose(model.gain(log_probs, wider.candidates, none_offered=none_offered), gain, atol=1e-12)

    order = rng.permutation(6)

    def renamed(columns: Columns) -> Columns:
        return np.where(columns >= 0, np.argsort(order)[columns], columns)

    moved = replace(model, abilities=model.abilities[order], class_bias=model.class_bias[order])
    others = replace(answers, candidates=renamed(answers.candidates), answers=renamed(answers.answers))
    np.testing.assert_allclose(moved.posterior(log_probs[:, order], others), after[:, order])

    unplaced = replace(model, position_bias=np.zeros(0))
    shuffled = replace(answers, candidates=rng.permuted(answers.candidates, axis=1))
    np.testing.assert_allclose(unplaced.posterior(log_probs, shuffled), unplaced.posterior(log_probs, answers))


@given(seeds)
def test_own_probabilities_count_instead_of_the_answer(seed: int) -> None:
    """The odds of two candidates are the prior odds times (ratio of the probabilities to the utilities) to the power of the
    weight. The probability of the whole list, and images without probabilities, follow the answers.
    """
    rng = np.random.default_rng(seed)
    model = replace(some_model(rng, 6, 3), probability_weight=rng.uniform(0.1, 3))
    log_probs, answers = some_questions(rng, 8, 6, 4, none_offered=True)
    given_own = np.where(answers.shown, rng.dirichlet(np.full(4, 0.5), 8), np.nan)
    given_own[5:] = np.nan
    by_answers = model.posterior(log_probs, answers)
    after = model.posterior(log_probs, replace(answers, probabilities=given_own))
    np.testing.assert_allclose(np.exp(after).sum(axis=1), 1)
    np.testing.assert_array_equal(after[5:], by_answers[5:])
    for row in range(5):
        shown = answers.candidates[row][answers.shown[row]]
        others = np.setdiff1d(np.arange(6), shown)
        np.testing.assert_allclose(after[row, others], by_answers[row, others])
        utilities = model.following * log_probs[row, shown] + model.class_bias[shown]
        utilities += np.append(model.position_bias, 0)[: len(shown)]
        own = np.maximum(given_own[row, : len(shown)], LEAST_PROBABILITY)
        odds = log_probs[row, shown] + model.probability_weight * (np.log(own) - utilities)
        np.testing.assert_allclose(after[row, shown] - after[row, shown[0]], odds - odds[0], atol=1e-9)


@given(seeds)
def test_labels_that_were_not_shown_keep_their_odds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = some_model(rng, 8, 3)
    log_probs, answers = some_questions(rng, 8, 8, 3, none_offered=True)
    after = model.posterior(log_probs, answers)
    for row in range(8):
        others = np.setdiff1d(np.arange(8), answers.candidates[row])
        np.testing.assert_allclose(after[row, others] - after[row, others[0]], log_probs[row, others] - log_probs[row, others[0]])


def test_an_answer_outside_the_candidates_says_no_more_than_silence() -> None:
    model, log_probs = JudgeModel.prior(5, 2), np.log(np.full((1, 5), 0.2))
    shown = np.array([[0, 1]])
    said, silent = (Answers(candidates=shown, answers=np.array([one]), none_offered=False) for one in (4, NOBODY))
    np.testing.assert_array_equal(model.posterior(log_probs, said), model.posterior(log_probs, silent))


def test_none_of_these_speaks_for_the_others() -> None:
    log_probs = np.log([[0.5, 0.3, 0.15, 0.05]])
    answers = Answers(candidates=np.array([[0, 1]]), answers=np.array([NONE_CHOSEN]), none_offered=True)
    after = np.exp(JudgeModel.prior(4).posterior(log_probs, answers))[0]
    assert after[2] > 0.15
    assert after[:2].sum() < 0.8


@settings(max_examples=30)
@given(cases, st.booleans())
def test_the_gradient_is_that_of_the_likelihood(case: tuple[int, int, int, int, bool], certain: bool) -> None:
    seed, classes, shown, _, none_offered = case
    rng = np.random.default_rng(seed)
    log_probs, answers = some_questions(rng, 12, classes, min(shown, classes), none_offered=none_offered)
    truths = np.eye(classes)[rng.integers(0, classes, 12)] if certain else rng.dirichlet(np.ones(classes), 12)
    fitting = JudgeFitting(log_probs, truths, answers)
    values = fitting.start() + rng.normal(0, 0.5, len(fitting.start()))
    assert check_grad(fitting.log_likelihood, lambda at: fitting._likelihood(at)[1], values) < 1e-4
    likelihoods = [
        np.log(enumerated(fitting.model(values), log_probs, answers, row)[:, options(answers, row).index(int(said))])
        for row, said in enumerate(answers.answers)
    ]
    if certain:
        assert fitting.log_likelihood(values) == pytest.approx(float((truths * likelihoods).sum()))


def test_a_fit_is_a_maximum() -> None:
    rng = np.random.default_rng(1)
    log_probs, answers = some_questions(rng, 80, 5, 4, none_offered=True)
    fitting = JudgeFitting(log_probs, np.eye(5)[rng.integers(0, 5, 80)], answers)
    found = fitting.fit(fitting.start(), 3.0)
    precisions = np.concatenate([[*CONSTANTS.values()], np.full(len(found) - len(CONSTANTS), 3.0)])

    def penalised(values: Floats) -> float:
        return fitting.log_likelihood(values) - float(precisions @ (values - fitting.start()) ** 2) / 2

    for size in (0.3, 0.03):
        for _ in range(50):
            assert penalised(found + size * rng.normal(size=len(found))) < penalised(found) + 1e-3


def simulated(
    model: JudgeModel, size: int, classes: int, shown: int, seed: int = 0, *, none_offered: bool = False
) -> tuple[Floats, NDArray[np.int64], Answers]:
    """Calibrated scores, truths, and answers of a judge that follows a model exactly."""
    rng = np.random.default_rng(seed)
    log_probs = log_softmax(rng.normal(0, 2, (size, classes)), axis=1)
    truths = (np.exp(log_probs).cumsum(axis=1) > rng.random((size, 1))).argmax(axis=1)
    candidates = np.argsort(-log_probs, axis=1)[:, :shown]
    answers = Answers(candidates=candidates, answers=np.full(size, NOBODY), none_offered=none_offered)
    said = [
        rng.choice(options(answers, row), p=enumerated(model, log_probs, answers, row)[truth]) for row, truth in enumerate(truths)
    ]
    return log_probs, truths, replace(answers, answers=np.array(said))


def test_a_simulated_judge_is_recognised() -> None:
    """4,000 images, within about four standard errors: .1 for ability and silence, .02 for following."""
    truth = replace(
        some_model(np.random.default_rng(2), 6, 4),
        ability=1.5,
        following=0.3,
        abilities=np.zeros(6),
        class_bias=np.array([1.0, 0, 0, 0, 0, -1.0]),
        position_bias=np.array([0.8, 0, 0, -0.8]),
        none_bias=-0.5,
        none_ability=1.5,
        silence=-2.0,
    )
    log_probs, truths, answers = simulated(truth, 4000, 6, 4, none_offered=True)
    found, _ = fit_judge(log_probs, np.eye(6)[truths], answers)
    assert found.ability == pytest.approx(1.5, abs=0.3)
    assert found.following == pytest.approx(0.3, abs=0.1)
    assert found.none_ability == pytest.approx(1.5, abs=0.4)
    assert found.silence - found.none_bias == pytest.approx(-1.5, abs=0.4)
    np.testing.assert_allclose(found.class_bias - found.class_bias.mean(), truth.class_bias, atol=0.35)
    np.testing.assert_allclose(found.position_bias - found.position_bias.mean(), truth.position_bias, atol=0.35)
    gain, expected = (each.gain(log_probs, answers.candidates, none_offered=True) for each in (found, truth))
    np.testing.assert_allclose(gain, expected, atol=0.05)


def test_few_labels_say_little_of_a_class() -> None:
    """A judge is right in 25 of 25 cases. The abilities of two classes that it never saw stay near their prior."""
    log_probs, truths, answers = simulated(JudgeModel.prior(8), 25, 8, 8, seed=3)
    truths[truths > 5] = 0
    found, _ = fit_judge(log_probs, np.eye(8)[truths], replace(answers, answers=truths))
    assert ABILITY < found.ability < ABILITY + 4
    assert np.abs(found.abilities).max() < 1
    assert np.abs(found.abilities[6:]).max() < 0.3
    assert np.abs(found.class_bias).max() < 1


def test_nothing_known_is_the_prior() -> None:
    nothing = Answers(candidates=np.zeros((0, 3), dtype=int), answers=np.zeros(0, dtype=int), none_offered=False)
    (found, _), prior = fit_judge(np.zeros((0, 5)), np.zeros((0, 5)), nothing), JudgeModel.prior(5, 3)
    for name in ("ability", "following", "abilities", "class_bias", "position_bias", "silence"):
        np.testing.assert_allclose(getattr(found, name), getattr(prior, name), atol=1e-6)


def test_what_is_particular_is_only_believed_where_it_holds() -> None:
    """If a judge is equal for all classes, cross-validation chooses strong priors. If not, it chooses weak priors."""
    alike = replace(JudgeModel.prior(6, 6), ability=2.0)
    unlike = replace(alike, class_bias=np.array([3.0, -3, 2, -2, 1, -1]))
    spreads = []
    for model in (alike, unlike):
        log_probs, truths, answers = simulated(model, 600, 6, 6, seed=4)
        spreads.append(fit_judge(log_probs, np.eye(6)[truths], answers)[0].class_bias.std())
    assert spreads[0] < 0.3
    assert spreads[1] > 1.2
    assert tuple(sorted(PRECISIONS, reverse=True)) == PRECISIONS


def test_the_weight_of_probabilities_is_found() -> None:
    """The logarithms of the probabilities are utilities with normal noise. The weight is the ability divided by the variance.
    The resulting probabilities are calibrated, and are right more often than the answers alone.
    """
    rng = np.random.default_rng(7)
    log_probs = log_softmax(rng.normal(0, 2, (6000, 6)), axis=1)
    truths = (np.exp(log_probs).cumsum(axis=1) > rng.random((6000, 1))).argmax(axis=1)
    utilities = 2.0 * np.eye(6)[truths] + rng.normal(0, 1.5, (6000, 6))
    asked = Answers(
        candidates=np.tile(np.arange(6), (6000, 1)),
        answers=utilities.argmax(axis=1),
        none_offered=False,
        probabilities=softmax(utilities, axis=1),
    )
    found, held_out = fit_judge(log_probs[:4000], np.eye(6)[truths[:4000]], asked.rows(np.arange(4000)))
    assert found.probability_weight == pytest.approx(2.0 / 1.5**2, rel=0.15)
    fresh = asked.rows(np.arange(4000, 6000))
    with_own, by_answers = (model.posterior(log_probs[4000:], fresh) for model in (found, replace(found, probability_weight=0.0)))
    likelihoods = [float(after[np.arange(2000), truths[4000:]].mean()) for after in (with_own, by_answers)]
    assert likelihoods[0] > likelihoods[1] + 0.1
    assert held_out[np.arange(4000), truths[:4000]].mean() == pytest.approx(likelihoods[0], abs=0.05)
    right = with_own.argmax(axis=1) == truths[4000:]
    assert (expected_calibration_error(np.exp(with_own.max(axis=1)), right) or 0) < 0.04  # by the true weight, too, .02


@pytest.mark.parametrize("sharpness", [0.2, 1.0, 4.0])
def test_own_probabilities_say_more_than_answers(sharpness: float) -> None:
    """Underconfident, calibrated and overconfident judges of the generative model `benchmarks.decision.made_up`."""
    record = made_up(1, 1200, 10, 10, sharpness=sharpness)
    own, rest = record.take(np.arange(200)), record.take(np.arange(200, 1200))
    calibration = fit_calibration(own, Recipe())
    (judge,) = calibration.judges
    assert judge.model.probability_weight > 0
    alone = fit_calibration(replace(own, stages=(replace(own.judged, probabilities=None),)), Recipe()).judges[0].model
    assert alone.probability_weight == 0
    before = calibration.calibrated(rest.scores).log_probs.astype(float)
    with_own, by_answers = (model.posterior(before, answers_of(rest.judged)) for model in (judge.model, alone))
    at = np.arange(1000), rest.truths
    assert with_own[at].mean() > by_answers[at].mean() + 0.01
    right = with_own.argmax(axis=1) == rest.truths
    assert (expected_calibration_error(np.exp(with_own.max(axis=1)), right) or 0) < 0.05


@pytest.mark.parametrize("known", ["noise", "nothing", "the answer"])
def test_probabilities_that_say_nothing_more_have_no_weight(known: str) -> None:
    record = made_up(2, 300, 10, 5)
    rng, slots = np.random.default_rng(0), answers_of(record.judged).slots
    probabilities = {
        "noise": rng.dirichlet(np.full(5, 0.5), 300),
        "nothing": np.full((300, 5), 0.2),
        "the answer": np.where(np.arange(5) == slots[:, None], 0.96, 0.01),
    }[known]
    told = replace(record, stages=(replace(record.judged, probabilities=probabilities),))
    one, other = (fit_calibration(each, Recipe()) for each in (told, record))
    if known == "the answer":
        labels, others = (decided(record, each).fused for each in (one, other))
        assert labels is not None
        assert others is not None
        assert (labels.labels == others.labels).mean() > 0.98
    else:
        assert one.judges[0].model.probability_weight == 0
        np.testing.assert_array_equal(one.judges[0].model.class_bias, other.judges[0].model.class_bias)


@cache
def fused_beyond_better(classes: int, shown: int) -> tuple[Floats, Floats]:
    """Means over three seeds of `benchmarks.decision.made_up`, after 200 labels, on 1,500 new images with all questions asked:
    the fused accuracy minus the accuracy of the better of scorer and judge, and the calibration error of the fused
    probabilities.
    """
    beyond, errors = [], []
    for seed in range(3):
        record = made_up(seed, 1700, classes, shown)
        own, rest = record.take(np.arange(200)), record.take(np.arange(200, 1700))
        found = worth(rest, fit_calibration(own, Recipe()))
        alone = max(float((rest.scored == rest.truths).mean()), float((rest.predicted == rest.truths).mean()))
        beyond.append(found["fused"] - alone)
        errors.append(found["calibration_error"])
    return np.array(beyond), np.array(errors)


@pytest.mark.parametrize(("classes", "shown"), [(1000, 5), (10, 10)])
def test_both_together_are_not_below_the_better(classes: int, shown: int) -> None:
    """`benchmarks.decision.made_up` describes the generative model."""
    beyond, _ = fused_beyond_better(classes, shown)
    assert beyond.mean() > -0.01


def test_fused_probabilities_are_calibrated() -> None:
    _, errors = fused_beyond_better(10, 10)
    assert errors.mean() <= 0.04


def test_without_labels_is_better_than_raw_scores_and_entropy() -> None:
    """The area under accuracy against deferral rate, mean over five simulated data sets. It is at most 1 point below each
    opinion alone.
    """
    areas, raw, fused, alone = [], [], [], []
    for seed in range(5):
        record = made_up(seed, 1200, 10, 10)
        own, rest = record.take(np.arange(200)), record.take(np.arange(200, 1200))
        calibration = fit_calibration(own, Recipe(labelled=False))
        assert not calibration.labelled
        found = worth(rest, calibration)
        areas.append(found["area"])
        fused.append(found["fused"])
        raw.append(next(curve.area for curve in sweep(rest).curves if curve.name == "entropy"))
        alone.append(max(float((rest.scored == rest.truths).mean()), float((rest.predicted == rest.truths).mean())))
    assert np.mean(areas) > np.mean(raw) + 0.005
    assert np.mean(fused) > np.mean(alone) - 0.01


def test_without_labels_no_truth_is_looked_at() -> None:
    record = made_up(1, 200, 10, 10)
    wrong = replace(record, truths=record.truths[::-1].copy())
    one, other = (fit_calibration(each, Recipe(labelled=False)) for each in (record, wrong))
    adapter = TypeAdapter(Calibration)
    assert adapter.dump_python(one) | {"made": None} == adapter.dump_python(other) | {"made": None}


@pytest.mark.parametrize(("judge_noise", "unit"), [(2.5, 1.0), (1.0, 0.02)], ids=["a weak judge", "a timid scorer"])
def test_without_labels_nobody_is_believed_too_much(judge_noise: float, unit: float) -> None:
    """The accuracy of the better of scorer and judge minus the accuracy of the fused answers, mean over four simulated data
    sets.
    """
    behind, errors = [], []
    for seed in range(4):
        record = made_up(seed, 1200, 10, 10, judge_noise=judge_noise)
        scores = Scores.from_logits(unit * record.scores.log_probs, record.labels, record.scores.fingerprint)
        own, rest = (replace(record, scores=scores).take(rows) for rows in (np.arange(200), np.arange(200, 1200)))
        found = worth(rest, fit_calibration(own, Recipe(labelled=False)))
        behind.append(max((rest.scored == rest.truths).mean(), (rest.predicted == rest.truths).mean()) - found["fused"])
        errors.append(found["calibration_error"])
    assert np.mean(behind) < 0.01
    assert np.mean(errors) < 0.06


def test_silence_says_nothing_where_it_is_the_same_whatever_the_truth() -> None:
    """The judge gives no answer in three of ten cases, at random."""
    record = made_up(2, 1200, 10, 10)
    silent = np.random.default_rng(0).random(1200) < 0.3
    answers = np.where(silent, NOBODY, record.judged.answers)
    outcomes = tuple(np.where(silent, "refused", record.judged.outcomes).tolist())
    record = replace(record, stages=(replace(record.judged, answers=answers, outcomes=outcomes),))
    calibration = fit_calibration(record.take(np.arange(200)), Recipe())
    fused = decided(record.take(np.flatnonzero(silent)), calibration)
    assert fused.fused is not None
    np.testing.assert_allclose(fused.fused.probabilities, fused.scores.probabilities.max(axis=1), atol=1e-6)
    assert expit(calibration.judges[0].model.silence) == pytest.approx(0.3, abs=0.1)


def test_silence_speaks_for_what_is_not_shown_where_it_comes_with_that() -> None:
    truth = replace(JudgeModel.prior(20, 3), silence=-2.0, silence_ability=3.0)
    log_probs, truths, answers = simulated(truth, 3000, 20, 3, seed=8)
    model, _ = fit_judge(log_probs, np.eye(20)[truths], answers)
    assert model.silence_ability == pytest.approx(3.0, abs=0.6)
    before, after = (np.exp(each)[answers.answers == NOBODY] for each in (log_probs, model.posterior(log_probs, answers)))
    shown = np.take_along_axis(after, answers.candidates[answers.answers == NOBODY], axis=1).sum(axis=1)
    was = np.take_along_axis(before, answers.candidates[answers.answers == NOBODY], axis=1).sum(axis=1)
    assert (shown < was).all()


def test_none_of_these_that_was_not_offered_is_no_answer() -> None:
    rng = np.random.default_rng(4)
    log_probs, answers = some_questions(rng, 60, 6, 4, none_offered=False)
    odd = replace(answers, answers=np.where(rng.random(60) < 0.3, NONE_CHOSEN, answers.answers))
    silent = replace(answers, answers=np.where(odd.answers == NONE_CHOSEN, NOBODY, odd.answers))
    truths = np.eye(6)[rng.integers(0, 6, 60)]
    fits = [fit_judge(log_probs, truths, each) for each in (odd, silent)]
    np.testing.assert_array_equal(fits[0][1], fits[1][1])
    assert fits[0][0].none_bias == NONE_BIAS


def test_silent_judges_teach_nothing_and_break_nothing() -> None:
    record = made_up(2, 100, 10, 5)
    silent = replace(record, stages=(replace(record.judged, answers=np.full(100, NOBODY), outcomes=("refused",) * 100),))
    calibration = fit_calibration(silent, Recipe())
    fused = decided(silent, calibration)
    assert fused.fused is not None
    assert (fused.fused.labels == fused.scored).mean() > 0.95
    assert calibration.judges[0].model.silence > 0
    assert fused.fused.gain.max() < 0.05

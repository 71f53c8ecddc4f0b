"""Conformal sets against MAPIE's and their promises, and the best length of a list against a simulated judge."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mapie.classification import SplitConformalClassifier
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import StratifiedShuffleSplit

from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.base.errors import InputError
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Scores
from cascadevlm.cascade.candidates import ConformalSet, CumulativeMass
from cascadevlm.decision.conformal import FREE, PENALTY, Conformal, best_size
from cascadevlm.decision.judge_model import NONE_CHOSEN, Answers, JudgeModel
from cascadevlm.decision.scorer_calibration import Floats

seeds = st.integers(0, 10_000)
coverages = st.floats(0.05, 0.95)
penalties = st.sampled_from([0.0, 0.01, 0.2])


def draw(seed: int, size: int, classes: int, *, sure: float = 2.0) -> tuple[Floats, Columns]:
    """Probabilities of a scorer that thinks itself surer than it is, and truths; later classes are harder."""
    rng = np.random.default_rng(seed)
    truths = rng.permutation(size) % classes
    logits = rng.normal(size=(size, classes)) * np.linspace(0.7, 1.3, classes)[truths][:, None]
    logits[np.arange(size), truths] += sure
    return softmax(1.5 * logits, axis=1), truths


class Given(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn is not typed
    """A classifier whose probabilities are its features."""

    def fit(self, features: Floats, truths: Columns) -> "Given":
        self.classes_ = np.arange(features.shape[1])
        return self

    def predict(self, features: Floats) -> Columns:
        best: Columns = features.argmax(axis=1)
        return best

    def predict_proba(self, features: Floats) -> Floats:
        return features


def mapie(method: str, known: Floats, truths: Columns, coverage: float, seed: int) -> SplitConformalClassifier:
    classifier = Given().fit(known, truths)
    rule = SplitConformalClassifier(
        classifier, confidence_level=coverage, conformity_score=method, prefit=True, random_state=seed
    )
    return rule.conformalize(known, truths)


def mapie_sets(rule: SplitConformalClassifier, new: Floats, last: bool | str) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = rule.predict_set(new, conformity_score_params={"include_last_label": last})[1][:, :, 0]
    return found


def mapie_u(seed: int, size: int) -> Floats:
    """What MAPIE draws; it takes so much of a label's probability off, where we add the rest."""
    return 1 - np.random.RandomState(seed).uniform(size=size)


@pytest.mark.parametrize("coverage", [0.6, 0.9, 0.95])
@pytest.mark.parametrize(("classes", "seed"), [(3, 0), (10, 1), (50, 2)])
def test_adaptive_sets_are_those_of_mapie(classes: int, seed: int, coverage: float) -> None:
    known, truths = draw(seed, 300, classes)
    new, _ = draw(seed + 100, 500, classes)
    reference = mapie("aps", known, truths, coverage, seed)
    rule = Conformal.fit(known, truths, coverage=coverage, u=mapie_u(seed, 300))
    assert (rule.sets(new) == mapie_sets(reference, new, last=True)).all()
    assert (rule.sets(new, u=mapie_u(seed, 500)) == mapie_sets(reference, new, last="randomized")).all()


@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
@pytest.mark.parametrize(("classes", "seed"), [(10, 1), (50, 2)])
def test_regularised_sets_are_those_of_mapie_with_its_penalties(classes: int, seed: int, coverage: float) -> None:
    known, truths = draw(seed, 600, classes)
    new, _ = draw(seed + 100, 500, classes)
    reference = mapie("raps", known, truths, coverage, seed)
    expected = mapie_sets(reference, new, last=True)
    score = reference._conformity_score
    rest, _ = next(StratifiedShuffleSplit(n_splits=1, test_size=score.size_raps, random_state=seed).split(known, truths))
    penalty, free = float(score.lambda_star), int(score.k_star[0])
    rule = Conformal.fit(known[rest], truths[rest], coverage=coverage, penalty=penalty, free=free, u=mapie_u(seed, len(rest)))
    assert penalty > 0
    assert (rule.sets(new) == expected).all()
    # beyond the first penalised rank, MAPIE divides by other than the label's probability and leaves the scores' own sets
    randomised, theirs = rule.sets(new, u=mapie_u(seed, 500)), mapie_sets(reference, new, last="randomized")
    short = expected.sum(axis=1) <= free + 1
    assert (randomised[short] == theirs[short]).all()


def covered(rule: Conformal, probabilities: Floats, truths: Columns, u: int | None = None) -> float:
    return float(rule.sets(probabilities, u=u)[np.arange(len(truths)), truths].mean())


@pytest.mark.parametrize("coverage", [0.8, 0.9])
@pytest.mark.parametrize("penalty", [0.0, PENALTY])
def test_sets_cover_as_often_as_promised_and_more_often_if_only_scores_are_randomised(coverage: float, penalty: float) -> None:
    probabilities, truths = draw(0, 4000, 10)
    randomised, deterministic, mixed = [], [], []
    for seed in range(200):
        order = np.random.default_rng(seed).permutation(len(truths))
        known, new = order[:200], order[200:]
        plain, drawn = (
            Conformal.fit(probabilities[known], truths[known], coverage=coverage, penalty=penalty, u=u) for u in (None, seed)
        )
        deterministic.append(covered(plain, probabilities[new], truths[new]))
        randomised.append(covered(drawn, probabilities[new], truths[new], u=1000 + seed))
        mixed.append(covered(drawn, probabilities[new], truths[new]))
    assert np.mean(deterministic) == pytest.approx(coverage, abs=0.015)
    assert np.mean(randomised) == pytest.approx(coverage, abs=0.015)
    assert np.mean(mixed) > coverage + 0.015


def test_thresholds_of_their_own_make_up_for_difficult_classes() -> None:
    probabilities, truths = draw(1, 8000, 5)
    rng = np.random.default_rng(0)
    every: list[list[float]] = []
    own: list[list[float]] = []
    for seed in range(200):
        order = rng.permutation(len(truths))
        known, new = order[:500], order[500:]
        for found, conditional in ((every, False), (own, True)):
            rule = Conformal.fit(probabilities[known], truths[known], coverage=0.9, class_conditional=conditional, u=seed)
            inside = rule.sets(probabilities[new], u=seed + 1000)[np.arange(len(new)), truths[new]]
            found.append([float(inside[truths[new] == column].mean()) for column in range(5)])
    assert np.mean(own, axis=0) == pytest.approx(np.full(5, 0.9), abs=0.015)
    assert np.ptp(np.mean(every, axis=0)) > 0.05


def test_a_class_of_too_few_images_shares_the_threshold_of_all() -> None:
    probabilities, truths = draw(2, 200, 4)
    kept = np.sort(np.concatenate([np.flatnonzero(truths != 3), np.flatnonzero(truths == 3)[:8]]))
    shared = Conformal.fit(probabilities[kept], truths[kept], coverage=0.9)
    rule = Conformal.fit(probabilities[kept], truths[kept], coverage=0.9, class_conditional=True)
    assert rule.class_thresholds is not None
    assert rule.class_thresholds[3] == rule.threshold == shared.threshold
    assert (rule.class_thresholds[:3] != rule.threshold).any()
    with pytest.raises(InputError, match="Use sets"):
        rule.sizes(-np.sort(-probabilities, axis=1))


@pytest.mark.parametrize(("coverage", "enough"), [(0.9, 9), (0.95, 19), (0.99, 99)])
def test_too_few_images_promise_nothing(coverage: float, enough: int) -> None:
    probabilities, truths = draw(3, enough, 6)
    threshold = Conformal.fit(probabilities, truths, coverage=coverage, u=np.full(enough, 1.0)).threshold
    ranking = np.argsort(-probabilities, axis=1)
    sums = np.take_along_axis(probabilities, ranking, axis=1).cumsum(axis=1)[ranking == truths[:, None]]
    assert threshold == pytest.approx(sums.max())
    with pytest.raises(InputError, match=f"^{enough - 1} labelled images .* at least {enough},"):
        Conformal.fit(probabilities[1:], truths[1:], coverage=coverage)


@pytest.mark.parametrize("coverage", [0.0, 1.0, math.nan])
def test_a_coverage_is_between_0_and_1(coverage: float) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        Conformal.fit(*draw(0, 50, 3), coverage=coverage)


@given(seeds, st.integers(20, 60), st.integers(1, 12), coverages, coverages, penalties, st.booleans())
def test_sets_are_nested_in_coverage_and_hold_the_randomised_ones(
    seed: int, size: int, classes: int, one: float, other: float, penalty: float, class_conditional: bool
) -> None:
    probabilities, truths = draw(seed, size, classes)
    new, _ = draw(seed + 1, 40, classes)
    less, more = (
        Conformal.fit(probabilities, truths, coverage=coverage, penalty=penalty, u=seed) for coverage in sorted((one, other))
    )
    assert not (less.sets(new) & ~more.sets(new)).any()
    assert not (less.sets(new, u=seed) & ~more.sets(new, u=seed)).any()
    rule = Conformal.fit(probabilities, truths, coverage=one, penalty=penalty, class_conditional=class_conditional, u=seed)
    for u in (np.zeros(40), np.ones(40), np.random.default_rng(seed).random(40)):
        assert not (rule.sets(new, u=u) & ~rule.sets(new)).any()
    assert rule.sets(new)[np.arange(40), new.argmax(axis=1)].all()


@given(seeds, st.integers(2, 12), coverages, penalties, st.integers(1, 4), st.integers(0, 8))
def test_sizes_are_those_of_the_sets(
    seed: int, classes: int, coverage: float, penalty: float, minimum: int, further: int
) -> None:
    probabilities, truths = draw(seed, 60, classes)
    new, _ = draw(seed + 1, 40, classes)
    maximum = minimum + further
    rule = Conformal.fit(probabilities, truths, coverage=coverage, penalty=penalty, u=seed)
    descending = -np.sort(-new, axis=1)
    sizes = rule.sizes(descending, minimum=minimum, maximum=maximum)
    assert (sizes == rule.sizes(descending).clip(minimum, maximum).clip(max=classes)).all()
    assert (rule.sizes(descending[:, :maximum], minimum=minimum) == sizes).all()
    sets = rule.sets(new, minimum=minimum, maximum=maximum)
    assert (sets.sum(axis=1) == sizes).all()
    assert (np.where(sets, new, 1).min(axis=1) >= np.where(sets, 0, new).max(axis=1)).all()
    if not penalty:
        mass = CumulativeMass(mass=rule.threshold, minimum=minimum, maximum=maximum)
        assert (mass.sizes(descending).clip(max=classes) == sizes).all()
    own = Conformal.fit(probabilities, truths, coverage=coverage, class_conditional=True, u=seed)
    counts = own.sets(new, minimum=minimum, maximum=maximum).sum(axis=1)
    assert (counts == own.sets(new, minimum=minimum).sum(axis=1).clip(max=maximum)).all()
    assert (counts >= min(minimum, classes)).all()


def test_penalties_shorten_the_longest_sets() -> None:
    known, truths = draw(0, 500, 100, sure=1)
    new, _ = draw(1, 500, 100, sure=1)
    descending = -np.sort(-new, axis=1)
    sizes, shorter = (
        Conformal.fit(known, truths, coverage=0.9, penalty=penalty, free=FREE).sizes(descending) for penalty in (0, PENALTY)
    )
    assert np.percentile(shorter, 95) < np.percentile(sizes, 95)


def test_labels_of_no_probability_are_in_the_set_where_they_were_the_truth() -> None:
    probabilities = np.tile([1.0, 0.0, 0.0], (40, 1))
    truths = np.tile([0, 2], 20)
    assert Conformal.fit(probabilities, truths, coverage=0.9).sets(probabilities).all()


def simulate(log_probs: Floats, model: JudgeModel, size: int, none_offered: bool) -> float:
    """The accuracy after asking, where truths follow the scorer and answers the model's utilities."""
    rng = np.random.default_rng(size)
    candidates = np.argsort(-log_probs, axis=1)[:, :size]
    truths = (log_probs + rng.gumbel(size=log_probs.shape)).argmax(axis=1)
    shown = candidates == truths[:, None]
    utilities = model.following * np.take_along_axis(log_probs, candidates, axis=1) + model.ability * shown
    none = model.none_bias + model.none_ability * ~shown.any(axis=1) if none_offered else np.full(len(truths), -np.inf)
    options = np.column_stack([utilities, none, np.full(len(truths), model.silence)])
    chosen = (options + rng.gumbel(size=options.shape)).argmax(axis=1)
    special = np.tile([NONE_CHOSEN, NOBODY], (len(truths), 1))
    answers = np.column_stack([candidates, special])[np.arange(len(truths)), chosen]
    after = model.posterior(log_probs, Answers(candidates=candidates, answers=answers, none_offered=none_offered))
    return float((after.argmax(axis=1) == truths).mean())


@pytest.mark.parametrize(("none_offered", "expected"), [(False, 4), (True, 2)])
def test_the_best_size_is_the_one_a_simulated_judge_is_best_at(none_offered: bool, expected: int) -> None:
    log_probs = log_softmax(2.2 * np.random.default_rng(0).normal(size=(20_000, 12)), axis=1)
    model = replace(JudgeModel.prior(12), ability=2.0, following=0.0)
    sizes = (12, 8, 4, 2, 1)
    accuracies = {size: simulate(log_probs, model, size, none_offered) for size in sizes}
    assert best_size(log_probs, model, sizes, none_offered=none_offered) == expected == max(sizes, key=accuracies.__getitem__)


def test_an_able_judge_sees_all_and_one_that_knows_nothing_the_fewest() -> None:
    log_probs = log_softmax(np.random.default_rng(0).normal(size=(200, 8)), axis=1)
    able, unable = (replace(JudgeModel.prior(8), ability=ability, following=0.0) for ability in (20.0, 0.0))
    assert best_size(log_probs, able, [2, 8, 5]) == 8
    assert best_size(log_probs, unable, [5, 2, 8]) == 2


@given(seeds, st.integers(2, 12), st.integers(1, 4), st.integers(0, 6), penalties, st.booleans())
def test_lists_of_candidates_are_the_sets(
    seed: int, classes: int, minimum: int, more: int, penalty: float, class_conditional: bool
) -> None:
    probabilities, truths = draw(seed, 60, classes)
    rule = Conformal.fit(probabilities, truths, coverage=0.7, penalty=penalty, class_conditional=class_conditional)
    shown = ConformalSet(rule=rule, minimum=minimum, maximum=minimum + more)
    scores = Scores.from_logits(np.log(probabilities), LabelSet.of(f"class {n}" for n in range(classes)), "made up")
    columns = shown.columns(scores)
    inside = rule.sets(scores.probabilities, minimum=minimum, maximum=minimum + more)
    for row, own, label_set in zip(scores.probabilities, columns, inside, strict=True):
        known = own[own != NOBODY]
        assert set(known) == set(np.flatnonzero(label_set))
        assert min(minimum, classes) <= len(known) <= minimum + more
        assert (own[: len(known)] == known).all()
        assert (np.diff(row[known]) <= 0).all()

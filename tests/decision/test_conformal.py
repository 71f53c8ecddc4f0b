"""Conformal sets compared with their definition and their promise, and the best length of a list compared with a simulated
judge.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax

from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.base.errors import InputError
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Scores
from cascadevlm.cascade.candidates import ConformalSet, CumulativeMass
from cascadevlm.decision.conformal import Conformal, best_size
from cascadevlm.decision.judge_model import NONE_CHOSEN, Answers, JudgeModel
from cascadevlm.decision.scorer_calibration import Floats

seeds = st.integers(0, 10_000)
coverages = st.floats(0.05, 0.95)


def draw(seed: int, size: int, classes: int, *, sure: float = 2.0) -> tuple[Floats, Columns]:
    """Truths and probabilities of an overconfident scorer. Later classes are more difficult."""
    rng = np.random.default_rng(seed)
    truths = rng.permutation(size) % classes
    logits = rng.normal(size=(size, classes)) * np.linspace(0.7, 1.3, classes)[truths][:, None]
    logits[np.arange(size), truths] += sure
    return softmax(1.5 * logits, axis=1), truths


@given(seeds, st.integers(20, 60), st.integers(1, 8), coverages)
def test_sets_are_those_of_the_definition(seed: int, size: int, classes: int, coverage: float) -> None:
    known, truths = draw(seed, size, classes)
    new, _ = draw(seed + 1, 10, classes)

    def score(row: Floats, label: int) -> float:
        """The probability of all labels that are more probable."""
        return float(row[row > row[label]].sum())

    scores = sorted(score(row, truth) for row, truth in zip(known, truths, strict=True))
    rank = math.ceil((size + 1) * coverage)
    assume(rank <= size)
    threshold = scores[rank - 1] + 1e-12
    rule = Conformal.fit(known, truths, coverage=coverage)
    assert (rule.sets(new) == [[score(row, label) <= threshold for label in range(classes)] for row in new]).all()


@pytest.mark.parametrize("coverage", [0.8, 0.9])
def test_sets_cover_as_often_as_promised(coverage: float) -> None:
    probabilities, truths = draw(0, 4000, 10)
    covered = []
    for seed in range(200):
        order = np.random.default_rng(seed).permutation(len(truths))
        known, new = order[:200], order[200:]
        sets = Conformal.fit(probabilities[known], truths[known], coverage=coverage).sets(probabilities[new])
        covered.append(sets[np.arange(len(new)), truths[new]].mean())
    assert np.mean(covered) == pytest.approx(coverage, abs=0.015)


def test_thresholds_of_their_own_make_up_for_difficult_classes() -> None:
    probabilities, truths = draw(1, 8000, 5)
    rng = np.random.default_rng(0)
    every: list[list[float]] = []
    own: list[list[float]] = []
    for _ in range(200):
        order = rng.permutation(len(truths))
        known, new = order[:500], order[500:]
        for found, conditional in ((every, False), (own, True)):
            rule = Conformal.fit(probabilities[known], truths[known], coverage=0.9, class_conditional=conditional)
            inside = rule.sets(probabilities[new])[np.arange(len(new)), truths[new]]
            found.append([float(inside[truths[new] == column].mean()) for column in range(5)])
    assert (np.mean(own, axis=0) > 0.9 - 0.01).all()
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
    of_truth = probabilities[np.arange(enough), truths]
    before = np.where(probabilities > of_truth[:, None], probabilities, 0).sum(axis=1)
    assert Conformal.fit(probabilities, truths, coverage=coverage).threshold == pytest.approx(before.max())
    with pytest.raises(InputError, match=f"^{enough - 1} labelled images .* at least {enough} images,"):
        Conformal.fit(probabilities[1:], truths[1:], coverage=coverage)


@pytest.mark.parametrize("coverage", [0.0, 1.0, math.nan])
def test_a_coverage_is_between_0_and_1(coverage: float) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        Conformal.fit(*draw(0, 50, 3), coverage=coverage)


@given(seeds, st.integers(20, 60), st.integers(1, 12), coverages, coverages)
def test_sets_are_nested_in_coverage_and_never_empty(seed: int, size: int, classes: int, one: float, other: float) -> None:
    probabilities, truths = draw(seed, size, classes)
    new, _ = draw(seed + 1, 40, classes)
    less, more = (Conformal.fit(probabilities, truths, coverage=coverage) for coverage in sorted((one, other)))
    assert not (less.sets(new) & ~more.sets(new)).any()
    assert less.sets(new)[np.arange(40), new.argmax(axis=1)].all()


@given(seeds, st.integers(2, 12), coverages, st.integers(1, 4), st.integers(0, 8))
def test_sizes_are_those_of_the_sets(seed: int, classes: int, coverage: float, minimum: int, further: int) -> None:
    probabilities, truths = draw(seed, 60, classes)
    new, _ = draw(seed + 1, 40, classes)
    maximum = minimum + further
    rule = Conformal.fit(probabilities, truths, coverage=coverage)
    descending = -np.sort(-new, axis=1)
    sizes = rule.sizes(descending, minimum=minimum, maximum=maximum)
    assert (sizes == rule.sizes(descending).clip(minimum, maximum).clip(max=classes)).all()
    assert (rule.sizes(descending[:, :maximum], minimum=minimum) == sizes).all()
    sets = rule.sets(new, minimum=minimum, maximum=maximum)
    assert (sets.sum(axis=1) == sizes).all()
    assert (np.where(sets, new, 1).min(axis=1) >= np.where(sets, 0, new).max(axis=1)).all()
    if rule.threshold > 0:
        mass = CumulativeMass(mass=rule.threshold, minimum=minimum, maximum=maximum)
        assert (mass.sizes(descending).clip(max=classes) == sizes).all()
    own = Conformal.fit(probabilities, truths, coverage=coverage, class_conditional=True)
    counts = own.sets(new, minimum=minimum, maximum=maximum).sum(axis=1)
    assert (counts == own.sets(new, minimum=minimum).sum(axis=1).clip(max=maximum)).all()
    assert (counts >= min(minimum, classes)).all()


def test_labels_of_no_probability_are_in_the_set_where_they_were_the_truth() -> None:
    probabilities = np.tile([1.0, 0.0, 0.0], (40, 1))
    truths = np.tile([0, 2], 20)
    assert Conformal.fit(probabilities, truths, coverage=0.9).sets(probabilities).all()


def simulate(log_probs: Floats, model: JudgeModel, size: int, none_offered: bool) -> float:
    """The accuracy after the questions. The truths follow the scorer, and the answers follow the model's utilities."""
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


@given(seeds, st.integers(2, 12), st.integers(1, 4), st.integers(0, 6), st.booleans())
def test_lists_of_candidates_are_the_sets(seed: int, classes: int, minimum: int, more: int, class_conditional: bool) -> None:
    probabilities, truths = draw(seed, 60, classes)
    rule = Conformal.fit(probabilities, truths, coverage=0.7, class_conditional=class_conditional)
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

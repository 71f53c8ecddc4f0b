"""Promises of recall, precision and accuracy."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest

from cascadevlm import InputError
from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.decision import certifying
from cascadevlm.decision.agreement import Rows
from cascadevlm.decision.finding import Found, Wanted, find, precise_prefix
from cascadevlm.decision.judge_model import NONE_CHOSEN
from cascadevlm.decision.opinions import Images, Opinion
from cascadevlm.decision.scorer_calibration import ScorerCalibration


@pytest.fixture(autouse=True)
def untaught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The opinion stays that of the scorer, which is fast. The promise does not depend on the opinion."""

    def unchanged(images: Images, rows: Rows, answers: Columns) -> Opinion:
        return Opinion(rule=ScorerCalibration.identity(images.classes), held_out=images.scored(rows)[0])

    monkeypatch.setattr(certifying, "taught_by", unchanged)


def world(seed: int, images: int = 500, share: float = 0.3, skill: float = 2.0) -> tuple[Images, Columns]:
    """Two classes; column 1 is looked for. A negative skill orders the images badly."""
    rng = np.random.default_rng(seed)
    answers = (rng.random(images) < share).astype(np.int64)
    logits = skill * (2 * answers - 1) + 1.5 * rng.normal(size=images)
    both = np.stack([-np.logaddexp(0, logits), -np.logaddexp(0, -logits)], axis=1)
    return Images(log_probs=both), answers


def found_in(images: Images, answers: Columns, wanted: Wanted, seed: int) -> tuple[Found, list[int]]:
    """What was found, and all rows that were asked about."""
    seeking, asked = find(images, 1, wanted, seed=seed), []
    rows = next(seeking)
    while True:
        asked += rows.tolist()
        try:
            rows = seeking.send(answers[rows])
        except StopIteration as end:
            found: Found = end.value
            return found, asked


def recall(found: Found, answers: Columns) -> float:
    right = len(found.named) + int((answers[found.accepted] == 1).sum())
    return right / max(int((answers == 1).sum()), 1)


def precision(found: Found, answers: Columns) -> float:
    right = len(found.named) + int((answers[found.accepted] == 1).sum())
    return right / max(len(found.named) + len(found.accepted), 1)


@pytest.mark.parametrize("skill", [2.0, 0.0, -1.0])
@pytest.mark.parametrize("precise", [None, 0.9])
def test_recall_and_precision_are_kept(skill: float, precise: float | None) -> None:
    images, answers = world(0, images=300, skill=skill)
    wanted = Wanted(recall=0.9, precision=precise)
    found = [found_in(images, answers, wanted, seed)[0] for seed in range(200)]
    missed = sum(recall(each, answers) < 0.9 for each in found)
    wrong = sum(precision(each, answers) < (precise or 1) for each in found)
    assert binomtest(missed, 200, 0.05, alternative="greater").pvalue > 0.01
    assert binomtest(wrong, 200, 0.05, alternative="greater").pvalue > 0.01
    if precise is None:
        assert wrong == 0


def test_a_scorer_that_ranks_well_saves_questions() -> None:
    images, answers = world(1, images=1500)
    asked = np.mean([len(found_in(images, answers, Wanted(recall=0.9), seed)[1]) for seed in range(5)])
    both = np.mean([len(found_in(images, answers, Wanted(recall=0.9, precision=0.9), seed)[1]) for seed in range(5)])
    assert asked < 0.6 * 1500
    assert both < asked + 0.1 * 1500


def test_no_image_is_asked_about_twice() -> None:
    images, answers = world(2)
    found, asked = found_in(images, answers, Wanted(recall=0.9, precision=0.8), 0)
    assert len(asked) == len(set(asked))
    without = {*found.kept.tolist(), *found.accepted.tolist()}
    assert {*asked} == {*range(len(answers))} - without
    assert {*found.taught.tolist(), *found.order[found.drawn].tolist(), *found.rest.tolist()} == {*asked}
    assert sorted(found.named.tolist()) == [row for row in sorted(asked) if answers[row] == 1]


@pytest.mark.parametrize("total", [1, 2, 9])
def test_few_images(total: int) -> None:
    images, answers = world(5, images=total)
    found, asked = found_in(images, answers, Wanted(recall=0.9), 0)
    assert recall(found, answers) == 1 or not answers.any()
    assert len(asked) <= total


def test_a_judge_that_never_names_the_class_finds_nothing() -> None:
    images, answers = world(3)
    found, asked = found_in(images, np.full_like(answers, NONE_CHOSEN), Wanted(recall=0.9), 0)
    assert not len(found.named)
    assert len(asked) == 500  # no image may be missed


def test_questions_that_fail_hide_no_image_of_the_class() -> None:
    images, answers = world(6, share=0.2, skill=0.3)
    missed = 0
    for seed in range(200):
        seeking, rng = find(images, 1, Wanted(recall=0.8), seed=seed), np.random.default_rng(seed)
        rows, truths = next(seeking), answers.copy()
        while True:
            failed = rows[rng.random(len(rows)) < 0.4]  # images that are not asked about would not have failed
            truths[failed] = NOBODY
            try:
                rows = seeking.send(truths[rows])
            except StopIteration as end:
                found: Found = end.value
                break
        assert (truths[found.named] == 1).all()
        missed += recall(found, truths) < 0.8
    assert binomtest(missed, 200, 0.05, alternative="greater").pvalue > 0.01


def test_images_that_cannot_be_read_do_not_count() -> None:
    images, answers = world(4)
    rows = np.arange(0, 500, 2)
    found, asked = found_in(replace(images, rows=rows), answers[rows], Wanted(recall=0.9), 0)
    assert {*asked} == {*range(250)} - {*found.kept.tolist()}
    assert recall(found, answers[rows]) >= 0.9


def test_the_missable_number_is_exact() -> None:
    assert Wanted(recall=0.9).missable(9) == 1
    assert Wanted(recall=0.9).missable(8.99) == 0
    assert Wanted(recall=0.95).missable(190) == 10
    assert Wanted(recall=0.9, precision=0.9).level == 0.025


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_promises_are_between_0_and_1(value: float) -> None:
    with pytest.raises(InputError, match="recall"):
        Wanted(recall=value)
    with pytest.raises(InputError, match="precision"):
        Wanted(recall=0.5, precision=value)


@pytest.mark.parametrize("order", ["ordinary", "reversed", "random"])
def test_accuracy_is_kept_on_a_labelled_sample(order: str) -> None:
    rng, images = np.random.default_rng(0), 2000
    wrong = rng.random(images) < np.linspace(0, 0.5, images) ** 2 * 2
    wrong = {"ordinary": wrong, "reversed": wrong[::-1], "random": rng.permutation(wrong)}[order]
    broken, lengths = 0, []
    for _ in range(200):
        drawn = np.zeros(images, dtype=bool)
        drawn[rng.permutation(images)[:300]] = True
        length = precise_prefix(drawn, wrong, share=0.1, level=0.05)
        lengths.append(length)
        broken += length > 0 and wrong[:length].mean() > 0.1
    assert binomtest(broken, 200, 0.05, alternative="greater").pvalue > 0.01
    if order == "ordinary":  # the longest prefix with 10 % wrong has about 1,550 images
        assert np.mean(lengths) > 900


def test_the_lengths_that_are_tested_do_not_depend_on_the_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def cdf(found: NDArray[np.floating], lengths: Columns, wrong: Columns, drawn: Columns) -> NDArray[np.floating]:
        seen.append((found.tolist(), drawn.tolist()))
        return np.zeros(len(found))

    monkeypatch.setattr("cascadevlm.decision.finding.chance_of_at_most", cdf)
    for seed in range(2):
        drawn = np.random.default_rng(seed).permutation(400) < 100
        precise_prefix(drawn, np.zeros(400, dtype=bool), share=0.1, level=0.05)
    assert seen[0] == seen[2]
    assert seen[1] != seen[3]


def test_only_labels_of_drawn_images_count() -> None:
    drawn = np.arange(400) % 2 == 0
    wrong = np.random.default_rng(0).random(400) < 0.02
    assert precise_prefix(drawn, wrong, share=0.1, level=0.05) == precise_prefix(drawn, wrong | ~drawn, share=0.1, level=0.05) > 0

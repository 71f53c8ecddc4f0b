"""The rule of a certificate: which images are asked about."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import log_softmax
from scipy.stats import binomtest

from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.decision import certifying
from cascadevlm.decision.agreement import Promise, Rows, draw, longest_prefix
from cascadevlm.decision.certified_accuracy import certified_accuracy
from cascadevlm.decision.certifying import (
    Certificate,
    certify,
    first_rows,
    fit_disagreement,
    planned,
)
from cascadevlm.decision.opinions import Images, Opinion, Rule, applied, most_probable, taught_by
from cascadevlm.decision.scorer_calibration import Floats, ScorerCalibration
from cascadevlm.decision.teaching import Linear

PROMISE = Promise(agreement=0.9)


def world(seed: int, images: int = 600, classes: int = 5, dimensions: int = 12, noise: float = 0.5) -> tuple[Images, Columns]:
    """Images of classes in clusters, with a scorer that is often unsure, and the truths."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, dimensions))
    truths = rng.integers(0, classes, images)
    embeddings = centres[truths] + noise * rng.normal(size=(images, dimensions)) * 1.6
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    texts = centres + rng.normal(size=centres.shape)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    return Images(log_probs=log_softmax(12 * embeddings @ texts.T, axis=1), embeddings=embeddings), truths


def answered(truths: Columns, kind: str, seed: int) -> Columns:
    rng, classes = np.random.default_rng(seed), int(truths.max()) + 1
    if kind == "random":
        return rng.integers(0, classes, len(truths))
    answers = np.where(rng.random(len(truths)) < 0.1, rng.integers(0, classes, len(truths)), truths)
    return np.where(rng.random(len(truths)) < 0.1, NOBODY, answers) if kind == "refusing" else answers


def certificate(images: Images, answers: Columns, promise: Promise = PROMISE, seed: int = 0) -> tuple[Certificate, list[Rows]]:
    """The certificate, and what was asked."""
    asking, asked = certify(images, promise, seed=seed), []
    rows = next(asking)
    while True:
        asked.append(rows)
        try:
            rows = asking.send(answers[rows])
        except StopIteration as end:
            found: Certificate = end.value
            return found, asked


def wrong(found: Certificate, answers: Columns) -> int:
    return int((found.labels[found.kept] != answers[found.kept]).sum())


@pytest.fixture
def untaught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The opinion stays that of the scorer, which is fast. The promise does not depend on the opinion."""

    def unchanged(images: Images, rows: Rows, answers: Columns) -> Opinion:
        return Opinion(rule=ScorerCalibration.identity(images.classes), held_out=images.scored(rows)[0])

    monkeypatch.setattr(certifying, "taught_by", unchanged)


@pytest.mark.usefixtures("untaught")
@pytest.mark.parametrize("kind", ["ordinary", "refusing", "random", "reversed"])
def test_the_promise_is_kept_with_every_judge(kind: str) -> None:
    images, truths = world(0, images=240)
    if kind == "reversed":  # the surest answers are those that are wrong
        sure = most_probable(np.asarray(images.log_probs, dtype=np.float64))[1] > 1
        truths = np.where(sure, (images.log_probs.argmax(axis=1) + 1) % 5, images.log_probs.argmax(axis=1))
    answers = answered(truths, kind, 1)
    broken = sum(wrong(found, answers) > found.allowed for found, _ in (certificate(images, answers, seed=s) for s in range(200)))
    assert binomtest(broken, 200, 0.05, alternative="greater").pvalue > 0.01


def test_the_promise_is_kept_with_an_opinion_that_learns() -> None:
    images, truths = world(1, images=400, classes=3, dimensions=6)
    answers = answered(truths, "ordinary", 1)
    found = [certificate(images, answers, seed=seed)[0] for seed in range(20)]
    broken = sum(wrong(each, answers) > each.allowed for each in found)
    assert binomtest(broken, 20, 0.05, alternative="greater").pvalue > 0.01
    asked = np.mean([each.questions for each in found])
    assert asked < 0.8 * 400
    assert np.mean([each.planned for each in found]) == pytest.approx(asked, abs=0.05 * 400)


def test_learning_saves_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    images, truths = world(2, images=900)
    answers = answered(truths, "ordinary", 1)
    taught = np.mean([certificate(images, answers, seed=seed)[0].questions for seed in range(2)])
    scores = np.mean([certificate(replace(images, embeddings=None), answers, seed=seed)[0].questions for seed in range(2)])
    assert taught < 0.9 * scores


def test_every_image_is_asked_once_kept_or_left_for_the_end() -> None:
    images, truths = world(3)
    answers = answered(truths, "refusing", 1)
    found, asked = certificate(images, answers)
    everything = np.concatenate([*asked, found.rest, found.kept])
    assert sorted(everything.tolist()) == list(range(600))
    assert found.questions == sum(map(len, asked)) + len(found.rest)
    assert sorted(np.concatenate([found.taught, found.order]).tolist()) == list(range(600))
    assert (found.labels >= 0).all()


def test_the_facts_of_a_certificate_can_be_computed_again() -> None:
    images, truths = world(4)
    answers = answered(truths, "ordinary", 1)
    found, _ = certificate(images, answers, seed=5)
    others = np.setdiff1d(np.arange(600), found.taught)
    order = others[np.argsort(-found.log_odds[others], kind="stable")]
    assert (order == found.order).all()
    drawn = draw(order, int(found.drawn.sum()), 5)
    assert (drawn == found.drawn).all()
    disagrees = drawn & (found.labels[order] != answers[order])
    assert (disagrees == found.disagrees).all()
    assert longest_prefix(drawn, disagrees, allowed=found.allowed, level=0.05) == found.prefix
    assert found.found <= found.most


def test_the_rule_gives_the_labels_and_the_confidences() -> None:
    images, truths = world(5)
    found, _ = certificate(images, answered(truths, "ordinary", 1))
    assert isinstance(found.rule, Linear)
    labels, odds = most_probable(applied(found.rule, *images.scored(np.arange(600))))
    assert (labels == found.labels).all()
    np.testing.assert_allclose(odds, found.log_odds, rtol=1e-4, atol=1e-4)


def test_the_same_seed_and_answers_ask_about_the_same_images() -> None:
    images, truths = world(6)
    answers = answered(truths, "ordinary", 1)
    first, second, other = (certificate(images, answers, seed=seed)[1] for seed in (1, 1, 2))
    assert [rows.tolist() for rows in first] == [rows.tolist() for rows in second]
    assert [rows.tolist() for rows in first] != [rows.tolist() for rows in other]
    assert first[0].tolist() == first_rows(np.arange(600), len(first[0]), 1).tolist()


def test_answers_that_are_not_asked_for_change_nothing() -> None:
    images, truths = world(7)
    answers = answered(truths, "ordinary", 1)
    found, asked = certificate(images, answers)
    others = answers.copy()
    unseen = np.setdiff1d(np.arange(600), np.concatenate(asked))
    others[unseen] = (others[unseen] + 1) % 5
    again, _ = certificate(images, others)
    assert (again.kept == found.kept).all()
    assert (again.labels == found.labels).all()


@pytest.mark.parametrize("total", [1, 2, 7, 50])
def test_few_images(total: int) -> None:
    images, truths = world(8, images=total)
    for seed in range(5):
        found, _ = certificate(images, truths, seed=seed)
        assert len(found.kept) + found.questions == total
        assert found.allowed == total // 10


def test_a_promise_that_nothing_can_keep_asks_about_everything() -> None:
    images, truths = world(9, images=200)
    found, _ = certificate(images, answered(truths, "random", 1), Promise(agreement=0.999))
    assert found.allowed == 0
    assert found.questions == 200


def test_images_that_cannot_be_read_do_not_count() -> None:
    images, truths = world(10)
    readable = np.flatnonzero(np.arange(600) % 3 != 0)
    assert images.embeddings is not None
    part = replace(images, rows=readable)
    other = Images(log_probs=images.log_probs[readable], embeddings=images.embeddings[readable])
    found, asked = certificate(part, truths[readable])
    assert found.images == 400
    assert sorted(np.concatenate([*asked, found.rest, found.kept]).tolist()) == list(range(400))
    assert (found.labels == certificate(other, truths[readable])[0].labels).mean() > 0.8


def test_an_image_that_can_be_read_later_changes_few_questions() -> None:
    images, truths = world(10)
    answers = answered(truths, "ordinary", 1)
    readable = np.delete(np.arange(600), 3)
    before = {*readable[np.concatenate(certificate(replace(images, rows=readable), answers[readable])[1])].tolist()}
    after = {*np.concatenate(certificate(images, answers)[1]).tolist()}
    assert len(before - after) < 0.15 * len(before)


def test_an_answer_outside_the_candidates_is_never_kept() -> None:
    images, truths = world(11)
    listed = np.argsort(-images.log_probs, axis=1)[:, :2]
    listed[::2, 1] = NOBODY
    found, _ = certificate(replace(images, candidates=listed), truths)
    assert (found.labels[:, None] == listed).any(axis=1).all()


def test_the_cost_of_several_promises_is_estimated_from_the_first_answers() -> None:
    images, truths = world(12, images=1500)
    answers = answered(truths, "ordinary", 1)
    promises = [Promise(agreement=agreement) for agreement in (0.8, 0.9, 0.95)]
    costs: list[list[float]] = []
    for seed in range(4):
        first = first_rows(images.numbers, 200, seed)
        foretold = planned(images, first, answers[first], promises)
        assert all(each.low <= each.questions <= each.high for each in foretold)
        assert foretold[0].questions < foretold[1].questions < foretold[2].questions
        costs.append([foretold[1].questions, certificate(images, answers, seed=seed)[0].questions])
    estimated, real = np.mean(costs, axis=0)
    # What further answers will teach is not in the estimate, and these classes are learned easily.
    assert real - 0.05 * 1500 < estimated < real + 0.15 * 1500


def test_disagreement_is_estimated_by_log_odds() -> None:
    rng = np.random.default_rng(0)
    odds = rng.normal(2, 2, 20_000)
    disagrees = rng.random(20_000) < 1 / (1 + np.exp(0.5 + 0.7 * odds))
    (intercept, slope), covariance = fit_disagreement(odds, disagrees)
    assert intercept == pytest.approx(-0.5, abs=0.1)
    assert slope == pytest.approx(-0.7, abs=0.05)
    assert (np.sqrt(np.diag(covariance)) < 0.05).all()
    assert fit_disagreement(odds[:0], disagrees[:0])[0] == pytest.approx([0.0, -1.0])


def test_agreement_is_not_accuracy() -> None:
    images, truths = world(13, images=1500)
    answers = answered(truths, "ordinary", 1)
    found, _ = certificate(images, answers)
    labels = np.where(np.arange(1500) % 2 == 0, truths, NOBODY)
    right = certified_accuracy(found, images, answers, labels)
    assert right.labelled == 750
    final = answers.copy()
    final[found.kept] = found.labels[found.kept]
    assert right.certified == pytest.approx((final == truths)[::2].mean())
    assert right.judge is not None
    assert 0.8 < right.judge < 1
    # A judge without knowledge is overruled when both opinions are fused.
    blind = np.random.default_rng(0).integers(0, 5, 1500)
    found, _ = certificate(images, blind)
    right = certified_accuracy(found, images, blind, truths)
    assert right.fused > right.certified + 0.1


def test_a_million_images_need_no_million_rows_of_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    images, truths = world(14, images=5000)
    largest = 0

    def applied_to_few(rule: Rule, log_probs: Floats, embeddings: NDArray[np.float32] | None) -> Floats:
        nonlocal largest
        largest = max(largest, len(log_probs))
        return applied(rule, log_probs, embeddings)

    monkeypatch.setattr("cascadevlm.decision.opinions.applied", applied_to_few)
    monkeypatch.setattr("cascadevlm.decision.opinions.AT_ONCE", 512)
    opinion = taught_by(images, np.arange(100), truths[:100])
    opinion.of(images)
    assert largest == 512

"""Drift: no warning if the images are similar to the images of the calibration, and one warning of each kind if they are not."""

import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

from benchmarks.decision import made_up
from cascadevlm import Cascade, LabelSet, Prediction, Stage, TopK, load_prompt
from cascadevlm.base.errors import PermanentError
from cascadevlm.base.types import Candidate, Question, Scores, Verdict
from cascadevlm.cascade import drift
from cascadevlm.cascade.drift import WINDOW, Drift
from cascadevlm.cascade.fusing import CalibratedScorer
from cascadevlm.config.config import Config
from cascadevlm.decision.calibration import Calibration, Reference
from cascadevlm.decision.judge_model import Answers, JudgeModel
from cascadevlm.evaluation.calibrating.fitting import fit_calibration
from cascadevlm.evaluation.calibrating.recipe import Recipe
from cascadevlm.evaluation.data import Data
from cascadevlm.evaluation.deciding import answers_of
from cascadevlm.evaluation.evaluate import record_run
from cascadevlm.judges.prompt import options
from cascadevlm.runs.batches import batch
from cascadevlm.runs.batches.batch import stream_in_batches
from cascadevlm.testing import FakeJudge, FakeScorer, noise
from cascadevlm.testing.fakes import Reply
from cascadevlm_backends.openai import OpenAIJudge
from tests.calibrations import some_calibration
from tests.server import JudgeServer

NAMES = ["ant", "bee", "cicada", "dragonfly", "earwig", "fly"]
LABELS = LabelSet.of(NAMES)
SELECT = load_prompt("select")
MODEL = replace(JudgeModel.prior(len(NAMES)), ability=2.5, class_bias=np.linspace(-0.4, 0.4, len(NAMES)))
SCORES = "the scorer's mean probability of its best label is"
ANSWERS = "the share of the judge's answers that are the scorer's best label is"
FOREIGN = (9, 8)
"""The size of pictures of another kind, which differ from the calibration."""


class Scoring(FakeScorer):
    """Less sure of pictures of another kind."""

    def _logits(self, image: Image.Image, labels: LabelSet) -> Sequence[float]:
        logits = super()._logits(image, labels)
        return [0.3 * logit for logit in logits] if image.size == FOREIGN else logits


def pictures(first: int, last: int, size: tuple[int, int] = (8, 8)) -> list[Image.Image]:
    return [noise(seed, size) for seed in range(first, last)]


@cache
def calibration() -> Calibration:
    """A calibration that leaves the scorer unchanged, for a judge with a well-known model."""
    scores = FakeScorer().score(pictures(10_000, 11_000), LABELS)
    sureness = Reference.of(scores.probabilities.max(axis=1).astype(np.float64))
    return replace(some_calibration(NAMES, MODEL), images=1000, reference=sureness)


def by_the_model(question: Question) -> str:
    """An answer drawn from the judge's model, with the truth drawn from the probabilities of the candidates."""
    rng = np.random.default_rng(int(question.image_digest[:12], 16))
    probabilities = np.array([candidate.probability for candidate in question.candidates])
    truth = int((rng.random() > probabilities.cumsum()).sum())
    columns = [LABELS.columns[label.name] for label in question.labels]
    utilities = MODEL.following * np.log(probabilities) + MODEL.class_bias[columns]
    utilities[truth : truth + 1] += MODEL.ability
    said = rng.choice(len(columns) + 1, p=softmax(np.append(utilities, MODEL.silence)))
    return f"ANSWER: {[*options(question)][said]}" if said < len(columns) else "I cannot tell."


def blindly(question: Question) -> str:
    """For a picture of another kind, a random option."""
    if question.image.size != FOREIGN:
        return by_the_model(question)
    keys = [*options(question)]
    return f"ANSWER: {keys[int(question.image_digest, 16) % len(keys)]}"


def failing(question: Question) -> Reply:
    """Fails in one of twenty cases."""
    failed = int(question.image_digest, 16) % 20 == 0
    return PermanentError("The judge is away.") if failed else by_the_model(question)


def cascade(
    reply: Callable[[Question], Reply] = by_the_model, *, scorer: FakeScorer | None = None, stages: int = 1, widen: int = 0
) -> Cascade:
    rule, offered = TopK(k=4), widen > 0
    stage = Stage(
        judge=FakeJudge(reply=reply), prompt=SELECT, candidates=rule, fusion="bayes", model=MODEL, offer_none=offered, widen=widen
    )
    return Cascade(
        CalibratedScorer(scorer or FakeScorer(), calibration()), [stage] * stages, labels=LABELS, calibration=calibration()
    )


def warned(cascade: Cascade, images: Sequence[Image.Image]) -> list[str]:
    """The warnings of a run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cascade.classify(images)
    assert all(each.category is RuntimeWarning for each in caught)
    return [str(each.message) for each in caught]


def test_images_like_those_of_the_calibration_are_no_news() -> None:
    assert not warned(cascade(), pictures(0, 2 * WINDOW))


def test_a_judge_that_fails_now_and_then_is_no_news() -> None:
    assert not warned(cascade(failing), pictures(0, WINDOW + 100))


def test_less_certain_scores_are_told_once_in_every_run() -> None:
    images = pictures(0, 100) + pictures(0, 2 * WINDOW, FOREIGN)
    watched = cascade(scorer=Scoring())
    for _ in range(2):
        (told,) = warned(watched, images)
        assert told.startswith(f"In {WINDOW} images, {SCORES} 0.")
        seen, expected = map(float, re.findall(r"0\.\d\d", told))
        reference = calibration().reference
        assert reference is not None
        assert expected == pytest.approx(reference.mean, abs=0.01)
        assert seen < expected - 0.1
        assert "cascadevlm calibrate" in told


def test_a_judge_that_no_longer_sees_is_told_once() -> None:
    (told,) = warned(cascade(blindly), pictures(0, 100) + pictures(0, 2 * WINDOW, FOREIGN))
    assert told.startswith(f"In {WINDOW} images, {ANSWERS} 0.")


@pytest.mark.parametrize(
    ("deviation", "images", "off", "told"),
    [
        (0.1, 1_000_000, 0.06, True),  # 5 standard deviations are 0.022
        (0.1, 1_000_000, 0.04, False),  # no model is exact
        (0.3, 1_000_000, 0.08, True),  # 0.067
        (0.3, 1_000_000, 0.06, False),
        (0.3, 100, 0.12, False),  # 0.16: the mean of few images is not known well
        (0.3, 100, 0.18, True),
    ],
)
def test_a_window_is_off_by_more_than_chance(deviation: float, images: int, off: float, told: bool) -> None:
    seen = 0.5
    reference = Reference(images=images, mean=seen + off, deviation=deviation)
    row = np.log([seen, *[(1 - seen) / 5] * 5])
    scores = Scores(log_probs=np.tile(row, (WINDOW, 1)).astype(np.float32), labels=LABELS, fingerprint="")
    with pytest.warns(RuntimeWarning, match=SCORES) if told else nullcontext():
        Drift(replace(calibration(), reference=reference), []).scored(range(WINDOW), [], scores)


@pytest.mark.parametrize(("off", "told"), [(0.08, False), (0.13, True)])
def test_answers_vary_as_much_as_the_model_expects(off: float, told: bool) -> None:
    """For a share of about a half, 5 standard deviations over a window are 0.11, even if the share varied little during the
    calibration.
    """
    shown = [0.55, 0.2, 0.15, 0.1]
    answers = Answers(candidates=np.array([[0, 1, 2, 3]]), answers=np.array([0]), none_offered=False)
    log_probs = np.log([[*shown, 1e-9, 1e-9]])
    (likely,) = MODEL.agreement(log_probs, answers)[1]
    assert 0.4 < likely < 0.6
    (known,) = calibration().judges
    judges = (replace(known, reference=Reference(images=1_000_000, mean=0.0, deviation=0.01)),)
    watching = Drift(
        replace(calibration(), judges=judges, reference=None), [Stage(judge=FakeJudge(), prompt=SELECT, model=MODEL)]
    )
    candidates = tuple(
        Candidate(label=label, probability=share, rank=rank)
        for rank, (label, share) in enumerate(zip(LABELS, shown, strict=False), start=1)
    )
    with pytest.warns(RuntimeWarning, match=ANSWERS) if told else nullcontext():
        for number in range(WINDOW):
            answer = NAMES[0] if number < (likely - off) * WINDOW else NAMES[1]
            verdict = Verdict(outcome="answered", label=answer)
            watching.predicted(number, Prediction(label=answer, candidates=candidates, verdicts=(verdict,)))


def test_windows_belong_to_one_run() -> None:
    watched = cascade(blindly, scorer=Scoring())
    foreign = pictures(0, WINDOW - 1, FOREIGN)
    assert not warned(watched, foreign)
    assert not warned(watched, foreign)


@pytest.mark.parametrize(("stages", "widen"), [(2, 0), (1, 1)])
def test_a_judge_whose_first_question_is_not_told_is_not_watched(stages: int, widen: int) -> None:
    assert not warned(cascade(blindly, stages=stages, widen=widen), pictures(0, WINDOW, FOREIGN))


def test_a_scorer_that_was_calibrated_without_labels_is_not_watched() -> None:
    watched = cascade(scorer=Scoring())
    watched.calibration = replace(calibration(), reference=None)
    assert not warned(watched, pictures(0, WINDOW + 100, FOREIGN))


def test_labelled_images_in_order_are_evaluated_without_a_word(tmp_path: Path) -> None:
    images = pictures(0, WINDOW, FOREIGN)
    data = Data(images=images, names=tuple(map(str, range(WINDOW))), truths=("ant",) * WINDOW, splits=("",) * WINDOW)
    config = Config.parse({"scorer": {"use": "fake:fake"}, "stage": [{"judge": "fake:fake"}]})
    watched = cascade(blindly, scorer=Scoring())
    assert len(record_run(watched, data, tmp_path, config=config.model_dump(mode="json"))) == WINDOW
    assert watched.calibration is calibration()


def test_a_configuration_watches_by_its_calibration(tmp_path: Path) -> None:
    calibration().write(tmp_path / "calibration.json")
    config = {"scorer": {"use": "open_clip:aviary"}, "stage": [{"judge": "hf_chat:aviary"}]}
    assert Config.parse(config).build(LABELS).calibration is None
    judges = tuple(replace(judge, judge="hf_chat:aviary") for judge in calibration().judges)
    replace(calibration(), judges=judges).write(tmp_path / "calibration.json")
    built = Config.parse(config | {"calibration": str(tmp_path / "calibration.json")}).build(LABELS)
    assert built.calibration is not None
    assert built.calibration.reference == calibration().reference


def test_what_is_expected_is_what_was_seen_when_calibrating() -> None:
    record = made_up(2, 300, 10, 4)
    learned = fit_calibration(record, Recipe())
    (judge,) = learned.judges
    assert learned.reference is not None
    assert judge.reference is not None
    assert learned.reference.images == judge.reference.images == 300
    scores, answers = learned.calibrated(record.scores), answers_of(record.judged)
    agreed, likely = judge.model.agreement(scores.log_probs.astype(np.float64), answers)
    assert likely.mean() + judge.reference.mean == pytest.approx(agreed.mean(), abs=0.03)
    assert scores.probabilities.max(axis=1).mean() == pytest.approx(learned.reference.mean, abs=0.03)
    unlabelled = fit_calibration(record, Recipe(labelled=False))
    assert unlabelled.reference is None
    assert unlabelled.judges[0].reference is not None


def test_over_many_images_of_the_same_kind_there_is_no_warning() -> None:
    record = made_up(3, 20_600, 10, 4)
    own, rest = record.take(np.arange(600)), record.take(np.arange(600, 20_600))
    learned = fit_calibration(own, Recipe())
    stage = Stage(judge=FakeJudge(), prompt=SELECT, model=learned.judges[0].model)
    drift = Drift(learned, [stage])
    scores, judged = learned.calibrated(rest.scores), rest.judged
    drift.scored(range(len(scores)), [], scores)
    for row in range(len(rest)):
        shown = tuple(
            Candidate(label=rest.labels[column], probability=float(scores.probabilities[row, column]), rank=rank)
            for rank, column in enumerate(judged.candidates[row], start=1)
        )
        verdict = Verdict(outcome="answered", label=rest.labels.names[judged.answers[row]])
        drift.predicted(0, Prediction(label=verdict.label, candidates=shown, verdicts=(verdict,)))


async def test_in_batches_only_the_answers_that_count_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "WINDOW", 2)
    monkeypatch.setattr(batch, "POLL_SECONDS", 0.01)
    surprising = replace(calibration(), reference=Reference(images=100_000, mean=0.05, deviation=0.01), judges=())
    async with JudgeServer(answer=lambda conversation: "ANSWER: A") as server:
        judge = OpenAIJudge("gpt-9", base_url=server.openai_url, price={"input": 1, "output": 1})
        cascade = Cascade(FakeScorer(), [Stage(judge=judge, prompt=SELECT)], labels=LABELS, calibration=surprising)
        with pytest.warns(RuntimeWarning, match=SCORES) as told:
            found = [each async for each in stream_in_batches(cascade, pictures(0, 4), folder=tmp_path)]
    assert all(each.decided_by == "judge" for each in found)
    assert len(told) == 1

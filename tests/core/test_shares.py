"""Shares of classes that a run follows."""

import asyncio
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.special import log_softmax

from cascadevlm import Cascade, LabelSet, Prediction, Stage, bulk, load_prompt, parse_policy
from cascadevlm.decision import shares
from cascadevlm.decision.calibration import CalibratedJudge, Calibration
from cascadevlm.decision.judge_model import JudgeModel
from cascadevlm.decision.live import CalibratedScorer
from cascadevlm.decision.scorer_calibration import Floats, ScorerCalibration
from cascadevlm.decision.shares import MEMORY, PERIOD, Following, Seen, Shares
from cascadevlm.errors import ConfigError
from cascadevlm.images import ImageSource
from cascadevlm.inputs import Named
from cascadevlm.testing import FakeJudge, FakeScorer, noise
from cascadevlm.types import Question, Scores, Verdict

NAMES = ["ant", "bee", "cicada", "dragonfly"]
LABELS = LabelSet.of(NAMES)
SHARES = Shares(images=20, shares=np.array([0.1, 0.2, 0.3, 0.4]))
MODEL = JudgeModel.prior(len(NAMES))
CALIBRATION = Calibration(
    labels=LABELS.names,
    fingerprint="fake:fake",
    scorer=ScorerCalibration(method="none", scale=1.0, bias=np.zeros(len(NAMES))),
    judges=(CalibratedJudge(judge="fake:fake", settings={}, model=MODEL),),
    images=20,
    labelled=True,
    fitted_on=(),
    shares=SHARES,
)


class Jittery(FakeJudge):
    """Names the same option of the same image, sooner or later."""

    def __init__(self, seed: int) -> None:
        super().__init__(reply=lambda question: f"ANSWER: {'ABCD'[int(question.image_digest, 16) % 4]}")
        self.random = random.Random(seed)

    async def judge(self, question: Question) -> Verdict:
        await asyncio.sleep(self.random.random() * 0.01)
        return await super().judge(question)


def cascade(judge: FakeJudge | None = None, *, follow_shares: bool = True, batch_size: int = 4, fusion: str = "bayes") -> Cascade:
    stage = Stage(
        judge=judge or Jittery(0),
        prompt=load_prompt("select"),
        policy=parse_policy("gain > 0.1"),
        fusion=fusion,  # type: ignore[arg-type]
        model=MODEL,
    )
    scorer = CalibratedScorer(FakeScorer(), CALIBRATION)
    return Cascade(scorer, [stage], labels=LABELS, calibration=CALIBRATION, follow_shares=follow_shares, batch_size=batch_size)


def told(predictions: Sequence[Prediction]) -> list[object]:
    return [(each.label, each.probability, each.escalated, each.reasons) for each in predictions]


def followed(log_probs: Floats, calibrated: Shares, batch: int) -> tuple[Floats, Seen]:
    """The log-probabilities of images in batches, where nobody is asked."""

    async def follow() -> tuple[Floats, Seen]:
        following, found = Following(calibrated, Seen(), batch), []
        for begin in range(0, len(log_probs), batch):
            scores = Scores.from_logits(log_probs[begin : begin + batch], LABELS, "made up")
            adjusted = await following.adjusted(scores, begin)
            await following.take([adjusted.rows(slice(row, row + 1)) for row in range(len(adjusted))], begin)
            found.append(adjusted.log_probs)
        return np.concatenate(found).astype(np.float64), following.seen

    return asyncio.run(follow())


@pytest.mark.parametrize("batch", [1, 7, 64, PERIOD + 44])
def test_each_period_goes_by_the_beliefs_before_its_predecessor(batch: int) -> None:
    log_probs = log_softmax(np.random.default_rng(batch).normal(0, 2, (5 * PERIOD, 4)), axis=1)
    found, _ = followed(log_probs, SHARES, batch)
    begins = np.arange(len(log_probs)) // batch * batch
    periods = begins // max(PERIOD, batch)
    for period in np.unique(periods):
        ages = np.maximum(period - 2 - periods, 0)[:, None] * max(PERIOD, batch)
        sums = SHARES.images * SHARES.shares + (np.exp(found - ages / MEMORY))[periods < period - 1].sum(axis=0)
        expected = log_softmax(log_probs + np.log(sums / sums.sum() / SHARES.shares), axis=1)
        np.testing.assert_allclose(found[periods == period], expected[periods == period], atol=1e-4)
    np.testing.assert_allclose(found[periods <= 1], log_probs[periods <= 1], atol=1e-5)


def test_shares_that_changed_are_found_and_the_scores_are_better_for_it() -> None:
    rng, truly = np.random.default_rng(0), np.array([0.7, 0.2, 0.05, 0.05])
    truths = rng.choice(4, 20_000, p=truly)
    logits = 2 * (rng.normal(0, 1, (len(truths), 4)) + 2 * np.eye(4)[truths])  # calibrated, were all classes alike
    log_probs = log_softmax(logits, axis=1)
    alike = Shares(images=200, shares=np.full(4, 0.25))
    found, seen = followed(log_probs, alike, 64)
    sums = np.sum([seen.earlier, seen.previous, seen.current], axis=0)
    np.testing.assert_allclose(sums / sums.sum(), truly, atol=0.04)
    late, rows = slice(10_000, None), np.arange(10_000)
    best = log_softmax(log_probs + np.log(truly), axis=1)[late][rows, truths[late]].mean()
    before, after = (values[late][rows, truths[late]].mean() for values in (log_probs, found))
    assert after > before + 0.9 * (best - before)


@pytest.mark.parametrize("fusion", ["bayes", "judge"])
@pytest.mark.parametrize("batch_size", [3, 40])
def test_predictions_are_the_same_whatever_the_latencies(monkeypatch: pytest.MonkeyPatch, batch_size: int, fusion: str) -> None:
    monkeypatch.setattr(shares, "PERIOD", 16)
    images = [noise(number, (8, 8)) for number in range(120)]
    runs = [cascade(Jittery(seed), batch_size=batch_size, fusion=fusion).classify(images) for seed in (1, 2)]
    assert told(runs[0]) == told(runs[1])
    assert told(runs[0]) != told(cascade(follow_shares=False, batch_size=batch_size, fusion=fusion).classify(images))


def test_a_run_goes_on_with_what_it_has_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "PERIOD", 16)

    def images() -> list[Named]:
        return [(str(number), noise(number, (8, 8))) for number in range(150)]

    bulk.run(cascade(), images(), tmp_path / "whole", config={})
    for batches in (3, 9, 2, 100):
        stop = (number >= batches for number in range(1000))
        bulk.run(cascade(), images(), tmp_path / "parts", config={}, stopping=partial(next, stop))
    whole, parts = ((tmp_path / name / "predictions.jsonl").read_text() for name in ("whole", "parts"))
    assert whole == parts


def test_unreadable_images_have_no_share() -> None:
    images: list[ImageSource] = [b"no image"] * 300
    assert all(prediction.error for prediction in cascade().classify([*images, Image.new("RGB", (8, 8))])[:300])


def test_shares_are_followed_from_those_of_a_calibration() -> None:
    with pytest.raises(ConfigError, match="needs a calibration"):
        Cascade(FakeScorer(), [], labels=LABELS, follow_shares=True)

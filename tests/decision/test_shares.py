"""Class shares that a run follows."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax

from cascadevlm import Cascade, LabelSet, Prediction, Stage, load_prompt, parse_policy
from cascadevlm.base.errors import ConfigError, InputError
from cascadevlm.base.images import ImageSource
from cascadevlm.base.types import NANODOLLARS, Question, Scores, Verdict
from cascadevlm.cascade.fusing import CalibratedScorer
from cascadevlm.decision import shares
from cascadevlm.decision.judge_model import JudgeModel
from cascadevlm.decision.scorer_calibration import Floats
from cascadevlm.decision.shares import MEMORY, PERIOD, Following, Seen, Shares
from cascadevlm.judges.base import Quote
from cascadevlm.runs import bulk
from cascadevlm.runs.inputs import Named
from cascadevlm.testing import FakeJudge, FakeScorer, noise
from tests.calibrations import some_calibration

NAMES = ["ant", "bee", "cicada", "dragonfly"]
LABELS = LabelSet.of(NAMES)
SHARES = Shares(images=20, shares=np.array([0.1, 0.2, 0.3, 0.4]))
MODEL = JudgeModel.prior(len(NAMES))
CALIBRATION = replace(some_calibration(NAMES, MODEL), shares=SHARES)


class Jittery(FakeJudge):
    """Gives the same answer for the same image, after a random time."""

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
    """The log-probabilities of images in batches, without any question."""

    async def follow() -> tuple[Floats, Seen]:
        following, found = Following(calibrated, Seen(), batch), []
        for begin in range(0, len(log_probs), batch):
            scores = Scores.from_logits(log_probs[begin : begin + batch], LABELS, "made up")
            adjusted = await following.adjusted(scores, begin)
            await following.take(list(adjusted.probabilities), begin)
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


def test_a_run_goes_on_with_batches_of_the_size_it_began_with(tmp_path: Path) -> None:
    images = [(str(number), noise(number, (8, 8))) for number in range(2 * (PERIOD + 1))]
    stop = (number >= 1 for number in range(1000))
    bulk.run(cascade(batch_size=PERIOD + 1), images, tmp_path, config={}, stopping=partial(next, stop))
    with pytest.raises(InputError, match=f"periods of {PERIOD + 1} images, and batch_size = 4 makes periods of {PERIOD}"):
        bulk.run(cascade(batch_size=4), images, tmp_path, config={})
    assert bulk.run(cascade(batch_size=PERIOD + 1), images, tmp_path, config={}).images == len(images)


def test_unreadable_images_have_no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third period uses the shares of the first period. Unreadable images in the first period change nothing."""
    bad: list[ImageSource] = [b"no image"] * 4
    first, second, third = ([noise(10 * part + number, (8, 8)) for number in range(4)] for part in range(3))
    monkeypatch.setattr(shares, "PERIOD", 4)
    without = cascade().classify([*first, *second, *third])
    monkeypatch.setattr(shares, "PERIOD", 8)
    among = cascade().classify([*first, *bad, *second, *bad, *third])
    assert [each.label is None for each in among] == [False] * 4 + [True] * 4 + [False] * 4 + [True] * 4 + [False] * 4
    assert told(among[16:]) == told(without[8:]) != told(cascade(follow_shares=False).classify(third))


def test_a_calibration_is_applied_to_scores_as_they_come_and_refuses_others() -> None:
    images = [noise(number, (8, 8)) for number in range(20)]
    biased = replace(CALIBRATION, scorer=replace(CALIBRATION.scorer, bias=np.array([0.0, 0.0, 9.0, 0.0])))
    for scorer in (FakeScorer(), CalibratedScorer(FakeScorer(), biased)):
        assert {each.label for each in Cascade(scorer, [], labels=LABELS, calibration=biased).classify(images)} == {"cicada"}
    with pytest.raises(ConfigError, match="for the scorer 'fake:fake', and this scorer is 'fake:other'"):
        Cascade(FakeScorer("other"), [], labels=LABELS, calibration=CALIBRATION, follow_shares=True).classify(images)
    with pytest.raises(ConfigError, match="for 4 labels that differ"):
        Cascade(FakeScorer(), [], labels=NAMES[::-1], calibration=CALIBRATION, follow_shares=True).classify(images)


class Paid(Jittery):
    """A judge that costs money."""

    def quote(self, question: Question) -> Quote:
        return Quote(usual_case=NANODOLLARS // 100)


@pytest.mark.parametrize(
    ("policies", "routing"),
    [
        (("gain > 0.02", "gain > 0.1"), True),
        (("gain_per_dollar > 1", "gain_per_dollar > 3"), True),
        (("gain > 0.05 & dollars <= 0.2", "calls <= 10"), False),
        (("calls <= 12", "never"), False),
    ],
)
@pytest.mark.parametrize("follow_shares", [False, True])
def test_judges_one_after_another_go_on_as_if_they_had_not_been_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policies: tuple[str, str], routing: bool, follow_shares: bool
) -> None:
    monkeypatch.setattr(shares, "PERIOD", 16)
    images: list[Named] = [(str(number), b"no image" if number % 9 == 4 else noise(number, (8, 8))) for number in range(90)]
    sharp = replace(MODEL, ability=3.0, class_bias=np.array([0.5, -0.5, 0.2, 0.0]))

    def several(seed: int) -> Cascade:
        stages = [
            Stage(judge=Paid(seed), prompt=load_prompt("select"), policy=parse_policy(policy), fusion="bayes", model=model)
            for policy, model in zip(policies, (MODEL, sharp), strict=True)
        ]
        options = {"calibration": CALIBRATION, "follow_shares": follow_shares, "routing": routing}
        return Cascade(FakeScorer(), stages, labels=LABELS, batch_size=4, **options)  # type: ignore[arg-type]

    bulk.run(several(0), images, tmp_path / "whole", config={})
    for seed, batches in enumerate((1, 3, 2, 6, 0, 100)):
        stop = (number >= batches for number in range(1000))
        bulk.run(several(seed), images, tmp_path / "parts", config={}, stopping=partial(next, stop))
    whole, parts = ((tmp_path / name / "predictions.jsonl").read_text() for name in ("whole", "parts"))
    assert whole == parts
    assert '"earlier_verdicts":[{' in whole or routing or "never" in policies


def test_shares_are_followed_from_those_of_a_calibration() -> None:
    with pytest.raises(ConfigError, match="needs a calibration"):
        Cascade(FakeScorer(), [], labels=LABELS, follow_shares=True)

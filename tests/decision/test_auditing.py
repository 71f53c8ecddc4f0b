"""Audits of kept answers."""

import asyncio

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest

from cascadevlm import InputError
from cascadevlm.decision.auditing import Audit, Sampling, Watch, Watched


def test_one_image_of_each_block_is_drawn() -> None:
    sampling = Sampling(share=0.1, seed=3)
    chosen = sampling.drawn(0, 1000)
    assert (chosen.reshape(100, 10).sum(axis=1) == 1).all()
    assert (chosen.reshape(100, 10).sum(axis=0) > 0).all()
    assert (np.concatenate([sampling.drawn(begin, begin + 25) for begin in range(0, 1000, 25)]) == chosen).all()
    assert [sampling.count(images) for images in range(40)] == [int(chosen[:images].sum()) for images in range(40)]
    assert Sampling(share=1.0).drawn(3, 8).all()


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_a_share_is_above_0_and_at_most_1(share: float) -> None:
    with pytest.raises(InputError, match="share of the audit"):
        Sampling(share=share)


@pytest.mark.parametrize("drifts", [False, True])
def test_the_lower_end_holds_at_all_times_at_once(drifts: bool) -> None:
    rng, crossed, length = np.random.default_rng(0), 0, 300
    shares = np.full(length, 0.1) if not drifts else np.where(np.arange(length) < 150, 0.01, 0.19)
    means = np.cumsum(shares) / np.arange(1, length + 1)
    for _ in range(200):
        found = np.cumsum(rng.random(length) < shares)
        crossed += any(
            Audit(asked=n, disagreements=int(found[n - 1])).lower(0.1) > means[n - 1] for n in range(20, length + 1, 40)
        )
    assert binomtest(crossed, 200, 0.1, alternative="greater").pvalue > 0.01


def test_a_broken_promise_is_noticed() -> None:
    # 20 % disagree where 5 % were promised.
    rng = np.random.default_rng(0)
    noticed = [
        next(n for n in range(1, 1000) if Audit(asked=n, disagreements=int(found[n - 1])).lower(0.05) > 0.05)
        for found in (np.cumsum(rng.random(1000) < 0.2) for _ in range(20))
    ]
    assert np.median(noticed) < 120


def test_without_disagreement_the_lower_end_is_0() -> None:
    assert Audit().lower(0.05) == 0
    assert Audit(asked=100).lower(0.05) == 0
    assert 0 < Audit(asked=100, disagreements=40).lower(0.05) < 0.4
    assert Audit(asked=5, disagreements=5).lower(0.05) < 1


async def escalated_by(sampling: Sampling, disagrees: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], Watched]:
    """`(N,)` booleans: which images of a run of batches of 32 are escalated; and what was found at the end."""
    watch, escalated = Watch(sampling, Watched(), 32), []
    drawn = sampling.drawn(0, len(disagrees))
    for begin in range(0, len(disagrees), 32):
        escalated.append(await watch.escalated(begin, min(begin + 32, len(disagrees))))
        end = begin + len(escalated[-1])
        await watch.take((drawn[begin:end] & disagrees[begin:end] & ~escalated[-1]).tolist())
    return np.concatenate(escalated), watch.watched


@pytest.mark.parametrize(("share", "least", "most"), [(0.05, 0, 0.05), (0.25, 0.9, 1)])
def test_kept_promises_are_rarely_said_to_be_broken_and_broken_ones_mostly(share: float, least: float, most: float) -> None:
    rng, sampling = np.random.default_rng(0), Sampling(share=0.1, agree=0.95)
    found = [
        asyncio.run(escalated_by(Sampling(share=0.1, seed=seed, agree=0.95), rng.random(2000) < share)) for seed in range(200)
    ]
    often = np.mean([escalated.any() for escalated, _ in found])
    assert least <= often <= most
    for escalated, watched in found:
        assert escalated[int(escalated.argmax()) :].all() or not escalated.any()
        assert watched.images == 2000
    assert sampling.is_broken(1000, 40)
    assert not sampling.is_broken(1000, 5)


def test_the_lower_end_holds_for_a_run_that_escalates_more() -> None:
    rng, wrong = np.random.default_rng(1), 0
    for seed in range(200):
        sampling, disagrees = Sampling(share=0.02, seed=seed, agree=0.9, confidence=0.8), rng.random(1500) < 0.2
        escalated, watched = asyncio.run(escalated_by(sampling, disagrees))
        corrected = sampling.drawn(0, 1500)
        true = (disagrees & ~escalated & ~corrected).mean()
        wrong += sampling.least(1500, watched.disagreements) > true
    assert binomtest(wrong, 200, 0.2, alternative="greater").pvalue > 0.01


def test_a_decision_waits_for_the_answers_of_all_periods_before_the_last() -> None:
    async def waits(begin: int) -> bool:
        watch = Watch(Sampling(share=0.1, agree=0.9), Watched(), 8)
        await watch.take([False] * 130)
        try:
            await asyncio.wait_for(watch.escalated(begin, begin + 8), 0.01)
        except TimeoutError:
            return True
        return False

    assert [asyncio.run(waits(begin)) for begin in (0, 128, 256, 376, 384)] == [False, False, False, False, True]

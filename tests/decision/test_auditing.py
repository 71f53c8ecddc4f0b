"""Audits of kept answers."""

import numpy as np
import pytest
from scipy.stats import binomtest

from cascadevlm import InputError
from cascadevlm.decision.auditing import Audit, Sampling


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

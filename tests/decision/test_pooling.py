"""Pools of several scorers: weights, what is held out, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax

from cascadevlm.base.errors import ConfigError, DataError, InputError
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Scores
from cascadevlm.decision.pooling import Pool, fit_pool, fit_weights, pooled, read_pool
from cascadevlm.decision.scorer_calibration import Floats, ScorerCalibration

LABELS = LabelSet.of(["finch", "owl", "wren", "tern"])


def toy(images: int, noises: tuple[float, ...], seed: int = 0) -> tuple[list[Scores], Floats]:
    """Scores of one scorer per noise, with errors that are independent; and one-hot truths."""
    rng = np.random.default_rng(seed)
    truths = np.eye(4)[rng.integers(0, 4, images)]
    logits = [3 * (truths + noise * rng.normal(size=truths.shape)) for noise in noises]
    return [Scores.from_logits(each, LABELS, f"toy:{number}") for number, each in enumerate(logits)], truths


def accuracy(logits: Floats, truths: Floats) -> float:
    return float((logits.argmax(axis=1) == truths.argmax(axis=1)).mean())


def test_a_pool_is_better_than_its_best_scorer_and_its_held_out_figures_are_honest() -> None:
    parts, truths = toy(200, (0.8, 0.8, 1.2))
    fitted = fit_pool(parts, truths)
    others, other_truths = toy(4000, (0.8, 0.8, 1.2), seed=1)
    right = accuracy(fitted.pool(others), other_truths)
    alone = [accuracy(part.log_probs.astype(np.float64), other_truths) for part in others]
    assert right > max(alone) + 0.04
    assert accuracy(fitted.held_out, truths) == pytest.approx(right, abs=0.06)
    assert [accuracy(part, truths) for part in fitted.parts] == pytest.approx(alone, abs=0.09)


def test_weights_are_of_the_highest_posterior_probability() -> None:
    parts, truths = toy(300, (0.5, 1.0, 2.0))
    log_probs = [part.log_probs.astype(np.float64) for part in parts]

    def likelihood(weights: Floats) -> float:
        return float((log_softmax(pooled(log_probs, weights), axis=1) * truths).sum())

    found = fit_weights(log_probs, truths, 1e-6)
    for part in range(3):
        for factor in (0.9, 1.1):
            moved = found.copy()
            moved[part] *= factor
            assert likelihood(moved) < likelihood(found) + 0.05  # the common scale keeps its weak prior
    equal = fit_weights(log_probs, truths, 1e6)
    assert np.ptp(equal) < 0.01 * equal.mean()


def test_a_copy_of_a_scorer_teaches_nothing() -> None:
    (one, other), truths = toy(400, (0.8, 0.8))
    alone = fit_pool([one, one], truths)
    assert accuracy(alone.held_out, truths) == pytest.approx(accuracy(alone.parts[0], truths), abs=0.02)
    assert alone.pool.weights.sum() == pytest.approx(1, abs=0.15)
    copies = fit_pool([one, one, other], truths).pool.weights
    assert copies[0] + copies[1] < 1.4 * copies[2]  # equal weights would count the copied opinion twice


def test_a_pool_is_kept_and_refused_for_other_scorers(tmp_path: Path) -> None:
    parts, truths = toy(60, (0.8, 1.0))
    made = fit_pool(parts, truths).pool
    made.write(tmp_path / "birds.pool")
    read = read_pool(tmp_path / "birds.pool")
    np.testing.assert_array_equal(read(parts), made(parts))
    assert read.digest == made.digest
    assert replace(made, weights=made.weights * 2).digest != made.digest
    for wrong, sentence in (
        (parts[::-1], "The pool was made for 'toy:0', and not for 'toy:1'"),
        (parts[:1], "The pool was made for '2 scorers', and not for '1 scorers'"),
        ([replace(part, labels=LabelSet(LABELS.labels[::-1])) for part in parts], "made for other labels"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            made(wrong)


def test_what_is_no_pool_or_too_little_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_pool(tmp_path / "none")
    (tmp_path / "bad").write_text('{"weights": 1}')
    with pytest.raises(ConfigError, match="is not a pool: labels: Field required"):
        read_pool(tmp_path / "bad")
    identity = ScorerCalibration.identity(4)
    pool = Pool(labels=LABELS.names, fingerprints=("a", "b"), calibrations=(identity,) * 2, weights=np.ones(2), images=20)
    with pytest.raises(DataError, match="cannot be written"):
        pool.write(tmp_path / "no" / "pool")
    parts, truths = toy(19, (0.8, 1.0))
    with pytest.raises(InputError, match="at least 20 labelled images, not 19"):
        fit_pool(parts, truths)

"""The law of a certificate."""

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, chisquare, hypergeom

from cascadevlm import InputError
from cascadevlm.decision.agreement import Promise, draw, longest_prefix, most_found, most_found_of
from cascadevlm.decision.judge_model import Bools


def broken(drawn: Bools, disagrees: Bools, allowed: int, level: float) -> bool:
    """Whether more than the allowed number of kept answers are not the judge's."""
    prefix = longest_prefix(drawn, drawn & disagrees, allowed=allowed, level=level)
    return int((disagrees & ~drawn)[:prefix].sum()) > allowed


@pytest.mark.parametrize(
    ("agreement", "images", "allowed"),
    [(0.9, 1000, 100), (0.95, 1000, 50), (0.99, 1_000_000, 10_000), (0.9, 1864, 186), (0.7, 10, 3), (0.9, 5, 0)],
)
def test_the_allowed_number_is_exact(agreement: float, images: int, allowed: int) -> None:
    assert Promise(agreement=agreement).allowed(images) == allowed


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_promise_is_between_0_and_1(value: float) -> None:
    with pytest.raises(InputError, match="agreement"):
        Promise(agreement=value)
    with pytest.raises(InputError, match="confidence"):
        Promise(agreement=0.9, confidence=value)


def test_the_level_is_exact() -> None:
    assert Promise(agreement=0.9, confidence=0.9).level == 0.1


@pytest.mark.parametrize(
    ("images", "number", "allowed", "level"), [(8, 3, 1, 0.4), (8, 5, 1, 0.2), (8, 4, 2, 0.25), (7, 4, 0, 0.45)]
)
def test_no_pattern_of_disagreement_breaks_the_promise_more_often_than_the_level(
    images: int, number: int, allowed: int, level: float
) -> None:
    draws = [np.isin(np.arange(images), rows) for rows in combinations(range(images), number)]
    patterns = [np.array(pattern) for pattern in product([False, True], repeat=images)]
    worst = max(np.mean([broken(drawn, pattern, allowed, level) for drawn in draws]) for pattern in patterns)
    most = most_found_of(images, number, allowed=allowed, level=level)
    assert most >= 0
    assert worst <= level + 1e-9
    # The law is sharp: its probability is reached, and one more drawn disagreement would be too many.
    assert worst == pytest.approx(hypergeom.cdf(most, images, allowed + 1 + most, number))
    assert hypergeom.cdf(most + 1, images, allowed + 2 + most, number) > level


@pytest.mark.parametrize("order", ["ordinary", "reversed", "random", "all disagree"])
def test_the_promise_is_kept_whatever_the_order(order: str) -> None:
    rng, images, allowed, level = np.random.default_rng(0), 600, 60, 0.05
    disagrees = rng.random(images) < np.linspace(0, 0.6, images)
    if order == "reversed":
        disagrees = disagrees[::-1]
    elif order == "random":
        rng.shuffle(disagrees)
    elif order == "all disagree":
        disagrees[:] = True
    count = sum(broken(draw(np.arange(images), 150, seed), disagrees, allowed, level) for seed in range(1000))
    assert binomtest(count, 1000, level, alternative="greater").pvalue > 0.01


def test_the_law_uses_its_level() -> None:
    # A bound that is kept far too often costs questions.
    disagrees = np.random.default_rng(1).random(3000) < 0.2
    count = sum(broken(draw(np.arange(3000), 600, seed), disagrees, 300, 0.1) for seed in range(600))
    assert count > 0.06 * 600


@given(st.integers(1, 300), st.floats(0, 1), st.integers(0, 40), st.sampled_from([0.05, 0.1, 0.3]), st.integers(0, 1000))
def test_a_prefix_holds_what_it_may(images: int, share: float, allowed: int, level: float, seed: int) -> None:
    drawn = draw(np.arange(images), round(share * images), seed)
    disagrees = drawn & (np.random.default_rng(seed).random(images) < 0.3)
    prefix = longest_prefix(drawn, disagrees, allowed=allowed, level=level)
    most = most_found_of(images, int(drawn.sum()), allowed=allowed, level=level)
    found = int(disagrees[:prefix].sum())
    assert found <= max(most, 0) or int((~drawn[:prefix]).sum()) <= allowed
    assert prefix == images or int(disagrees[: prefix + 1].sum()) > most
    assert int((~drawn[:prefix]).sum()) >= min(allowed, int((~drawn).sum()))


def test_more_draws_and_more_allowed_answers_never_allow_fewer_found() -> None:
    found = [most_found(1000, np.arange(0, 1001, 50), allowed=w, level=0.05) for w in range(0, 300, 30)]
    assert (np.diff(found, axis=0) >= 0).all()
    assert (np.diff(found, axis=1) >= 0).all()


def test_nothing_is_promised_without_a_draw() -> None:
    nothing = np.zeros(100, dtype=bool)
    assert longest_prefix(nothing, nothing, allowed=7, level=0.05) == 7
    assert longest_prefix(nothing, nothing, allowed=0, level=0.05) == 0
    assert longest_prefix(nothing[:5], nothing[:5], allowed=7, level=0.05) == 5


def test_a_draw_depends_on_the_seed_and_the_numbers_of_the_images() -> None:
    numbers = np.random.default_rng(0).permutation(500)
    drawn = draw(numbers, 40, 3)
    assert drawn.sum() == 40
    assert (drawn == draw(numbers, 40, 3)).all()
    assert (drawn != draw(numbers, 40, 4)).any()
    assert {*numbers[drawn].tolist()} == {*np.flatnonzero(draw(np.arange(500), 40, 3)).tolist()}


def test_an_image_that_is_added_hardly_changes_a_draw() -> None:
    every = np.arange(500)
    before, after = (set(numbers[draw(numbers, 40, 3)].tolist()) for numbers in (np.delete(every, 123), every))
    assert len(before - after) <= 1


def test_each_image_is_drawn_equally_often() -> None:
    hits = np.sum([draw(np.arange(100, 120), 5, seed) for seed in range(2000)], axis=0)
    assert chisquare(hits).pvalue > 0.001

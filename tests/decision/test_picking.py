"""Picks of images to label: uncertain ones, balanced over labels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadevlm.decision.picking import most_instructive


@pytest.mark.parametrize("images", range(1, 10))
def test_a_pool_of_three_labels_is_balanced(images: int) -> None:
    picked = most_instructive(np.full(9, 0.5), np.array([0] * 3 + [1] * 3 + [2] * 3), images)
    counts = np.bincount(np.arange(9)[picked] // 3, minlength=3)
    assert counts.sum() == images
    assert np.ptp(counts) <= 1


def test_images_are_of_the_most_uncertain_tenth() -> None:
    certainties = np.random.default_rng(3).permutation(200) / 200
    picked = most_instructive(certainties, np.arange(200) % 7, 6)
    assert picked.sum() == 6
    assert certainties[picked].max() < 0.1
    assert not np.array_equal(np.flatnonzero(picked), np.argsort(certainties)[:6])  # they are not just the most uncertain ones


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 70))
def test_no_label_is_picked_twice_more_than_one_that_is_left(predicted: list[int], images: int) -> None:
    columns = np.array(predicted)
    picked = most_instructive(np.linspace(0, 1, len(columns)), columns, images)
    assert np.array_equal(picked, most_instructive(np.linspace(0, 1, len(columns)), columns, images))
    assert picked.sum() == min(images, len(columns))
    pool = columns[: max(3 * images, int(np.ceil(len(columns) / 10)))]
    counts = np.bincount(columns[picked], minlength=5)
    left = np.bincount(pool, minlength=5) > counts
    assert not left.any() or counts[left].min() >= counts.max() - 1

"""Which images came before."""

import hashlib
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadevlm.decision import distinct
from cascadevlm.decision.distinct import NONE, Distinct, keys_of


@given(batches=st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=8), unsorted=st.integers(1, 6), left=st.integers(0, 8))
def test_the_first_image_of_its_kind_is_new_wherever_a_run_was_left(batches: list[list[int]], unsorted: int, left: int) -> None:
    """Image 0 has no digest."""
    digests = [[hashlib.sha256(bytes([each])).hexdigest() if each else "" for each in batch] for batch in batches]
    images = list(chain.from_iterable(batches))
    expected = [not each or each not in images[:number] for number, each in enumerate(images)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distinct, "UNSORTED", unsorted)
        found: list[bool] = []
        seen = Distinct(NONE)
        for number, batch in enumerate(digests):
            if number == left:
                seen = Distinct(seen.keys())
            found.extend(seen.take(keys_of(batch)).tolist())
    assert found == expected


def test_keys_are_the_first_eight_bytes_of_digests() -> None:
    keys = keys_of(["", "00000000000000ff" + 48 * "f", 64 * "f"])
    assert keys.dtype == np.uint64
    assert keys.tolist() == [0, 255, 2**64 - 1]

"""The number of threads in which NumPy and SciPy compute."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from threadpoolctl import ThreadpoolController

from cascadevlm.base.threads import one_blas_thread
from cascadevlm.decision.learning import Learning
from cascadevlm.runs import bulk
from tests.learning import cascade, insects
from tests.runs.test_scored_first import named


def blas_threads() -> set[int]:
    scipy.linalg.cholesky(np.eye(2))  # loads the library of SciPy
    return {each["num_threads"] for each in ThreadpoolController().select(prefix="libscipy_openblas").info()}


def test_blas_has_one_thread_until_the_last_block_ends_and_while_a_run_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not blas_threads():
        pytest.skip("NumPy and SciPy are not those of the wheels")
    with ThreadpoolController().limit(limits=3, user_api="blas"):
        with one_blas_thread:
            with one_blas_thread:
                assert blas_threads() == {1}
            assert blas_threads() == {1}
        assert blas_threads() == {3}
        seen = set[int]()
        period_of = Learning.period_of

        def seeing(self: Learning, begin: int) -> int:
            seen.update(blas_threads())
            return period_of(self, begin)

        monkeypatch.setattr(Learning, "period_of", seeing)
        bulk.run(cascade(), named(insects(20)), tmp_path, config={})
        assert (seen, blas_threads()) == ({1}, {3})

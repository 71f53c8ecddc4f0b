"""The number of threads in which NumPy and SciPy compute."""

from contextlib import ExitStack
from threading import Lock


class OneBlasThread:
    """While at least one block ``with one_blas_thread:`` is open, NumPy and SciPy multiply matrices in one thread.

    Their BLAS is OpenBLAS. Its threads wait actively for each other. Beside a model that uses all cores, a product in two threads
    can take ten times as long as in one thread. The limit holds for the whole process. The threads of PyTorch are not limited.

    Open the block in the main thread: OpenBLAS does not obey another thread.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._blocks = 0
        self._limit = ExitStack()

    def __enter__(self) -> None:
        from threadpoolctl import ThreadpoolController

        with self._lock:
            if not self._blocks:
                blas = ThreadpoolController().select(prefix="libscipy_openblas")  # the build in the wheels of both packages
                self._limit.enter_context(blas.limit(limits=1))
            self._blocks += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._blocks -= 1
            if not self._blocks:
                self._limit.close()


one_blas_thread = OneBlasThread()

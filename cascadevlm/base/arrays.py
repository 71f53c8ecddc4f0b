"""Arrays of columns: labels as positions in a score matrix."""

import numpy as np
from numpy.typing import NDArray

NOBODY = -1
"""In an array of columns: no label."""


Columns = NDArray[np.int64]
"""Columns of the score matrix, or `NOBODY`."""

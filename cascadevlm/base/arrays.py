"""Arrays of columns. A column is the position of a label in a score matrix."""

import numpy as np
from numpy.typing import NDArray

NOBODY = -1
"""The value for "no label" in an array of columns."""


Columns = NDArray[np.int64]
"""`int64` array. Each value is a column of the score matrix, or `NOBODY`."""

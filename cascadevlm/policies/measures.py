"""Measures of how sure a scorer is: one number an image, computed from its log-probabilities."""

from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cascadevlm.base.types import Scores

Values: TypeAlias = NDArray[np.floating]
"""(N,) one number per image."""

Measure: TypeAlias = Callable[[Scores], Values]

EntropyUnit = Literal["normalized", "nats"]


def entropy(scores: Scores, unit: EntropyUnit = "normalized") -> Values:
    """Shannon entropy: N numbers from 0 (certain) to 1 (uniform), in nats divided by log C; or in nats."""
    nats: Values = -(scores.probabilities * np.maximum(scores.log_probs, -1e4)).sum(axis=1)
    return nats if unit == "nats" else np.minimum(nats / np.float32(np.log(max(len(scores.labels), 2))), 1)


def margin(scores: Scores) -> Values:
    """Probability of the best label less that of the second best: N numbers from 0 to 1."""
    if len(scores.labels) == 1:
        return np.ones(len(scores))
    best_two: Values = np.partition(scores.probabilities, -2, axis=1)[:, -2:]
    return best_two[:, 1] - best_two[:, 0]


def top_probability(scores: Scores) -> Values:
    """Probability of the best label: N numbers from 1/C to 1."""
    best: Values = scores.probabilities.max(axis=1)
    return best

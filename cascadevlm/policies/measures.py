"""Measures of a scorer's certainty: one number per image, computed from the log-probabilities."""

from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cascadevlm.base.types import Scores

Values: TypeAlias = NDArray[np.floating]
"""``(N,) float``: one number per image."""

Measure: TypeAlias = Callable[[Scores], Values]

EntropyUnit = Literal["normalized", "nats"]


def entropy(scores: Scores, unit: EntropyUnit = "normalized") -> Values:
    """``(N,) float``: the Shannon entropy of each image, from 0 (certain) to 1 (uniform): the entropy in nats divided by log C.

    Args:
        scores: scores of N images and C labels.
        unit: "normalized" as above, or "nats" for values from 0 to log C.
    """
    nats: Values = -(scores.probabilities * np.maximum(scores.log_probs, -1e4)).sum(axis=1)
    return nats if unit == "nats" else np.minimum(nats / np.float32(np.log(max(len(scores.labels), 2))), 1)


def margin(scores: Scores) -> Values:
    """``(N,) float``: the probability of the best label minus the probability of the second best label, from 0 to 1.

    If there is only one label, the margin is 1.
    """
    if len(scores.labels) == 1:
        return np.ones(len(scores))
    best_two: Values = np.partition(scores.probabilities, -2, axis=1)[:, -2:]
    return best_two[:, 1] - best_two[:, 0]


def top_probability(scores: Scores) -> Values:
    """``(N,) float``: the probability of the best label, from 1/C to 1."""
    best: Values = scores.probabilities.max(axis=1)
    return best

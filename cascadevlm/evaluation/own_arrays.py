"""Checks scores, truths and answers that were recorded elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.base.entry_points import nearest
from cascadevlm.base.errors import DataError
from cascadevlm.base.labels import LabelSet, words
from cascadevlm.base.types import Scores
from cascadevlm.decision.judge_model import NONE_CHOSEN

Values: TypeAlias = Sequence[str] | Sequence[int] | NDArray[np.generic]
"""Labels as names or as columns."""

OWN = "own:answers"
"""The default name of the judge whose answers were recorded elsewhere."""

NONE_OF_THESE = "none of these"
"""The answer that none of the candidates is right."""

SUM_ERROR = 1e-3
"""Tolerance for the sum of a row of probabilities."""


@dataclass(frozen=True, kw_only=True)
class OwnArrays:
    """The arguments of `cascadevlm.evaluation.record.Record.from_arrays`, checked.

    Attributes:
        scores: the scores of the N images.
        truths: ``(N,)`` columns of the true labels.
        answers: ``(N,)`` columns; `NOBODY` if the judge was not asked, `NONE_CHOSEN` if it chose none. None without a judge.
        candidates: ``(N, K)`` columns; `NOBODY` after the last candidate of an image.
        dollars: ``(N,)`` costs in US dollars.
    """

    scores: Scores
    truths: Columns
    answers: Columns | None
    candidates: Columns
    dollars: NDArray[np.float64]


def checked_arrays(
    scores: NDArray[np.generic],
    labels: LabelSet,
    truths: Values,
    answers: Values | None,
    candidates: NDArray[np.generic] | int | None,
    dollars: NDArray[np.floating] | float,
) -> OwnArrays:
    """Check the arguments of `cascadevlm.evaluation.record.Record.from_arrays`, which describes them and the errors."""
    scored = _scores(np.asarray(scores), labels)
    size, columns = len(scored), _columns_of(labels)
    right = _column("truths", truths, columns, size, least=0)
    said = None if answers is None else _column("answers", answers, columns, size, least=NONE_CHOSEN)
    if candidates is None or isinstance(candidates, int | np.integer):
        count = len(labels) if candidates is None else int(candidates)
        if count < 1 or isinstance(candidates, bool):
            raise DataError(f"candidates is {candidates}, not a number from 1 on.", hint="Give the number of candidates.")
        shown = np.argsort(-scored.log_probs, axis=1, kind="stable")[:, :count].astype(np.int64)
    else:
        listed = np.asarray(candidates)
        if listed.ndim != 2 or len(listed) != size:
            raise DataError(f"candidates has the shape {listed.shape}, not ({size}, K).", hint=SAME_LENGTH)
        shown = _column("candidates", listed.reshape(-1), columns, listed.size, least=NOBODY).reshape(listed.shape)
        ordered = np.sort(shown, axis=1)
        twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != NOBODY)).any(axis=1)
        if twice.any():
            raise DataError(f"candidates names a label twice for image {twice.argmax()}.", hint="Name each candidate once.")
    if said is not None and (strange := np.flatnonzero((said >= 0) & ~(shown == said[:, None]).any(axis=1))).size:
        told = f"The answer {labels.names[said[strange[0]]]!r} about image {strange[0]} is not one of its candidates"
        raise DataError(f"{told} ({strange.size} such answers).", hint="Give the candidates that the judge chose from.")
    costs = np.asarray(dollars, dtype=np.float64)
    if costs.shape not in ((), (size,)) or not (np.isfinite(costs) & (costs >= 0)).all():
        raise DataError(f"dollars must be one cost, or {size} costs, of at least 0.", hint=SAME_LENGTH)
    return OwnArrays(scores=scored, truths=right, answers=said, candidates=shown, dollars=np.broadcast_to(costs, (size,)).copy())


SAME_LENGTH = "All arrays must have one row per image, in the same order."


def _scores(given: NDArray[np.generic], labels: LabelSet) -> Scores:
    if given.dtype.kind not in "fiu":
        raise DataError(f"scores has the type {given.dtype}; scores are numbers.", hint="Give logits or probabilities.")
    scores = given.astype(np.float64)
    if scores.ndim != 2 or scores.shape[1] != len(labels) or not len(scores):
        found = f"scores has the shape {scores.shape}, not (N, {len(labels)})"
        raise DataError(f"{found}: one row per image and one column per label.", hint="Check the order and number of labels.")
    if not np.isfinite(scores).all() and not (np.isneginf(scores) | np.isfinite(scores)).all():
        raise DataError("scores contains NaN or infinity.", hint="Leave out the images without scores.")
    if (scores >= 0).all():
        scores = _logs(scores)
    if np.isneginf(scores).all(axis=1).any():
        raise DataError("scores contains a row without any probability.", hint="Leave out the images without scores.")
    return Scores.from_logits(scores, labels, fingerprint=OWN_SCORES)


def _logs(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """The logarithms of probabilities. Logits of at least 0 are returned as they are.

    Raises:
        DataError: if the scores are between 0 and 1, and their rows do not sum to 1; if they are percentages.
    """
    sums = scores.sum(axis=1)
    if np.allclose(sums, 1, atol=SUM_ERROR):
        with np.errstate(divide="ignore"):
            return np.log(scores)
    if np.allclose(sums, 100, atol=100 * SUM_ERROR):
        raise DataError("scores contains percentages: each row sums to 100.", hint="Divide them by 100.")
    if scores.max() <= 1:
        row = int(np.abs(sums - 1).argmax())
        raise DataError(
            f"scores has only values from 0 to 1, but its rows are not probabilities: row {row} sums to {sums[row]:.3g}.",
            hint="Divide each row by its sum. Similarities of CLIP become logits if they are multiplied by its scale, often 100.",
        )
    return scores


def _columns_of(labels: LabelSet) -> dict[str, int]:
    """The column of each name and alias, by its words."""
    return {words(name): column for column, label in enumerate(labels) for name in (*label.aliases, label.name)}


def _column(what: str, values: Values, columns: Mapping[str, int], size: int, *, least: int) -> Columns:
    """``(N,)`` columns of labels.

    Args:
        what: the name of the argument, for messages.
        values: labels as names or as columns.
        columns: the column of each label, by its words.
        size: N.
        least: the smallest number that is allowed: 0, `NOBODY` or `NONE_CHOSEN`.
    """
    given = np.asarray(values)
    if given.shape != (size,):
        raise DataError(f"{what} has the shape {given.shape}, and there are {size} images.", hint=SAME_LENGTH)
    if given.dtype.kind in "iu":
        if ((given < least) | (given >= len(set(columns.values())))).any():
            known = len(set(columns.values()))
            raise DataError(f"{what} contains a number that is not from {least} to {known - 1}.", hint="Give columns of labels.")
        return given.astype(np.int64)
    special = {"": NOBODY, NONE_OF_THESE: NONE_CHOSEN}
    known_words = {**columns, **{text: number for text, number in special.items() if number >= least}}
    texts = ["" if value is None else str(value) for value in given.tolist()]
    found = [known_words.get(words(text), known_words.get(text)) for text in texts]
    unknown = [text for text, column in zip(texts, found, strict=True) if column is None]
    if unknown:
        told = f"{what} contains {unknown[0]!r}, which is not in the label set ({len(unknown)} such values)."
        raise DataError(told, hint=nearest(unknown[0], list(columns)[:MOST_NAMED]))
    return np.array([column for column in found if column is not None], dtype=np.int64)


MOST_NAMED = 20
"""Largest number of labels that a message names."""

OWN_SCORES = "own:scores"
"""The fingerprint of scores that were recorded elsewhere."""

"""Selects the images of a run that a person should look at."""

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from cascadevlm.base.errors import InputError
from cascadevlm.base.types import Outcome
from cascadevlm.decision.picking import most_instructive
from cascadevlm.runs.corrections import random_order
from cascadevlm.runs.lines import Line

HINT = (
    f"Use a number of images, such as 200, or 'random 200', 'confidence < 0.8', 'abstained', or an outcome of a question: "
    f"{', '.join(get_args(Outcome))}."
)


@dataclass(kw_only=True)
class Review:
    """A selection of images, to which predictions are added one by one. All conditions must hold for an image. Images that a
    person looked at already are not selected.

    Attributes:
        below: the confidence must be below this number. Default: no condition.
        results: each of these must hold: "abstained", or an outcome of the last question. Default: no condition.
        most: select only this number of images, those whose labels would teach most: see `most_instructive`. Default: all images.
        sample: select only a random sample of this number of images. It includes images that a person looked at already; these
            are not selected again. Default: no sample.
    """

    below: float = np.inf
    results: frozenset[str] = frozenset()
    most: int | None = None
    sample: int | None = None
    _rows: "array[int]" = field(default_factory=lambda: array("q"))
    _seen: bytearray = field(default_factory=bytearray)
    _keys: "array[int]" = field(default_factory=lambda: array("Q"))
    _confidences: "array[float]" = field(default_factory=lambda: array("d"))
    _guesses: "array[int]" = field(default_factory=lambda: array("q"))
    _columns: dict[str, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, selections: Sequence[str]) -> "Review":
        """The review that texts describe. All of them must hold.

        Raises:
            InputError: if a text is not a selection, or two numbers of images are given.
        """
        below, results, numbers = np.inf, set[str](), list[tuple[bool, int]]()
        for text in selections:
            if found := re.fullmatch(r"confidence\s*<\s*(\d*\.?\d+)", text.strip()):
                below = min(below, float(found[1]))
            elif found := re.fullmatch(r"(random\s+)?([1-9]\d{0,17})", text.strip()):
                numbers.append((bool(found[1]), int(found[2])))
            elif text in ("abstained", *get_args(Outcome)):
                results.add(text)
            else:
                raise InputError(f"{text!r} does not select images for a review.", hint=HINT)
        if len(numbers) > 1:
            raise InputError("Two numbers of images are given for a review.", hint="Give one number, or one random sample.")
        is_random, number = numbers[0] if numbers else (False, None)
        return cls(
            below=below,
            results=frozenset(results),
            most=None if is_random else number,
            sample=number if is_random else None,
        )

    def add(self, row: int, line: Line, *, seen: bool) -> None:
        """Add the prediction of a readable image.

        Args:
            row: the number of the prediction.
            line: the prediction.
            seen: true if a person looked at the image already.
        """
        holding = {line.outcome, "abstained" if line.abstained else None}
        if line.confidence >= self.below or not self.results <= holding or (seen and self.sample is None):
            return
        self._rows.append(row)
        self._seen.append(seen)
        if self.sample is not None:
            self._keys.append(random_order(line.path))
        if self.most is not None:
            guess = line.ranked[0].label if line.label is None else line.label
            self._confidences.append(line.confidence)
            self._guesses.append(self._columns.setdefault(guess, len(self._columns)))

    def rows(self) -> NDArray[np.int64]:
        """The numbers of the selected predictions."""
        rows = np.array(self._rows, dtype=np.int64)
        if self.most is not None:
            return rows[most_instructive(np.array(self._confidences), np.array(self._guesses), self.most)]
        if self.sample is not None:
            first = np.argsort(np.array(self._keys), kind="stable")[: self.sample]
            return rows[first[~np.frombuffer(self._seen, dtype=np.bool_)[first]]]
        return rows

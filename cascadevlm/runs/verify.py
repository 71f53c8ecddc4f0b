"""Checks the promise of a run by the files of its folder alone: no image, no scorer and no judge is needed."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, InstanceOf, ValidationError

from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.base.errors import CascadeError, DataError
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import DecidedBy, Outcome
from cascadevlm.config.agreement import AgreementConfig
from cascadevlm.config.finding import FindConfig
from cascadevlm.decision.agreement import Rows, draw, driven, longest_prefix, most_found_of
from cascadevlm.decision.certifying import first_rows, opening
from cascadevlm.decision.finding import after_test
from cascadevlm.decision.judge_model import NONE_CHOSEN, Bools
from cascadevlm.judges.cache import key_of
from cascadevlm.runs.certificate import UNASKED, Facts, Finding, Phase, Standing, read_certificate
from cascadevlm.runs.lines import checked
from cascadevlm.runs.manifest import Manifest
from cascadevlm.runs.run_folder import PREDICTIONS, SUMMARY

MOST_FAULTS = 20
"""The largest number of faulty lines that are reported."""

PHASES: dict[Phase, int] = {phase: number for number, phase in enumerate(get_args(Phase))}
TAUGHT, TESTED, KEPT, ASKED, ACCEPTED = PHASES.values()

THE_LABEL, ANOTHER = 0, 1
"""Answers of the judge: the label that the test is about, and any other label. An answer without a label is `NONE_CHOSEN` or
`NOBODY`.
"""


class _Said(BaseModel):
    outcome: Outcome
    label: InstanceOf[str] | None


class _Line(BaseModel):
    """The fields of a line that a promise depends on."""

    label: InstanceOf[str] | None
    decided_by: DecidedBy | None
    verdict: _Said | None
    certificate: Standing | None = None

    def answer(self, label: str) -> int:
        """The answer of the judge, where the test is about a label."""
        if self.verdict is None or self.verdict.outcome not in ("answered", "none"):
            return NOBODY
        if self.verdict.label is None:
            return NONE_CHOSEN
        return THE_LABEL if self.verdict.label == label else ANOTHER

    def fault(self, sought: str | None) -> str:
        """What contradicts itself in the line; "" if nothing does.

        Args:
            sought: the class that was looked for; None in a certificate.
        """
        standing, said = self.certificate, self.verdict
        if standing is None:
            return "" if self.label is None and said is None else "it has a prediction, but the certificate does not mention it"
        if standing.phase in UNASKED:
            if said is not None:
                return "its label was kept without a question, but it has an answer of the judge"
            if self.label != standing.label:
                return f"its label is {self.label!r}, but {standing.label!r} was kept"
            if self.decided_by != "scorer":
                return "its label was kept, but not decided by the scorer"
        elif said is None or said.outcome == "skipped":
            return f"the certificate counts it as {standing.phase!r}, but the judge was not asked about it"
        elif said.label is not None and self.label != said.label:
            return f"its label is {self.label!r}, but the judge's is {said.label!r}"
        elif (said.label is not None) != (self.decided_by == "judge"):
            return f"it is decided by {self.decided_by!r}, but the judge's label is {said.label!r}"
        found = standing.phase == "accepted" or (said is not None and said.label == sought)
        if sought is not None and (self.label == sought) != found:
            return f"its label is {self.label!r}, but it was {'' if found else 'not '}found to be {sought!r}"
        return ""


@dataclass
class _Lines:
    """What the lines of N readable images contain, as lists of N numbers, and what is wrong with the lines."""

    numbers: list[int] = field(default_factory=list)
    phases: list[int] = field(default_factory=list)
    log_odds: list[float] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, predictions: Path, sought: str | None) -> "_Lines":
        """Read the lines.

        Args:
            predictions: the file.
            sought: the class that was looked for; None in a certificate.
        """
        found = cls()
        with predictions.open("rb") as lines:
            for number, line in enumerate(lines):
                read, fault = _read(line, sought)
                if fault and len(found.faults) < MOST_FAULTS:
                    found.faults.append(f"Line {number + 1} of {PREDICTIONS}: {fault}.")
                if read is None or read.certificate is None:
                    continue
                standing = read.certificate
                found.numbers.append(number)
                found.phases.append(PHASES[standing.phase])
                found.log_odds.append(standing.log_odds)
                found.answers.append(read.answer(standing.label if sought is None else sought))
        return found


def _read(line: bytes, sought: str | None) -> tuple[_Line | None, str]:
    """A line and its fault."""
    body = checked(line)
    if body is None:
        return None, "its checksum is wrong"
    try:
        try:
            read = _Line.model_validate_json(body)
        except ValidationError:  # Python's JSON reader accepts invalid Unicode; pydantic's reader does not
            read = _Line.model_validate(json.loads(body))
    except (ValueError, RecursionError):
        return None, "it is not a prediction"
    return read, read.fault(sought)


class _Images:
    """The N readable images of a run with a promise, with numbers from 0 to N - 1.

    Attributes:
        numbers: `(N,)` numbers of their lines.
        phases: `(N,)`, values of `PHASES`.
        answers: `(N,)` answers of the judge; `NOBODY` for images that the judge was not asked about.
        order: `(R,)` images that were not asked about before the test, in the order of the test.
        drawn: `(R,)`, whether an image of the order is one of the tested ones.
    """

    def __init__(self, lines: _Lines) -> None:
        self.numbers: Rows = np.array(lines.numbers, dtype=np.intp)
        self.phases = np.array(lines.phases, dtype=np.int8)
        self.answers: Columns = np.array(lines.answers, dtype=np.int64)
        others = np.flatnonzero(self.phases != TAUGHT)
        self.order: Rows = others[np.argsort(-np.array(lines.log_odds, dtype=np.float32)[others], kind="stable")]
        self.drawn: Bools = self.phases[self.order] == TESTED

    def __len__(self) -> int:
        return len(self.numbers)

    @cached_property
    def asked(self) -> Bools:
        """`(N,)` booleans."""
        return ~np.isin(self.phases, [KEPT, ACCEPTED])

    def count(self, phase: int) -> int:
        """Number of images of a phase."""
        return int((self.phases == phase).sum())

    def draws(self, first: int, seed: int) -> Iterator[str]:
        """What is wrong with the random images.

        Args:
            first: number of random images that must have been asked about first.
            seed: seed of the draws.
        """
        if (self.phases[first_rows(self.numbers, first, seed)] != TAUGHT).any():
            yield f"The first {first} random images of the seed {seed} were not all asked about before the test."
        tested = int(self.drawn.sum())
        if (draw(self.numbers[self.order], tested, seed) != self.drawn).any():
            yield f"The tested images are not the {tested} images that the seed {seed} draws."

    def treated(self, expected: NDArray[np.int_]) -> int:
        """Number of images of the order that were not tested, and have another phase than ``expected``, of shape `(R,)`."""
        return int((np.where(self.drawn, TESTED, expected) != self.phases[self.order]).sum())


def verify(folder: Path) -> list[str]:
    """Everything that does not hold in the promise of a run, one sentence each. The list is empty if the promise holds.

    The order of the images, the draw, the test and all counts are computed again. The promise is compared with the
    configuration, the scorer, the labels, the judge and the prompt in the manifest.

    Raises:
        DataError: if the folder contains no promise.
    """
    manifest, stated = Manifest.read(folder), read_certificate(folder / SUMMARY)
    if not isinstance(stated, Facts | Finding):
        hint = "A run with --agree or --recall writes a certificate when it is complete."
        raise DataError(f"{str(folder)!r} contains no certificate.", hint=hint)
    try:
        lines = _Lines.read(folder / PREDICTIONS, stated.label if isinstance(stated, Finding) else None)
    except OSError as exc:
        raise DataError(f"{str(folder / PREDICTIONS)!r} cannot be read: {exc.strerror}.", hint="Check the folder.") from exc
    images = _Images(lines)
    checks = _certificate(stated, images) if isinstance(stated, Facts) else _search(stated, images)
    return [*_settings(manifest, stated), *lines.faults, *checks]


def _settings(manifest: Manifest, stated: Facts | Finding) -> Iterator[str]:
    """The differences between the promise and the manifest."""
    kind, section = (AgreementConfig, "agreement") if isinstance(stated, Facts) else (FindConfig, "find")
    try:
        expected: dict[str, object] = kind.model_validate(manifest.config[section]).model_dump() | {
            "scorer": manifest.fingerprint,
            "labels": LabelSet.of(manifest.labels).texts_digest,
            "judge": manifest.stages[0],
            "identity": key_of(manifest.judges[0]),
            "prompt": manifest.contents["stage.0.prompt"],
        }
    except (KeyError, IndexError, ValidationError, CascadeError):
        yield "The manifest is not that of a complete run with a certificate."
        return
    yield from _differences("the manifest", stated, expected)


def _certificate(facts: Facts, images: _Images) -> Iterator[str]:
    """What is wrong with the order, the draw and the test of a certificate."""
    promise = AgreementConfig(agree=facts.agree, confidence=facts.confidence).promise
    first = max(facts.first, opening(len(images)))
    yield from images.draws(first, facts.seed)
    allowed, level, ordered = promise.allowed(len(images)), promise.level, len(images.order)
    disagrees = images.drawn & (images.answers[images.order] != THE_LABEL)
    prefix = longest_prefix(images.drawn, disagrees, allowed=allowed, level=level)
    if wrong := images.treated(np.where(np.arange(ordered) < prefix, KEPT, ASKED)):
        yield f"The test allows to keep a prefix of {prefix} images; {wrong} images are not treated so."
    tested = int(images.drawn.sum())
    counts: dict[str, object] = {
        **_counts(images),
        "first": first,
        "allowed": allowed,
        "ordered": ordered,
        "most": most_found_of(ordered, tested, allowed=allowed, level=level),
        "prefix": prefix,
        "found": int(disagrees[:prefix].sum()),
        "kept": images.count(KEPT),
        "unanswered": int((images.answers[images.asked] < 0).sum()),
        "sentence": facts.in_words(),
    }
    yield from _differences("the predictions", facts, counts)


def _search(finding: Finding, images: _Images) -> Iterator[str]:
    """What is wrong with the order, the draw, the test and the questions after the test of a search for a class."""
    config = FindConfig(**{name: getattr(finding, name) for name in FindConfig.model_fields})
    yield from images.draws(opening(len(images)), finding.seed)
    before = np.where(np.isin(images.phases, [TAUGHT, TESTED]), images.answers, NOBODY)
    begin, end = driven(after_test(images.order, images.drawn, before, THE_LABEL, config.wanted), images.answers)
    places = np.arange(len(images.order))
    if wrong := images.treated(np.where(places < begin, KEPT, np.where(places < end, ASKED, ACCEPTED))):
        yield (
            f"By the test, the last {len(places) - end} images of the order are accepted, and the {end - begin} images before "
            f"them are asked about; {wrong} images are not treated so."
        )
    counts: dict[str, object] = {
        **_counts(images),
        "named": int((images.answers == THE_LABEL).sum()),
        "accepted": images.count(ACCEPTED),
        "unanswered": int((images.answers[images.asked] == NOBODY).sum()),
    }
    yield from _differences("the predictions", finding, counts)


def _counts(images: _Images) -> dict[str, object]:
    """The counts of every promise."""
    return {
        "images": len(images),
        "taught": images.count(TAUGHT),
        "tested": images.count(TESTED),
        "questions": int(images.asked.sum()),
    }


def _differences(where: str, stated: Facts | Finding, expected: dict[str, object]) -> Iterator[str]:
    for name, value in expected.items():
        if (found := getattr(stated, name)) != value:
            yield f"In the certificate, {name} is {found!r}; by {where}, it is {value!r}."

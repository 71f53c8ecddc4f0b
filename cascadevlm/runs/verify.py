"""Checks the certificate of a run by the files of its folder alone: no image, no scorer and no judge is needed."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np
from pydantic import BaseModel, InstanceOf, ValidationError

from cascadevlm.base.errors import CascadeError, DataError
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import DecidedBy, Outcome
from cascadevlm.config.agreement import AgreementConfig
from cascadevlm.decision.agreement import draw, longest_prefix, most_found_of
from cascadevlm.decision.certifying import first_rows, opening
from cascadevlm.judges.cache import key_of
from cascadevlm.runs.certificate import Facts, Phase, Standing, read_certificate
from cascadevlm.runs.lines import checked
from cascadevlm.runs.manifest import Manifest
from cascadevlm.runs.run_folder import PREDICTIONS, SUMMARY

MOST_FAULTS = 20
"""The largest number of faulty lines that are reported."""

PHASES: tuple[Phase, ...] = get_args(Phase)
TAUGHT, TESTED, KEPT, ASKED = range(4)


class _Said(BaseModel):
    outcome: Outcome
    label: InstanceOf[str] | None


class _Line(BaseModel):
    """The fields of a line that a certificate depends on."""

    label: InstanceOf[str] | None
    decided_by: DecidedBy | None
    verdict: _Said | None
    certificate: Standing | None = None

    def fault(self) -> str:
        """What contradicts itself in the line; "" if nothing does."""
        standing, said = self.certificate, self.verdict
        if standing is None:
            return "" if self.label is None and said is None else "it has a prediction, but the certificate does not mention it"
        if standing.phase == "kept":
            if said is not None:
                return "its label was kept without a question, but it has an answer of the judge"
            if self.label != standing.label:
                return f"its label is {self.label!r}, but {standing.label!r} was kept"
            return "" if self.decided_by == "scorer" else "its label was kept, but not decided by the scorer"
        if said is None or said.outcome == "skipped":
            return f"the certificate counts it as {standing.phase!r}, but the judge was not asked about it"
        if said.label is not None and self.label != said.label:
            return f"its label is {self.label!r}, but the judge's is {said.label!r}"
        if (said.label is not None) != (self.decided_by == "judge"):
            return f"it is decided by {self.decided_by!r}, but the judge's label is {said.label!r}"
        return ""


@dataclass
class _Found:
    """What the lines of N readable images contain, as lists of N numbers, and what is wrong with the lines."""

    numbers: list[int] = field(default_factory=list)
    phases: list[int] = field(default_factory=list)
    log_odds: list[float] = field(default_factory=list)
    disagrees: list[bool] = field(default_factory=list)
    lines: int = 0
    unanswered: int = 0
    faults: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, predictions: Path) -> "_Found":
        """Read the lines."""
        found, numbers = cls(), {phase: number for number, phase in enumerate(PHASES)}
        with predictions.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                found.lines = number
                read, fault = _read(line)
                if fault and len(found.faults) < MOST_FAULTS:
                    found.faults.append(f"Line {number} of {PREDICTIONS}: {fault}.")
                if read is None or read.certificate is None:
                    continue
                said = read.verdict.label if read.verdict else None
                found.unanswered += read.verdict is not None and said is None
                found.numbers.append(number - 1)
                found.phases.append(numbers[read.certificate.phase])
                found.log_odds.append(read.certificate.log_odds)
                found.disagrees.append(said != read.certificate.label)
        return found


def _read(line: bytes) -> tuple[_Line | None, str]:
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
    return read, read.fault()


def verify(folder: Path) -> list[str]:
    """Everything that does not hold in the certificate of a run, one sentence each. The list is empty if the certificate holds.

    The order of the images, the draw, the test and all counts are computed again. The certificate is compared with the
    configuration, the scorer, the labels, the judge and the prompt in the manifest.

    Raises:
        DataError: if the folder contains no certificate.
    """
    manifest, facts = Manifest.read(folder), read_certificate(folder / SUMMARY)
    if not isinstance(facts, Facts):
        hint = "A run with --agree writes a certificate when it is complete."
        raise DataError(f"{str(folder)!r} contains no certificate.", hint=hint)
    try:
        found = _Found.read(folder / PREDICTIONS)
    except OSError as exc:
        raise DataError(f"{str(folder / PREDICTIONS)!r} cannot be read: {exc.strerror}.", hint="Check the folder.") from exc
    return [*_settings(manifest, facts), *found.faults, *_test(facts, found)]


def _settings(manifest: Manifest, facts: Facts) -> Iterator[str]:
    """The differences between the certificate and the manifest."""
    try:
        configured = AgreementConfig.model_validate(manifest.config["agreement"])
        expected: dict[str, object] = {
            "agree": configured.agree,
            "confidence": configured.confidence,
            "seed": configured.seed,
            "scorer": manifest.fingerprint,
            "labels": LabelSet.of(manifest.labels).texts_digest,
            "judge": manifest.stages[0],
            "identity": key_of(manifest.judges[0]),
            "prompt": manifest.contents["stage.0.prompt"],
        }
    except (KeyError, IndexError, ValidationError, CascadeError):
        yield "The manifest is not that of a complete run with a certificate."
        return
    yield from _differences("the manifest", facts, expected)


def _test(facts: Facts, found: _Found) -> Iterator[str]:
    """What is wrong with the order, the draw and the test."""
    phases, log_odds = np.array(found.phases, dtype=np.int8), np.array(found.log_odds, dtype=np.float32)
    images, promise = len(phases), AgreementConfig(agree=facts.agree, confidence=facts.confidence).promise
    numbers = np.array(found.numbers, dtype=np.intp)
    first = max(facts.first, opening(images))
    if facts.first < first or (phases[first_rows(numbers, first, facts.seed)] != TAUGHT).any():
        yield f"The first {first} random images of the seed {facts.seed} were not all asked about before the test."
    others = np.flatnonzero(phases != TAUGHT)
    order = others[np.argsort(-log_odds[others], kind="stable")]
    drawn, disagrees = phases[order] == TESTED, np.array(found.disagrees, dtype=bool)[order]
    tested = int(drawn.sum())
    if (draw(numbers[order], tested, facts.seed) != drawn).any():
        yield f"The tested images are not the {tested} images that the seed {facts.seed} draws."
    allowed, level = promise.allowed(images), promise.level
    prefix = longest_prefix(drawn, disagrees, allowed=allowed, level=level)
    expected = np.where(drawn, TESTED, np.where(np.arange(len(order)) < prefix, KEPT, ASKED))
    if wrong := int((expected != phases[order]).sum()):
        yield f"The test allows to keep a prefix of {prefix} images; {wrong} images are not treated so."
    kept = int((phases == KEPT).sum())
    counts: dict[str, object] = {
        "images": images,
        "allowed": allowed,
        "taught": images - len(order),
        "ordered": len(order),
        "tested": tested,
        "most": most_found_of(len(order), tested, allowed=allowed, level=level),
        "prefix": prefix,
        "found": int((drawn & disagrees)[:prefix].sum()),
        "kept": kept,
        "questions": images - kept,
        "unanswered": found.unanswered,
        "sentence": facts.in_words(),
    }
    yield from _differences("the predictions", facts, counts)


def _differences(where: str, facts: Facts, expected: dict[str, object]) -> Iterator[str]:
    for name, value in expected.items():
        if (stated := getattr(facts, name)) != value:
            yield f"In the certificate, {name} is {stated!r}; by {where}, it is {value!r}."

"""``corrections.jsonl``: what people said about the images of a run. Lines are only appended, each with a checksum.

A person can say more than once what an image shows: the latest statement of each person stands. Of the standing statements, the
latest label counts. "None of the labels" counts like a label. A person who skips an image says nothing about it.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import filelock
from pydantic import AwareDatetime, BaseModel, ConfigDict, InstanceOf

from cascadevlm.base.errors import DataError
from cascadevlm.base.files import writing_to
from cascadevlm.runs.lines import AnyLine, checked, with_checksum

CORRECTIONS = "corrections.jsonl"
LOCK = "corrections.lock"
"""A lock of its own, because people also correct a run that is not finished, and its process holds the lock of the folder."""


class Correction(BaseModel):
    """What one person said about one image. Texts may contain invalid Unicode.

    Attributes:
        image: name of the image, as in the run. The name of a file is its path.
        id: the id of the image; None if the images of the run have no ids.
        label: name of the label; None if the image shows none of the labels, or was skipped.
        skipped: true if the person looked at the image and did not decide.
        by: the person; "" if unknown.
        at: when the person said this.
        source: the file from which the correction was imported.
    """

    model_config = ConfigDict(frozen=True)

    image: InstanceOf[str]
    id: InstanceOf[str] | None = None
    label: InstanceOf[str] | None
    skipped: bool = False
    by: InstanceOf[str] = ""
    at: AwareDatetime
    source: InstanceOf[str]

    @classmethod
    def read(cls, text: bytes) -> Self:
        """The correction in a line.

        Raises:
            ValueError: if the line is not a correction.
        """
        return cls.model_validate(json.loads(text))  # pydantic's own JSON reader refuses invalid Unicode

    @property
    def key(self) -> str:
        """What names the image in the run, as `cascadevlm.runs.lines.Line.key`."""
        return self.image if self.id is None else self.id

    @property
    def line(self) -> bytes:
        """The line of the file."""
        return with_checksum(json.dumps({**dict(self), "at": self.at.isoformat()}).encode())

    @property
    def said(self) -> str:
        """The label in quotes, "none of the labels" or "skipped"."""
        return "skipped" if self.skipped else "none of the labels" if self.label is None else repr(self.label)

    @property
    def statement(self) -> tuple[object, ...]:
        """All fields but the source. The same statement can be in several files."""
        return self.image, self.id, self.label, self.skipped, self.by, self.at


@dataclass(frozen=True)
class Corrections:
    """All corrections of a run, in the order in which they were added.

    Attributes:
        all: the corrections.
    """

    all: tuple[Correction, ...] = ()

    @cached_property
    def standing(self) -> dict[str, list[Correction]]:
        """By the key of each image: the latest statement of each person, oldest first."""
        found: defaultdict[str, dict[str, Correction]] = defaultdict(dict)
        for each in sorted(self.all, key=lambda each: each.at):
            found[each.key].pop(each.by, None)
            found[each.key][each.by] = each
        return {image: [*by_person.values()] for image, by_person in found.items()}

    @cached_property
    def _decided(self) -> dict[str, list[Correction]]:
        """The standing statements of those who did not skip the image."""
        decided = {image: [each for each in said if not each.skipped] for image, said in self.standing.items()}
        return {image: said for image, said in decided.items() if said}

    @cached_property
    def counting(self) -> dict[str, Correction]:
        """By the key of each image with a label from a person: the correction that counts. Truths of people come from here."""
        return {image: said[-1] for image, said in self._decided.items()}

    @cached_property
    def conflicts(self) -> dict[str, list[Correction]]:
        """By the key of each image about which people disagree: their standing statements. The last one counts."""
        return {image: said for image, said in self._decided.items() if len({each.label for each in said}) > 1}

    @property
    def described_conflicts(self) -> list[str]:
        """One sentence per image about which people disagree."""
        sentences = []
        for image, said in self.conflicts.items():
            words = "; ".join(f"{each.by or 'somebody'} said {each.said}" for each in said)
            sentences.append(f"{image}: {words}, which counts.")
        return sentences

    def applied(self, line: AnyLine) -> AnyLine:
        """The prediction with the label of a person, if a person gave one."""
        found = self.counting.get(line.key)
        if found is None:
            return line
        return line.model_copy(update={"label": found.label, "probability": None, "decided_by": "person"})


def read_corrections(folder: Path) -> Corrections:
    """The corrections in the folder of a run; empty if there are none. An incomplete last line is left out.

    Raises:
        DataError: if a line is damaged.
    """
    path = folder / CORRECTIONS
    found = []
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except (FileNotFoundError, NotADirectoryError):  # a file with predictions, and no folder, has no corrections
        return Corrections()
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            break
        try:
            if (body := checked(line)) is None:
                raise ValueError("its checksum is wrong")
            found.append(Correction.read(body))
        except ValueError as exc:
            told = f"{str(path)!r}, line {number}, is damaged: {str(exc).partition(chr(10))[0]}."
            raise DataError(told, hint="Remove the line, and import its correction again.") from exc
    return Corrections(tuple(found))


def add_corrections(folder: Path, corrections: Iterable[Correction]) -> list[Correction]:
    """Append the corrections that the folder does not contain yet, and return them. Safe across processes.

    Raises:
        DataError: if the file is damaged.
        RunError: if the folder cannot be written.
    """
    with writing_to(folder), filelock.FileLock(folder / LOCK):
        known = {each.statement for each in read_corrections(folder).all}
        new = {each.statement: each for each in corrections if each.statement not in known}
        with (folder / CORRECTIONS).open("ab") as file:
            file.truncate(_whole_lines(folder / CORRECTIONS))
            file.write(b"".join(each.line for each in new.values()))
            file.flush()
            os.fsync(file.fileno())
    return [*new.values()]


def _whole_lines(path: Path) -> int:
    """Number of bytes of all complete lines. A kill leaves an incomplete last line."""
    return path.read_bytes().rfind(b"\n") + 1


def random_order(image: str) -> int:
    """A number that sorts images in an order that has nothing to do with the run. The first N images are a random sample.

    It differs from the order in which a run that learns takes its images: its first images are those with the least learned.

    Args:
        image: name of the image.

    Returns:
        a number of 64 bits.
    """
    return int.from_bytes(hashlib.sha256(b"review" + image.encode(errors="surrogatepass")).digest()[:8])

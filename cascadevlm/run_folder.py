"""The folder of a bulk run: what survives a kill at any moment.

::

    manifest.json         what is run: the frozen configuration, the labels, the scorer's fingerprint, versions, when it began
    predictions.jsonl     a line for every image in input order, as `Prediction.to_dict` tells it, with its own checksum
    failures.jsonl        images that could not be read, and those about which a judge was asked in vain
    ledger.jsonl          what was promised to judges and what they billed
    progress.json         how far the decisions stood when the predictions were last flushed
    verdicts/             the judges' answers, where the configuration keeps no cache
    predictions.parquet   the predictions as a table, once all are there
    summary.json          the counts, once all are there
    lock                  held by the process that writes

Predictions only ever grow. A last line that was not finished is cut off when a run goes on; so is everything after a line whose
checksum is wrong, as a machine that lost its power may leave it. What is cut off is worked out again, with the answers that
are kept.
"""

import json
import os
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self, TypeAlias

import filelock
from pydantic import BaseModel, BeforeValidator, JsonValue, TypeAdapter, ValidationError

from cascadevlm.budget import Ledger
from cascadevlm.engine import BEGINNING, Checkpoint
from cascadevlm.errors import DataError
from cascadevlm.files import valid_text, write_whole
from cascadevlm.labels import Label
from cascadevlm.types import DecidedBy, Outcome, Prediction

if TYPE_CHECKING:
    import pyarrow

FLUSH_SECONDS = 1.0
"""How long predictions wait at most to be made safe; answers of judges are kept at once."""

ROWS_AT_ONCE = 10_000
"""Rows of the table that are in memory at once."""

_CHECKSUM = ', "crc32": '
_CHECKPOINT = TypeAdapter(Checkpoint)


class Manifest(BaseModel):
    """``manifest.json``."""

    format: Literal[1] = 1
    config: dict[str, JsonValue]
    labels: list[Label]
    inputs: str
    began: datetime
    versions: dict[str, str]
    machine: str
    fingerprint: str | None = None

    def differences(self, other: "Manifest") -> list[str]:
        """What another run does otherwise, one sentence each; what a run may spend and where answers are kept may change."""
        mine, theirs = (_flat(run.config) for run in (self, other))
        keys = [key for key in {**mine, **theirs} if key.partition(".")[0] not in ("budget", "cache", "labels")]
        found = [f"{key} was {mine.get(key)!r} and is {theirs.get(key)!r}" for key in keys if mine.get(key) != theirs.get(key)]
        return found + ["the labels are others"] * (self.labels != other.labels)


def _flat(value: JsonValue, path: str = "") -> dict[str, JsonValue]:
    """Every value by the path to it, as ``stage.0.judge``."""
    if isinstance(value, dict | list) and value:
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, part in parts for key, leaf in _flat(part, f"{path}{name}.").items()}
    return {path.removesuffix("."): value}


@dataclass(kw_only=True)
class Tally:
    """What a run has done so far.

    Attributes:
        images: with a line in the predictions.
        counts: of them, by what came of them: "kept" without asking, the outcome of the last verdict, or "unreadable".
        abstained: readable images that got no label.
        asked: how many a judge was asked about, or its answer known.
        requests: to judges.
        saved_dollars: by the cache.
        spent_dollars: by the ledger, over all sessions of the run.
    """

    images: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    abstained: int = 0
    asked: int = 0
    requests: int = 0
    saved_dollars: float = 0.0
    spent_dollars: float = 0.0

    def to_dict(self) -> dict[str, JsonValue]:
        """The counts as JSON-serialisable data."""
        return vars(self) | {"counts": dict(self.counts)}

    def add(self, line: "_Line") -> None:
        """Count one more prediction."""
        self.images += 1
        self.counts[line.verdict.outcome if line.verdict else "kept" if line.candidates else "unreadable"] += 1
        self.abstained += bool(line.candidates) and line.label is None
        self.asked += any(verdict.outcome != "skipped" for verdict in line.verdicts)
        self.requests += line.cost.requests
        self.saved_dollars += line.cost.saved_dollars


_Text: TypeAlias = Annotated[str, BeforeValidator(valid_text)]


class _Verdict(BaseModel):
    outcome: Outcome
    judge: str
    rationale: _Text
    error: _Text


class _Candidate(BaseModel):
    label: _Text
    probability: float
    rank: int


class _Cost(BaseModel):
    requests: int
    dollars: float
    saved_dollars: float


class _Line(BaseModel):
    """What of a line of ``predictions.jsonl`` is counted, told as a failure, and put into the table."""

    path: _Text
    label: _Text | None
    probability: float | None
    decided_by: DecidedBy | None
    candidates: list[_Candidate]
    reasons: list[str]
    verdict: _Verdict | None
    earlier_verdicts: list[_Verdict]
    cost: _Cost
    error: _Text

    @classmethod
    def read(cls, body: bytes) -> Self:
        """What is written in a line; unlike other readers, Python's takes texts that are no valid Unicode."""
        return cls.model_validate(json.loads(body))

    @property
    def verdicts(self) -> list[_Verdict]:
        return [*self.earlier_verdicts, *([self.verdict] if self.verdict else [])]

    def row(self) -> dict[str, object]:
        """Of the table."""
        last = self.verdict
        row = self.model_dump(include={"path", "label", "probability", "decided_by", "candidates", "reasons"})
        row |= {"escalated": last is not None, "dollars": self.cost.dollars, "error": self.failure() or self.error}
        return (last.model_dump() if last else {}) | row

    def failure(self) -> str:
        """Why the image could not be read or a judge was asked in vain, or ""."""
        if not self.candidates:
            return self.error
        return next((verdict.error for verdict in self.verdicts if verdict.outcome in ("failed", "refused", "unparsed")), "")


class DurableLedger(Ledger):
    """A ledger that writes down every promise and payment, and goes on from what is written.

    A promise that a killed process did not settle counts as spent: the question may have been answered and billed.

    Args:
        dollars: the cap over all sessions; None for no cap.
        path: of its file.
    """

    def __init__(self, dollars: float | None, path: Path) -> None:
        super().__init__(dollars)
        if path.exists():
            entries = [json.loads(line) for line in path.read_text().split("\n")[:-1]]  # what is not ended did not happen
            self._spent = sum(entry["reserved"] + entry["spent"] for entry in entries)
        write_whole(path, json.dumps({"reserved": 0, "spent": self._spent}) + "\n")
        self._file = path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Write no more."""
        self._file.close()

    def _change(self, *, reserved: int, spent: int = 0) -> None:
        super()._change(reserved=reserved, spent=spent)
        if reserved or spent:
            self._file.write(json.dumps({"reserved": reserved, "spent": spent}) + "\n")
            self._file.flush()


class RunFolder:
    """The folder of a run, locked, and ready to go on where it ended.

    Attributes:
        tally: of the predictions that are in it.
        checkpoint: where the decisions go on; never after the last prediction that is there.

    Warns:
        RuntimeWarning: if a line of the predictions that is not the last one is damaged.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.tally = Tally()
        self.checkpoint = BEGINNING
        self._summary = folder / "summary.json"
        self._flushed = time.monotonic()

    @classmethod
    @contextmanager
    def opened(cls, folder: Path, manifest: Manifest) -> "Iterator[RunFolder]":
        """Make the folder, or go on with it.

        Raises:
            DataError: if it cannot be made, is no run's, is of another run, or another process writes to it.
        """
        if folder.exists() and not (folder / "manifest.json").exists() and any(_but_for_the_lock(folder)):
            raise DataError(f"{str(folder)!r} holds other things than a run.", hint="Give a folder that is new or empty.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(folder / "lock", timeout=0):
                opened = cls(folder, manifest)
                with opened._writing():
                    yield opened
        except filelock.Timeout as exc:
            raise DataError(f"Another process writes to {str(folder)!r}.", hint="Wait for it, or give another folder.") from exc

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self._agree()
        self._finished = self._summary.exists()
        with (self.folder / "failures.jsonl").open("w", encoding="utf-8") as self._failures:
            self._keep_what_is_sound()
            with (self.folder / "predictions.jsonl").open("a", encoding="utf-8") as self._predictions:
                try:
                    yield
                finally:
                    self.flush(self.checkpoint)

    def _agree(self) -> None:
        """Take over the manifest that is there, or write one."""
        path = self.folder / "manifest.json"
        if not path.exists():
            self._write_manifest()
            return
        try:
            begun = Manifest.model_validate_json(path.read_bytes())
        except ValidationError as exc:
            raise DataError(f"{str(path)!r} is no manifest of a run.", hint="Give another folder.") from exc
        if differences := begun.differences(self.manifest):
            hint = "Give another folder, or what it was begun with."
            raise DataError(f"{str(self.folder)!r} is of another run: {'; '.join(differences)}.", hint=hint)
        self.manifest = begun

    def _write_manifest(self) -> None:
        write_whole(self.folder / "manifest.json", self.manifest.model_dump_json(indent=2) + "\n")

    def _keep_what_is_sound(self) -> None:
        """Count the predictions that are there and cut off what is not whole."""
        path = self.folder / "predictions.jsonl"
        path.touch()
        sound = 0
        with path.open("rb") as lines:
            for line in lines:
                if (body := _checked(line)) is None:
                    if line.endswith(b"\n"):
                        told = (
                            f"The predictions were damaged after {self.tally.images} images; what followed is worked out again."
                        )
                        warnings.warn(told, RuntimeWarning, stacklevel=2)
                    break
                sound += len(line)
                self._count(_Line.read(body))
        if sound < path.stat().st_size:
            os.truncate(path, sound)
            self._reopen()
        progress = self.folder / "progress.json"
        if progress.exists():
            checkpoint = _CHECKPOINT.validate_json(progress.read_bytes())
            self.checkpoint = checkpoint if checkpoint.images <= self.tally.images else BEGINNING

    def paths(self) -> Iterator[str]:
        """Of the images that have a prediction, in order."""
        with (self.folder / "predictions.jsonl").open("rb") as lines:
            for _, line in zip(range(self.tally.images), lines, strict=False):
                yield json.loads(line)["path"]

    def fingerprinted(self, fingerprint: str) -> None:
        """Note the scorer's fingerprint.

        Raises:
            DataError: if the run was begun with another.
        """
        if self.manifest.fingerprint is None:
            self.manifest = self.manifest.model_copy(update={"fingerprint": fingerprint})
            self._write_manifest()
        elif self.manifest.fingerprint != fingerprint:
            raise DataError(
                f"{str(self.folder)!r} was begun with the scorer {self.manifest.fingerprint!r}, this one is {fingerprint!r}.",
                hint="Give another folder.",
            )

    def append(self, path: str, prediction: Prediction) -> None:
        """Write a prediction down; it is safe once flushed."""
        self._reopen()
        told = prediction.to_dict() | {"path": path}
        line, body = _Line.model_validate(told), json.dumps(told)
        self._predictions.write(f"{body[:-1]}{_CHECKSUM}{zlib.crc32(body.encode())}}}\n")
        self._count(line)

    def _reopen(self) -> None:
        """A summary that was of other predictions does not hold any more."""
        if self._finished:
            self._summary.unlink()
            self._finished = False

    def _count(self, line: _Line) -> None:
        if failure := line.failure():
            row = {"image": self.tally.images, "path": line.path, "label": line.label, "error": failure}
            self._failures.write(json.dumps(row) + "\n")
        self.tally.add(line)

    @property
    def flush_due(self) -> bool:
        return time.monotonic() - self._flushed > FLUSH_SECONDS

    def flush(self, checkpoint: Checkpoint) -> None:
        """Make sure that what was written stays, and note where the decisions stand."""
        for file in (self._predictions, self._failures):
            file.flush()
        os.fsync(self._predictions.fileno())
        self.checkpoint = checkpoint
        write_whole(self.folder / "progress.json", _CHECKPOINT.dump_json(checkpoint).decode())
        self._flushed = time.monotonic()

    def finish(self) -> None:
        """Write the table and the summary, unless they are of all predictions already."""
        self.flush(self.checkpoint)
        if self._finished:
            return
        self._write_table()
        write_whole(self._summary, json.dumps(self.tally.to_dict(), indent=2) + "\n")

    def _write_table(self) -> None:
        import pyarrow
        import pyarrow.parquet

        schema = table_schema()
        unfinished = self.folder / "predictions.parquet.part"
        with (
            (self.folder / "predictions.jsonl").open("rb") as lines,
            pyarrow.parquet.ParquetWriter(unfinished, schema) as table,
        ):
            rows = (_Line.read(line).row() for line in lines)
            while some := list(islice(rows, ROWS_AT_ONCE)):
                table.write_table(pyarrow.Table.from_pylist(some, schema=schema))
        unfinished.replace(self.folder / "predictions.parquet")


def table_schema() -> "pyarrow.Schema":
    """The columns of ``predictions.parquet``."""
    from pyarrow import bool_, float64, int64, list_, schema, string, struct

    texts = dict.fromkeys(("path", "label", "decided_by", "outcome", "judge", "rationale", "error"), string())
    candidate = struct({"label": string(), "probability": float64(), "rank": int64()}.items())
    return schema(
        texts
        | {"probability": float64(), "escalated": bool_(), "dollars": float64()}
        | {"candidates": list_(candidate), "reasons": list_(string())}
    )


def _checked(line: bytes) -> bytes | None:
    """The prediction in a line, if the line is as it was written."""
    body, _, checksum = line.rpartition(_CHECKSUM.encode())
    body += b"}"
    return body if checksum == f"{zlib.crc32(body)}}}\n".encode() else None


def _but_for_the_lock(folder: Path) -> Iterator[Path]:
    return (entry for entry in folder.iterdir() if entry.name != "lock")

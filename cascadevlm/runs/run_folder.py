"""The folder of a bulk run: what survives a kill at any moment.

::

    manifest.json         what is run: the frozen configuration, the labels, digests of what the configuration names, the scorer's
                          fingerprint, the judges' identities, versions, when it began
    predictions.jsonl     a line for every image in input order, as `Prediction.to_dict` tells it, with the digest of the
                          image's file and its own checksum
    failures.jsonl        images that could not be read, and those about which a judge was asked in vain
    ledger.jsonl          what was promised to judges and what they billed
    progress.json         how far the decisions stood when the predictions were last flushed
    verdicts/             the judges' answers, where the configuration keeps no cache
    predictions.parquet   the predictions as a table, once all are there
    summary.json          the counts, once all are there
    lock                  held by the process that writes

Predictions only ever grow. A last line that was not finished is cut off when a run goes on; so is everything after a line whose
checksum is wrong, as a machine that lost its power may leave it; everything from the first failure on, if failures are to be
tried again; everything from the first image on that was skipped for want of money, if the cap was raised; and everything from the
first image on whose file has another digest now. Only files that were changed after the run began are read for that. What is cut
off is worked out again, with the answers that are kept.
"""

import json
import os
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import filelock
from pydantic import JsonValue, TypeAdapter, ValidationError

from cascadevlm.base.errors import DataError, ImageError
from cascadevlm.base.files import write_whole, writing_to
from cascadevlm.base.images import path_of
from cascadevlm.base.types import NANODOLLARS, Prediction
from cascadevlm.cascade.engine import BEGINNING, Checkpoint
from cascadevlm.judges.budget import DurableLedger, line_of_ledger
from cascadevlm.runs import manifest as manifests
from cascadevlm.runs.lines import Line, failure_of, line_of, write_table
from cascadevlm.runs.manifest import Manifest
from cascadevlm.scorers.base import Prepared
from cascadevlm.scorers.kept import file_digest

FAILURES = "failures.jsonl"
SUM_ERROR = 1e-6
"""Dollars that sums of floats may differ by."""

_CHECKSUM = b',"crc32":'
_CHECKPOINT = TypeAdapter(Checkpoint)
_BEFORE_THE_MANIFEST = {"lock", f"{manifests.NAME}.part"}
"""What a process that was killed before its manifest was there leaves."""


@dataclass(kw_only=True)
class Tally:
    """What a run has done so far.

    Attributes:
        images: with a line in the predictions.
        counts: of them, by what came of them: "kept" without asking, the outcome of the last verdict, or "unreadable".
        failures: how many could not be read or had a judge asked in vain.
        abstained: readable images that got no label.
        asked: how many a judge was asked about, or its answer known.
        answered: about how many of these a judge gave an answer.
        requests: to judges.
        saved_dollars: by the cache.
        spent_dollars: by the ledger, over all sessions of the run.
    """

    images: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    failures: int = 0
    abstained: int = 0
    asked: int = 0
    answered: int = 0
    requests: int = 0
    saved_dollars: float = 0.0
    spent_dollars: float = 0.0

    def to_dict(self) -> dict[str, JsonValue]:
        """The counts as JSON-serialisable data."""
        return vars(self) | {"counts": dict(self.counts)}

    @property
    def in_vain(self) -> bool:
        """Whether no image could be read, or no question asked got an answer."""
        return 0 < self.images == self.counts["unreadable"] or (self.asked > 0 and not self.answered)

    def add(self, prediction: Prediction | Line) -> None:
        """Count one more prediction."""
        verdict, cost = prediction.verdict, prediction.cost
        self.images += 1
        self.counts[verdict.outcome if verdict else "kept" if prediction.candidates else "unreadable"] += 1
        self.failures += bool(failure_of(prediction))
        self.abstained += bool(prediction.candidates) and prediction.label is None
        self.asked += prediction.asked
        self.answered += prediction.answered
        self.requests += cost.requests
        self.saved_dollars += cost.saved_dollars


class RunFolder:
    """The folder of a run, locked, and ready to go on where it ended.

    Attributes:
        ledger: of what all its sessions spend.
        tally: of the predictions that are in it.
        checkpoint: where the decisions go on; never after the last prediction that is there.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        ledger: DurableLedger,
        predictions: BinaryIO,
        failures: BinaryIO,
        finished: bool,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.ledger = ledger
        self.tally = Tally(spent_dollars=ledger.spent_dollars)
        self.checkpoint = BEGINNING
        self._predictions = predictions
        self._failures = failures
        self._finished = finished
        self._raised_from: float | None = None
        self._digests: dict[str, str] = {}
        self._flushing = threading.RLock()

    @classmethod
    @contextmanager
    def opened(
        cls, folder: Path, manifest: Manifest, *, dollars: float | None = None, retry_failed: bool = False
    ) -> "Iterator[RunFolder]":
        """Make the folder, or go on with it.

        Args:
            folder: new, empty, or one of an earlier session.
            manifest: of this run.
            dollars: what all its sessions together may spend.
            retry_failed: whether the predictions are cut off before the first image that could not be read or of which a judge
                could not be asked.

        Raises:
            DataError: if it is no run's, is of another run, or another process writes to it.
            RunError: if it cannot be written.

        Warns:
            RuntimeWarning: if a line of the predictions that is not the last one is damaged.
        """
        with writing_to(folder), ExitStack() as stack:
            _require_no_other_things(folder)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(filelock.FileLock(folder / "lock", timeout=0))
            except filelock.Timeout as exc:
                hint = "Wait for it, or give another folder."
                raise DataError(f"Another process writes to {str(folder)!r}.", hint=hint) from exc
            summary = folder / "summary.json"
            finished = summary.exists() and (folder / "predictions.parquet").exists()
            if not finished:
                summary.unlink(missing_ok=True)
            opened = cls(
                folder,
                manifest.agreed(folder),
                ledger=stack.enter_context(closing(DurableLedger(dollars, folder / "ledger.jsonl"))),
                predictions=stack.enter_context((folder / "predictions.jsonl").open("ab")),
                failures=stack.enter_context((folder / FAILURES).open("wb")),
                finished=finished,
            )
            opened._keep_what_is_sound(retry_failed, raised=opened.manifest.is_raised_by(dollars))
            opened.manifest = opened.manifest.with_cap(dollars, folder)
            files = stack.pop_all()
        try:
            yield opened
        finally:
            with writing_to(folder), opened._flushing, files:
                opened.flush(opened.checkpoint)

    def _keep_what_is_sound(self, retry_failed: bool, *, raised: bool) -> None:
        """Count the predictions that are there and cut off what is not whole, and what is to be tried again.

        Raises:
            DataError: if the ledger knows of less than these predictions cost.
        """
        path = self.folder / "predictions.jsonl"
        sound = 0
        dollars = 0.0
        with path.open("rb") as lines:
            for line in lines:
                if (read := _read(line)) is None:
                    if line.endswith(b"\n"):
                        images = self.tally.images
                        told = f"The predictions were damaged after {images} images; what followed is worked out again."
                        warnings.warn(told, RuntimeWarning, stacklevel=2)
                    break
                if read.digest and self._has_changed(read):
                    told = f"The image {read.path!r} was changed after its prediction: it and what follows is worked out again."
                    warnings.warn(told, RuntimeWarning, stacklevel=2)
                    break
                if raised and read.skipped:
                    self._raised_from = self.manifest.dollars
                    break
                if retry_failed and read.failed:
                    break
                sound += len(line)
                dollars += read.cost.dollars
                self._count(read.path, read)
        if dollars > self.ledger.spent_dollars + SUM_ERROR:
            spent = f"${self.ledger.spent_dollars:.6f} instead of ${dollars:.6f}"
            hint = f"Put the file back, or write this line into it: {line_of_ledger(spent=round(dollars * NANODOLLARS)).strip()}"
            raise DataError(f"{str(self.ledger.path)!r} does not know what the predictions cost: {spent}.", hint=hint)
        if sound < path.stat().st_size:
            self._reopen()
            self._predictions.truncate(sound)
        self.checkpoint = self._progress()

    def _has_changed(self, line: Line) -> bool:
        """Whether the file of an image holds other bytes than when it was classified; not so of one that is gone."""
        try:
            found = Path(line.path).stat()
            changed_at = max(found.st_mtime, found.st_ctime)  # the latter, nobody can set back
            return changed_at > self.manifest.began.timestamp() and file_digest(line.path) != line.digest
        except (OSError, ValueError, ImageError):
            return False

    def _progress(self) -> Checkpoint:
        """What was noted, unless it cannot be read or predictions before it are missing, which forgets it."""
        path = self.folder / "progress.json"
        try:
            noted = _CHECKPOINT.validate_json(_checked(path.read_bytes()) or b"")
        except (FileNotFoundError, ValidationError):
            return BEGINNING
        if noted.images <= self.tally.images:
            return noted
        path.unlink()  # other predictions may soon stand before it
        return BEGINNING

    def outlook(self, total: int | None) -> str:
        """What is left to do, as a sentence; "" for a run that begins.

        Args:
            total: how many images there are, if that is known.
        """
        if self._raised_from is not None:
            what = "judges are asked about the images that were skipped for want of money"
            return f"The budget was raised from ${self._raised_from:.2f}: {what}; answers that are kept are used again."
        if self.tally.images == total:
            return f"Nothing is left to do: all {total} images have a prediction."
        return f"{self.tally.images} images have a prediction; the run goes on after them." if self.tally.images else ""

    def paths(self) -> Iterator[str]:
        """Of the images that have a prediction, in order."""
        with (self.folder / "predictions.jsonl").open("rb") as lines:
            for _, line in zip(range(self.tally.images), lines, strict=False):
                yield json.loads(line)["path"]

    def scored_with(self, fingerprint: str) -> None:
        """Note the scorer's fingerprint.

        Raises:
            DataError: if the run was begun with another.
        """
        with writing_to(self.folder):
            self.manifest = self.manifest.with_fingerprint(fingerprint, self.folder)

    def judged_by(self, stage: int, identity: Mapping[str, JsonValue]) -> None:
        """Note the identity of a stage's judge.

        Raises:
            DataError: if the run was begun with another.
        """
        with writing_to(self.folder):
            self.manifest = self.manifest.with_judge(stage, identity, self.folder)

    def scored(self, images: Sequence[Prepared]) -> None:
        """Note the digests of images' files, for their lines. Safe across threads."""
        self._digests.update({path_of(image.source): image.file_digest for image in images if image.file_digest})

    def forget(self, path: str) -> None:
        """Forget the digest of an image that has its line."""
        self._digests.pop(path, None)

    def append(self, path: str, prediction: Prediction) -> None:
        """Write a prediction down; it is safe once flushed."""
        body = line_of(path, prediction, self._digests.pop(path, ""))
        with writing_to(self.folder):
            self._reopen()
            self._predictions.write(_with_checksum(body))
            self._count(path, prediction)
        self.tally.spent_dollars = self.ledger.spent_dollars

    def _reopen(self) -> None:
        """A summary that was of other predictions does not hold any more."""
        if self._finished:
            (self.folder / "summary.json").unlink()
            self._finished = False

    def _count(self, path: str, prediction: Prediction | Line) -> None:
        if failure := failure_of(prediction):
            row = {"image": self.tally.images, "path": path, "label": prediction.label, "error": failure}
            self._failures.write(json.dumps(row).encode() + b"\n")
        self.tally.add(prediction)

    def flush(self, checkpoint: Checkpoint) -> None:
        """Make sure that what was written stays, and note where the decisions stand. Safe across threads."""
        with self._flushing, writing_to(self.folder):
            if self._predictions.closed:  # an interrupt waits for no thread
                return
            for file in (self._predictions, self._failures):
                file.flush()
            self.ledger.sync()  # first: no prediction is known without what it cost
            os.fsync(self._predictions.fileno())
            self.checkpoint = checkpoint
            write_whole(self.folder / "progress.json", _with_checksum(_CHECKPOINT.dump_json(checkpoint)).decode())

    def finish(self) -> None:
        """Write the table and the summary, unless they are of all predictions already."""
        self.flush(self.checkpoint)
        if self._finished:
            return
        with writing_to(self.folder):
            write_table(self.folder / "predictions.jsonl", self.folder / "predictions.parquet")
            write_whole(self.folder / "summary.json", json.dumps(self.tally.to_dict(), indent=2) + "\n")
        self._finished = True


def images_left(folder: Path, total: int, *, dollars: float | None, retry_failed: bool) -> int:
    """Number of images that a run may ask judges about: all that have no usable prediction in its folder.

    Args:
        folder: of the run; it need not exist.
        total: number of images of the run.
        dollars: what all sessions of the run together may spend. If that is more than in the session before, images that were
            skipped for want of money are left, too.
        retry_failed: whether images that failed are left, too.
    """
    path = folder / "predictions.jsonl"
    if not path.exists():
        return total
    raised = Manifest.read(folder).is_raised_by(dollars)
    done = 0
    with path.open("rb") as lines:
        for line in lines:
            read = _read(line)
            done += read is not None and not (raised and read.skipped) and not (retry_failed and read.failed)
    return max(0, total - done)


def _with_checksum(body: bytes) -> bytes:
    """A line of a JSON object, for `_checked`."""
    return b"%b%b%d}\n" % (body[:-1], _CHECKSUM, zlib.crc32(body))


def _checked(line: bytes) -> bytes | None:
    """The JSON object in a line, if the line is as it was written."""
    body, _, checksum = line.rpartition(_CHECKSUM)
    body += b"}"
    return body if checksum == b"%d}\n" % zlib.crc32(body) else None


def _read(line: bytes) -> Line | None:
    """The prediction in a line, if the line is as it was written."""
    body = _checked(line)
    try:
        return None if body is None else Line.read(body)
    except (ValueError, RecursionError):
        return None


def _require_no_other_things(folder: Path) -> None:
    """Raises DataError, if a folder holds other things than a run, in which case nothing is put into it, not even a lock.

    One listing is enough: whatever another process makes there meanwhile, it makes after its manifest.
    """
    names = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    if manifests.NAME not in names and names - _BEFORE_THE_MANIFEST:
        raise DataError(f"{str(folder)!r} holds other things than a run.", hint="Give a folder that is new or empty.")

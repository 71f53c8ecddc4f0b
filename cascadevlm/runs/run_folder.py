"""The folder of a run. Its content survives a kill at any moment. A record is the folder of a run over labelled images.

::

    manifest.json         the frozen configuration, the labels, digests of the files that the configuration
                          names, the scorer's fingerprint, the judges' identities, versions, and the start time of the run
    predictions.jsonl     one line per image in the order of the decisions, which is the order of the input unless the input is
                          shuffled: `Prediction.to_dict`, the digest of the image's file, its id and kept columns, and a checksum.
                          In a record also the true label, the split, the digest of the pixels and the question to each judge
    failures.jsonl        images that could not be read, and images whose question got no answer
    ledger.jsonl          the amounts that were reserved for judges, and the amounts that judges billed
    progress.json         position of the decisions at the last flush of the predictions
    learned.safetensors   replaces progress.json if the run learns: what the run had learned at the beginning of its current
                          period, and the position of the decisions there
    verdicts/             the judges' answers, if the configuration keeps no cache
    predictions.parquet   the predictions as a table in the order of the input, written when all predictions exist
    asked.jsonl           only in a run with a certificate or [find]: all answers of the judge so far
    batches/              the state of the provider's batches (`cascadevlm.runs.batches`), until all their answers are read
    corrections.jsonl     what people said about images: see `cascadevlm.runs.corrections`
    summary.json          in a run: the counts, written when all predictions exist; in a record: the metrics
    lock                  locked by the process that writes

    scored.jsonl          only in a run that scores all images before it decides (`cascadevlm.runs.scored_first`): one line per
                          image, with the checksums of its rows in scores.npy and embeddings.npy
    scores.npy            in a record, and beside scored.jsonl: (N, C) float32, log-probabilities; NaN for images that could not
                          be read. In a record of more than 1,000 labels: (N, 50), the highest ones in descending order
    columns.npy           only in a record of more than 1,000 labels: (N, 50) int32, the columns of these labels; -1 for images
                          that could not be read
    embeddings.npy        beside scores.npy, if the scorer gives embeddings: (N, D) float16, rows of length 1; 0 for images that
                          could not be read

Predictions are only appended. When a run continues, these lines are removed and computed again with the stored answers:

- an incomplete last line;
- all lines from the first line with a wrong checksum of its text, its scores or its embedding (a loss of power can cause that);
- all lines from the first failure, if failures are tried again;
- all lines from the first image that was skipped because the budget was used up, if the budget was raised;
- all lines from the first image whose file has another digest now. Only files that changed after the start of the run are read.

In a record, a row of ``scores.npy`` or ``embeddings.npy`` is written when its image is scored, and only if the image has no line
yet. So a record contains the scores from which its predictions were made. Beside ``scored.jsonl``, the rows have the order of the
decisions, and the scores are those of the scorer, without calibration if the run learns.
"""

import json
import os
import threading
import warnings
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from datetime import datetime
from itertools import repeat
from pathlib import Path
from typing import BinaryIO, Literal

import filelock
import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue, TypeAdapter, ValidationError

from cascadevlm.base.errors import DataError, ImageError
from cascadevlm.base.files import write_whole, writing_to
from cascadevlm.base.image_table import About
from cascadevlm.base.types import NANODOLLARS, Prediction, Question, Scores, Verdict
from cascadevlm.cascade.engine import BEGINNING, Checkpoint
from cascadevlm.cascade.observer import Observer
from cascadevlm.decision.distinct import keys_of
from cascadevlm.judges.base import Judge
from cascadevlm.judges.budget import DurableLedger, line_of_ledger, total_in
from cascadevlm.runs import manifest as manifests
from cascadevlm.runs.certificate import read_certificate
from cascadevlm.runs.inputs import Labelled, Named, about, names
from cascadevlm.runs.learned_file import read_learned, write_learned
from cascadevlm.runs.lines import Asked, LabelledLine, Line, checked, failure_of, line_of, line_with, with_checksum, write_table
from cascadevlm.runs.manifest import Manifest
from cascadevlm.runs.scores_file import ScoresFile
from cascadevlm.runs.tally import Tally
from cascadevlm.scorers.base import Prepared
from cascadevlm.scorers.kept import digest_of, note_digest

FAILURES = "failures.jsonl"
PREDICTIONS = "predictions.jsonl"
TABLE = "predictions.parquet"
SUMMARY = "summary.json"
LEDGER = "ledger.jsonl"
LEARNED = "learned.safetensors"
SUM_ERROR = 1e-6
"""Tolerance for sums of floats, in US dollars."""

_CHECKPOINT = TypeAdapter(Checkpoint)
_BEFORE_THE_MANIFEST = {"lock", f"{manifests.NAME}.part"}
"""Files that a process may leave behind if it is killed before it writes its manifest."""


class RunFolder(Observer):
    """The locked folder of a run, from which the run continues. As an observer of the run, it collects the content of its
    lines.

    Attributes:
        ledger: the budget of all sessions of the run.
        tally: counts of the predictions in the folder.
        checkpoint: the position from which decisions continue. It is never after the last prediction in the folder.
        finished: true if the table and the summary are written.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        ledger: DurableLedger,
        predictions: BinaryIO,
        failures: BinaryIO,
        inputs: Iterable[Named] | Labelled,
        scores: ScoresFile | None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.ledger = ledger
        self.tally = Tally(spent_dollars=ledger.spent_dollars)
        self.checkpoint = BEGINNING
        self._learned_at = 0
        self._keys = array("Q")  # of the images with predictions, in 8 bytes each
        self._predictions = predictions
        self._failures = failures
        self._labelled = inputs if isinstance(inputs, Labelled) else None
        self._scores = scores
        self.finished = _is_written(folder, manifest.labelled)
        self._raised_from: float | None = None
        if self.finished and not manifest.labelled:
            self.tally.certificate = read_certificate(folder / SUMMARY)
        self._known: dict[int, dict[str, JsonValue]] = {}
        self._asked: defaultdict[int, dict[int, Asked]] = defaultdict(dict)
        self._flushing = threading.RLock()

    @classmethod
    @contextmanager
    def opened(
        cls,
        folder: Path,
        manifest: Manifest,
        inputs: Iterable[Named] | Labelled,
        *,
        dollars: float | None = None,
        retry_failed: bool = False,
    ) -> "Iterator[RunFolder]":
        """Create the folder, or continue the run in it.

        Args:
            folder: a new folder, an empty folder, or the folder of an earlier session.
            manifest: the manifest of this run.
            inputs: the images of this run. If they have true labels, the folder is a record.
            dollars: the spending limit of all sessions together, in US dollars. Default: no limit.
            retry_failed: true to remove all predictions from the first failed image. An image failed if it could not be read,
                or if its question failed.

        Raises:
            DataError: if the folder has other content than a run, belongs to another run, has predictions of other images or
                labels, or if another process writes to it.
            RunError: if the folder cannot be written.

        Warns:
            RuntimeWarning: if a line of the predictions that is not the last one is damaged.
        """
        with writing_to(folder), ExitStack() as stack:
            _require_no_other_things(folder)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(filelock.FileLock(folder / "lock", timeout=0))
            except filelock.Timeout as exc:
                hint = "Wait until it ends, or use another folder."
                raise DataError(f"Another process writes to {str(folder)!r}.", hint=hint) from exc
            agreed = manifest.agreed(folder)
            scores = None
            if isinstance(inputs, Labelled):
                scores = stack.enter_context(closing(ScoresFile(folder, manifest.labels)))
            opened = cls(
                folder,
                agreed,
                ledger=stack.enter_context(closing(DurableLedger(dollars, folder / LEDGER))),
                predictions=stack.enter_context((folder / PREDICTIONS).open("ab")),
                failures=stack.enter_context((folder / FAILURES).open("wb")),
                inputs=inputs,
                scores=scores,
            )
            if not opened.finished:
                opened._unfinish()
            opened._keep_what_is_sound(inputs, retry_failed, raised=agreed.is_raised_by(dollars))
            opened.manifest = agreed.with_cap(dollars, folder)
            files = stack.pop_all()
        try:
            yield opened
        finally:
            with writing_to(folder), opened._flushing, files:
                opened.flush(opened.checkpoint)

    def _keep_what_is_sound(self, inputs: Iterable[Named] | Labelled, retry_failed: bool, *, raised: bool) -> None:
        """Count the predictions in the folder. Remove predictions that are damaged or that must be made again.

        Raises:
            DataError: if the predictions are of other images or labels, or cost more than the ledger contains.
        """
        path = self.folder / PREDICTIONS
        images = zip(names(inputs), self._labelled.truths if self._labelled else repeat(None), about(inputs), strict=False)
        sound = 0
        dollars = 0.0
        with path.open("rb") as lines:
            for line in lines:
                if (read := self._read(line)) is None:
                    if line.endswith(b"\n"):
                        count = self.tally.images
                        damage = f"The predictions were damaged after {count} images; all later predictions are made again."
                        warnings.warn(damage, RuntimeWarning, stacklevel=2)
                    break
                self._require_same(read, *next(images, ("", None, {})))
                if self._is_outdated(read, raised=raised) or (retry_failed and read.failed):
                    break
                sound += len(line)
                dollars += read.cost.dollars
                self._keys.extend(keys_of([read.digest or read.content]).tolist())
                self._count(read.path, read.id, read)
        if dollars > self.ledger.spent_dollars + SUM_ERROR:
            spent = f"${self.ledger.spent_dollars:.6f} instead of ${dollars:.6f}"
            hint = f"Restore the file, or write this line into it: {line_of_ledger(spent=round(dollars * NANODOLLARS)).strip()}"
            raise DataError(f"{str(self.ledger.path)!r} has a lower sum than the cost of the predictions: {spent}.", hint=hint)
        if self._scores is not None and self._labelled is not None:
            self._scores.resize(len(self._labelled))
        if sound < path.stat().st_size:
            self._unfinish()
            self._predictions.truncate(sound)
        self.checkpoint = self._progress()

    def _read(self, line: bytes) -> Line | None:
        """The next prediction; None if its line or its scores are damaged."""
        body = checked(line)
        try:
            if body is None or self._scores is None:
                return None if body is None else Line.read(body)
            labelled = LabelledLine.read(body)
        except (ValueError, RecursionError):
            return None
        return labelled if self._scores.holds(self.tally.images, labelled.scores, labelled.embedding) else None

    def _require_same(self, line: Line, name: str, truth: str | None, told_of: About) -> None:
        """Raise DataError if the next image has another name, true label or id than the line."""
        number, folder = self.tally.images, str(self.folder)
        if name != line.path:
            raise DataError(
                f"Image {number} of {folder!r} was {line.path!r} and is now {name or 'gone'!r}.",
                hint="Images may only be added after the last image. For other images, give another folder.",
            )
        for what, before, now in (("true label", line.truth, truth), ("id", line.id, told_of.get("id"))):
            if before != now:
                told = f"The {what} of image {number} of {folder!r} was {before!r} and is now {now!r}."
                raise DataError(told, hint="Give another folder.")

    def _is_outdated(self, line: Line, *, raised: bool) -> bool:
        """True if the image of a line was changed, or if it was skipped and the cap was raised."""
        if line.digest and has_changed(line.path, line.digest, self.manifest.began):
            told = f"The image {line.path!r} was changed after its prediction; this and all later predictions are made again."
            warnings.warn(told, RuntimeWarning, stacklevel=2)
            return True
        if raised and line.skipped:
            self._raised_from = self.manifest.dollars
            return True
        return False

    def _progress(self) -> Checkpoint:
        """The stored checkpoint. A new run's checkpoint is used if it is damaged, or if predictions before it are missing."""
        path = self.folder / LEARNED
        if not path.exists():
            path = self.folder / "progress.json"
        try:
            noted = read_learned(path) if path.name == LEARNED else _CHECKPOINT.validate_json(checked(path.read_bytes()) or b"")
        except (FileNotFoundError, ValidationError):
            return BEGINNING
        if noted.images <= self.tally.images:
            self._learned_at = noted.images
            if noted.learned is None:
                return noted
            keys = np.array(self._keys[: noted.images], dtype=np.uint64)
            return replace(noted, learned=replace(noted.learned, keys=keys))
        path.unlink()  # other predictions may soon be written before it
        return BEGINNING

    def outlook(self, total: int | None) -> str:
        """A sentence about the work that is left; "" for a new run.

        Args:
            total: number of images; None if it is unknown.
        """
        if self._raised_from is not None:
            what = "judges are asked about the images that were skipped because the budget was used up"
            return f"The budget was raised from ${self._raised_from:.2f}: {what}; stored answers are used again."
        if self.tally.images == total:
            return f"Nothing is left to do: all {total} images have a prediction."
        return f"{self.tally.images} images have a prediction; the run continues after them." if self.tally.images else ""

    def ready(self, stage: int, judge: Judge) -> None:
        """Store the identity of a judge.

        Raises:
            DataError: if the run was started with another judge.
        """
        with writing_to(self.folder):
            self.manifest = self.manifest.with_judge(stage, judge.identity(), self.folder)

    def prepared(self, image: Prepared) -> None:
        """Compute the digests in the reader threads."""
        note_digest(image)
        if self._scores is not None:
            image.image_digest  # noqa: B018  # is kept
            if image.features is not None:
                image.forget_large()

    def fingerprinted(self, fingerprint: str) -> None:
        """Store the fingerprint of the scorer.

        Raises:
            DataError: if the run was started with another scorer.
        """
        with writing_to(self.folder):
            self.manifest = self.manifest.with_fingerprint(fingerprint, self.folder)

    def scored(self, numbers: Sequence[int], images: Sequence[Prepared], scores: Scores) -> None:
        """Store the fingerprint of the scorer and, for images without a line, the digests and the scores.

        Raises:
            DataError: if the run was started with another scorer.
        """
        self.fingerprinted(scores.fingerprint)
        with writing_to(self.folder):
            embeddings = repeat(None) if scores.embeddings is None else scores.embeddings
            for number, image, log_probs, embedding in zip(numbers, images, scores.log_probs, embeddings, strict=False):
                if number < self.tally.images:
                    continue
                self._known[number] = {digest_key(isinstance(image.source, str | Path)): image.digest}
                if self._scores is not None:
                    self._known[number] |= {"pixels": image.image_digest, **self._scores.write(number, log_probs, embedding)}

    def judged(self, number: int, stage: int, question: Question, verdict: Verdict) -> None:
        """Store the question about a labelled image. If the judge was asked about further candidates, the last valid answer
        counts, as in the prediction.
        """
        if self._labelled is not None and number >= self.tally.images and (verdict.valid or stage not in self._asked[number]):
            self._asked[number][stage] = Asked.of(question)

    def append(self, path: str, also: Mapping[str, JsonValue], prediction: Prediction) -> None:
        """Write the next prediction. It is safe after the next flush.

        Args:
            path: name of the image.
            also: further fields of the line: what is told of the image (`About`), and its place in a certificate.
            prediction: the prediction.
        """
        number = self.tally.images
        known = self._known.pop(number, {}) | self._of_record(number, prediction)
        self._write(path, also.get("id"), prediction, line_of(prediction, {"path": path, **also, **known}))

    def append_again(self, path: str, content: Mapping[str, JsonValue]) -> None:
        """Write a prediction that was made before as the next prediction. ``content`` contains the fields of its line."""
        line = line_with({**content, "path": path})
        self._write(path, content.get("id"), Line.read(line), line)

    def _write(self, path: str, own_id: JsonValue, prediction: Prediction | Line, line: bytes) -> None:
        with writing_to(self.folder):
            if self.finished:
                self._unfinish()
            self._predictions.write(line)
            self._count(path, own_id, prediction)
        self.tally.spent_dollars = self.ledger.spent_dollars

    def begin_again(self) -> None:
        """Remove all predictions."""
        with writing_to(self.folder):
            self._unfinish()
            for file in (self._predictions, self._failures):
                file.seek(0)
                file.truncate()
        self.tally = Tally(spent_dollars=self.ledger.spent_dollars)

    def _of_record(self, number: int, prediction: Prediction) -> dict[str, JsonValue]:
        """The fields of a labelled image's line, except its digests and checksums."""
        if self._labelled is None or self._scores is None:
            return {}
        asked = self._asked.pop(number, {})
        questions = [asked.get(verdict.stage) for verdict in prediction.verdicts]
        unreadable = {} if prediction.candidates else self._scores.write_unreadable(number)
        return {
            "truth": self._labelled.truths[number],
            "split": self._labelled.splits[number],
            "questions": [None if each is None else dict(vars(each)) for each in questions],
            **unreadable,
        }

    def _unfinish(self) -> None:
        """Delete the summary with its certificate, and the table, because they no longer match the predictions."""
        for name in (SUMMARY, TABLE):
            (self.folder / name).unlink(missing_ok=True)
        self.finished, self.tally.certificate = False, None

    def _count(self, path: str, own_id: JsonValue, prediction: Prediction | Line) -> None:
        if failure := failure_of(prediction):
            named = {"path": path} if own_id is None else {"path": path, "id": own_id}
            row = {"image": self.tally.images, **named, "label": prediction.label, "error": failure}
            self._failures.write(json.dumps(row).encode() + b"\n")
        self.tally.add(prediction)

    def flush(self, checkpoint: Checkpoint) -> None:
        """Flush all files to the disk, and store the position of the decisions. Safe across threads."""
        with self._flushing, writing_to(self.folder):
            if self._predictions.closed:  # after an interrupt, threads may still be running
                return
            for file in (self._predictions, self._failures):
                file.flush()
            self.ledger.sync()  # first, so that no prediction is stored without its cost
            if self._scores is not None:
                self._scores.sync()
            os.fsync(self._predictions.fileno())
            self.checkpoint = checkpoint
            if checkpoint.learned is None:
                write_whole(self.folder / "progress.json", with_checksum(_CHECKPOINT.dump_json(checkpoint)).decode())
            elif checkpoint.images > self._learned_at:
                write_learned(self.folder / LEARNED, checkpoint, checkpoint.learned)
                self._learned_at = checkpoint.images

    def finish(self, order: NDArray[np.int64] | None = None) -> None:
        """Write the table and, if the images have no labels, the summary. Files that already contain all predictions are kept.

        Args:
            order: `(N,)` places in the table of the N predictions. Default: the order of the predictions.
        """
        self.flush(self.checkpoint)
        if self.finished:
            return
        with writing_to(self.folder):
            places = None if order is None else np.argsort(order)
            write_table(self.folder / PREDICTIONS, self.folder / TABLE, places, self.manifest.columns)
            if not self.manifest.labelled:
                write_whole(self.folder / SUMMARY, json.dumps(self.tally.to_dict(), indent=2) + "\n")
        self.finished = True


def _is_written(folder: Path, labelled: bool) -> bool:
    """Whether the table and, for images without labels, the summary can be read."""
    import pyarrow.parquet

    try:
        pyarrow.parquet.read_metadata(folder / TABLE)
        return labelled or isinstance(json.loads((folder / SUMMARY).read_bytes()), dict)
    except (OSError, ValueError):  # errors of Arrow and JSON are ValueErrors
        return False


def digest_key(is_file: bool) -> Literal["digest", "content"]:
    """The key of an image's digest in its line."""
    return "digest" if is_file else "content"


def has_changed(path: str, digest: str, began: datetime) -> bool:
    """True if a file has changed since a run began and has another digest now. A deleted file counts as unchanged."""
    try:
        found = Path(path).stat()
        changed_at = max(found.st_mtime, found.st_ctime)  # st_ctime cannot be set back
        return changed_at > began.timestamp() and digest_of(path) != digest
    except (OSError, ValueError, ImageError):
        return False


def images_left(folder: Path, total: int, *, dollars: float | None, retry_failed: bool) -> int:
    """Number of images that a run may ask judges about: all images without a usable prediction in its folder.

    Args:
        folder: folder of the run. It may not exist yet.
        total: number of images of the run.
        dollars: the spending limit of all sessions of the run, in US dollars. If it is higher than in the session before,
            images that were skipped because of the limit are counted, too.
        retry_failed: true to count failed images, too.
    """
    path = folder / PREDICTIONS
    if not path.exists():
        return total
    raised = Manifest.read(folder).is_raised_by(dollars)
    done = 0
    with path.open("rb") as lines:
        for body in map(checked, lines):
            read = None if body is None else Line.read(body)
            done += read is not None and not (raised and read.skipped) and not (retry_failed and read.failed)
    return max(0, total - done)


def spent_in(folder: Path) -> float:
    """Dollars that all sessions of the run in a folder spent. Amounts that are still reserved count as spent.

    Raises:
        DataError: if the ledger is damaged.
    """
    return total_in(folder / LEDGER) / NANODOLLARS


def _require_no_other_things(folder: Path) -> None:
    """Raise DataError if a folder contains other things than a run. Nothing is then written to the folder, not even a lock.

    One listing is enough, because another process of cascadevlm writes its manifest first.
    """
    names = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    if manifests.NAME not in names and names - _BEFORE_THE_MANIFEST:
        raise DataError(f"{str(folder)!r} contains other things than a run.", hint="Give a new or empty folder.")

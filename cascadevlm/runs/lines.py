"""The lines of ``predictions.jsonl``: one JSON object per image, which ends with its own checksum. They are written here, and
read again to be counted, exported, shown, and made a record."""

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, InstanceOf, JsonValue, ValidationError
from pydantic_core import PydanticSerializationError, to_json

from cascadevlm.base.errors import DataError
from cascadevlm.base.files import valid_text
from cascadevlm.base.types import DecidedBy, Outcome, Prediction, Question, Usage, Verdict

if TYPE_CHECKING:
    import pyarrow

ROWS_AT_ONCE = 10_000
"""Rows of the table that are in memory at once."""

AnyLine = TypeVar("AnyLine", bound="Line")

_CHECKSUM = b',"crc32":'


class LineVerdict(BaseModel):
    """What every reader needs of a verdict."""

    outcome: Outcome
    judge: InstanceOf[str]
    label: InstanceOf[str] | None
    text: InstanceOf[str]
    rationale: InstanceOf[str]
    error: InstanceOf[str]


class WholeVerdict(LineVerdict):
    """A verdict, as `Verdict.to_dict` gives it."""

    probabilities: dict[InstanceOf[str], float] | None
    stage: int
    usage: Usage

    def to_verdict(self) -> Verdict:
        """The verdict itself."""
        return Verdict(**dict(self))


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a judge was asked about a labelled image.

    Attributes:
        candidates: names of the candidates in the order shown.
        prompt: name of the prompt.
        offer_none: whether "none of these" was an option.
        exemplars: digests of the reference images in the order shown.
    """

    candidates: list[InstanceOf[str]]
    prompt: InstanceOf[str]
    offer_none: bool
    exemplars: list[str]

    @classmethod
    def of(cls, question: Question) -> Self:
        """What a question asks."""
        return cls(
            candidates=[label.name for label in question.labels],
            prompt=question.prompt.name,
            offer_none=question.offer_none,
            exemplars=[exemplar.digest for exemplar in question.exemplars],
        )


class LineCandidate(BaseModel):
    """A candidate."""

    label: InstanceOf[str]
    probability: float
    rank: int


class LineCost(BaseModel):
    """What all verdicts took together."""

    requests: int
    dollars: float
    saved_dollars: float


class Line(BaseModel):
    """One line: what `Prediction.to_dict` gives, and what is known of the image. Texts need not be valid Unicode.

    Attributes:
        digest: the sha256 of the image's file; "" if the image is no file or could not be scored.
        truth: name of the true label; None if the images have no labels.
    """

    path: InstanceOf[str]
    label: InstanceOf[str] | None
    probability: float | None
    decided_by: DecidedBy | None
    candidates: list[LineCandidate]
    reasons: list[str]
    verdict: LineVerdict | None
    earlier_verdicts: tuple[LineVerdict, ...]
    cost: LineCost
    error: InstanceOf[str]
    digest: str = ""
    truth: InstanceOf[str] | None = None

    @classmethod
    def read(cls, text: str | bytes) -> Self:
        """The prediction in a line.

        Raises:
            ValueError: if the line is no prediction.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError:  # unlike pydantic's, Python's reader takes texts that are no valid Unicode
            return cls.model_validate(json.loads(text))

    @property
    def verdicts(self) -> Sequence[LineVerdict]:
        return (*self.earlier_verdicts, self.verdict) if self.verdict else self.earlier_verdicts

    @property
    def outcome(self) -> Outcome | None:
        """The outcome of the last verdict."""
        return self.verdict.outcome if self.verdict else None

    @property
    def dollars(self) -> float:
        return self.cost.dollars

    @property
    def escalated(self) -> bool:
        return self.verdict is not None

    @property
    def abstained(self) -> bool:
        """Whether the image could be read and has no label."""
        return self.label is None and bool(self.candidates)

    @property
    def asked(self) -> bool:
        return any(verdict.outcome != "skipped" for verdict in self.verdicts)

    @property
    def answered(self) -> bool:
        return any(verdict.outcome in ("answered", "none") for verdict in self.verdicts)

    @property
    def skipped(self) -> bool:
        """Whether a judge was not asked about the image because the budget was spent."""
        return any(verdict.outcome == "skipped" for verdict in self.verdicts)

    @property
    def failed(self) -> bool:
        """Whether the image could not be read, or a question about it failed."""
        return not self.candidates or any(verdict.outcome == "failed" for verdict in self.verdicts)


class JudgedLine(Line):
    """A line with all that its judges said."""

    verdict: WholeVerdict | None
    earlier_verdicts: tuple[WholeVerdict, ...]

    @property
    def verdicts(self) -> Sequence[WholeVerdict]:
        return (*self.earlier_verdicts, self.verdict) if self.verdict else self.earlier_verdicts


class LabelledLine(JudgedLine):
    """The line of a labelled image.

    Attributes:
        split: the part of the data that the image belongs to; "" if that is unknown.
        pixels: digest of the pixels; "" if the image could not be read.
        scores: checksum of the image's rows in ``scores.npy`` and ``columns.npy``.
        embedding: checksum of the image's row in ``embeddings.npy``; None if the scorer gave no embedding.
        questions: for every verdict, what was asked; None if the image could not be read again for the question.
    """

    split: InstanceOf[str]
    pixels: str = ""
    scores: int
    embedding: int | None = None
    questions: tuple[Asked | None, ...]


def line_of(prediction: Prediction, known: Mapping[str, JsonValue]) -> bytes:
    """The line of a prediction; ``known`` holds the other fields of `Line`."""
    content = {**prediction.to_dict(), **known}
    try:
        return with_checksum(to_json(content))
    except PydanticSerializationError:  # texts that are no valid Unicode: see `Line.read`
        return with_checksum(json.dumps(content).encode())


def with_checksum(body: bytes) -> bytes:
    """A line with a JSON object, for `checked`."""
    return b"%b%b%d}\n" % (body[:-1], _CHECKSUM, zlib.crc32(body))


def checked(line: bytes) -> bytes | None:
    """The JSON object in a line; None if the line is not as it was written."""
    body, _, checksum = line.rpartition(_CHECKSUM)
    body += b"}"
    return body if checksum == b"%d}\n" % zlib.crc32(body) else None


def read_lines(
    file: Path, kind: type[AnyLine], end: int | None = None, order: NDArray[np.int64] | None = None
) -> Iterator[tuple[int, AnyLine]]:
    """The predictions in a file, one JSON object per line, with the numbers of their lines, from 1.

    Args:
        file: ``predictions.jsonl``, or what ``cascadevlm classify --json`` printed, which has no checksums.
        kind: what the lines are read as.
        end: number of bytes to read. Default: all.
        order: `(N,)` numbers of the N lines, from 0, in the order in which they are wanted. Default: their own order.

    Raises:
        DataError: if a line is damaged or is no prediction.
    """
    line, number, position = b"", 0, 0
    try:
        with file.open("rb") as opened:
            for number, line in enumerate(opened, start=1) if order is None else _in_order(opened, order):
                position += len(line)
                if end is not None and position > end:
                    return
                body = checked(line) if _CHECKSUM in line else line
                if body is None:
                    hint = "The command that made the run works out again what follows."
                    raise DataError(f"{str(file)!r}, line {number}, is damaged: its checksum is wrong.", hint=hint)
                yield number, kind.read(body)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the line"
        raise DataError(f"{str(file)!r}, line {number}, is no prediction: {where}: {first['msg']}.") from exc
    except json.JSONDecodeError as exc:
        if not line.endswith(b"\n"):
            raise DataError(f"{str(file)!r} ends in the middle of line {number}.", hint="Make the file again.") from exc
        raise DataError(f"{str(file)!r}, line {number}, is no JSON: {exc.msg}.") from exc
    except (OSError, ValueError, RecursionError) as exc:
        raise DataError(f"{str(file)!r} cannot be read: {exc}.") from exc


def _in_order(lines: BinaryIO, order: NDArray[np.int64]) -> Iterator[tuple[int, bytes]]:
    """The lines with their numbers, from 1, in another order."""
    begins = np.cumsum([0, *map(len, lines)], dtype=np.int64)
    for number in order.tolist():
        lines.seek(begins[number])
        yield number + 1, lines.readline()


def failure_of(prediction: Prediction | Line) -> str:
    """Why the image could not be read or got no answer from a judge; "" if neither happened."""
    if not prediction.candidates:
        return prediction.error
    return next((verdict.error for verdict in prediction.verdicts if verdict.outcome in ("failed", "refused", "unparsed")), "")


def write_table(lines: Path, table: Path, order: NDArray[np.int64] | None = None) -> None:
    """Write the predictions as a Parquet table, as a whole or not at all; ``order`` as for `read_lines`."""
    import pyarrow
    import pyarrow.parquet

    schema, unfinished = table_schema(), table.with_name(f"{table.name}.part")
    with pyarrow.parquet.ParquetWriter(unfinished, schema) as writer:
        rows = (_row(line) for _, line in read_lines(lines, Line, order=order))
        while some := list(islice(rows, ROWS_AT_ONCE)):
            writer.write_table(pyarrow.Table.from_pylist(some, schema=schema))
    unfinished.replace(table)


def table_schema() -> "pyarrow.Schema":
    """The columns of ``predictions.parquet``."""
    from pyarrow import bool_, float64, int64, list_, schema, string, struct

    texts = dict.fromkeys(("path", "truth", "label", "decided_by", "outcome", "judge", "rationale", "error"), string())
    candidate = struct({"label": string(), "probability": float64(), "rank": int64()}.items())
    return schema(
        texts
        | {"probability": float64(), "escalated": bool_(), "dollars": float64()}
        | {"candidates": list_(candidate), "reasons": list_(string())}
    )


def _row(line: Line) -> dict[str, object]:
    """A row of the table, whose texts are valid Unicode."""
    last = line.verdict
    texts = {
        "path": line.path,
        "truth": line.truth,
        "label": line.label,
        "decided_by": line.decided_by,
        "outcome": line.outcome,
        "judge": last.judge if last else None,
        "rationale": last.rationale if last else None,
        "error": failure_of(line) or line.error,
    }
    return {
        **{name: None if text is None else valid_text(text) for name, text in texts.items()},
        "probability": line.probability,
        "escalated": line.escalated,
        "dollars": line.dollars,
        "candidates": [
            {"label": valid_text(each.label), "probability": each.probability, "rank": each.rank} for each in line.candidates
        ],
        "reasons": line.reasons,
    }

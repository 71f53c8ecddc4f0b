"""The lines of ``predictions.jsonl``: one JSON object per image, which ends with its own checksum. This module writes the
lines, and reads them for counts, exports, reports and records.
"""

import json
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, InstanceOf, JsonValue, ValidationError
from pydantic_core import PydanticSerializationError, to_json

from cascadevlm.base.errors import DataError
from cascadevlm.base.files import valid_text
from cascadevlm.base.tables import USUAL, ColumnNames, own_names
from cascadevlm.base.types import AUDITED, DecidedBy, Outcome, Prediction, Question, Usage, Verdict

if TYPE_CHECKING:
    import pyarrow

ROWS_AT_ONCE = 10_000
"""Number of rows of the table that are in memory at the same time."""

AnyLine = TypeVar("AnyLine", bound="Line")

_CHECKSUM = b',"crc32":'

REPEAT = "Repeat the command that wrote this file."


class LineVerdict(BaseModel):
    """The fields of a verdict that every reader needs."""

    outcome: Outcome
    judge: InstanceOf[str]
    label: InstanceOf[str] | None
    text: InstanceOf[str]
    rationale: InstanceOf[str]
    error: InstanceOf[str]


class WholeVerdict(LineVerdict):
    """All fields of a verdict, in the form of `Verdict.to_dict`."""

    probabilities: dict[InstanceOf[str], float] | None
    stage: int
    usage: Usage

    def to_verdict(self) -> Verdict:
        """The verdict."""
        return Verdict(**dict(self))


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The question that a judge was asked about a labelled image.

    Attributes:
        candidates: names of the candidates, in the order in which the judge saw them.
        prompt: name of the prompt.
        offer_none: true if "none of these" was an option.
        exemplars: digests of the reference images, in the order in which the judge saw them.
    """

    candidates: list[InstanceOf[str]]
    prompt: InstanceOf[str]
    offer_none: bool
    exemplars: list[str]

    @classmethod
    def of(cls, question: Question) -> Self:
        """The content of a question."""
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
    """The sum of the costs of all verdicts."""

    requests: int
    dollars: float
    saved_dollars: float


class Line(BaseModel):
    """One line: the fields of `Prediction.to_dict`, and facts about the image. Texts may contain invalid Unicode.

    Attributes:
        decided_by: as in `Prediction`. "person" if the label is a correction, which only exports contain.
        digest: the sha256 of the image's file; "" if the image is not a file or could not be scored.
        content: the digest of an image that is not a file (`Prepared.digest`); "" if it could not be scored.
        truth: name of the true label; None if the images have no labels.
        id: the id of the image; None if the images have no ids.
        kept: the values of the kept columns of the image's row, by column.
    """

    path: InstanceOf[str]
    label: InstanceOf[str] | None
    probability: float | None
    decided_by: DecidedBy | Literal["person"] | None
    candidates: list[LineCandidate]
    reasons: list[str]
    verdict: LineVerdict | None
    earlier_verdicts: tuple[LineVerdict, ...]
    cost: LineCost
    error: InstanceOf[str]
    digest: str = ""
    content: str = ""
    truth: InstanceOf[str] | None = None
    id: InstanceOf[str] | None = None
    kept: dict[InstanceOf[str], InstanceOf[str] | JsonValue] = {}

    @classmethod
    def read(cls, text: str | bytes) -> Self:
        """The prediction in a line.

        Raises:
            ValueError: if the line is not a prediction.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError:  # Python's JSON reader accepts invalid Unicode; pydantic's reader does not
            return cls.model_validate(json.loads(text))

    @property
    def key(self) -> str:
        """What names the image in the run: its id or, if the images have no ids, its path. Several images can have one path."""
        return self.path if self.id is None else self.id

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
        """True if the image could be read and has no label."""
        return self.label is None and bool(self.candidates)

    @property
    def audited(self) -> bool:
        return AUDITED in self.reasons

    @property
    def differing(self) -> bool:
        return self.audited and self.answered and self.verdict is not None and self.verdict.label != self.ranked[0].label

    @property
    def ranked(self) -> list[LineCandidate]:
        """The candidates, the scorer's best candidate first."""
        return sorted(self.candidates, key=lambda candidate: candidate.rank)

    @property
    def confidence(self) -> float:
        """The probability of the label. If it is unknown, this is the scorer's probability of the label or, without a label, of
        the best candidate. 0 if the image could not be read.
        """
        if self.probability is not None:
            return self.probability
        scorers = [each.probability for each in self.ranked if self.label in (None, each.label)]
        return scorers[0] if scorers else 0.0

    @property
    def asked(self) -> bool:
        return any(verdict.outcome != "skipped" for verdict in self.verdicts)

    @property
    def answered(self) -> bool:
        return any(verdict.outcome in ("answered", "none") for verdict in self.verdicts)

    @property
    def skipped(self) -> bool:
        """True if a judge was not asked about the image because the budget was used up."""
        return any(verdict.outcome == "skipped" for verdict in self.verdicts)

    @property
    def failed(self) -> bool:
        """True if the image could not be read, or if a question about it failed."""
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
        split: the split of the data that the image belongs to; "" if it is unknown.
        pixels: digest of the pixels; "" if the image could not be read.
        scores: checksum of the image's rows in ``scores.npy`` and ``columns.npy``.
        embedding: checksum of the image's row in ``embeddings.npy``; None if the scorer gave no embedding.
        questions: the question of every verdict; None if the image could not be read a second time, when the question was
            asked.
    """

    split: InstanceOf[str]
    pixels: str = ""
    scores: int
    embedding: int | None = None
    questions: tuple[Asked | None, ...]


def line_of(prediction: Prediction, known: Mapping[str, JsonValue]) -> bytes:
    """The line of a prediction. ``known`` contains the other fields of `Line`."""
    return line_with({**prediction.to_dict(), **known})


def line_with(content: Mapping[str, JsonValue]) -> bytes:
    """The line of the fields of a prediction."""
    try:
        return with_checksum(to_json(content))
    except PydanticSerializationError:  # texts may contain invalid Unicode: see `Line.read`
        return with_checksum(json.dumps(content).encode())


def with_checksum(body: bytes) -> bytes:
    """The line of a JSON object with its checksum, which `checked` compares."""
    return b"%b%b%d}\n" % (body[:-1], _CHECKSUM, zlib.crc32(body))


def checked(line: bytes) -> bytes | None:
    """The JSON object in a line; None if the checksum is wrong."""
    body, _, checksum = line.rpartition(_CHECKSUM)
    body += b"}"
    return body if checksum == b"%d}\n" % zlib.crc32(body) else None


def read_lines(
    file: Path, kind: type[AnyLine], end: int | None = None, order: NDArray[np.int64] | None = None
) -> Iterator[tuple[int, AnyLine]]:
    """The predictions in a file with one JSON object per line, each with the number of its line, from 1.

    Args:
        file: ``predictions.jsonl``, or the output of ``cascadevlm classify --json``, which has no checksums.
        kind: the class of the lines.
        end: number of bytes to read. Default: all.
        order: `(N,)` numbers of the N lines, from 0, in the order in which they are wanted. Default: their own order.

    Raises:
        DataError: if a line is damaged or is not a prediction.
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
                    hint = "Repeat the command that made the run: it makes this prediction and all later predictions again."
                    raise DataError(f"{str(file)!r}, line {number}, is damaged: its checksum is wrong.", hint=hint)
                yield number, kind.read(body)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the line"
        raise DataError(f"{str(file)!r}, line {number}, is not a prediction: {where}: {first['msg']}.", hint=REPEAT) from exc
    except json.JSONDecodeError as exc:
        if not line.endswith(b"\n"):
            raise DataError(f"{str(file)!r} ends in the middle of line {number}.", hint=REPEAT) from exc
        raise DataError(f"{str(file)!r}, line {number}, is not JSON: {exc.msg}.", hint=REPEAT) from exc
    except (OSError, ValueError, RecursionError) as exc:
        raise DataError(f"{str(file)!r} cannot be read: {exc}.", hint="Check the path and the content of the file.") from exc


def _in_order(lines: BinaryIO, order: NDArray[np.int64]) -> Iterator[tuple[int, bytes]]:
    """The lines with their numbers, from 1, in another order."""
    begins = np.cumsum([0, *map(len, lines)], dtype=np.int64)
    for number in order.tolist():
        lines.seek(begins[number])
        yield number + 1, lines.readline()


def failure_of(prediction: Prediction | Line) -> str:
    """The reason why the image could not be read or a judge gave no answer; "" if neither is the case."""
    if not prediction.candidates:
        return prediction.error
    return next((verdict.error for verdict in prediction.verdicts if verdict.outcome in ("failed", "refused", "unparsed")), "")


def write_table(lines: Path, table: Path, order: NDArray[np.int64] | None = None, columns: ColumnNames = USUAL) -> None:
    """Write the predictions as a Parquet table. The table is written completely or not at all.

    Args:
        lines: the file of the predictions.
        table: the table.
        order: as for `read_lines`.
        columns: the columns of the images' table whose values the lines contain.
    """
    import pyarrow
    import pyarrow.parquet

    kept = KeptTypes(columns.keep)
    if columns.keep:
        for _, line in read_lines(lines, Line):
            kept.add(line)
    schema, unfinished = table_schema(columns, kept), table.with_name(f"{table.name}.part")
    with pyarrow.parquet.ParquetWriter(unfinished, schema) as writer:
        rows = (_row(line) | kept.cells(line, _COLUMNS) for _, line in read_lines(lines, Line, order=order))
        while some := list(islice(rows, ROWS_AT_ONCE)):
            writer.write_table(pyarrow.Table.from_pylist(some, schema=schema))
    unfinished.replace(table)


_TEXTS = ("path", "truth", "label", "decided_by", "outcome", "judge", "rationale", "error")
_COLUMNS = frozenset((*_TEXTS, "id", "probability", "escalated", "dollars", "candidates", "reasons"))


def table_schema(columns: ColumnNames, kept: "KeptTypes") -> "pyarrow.Schema":
    """The columns of ``predictions.parquet``."""
    from pyarrow import bool_, float64, int64, list_, schema, string, struct

    candidate = struct({"label": string(), "probability": float64(), "rank": int64()}.items())
    return schema(
        dict.fromkeys((*(["id"] if columns.id is not None else []), *_TEXTS), string())
        | {"probability": float64(), "escalated": bool_(), "dollars": float64()}
        | {"candidates": list_(candidate), "reasons": list_(string())}
        | kept.schema(_COLUMNS)
    )


class KeptTypes:
    """The types of the values of kept columns: per column, one type that holds all values of the column."""

    def __init__(self, columns: Iterable[str] = ()) -> None:
        self._seen: dict[str, set[type]] = {column: set() for column in columns}

    def add(self, line: Line) -> None:
        """Take the values of a line into account."""
        for column, value in line.kept.items():
            too_large = isinstance(value, int) and abs(value) >= 1 << 63
            self._seen.setdefault(column, set()).add(str if too_large else type(value))

    def type_of(self, column: str) -> Literal["bool", "int64", "float64", "string"]:
        """The type of a column, by the name that Arrow and ``datasets`` use. Values of different types become text."""
        seen = self._seen[column] - {type(None)}
        if seen == {bool}:
            return "bool"
        if seen == {int}:
            return "int64"
        return "float64" if seen and seen <= {int, float} else "string"

    def names(self, taken: Collection[str]) -> dict[str, str]:
        """The name of each kept column in a table with the columns ``taken``: see `own_names`."""
        return own_names(self._seen, taken)

    def schema(self, taken: Collection[str]) -> "dict[str, pyarrow.DataType]":
        """The Arrow type of each kept column, by its name in a table with the columns ``taken``."""
        import pyarrow

        return {name: pyarrow.type_for_alias(self.type_of(column)) for column, name in self.names(taken).items()}

    def cells(self, line: Line, taken: Collection[str]) -> dict[str, JsonValue]:
        """The values of a line's kept columns, by their names in a table with the columns ``taken``."""
        cells: dict[str, JsonValue] = {}
        for column, name in self.names(taken).items():
            value = line.kept.get(column)
            kind = self.type_of(column)
            if kind == "float64" and isinstance(value, int):
                value = float(value)  # Arrow refuses integers above 2^53 in a column of numbers
            cells[name] = valid_text(str(value)) if value is not None and kind == "string" else value
        return cells


def _row(line: Line) -> dict[str, object]:
    """A row of the table. Its texts are valid Unicode."""
    last = line.verdict
    texts = {
        "path": line.path,
        "id": line.id,
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

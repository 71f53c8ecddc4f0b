"""The lines of ``predictions.jsonl``, read again: to be counted, told as failures, put into the table and exported."""

import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, InstanceOf, ValidationError
from pydantic_core import PydanticSerializationError, to_json

from cascadevlm.base.files import valid_text
from cascadevlm.base.types import DecidedBy, Outcome, Prediction

if TYPE_CHECKING:
    import pyarrow

ROWS_AT_ONCE = 10_000
"""Rows of the table that are in memory at once."""


class LineVerdict(BaseModel):
    """Of a verdict, what is read."""

    outcome: Outcome
    judge: str
    label: InstanceOf[str] | None
    text: InstanceOf[str]
    rationale: InstanceOf[str]
    error: InstanceOf[str]


class LineCandidate(BaseModel):
    """A candidate."""

    label: InstanceOf[str]
    probability: float
    rank: int


class LineCost(BaseModel):
    """Of what all verdicts took together, what is read."""

    requests: int
    dollars: float
    saved_dollars: float


class Line(BaseModel):
    """Of a line that `Prediction.to_dict` tells, what is read; its texts need not be valid Unicode."""

    path: InstanceOf[str]
    label: InstanceOf[str] | None
    probability: float | None
    decided_by: DecidedBy | None
    candidates: list[LineCandidate]
    reasons: list[str]
    verdict: LineVerdict | None
    earlier_verdicts: list[LineVerdict]
    cost: LineCost
    error: InstanceOf[str]
    digest: str = ""

    @classmethod
    def read(cls, text: str | bytes) -> Self:
        """A line of ``predictions.jsonl``.

        Raises:
            ValueError: if it is none.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError:  # unlike pydantic's, Python's reader takes texts that are no valid Unicode
            return cls.model_validate(json.loads(text))

    @property
    def verdicts(self) -> list[LineVerdict]:
        return [*self.earlier_verdicts, *([self.verdict] if self.verdict else [])]

    @property
    def outcome(self) -> Outcome | None:
        """Of the last verdict."""
        return self.verdict.outcome if self.verdict else None

    @property
    def dollars(self) -> float:
        return self.cost.dollars

    @property
    def escalated(self) -> bool:
        return self.verdict is not None

    @property
    def abstained(self) -> bool:
        """Whether the image could be read and was given no label."""
        return self.label is None and bool(self.candidates)

    @property
    def asked(self) -> bool:
        return any(verdict.outcome != "skipped" for verdict in self.verdicts)

    @property
    def answered(self) -> bool:
        return any(verdict.outcome in ("answered", "none") for verdict in self.verdicts)

    @property
    def skipped(self) -> bool:
        """Whether a judge was not asked about the image for want of money."""
        return any(verdict.outcome == "skipped" for verdict in self.verdicts)

    @property
    def failed(self) -> bool:
        """Whether the image could not be read or a judge could not be asked about it."""
        return not self.candidates or any(verdict.outcome == "failed" for verdict in self.verdicts)


def line_of(path: str, prediction: Prediction, digest: str) -> bytes:
    """A line of ``predictions.jsonl`` without its end, for `Line.read`; ``digest`` is of the image's file, if it is one."""
    told = prediction.to_dict() | {"path": path} | ({"digest": digest} if digest else {})
    try:
        return to_json(told)
    except PydanticSerializationError:  # texts that are no valid Unicode: see `Line.read`
        return json.dumps(told).encode()


def failure_of(prediction: Prediction | Line) -> str:
    """Why the image could not be read or a judge was asked in vain, or ""."""
    if not prediction.candidates:
        return prediction.error
    return next((verdict.error for verdict in prediction.verdicts if verdict.outcome in ("failed", "refused", "unparsed")), "")


def write_table(lines: Path, table: Path) -> None:
    """Write the predictions as a table, as a whole or not at all."""
    import pyarrow
    import pyarrow.parquet

    schema, unfinished = table_schema(), table.with_name(f"{table.name}.part")
    with lines.open("rb") as read, pyarrow.parquet.ParquetWriter(unfinished, schema) as writer:
        rows = (_row(Line.read(line)) for line in read)
        while some := list(islice(rows, ROWS_AT_ONCE)):
            writer.write_table(pyarrow.Table.from_pylist(some, schema=schema))
    unfinished.replace(table)


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


def _row(line: Line) -> dict[str, object]:
    """Of the table, which wants valid Unicode."""
    last = line.verdict
    texts = {
        "path": line.path,
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

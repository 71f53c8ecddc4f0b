"""Batches: their rows, the result of each row, and the form of both providers."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal, TypeAlias

from pydantic import JsonValue

from tests.server.conversation import Received, read_json
from tests.server.faults import Json, Problem, Provider, new_id
from tests.server.replies import openai_usage

Outcome: TypeAlias = Literal["succeeded", "errored", "expired", "canceled"]
Submitted: TypeAlias = Sequence[tuple[str, Received]]

ENDPOINTS = frozenset({"/v1/chat/completions", "/v1/responses", "/v1/messages"})
"""The endpoints that accept batches."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One request of a batch, its response, and its result if the batch completes."""

    custom_id: str
    received: Received
    status: int
    reply: JsonValue | Json
    outcome: Outcome


@dataclass(kw_only=True)
class Batch:
    """A submitted batch. If it expires or is cancelled, only the first half of its rows is done."""

    id: str
    provider: Provider
    rows: Sequence[Row]
    ending: Literal["completed", "expired", "cancelled"]
    endpoint: str
    input_file_id: JsonValue = None
    metadata: JsonValue = None
    file_ids: dict[str, str] = field(default_factory=dict)
    state: Literal["in_progress", "canceling", "ended"] = "in_progress"
    polls: int = 0
    created: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def outcomes(self) -> list[Outcome]:
        """The result of each row."""
        done = len(self.rows) if self.ending == "completed" else len(self.rows) // 2
        undone: Outcome = "expired" if self.ending == "expired" else "canceled"
        return [row.outcome if place < done else undone for place, row in enumerate(self.rows)]

    def files(self) -> dict[str, bytes]:
        """OpenAI's files of output and of errors. Empty files are left out."""
        lines: dict[str, list[Json]] = {"output": [], "error": []}
        for row, outcome in zip(self.rows, self.outcomes, strict=True):
            lines["output" if outcome == "succeeded" else "error"].append(_openai_line(row, outcome))
        return {kind: jsonl(some) for kind, some in lines.items() if some}

    def results(self) -> bytes:
        """Anthropic's results."""
        return jsonl(_anthropic_line(row, outcome) for row, outcome in zip(self.rows, self.outcomes, strict=True))


def jsonl(lines: Iterable[Json]) -> bytes:
    """Text with one JSON object per line."""
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def openai_rows(file: bytes, endpoint: str, headers: Mapping[str, str]) -> Submitted:
    """The requests in an uploaded file.

    Raises:
        Problem: if a line is not a request to the endpoint.
    """
    rows = []
    for line in file.splitlines():
        match read_json(line):
            case {"custom_id": str(custom_id), "method": "POST", "url": url, "body": dict(body)} if url == endpoint:
                rows.append((custom_id, Received(path=endpoint, headers=headers, body=body)))
            case _:
                raise Problem("bad_request", f"A line of the file is no request to {endpoint!r}.")
    return rows


def anthropic_rows(body: Mapping[str, JsonValue], headers: Mapping[str, str]) -> Submitted:
    """The requests in a submission.

    Raises:
        Problem: if a field of a request is missing.
    """
    rows = []
    requests = body.get("requests")
    for request in requests if isinstance(requests, list) else []:
        match request:
            case {"custom_id": str(custom_id), "params": dict(params)}:
                rows.append((custom_id, Received(path="/v1/messages", headers=headers, body=params)))
            case _:
                raise Problem("bad_request", "A request lacks custom_id or params.")
    return rows


_CUT_SHORT: Mapping[Outcome, Json] = {
    "expired": {
        "code": "batch_expired",
        "message": "This request could not be executed before the completion window expired.",
    },
    "canceled": {"code": "batch_cancelled", "message": "This request was not executed before the batch was cancelled."},
}


def _openai_line(row: Row, outcome: Outcome) -> Json:
    response = {"status_code": row.status, "request_id": new_id("req"), "body": row.reply}
    return {
        "id": new_id("batch_req"),
        "custom_id": row.custom_id,
        "response": None if outcome in _CUT_SHORT else response,
        "error": _CUT_SHORT.get(outcome),
    }


def _anthropic_line(row: Row, outcome: Outcome) -> Json:
    content: Json = {"succeeded": {"message": row.reply}, "errored": {"error": row.reply}}.get(outcome, {})
    return {"custom_id": row.custom_id, "result": {"type": outcome, **content}}


def openai_batch(batch: Batch, usage: tuple[int, int]) -> Json:
    """A batch in OpenAI's form."""
    ended = batch.state == "ended"
    outcomes = batch.outcomes if ended else []
    begun = "in_progress" if batch.polls else "validating"
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "input_file_id": batch.input_file_id,
        "completion_window": "24h",
        "status": {"in_progress": begun, "canceling": "cancelling", "ended": batch.ending}[batch.state],
        "created_at": int(batch.created.timestamp()),
        "expires_at": int(batch.created.timestamp()) + 24 * 3600,
        f"{batch.ending}_at": int(batch.created.timestamp()) if ended else None,
        "metadata": batch.metadata,
        "request_counts": {
            "total": len(batch.rows),
            "completed": outcomes.count("succeeded"),
            "failed": outcomes.count("errored"),
        },
        "usage": openai_usage(usage, outcomes.count("succeeded")),
        **batch.file_ids,
    }


def anthropic_batch(batch: Batch, url: str) -> Json:
    """A batch in Anthropic's form."""
    ended = batch.state == "ended"
    outcomes = batch.outcomes if ended else []
    counts = {outcome: outcomes.count(outcome) for outcome in ("succeeded", "errored", "expired", "canceled")}
    return {
        "id": batch.id,
        "type": "message_batch",
        "processing_status": batch.state,
        "request_counts": {"processing": 0 if ended else len(batch.rows), **counts},
        "created_at": batch.created.isoformat(),
        "expires_at": (batch.created + timedelta(hours=24)).isoformat(),
        "ended_at": batch.created.isoformat() if ended else None,
        "cancel_initiated_at": batch.created.isoformat() if batch.ending == "cancelled" else None,
        "archived_at": None,
        "results_url": f"{url}/v1/messages/batches/{batch.id}/results" if ended else None,
    }

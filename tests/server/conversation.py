"""Reads the judging requests of both providers."""

import binascii
import json
import re
from base64 import b64decode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from tests.server.faults import Problem, Provider


@dataclass(frozen=True, kw_only=True)
class Received:
    """A judging request as it was received. The case of header names does not matter."""

    path: str
    headers: Mapping[str, str]
    body: Mapping[str, JsonValue]


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A judging request, read.

    Attributes:
        received: the request itself.
        texts: all texts in order.
        images: the encoded bytes of all images in order.
        options: the candidates that are listed last: the text after each key, by the key.
        choices: the possible answers: the values in the schema or the decision; without them, the keys of the options.
        schema: the schema of the answer.
        tool: the name of the tool that must be called with the answer.
    """

    received: Received
    texts: Sequence[str]
    images: Sequence[bytes]
    options: Mapping[str, str]
    choices: Sequence[str]
    schema: JsonValue
    tool: str | None

    def say(self, answer: str) -> str:
        """The answer in the requested form: JSON if there is a schema."""
        match self.schema:
            case {"properties": dict(fields)}:
                return json.dumps({name: answer if name == "answer" else "As far as can be seen." for name in fields})
        return f"ANSWER: {answer}"


def provider_of(path: str) -> Provider:
    """The provider of the endpoint."""
    return "anthropic" if path.startswith("/v1/messages") else "openai"


def read_json(data: bytes) -> dict[str, JsonValue]:
    """A JSON object.

    Raises:
        Problem: if the value is not a JSON object.
    """
    try:
        value: JsonValue = json.loads(data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise Problem("bad_request", "A JSON object is expected.")
    return value


_OPTION = re.compile(r"^(\w+)\) (.+)$", re.MULTILINE)


def read_request(received: Received) -> Conversation:
    """The conversation of a judging request.

    Raises:
        Problem: if an image is not in base64, or if the decision is not a choice.
    """
    try:
        parts = [*_parts(received.body.get("messages")), *_parts(received.body.get("input"))]
    except binascii.Error as exc:
        raise Problem("bad_request", "An image is not in base64.") from exc
    texts = [part for part in parts if isinstance(part, str)]
    options = next((dict(found) for text in reversed(texts) if (found := _OPTION.findall(text))), {})
    schema, tool = _schema(received.body)
    return Conversation(
        received=received,
        texts=texts,
        images=[part for part in parts if isinstance(part, bytes)],
        options=options,
        choices=_choices(received.body, schema) or list(options) or ["A"],
        schema=schema,
        tool=tool,
    )


def _parts(node: JsonValue) -> Iterator[str | bytes]:
    """Texts and images in order, for every way in which a protocol nests them."""
    match node:
        case str():
            yield node
        case list():
            for item in node:
                yield from _parts(item)
        case {"source": {"type": "base64", "data": str(data)}}:
            yield b64decode(data, validate=True)
        case {"image_url": {"url": str(url)}} | {"image_url": str(url)}:
            yield b64decode(url.partition(";base64,")[2], validate=True)
        case {"text": str(text)}:
            yield text
        case {"content": content}:
            yield from _parts(content)


def _schema(body: Mapping[str, JsonValue]) -> tuple[JsonValue, str | None]:
    match body:
        case (
            {"response_format": {"json_schema": {"schema": schema}}}
            | {"text": {"format": {"schema": schema}}}
            | {"output_config": {"format": {"schema": schema}}}
        ):
            return schema, None
        case {"tool_choice": {"type": "tool", "name": str(name)}, "tools": [*tools]}:
            for tool in tools:
                if isinstance(tool, dict) and tool.get("name") == name:
                    return tool.get("input_schema"), name
    return None, None


def _choices(body: Mapping[str, JsonValue], schema: JsonValue) -> list[str]:
    match schema:
        case {"properties": {"answer": {"enum": [*values]}}}:
            return [str(value) for value in values]
    match body.get("questions"):
        case None:
            return []
        case [{"type": "choice", "choices": [*choices]}]:
            return [str(choice["value"]) for choice in choices if isinstance(choice, dict)]
    raise Problem("bad_request", "Only a single choice question is understood.")

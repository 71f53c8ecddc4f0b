"""Replies of providers: the form of an answer, and the content of a response."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from pydantic import BaseModel

from cascadevlm.base.types import Question, Usage
from cascadevlm.judges.prompt import answer_format, options

MOST_TOKENS = 100_000_000
"""Upper limit of the tokens that a model reads or writes in one request."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A response of a provider, before its text is read as an answer.

    Attributes:
        text: the text of the answer.
        usage: the tokens that are billed; None if the response does not report them, or reports impossible numbers.
        thoughts: the model's thoughts, if the provider returns them separately from the text.
        refusal: the reason why the model does not answer; None if it answers.
        cut_off: whether the answer reached its limit of tokens.
        probabilities: probability of each candidate by its name; None if the response has none.
    """

    text: str
    usage: Usage | None
    thoughts: str = ""
    refusal: str | None = None
    cut_off: bool = False
    probabilities: Mapping[str, float] | None = None


def reported(source: object, *path: str) -> object:
    """The attribute of an SDK's object under a path of names. None if it is missing, because SDKs do not check that a response
    is complete.
    """
    for name in path:
        source = getattr(source, name, None)
    return source


def believed_usage(
    *, input_tokens: object, output_tokens: object, cached: object, written: object, apart: bool = False
) -> Usage | None:
    """The usage that a provider reports. None if the counts are impossible.

    Args:
        input_tokens: tokens read by the model.
        output_tokens: tokens written by the model.
        cached: tokens read from the provider's prompt cache. A provider may leave this count out.
        written: tokens written to the provider's prompt cache. A provider may leave this count out.
        apart: true if ``input_tokens`` does not include ``cached`` and ``written``.
    """
    counts = (input_tokens, output_tokens, 0 if cached is None else cached, 0 if written is None else written)
    if not all(type(count) is int and 0 <= count <= MOST_TOKENS for count in counts):
        return None
    into, out, read, kept = cast(tuple[int, int, int, int], counts)
    into += read + kept if apart else 0
    if into == 0 or read + kept > into:
        return None
    return Usage(input_tokens=into, output_tokens=out, cached_input_tokens=read, cache_write_tokens=kept)


def choices(question: Question, *, by_key: bool) -> list[str]:
    """The values that a schema allows as the answer: the names of the options, or their keys if two names are equal."""
    offered = options(question)
    names = list(offered.values())
    return list(offered) if by_key or len(set(names)) < len(names) else names


def answer_schema(question: Question, *, by_key: bool = False) -> dict[str, object]:
    """The JSON schema of an answer. The reasoning comes first if the prompt asks for reasoning."""
    answer = {"type": "string", "enum": choices(question, by_key=by_key)}
    reasoning = {"reasoning": {"type": "string"}} if answer_format(question).reasoning else {}
    properties = {**reasoning, "answer": answer}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def texts_of(content: object) -> tuple[str, str]:
    """The text of an answer, and the thoughts that are separate from it. The content is a text or a list of parts."""
    if isinstance(content, str):
        return content, ""
    texts: list[str] = []
    thoughts: list[str] = []
    for part in content if isinstance(content, list) else ():
        match part.model_dump(warnings=False) if isinstance(part, BaseModel) else part:
            case str(text) | {"type": "text" | "output_text", "text": str(text)}:
                texts.append(text)
            case {"thinking": thought} | {"reasoning": thought} | {"summary": thought} | {"text": thought}:
                thoughts.append(texts_of(thought)[0])
    return "\n".join(texts), "\n".join(thoughts)


def normalised(masses: Mapping[str, float]) -> Mapping[str, float] | None:
    """The masses divided by their sum. None if the sum is 0."""
    total = sum(masses.values())
    return {name: mass / total for name, mass in masses.items()} if total > 0 else None

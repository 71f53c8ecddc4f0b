"""Writes the answers of both providers."""

import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tests.server.conversation import Conversation
from tests.server.faults import FaultKind, Json, new_id

CONFIDENCE = 0.9
"""The probability of the chosen option, if probabilities are requested. The other options share the rest evenly."""

HUGE = 2_000_000
REFUSAL = "I'm sorry, I can't help with that."


@dataclass(frozen=True, kw_only=True)
class Said:
    """The model's text, the reason of its end, the billed usage, and whether token probabilities are given."""

    text: str = ""
    stop: Literal["stop", "refusal", "content_filter", "length"] = "stop"
    usage: tuple[int, int] = (0, 0)
    cached: int = 0
    logprobs: bool = False


def say(asked: Conversation, fault: FaultKind | None, answer: str | Callable[[Conversation], str]) -> Said:
    """The answer, or the answer changed by the fault."""
    match fault:
        case "empty":
            return Said()
        case "refusal" | "content_filter":
            return Said(stop=fault)
        case "wrong_label":
            return Said(text=asked.say("something that was never offered"))
        case "not_offered_letter":
            return Said(text=asked.say("Z"))
        case "huge":
            return Said(text=asked.say("lorem ipsum " * (HUGE // len("lorem ipsum "))))
    text = answer if isinstance(answer, str) else answer(asked)
    return Said(text=text[: len(text) // 2], stop="length") if fault == "length" else Said(text=text)


def _chat(asked: Conversation, said: Said) -> Json:
    refused = said.stop == "refusal"
    choice = {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": None if refused else said.text,
            "refusal": REFUSAL if refused else None,
        },
        "logprobs": {"content": _logprobs(asked, said.text)} if said.logprobs and asked.received.body.get("logprobs") else None,
        "finish_reason": "stop" if refused else said.stop,
    }
    into, out = said.usage
    return {
        "id": new_id("chatcmpl"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": asked.received.body.get("model"),
        "choices": [choice],
        "usage": {
            "prompt_tokens": into,
            "prompt_tokens_details": {"cached_tokens": said.cached},
            "completion_tokens": out,
            "total_tokens": into + out,
        },
    }


_TOKEN = re.compile(r"\s*(?:\w+|[^\w\s])|\s+")


def _logprobs(asked: Conversation, text: str) -> list[Json]:
    """Tokens in order. A token that is a choice has the other choices as alternatives."""
    match asked.received.body.get("top_logprobs"):
        case int(most):
            pass
        case _:
            most = 0
    content: list[Json] = []
    for token in _TOKEN.findall(text):
        bare = token.strip()
        chances = probabilities(bare, asked.choices) if bare in asked.choices else {bare: 1.0}
        alternatives = [_logprob(token.replace(bare, other), chance) for other, chance in chances.items()]
        content.append({**_logprob(token, chances[bare]), "top_logprobs": alternatives[:most]})
    return content


def _logprob(token: str, probability: float) -> Json:
    return {"token": token, "bytes": list(token.encode()), "logprob": math.log(probability)}


def probabilities(chosen: str, choices: Sequence[str]) -> dict[str, float]:
    """The choices, with the chosen one first."""
    rest = (1 - CONFIDENCE) / max(len(choices) - 1, 1)
    return {choice: CONFIDENCE if choice == chosen else rest for choice in sorted(choices, key=lambda choice: choice != chosen)}


def _response(asked: Conversation, said: Said) -> Json:
    why = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(said.stop)
    status = "incomplete" if why else "completed"
    text = {"type": "output_text", "text": said.text, "annotations": [], "logprobs": []}
    message = {
        "id": new_id("msg"),
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [{"type": "refusal", "refusal": REFUSAL} if said.stop == "refusal" else text],
    }
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": status,
        "error": None,
        "incomplete_details": {"reason": why} if why else None,
        "model": asked.received.body.get("model"),
        "output": [] if why == "content_filter" else [message],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": openai_usage(said.usage, cached=said.cached),
    }


def openai_usage(usage: tuple[int, int], answers: int = 1, *, cached: int = 0) -> Json:
    """The usage of this number of answers, in the form of OpenAI's endpoints except Chat Completions."""
    into, out = (tokens * answers for tokens in usage)
    return {
        "input_tokens": into,
        "input_tokens_details": {"cached_tokens": cached * answers, "cache_write_tokens": 0},
        "output_tokens": out,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": into + out,
    }


def _decision(asked: Conversation, said: Said) -> Json:
    answer = said.text.rpartition("ANSWER:")[2].strip()
    choice = answer if answer in asked.choices else dict(zip(asked.options, asked.choices, strict=False)).get(answer, answer)
    chances = probabilities(choice, asked.choices).items()
    decided = {
        "type": "choice",
        "choice": choice,
        "confidence": CONFIDENCE,
        "probabilities": [{"value": value, "probability": chance} for value, chance in chances],
    }
    return {
        "model": asked.received.body.get("model"),
        "answers": [{"type": "refusal"} if said.stop in ("refusal", "content_filter") else decided],
        "usage": openai_usage(said.usage, cached=said.cached),
    }


def _message(asked: Conversation, said: Said) -> Json:
    refused = said.stop in ("refusal", "content_filter")
    content: list[Json] = [{"type": "text", "text": said.text}] if said.text else []
    stop = "refusal" if refused else "max_tokens" if said.stop == "length" else "end_turn"
    if asked.tool and said.text.startswith("{") and said.stop == "stop":
        stop = "tool_use"
        content = [{"type": "tool_use", "id": new_id("toolu"), "name": asked.tool, "input": json.loads(said.text)}]
    into, out = said.usage
    return {
        "id": new_id("msg"),
        "type": "message",
        "role": "assistant",
        "model": asked.received.body.get("model"),
        "content": content,
        "stop_reason": stop,
        "stop_sequence": None,
        "stop_details": {"type": "refusal", "category": None, "explanation": None} if refused else None,
        "usage": {
            "input_tokens": into - said.cached,
            "output_tokens": out,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": said.cached,
        },
    }


REPLIES: Mapping[str, Callable[[Conversation, Said], Json]] = {
    "/v1/chat/completions": _chat,
    "/v1/responses": _response,
    "/v1/decisions": _decision,
    "/v1/messages": _message,
}
"""The form of an answer at each judging endpoint."""

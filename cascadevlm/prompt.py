"""Prompts: templates from text files, their rendering into messages, and the reading of answers.

A template begins with TOML between two ``+++`` lines (``reasoning``, ``max_tokens``); the rest is the text, in which
``$image``, ``$candidates`` and ``$references`` stand for what a question brings. Names of labels are data: they are put in
after the template was read, on one line each, so that braces, quotes, dollar signs and line breaks in them mean nothing.
"""

import re
import string
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Literal, TypeAlias

from PIL import Image
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from cascadevlm.errors import PromptError
from cascadevlm.labels import Label, fold, one_line
from cascadevlm.types import Prompt, Question

NONE_OF_THESE = "none of these"

Part: TypeAlias = str | Image.Image


@dataclass(frozen=True)
class Message:
    """One turn: text and images in order, neighbouring texts joined."""

    role: Literal["user", "assistant"]
    parts: tuple[Part, ...]


class _FrontMatter(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    reasoning: bool
    max_tokens: PositiveInt


def parse_template(name: str, source: str, *, required: frozenset[str] = frozenset({"image", "candidates"})) -> Prompt:
    """Read a template.

    Raises:
        PromptError: if its head is missing or wrong, or if a variable is unknown or lacking.
    """
    match = re.match(r"\+\+\+\n(.*?\n)\+\+\+\n(.*)", source.replace("\r\n", "\n"), re.DOTALL)
    if not match:
        raise PromptError(f"Prompt {name!r} has no head.", hint="Begin with '+++', reasoning = …, max_tokens = …, '+++'.")
    try:
        head = _FrontMatter.model_validate(tomllib.loads(match[1]))
    except (ValidationError, tomllib.TOMLDecodeError, RecursionError) as exc:
        reason = exc.errors()[0] if isinstance(exc, ValidationError) else {"loc": (), "msg": str(exc)}
        raise PromptError(f"Prompt {name!r}, head: {'.'.join(map(str, reason['loc']))} {reason['msg']}.") from exc
    template = string.Template(match[2].strip())
    if not template.is_valid():
        raise PromptError(f"Prompt {name!r} has a '$' that starts no variable.", hint="Write '$$' for a dollar sign.")
    variables = set(template.get_identifiers())
    if unknown := variables - {"image", "candidates", "references"}:
        raise PromptError(
            f"Prompt {name!r} uses the unknown variable ${min(unknown)}.", hint="Known: $image, $candidates, $references."
        )
    if missing := required - variables:
        raise PromptError(f"Prompt {name!r} lacks ${min(missing)}.", hint="The judge would not see it.")
    return Prompt(name=name, text=template.template, reasoning=head.reasoning, max_tokens=head.max_tokens)


def packaged_prompt(package: ModuleType, name: str) -> Prompt:
    """The template ``<name>.txt`` of a package registered under ``cascadevlm.prompts``."""
    return parse_template(name, (resources.files(package) / f"{name}.txt").read_text(encoding="utf-8"))


def read_prompt(path: str | Path) -> Prompt:
    """A template from a file of the user's own.

    Raises:
        PromptError: if it cannot be read or is no template.
    """
    path = Path(path)
    try:
        return parse_template(path.stem, path.read_text(encoding="utf-8-sig"))
    except OSError as exc:
        raise PromptError(f"Prompt file {str(path)!r} cannot be read: {exc.strerror}.") from exc
    except UnicodeDecodeError as exc:
        raise PromptError(f"Prompt file {str(path)!r} is not UTF-8 text.", hint="Save it as UTF-8.") from exc


@cache
def _repair_prompt() -> Prompt:
    source = (resources.files("cascadevlm_prompts") / "repair.txt").read_text(encoding="utf-8")
    return parse_template("repair", source, required=frozenset({"candidates"}))


def options(question: Question) -> dict[str, str]:
    """The options offered, in the order shown: key to name, "none of these" last where it is offered.

    Keys are letters, as in a spreadsheet past Z. Where one of them is also the name of a candidate, numbers are taken, or
    numbers behind ever more ``#``: an answer must never mean two things.
    """
    return dict(_options(question.labels, question.offer_none))


@lru_cache(10_000)  # wanted several times a question
def _options(labels: tuple[Label, ...], offer_none: bool) -> tuple[tuple[str, str], ...]:
    names = [label.words for label in labels] + [NONE_OF_THESE] * offer_none
    taken = {fold(name) for label in labels for name in (label.name, *label.aliases)}
    for keys in _key_schemes(len(names)):
        if not taken & {fold(key) for key in keys}:
            return tuple(zip(keys, names, strict=True))
    raise AssertionError("there are more key schemes than names")


def _key_schemes(length: int) -> Iterator[list[str]]:
    yield [_letters(index) for index in range(length)]
    for prefix in count():
        yield [f"{'N' * prefix}{index + 1}" for index in range(length)]


def _letters(index: int) -> str:
    return (_letters(index // 26 - 1) if index >= 26 else "") + string.ascii_uppercase[index % 26]


def render(question: Question) -> tuple[Message, ...]:
    """The conversation to put to a judge: one user turn, or three where an earlier answer named no candidate."""
    asked = Message("user", _fill(question.prompt, question))
    if question.rejected is None:
        return (asked,)
    return asked, Message("assistant", (question.rejected,)), Message("user", _fill(_repair_prompt(), question))


def answer_format(question: Question) -> Prompt:
    """The template whose ``reasoning`` and ``max_tokens`` hold for the answer now expected."""
    return question.prompt if question.rejected is None else _repair_prompt()


def _fill(prompt: Prompt, question: Question) -> tuple[Part, ...]:
    parts: list[Part] = []
    position = 0
    for match in string.Template.pattern.finditer(prompt.text):
        parts.append(prompt.text[position : match.start()])
        position = match.end()
        match match["named"] or match["braced"] or "$":
            case "image":
                parts.append(question.image)
            case "references":
                parts.extend(_references(prompt, question))
            case "candidates":
                parts.append(_candidate_lines(question))
            case dollar:
                parts.append(dollar)
    parts.append(prompt.text[position:])
    return _joined(parts)


def _candidate_lines(question: Question) -> str:
    descriptions = [one_line(label.description) for label in question.labels] + [""]
    lines = zip(options(question).items(), descriptions, strict=False)
    return "\n".join(f"{key}) {name}" + f": {about}" * bool(about) for (key, name), about in lines)


def _references(prompt: Prompt, question: Question) -> Iterator[Part]:
    if not question.exemplars:
        yield "(none)"
    for number, exemplar in enumerate(question.exemplars):
        yield "\n" * bool(number)
        yield exemplar.image
        yield f" {exemplar.label.words}"


def _joined(parts: Sequence[Part]) -> tuple[Part, ...]:
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part != "":
            joined.append(part)
    return tuple(joined)


@dataclass(frozen=True)
class Answer:
    """A judge's text, read: the chosen label, None for "none of these"; and what was said before."""

    label: Label | None
    rationale: str


_ANSWER_LINE = re.compile(r"^[\s>*_#`-]*answer[*_`]*\s*:[*_`]*[ \t]*(\S.*)$", re.IGNORECASE | re.MULTILINE)


def read_answer(text: str, question: Question) -> Answer | None:
    """What a text answers, or None if it names none of the options or more than one.

    The last line of the form ``ANSWER: …`` counts; without one, the whole text if it is a single line. Its content is the
    key of an option (``B``, ``(B)``), its name or an alias, or both (``B) name``). Names are compared exactly, then without
    case, accents and punctuation. Where "none of these" is an option, so is the name of a label that was not shown: it says so.
    """
    lines = list(_ANSWER_LINE.finditer(text))
    if lines:
        content, rationale = lines[-1][1], text[: lines[-1].start()].strip()
    elif len(text.strip().splitlines()) == 1:
        content, rationale = text, ""
    else:
        return None
    spellings = [(label.name, label.words, *label.aliases) for label in question.labels] + [
        (NONE_OF_THESE,)
    ] * question.offer_none
    named = one_line(content).strip("*_`")
    chosen = _match(named, list(options(question)), spellings)
    if chosen is None:
        shown = {fold(name) for names in spellings for name in names}
        others = question.label_set.spellings - shown if question.offer_none and question.label_set else frozenset()
        return Answer(None, rationale) if fold(named) in others else None
    return Answer(question.labels[chosen] if chosen < len(question.labels) else None, rationale)


def _match(content: str, keys: Sequence[str], spellings: Sequence[Sequence[str]]) -> int | None:
    """The position of the option that the content names, by name before key; None where that is not exactly one."""
    for same in (one_line, fold):
        if named := [i for i, names in enumerate(spellings) if same(content) in map(same, names)]:
            return named[0] if len(named) == 1 else None
    match = re.fullmatch(r"[(\[]?(\w+)(?:[)\].:]+\s*(.+)?)?", content)
    if not match or match[1].upper() not in keys:
        return None
    position = keys.index(match[1].upper())
    agrees = match[2] is None or _match(match[2], (), spellings) == position
    return position if agrees else None

"""Prompts: templates from text files, their rendering into messages, and the reading of answers.

A template begins with TOML between two ``+++`` lines (``reasoning``, ``max_tokens``); the rest is the text, in which
``$image``, ``$candidates`` and ``$references`` stand for what a question brings. Names of labels are data: they are put in
after the template was read, on one line each, so that braces, quotes, dollar signs and line breaks in them mean nothing.
"""

import re
import string
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, wraps
from importlib import resources
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Literal, TypeAlias, TypeVar

from PIL import Image
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from cascadevlm.base.errors import PromptError
from cascadevlm.base.labels import Label, fold, one_line
from cascadevlm.base.types import Prompt, Question

NONE_OF_THESE = "none of these"

Part: TypeAlias = str | Image.Image

T = TypeVar("T")


def once_per_question(make: Callable[[Question], T]) -> Callable[[Question], T]:
    """A function of a question whose value is made once and then kept with the question, as `functools.cached_property` does."""
    name = f"{make.__module__}.{make.__qualname__}"

    @wraps(make)
    def kept(question: Question) -> T:
        values: dict[str, T] = vars(question)
        if name not in values:
            values[name] = make(question)
        return values[name]

    return kept


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


def _exactly(name: str) -> frozenset[str]:
    return frozenset({one_line(name)})


def _folded(name: str) -> frozenset[str]:
    return frozenset({fold(name)})


_APOSTROPHE = "['‘’‛ʼ´`′＇]"
_JOINTS = re.compile(r"(?<!\d)[\s_‐-―−-]+|[\s_‐-―−-]+(?!\d)")  # between digits they tell numbers apart


def _joined_up(name: str) -> frozenset[str]:
    """A name without apostrophes, hyphens and spaces, with and without the s of a possessive."""
    forms = {fold(_JOINTS.sub("", re.sub(lost, "", name))) for lost in (_APOSTROPHE, rf"{_APOSTROPHE}s\b|{_APOSTROPHE}")}
    return frozenset(forms - {""})


GRADES = (_exactly, _folded, _joined_up)
"""The ways to compare names, the most exact first. Two names are equal if their forms have a text in common."""

EXACT, FOLDED, JOINED_UP = range(len(GRADES))

Spellings: TypeAlias = tuple[frozenset[str], ...]
"""The names of one option: for each of `GRADES`, their forms."""


def _spelt(*names: str) -> Spellings:
    return tuple(frozenset[str]().union(*map(forms, names)) for forms in GRADES)


_NONE = _spelt(NONE_OF_THESE)


@lru_cache(100_000)  # the labels of a label set come again and again
def _spellings_of(label: Label) -> Spellings:
    whole_line = [f"{label.words}: {label.description}"] if label.description else []
    return _spelt(label.name, label.words, *label.aliases, *whole_line)


@once_per_question
def spellings(question: Question) -> tuple[Spellings, ...]:
    """The names of each option, in the order shown."""
    return (*map(_spellings_of, question.labels), *[_NONE] * question.offer_none)


@once_per_question
def options(question: Question) -> Mapping[str, str]:
    """The options offered, in the order shown: key to name, "none of these" last where it is offered.

    Keys are letters: A to Z, then AA, AB and so on. If a key equals the name of a candidate, the keys are numbers instead; if a
    number does so too, the keys are N1, N2 …, then NN1, NN2 …: an answer never means two things.
    """
    names = [label.words for label in question.labels] + [NONE_OF_THESE] * question.offer_none
    taken = frozenset[str]().union(*(option[grade] for option in spellings(question) for grade in (FOLDED, JOINED_UP)))
    for keys in _key_schemes(len(names)):
        if not taken & {fold(key) for key in keys}:
            return dict(zip(keys, names, strict=True))
    raise AssertionError("there are more key schemes than names")


def _key_schemes(length: int) -> Iterator[list[str]]:
    yield [_letters(index) for index in range(length)]
    for prefix in count():
        yield [f"{'N' * prefix}{index + 1}" for index in range(length)]


def _letters(index: int) -> str:
    return (_letters(index // 26 - 1) if index >= 26 else "") + string.ascii_uppercase[index % 26]


@once_per_question
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

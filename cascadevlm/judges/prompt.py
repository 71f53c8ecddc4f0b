"""Prompts: templates from text files, their options, and their rendering into messages.

A template begins with TOML between two lines ``+++``, with the keys ``reasoning`` and ``max_tokens``. The text follows. In the
text, ``$image``, ``$candidates`` and ``$references`` are replaced by the parts of a question. Names of labels are data. They are
inserted after the template was parsed, one per line, so that braces, quotes, dollar signs and line breaks in a name have no
special meaning.
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
    """Decorator for a function of a question. Its value is computed once and kept with the question.

    It works like `functools.cached_property` for a function outside of the class. A copy made by `dataclasses.replace` starts
    without values.
    """
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
    """One turn of a conversation.

    Attributes:
        role: who speaks.
        parts: texts and images in order. Two texts never follow each other.
    """

    role: Literal["user", "assistant"]
    parts: tuple[Part, ...]


class _FrontMatter(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    reasoning: bool
    max_tokens: PositiveInt


def parse_template(name: str, source: str, *, required: frozenset[str] = frozenset({"image", "candidates"})) -> Prompt:
    """Parse a template.

    Args:
        name: name of the prompt, for records and messages.
        source: the text of the file.
        required: the variables that the text must contain.

    Raises:
        PromptError: if the head is missing or wrong, or if a variable is unknown or missing.
    """
    match = re.match(r"\+\+\+\n(.*?\n)\+\+\+\n(.*)", source.replace("\r\n", "\n"), re.DOTALL)
    if not match:
        raise PromptError(f"Prompt {name!r} has no head.", hint="Begin with '+++', reasoning = …, max_tokens = …, '+++'.")
    try:
        head = _FrontMatter.model_validate(tomllib.loads(match[1]))
    except (ValidationError, tomllib.TOMLDecodeError, RecursionError) as exc:
        reason = exc.errors()[0] if isinstance(exc, ValidationError) else {"loc": (), "msg": str(exc)}
        raise PromptError(
            f"Prompt {name!r}, head: {'.'.join(map(str, reason['loc']))} {reason['msg']}.",
            hint="Correct the header between the two lines '+++'.",
        ) from exc
    template = string.Template(match[2].strip())
    if not template.is_valid():
        raise PromptError(f"Prompt {name!r} has a '$' without a variable.", hint="Write '$$' for a dollar sign.")
    variables = set(template.get_identifiers())
    if unknown := variables - {"image", "candidates", "references"}:
        raise PromptError(
            f"Prompt {name!r} uses the unknown variable ${min(unknown)}.",
            hint="Variables: $image, $candidates, $references.",
        )
    if missing := required - variables:
        raise PromptError(f"Prompt {name!r} lacks ${min(missing)}.", hint=f"Insert ${min(missing)} into the text.")
    return Prompt(name=name, text=template.template, reasoning=head.reasoning, max_tokens=head.max_tokens)


def packaged_prompt(package: ModuleType, name: str) -> Prompt:
    """The template ``<name>.txt`` of a package that is registered in the entry-point group ``cascadevlm.prompts``."""
    return parse_template(name, (resources.files(package) / f"{name}.txt").read_text(encoding="utf-8"))


def read_prompt(path: str | Path) -> Prompt:
    """A template from a file.

    Raises:
        PromptError: if the file cannot be read, or is not a template.
    """
    path = Path(path)
    try:
        return parse_template(path.stem, path.read_text(encoding="utf-8-sig"))
    except OSError as exc:
        raise PromptError(f"Prompt file {str(path)!r} cannot be read: {exc.strerror}.", hint="Check the path.") from exc
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
_JOINTS = re.compile(r"(?<!\d)[\s_‐-―−-]+|[\s_‐-―−-]+(?!\d)")  # between digits, a hyphen separates two numbers


def _joined_up(name: str) -> frozenset[str]:
    """The folded name without apostrophes, hyphens and spaces; also without the s of a possessive."""
    forms = {fold(_JOINTS.sub("", re.sub(lost, "", name))) for lost in (_APOSTROPHE, rf"{_APOSTROPHE}s\b|{_APOSTROPHE}")}
    return frozenset(forms - {""})


GRADES = (_exactly, _folded, _joined_up)
"""Three ways to compare names, the most exact first. Each makes a set of forms. Two names are equal if they share a form."""

EXACT, FOLDED, JOINED_UP = range(len(GRADES))

Spellings: TypeAlias = tuple[frozenset[str], ...]
"""The forms of all names of one option: one set for each of `GRADES`."""


def _spelt(*names: str) -> Spellings:
    return tuple(frozenset[str]().union(*map(forms, names)) for forms in GRADES)


_NONE = _spelt(NONE_OF_THESE)


@lru_cache(100_000)  # many questions share labels
def _spellings_of(label: Label) -> Spellings:
    whole_line = [f"{label.words}: {label.description}"] if label.description else []
    return _spelt(label.name, label.words, *label.aliases, *whole_line)


@once_per_question
def spellings(question: Question) -> tuple[Spellings, ...]:
    """The names of each option, in the order in which the judge sees them."""
    return (*map(_spellings_of, question.labels), *[_NONE] * question.offer_none)


@once_per_question
def options(question: Question) -> Mapping[str, str]:
    """The options of a question, in the order in which the judge sees them: the key and the name of each option. "None of
    these" is the last option if it is offered.

    Keys are letters: A to Z, then AA, AB and so on. If a key equals a name of a candidate, the keys are numbers instead. If a
    number equals a name too, the keys are N1, N2 …, then NN1, NN2 …. So an answer never has two meanings.
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
    """The conversation of a question: one user turn. A repair question has three turns: question, rejected answer, repair."""
    asked = Message("user", _fill(question.prompt, question))
    if question.rejected is None:
        return (asked,)
    return asked, Message("assistant", (question.rejected,)), Message("user", _fill(_repair_prompt(), question))


def answer_format(question: Question) -> Prompt:
    """The template that decides ``reasoning`` and ``max_tokens`` of the next answer."""
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

"""Prompts: templates from text files, their rendering into messages, and the reading of answers.

A template begins with TOML between two ``+++`` lines (``reasoning``, ``max_tokens``); the rest is the text, in which
``$image``, ``$candidates`` and ``$references`` stand for what a question brings. Names of labels are data: they are put in
after the template was read, on one line each, so that braces, quotes, dollar signs and line breaks in them mean nothing.
"""

import json
import re
import string
import tomllib
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache, lru_cache, wraps
from importlib import resources
from itertools import count, dropwhile, islice, takewhile
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


@once_per_question
def options(question: Question) -> Mapping[str, str]:
    """The options offered, in the order shown: key to name, "none of these" last where it is offered.

    Keys are letters: A to Z, then AA, AB and so on. If a key equals the name of a candidate, the keys are numbers instead; if a
    number does so too, the keys are N1, N2 …, then NN1, NN2 …: an answer never means two things.
    """
    names = [label.words for label in question.labels] + [NONE_OF_THESE] * question.offer_none
    taken = frozenset[str]().union(*(option[grade] for option in _spellings(question) for grade in (FOLDED, JOINED_UP)))
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


@dataclass(frozen=True)
class Answer:
    """A judge's text, read: the chosen label, None for "none of these"; and what was said before."""

    label: Label | None
    rationale: str


def read_answer(text: str, question: Question) -> Answer | None:
    """What a text answers; None if it names none of the options, or more than one.

    Only what stands after the model's thoughts counts (see `after_thoughts`). There, the answer is the field ``answer`` of a JSON
    object, wherever the object stands, and the last line of the form ``ANSWER: …``, or the paragraph below such a line. If both
    are there, they must agree. A text with neither is an answer if it is a single line. The answer is the key of an option
    (``B``, ``(B)``), its name or an alias, or both (``B) name``, ``name (B)``). Names are compared exactly, then without case,
    accents and punctuation, then without apostrophes, hyphens and spaces. Beside a key, a name may also be misspelt. Where "none
    of these" is an option, the name of a label that was not shown chooses it.
    """
    said = after_thoughts(text, question)
    if said is None:
        return None
    contents, rationale = _statements(_without_markers(said, question), question)
    chosen = {_choice(content, question) for content in contents}
    position = chosen.pop() if len(chosen) == 1 else None
    if position is None:
        return None
    thoughts = _THOUGHTS.sub("", text.removesuffix(said))
    label = question.labels[position] if position < len(question.labels) else None
    return Answer(label, f"{thoughts}\n{rationale}".strip())


_TAG_WORD = (
    r"(?:[a-z0-9]+[:_-])*(?:(?:ant)?think(?:ing)?|thoughts?|cot|reason(?:ing)?|rationale|reflect(?:ion)?|analysis"
    r"|plan(?:ning)?|scratchpad|internal|monologue)"
)
_THOUGHTS = re.compile(
    rf"[<\[◁]\|?(?P<end>/|end_(?:of_)?)?{_TAG_WORD}(?:[_-](?!end)[a-z0-9]+)*(?P<ends>[_-]end)?(?:\s+\w+=[^<>]*)?\s*\|?[>\]▷]"
    r"|(?P<final><\|channel\|>\s*final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>|<channel\|>|<unused95>|assistantfinal)"
    r"|<\|channel\|?>\s*(?:analysis|commentary|thought)|<unused94>",
    re.IGNORECASE,
)
"""Tags around a model's thoughts; ``end``, ``ends`` or ``final`` matches in the closing ones."""


def after_thoughts(text: str, question: Question) -> str | None:
    """What stands after the last closing tag of thoughts or, if nothing does, before the first opening one; None if thoughts were
    begun and not ended. Tags that are part of a name, and those in a text that is JSON as a whole, are ordinary text."""
    if is_json_answer(text):
        return text
    tags = [tag for tag in _THOUGHTS.finditer(text) if not _in_a_name(tag[0], question)]
    closing = [tag for tag in tags if tag["end"] or tag["ends"] or tag["final"]]
    start = closing[-1].end() if closing else 0
    if any(tag.start() >= start for tag in tags):
        return None
    explained_after = tags and tags[0] not in closing and len(tags) == 2 * len(closing) and not text[start:].strip()
    return text[: tags[0].start()] if explained_after else text[start:]


def _in_a_name(tag: str, question: Question) -> bool:
    return any(tag in name for label in question.labels for name in (label.name, *label.aliases))


_ANSWER_TAG = r"(?:(?:final_?)?answer|conclusion|solution)"
_MARKERS = re.compile(
    rf"(?P<begin><{_ANSWER_TAG}>|<\|begin_of_box\|>)"
    r"|\${0,2}\\boxed\{(?:\\text\{)?(?P<boxed>[^{}]*)\}{1,2}\${0,2}"
    rf"|</{_ANSWER_TAG}>|<[|｜][^<>|｜\s]+[|｜]>|</?s>|<eos>|<end_of_(?:turn|utterance)>|\[/?INST\]|^[^\S\n]*```\w*[^\S\n]*$",
    re.IGNORECASE | re.MULTILINE,
)
"""What models and their servers write around an answer."""


def _without_markers(text: str, question: Question) -> str:
    def plain(marker: re.Match[str]) -> str:
        if _in_a_name(marker[0], question):
            return marker[0]
        return "\nANSWER:\n" if marker["begin"] else f"\nANSWER:\n{marker['boxed']}\n" if marker["boxed"] else "\n"

    return _MARKERS.sub(plain, text)


_MARKDOWN = r"[\s>*_#`~|•\u200b\ufeff-]*"
_ANSWER_LINE = re.compile(
    rf"{_MARKDOWN}(?:(?:the|my|final|correct)\s+)*answer[\s*_`]*(?:[:\uff1a\ufe55\u2236][\s*_`]*(?P<content>.*))?", re.IGNORECASE
)
_ANSWER_SENTENCE = re.compile(
    rf"{_MARKDOWN}(?:(?:the|my|final|correct)\s+)*answer\s+is\b[\s:\uff1a]*(?P<content>.+)", re.IGNORECASE
)


def _statements(text: str, question: Question) -> tuple[list[str], str]:
    """All that a text gives as its answer, and what it says before."""
    contents: list[str] = []
    rationale: str | None = None
    for start, end, fields in reversed(list(_json_answers(text))):
        contents.append(_answer_field(fields) or "")
        reasoning = fields.get("reasoning")
        rationale = reasoning if isinstance(reasoning, str) else text[:start].strip()
        text = f"{text[:start]}\n{text[end:]}"
    lines = text.splitlines()
    for pattern in (_ANSWER_LINE, _ANSWER_SENTENCE):
        for number, line in reversed(list(enumerate(lines))):
            match = pattern.fullmatch(line)
            if match and (found := [match["content"]] if match["content"] else _paragraph(lines[number + 1 :])):
                contents += [found[0], *(other for other in found[1:] if _choice(other, question) is not None)]
                return contents, "\n".join(lines[:number]).strip() if rationale is None else rationale
    written = [line for line in lines if line.strip()]
    if not contents and len(written) == 1:
        contents = written
    return contents, rationale or ""


def _paragraph(lines: Sequence[str]) -> list[str]:
    """The first lines that are not empty, up to one that is."""
    written = dropwhile(lambda line: not line.strip(), lines)
    return list(takewhile(lambda line: bool(line.strip()), written))


MOST_OBJECTS = 1000
"""How many places of a text are looked at for a JSON object: each failure takes time in proportion to the text."""


def _json_answers(text: str) -> Iterator[tuple[int, int, Mapping[str, object]]]:
    """The JSON objects with a field ``answer``, and where they begin and end."""
    decoder = json.JSONDecoder(strict=False)  # line breaks in strings are read
    after = 0
    for brace in islice(re.finditer(r'\{\s*"', text), MOST_OBJECTS):
        if brace.start() < after:
            continue
        try:
            value, end = decoder.raw_decode(text, brace.start())
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and _answer_field(value) is not None:
            yield brace.start(), end, value
            after = end


def _answer_field(fields: Mapping[str, object]) -> str | None:
    """What a JSON object gives as its answer: "" if that is no text; None if it has no such field."""
    for name, value in fields.items():
        if fold(name) in ("answer", "final answer"):
            return value if isinstance(value, str) else str(value) if type(value) is int else ""
    return None


def is_json_answer(text: str) -> bool:
    """Whether a text as a whole is a JSON object with an answer, whatever the answer."""
    if not text.lstrip().startswith("{"):
        return False
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and bool(_answer_field(value))


def concluding_answer(thoughts: str) -> str:
    """The last line of thoughts if it is an ``ANSWER: …`` line or JSON; else "": other lines of thoughts may be wrong ideas."""
    line = next((line for line in reversed(thoughts.splitlines()) if line.strip()), "")
    match = _ANSWER_LINE.fullmatch(line)
    return line if (match and match["content"]) or is_json_answer(line) else ""


_EDGE = r"[\W_]"
_KEY_FIRST = re.compile(
    rf"{_EDGE}*(?:(?:option|choice|candidate|letter|number){_EDGE}+)?(?P<key>[^\W_]+)(?:{_EDGE}+(?P<name>\S.*?))??{_EDGE}*",
    re.IGNORECASE,
)
_KEY_LAST = re.compile(rf"(?P<name>\S.*?){_EDGE}+(?P<key>[^\W_]+){_EDGE}*")
_NO_CANDIDATE = re.compile(
    r"(?:none|neither)(?: of (?:them|(?:these|those|the)"
    r"(?: (?:above|listed|given|options|candidates|choices|classes|labels|names))*))?"
)

MOST_BESIDE_A_NAME = 200
"""How much longer than the longest name an answer may be, in characters: longer text is no name, and costly to compare."""


def _choice(content: str, question: Question) -> int | None:
    """The position of the option that an answer names, by name before key; None where that is not exactly one."""
    named = one_line(content).strip("*_`")
    if all(len(named) > MOST_BESIDE_A_NAME + len(name) for option in _spellings(question) for name in option[EXACT]):
        return None
    if positions := _named(named, question):
        return positions[0] if len(positions) == 1 else None
    keys = list(options(question))
    for form in (_KEY_FIRST, _KEY_LAST):
        match = form.fullmatch(unicodedata.normalize("NFKC", named))
        if match and (key := match["key"].upper()) in keys:
            position, name = keys.index(key), match["name"]
            return position if name is None or _agrees(name, position, question) else None
    return None


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


_GRADES = (_exactly, _folded, _joined_up)
"""The ways to compare names, the most exact first. Two names are equal if their forms have a text in common."""

EXACT, FOLDED, JOINED_UP = range(len(_GRADES))

_Spellings: TypeAlias = tuple[frozenset[str], ...]
"""The names of one option: for each of `_GRADES`, their forms."""


def _spelt(*names: str) -> _Spellings:
    return tuple(frozenset[str]().union(*map(forms, names)) for forms in _GRADES)


_NONE = _spelt(NONE_OF_THESE)


@lru_cache(100_000)  # the labels of a label set come again and again
def _spellings_of(label: Label) -> _Spellings:
    whole_line = [f"{label.words}: {label.description}"] if label.description else []
    return _spelt(label.name, label.words, *label.aliases, *whole_line)


@once_per_question
def _spellings(question: Question) -> tuple[_Spellings, ...]:
    """The names of each option, in the order shown."""
    return (*map(_spellings_of, question.labels), *[_NONE] * question.offer_none)


def _named(name: str, question: Question) -> list[int]:
    """The positions of the options with that name, compared as exactly as gives any."""
    spellings, folded = _spellings(question), fold(name)
    is_another = _is_in_label_set(folded, question) and not any(folded in option[FOLDED] for option in spellings)
    for grade in (EXACT, FOLDED) if is_another else (EXACT, FOLDED, JOINED_UP):
        wanted = _GRADES[grade](name)
        if positions := [position for position, option in enumerate(spellings) if wanted & option[grade]]:
            return positions
    if question.offer_none and (is_another or _NO_CANDIDATE.fullmatch(folded)):
        return [len(question.labels)]
    return []


def _is_in_label_set(folded: str, question: Question) -> bool:
    return question.label_set is not None and folded in question.label_set.spellings


def _agrees(name: str, position: int, question: Question) -> bool:
    """Whether a name beside the key of an option is that option's, rightly spelt or nearly so."""
    if positions := _named(name, question):
        return position in positions
    if _is_in_label_set(fold(name), question):
        return False
    spellings = enumerate(_spellings(question))
    return [each for each, option in spellings if any(_nearly(fold(name), other) for other in option[FOLDED])] == [position]


def _nearly(name: str, other: str) -> bool:
    """Whether folded names are of words that differ by a slip of the pen: not in the first letter, and not in a number."""
    words, others = name.split(), other.split()
    return len(words) == len(others) and all(
        word == other or (word[0] == other[0] and word.isalpha() and SequenceMatcher(None, word, other).ratio() >= 0.75)
        for word, other in zip(words, others, strict=True)
    )

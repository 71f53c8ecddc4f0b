"""Reads answers: finds the option that a judge's text chooses."""

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import dropwhile, islice, takewhile

from cascadevlm.base.labels import Label, fold, one_line
from cascadevlm.base.types import Question
from cascadevlm.judges.prompt import EXACT, FOLDED, GRADES, JOINED_UP, options, spellings


@dataclass(frozen=True)
class Answer:
    """An answer of a judge.

    Attributes:
        label: the chosen label. None: "none of these".
        rationale: the text before the answer.
    """

    label: Label | None
    rationale: str


def read_answer(text: str, question: Question) -> Answer | None:
    """The answer in a text. None if the text names no option, or more than one.

    Only the text after the model's thoughts counts, see `after_thoughts`. The answer is searched in two places:

    - the field ``answer`` of a JSON object anywhere in the text;
    - the last line of the form ``ANSWER: …``, or the paragraph below such a line.

    If both exist, they must agree. If none exists, a text of a single line is the answer. The answer is the key of an option
    (``B``, ``(B)``), its name or alias, or both (``B) name``, ``name (B)``). Names are compared exactly, then without case,
    accents and punctuation, then without apostrophes, hyphens and spaces. A name next to its key may be misspelt. If "none of
    these" is an option, the name of a label that was not shown chooses it.
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
"""Matches tags around a model's thoughts. In a closing tag, one of the groups ``end``, ``ends`` and ``final`` matches."""


def after_thoughts(text: str, question: Question) -> str | None:
    """The text after the last closing tag of thoughts. None if the last opening tag has no closing tag.

    If nothing follows the closing tag, it is the text before the first opening tag. A tag that is part of a name is ordinary
    text. All tags in a text that is JSON as a whole are also ordinary text.
    """
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
"""Matches markers that models and servers write around an answer."""


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
    """All answers in a text, and the text before them."""
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
    """The first paragraph: leading empty lines are left out, and the next empty line ends it."""
    written = dropwhile(lambda line: not line.strip(), lines)
    return list(takewhile(lambda line: bool(line.strip()), written))


MOST_OBJECTS = 1000
"""Maximum number of positions in a text at which a JSON object is tried. The time of each try is proportional to the length of
the text.
"""


def _json_answers(text: str) -> Iterator[tuple[int, int, Mapping[str, object]]]:
    """The start, the end and the fields of each JSON object that has a field ``answer``."""
    decoder = json.JSONDecoder(strict=False)  # allows line breaks in strings
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
    """The field ``answer`` of a JSON object. "" if its value is not a text or an integer; None if there is no such field."""
    for name, value in fields.items():
        if fold(name) in ("answer", "final answer"):
            return value if isinstance(value, str) else str(value) if type(value) is int else ""
    return None


def is_json_answer(text: str) -> bool:
    """Whether the whole text is a JSON object with a field ``answer``. The answer itself is not checked."""
    if not text.lstrip().startswith("{"):
        return False
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and bool(_answer_field(value))


def concluding_answer(thoughts: str) -> str:
    """The last line of thoughts if it is JSON or has the form ``ANSWER: …``. "" for other lines: they may be rejected ideas."""
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
"""Maximum number of characters that an answer may have in addition to the longest name. Longer texts are not compared with
names.
"""


def _choice(content: str, question: Question) -> int | None:
    """The position of the option that an answer names. None if the answer names no option or several options. A name has
    priority over a key.
    """
    named = one_line(content).strip("*_`")
    if all(len(named) > MOST_BESIDE_A_NAME + len(name) for option in spellings(question) for name in option[EXACT]):
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


def _named(name: str, question: Question) -> list[int]:
    """The positions of the options with this name, by the most exact of `GRADES` that finds any."""
    offered, folded = spellings(question), fold(name)
    is_another = _is_in_label_set(folded, question) and not any(folded in option[FOLDED] for option in offered)
    for grade in (EXACT, FOLDED) if is_another else (EXACT, FOLDED, JOINED_UP):
        wanted = GRADES[grade](name)
        if positions := [position for position, option in enumerate(offered) if wanted & option[grade]]:
            return positions
    if question.offer_none and (is_another or _NO_CANDIDATE.fullmatch(folded)):
        return [len(question.labels)]
    return []


def _is_in_label_set(folded: str, question: Question) -> bool:
    return question.label_set is not None and folded in question.label_set.spellings


def _agrees(name: str, position: int, question: Question) -> bool:
    """Whether a name next to the key of an option belongs to this option. Small spelling mistakes are allowed."""
    if positions := _named(name, question):
        return position in positions
    if _is_in_label_set(fold(name), question):
        return False
    offered = enumerate(spellings(question))
    return [each for each, option in offered if any(_nearly(fold(name), other) for other in option[FOLDED])] == [position]


def _nearly(name: str, other: str) -> bool:
    """Whether two folded names differ only by small spelling mistakes. First letters and numbers must be equal."""
    words, others = name.split(), other.split()
    return len(words) == len(others) and all(
        word == other or (word[0] == other[0] and word.isalpha() and SequenceMatcher(None, word, other).ratio() >= 0.75)
        for word, other in zip(words, others, strict=True)
    )

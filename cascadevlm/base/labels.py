"""Label sets: the classes that an image may belong to, with their names and descriptions."""

import csv
import hashlib
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated_dataclass

from cascadevlm.base.errors import LabelError
from cascadevlm.base.html import card

FEW = 3
"""Number of labels in the short form of a label set."""


def one_line(text: str) -> str:
    """The text, with one space in place of each sequence of white space (including line breaks)."""
    return " ".join(text.split())


@lru_cache(100_000)
def fold(text: str) -> str:
    """The form in which names are compared: without case, accents and punctuation, and with single spaces.

    A name that consists only of punctuation keeps its punctuation.
    """
    decomposed = unicodedata.normalize(
        "NFKD", unicodedata.normalize("NFKD", text).casefold()
    )  # Unicode's compatibility caseless matching
    bare = "".join(c for c in decomposed if not unicodedata.combining(c))
    words = re.sub(r"[\W_]+", " ", bare).strip()
    return words or one_line(bare)


_NUMBER = re.compile(r"^(\d{3,}\.|n\d{8}-)(?=\D)")
"""The prefix of folder names in data sets: a number of at least three digits with a dot, or a WordNet id with a hyphen."""


@lru_cache(100_000)
def words(name: str) -> str:
    """The form of a name that a scorer and a judge see. Names are equal if their words are equal.

    The words are composed Unicode (NFC), without the prefix of a folder name and with spaces in place of underscores: "Red finch"
    for ``001.Red_finch`` or ``n90000001-Red_finch``. If no words would remain, the name is only composed and stripped.
    """
    composed = unicodedata.normalize("NFC", name).strip()
    return one_line(_NUMBER.sub("", composed, count=1).replace("_", " ")) or one_line(composed)


@validated_dataclass(frozen=True, kw_only=True, config={"extra": "forbid"})
class Label:
    """One class. The judge sees the `words` of the name; results contain the name.

    Attributes:
        name: name of the class.
        text: the text for this class in a scorer's templates. Default: the words of the name.
        aliases: other names that a judge may answer with.
        description: a description that is shown to the judge. Default: no description.
    """

    name: str
    text: str = ""
    aliases: tuple[str, ...] = ()
    description: str = ""

    @property
    def prompt_text(self) -> str:
        return self.text or self.words

    @property
    def words(self) -> str:
        """The words of the name."""
        return words(self.name)


_JSON_HINT = "Write a list of names, or of objects whose keys are name, text, aliases and description."


@dataclass(frozen=True)
class LabelSet:
    """An ordered set of labels. Label i belongs to column i of a score matrix.

    Raises:
        LabelError: if there is no label, if a name or an alias is empty, or if two labels have the same name or alias.
    """

    labels: tuple[Label, ...]

    def __post_init__(self) -> None:
        if not self.labels:
            raise LabelError("The label set is empty.", hint="Give at least one class name.")
        seen: set[str] = set()
        twice: dict[str, None] = {}
        for number, label in enumerate(self.labels, start=1):
            for name in {words(name) for name in (label.name, *label.aliases)}:
                if not name:
                    raise LabelError(f"Label {number} ({label.name!r}) has an empty name or alias.", hint="Write a name there.")
                if name in seen:
                    twice[name] = None
                seen.add(name)
        if twice:
            names = ", ".join(map(repr, twice))
            raise LabelError(
                f"The name {names} occurs twice." if len(twice) == 1 else f"{len(twice)} names occur twice: {names}.",
                hint="Keep one entry per class. If two classes have the same name, make the names different: 'crane (bird)'.",
            )

    @classmethod
    def of(cls, labels: "LabelSet | Iterable[str | Label]") -> "LabelSet":
        """Make a label set from names, labels or another label set.

        Raises:
            LabelError: if the argument is none of these.
        """
        if isinstance(labels, LabelSet):
            return labels
        if isinstance(labels, str):
            raise LabelError(f"{labels!r} is one name, not a list.", hint="Use LabelSet.read for a file.")
        if not isinstance(labels, Iterable) or hasattr(labels, "columns"):
            raise LabelError(
                f"labels has the type {type(labels).__name__!r}; it must be a list.", hint="Use LabelSet.read for a file."
            )
        listed = tuple(Label(name=label) if isinstance(label, str) else label for label in labels)
        for label in listed:
            if not isinstance(label, Label):
                raise LabelError(f"A label must be a name or a Label, not {label!r}.", hint="Convert it to a string.")
        return cls(listed)

    @classmethod
    def read(cls, path: str | Path) -> "LabelSet":
        """Read a label set from a file or a folder.

        The suffix of the file decides its format:

        - Text: one name per line. The names may be numbered from 0 or 1. A line may also contain a WordNet id and names, as in
          ImageNet's ``synset_words.txt``.
        - ``.csv`` (with commas, semicolons or tabs) and ``.tsv``: a table whose first line is a header. The column ``name`` (or
          ``species``, ``label`` or ``class``) is required. The columns ``text``, ``aliases`` (separated by ``|``) and
          ``description`` are optional. Other columns are ignored.
        - ``.json``: a list of names, or of objects with these keys.
        - ``.jsonl``: one name or object per line.
        - A folder: the sorted names of its sub-folders.

        Raises:
            LabelError: if the path cannot be read, or if its labels are not a valid label set.
        """
        path = Path(path)
        try:
            labels = _read_folder(path) if path.is_dir() else _read_file(path)
            if labels and all(_WORDNET_ID.fullmatch(label.prompt_text) for label in labels):
                raise LabelError(
                    "The names are WordNet ids, which no scorer knows.", hint="Write lines such as 'n01440764 tench'."
                )
            return cls(tuple(labels))
        except (OSError, ValueError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else str(exc)
            if isinstance(exc, UnicodeDecodeError):
                raise LabelError(f"Labels file {str(path)!r} is not UTF-8 text.", hint="Save it as UTF-8.") from exc
            if isinstance(exc, ValidationError):
                raise LabelError(f"Labels file {str(path)!r}, {_fault(exc)}.", hint=_JSON_HINT) from exc
            raise LabelError(
                f"Labels file {str(path)!r} cannot be read: {reason}.", hint="Check the path and its content."
            ) from exc
        except LabelError as exc:
            raise LabelError(f"Labels {str(path)!r}: {exc}") from exc

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(label.name for label in self.labels)

    @cached_property
    def columns(self) -> dict[str, int]:
        """The column of each name."""
        return {name: number for number, name in enumerate(self.names)}

    @cached_property
    def by_words(self) -> dict[str, str]:
        """The name of each label by the words of its name and of its aliases."""
        return {words(name): label.name for label in self.labels for name in (*label.aliases, label.name)}

    @cached_property
    def spellings(self) -> frozenset[str]:
        """All names and aliases, in the form of `fold`."""
        return frozenset(fold(name) for label in self.labels for name in (label.name, *label.aliases))

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """C strings: the text for each label in a scorer's templates."""
        return tuple(one_line(label.prompt_text) for label in self.labels)

    @cached_property
    def texts_digest(self) -> str:
        """The sha256 of all names with their texts, in column order, in hexadecimal."""
        return hashlib.sha256(json.dumps([*zip(self.names, self.texts, strict=True)]).encode()).hexdigest()

    @cached_property
    def texts_part(self) -> str:
        """The part of a scorer's fingerprint that names the texts."""
        return f"texts={self.texts_digest[:12]}"

    @cached_property
    def descriptions_digest(self) -> str:
        """The sha256 of the descriptions, in column order, in hexadecimal; "" if no label has a description."""
        descriptions = [one_line(label.description) for label in self.labels]
        return hashlib.sha256(json.dumps(descriptions).encode()).hexdigest() if any(descriptions) else ""

    @cached_property
    def digest(self) -> str:
        """The sha256 of the spellings, in hexadecimal."""
        return hashlib.sha256(json.dumps(sorted(self.spellings)).encode()).hexdigest()

    def __reduce__(self) -> tuple[type["LabelSet"], tuple[tuple[Label, ...]]]:
        """Copies and pickles have the labels alone: equal label sets have equal pickles, whatever was computed from them."""
        return LabelSet, (self.labels,)

    def __repr__(self) -> str:
        more = ", …" if len(self) > FEW else ""
        return f"LabelSet({len(self)} labels: {', '.join(map(repr, self.names[:FEW]))}{more})"

    def _repr_html_(self) -> str:
        return card(f"{len(self)} labels", {"names": self.names})

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[Label]:
        return iter(self.labels)

    def __getitem__(self, index: int) -> Label:
        return self.labels[index]


NAME_COLUMNS = ("name", "species", "label", "class")
"""Allowed headers for the column of names. The first of these that a table contains is used."""

_ENTRIES = TypeAdapter(list[str | Label])
_NOT_READ = frozenset({".yaml", ".yml", ".toml", ".xml", ".html", ".py", ".pbtxt", ".xls", ".xlsx", ".ods", ".parquet"})
_LISTED = re.compile(r"""[\[{]\s*["'\[{\d].*[\]}]""", re.DOTALL)
_QUOTED = re.compile(r"""(["']).*\1,?|.+,""")
_WORDNET_ID = re.compile(r"n\d{8}")
_SYNSET = re.compile(r"(n\d{8})\s+(.+)")
_NUMBER_BEFORE = re.compile(r"(?P<number>\d{1,9})[\s.:,;=)]\s*(?P<name>.+)")
_NUMBER_AFTER = re.compile(r"(?P<name>.*\S)[\s:,;=]\s*(?P<number>\d{1,9})")


def _read_folder(path: Path) -> list[Label]:
    return [Label(name=entry.name) for entry in sorted(path.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]


def _read_file(path: Path) -> list[Label]:
    if path.suffix.lower() in _NOT_READ:
        raise LabelError(f"{path.suffix} files are not supported.", hint="Write the names to a text file, one per line.")
    with path.open(encoding="utf-8-sig", newline="") as file:
        text = file.read()
    if "\0" in text:
        raise LabelError("The file is not UTF-8 text.", hint="Save it as UTF-8.")
    match path.suffix.lower():
        case ".csv" | ".tsv":
            return _read_table(text)
        case ".json":
            return _read_json(text)
        case ".jsonl" | ".ndjson":
            return _read_json(f"[{','.join(_lines(text))}]")
    return _read_lines(text)


def _lines(text: str) -> list[str]:
    """The lines that are not empty. `str.splitlines` would also divide lines at U+2028, which is no line break in a file."""
    return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def _read_lines(text: str) -> list[Label]:
    lines = _lines(text)
    one_line_list = len(lines) == 1 and "," in lines[0]
    if one_line_list or _LISTED.fullmatch(text.strip()) or (lines and all(map(_QUOTED.fullmatch, lines[:-1] or lines))):
        raise LabelError(
            "The text is a list; it must have one name per line.",
            hint="Remove the quotes and the commas at the ends of lines, or write a JSON list to a .json file.",
        )
    if all(synsets := [_SYNSET.fullmatch(line) for line in lines]):
        names = _unnumbered([found[2] for found in synsets if found])
        return _synsets([(found[1], *name.split(", ")) for found, name in zip(synsets, names, strict=True) if found])
    return [Label(name=name) for name in _unnumbered(lines)]


def _unnumbered(lines: list[str]) -> list[str]:
    """The names without their numbers, if all names have a number and the numbers count up from 0 or 1."""
    for form in (_NUMBER_BEFORE, _NUMBER_AFTER):
        found = [match for line in lines if (match := form.fullmatch(line))]
        names, numbers = [match["name"] for match in found], [int(match["number"]) for match in found]
        if len(lines) == len({*names}) > 1 and numbers in (list(range(len(lines))), list(range(1, len(lines) + 1))):
            return names
    return lines


def _synsets(classes: list[tuple[str, ...]]) -> list[Label]:
    """Labels made from WordNet ids and names. A further name is left out if several classes have it, because it is ambiguous."""
    counts = Counter(words(name) for names in classes for name in {*names})
    return [
        Label(name=name, aliases=(number, *(other for other in others if counts[words(other)] == 1)))
        for number, name, *others in classes
    ]


def _read_json(text: str) -> list[Label]:
    return [Label(name=item) if isinstance(item, str) else item for item in _ENTRIES.validate_json(text)]


def _fault(exc: ValidationError) -> str:
    """The place and the error of the first entry that cannot be read. The last error of an entry belongs to the object form."""
    errors = exc.errors()
    entry = errors[0]["loc"][:1]
    last = [error for error in errors if error["loc"][:1] == entry][-1]
    where = "".join(f"entry {int(number) + 1}, " for number in entry) + "".join(f"key {key!r}, " for key in last["loc"][2:3])
    return f"{where.removesuffix(', ') or 'the file'}: {last['msg']}"


def _read_table(text: str) -> list[Label]:
    stated = re.match(r"sep=(.)[\r\n]+", text)  # Excel writes this line
    text = text[stated.end() :] if stated else text
    head = _lines(text)[:1]
    delimiter = stated[1] if stated else max(",;\t", key=head[0].count) if head else ","
    try:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header, *rows = [row for row in lines if any(cell.strip() for cell in row)]
    except (csv.Error, ValueError) as exc:  # ValueError: without a header, there is no row to unpack
        raise LabelError(
            f"The table cannot be read: {exc}." if head else "The table is empty.", hint="Save it again, as CSV with a header."
        ) from exc
    columns = [column.strip().lower() for column in header]
    if longer := [row for row in rows if any(cell.strip() for cell in row[len(columns) :])]:
        raise LabelError(f"A row has more cells than the header: {longer[0]!r:.80}.", hint="Put texts with commas in quotes.")
    name = next((name for name in NAME_COLUMNS if name in columns), None)
    if name is None:
        raise LabelError(
            f"The header has the unknown column {header[0]!r:.80} and no column for the names.",
            hint=f"The first line must name the columns. Call the column of names one of {', '.join(NAME_COLUMNS)}.",
        )

    cells = [dict(zip(columns, row, strict=False)) for row in rows]
    if name != "name" and len(columns) > 1 and cells and all(row.get(name, "").strip().isdecimal() for row in cells):
        raise LabelError(f"The column {name!r} contains numbers.", hint="Use the header 'name' for the column of names.")
    return [
        Label(
            name=row.get(name, "").strip(),
            text=row.get("text", ""),
            aliases=tuple(alias.strip() for alias in row.get("aliases", "").split("|") if alias.strip()),
            description=row.get("description", ""),
        )
        for row in cells
    ]

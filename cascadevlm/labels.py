"""Label sets: the classes an image may be of, and what is known of each."""

import csv
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated_dataclass

from cascadevlm.errors import LabelError


def one_line(text: str) -> str:
    """The text with every run of white space, line breaks included, made one space."""
    return " ".join(text.split())


@lru_cache(100_000)
def fold(text: str) -> str:
    """The form in which names are compared: no case, accents or punctuation, single spaces.

    A name made of punctuation alone keeps it, since nothing else would be left to compare.
    """
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())  # as Unicode matches caselessly
    bare = "".join(c for c in decomposed if not unicodedata.combining(c))
    words = re.sub(r"[\W_]+", " ", bare).strip()
    return words or one_line(bare)


@validated_dataclass(frozen=True, kw_only=True, config={"extra": "forbid"})
class Label:
    """One class: its ``name``, the ``text`` a scorer is prompted with (the name, unless given), other names a judge may
    answer with, and a description shown to the judge."""

    name: str
    text: str = ""
    aliases: tuple[str, ...] = ()
    description: str = ""

    @property
    def prompt_text(self) -> str:
        return self.text or self.name


@dataclass(frozen=True)
class LabelSet:
    """An ordered set of labels; the columns of a score matrix.

    Raises:
        LabelError: if there is no label, a name or alias is empty, or two labels share one.
    """

    labels: tuple[Label, ...]

    def __post_init__(self) -> None:
        if not self.labels:
            raise LabelError("The label set is empty.", hint="Give at least one class name.")
        seen: set[str] = set()
        for number, label in enumerate(self.labels, start=1):
            for name in {one_line(name) for name in (label.name, *label.aliases)}:
                if not name:
                    raise LabelError(f"Label {number} ({label.name!r}) has an empty name or alias.", hint="Fill it in.")
                if name in seen:
                    raise LabelError(f"The name {name!r} is there twice.", hint="Keep one of the two labels.")
                seen.add(name)

    @classmethod
    def of(cls, labels: "LabelSet | Iterable[str | Label]") -> "LabelSet":
        """A label set from names, labels or another label set."""
        if isinstance(labels, LabelSet):
            return labels
        if isinstance(labels, str):
            raise LabelError(f"{labels!r} is one name, not a list.", hint="Use LabelSet.read for a file.")
        return cls(tuple(Label(name=label) if isinstance(label, str) else label for label in labels))

    @classmethod
    def read(cls, path: str | Path) -> "LabelSet":
        """A label set from a file or folder.

        Text files hold a name a line. CSV has a header with ``name`` and, optionally, ``text``, ``aliases`` (separated by
        ``|``) and ``description``. JSON is a list of names or of objects with those keys. Of a folder, the names of its
        sub-folders are taken, sorted.

        Raises:
            LabelError: if the path cannot be read as such, or its labels are no label set.
        """
        path = Path(path)
        try:
            if path.is_dir():
                labels = [Label(name=entry.name) for entry in sorted(path.iterdir()) if _is_class(entry)]
            elif path.suffix.lower() == ".csv":
                labels = _read_csv(path)
            elif path.suffix.lower() == ".json":
                items = TypeAdapter(list[str | Label]).validate_json(path.read_bytes())
                labels = [Label(name=item) if isinstance(item, str) else item for item in items]
            else:
                lines = path.read_text(encoding="utf-8-sig").splitlines()
                labels = [Label(name=line.strip()) for line in lines if line.strip()]
            return cls(tuple(labels))
        except OSError as exc:
            raise LabelError(f"Labels file {str(path)!r} cannot be read: {exc.strerror}.") from exc
        except UnicodeDecodeError as exc:
            raise LabelError(f"Labels file {str(path)!r} is not UTF-8 text.", hint="Save it as UTF-8.") from exc
        except ValidationError as exc:
            last = exc.errors()[-1]  # an entry is tried as a name first, as an object last
            where = ".".join(map(str, last["loc"]))
            raise LabelError(f"Labels file {str(path)!r}, entry {where}: {last['msg']}.") from exc
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
    def spellings(self) -> frozenset[str]:
        """Every name and alias, as they are compared."""
        return frozenset(fold(name) for label in self.labels for name in (label.name, *label.aliases))

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """C texts: what stands for each label in a scorer's templates."""
        return tuple(one_line(label.prompt_text) for label in self.labels)

    @cached_property
    def texts_digest(self) -> str:
        """sha256 of every name with its text, in column order, in hexadecimal."""
        return hashlib.sha256(json.dumps([*zip(self.names, self.texts, strict=True)]).encode()).hexdigest()

    @cached_property
    def descriptions_digest(self) -> str:
        """sha256 of the descriptions, in column order, in hexadecimal; empty where no label has one."""
        descriptions = [one_line(label.description) for label in self.labels]
        return hashlib.sha256(json.dumps(descriptions).encode()).hexdigest() if any(descriptions) else ""

    @cached_property
    def digest(self) -> str:
        """sha256 of the spellings, in hexadecimal."""
        return hashlib.sha256(json.dumps(sorted(self.spellings)).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[Label]:
        return iter(self.labels)

    def __getitem__(self, index: int) -> Label:
        return self.labels[index]


def _is_class(entry: Path) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


def _read_csv(path: Path) -> list[Label]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        unknown = set(reader.fieldnames or ()) - {"name", "text", "aliases", "description"}
        if unknown or "name" not in (reader.fieldnames or ()):
            wrong = f"has the unknown column {min(unknown)!r}" if unknown else "lacks the column 'name'"
            raise LabelError(f"The header {wrong}.", hint="Columns are name, text, aliases, description.")
        return [
            Label(
                name=row["name"] or "",
                text=row.get("text") or "",
                aliases=tuple(alias.strip() for alias in (row.get("aliases") or "").split("|") if alias.strip()),
                description=row.get("description") or "",
            )
            for row in reader
        ]

"""Reads annotated images from JSON files: COCO, exports of Label Studio, and lists of objects. The file is read as a whole."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Annotated, TypeAlias
from urllib.parse import parse_qs, urlsplit

from pydantic import AwareDatetime, BaseModel, Field, JsonValue, TypeAdapter, ValidationError

from cascadevlm.base.remote import opened
from cascadevlm.base.tables import Row, TextTable, few, reading

LOCAL_FILES = "/data/local-files/"
"""Label Studio's address for files on its machine. Their path below the document root stands in the query."""

CHOICE, OTHER = "choice", "other"
"""Names of the two controls in the tasks of a run. They differ from all names in the data of a task, because Label Studio's short
export mixes both."""

ANOTHER = "another label"
"""The choice that shows the list of all labels."""

NONE = "none of the labels"
"""The choice for an image that shows none of the labels."""


class _CocoImage(BaseModel, extra="allow"):
    id: int | str
    file_name: str


class _Category(BaseModel):
    id: int
    name: str


class _Annotation(BaseModel):
    image_id: int | str
    category_id: int


class _Coco(BaseModel):
    images: list[_CocoImage]
    annotations: list[_Annotation] = []
    categories: list[_Category] = []

    def rows(self) -> Iterator[dict[str, object]]:
        """One row per image: its fields with ``path`` for ``file_name``, and ``label``, the name of its category.

        Raises:
            ValueError: if images have the same id, or an annotation belongs to no image.
        """
        names = {category.id: category.name for category in self.categories}
        found: dict[int | str, list[str]] = {}
        for each in self.annotations:
            labels = found.setdefault(each.image_id, [])
            if (name := names.get(each.category_id, "")) not in labels:
                labels.append(name)
        ids = Counter(image.id for image in self.images)
        if twice := [_with_type(each) for each, count in ids.items() if count > 1]:
            raise ValueError(f"several images have the same id: {few(twice)}")
        if unknown := [_with_type(each) for each in found if each not in ids]:
            known = few(map(_with_type, ids)) or "none"
            raise ValueError(f"annotations have an image_id that no image has: {few(unknown)}; ids of images: {known}")
        for image in self.images:
            labels = found.get(image.id, [])
            yield {**dict(image), "path": image.file_name, "label": labels[0] if len(labels) == 1 else labels or None}


def _with_type(image_id: int | str) -> str:
    return f"{image_id} ({'text' if isinstance(image_id, str) else 'number'})"


class _Value(BaseModel):
    choices: list[str] = []
    taxonomy: list[list[str]] = []


class _Result(BaseModel):
    value: _Value = _Value()


class Person(BaseModel):
    """A person in Label Studio."""

    id: int
    email: str = ""


class Annotation(BaseModel):
    """What one person said about a task of Label Studio.

    Attributes:
        was_cancelled: true if the person skipped the task.
    """

    completed_by: int | Person | None = None
    result: list[_Result] = []
    was_cancelled: bool = False
    updated_at: AwareDatetime | None = None

    @property
    def labels(self) -> tuple[str | None, ...]:
        """The labels; None stands for `NONE`. Empty if the person gave no label."""
        return () if self.was_cancelled else _labels([result.value for result in self.result])


class Task(BaseModel):
    """A task in the export JSON of Label Studio."""

    id: int | None = None
    data: dict[str, JsonValue]
    annotations: list[Annotation] = []

    @property
    def image(self) -> str:
        """The name of the image, which is ``path`` in the tasks of an export of a run."""
        return str(self.data.get("path") or self.data.get("image") or "")

    def row(self) -> dict[str, object]:
        """The data of the task, ``id``, and ``label``: the label of the last annotation with a label."""
        said = [each.labels for each in self.annotations if each.labels]
        told = {name: _local(value) for name, value in self.data.items()}
        return {"id": self.id, **told, "label": _label(said[-1] if said else ())}


class ShortAnnotation(BaseModel):
    """One annotation in the export JSON-MIN of Label Studio, with the controls `CHOICE` and `OTHER`."""

    id: int
    path: str = ""
    image: str = ""
    choice: str | _Value | None = None
    other: list[_Value] = []
    annotator: int | None = None
    updated_at: AwareDatetime

    @property
    def labels(self) -> tuple[str | None, ...]:
        """As in `Annotation`."""
        choice = _Value(choices=[self.choice]) if isinstance(self.choice, str) else self.choice or _Value()
        return _labels([choice, *self.other])


def _labels(values: Sequence[_Value]) -> tuple[str | None, ...]:
    """The labels of an annotation. A label from the list of all labels counts only if the choice is `ANOTHER`."""
    choices = [name for value in values for name in value.choices]
    listed = [path[-1] for value in values for path in value.taxonomy if path]
    names = listed if choices in ([], [ANOTHER]) else choices
    return tuple(None if name == NONE else name for name in dict.fromkeys(names))


def _label(labels: Sequence[str | None]) -> object:
    """One label, a list of several labels, or None."""
    return labels[0] if len(labels) == 1 else [*labels] or None


def _row_of(fields: Mapping[str, JsonValue]) -> dict[str, object]:
    """A row of a list of objects. The export JSON-MIN of a run's tasks has the label of a person in `CHOICE` and `OTHER`."""
    row: dict[str, object] = {name: _local(value) for name, value in fields.items()}
    if {"id", "updated_at", CHOICE} <= fields.keys():
        row["label"] = _label(ShortAnnotation.model_validate(fields).labels)
    return row


_Form: TypeAlias = Annotated[_Coco | list[Task] | list[dict[str, JsonValue]], Field(union_mode="left_to_right")]
_FORM: TypeAdapter[_Form] = TypeAdapter(_Form)


def _local(value: JsonValue) -> JsonValue:
    """The path of a file that Label Studio serves; other values unchanged."""
    if isinstance(value, str) and value.startswith(LOCAL_FILES):
        return parse_qs(urlsplit(value).query).get("d", [value])[0]
    return value


class AnnotationFile(TextTable):
    """A JSON file: COCO, an export of Label Studio (JSON or JSON-MIN), or a list of objects."""

    @cached_property
    def _rows(self) -> Sequence[Mapping[str, object]]:
        with reading(self.place), opened(self.place) as file:
            try:
                read = _FORM.validate_python(json.load(file))
            except ValidationError as exc:
                told = "it is neither COCO, nor an export of Label Studio, nor a list of objects"
                raise ValueError(told) from exc
            if isinstance(read, _Coco):
                return [*read.rows()]
            return [each.row() if isinstance(each, Task) else _row_of(each) for each in read]

    @cached_property
    def columns(self) -> Sequence[str]:
        return tuple(dict.fromkeys(name for row in self._rows for name in row))

    @property
    def image(self) -> str | None:
        return next((name for name in ("path", "image") if name in self.columns), None)

    def lines(self) -> Iterator[tuple[int, Mapping[str, object]]]:
        return enumerate(self._rows, start=1)

    def where(self, row: Row) -> str:
        return f"entry {row.where}"

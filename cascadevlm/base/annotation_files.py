"""Reads annotated images from JSON files: COCO, exports of Label Studio, and lists of objects. The file is read as a whole."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Annotated, TypeAlias
from urllib.parse import parse_qs, urlsplit

from pydantic import BaseModel, Field, JsonValue, TypeAdapter, ValidationError

from cascadevlm.base.remote import opened
from cascadevlm.base.tables import Row, TextTable, reading

LOCAL_FILES = "/data/local-files/"
"""Label Studio's address for files on its machine. Their path below the document root stands in the query."""


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
        """One row per image: its fields with ``path`` for ``file_name``, and ``label``, the name of its category."""
        names = {category.id: category.name for category in self.categories}
        found: dict[int | str, list[str]] = {}
        for each in self.annotations:
            labels = found.setdefault(each.image_id, [])
            if (name := names.get(each.category_id, "")) not in labels:
                labels.append(name)
        for image in self.images:
            labels = found.get(image.id, [])
            yield {**dict(image), "path": image.file_name, "label": labels[0] if len(labels) == 1 else labels or None}


class _Value(BaseModel):
    choices: list[str] = []


class _Region(BaseModel):
    value: _Value = _Value()


class _Given(BaseModel):
    result: list[_Region] = []
    was_cancelled: bool = False


class _Task(BaseModel):
    """A task of Label Studio."""

    id: int | None = None
    data: dict[str, JsonValue]
    annotations: list[_Given] = []

    def row(self) -> dict[str, object]:
        """The data of the task, ``id``, and ``label``: the choice of the last annotation that was not cancelled."""
        chosen = [
            region.value.choices
            for given in self.annotations
            if not given.was_cancelled
            for region in given.result
            if region.value.choices
        ]
        label = chosen[-1] if chosen else None
        told = {name: _local(value) for name, value in self.data.items()}
        return {"id": self.id, **told, "label": label[0] if label and len(label) == 1 else label}


_Form: TypeAlias = Annotated[_Coco | list[_Task] | list[dict[str, JsonValue]], Field(union_mode="left_to_right")]
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
        return [each.row() if isinstance(each, _Task) else each for each in read]

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

"""The forms of Label Studio: tasks with suggestions, the configuration for labelling them, and what people labelled.

A person picks one of the candidates with one click. For all other labels, the person picks `ANOTHER`, and finds the label in a
list with a search field. So a label set with thousands of labels can be used, and its names are in the configuration only once.
"""

import html
from collections.abc import Iterator
from datetime import datetime
from typing import NamedTuple
from xml.etree import ElementTree

from pydantic import AwareDatetime, BaseModel, JsonValue, TypeAdapter

from cascadevlm.runs.lines import Line

CHOICE, OTHER = "choice", "other"
"""Names of the two controls. They differ from all names in the data of a task, because Label Studio's short export mixes both."""

ANOTHER = "another label"
"""The choice that shows the list of all labels."""

NONE, SKIP = "none", "skip"
"""Words in place of a label: the image shows none of the labels; the person did not decide."""


class Said(NamedTuple):
    """A statement in a file.

    Attributes:
        where: its place in the file, for messages.
        image: name or path of the image.
        labels: the names of labels, or `NONE` or `SKIP`. Exactly one is right; none is an image without a statement.
        by: the person; "" if unknown.
        at: the time of the statement.
    """

    where: str
    image: str
    labels: tuple[str, ...]
    by: str
    at: datetime


def config_of(labels: tuple[str, ...]) -> ElementTree.Element:
    """The configuration for labelling, with all labels."""
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", name="image", value="$image")
    ElementTree.SubElement(view, "Choices", name=CHOICE, toName="image", choice="single", required="true", value="$choices")
    shown = {"visibleWhen": "choice-selected", "whenTagName": CHOICE, "whenChoiceValue": ANOTHER}
    hidden = ElementTree.SubElement(view, "View", shown)
    listed = {"name": OTHER, "toName": "image", "maxUsages": "1", "minWidth": "400px", "placeholder": "Search all labels"}
    taxonomy = ElementTree.SubElement(hidden, "Taxonomy", listed)
    for name in labels:
        ElementTree.SubElement(taxonomy, "Choice", value=name)
    ElementTree.SubElement(view, "Text", name="reasoning", value="$reasoning")
    ElementTree.indent(view)
    return view


def task_of(line: Line, columns: dict[str, JsonValue], *, image: str, run: str) -> dict[str, JsonValue]:
    """The task of an image: its candidates with their probabilities, and what the judge said about them.

    Args:
        line: the prediction.
        columns: further data of the task.
        image: address of the image in Label Studio.
        run: name of the run, which becomes the ``model_version`` of the prediction.
    """
    probabilities = {candidate.label: f"{candidate.probability:.0%}" for candidate in line.ranked}
    names = [*dict.fromkeys((*probabilities, *([line.label] if line.label is not None else [])))]
    choices: list[JsonValue] = [
        {"value": name, "html": html.escape(f"{name}  {probabilities.get(name, '')}".rstrip())} for name in names
    ]
    choices.append({"value": ANOTHER})
    if NONE not in names:
        choices.append({"value": NONE, "html": "none of the labels"})
    said = [f"{each.judge}: {each.rationale or each.text or each.error or each.outcome}" for each in line.verdicts]
    data: JsonValue = {**columns, "image": image, "choices": choices, "reasoning": "\n".join(said) or "No judge was asked."}
    if line.label is None:
        return {"data": data}
    choice: JsonValue = {"from_name": CHOICE, "to_name": "image", "type": "choices", "value": {"choices": [line.label]}}
    return {"data": data, "predictions": [{"model_version": run, "score": line.confidence, "result": [choice]}]}


class _Person(BaseModel):
    id: int
    email: str = ""


class _Value(BaseModel):
    choices: list[str] = []
    taxonomy: list[list[str]] = []


class _Result(BaseModel):
    value: _Value


class _Annotation(BaseModel):
    completed_by: int | _Person | None = None
    result: list[_Result]
    was_cancelled: bool = False
    updated_at: AwareDatetime


class _Data(BaseModel):
    """The image of a task: ``path`` in tasks of `task_of`."""

    path: str = ""
    image: str = ""


class _Task(BaseModel):
    id: int
    data: _Data
    annotations: list[_Annotation]


class _ShortAnnotation(_Data):
    """One annotation in the export JSON_MIN."""

    id: int
    choice: str | None = None
    other: list[_Value] = []
    annotator: int | None = None
    updated_at: AwareDatetime


_TASKS = TypeAdapter(list[_Task])
_SHORT = TypeAdapter(list[_ShortAnnotation])


def read_annotations(content: list[JsonValue]) -> Iterator[Said]:
    """The statements in an export in the form JSON or JSON_MIN.

    Raises:
        ValueError: if the content has neither form.
    """
    if any(isinstance(task, dict) and "annotations" in task for task in content):
        for task in _TASKS.validate_python(content):
            for each in task.annotations:
                choices = [name for result in each.result for name in result.value.choices]
                paths = [path for result in each.result for path in result.value.taxonomy]
                labels = (SKIP,) if each.was_cancelled else _labels(choices, paths)
                name, person = task.data.path or task.data.image, _name_of(each.completed_by)
                yield Said(f"task {task.id}", name, labels, person, each.updated_at)
    else:
        for short in _SHORT.validate_python(content):
            labels = _labels([*filter(None, [short.choice])], [path for value in short.other for path in value.taxonomy])
            yield Said(f"task {short.id}", short.path or short.image, labels, _name_of(short.annotator), short.updated_at)


def _labels(choices: list[str], paths: list[list[str]]) -> tuple[str, ...]:
    """The labels of an annotation. A label from the list of all labels counts only if the choice is `ANOTHER`."""
    return tuple(path[-1] for path in paths) if choices in ([], [ANOTHER]) else tuple(choices)


def _name_of(person: int | _Person | None) -> str:
    """The e-mail address of a person or, if it is unknown, the number in Label Studio."""
    if isinstance(person, _Person):
        return person.email or f"user {person.id}"
    return "" if person is None else f"user {person}"

"""The forms of Label Studio: tasks with suggestions, the configuration for labelling them, and what people labelled.

A person picks one of the candidates with one click. For all other labels, the person picks `ANOTHER`, and finds the label in a
list with a search field. So a label set with thousands of labels can be used, and its names are in the configuration only once.
"""

import html
from collections.abc import Iterator
from datetime import datetime
from typing import NamedTuple
from xml.etree import ElementTree

from pydantic import JsonValue, TypeAdapter

from cascadevlm.base.annotation_files import ANOTHER, CHOICE, NONE, OTHER, Person, ShortAnnotation, Task
from cascadevlm.runs.lines import Line

TAKEN = ("image", "choices", "reasoning", CHOICE, OTHER)
"""Names in the data of a task, and of the controls. Further data of a task have other names."""


class Said(NamedTuple):
    """A statement in a file.

    Attributes:
        where: its place in the file, for messages.
        image: name or path of the image.
        labels: the names of labels; None if the image shows none of the labels. More than one label is an error.
        skipped: true if the person did not decide. Without labels, and if this is false, the file says nothing about the image.
        by: the person; "" if unknown.
        at: the time of the statement.
    """

    where: str
    image: str
    labels: tuple[str | None, ...]
    skipped: bool
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
    choices += [{"value": ANOTHER}, {"value": NONE}]
    said = [f"{each.judge}: {each.rationale or each.text or each.error or each.outcome}" for each in line.verdicts]
    data: JsonValue = {**columns, "image": image, "choices": choices, "reasoning": "\n".join(said) or "No judge was asked."}
    if line.label is None:
        return {"data": data}
    choice: JsonValue = {"from_name": CHOICE, "to_name": "image", "type": "choices", "value": {"choices": [line.label]}}
    return {"data": data, "predictions": [{"model_version": run, "score": line.confidence, "result": [choice]}]}


_TASKS = TypeAdapter(list[Task])
_SHORT = TypeAdapter(list[ShortAnnotation])


def read_annotations(content: list[JsonValue], changed: datetime) -> Iterator[Said]:
    """The statements in an export in the form JSON or JSON_MIN.

    Args:
        content: the export.
        changed: the time of annotations without a time.

    Raises:
        ValueError: if the content has neither form.
    """
    if any(isinstance(task, dict) and "annotations" in task for task in content):
        for task in _TASKS.validate_python(content):
            for each in task.annotations:
                person, at = _name_of(each.completed_by), each.updated_at or changed
                yield Said(f"task {task.id}", task.image, each.labels, each.was_cancelled, person, at)
    else:
        for short in _SHORT.validate_python(content):
            name, person = short.path or short.image, _name_of(short.annotator)
            yield Said(f"task {short.id}", name, short.labels, skipped=False, by=person, at=short.updated_at)


def _name_of(person: int | Person | None) -> str:
    """The e-mail address of a person or, if it is unknown, the number in Label Studio."""
    if isinstance(person, Person):
        return person.email or f"user {person.id}"
    return "" if person is None else f"user {person}"

"""Builds scorers, judges and prompts from specs and names."""

import inspect
from pathlib import Path
from types import ModuleType
from typing import Literal, TypeVar, cast

from pydantic import ConfigDict, JsonValue, TypeAdapter, ValidationError

from cascadevlm.base.entry_points import Option, installed, load, nearest
from cascadevlm.base.errors import BackendError, PromptError
from cascadevlm.base.secrets import without_secrets
from cascadevlm.base.types import Prompt
from cascadevlm.config import DEFAULT_SCORER
from cascadevlm.judges.base import Judge
from cascadevlm.judges.prompt import packaged_prompt, read_prompt
from cascadevlm.scorers.base import Scorer

T = TypeVar("T", Scorer, Judge)


def load_scorer(spec: str, /, **options: Option) -> Scorer:
    """Make the scorer that a spec names. Its model is not loaded yet.

    Args:
        spec: ``backend:model``.
        options: options of the backend.

    Raises:
        BackendError: if the backend is unknown, if its package is missing, or if an option is unknown or has a wrong value.
    """
    scorer = cast(Scorer, _load("scorers", spec, options))
    scorer.spec = spec
    return scorer


def load_judge(spec: str, /, **options: Option) -> Judge:
    """Make the judge that a spec names. The arguments and errors are the same as in `load_scorer`."""
    judge = cast(Judge, _load("judges", spec, options))
    judge.spec = spec
    return judge


def _load(kind: Literal["scorers", "judges"], spec: str, options: dict[str, Option]) -> object:
    backend, colon, model = spec.partition(":")
    what = kind.removesuffix("s")
    if not colon or not model:
        example = DEFAULT_SCORER if kind == "scorers" else "openai:gpt-4o"
        raise BackendError(f"{spec!r} is not the spec of a {what}.", hint=f"Write backend:model, such as {example!r}.")
    points = installed(kind)
    if backend not in points:
        raise BackendError(f"There is no {what} backend {backend!r}.", hint=nearest(backend, points))
    factory = load(points[backend])
    if not callable(factory):
        raise BackendError(
            f"Entry point {points[backend].value!r} is not a class or function.",
            hint="Correct the entry point of the package, or use another backend.",
        )
    parameters = inspect.signature(factory).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    known = [name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]
    checked: dict[str, object] = {}
    for option, value in options.items():
        if option in known:
            checked[option] = _checked(backend, option, value, parameters[option].annotation)
        elif takes_all:
            checked[option] = value
        else:
            raise BackendError(f"{backend!r} has no option {option!r}.", hint=nearest(option, known))
    return factory(model, **checked)


def _checked(backend: str, option: str, value: object, annotation: type[object] | str) -> object:
    """The value of an option, converted to its annotated type. An option with a quoted annotation is not checked."""
    if isinstance(annotation, str) or annotation is inspect.Parameter.empty:
        return value
    try:
        return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as exc:
        problem = exc.errors()[-1]["msg"]
        given = without_secrets({option: cast(JsonValue, value)})[option]
        raise BackendError(
            f"{backend!r}, option {option!r}: {problem} (given: {given!r}).", hint="Correct the value of this option."
        ) from exc


def load_prompt(name_or_path: str | Path) -> Prompt:
    """Load a prompt: a registered prompt by its name, or a prompt file by its path.

    Raises:
        PromptError: if there is no such prompt or file, or if the template is wrong.
    """
    points = installed("prompts")
    if str(name_or_path) in points:
        return packaged_prompt(cast(ModuleType, load(points[str(name_or_path)])), str(name_or_path))
    if not Path(name_or_path).exists():
        raise PromptError(f"There is no prompt or file {str(name_or_path)!r}.", hint=nearest(str(name_or_path), points))
    return read_prompt(name_or_path)

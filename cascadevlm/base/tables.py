"""Reads JSON files and parts of tables: lines of JSON, and images that are stored in Parquet files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from cascadevlm.base.errors import ConfigError

T = TypeVar("T")


def json_line(line: str, number: int) -> object:
    """The value of one line of a JSON Lines file.

    Raises:
        ValueError: if the line is not valid JSON. The message names the line.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as exc:
        why = exc.msg if isinstance(exc, json.JSONDecodeError) else exc
        raise ValueError(f"line {number} is not valid JSON: {why}") from exc


def stored_image(value: object) -> bytes | str:
    """The bytes or the path of an image, from a cell of a table.

    Args:
        value: the bytes of an image file, a path, None (there is no image), or a mapping with the keys ``bytes`` and ``path``
            (the form of the package ``datasets``).

    Returns:
        The bytes of the file, or its path. Empty bytes if there is no image.

    Raises:
        ValueError: if the value has another type.
    """
    stored = value
    if isinstance(value, Mapping) and {"bytes", "path"} & value.keys():
        stored = value.get("bytes") or value.get("path")
    if stored is None:
        return b""
    if not isinstance(stored, bytes | str):
        raise ValueError(f"{value!r:.80}, which is neither an image nor the path of an image")
    return stored


def read_form(path: Path, form: TypeAdapter[T], *, name: str, again: str) -> T:
    """Read a JSON file that a configuration names.

    Args:
        path: the file.
        form: the type of its content.
        name: what the file is, for messages, such as "calibration".
        again: hint that says how to make such a file.

    Raises:
        ConfigError: if the file cannot be read, or has other content.
    """
    try:
        return form.validate_json(path.read_bytes())
    except OSError as exc:
        raise ConfigError(f"The {name} {str(path)!r} cannot be read: {exc.strerror}.", hint="Check the path.") from exc
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{str(path)!r} is not a {name}: {where}: {first['msg']}.", hint=again) from exc

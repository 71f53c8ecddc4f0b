"""Reads parts of tables: lines of JSON, and images that are stored in Parquet files."""

import json
from collections.abc import Mapping


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

"""Rows of tables: lines of JSON, and images as Parquet files keep them."""

import json
from collections.abc import Mapping


def json_line(line: str, number: int) -> object:
    """What a line of JSON lines says.

    Raises:
        ValueError: naming the line, if it is no JSON.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as exc:
        why = exc.msg if isinstance(exc, json.JSONDecodeError) else exc
        raise ValueError(f"line {number} is no JSON: {why}") from exc


def stored_image(value: object) -> bytes | str:
    """What a table keeps of an image: the bytes of its file or its path or, as the package ``datasets`` does, both by name;
    nothing where there is none.

    Raises:
        ValueError: if it is none of these.
    """
    stored = value
    if isinstance(value, Mapping) and {"bytes", "path"} & value.keys():
        stored = value.get("bytes") or value.get("path")
    if stored is None:
        return b""
    if not isinstance(stored, bytes | str):
        raise ValueError(f"{value!r:.80}, which is no image and no path of one")
    return stored

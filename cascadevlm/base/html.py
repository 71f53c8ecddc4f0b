"""HTML for notebooks. Texts from models, files and users are escaped, and all that is shown is bounded."""

import base64
import io
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from cascadevlm.base.errors import ImageError
from cascadevlm.base.files import visible
from cascadevlm.base.images import load_image

THUMBNAIL = 128
"""Length of the longer side of a thumbnail, in pixels."""

MOST_LISTED = 20
"""Largest number of items of a list that are shown."""

LONGEST = 600
"""Largest number of characters of a text that are shown."""


def card(title: str, rows: Mapping[str, str | Iterable[str]], *, path: str = "") -> str:
    """A title and a table of names and values. Empty values are left out.

    Args:
        title: the title.
        rows: the values by name. A list has one line per item.
        path: path of an image that is shown beside the table. An image that cannot be read is left out.
    """
    shown = {name: (value,) if isinstance(value, str) else value for name, value in rows.items()}
    lines = {name: Markup("<br>").join(map(_short, some)) for name, value in shown.items() if (some := _some(value))}
    row = Markup('<tr><th style="text-align:left;vertical-align:top">{}</th><td style="text-align:left">{}</td></tr>')
    table = Markup("<table>{}</table>").format(Markup("").join(row.format(_short(name), line) for name, line in lines.items()))
    return str(
        Markup('<div style="display:flex;gap:1em;align-items:flex-start">{}<div><b>{}</b>{}</div></div>').format(
            _picture(path), _short(title), table
        )
    )


def thumbnail(image: Image.Image) -> str:
    """The thumbnail of an image in WebP format, as a data URI. The image itself becomes smaller."""
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=70)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _picture(path: str) -> Markup:
    if not path:
        return Markup("")
    try:
        return Markup('<img src="{}" alt="{}">').format(thumbnail(load_image(Path(path))), _short(Path(path).name))
    except ImageError:
        return Markup("")


def _some(values: Iterable[str]) -> list[str]:
    """The first values that are not empty, with a mark if there are more."""
    found = list(islice(filter(None, values), MOST_LISTED + 1))
    return [*found[:MOST_LISTED], "…"] if len(found) > MOST_LISTED else found


def _short(text: str) -> str:
    line = visible(" ".join(text.split()))
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"

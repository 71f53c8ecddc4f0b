"""What files want: to be written as a whole, errors in one sentence, and texts that are valid Unicode and safe to show."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cascadevlm.base.errors import RunError


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file as a whole or not at all, whatever stops the process or the machine. Text is written as UTF-8."""
    unfinished = path.with_name(f"{path.name}.part")
    with unfinished.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    if os.name == "posix":  # elsewhere, folders cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Raises RunError, if what is done here cannot be written to the folder of a run."""
    try:
        yield
    except OSError as exc:
        raise RunError(
            f"{str(folder)!r} cannot be written to: {exc.strerror or exc}.",
            hint="What is in it is kept: once that is mended, the same command goes on.",
        ) from exc


def valid_text(text: str) -> str:
    """The text with what is no valid Unicode written out, as a file's name or what a judge says may have it."""
    return text.encode(errors="backslashreplace").decode()


_UNSEEN = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


def visible(text: str) -> str:
    """A name or what a model said, for a terminal: control characters, which could change what is shown, are written out, and so
    are those that change the direction of text and what is no valid Unicode."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)

"""Helpers for files and texts: complete writes, write errors in one sentence, and text that is valid Unicode and safe to show."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cascadevlm.base.errors import RunError


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file completely or not at all, even if the process or the machine stops during the call. Text becomes UTF-8."""
    unfinished = path.with_name(f"{path.name}.part")
    with unfinished.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    if os.name == "posix":  # other systems cannot open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn an OSError in the block into a RunError that names the folder of the run."""
    try:
        yield
    except OSError as exc:
        raise RunError(
            f"{str(folder)!r} cannot be written to: {exc.strerror or exc}.",
            hint="Its content is kept. Solve this problem, then repeat the same command to continue.",
        ) from exc


def valid_text(text: str) -> str:
    """The text, with escape sequences in place of invalid Unicode, which file names and answers of judges may contain."""
    return text.encode(errors="backslashreplace").decode()


_UNSEEN = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


def visible(text: str) -> str:
    """A text that is safe to show on a terminal, such as a file name or a model's answer.

    Escape sequences replace control characters, characters that change the direction of text, and invalid Unicode.
    """
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)

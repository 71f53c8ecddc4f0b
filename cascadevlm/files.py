"""What files want: to be written as a whole, and texts that are valid Unicode."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file as a whole or not at all, whatever stops the process or the machine."""
    unfinished = path.with_name(f"{path.name}.part")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def valid_text(text: str) -> str:
    """The text with what is no valid Unicode written out, as a file's name or what a judge says may have it."""
    return text.encode(errors="backslashreplace").decode()

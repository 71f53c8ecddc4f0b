"""How far a run is: a bar on a terminal and in a notebook, lines in a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from rich.progress import Progress

Show: TypeAlias = Callable[[int, float | None], None]
"""Gets the number of finished images and the US dollars that were spent; None while the images are only scored."""

SHOWN_PER_SECOND = 10
"""How often the bar in a notebook is redrawn."""

LOG_SECONDS = 10
"""Seconds between two lines in a log."""


@contextmanager
def progress_bar(total: int | None, *, shown: bool = True) -> Iterator[Show]:
    """A function that shows on stderr how far a run is. Any thread may call it.

    On a terminal, the bar disappears at the end. In a notebook, it stays below the cell. Without either, there is one line every
    `LOG_SECONDS` seconds.

    Args:
        total: number of images; None if it is not known.
        shown: false to show nothing. Default: true.
    """
    if not shown:
        yield lambda images, dollars: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task("", total=total)

    def log() -> None:
        (now,) = bar.tasks
        images = f"{now.completed:.0f} images" if total is None else f"{now.completed:.0f} of {total} images"
        console.print(f"{images}, {now.description}.", markup=False, highlight=False, soft_wrap=True)

    redraw, pause = (_in_notebook(bar), 1 / SHOWN_PER_SECOND) if console.is_jupyter else (log, LOG_SECONDS)
    redrawn_at = time.monotonic()

    def show(images: int, dollars: float | None) -> None:
        nonlocal redrawn_at
        bar.update(task, completed=images, description="scored" if dollars is None else f"${dollars:.2f} spent")
        if not console.is_terminal and time.monotonic() - redrawn_at >= pause:
            redrawn_at = time.monotonic()
            redraw()

    with bar if console.is_terminal else nullcontext():
        yield show
    if console.is_jupyter:
        redraw()


def _in_notebook(bar: "Progress") -> Callable[[], None]:
    """Show a bar below the cell of a notebook, and return a function that redraws it. Rich itself would need ipywidgets."""
    from IPython.display import display

    handle = display(bar, display_id=True)
    return lambda: handle.update(bar)

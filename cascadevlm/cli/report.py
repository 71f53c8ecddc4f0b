"""``cascadevlm report``."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cascadevlm.base.errors import InputError


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="Folders that evaluate -o wrote, or folders that run -o wrote.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write. An existing file is overwritten.")],
) -> None:
    """Write one HTML page about one or more runs. The file contains all images and needs no other file.

    For folders of evaluate -o, the page shows figures, plots, studies and single images. For folders of run -o, whose images
    have no labels, the page shows the labels, the models that chose them, and their probabilities. The images with the lowest
    probability come first.
    """
    from cascadevlm.evaluation.report import is_bulk_run, read_bulk_run, read_run, render, render_bulk

    named = dict(zip(_names(runs), runs, strict=True))
    unlabelled = [run for run in runs if is_bulk_run(run)]
    if unlabelled and len(unlabelled) < len(runs):
        raise InputError(
            f"{str(unlabelled[0])!r} is a run without labels, and other runs have labels.", hint="Make one report for each kind."
        )
    if unlabelled:
        page = render_bulk({name: read_bulk_run(run) for name, run in named.items()})
    else:
        page = render({name: read_run(run) for name, run in named.items()})
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as exc:
        raise InputError(
            f"The report {str(output)!r} cannot be written: {exc.strerror}.",
            hint="Check the path, its permissions and the free space on the disk.",
        ) from exc
    typer.echo(f"{output}: {output.stat().st_size / 1e6:.1f} MB")


def _names(folders: Sequence[Path]) -> list[str]:
    """The names of the folders.

    Raises:
        InputError: if two folders have the same name.
    """
    names = [folder.resolve().name for folder in folders]
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError(f"{count} of the runs are named {name!r}.", hint="Rename their folders.")
    return names

"""``cascadevlm report``."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cascadevlm.base.errors import InputError


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Folders that evaluate -o or run -o made.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file; one that is there is overwritten.")],
) -> None:
    """Write runs as one HTML page: figures, plots, studies and cases, in a file that needs nothing beside itself.

    Of a run over images without labels, made by run -o, the page shows what was decided, by whom and how surely, and the
    images, the doubtful first.
    """
    from cascadevlm.evaluation.report import is_bulk_run, read_bulk_run, read_run, render, render_bulk

    named = dict(zip(_names(runs), runs, strict=True))
    unlabelled = [run for run in runs if is_bulk_run(run)]
    if unlabelled and len(unlabelled) < len(runs):
        raise InputError(
            f"{str(unlabelled[0])!r} is a run without labels, others have labels.", hint="Make a report of each kind."
        )
    if unlabelled:
        page = render_bulk({name: read_bulk_run(run) for name, run in named.items()})
    else:
        page = render({name: read_run(run) for name, run in named.items()})
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as exc:
        raise InputError(f"The report {str(output)!r} cannot be written: {exc.strerror}.") from exc
    typer.echo(f"{output}: {output.stat().st_size / 1e6:.1f} MB")


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names.

    Raises:
        InputError: if two have the same.
    """
    names = [folder.resolve().name for folder in folders]
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError(f"{count} of the runs are named {name!r}.", hint="Rename their folders.")
    return names

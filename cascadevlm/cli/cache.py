"""``cascadevlm cache``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cascadevlm.judges.cache import DiskStore

app = typer.Typer(help="The cache of verdicts.", no_args_is_help=True)

Folder = Annotated[Path | None, typer.Option(exists=True, file_okay=False, help="The cache; the user's own, unless given.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]


def _opened(folder: Path | None) -> "DiskStore":
    """The cache in a folder.

    Raises:
        DataError: if there is no cache; looking for it must not make one.
    """
    from cascadevlm.base.errors import DataError
    from cascadevlm.judges.cache import DiskStore

    store = DiskStore(folder)
    if not store.exists:
        hint = "Give the folder of a cache (cache.folder of the configuration), or the folder 'verdicts' in that of a run."
        raise DataError(f"{str(store.folder)!r} holds no cache of verdicts.", hint=hint)
    return store


@app.command()
def info(folder: Folder = None, as_json: AsJson = False) -> None:
    """Show where the cache is and how much is in it."""
    store = _opened(folder)
    figures = {"folder": str(store.folder), "verdicts": len(store), "bytes": store.size()}
    typer.echo(json.dumps(figures) if as_json else "\n".join(f"{name}: {value}" for name, value in figures.items()))


@app.command()
def clear(
    folder: Folder = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Forget all verdicts; hosted ones were paid for."""
    store = _opened(folder)
    if not yes:
        typer.confirm(f"Forget {len(store)} verdicts in {store.folder}?", abort=True)
    removed = store.clear()
    typer.echo(json.dumps({"removed": removed}) if as_json else f"{removed} verdicts forgotten.")


@app.command()
def verify(folder: Folder = None, as_json: AsJson = False) -> None:
    """Check that every verdict can be read and belongs to the question it is kept under."""
    store = _opened(folder)
    damaged = list(store.damaged())
    if as_json:
        typer.echo(json.dumps({"verdicts": len(store), "damaged": damaged}))
    else:
        typer.echo(f"{len(store)} verdicts, {len(damaged)} damaged." + " Damaged ones are asked again." * bool(damaged))
    if damaged:
        raise typer.Exit(1)

"""``cascadevlm cache``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cascadevlm.judges.cache import DiskStore

app = typer.Typer(help="Show, check and empty the cache of verdicts.", no_args_is_help=True)

Folder = Annotated[
    Path | None, typer.Option(exists=True, file_okay=False, help="Folder of the cache.", show_default="the user's cache")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _opened(folder: Path | None) -> "DiskStore":
    """The cache in a folder.

    Raises:
        DataError: if there is no cache. The search for a cache must not create one.
    """
    from cascadevlm.base.errors import DataError
    from cascadevlm.judges.cache import DiskStore

    store = DiskStore(folder)
    if not store.exists:
        hint = "Give the folder of a cache (cache.folder of the configuration), or the folder 'verdicts' in the folder of a run."
        raise DataError(f"{str(store.folder)!r} does not contain a cache of verdicts.", hint=hint)
    return store


@app.command()
def info(folder: Folder = None, as_json: AsJson = False) -> None:
    """Show the folder of the cache, the number of verdicts in it, and its size in bytes."""
    store = _opened(folder)
    figures = {"folder": str(store.folder), "verdicts": len(store), "bytes": store.size()}
    typer.echo(json.dumps(figures) if as_json else "\n".join(f"{name}: {value}" for name, value in figures.items()))


@app.command()
def clear(
    folder: Folder = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking first.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete all verdicts. Verdicts of hosted judges cost money, and asking again costs money again."""
    store = _opened(folder)
    if not yes:
        typer.confirm(f"Delete {len(store)} verdicts in {store.folder}?", abort=True)
    removed = store.clear()
    typer.echo(json.dumps({"removed": removed}) if as_json else f"{removed} verdicts deleted.")


@app.command()
def verify(folder: Folder = None, as_json: AsJson = False) -> None:
    """Check that every verdict can be read, and belongs to the question under which it is stored.

    The exit code is 1 if a verdict is damaged.
    """
    store = _opened(folder)
    damaged = list(store.damaged())
    if as_json:
        typer.echo(json.dumps({"verdicts": len(store), "damaged": damaged}))
    else:
        typer.echo(
            f"{len(store)} verdicts, {len(damaged)} damaged."
            + " Questions with a damaged verdict are asked again." * bool(damaged)
        )
    if damaged:
        raise typer.Exit(1)

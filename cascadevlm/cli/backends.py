"""``cascadevlm backends``."""

import json
from typing import Annotated

import typer


def backends(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False) -> None:
    """List the installed scorers, judges, policies and prompts, with their packages and requirements."""
    from typing import get_args

    from rich.console import Console
    from rich.table import Table

    from cascadevlm.base.entry_points import Kind, describe, installed

    found = [describe(kind, point) for kind in get_args(Kind) for point in installed(kind).values()]
    if as_json:
        typer.echo(json.dumps(found))
        return
    table = Table("kind", "name", "package", "needs", box=None, header_style="bold")
    for row in found:
        table.add_row(row["kind"], row["name"], row["package"], row["needs"])
    Console(highlight=False).print(table)

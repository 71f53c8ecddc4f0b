"""``cascadevlm verify``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from cascadevlm.cli import options


def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run with --agree or --recall.")],
    as_json: options.AsJson = False,
) -> None:
    """Check the certificate or the promise of recall of a run by its folder alone. Images and models are not needed.

    The order of the images, the random draw, the test and all counts are computed again. The exit code is 1 if something does not
    hold.
    """
    from cascadevlm.base.files import visible
    from cascadevlm.runs.certificate import read_certificate
    from cascadevlm.runs.run_folder import SUMMARY
    from cascadevlm.runs.verify import verify as faults_of

    faults = faults_of(run)
    if as_json:
        typer.echo(json.dumps({"holds": not faults, "faults": faults}))
    elif faults:
        typer.echo("\n".join(map(visible, ["The certificate does not hold.", *faults])))
    else:
        certificate = read_certificate(run / SUMMARY)
        assert certificate is not None
        typer.echo(visible(f"The certificate holds. {certificate.sentence}"))
    if faults:
        raise typer.Exit(1)

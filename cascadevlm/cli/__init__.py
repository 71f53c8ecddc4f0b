"""The command line. Each command imports what it needs when it runs, so that ``--help`` is fast."""

import errno
import sys
import warnings
from typing import Annotated

import typer

import cascadevlm
from cascadevlm.base.errors import CascadeError, InputError
from cascadevlm.base.files import visible
from cascadevlm.cli import (
    adapt,
    backends,
    cache,
    calibrate,
    classify,
    compare,
    demo,
    doctor,
    estimate,
    evaluate,
    export,
    import_,
    init,
    report,
    run,
    study,
    sweep,
    verify,
)

WORK_FAILED = 1
CALL_WAS_WRONG = 2


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-grained image classification. A CLIP scorer ranks the classes, a policy decides which images to escalate, "
    "and a vision-language model judges the escalated images.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cascadevlm {cascadevlm.__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the Python traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of all commands."""


app.command()(demo.demo)
app.command()(init.init)
app.command()(doctor.doctor)
app.command()(classify.classify)
app.command()(run.run)
app.command()(verify.verify)
app.command()(estimate.estimate)
app.command()(evaluate.evaluate)
app.command()(sweep.sweep)
app.command()(calibrate.calibrate)
app.command()(adapt.adapt)
app.command()(compare.compare)
app.command()(report.report)
app.command()(export.export)
app.command("import")(import_.import_)
app.command()(backends.backends)
app.add_typer(study.app, name="study")
app.add_typer(cache.app, name="cache")


def _in_words(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """A warning without a line of our code."""
    return f"Warning: {visible(str(message))}\n"


def main() -> None:
    """The ``cascadevlm`` program. An error of cascadevlm is shown as a message, without a traceback."""
    warnings.formatwarning = _in_words
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]  # allowed at any position
    try:
        try:
            app(arguments)
        except OSError as exc:
            if exc.errno == errno.ENAMETOOLONG:  # whatever asks for a file of this name
                raise InputError(f"{exc.filename!r} is too long for the name of a file.", hint="Check the path.") from exc
            raise
    except CascadeError as exc:
        if len(arguments) < len(sys.argv) - 1:
            raise
        typer.secho(f"Error: {visible(str(exc))}", fg="red", err=True)
        sys.exit(CALL_WAS_WRONG if isinstance(exc, InputError) else WORK_FAILED)

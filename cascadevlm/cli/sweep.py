"""``cascadevlm sweep``."""

import json
from pathlib import Path
from typing import Annotated

import typer


def sweep(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN…", help="Folders of records of the same images, from: cascadevlm evaluate --judge-all -o FOLDER."
        ),
    ],
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="File from calibrate. Only images that it was not fitted on are used. Curves without it are shown, too."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with all points of all curves.")] = False,
) -> None:
    """Show the accuracy and cost of every policy at every threshold, on one or several records. No judge is asked."""
    from rich.console import Console
    from rich.table import Table

    from cascadevlm.decision.calibration import read_calibration
    from cascadevlm.evaluation.deciding import decided, held_out
    from cascadevlm.evaluation.record import read_record
    from cascadevlm.evaluation.sweep import sweep as swept

    records = {str(run): read_record(run) for run in runs}
    if calibration is not None:
        learned = read_calibration(calibration)
        records = {name: held_out(record, learned) for name, record in records.items()}
        records |= {f"{name}, {calibration}": decided(record, learned) for name, record in records.items()}
    result = swept(records)
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
        return
    shares = (0.1, 0.2, 0.3, 0.5)
    table = Table(*("ranking", "area", *(f"{share:.0%} escalated" for share in shares)), box=None, header_style="bold")
    for curve in result.curves:
        points = [f"{curve.at(share):.1%}" for share in shares]
        table.add_row(curve.name, f"{curve.area:.4f}", *points)
    console = Console(highlight=False)
    best = f"scorer alone {result.scorer_accuracy:.1%}, judge on every image {result.judge_accuracy:.1%}"
    console.print(f"{'Best accuracy' if len(records) > 1 else 'Accuracy'}: {best}.\n")
    console.print(table)
    console.print("\nNo other point is both cheaper and more accurate than these:")
    for name, rate, accuracy, dollars in result.pareto:
        console.print(f"  {name}, {rate:.0%} escalated: accuracy {accuracy:.1%}, ${dollars:.2f} per 1,000 images")

"""``cascadevlm export``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cascadevlm.cli import options


def export(
    run: Annotated[Path, typer.Argument(help="The folder of a run or a record, or a file of what classify --json printed.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help="csv, hf, coco, label-studio or fiftyone.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file (csv, coco, fiftyone) or folder to make.")],
    review: Annotated[
        bool, typer.Option("--review", help="Only images from which the cascade abstained, for a person to label.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Write the predictions of a run in the format of another tool.

    hf is a saved Hugging Face dataset, coco a COCO-style JSON of classes, label-studio has pre-annotations and their labelling
    configuration, and fiftyone is the labels.json of a FiftyOneImageClassificationDataset.
    """
    from cascadevlm.runs.export import export as exported

    done = exported(run, to, output, review=review)
    if as_json:
        typer.echo(json.dumps({"output": str(output), "format": to, **asdict(done)}))
        return
    left_out = f", {done.left_out:,} left out because they cannot be read" if done.left_out else ""
    typer.echo(f"{output}: {done.images:,} images, {done.labelled:,} with a label{left_out}.\n{done.how_to_load}")

"""``cascadevlm export``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cascadevlm.cli import options


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run or a record, or a file with the output of classify --json.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help="Format: csv, hf, coco, label-studio or fiftyone.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File (csv, coco, fiftyone) or folder (hf, label-studio) to write.")
    ],
    review: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SELECTION",
            help="Write only images for a person to look at: 'confidence < 0.8', abstained, an outcome of a question (answered, "
            "none, refused, unparsed, failed, skipped), N (the N images whose labels would teach most: from the most uncertain "
            "tenth, equally many per predicted label where possible), or 'random N' (a random sample, to measure the accuracy). "
            "May be given more than once; then all must hold. Images that a person looked at already are left out.",
            show_default="all images",
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Write the predictions of a run in the format of another tool.

    Labels of people come before labels of the cascade: see the command import. The column decided_by says who decided.

    hf: a saved Hugging Face dataset. coco: a JSON file in COCO style, with one class per image. label-studio: tasks with
    suggestions, and the labelling configuration for them. fiftyone: the labels.json of a FiftyOneImageClassificationDataset.
    """
    from cascadevlm.runs.export import export as exported

    done = exported(run, to, output, review=review or ())
    if as_json:
        typer.echo(json.dumps({"output": str(output), "format": to, **asdict(done)}))
        return
    left_out = f", {done.left_out:,} left out because they could not be read" if done.left_out else ""
    typer.echo(f"{output}: {done.images:,} images, {done.labelled:,} with a label{left_out}.\n{done.how_to_load}")

"""``cascadevlm classify``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from cascadevlm.errors import InputError

DEFAULT_POLICY = "entropy > 0.35"


def classify(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH…", help="Image files, or folders of them.")],
    labels: Annotated[Path | None, typer.Option(help="Class names: a text, CSV or JSON file, or a folder of folders.")] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file; the options below override it.")] = None,
    scorer: Annotated[str | None, typer.Option(help="backend:model, as in open_clip:ViT-B-16-SigLIP2/webli.")] = None,
    judge: Annotated[str | None, typer.Option(help="backend:model of the first stage, as in hf_chat:aviary.")] = None,
    policy: Annotated[str | None, typer.Option(help=f"When to ask, as in 'margin < 0.2'. [default: {DEFAULT_POLICY}]")] = None,
    candidates: Annotated[int | None, typer.Option(min=1, help="How many the judge is offered. [default: 5]")] = None,
    prompt: Annotated[str | None, typer.Option(help="A prompt's name or file. [default: select]")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other key, as in on_failure=abstain.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Classify images."""
    from rich.console import Console

    from cascadevlm.cli.show import prediction_block, print_summary
    from cascadevlm.config import Config, override, read_toml, toml_value
    from cascadevlm.labels import LabelSet
    from cascadevlm.types import Usage

    data = read_toml(config) if config else {}
    overrides = {
        "scorer.use": scorer,
        "stage.0.judge": judge,
        "stage.0.policy": policy or (DEFAULT_POLICY if judge and not config else None),
        "stage.0.candidates": candidates,
        "stage.0.prompt": prompt,
    }
    for key, value in overrides.items():
        if value is not None:
            override(data, key, value)
    for setting in settings or ():
        key, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting!r} sets nothing.", hint="Write KEY=VALUE.")
        override(data, key.strip(), toml_value(text))
    if "scorer" not in data:
        raise InputError("There is no scorer.", hint="Give --scorer or --config, for example --scorer open_clip:aviary.")
    cascade = Config.parse(data, name=str(config or "options")).build(LabelSet.read(labels) if labels else None)

    files = _image_files(paths)
    console = Console(highlight=False)
    total = Usage()
    escalated = failed = 0
    for number, prediction in enumerate(cascade.stream(files), start=1):
        if as_json:
            typer.echo(json.dumps(prediction.to_dict()))
        else:
            console.print(prediction_block(prediction, title=f"{number}/{len(files)} {prediction.path}"))
        total += prediction.cost
        escalated += prediction.escalated
        failed += not prediction.candidates
    if not as_json:
        rows = {
            "images": str(len(files)),
            "escalated": str(escalated),
            "judge calls": str(total.requests),
            "cost": f"${total.dollars:.4f}",
            "saved by the cache": f"${total.saved_dollars:.4f}",
            "unreadable": str(failed),
        }
        print_summary(console, "Summary", rows)
    if failed:
        raise typer.Exit(1)


def _image_files(paths: list[Path]) -> list[Path]:
    """The files, and those below the folders.

    Raises:
        InputError: if a path does not exist or a folder holds no image.
    """
    from cascadevlm.images import image_files

    files = []
    for path in paths:
        if not path.exists():
            raise InputError(f"{str(path)!r} does not exist.")
        found = image_files(path) if path.is_dir() else [path]
        if not found:
            raise InputError(f"Folder {str(path)!r} holds no images.")
        files += found
    return files

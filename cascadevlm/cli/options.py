"""The options that say what to run, shared by the commands that run a cascade."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cascadevlm.base.errors import InputError

if TYPE_CHECKING:
    from cascadevlm.base.labels import LabelSet
    from cascadevlm.cascade.cascade import Cascade
    from cascadevlm.config.config import Config
    from cascadevlm.evaluation.data import Data

DEFAULT_POLICY = "entropy > 0.35"

Paths = Annotated[list[Path], typer.Argument(metavar="PATH…", help="Image files, or folders of them.")]
Labels = Annotated[Path | None, typer.Option(help="Class names: a text, CSV or JSON file, or a folder of folders.")]
ConfigFile = Annotated[Path | None, typer.Option(help="A TOML file; the options below override it.")]
ScorerSpec = Annotated[str | None, typer.Option(help="backend:model, as in open_clip:ViT-B-16-SigLIP2/webli.")]
JudgeSpec = Annotated[str | None, typer.Option(help="backend:model of the first stage, as in hf_chat:aviary.")]
PolicyText = Annotated[str | None, typer.Option(help=f"When to ask, as in 'margin < 0.2'. [default: {DEFAULT_POLICY}]")]
CandidateCount = Annotated[int | None, typer.Option(min=1, help="How many the judge is offered. [default: 5]")]
PromptName = Annotated[str | None, typer.Option(help="A prompt's name or file. [default: select]")]
LabelledData = Annotated[
    Path, typer.Argument(help="Labelled images: a folder of folders, a table with path and label, a saved dataset.")
]
Split = Annotated[str | None, typer.Option(help="Only this split of the data.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only so many images, at random, every class in its share.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before spending money.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other key, as in on_failure=abstain.")
]


def parse(
    config: Path | None,
    scorer: str | None,
    judge: str | None,
    policy: str | None,
    candidates: int | None,
    prompt: str | None,
    settings: list[str] | None,
) -> "Config":
    """The configuration that the options make.

    Raises:
        InputError: if something in them is wrong.
    """
    from cascadevlm.config.config import Config, override, read_toml, toml_value

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
    return Config.parse(data, name=str(config or "options"))


def build(config: "Config", labels: Path | None, *, bulk: bool = False) -> "Cascade":
    """The cascade of a configuration, with the labels of a file where one is given."""
    from cascadevlm.base.labels import LabelSet

    return config.build(LabelSet.read(labels) if labels else None, bulk=bulk)


def build_with_data(
    config: "Config", data: Path, labels: Path | None, split: str | None, limit: int | None
) -> "tuple[Cascade, Data]":
    """The cascade of a configuration and labelled images for it; without labels, a folder of data names them.

    Raises:
        DataError: if the data is not as it should be.
    """
    from cascadevlm.evaluation.data import read_data

    where = labels or (data if config.labels is None and data.is_dir() else None)
    cascade = build(config, where)
    given = read_data(data, cascade.labels)
    given = given.split(split) if split else given
    return cascade, given.subset(limit) if limit else given


def tell(labels: "LabelSet", images: list[Path]) -> None:
    """Say, on stderr and in a line each, which names are shown as words, and what is left out of the folders of images."""
    renamed = [label for label in labels if "_" in label.name]
    if renamed:
        first = f"{renamed[0].words!r} for {renamed[0].name!r}"
        typer.echo(f"{len(renamed)} names have underscores. Scorer and judge are shown words, as {first}.", err=True)
    if line := left_out(images):
        typer.echo(line, err=True)


def left_out(images: list[Path]) -> str:
    """How many files in folders of images look like images and are not read, in one sentence; "" where there are none."""
    from cascadevlm.base.images import images_left_out

    found = sum(map(images_left_out, filter(Path.is_dir, images)), Counter())
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(found.items()))
    return f"Files that look like images and are left out: {found.total()} ({kinds})." if found else ""


def image_files(paths: list[Path]) -> list[Path]:
    """The files, and those below the folders.

    Raises:
        InputError: if a path does not exist or a folder holds no image.
    """
    from cascadevlm.base.images import image_files as files_below

    files = []
    for path in paths:
        if not path.exists():
            raise InputError(f"{str(path)!r} does not exist.")
        found = files_below(path) if path.is_dir() else [path]
        if not found:
            raise InputError(f"Folder {str(path)!r} holds no images.", hint=left_out([path]))
        files += found
    return files

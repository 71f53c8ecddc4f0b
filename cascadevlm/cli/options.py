"""Options that several commands share."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_type_hints

import typer

from cascadevlm.base.errors import InputError
from cascadevlm.config import DEFAULT_SCORER

if TYPE_CHECKING:
    from pydantic import JsonValue

    from cascadevlm.base.labels import LabelSet
    from cascadevlm.cascade.cascade import Cascade
    from cascadevlm.config.config import Config
    from cascadevlm.evaluation.data import Data

DEFAULT_POLICY = "entropy > 0.35"

Paths = Annotated[list[Path], typer.Argument(metavar="PATH…", help="Image files, or folders with images.")]
Labels = Annotated[
    Path | None, typer.Option(help="Class names: a text, CSV or JSON file, or a folder with one subfolder per class.")
]
LabelledData = Annotated[
    Path,
    typer.Argument(
        help="Labelled images: a folder with one subfolder per class, a table with columns path and label, or a saved dataset."
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Spend money without asking first.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@dataclass(frozen=True, kw_only=True)
class CascadeOptions:
    """The options that describe a cascade."""

    labels: Labels = None
    config: Annotated[
        Path | None, typer.Option(help="TOML file with the configuration. The options below override its values.")
    ] = None
    scorer: Annotated[
        str | None,
        typer.Option(help="Scorer as backend:model. The default scorer is downloaded once.", show_default=DEFAULT_SCORER),
    ] = None
    judge: Annotated[str | None, typer.Option(help="Judge of the first stage as backend:model, for example openai:gpt-4o.")] = (
        None
    )
    policy: Annotated[
        str | None, typer.Option(help="Which images to escalate, for example 'margin < 0.2'.", show_default=DEFAULT_POLICY)
    ] = None
    candidates: Annotated[int | None, typer.Option(min=1, help="Number of candidates that the judge sees.", show_default="5")] = (
        None
    )
    prompt: Annotated[str | None, typer.Option(help="Name of a prompt, or a prompt file.", show_default="select")] = None
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any key of the configuration, for example on_failure=abstain."),
    ] = None

    def parse(self, also: "Mapping[str, JsonValue] | None" = None) -> "Config":
        """The configuration that the options describe.

        Args:
            also: values of further keys. None stands for a key without a value.

        Raises:
            InputError: if an option is wrong, or the configuration is not valid.
        """
        from cascadevlm.config.config import Config, override, read_toml, toml_value

        data = read_toml(self.config) if self.config else {}
        given = {key: value for key, value in (also or {}).items() if value is not None}
        certified = {"agreement.agree", "find.label"} & given.keys()
        selects = self.policy or (DEFAULT_POLICY if self.judge and not self.config and not certified else None)
        overrides = given | {
            "scorer.use": self.scorer,
            "stage.0.judge": self.judge,
            "stage.0.policy": selects,
            "stage.0.candidates": self.candidates,
            "stage.0.prompt": self.prompt,
        }
        for key, value in overrides.items():
            if value is not None:
                override(data, key, value)
        for setting in self.settings or ():
            key, equals, text = setting.partition("=")
            if not equals:
                raise InputError(f"--set {setting!r} has no '='.", hint="Write KEY=VALUE.")
            override(data, key.strip(), toml_value(text))
        return Config.parse(data, name=str(self.config or "options"))

    def build(self, config: "Config", *, bulk: bool = False) -> "Cascade":
        """The cascade that the configuration describes. The labels of ``--labels`` replace the labels of the configuration."""
        from cascadevlm.base.labels import LabelSet

        return config.build(LabelSet.read(self.labels) if self.labels else None, bulk=bulk)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The options that select labelled images."""

    split: Annotated[str | None, typer.Option(help="Use only this split of the data.")] = None
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only this number of images, drawn at random with the class shares of the data.")
    ] = None

    def build(self, config: "Config", data: Path, labels: Path | None, *, bulk: bool = False) -> "tuple[Cascade, Data]":
        """The cascade that a configuration describes, and labelled images for it.

        Without labels in the configuration, the subfolders of the data folder name the labels. With ``bulk``,
        the embeddings of images are kept on disk.

        Raises:
            DataError: if the data cannot be read, or does not fit the labels.
        """
        from cascadevlm.evaluation.data import read_data

        where = labels or (data if config.labels is None and data.is_dir() else None)
        cascade = CascadeOptions(labels=where).build(config, bulk=bulk)
        given = read_data(data, cascade.labels)
        given = given.split(self.split) if self.split else given
        return cascade, given.subset(self.limit) if self.limit else given


def grouped(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that replaces each parameter with a group of options by these options.

    A group is a dataclass with one field per option. The command gets the group with the values of the options.

    Args:
        without: names of options that the command does not have.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        groups: dict[str, type] = {
            name: each.annotation
            for name, each in signature.parameters.items()
            if isinstance(each.annotation, type) and is_dataclass(each.annotation)
        }
        names = {name: [each.name for each in fields(group) if each.name not in without] for name, group in groups.items()}

        @wraps(command)
        def called(**values: object) -> None:
            for name, group in groups.items():
                values[name] = group(**{option: values.pop(option) for option in names[name]})
            command(**values)

        called.__signature__ = signature.replace(parameters=[*_expanded(signature, groups, names)])  # type: ignore[attr-defined]
        return called

    return decorate


def _expanded(
    signature: inspect.Signature, groups: Mapping[str, type], names: Mapping[str, Sequence[str]]
) -> Iterator[inspect.Parameter]:
    """The parameters of a command. Each group is replaced by its options."""
    for name, parameter in signature.parameters.items():
        if name not in groups:
            yield parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            continue
        hints = get_type_hints(groups[name], include_extras=True)
        for option in names[name]:
            default = getattr(groups[name], option)
            yield inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[option])


def tell(labels: "LabelSet", images: list[Path]) -> None:
    """Print on stderr which labels are shown with spaces in place of underscores, and which files are not read."""
    renamed = [label for label in labels if "_" in label.name]
    if renamed:
        first = f"{renamed[0].words!r} for {renamed[0].name!r}"
        typer.echo(
            f"{len(renamed)} names contain underscores. The scorer and the judge get words instead, for example {first}.",
            err=True,
        )
    if line := left_out(images):
        typer.echo(line, err=True)


def left_out(images: list[Path]) -> str:
    """A sentence that counts the files in folders that look like images and are not read; empty if there are none."""
    from cascadevlm.base.images import images_left_out

    found = sum(map(images_left_out, filter(Path.is_dir, images)), Counter())
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(found.items()))
    return f"{found.total()} files that look like images are not read ({kinds})." if found else ""


def image_files(paths: list[Path]) -> list[Path]:
    """The given image files, and all image files in the given folders and their subfolders.

    Raises:
        InputError: if a path does not exist, or a folder contains no images.
    """
    from cascadevlm.runs.inputs import Inputs

    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise InputError(f"{str(path)!r} does not exist.", hint="Check the path.")
        found = [Path(name) for name, _ in Inputs(path)] if path.is_dir() else [path]
        if not found:
            raise InputError(f"The folder {str(path)!r} contains no images.", hint=left_out([path]))
        files += found
    return files

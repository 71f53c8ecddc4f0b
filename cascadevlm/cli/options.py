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
    from cascadevlm.base.remote import Place
    from cascadevlm.base.tables import ColumnNames
    from cascadevlm.cascade.cascade import Cascade
    from cascadevlm.config.config import Config
    from cascadevlm.evaluation.data import Data
    from cascadevlm.runs.inputs import Inputs, Named

DEFAULT_POLICY = "entropy > 0.35"

Paths = Annotated[
    list[str],
    typer.Argument(
        metavar="PATH…",
        help="Image files and folders with images, or one list or table of images (the same forms as for run). Addresses such as "
        "https:// and s3:// are possible.",
    ),
]
Labels = Annotated[
    Path | None, typer.Option(help="Class names: a text, CSV or JSON file, or a folder with one subfolder per class.")
]
LabelledData = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="Labelled images: a folder with one subfolder per class, or a table with a column of images and a column of labels.",
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Spend money without asking first.")]
Batch = Annotated[bool, typer.Option("--batch", help="Use the batch APIs of hosted judges: cheaper, but answers may take hours.")]
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
class ColumnOptions:
    """The options that name the columns of a table of images."""

    image: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="Column of paths, addresses or images in the table.",
            show_default="image; if there is none, path",
        ),
    ] = None
    id: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of ids in the table. Results contain the id of every image.")
    ] = None
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMNS", help="Further columns of the table that results contain, for example sku,price."),
    ] = None

    def columns(self) -> "ColumnNames":
        """The columns that the options name."""
        from cascadevlm.base.tables import ColumnNames

        keep = [column.strip() for columns in self.keep or () for column in columns.split(",") if column.strip()]
        label = getattr(self, "label", None)
        return ColumnNames(image=self.image, label=label, id=self.id, keep=tuple(dict.fromkeys(keep)))


@dataclass(frozen=True, kw_only=True)
class DataOptions(ColumnOptions):
    """The options that select labelled images."""

    label: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of true labels in the table.", show_default="label")
    ] = None
    split: Annotated[str | None, typer.Option(help="Use only this split of the data.")] = None
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only this number of images, drawn at random with the class shares of the data.")
    ] = None

    def build(self, config: "Config", data: str | Path, labels: Path | None, *, bulk: bool = False) -> "tuple[Cascade, Data]":
        """The cascade that a configuration describes, and labelled images for it.

        Without labels in the configuration, the subfolders of the data folder name the labels. With ``bulk``,
        the embeddings of images are kept on disk.

        Raises:
            DataError: if the data cannot be read, or does not fit the labels.
        """
        from cascadevlm.base.remote import place_of
        from cascadevlm.evaluation.data import read_data

        folder = place_of(data)
        named = config.labels is None and isinstance(folder, Path) and folder.is_dir()
        cascade = CascadeOptions(labels=labels or (Path(data) if named else None)).build(config, bulk=bulk)
        given = read_data(data, cascade.labels, self.columns())
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


def tell(labels: "LabelSet", images: Sequence[str | Path]) -> None:
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


def left_out(images: Sequence[str | Path]) -> str:
    """A sentence that counts the files in folders that look like images and are not read; empty if there are none."""
    from cascadevlm.base.images import images_left_out
    from cascadevlm.base.remote import place_of

    folders = [place for place in map(place_of, images) if isinstance(place, Path) and place.is_dir()]
    found = sum(map(images_left_out, folders), Counter())
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(found.items()))
    return f"{found.total()} files that look like images are not read ({kinds})." if found else ""


def image_files(paths: Sequence[str | Path]) -> "list[Place]":
    """The given image files and addresses, and all image files in the given folders and their subfolders.

    Raises:
        InputError: if a path does not exist, or a folder contains no images.
    """
    from cascadevlm.base.remote import place_of
    from cascadevlm.runs.inputs import Inputs

    files: list[Place] = []
    for place in map(place_of, paths):
        if not isinstance(place, Path):
            files.append(place)
            continue
        if not place.exists():
            raise InputError(f"{str(place)!r} does not exist.", hint="Check the path.")
        found = [Path(name) for name, _ in Inputs(place)] if place.is_dir() else [place]
        if not found:
            raise InputError(f"The folder {str(place)!r} contains no images.", hint=left_out([place]))
        files += found
    return files


def images_in(paths: Sequence[str], columns: "ColumnNames") -> "Inputs | list[Named]":
    """The images of one folder, list or table; or the given image files, and the images in the given folders.

    Raises:
        InputError: if a path does not exist, a folder contains no images, or other paths or columns are given beside a list.
    """
    from cascadevlm.base.image_table import TABLES
    from cascadevlm.base.remote import name_of, place_of, suffix_of
    from cascadevlm.base.tables import USUAL
    from cascadevlm.runs.inputs import Inputs

    places = [place_of(path) for path in paths]
    lists = [place for place in places if suffix_of(place) in TABLES]
    one = len(places) == 1 and (bool(lists) or (isinstance(places[0], Path) and places[0].is_dir()))
    if one:
        images = Inputs(places[0], columns)
        if len(images):
            return images
        raise InputError(f"{paths[0]!r} contains no images.", hint=left_out(paths) or "Check the path.")
    if lists:
        told = f"{name_of(lists[0])!r} is a list of images, but other paths are given, too."
        raise InputError(told, hint="Give only the list.")
    if columns != USUAL:
        raise InputError("Image files have no columns.", hint=f"Give a table, or leave out: {columns}.")
    return [(name_of(place), place) for place in image_files(paths)]

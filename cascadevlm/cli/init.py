"""``cascadevlm init``."""

import json
import os
import shlex
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar, get_args

import typer

from cascadevlm.base.errors import InputError
from cascadevlm.cli.options import DEFAULT_POLICY
from cascadevlm.config import DEFAULT_SCORER

if TYPE_CHECKING:
    from cascadevlm.base.remote import Place

Machine = Literal["laptop", "gpu"]
JudgeKind = Literal["openai", "anthropic", "gemini", "local", "none"]

T = TypeVar("T", bound=str)

DEFAULT_USD = 5.0

SCORERS: dict[Machine, str] = {"laptop": DEFAULT_SCORER, "gpu": "open_clip:ViT-L-16-SigLIP2-384/webli"}

LOCAL_JUDGES: dict[Machine, str] = {
    "laptop": "hf_chat:HuggingFaceTB/SmolVLM-500M-Instruct",
    "gpu": "hf_chat:Qwen/Qwen2.5-VL-7B-Instruct",
}


@dataclass(frozen=True, kw_only=True)
class Hosted:
    """A hosted judge that ``init`` offers.

    Attributes:
        spec: spec of the judge.
        key: name of the environment variable that contains the key.
        options: options of the stage, as TOML. "" for no options.
    """

    spec: str
    key: str
    options: str = ""


HOSTED: dict[str, Hosted] = {
    "openai": Hosted(spec="openai:gpt-4o", key="OPENAI_API_KEY"),
    "anthropic": Hosted(spec="anthropic:claude-sonnet-5-5", key="ANTHROPIC_API_KEY"),
    "gemini": Hosted(
        spec="openai:gemini-2.5-flash",
        key="GEMINI_API_KEY",
        options='{ base_url = "https://generativelanguage.googleapis.com/v1beta/openai/", api_key_env = "GEMINI_API_KEY" }',
    ),
}


def init(
    images: Annotated[
        str | None, typer.Option(help="Folder of images, or a list or table of images. Addresses such as s3:// are possible.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="File of class names, folder with one subfolder per class, or names separated by commas.")
    ] = None,
    machine: Annotated[Machine | None, typer.Option(help="The machine that runs the local models.", show_default="ask")] = None,
    judge: Annotated[
        JudgeKind | None,
        typer.Option(help="Who judges: a provider whose key you have, a local model, or nobody.", show_default="ask"),
    ] = None,
    usd: Annotated[float | None, typer.Option(min=0, help="Maximum number of dollars that a run may spend.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The configuration file to write.")] = Path("cascade.toml"),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: use the default of each missing option.")] = False,
) -> None:
    """Ask five questions, and write a configuration file. An option answers its question in advance.

    Without a terminal, nothing is asked. An existing file is overwritten only after a confirmation on a terminal.
    """
    from cascadevlm.base.remote import place_of

    asking = sys.stdin.isatty() and not yes
    shown = place_of(images or _required("Folder of images", "--images", asking))
    _require_images(shown)
    names = _labels(labels or _required("Class names: a file, a folder, or names separated by commas", "--labels", asking))
    where = machine or _chosen("Where local models run", get_args(Machine), _default_machine(), asking)
    kind = judge or _chosen("The judge", get_args(JudgeKind), _default_judge(where), asking)
    money = DEFAULT_USD if usd is None else usd
    if kind in HOSTED and usd is None and asking:
        money = typer.prompt("Maximum number of dollars of a run", default=DEFAULT_USD, type=float, err=True)
    text = _toml(names, where, kind, money)
    _require_valid(text)
    _write(output, text, asking)
    _tell_next(shown, output, kind)


def _require_images(place: "Place") -> None:
    """Check that `run` finds images at a path, or that addresses of this kind can be read. Nothing is downloaded.

    Raises:
        BackendError: if the command ``run`` does not read such an address.
        DataError: if there is no such folder or table, the table has no column of images, or the file system of the address
            cannot be used.
    """
    from cascadevlm.base.image_table import read_table
    from cascadevlm.base.remote import file_system
    from cascadevlm.base.tables import reading

    if isinstance(place, Path):
        read_table(place)
    else:
        with reading(place):
            file_system(place)


def _required(question: str, option: str, asking: bool) -> str:
    if not asking:
        raise InputError(f"{option} is missing, and the input is not a terminal.", hint=f"Add {option}.")
    answer: str = typer.prompt(question, err=True)
    return answer


def _chosen(question: str, choices: tuple[T, ...], default: T, asking: bool) -> T:
    """The answer to a question with a few possible answers. The question is repeated until the answer is one of them."""
    while asking:
        given = typer.prompt(f"{question} ({', '.join(choices)})", default=default, err=True)
        for choice in choices:
            if given == choice:
                return choice
        typer.echo(f"{given!r} is not one of {', '.join(choices)}.", err=True)
    return default


def _default_machine() -> Machine:
    import torch

    return "gpu" if torch.cuda.is_available() else "laptop"


def _default_judge(machine: Machine) -> JudgeKind:
    """The first provider whose key is set. Without a key, a local model if there is a GPU."""
    for kind in get_args(JudgeKind):
        if kind in HOSTED and os.environ.get(HOSTED[kind].key):
            return kind  # type: ignore[no-any-return]
    return "local" if machine == "gpu" else "none"


def _labels(given: str) -> str:
    """The value of ``labels`` in TOML: a path, or a list of names.

    Raises:
        LabelError: if the file, the folder or the names are not a label set.
        InputError: if there is no such file or folder, and the text is not several names.
    """
    from cascadevlm.base.labels import LabelSet

    if os.path.exists(given):  # noqa: PTH110  # `Path.exists` raises an error for a long list of names
        LabelSet.read(Path(given))
        return _string(given)
    names = [name.strip() for name in given.split(",") if name.strip()]
    if len(names) < 2:
        raise InputError(
            f"{given!r} is not a file, not a folder, and not several names.",
            hint="Give the path of a file with one name per line, or names separated by commas: --labels 'cat, dog'.",
        )
    return f"[{', '.join(_string(label.name) for label in LabelSet.of(names))}]"


def _string(text: str) -> str:
    """A text as a string of TOML."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml(labels: str, machine: Machine, judge: JudgeKind, usd: float) -> str:
    """The configuration file."""
    lines = [
        "# A configuration of cascadevlm. Every value can be overridden on the command line: --set KEY=VALUE.",
        f"labels = {labels}",
        "",
        "[scorer]",
        "# A local model that ranks all classes for every image. It is downloaded once.",
        f"use = {_string(SCORERS[machine])}",
        "# A sentence that names the kind of the classes improves the accuracy. {label} stands for a class name.",
        '# templates = ["a photo of a {label}, a type of bird."]',
    ]
    if judge == "none":
        return "\n".join([*lines, "", "# There is no judge: the scorer's best class is the prediction.", ""])
    hosted = HOSTED.get(judge)
    lines += [
        "",
        "[[stage]]",
        "# The model that sees the image and the best candidates."
        + (f" Its key is in the environment variable {hosted.key}." if hosted else " It is downloaded once."),
        f"judge = {_string(hosted.spec if hosted else LOCAL_JUDGES[machine])}",
        *([f"options = {hosted.options}"] if hosted and hosted.options else []),
        "# Which images the judge is asked about. A smaller number asks about more images.",
        f"policy = {_string(DEFAULT_POLICY)}",
        "# How many of the best classes the judge chooses from.",
        "candidates = 5",
        "# The prompt. select is cheaper; with select_cot, the judge explains its answer first.",
        'prompt = "select"',
    ]
    if hosted:
        lines += [
            "",
            "[budget]",
            "# A run never spends more than this number of US dollars.",
            f"usd = {float(usd)!r}",
        ]
    return "\n".join([*lines, ""])


def _require_valid(text: str) -> None:
    """Check that the other commands accept the file.

    Raises:
        InputError: if a value is not valid, for example an infinite number of dollars.
    """
    from cascadevlm.config.config import Config

    Config.parse(tomllib.loads(text), name="the new configuration").build()


def _write(path: Path, text: str, asking: bool) -> None:
    if path.exists():
        if not asking:
            raise InputError(f"{str(path)!r} exists already.", hint="Give another file: --output FILE.")
        typer.confirm(f"Overwrite {path}?", abort=True, err=True)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as exc:
        raise InputError(f"{str(path)!r} cannot be written: {exc.strerror}.", hint="Give another file: --output FILE.") from exc


def _tell_next(images: "Place", path: Path, judge: JudgeKind) -> None:
    from cascadevlm.base.remote import name_of

    folder, config = shlex.quote(name_of(images)), shlex.quote(str(path))
    typer.echo(f"Wrote {path}. Next, see what is missing, what a run will cost, and run it:")
    typer.echo(f"  cascadevlm doctor --config {config}")
    if judge != "none":
        typer.echo(f"  cascadevlm estimate {folder} --config {config}")
    typer.echo(f"  cascadevlm run {folder} --config {config} --output predictions")
    if judge in HOSTED and not os.environ.get(HOSTED[judge].key):
        typer.echo(f"Before the run, set the environment variable {HOSTED[judge].key}.")

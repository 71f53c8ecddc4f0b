"""``cascadevlm doctor``."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cascadevlm.cli import options

if TYPE_CHECKING:
    from pydantic import JsonValue

    from cascadevlm.judges.base import Judge
    from cascadevlm.scorers.base import Scorer

KEYS = ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY", "HF_TOKEN")
"""Environment variables whose values are secret. Only their presence is shown."""

SWITCHES = ("HF_HUB_OFFLINE", "CASCADEVLM_LOCAL_ONLY")

EXTRAS = {"llm": ("llm",), "datasets": ("datasets",), "ray": ("ray",), "remote": ("gcsfs", "s3fs")}
"""The packages of each extra."""

GIGABYTE = 1e9


@dataclass(frozen=True, kw_only=True)
class Check:
    """Whether one part of a configuration can work.

    Attributes:
        what: the part: a spec, or the configuration as a whole.
        missing: what is missing, and how to solve the problem. "" if nothing is missing.
        remark: something that is worth knowing, for example the price.
    """

    what: str
    missing: str = ""
    remark: str = ""


Specs = Annotated[
    list[str] | None, typer.Argument(metavar="SPEC", help="Scorers and judges to check, as backend:model.", show_default=False)
]


def doctor(
    specs: Specs = None,
    config: Annotated[Path | None, typer.Option(help="TOML file to check: its labels, files, scorers and judges.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show what this machine has, and what is missing for a configuration. No model is loaded, and nothing is sent.

    Keys are never shown. The exit code is 1 if something is missing.
    """
    parts = [*(_parts_of_config(config) if config else ()), *((spec, _spec_check(spec)) for spec in specs or ())]
    checks = [_checked(what, check) for what, check in parts]
    figures = _figures()
    if as_json:
        typer.echo(json.dumps({**figures, "checks": [asdict(check) for check in checks]}))
    else:
        _show(figures, checks)
    if any(check.missing for check in checks):
        raise typer.Exit(1)


def _checked(what: str, check: Callable[[], str]) -> Check:
    from cascadevlm.base.errors import CascadeError

    try:
        return Check(what=what, remark=check())
    except CascadeError as exc:
        return Check(what=what, missing=str(exc))


def _parts_of_config(path: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """The parts of a configuration that are checked separately, so that all missing things are shown at once."""
    from cascadevlm.config.loading import load_judge

    config = options.CascadeOptions(config=path).parse()

    def whole() -> str:
        return f"{len(config.build().labels)} labels"

    yield str(path), whole
    use = config.scorer.use
    yield use if isinstance(use, str) else "scorers", lambda: config.scorer.build().check()
    for stage in config.stage:
        yield stage.judge, lambda stage=stage: load_judge(stage.judge, **stage.options).check()  # type: ignore[misc]


def _spec_check(spec: str) -> Callable[[], str]:
    from cascadevlm.base.entry_points import installed, nearest
    from cascadevlm.base.errors import BackendError
    from cascadevlm.config.loading import load_judge, load_scorer

    def check() -> str:
        backend = spec.partition(":")[0]
        scorers, judges = installed("scorers"), installed("judges")
        if backend not in {*scorers, *judges}:
            raise BackendError(f"There is no backend {backend!r}.", hint=nearest(backend, {*scorers, *judges}))
        part: Scorer | Judge = load_scorer(spec) if backend in scorers else load_judge(spec)
        return part.check()

    return check


def _figures() -> "dict[str, JsonValue]":
    """What the machine has."""
    import torch
    from huggingface_hub import constants

    from cascadevlm.base.entry_points import is_installed
    from cascadevlm.base.environment import machine, versions
    from cascadevlm.judges.cache import default_cache_folder

    caches = [default_cache_folder(), Path(constants.HF_HUB_CACHE)]
    return {
        "machine": machine(),
        "versions": dict(versions()),
        "extras": {name: all(map(is_installed, packages)) for name, packages in EXTRAS.items()},
        "devices": {
            "cuda": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
            "mps": torch.backends.mps.is_available(),
            "cpus": os.cpu_count(),
        },
        "keys": {name: bool(os.environ.get(name)) for name in KEYS},
        "switches": {name: bool(os.environ.get(name)) for name in SWITCHES},
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "caches": {str(folder): _size(folder) for folder in caches},
    }


def _size(folder: Path) -> int:
    """Total size of the files in a folder, in bytes. Links are not followed, and files that disappear are not counted."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(Path(where) / name).st_size
            except FileNotFoundError:
                continue
    return total


def _show(figures: "dict[str, JsonValue]", checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from cascadevlm.base.files import visible

    console = Console(highlight=False)
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in figures.items():
        table.add_row(name.removesuffix("_bytes").replace("_", " "), Text(visible(_words(name, value))))
    for check in checks:
        state = Text("missing", style="red") if check.missing else Text("ready", style="green")
        told = ": ".join(["", *filter(None, [check.missing or check.remark])])
        table.add_row(Text(visible(check.what)), state.append(visible(told), style="default"))
    console.print(table)


def _words(name: str, value: "JsonValue") -> str:
    """A figure for people."""
    match name, value:
        case "devices", {"cuda": list(cuda), "mps": mps, "cpus": cpus}:
            return ", ".join([*map(str, cuda), *["mps"] * bool(mps), f"{cpus} CPUs"])
        case "caches", dict(sizes):
            return ", ".join(f"{folder}: {float(str(size)) / GIGABYTE:.2f} GB" for folder, size in sizes.items())
        case _, dict(found) if name == "versions":
            return ", ".join(f"{package} {number}" for package, number in found.items())
        case _, dict(found):
            return ", ".join(f"{each} {'yes' if there else 'no'}" for each, there in found.items())
        case _, int(size):
            return f"{size / GIGABYTE:.1f} GB"
    return str(value)

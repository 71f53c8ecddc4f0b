"""``cascadevlm compare``."""

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cascadevlm.base.errors import InputError
from cascadevlm.base.files import visible
from cascadevlm.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from cascadevlm.cascade.cascade import Cascade
    from cascadevlm.config.config import Config
    from cascadevlm.evaluation.compare import Comparison
    from cascadevlm.evaluation.data import Data

MOST_SHOWN = 20
"""Number of images with disagreement that the terminal shows. ``--json`` shows all of them."""


@options.grouped()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Two or more folders of records, or configuration files.")],
    part: options.DataOptions,
    data: Annotated[
        str | None, typer.Option(help="Labelled images for the configurations, in the form that evaluate reads.")
    ] = None,
    labels: options.Labels = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for the records of the configurations.", show_default="the records are not kept"
        ),
    ] = None,
    yes: options.Yes = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object. It contains all images on which the runs disagree.")
    ] = False,
) -> None:
    """Compare runs over the same images. A question that several configurations have in common is asked once."""
    from rich.console import Console
    from rich.progress import Progress

    from cascadevlm.cli.money import confirm
    from cascadevlm.config.config import Config, read_toml
    from cascadevlm.evaluation.compare import compare as compared
    from cascadevlm.evaluation.compare import labelled, require_same
    from cascadevlm.evaluation.record import read_record
    from cascadevlm.evaluation.sharing import record_runs, sharing

    names = _names(runs)
    records = {name: read_record(path) for name, path in zip(names, runs, strict=True) if path.is_dir()}
    configs = {
        name: Config.parse(read_toml(path), name=str(path)) for name, path in zip(names, runs, strict=True) if name not in records
    }
    if not configs and (data or labels or output or part != options.DataOptions()):
        hint = "Remove --data, --labels, --output and the options that select images, or add a configuration."
        raise InputError("These options need a configuration, but all given runs are records.", hint=hint)
    cascades, given = _built(configs, part, data, labels)
    of_records = {name: labelled(record) for name, record in records.items()}
    require_same(of_records | {name: (cascades[name].labels, each.names, each.truths) for name, each in given.items()})
    cascades = sharing(cascades, configs)
    if not yes:
        for name, config in configs.items():
            confirm(config, cascades[name], given[name].images)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("images", total=sum(map(len, given.values())))
        records |= record_runs(cascades, given, configs=configs, folder=output, progress=lambda _: progress.advance(task))
    comparison = compared({name: records[name] for name in names})
    if as_json:
        typer.echo(json.dumps(comparison.to_dict()))
        return
    console = Console(highlight=False, markup=False)  # names may contain brackets
    console.print(
        f"{comparison.images} images that every run could read ({comparison.unreadable} more could not be read in every run).\n"
    )
    for table in (_runs(comparison), _pairs(comparison), _agreement(comparison)):
        console.print(table, "")
    console.print(*_disagreements(comparison), sep="\n", soft_wrap=True)


def _built(
    configs: "Mapping[str, Config]", part: options.DataOptions, data: str | None, labels: Path | None
) -> "tuple[dict[str, Cascade], dict[str, Data]]":
    """The cascade of each configuration, and its images."""
    cascades, given = {}, {}
    for name, config in configs.items():
        if data is None:
            raise InputError(f"The configuration {name!r} needs images.", hint="Add --data.")
        cascades[name], given[name] = part.build(config, data, labels)
    if cascades and data is not None:
        options.tell(next(iter(cascades.values())).labels, [data])
    return cascades, given


def _names(runs: Sequence[Path]) -> list[str]:
    """The names of the folders, and of the configuration files without their suffix.

    Raises:
        InputError: if there are fewer than two runs, or two runs have the same name.
    """
    if len(runs) < 2:
        raise InputError("A comparison needs at least two runs.", hint="Give two or more records or configurations.")
    names = [path.resolve().name if path.is_dir() else path.stem for path in runs]
    for (name, path), (other, its_path) in combinations(zip(names, runs, strict=True), 2):
        if name == other:
            raise InputError(f"{str(path)!r} and {str(its_path)!r} are both named {name!r}.", hint="Rename one of them.")
    return names


def _runs(comparison: "Comparison") -> "Table":
    from rich.table import Table

    table = Table(
        "", "accuracy", "95 % interval", "escalated", "$ per 1,000", "paid", "s, median", "s, p95", box=None, header_style="bold"
    )
    for name, run in comparison.runs.items():
        seconds = ["-" if each is None else f"{each:.3f}" for each in (run.latency_p50, run.latency_p95)]
        table.add_row(
            name,
            f"{run.accuracy:.1%}",
            _in_percent(run.accuracy_interval),
            f"{run.deferral_rate:.1%}",
            f"{run.dollars_per_thousand:.4f}",
            f"${run.paid_dollars:.4f}",
            *seconds,
        )
    return table


def _pairs(comparison: "Comparison") -> "Table":
    from rich.table import Table

    several = len(comparison.pairs) > 1
    adjusted = ["p (Holm)"] * several
    table = Table(
        "", "", "difference", "95 % interval", "p", *adjusted, "only one right", "judges agree", box=None, header_style="bold"
    )
    for pair in comparison.pairs:
        judges = "-" if pair.judges is None else f"{pair.judges.agreement:.1%} of {pair.judges.images}"
        table.add_row(
            pair.first,
            pair.second,
            f"{pair.difference:+.1%}",
            _in_percent(pair.difference_interval, "+"),
            f"{pair.p_value:.3f}",
            *[f"{pair.p_value_holm:.3f}"] * several,
            f"{pair.only_first}, {pair.only_second}",
            judges,
        )
    return table


def _agreement(comparison: "Comparison") -> "Table":
    from rich.table import Table

    table = Table("agreement", *comparison.runs, box=None, header_style="bold")
    for name, row in zip(comparison.runs, comparison.agreement, strict=True):
        table.add_row(name, *(f"{share:.1%}" for share in row))
    return table


def _disagreements(comparison: "Comparison") -> list[str]:
    """Lines of text: each image with its truth, followed by the prediction of each run."""
    width = max(map(len, comparison.runs))
    lines = [f"{len(comparison.disagreements)} images on which the runs disagree"]
    for each in comparison.disagreements[:MOST_SHOWN]:
        lines.append(visible(f"  {each.name}: {each.truth}"))
        lines += [visible(f"    {name:{width}}  {label or '-'}") for name, label in each.labels.items()]
    rest = len(comparison.disagreements) - MOST_SHOWN
    return lines + [f"  and {rest} more; use --json to see them"] * (rest > 0)


def _in_percent(interval: tuple[float, float] | None, sign: str = "") -> str:
    return "-" if interval is None else f"{100 * interval[0]:{sign}.1f} to {100 * interval[1]:{sign}.1f}"

"""``cascadevlm demo``."""

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from cascadevlm.base.labels import LabelSet
    from cascadevlm.base.types import Prediction
    from cascadevlm.config.config import Config


def demo(
    images: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of images to classify. Default: all 48 bundled images; with --learn, 1,000 drawn images.",
            show_default=False,
        ),
    ] = None,
    learn: Annotated[
        bool,
        typer.Option("--learn", help="Compare a cascade that learns during the run with cascades that do not, on drawn images."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Classify the bundled images of drawn birds with the bundled models, which were not trained on these species."""
    from importlib import resources
    from pathlib import Path

    from rich.console import Console

    from cascadevlm.base.labels import LabelSet
    from cascadevlm.cli.show import prediction_block, print_summary
    from cascadevlm.config.config import Config, read_toml

    console = Console(quiet=as_json, highlight=False)
    with resources.as_file(resources.files("cascadevlm_backends") / "aviary") as folder:
        paths: list[Path] = sorted((folder / "images").glob("*.jpg"))
        labels = LabelSet.of(path.stem for path in paths)
        config = Config.parse(read_toml(folder / "cascade.toml"), name="cascade.toml")
        if learn:
            _show_learning(console, config, labels, images, as_json=as_json)
            return
        cascade = config.build(labels)
        paths = paths[:images]
        console.print(
            f"Classifying {len(paths)} images among {len(labels)} species never seen in training: open_clip:aviary ranks, "
            "hf_chat:aviary judges the images about which it is unsure. The true species is underlined.\n"
        )
        began = time.perf_counter()
        predictions = []
        for number, (path, prediction) in enumerate(zip(paths, cascade.stream(paths), strict=True), start=1):
            predictions.append(prediction)
            console.print(prediction_block(prediction, title=f"{number}/{len(paths)} {path.name}", truth=path.stem))
        seconds = time.perf_counter() - began

    figures = _figures(predictions, [path.stem for path in paths]) | {"seconds": round(seconds, 2)}
    if as_json:
        typer.echo(json.dumps(figures))
        return
    print_summary(console, "Summary", _rows(figures, sum(p.cost.dollars for p in predictions)))


def _rows(figures: dict[str, float], dollars: float) -> dict[str, str]:
    return {
        "images": str(figures["n"]),
        "scorer alone, right": f"{figures['scorer_top1']:.0%}",
        "truth among the scorer's five best": f"{figures['scorer_top5']:.0%}",
        "cascade, right": f"{figures['cascade_accuracy']:.0%}",
        "escalated to the judge": f"{figures['escalated']:.0%} ({figures['judge_calls']} calls)",
        "cost": f"${dollars:.2f} (local models)",
        "seconds": f"{figures['seconds']:.1f}",
    }


def _show_learning(console: "Console", config: "Config", labels: "LabelSet", images: int | None, *, as_json: bool) -> None:
    """Compare three cascades that ask about the same share of drawn images, and print their figures."""
    from rich.table import Table

    from cascadevlm.cli.demo_learning import IMAGES, LABELLED, POLICY, learning_figures

    count = images or IMAGES
    console.print(
        f"Drawing {LABELLED + count} birds of {len(labels)} species never seen in training. {LABELLED} labelled birds calibrate "
        f"three cascades, which then classify the others with {POLICY!r}. This takes about two minutes.\n"
    )
    figures = learning_figures(config, labels, count)
    if as_json:
        typer.echo(json.dumps(figures.to_dict()))
        return
    table = Table("cascade", "asked", "right", "right in the second half", "believed to be right", box=None)
    for name, way in figures.ways.items():
        told = way.to_dict()
        table.add_row(name, *(f"{told[each]:.1%}" for each in ("asked", "right", "right_second_half", "believed")))
    console.print(table)
    low, high = figures.interval
    console.print(
        "\nfixed: calibrated, nothing learned. support: the labelled birds teach the scorer. learning: the run teaches it, too.\n"
        f"Learning against support: {100 * figures.gain:+.1f} percentage points right "
        f"(95 % interval {100 * low:+.1f} to {100 * high:+.1f}).\n"
        "The bundled scorer sees 28 x 28 pixels, on which most wing patterns are not visible. What the scorer does not see, it\n"
        "cannot learn, so little is gained here."
    )


def _figures(predictions: "Sequence[Prediction]", truths: Sequence[str]) -> dict[str, float]:
    ranked = [[c.label.name for c in sorted(p.candidates, key=lambda c: c.rank)] for p in predictions]
    count = len(truths)
    return {
        "n": count,
        "scorer_top1": sum(truth == names[0] for truth, names in zip(truths, ranked, strict=True)) / count,
        "scorer_top5": sum(truth in names[:5] for truth, names in zip(truths, ranked, strict=True)) / count,
        "cascade_accuracy": sum(truth == p.label for truth, p in zip(truths, predictions, strict=True)) / count,
        "escalated": sum(p.escalated for p in predictions) / count,
        "judge_calls": sum(p.cost.requests for p in predictions),
    }

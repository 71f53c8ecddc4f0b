"""``cascadevlm adapt``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cascadevlm.cli import options

if TYPE_CHECKING:
    from cascadevlm.config.config import Config
    from cascadevlm.evaluation.adapting import Adapted


@options.grouped("judge", "policy", "candidates", "prompt")
def adapt(
    given: options.CascadeOptions,
    part: options.DataOptions,
    output: Annotated[
        Path, typer.Option("--output", "-o", dir_okay=False, help='The file to write, for scorer.adapter = "FILE".')
    ],
    data: Annotated[
        Path | None,
        typer.Argument(help="Labelled images: a folder of folders, a table with path and label, a saved dataset."),
    ] = None,
    unlabelled: Annotated[
        list[Path] | None, typer.Option(help="Images without labels, or folders of them. May be given more than once.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="How to learn: means, cache or linear. Only means learns from images without labels.")
    ] = "means",
    as_json: options.AsJson = False,
) -> None:
    """Teach the scorer from its embeddings of images, write what was learned to a file, and measure what it gains.

    The gain is measured on labelled images that were left out of the learning, five times a fifth of them.
    """
    from rich.console import Console
    from rich.progress import Progress

    from cascadevlm.base.errors import InputError
    from cascadevlm.cli.show import print_summary
    from cascadevlm.config.config import require_embeddings
    from cascadevlm.evaluation.adapting import adapt as adapted
    from cascadevlm.evaluation.adapting import embedded
    from cascadevlm.scorers.adapters import METHODS

    if method not in METHODS:
        raise InputError(f"There is no method {method!r}.", hint=f"Known: {', '.join(METHODS)}.")
    if data is None and not unlabelled:
        raise InputError("There are no images to learn from.", hint="Give a folder of labelled images, or --unlabelled IMAGES.")
    if unlabelled and method != "means":
        raise InputError(f"The method {method!r} needs labels.", hint="Leave --unlabelled out, or take --method means.")
    config = _bare(given.parse())
    require_embeddings(config.scorer.build(), config.scorer.use)
    if data is None:
        cascade, images, truths = given.build(config, bulk=True), [], []
    else:
        cascade, labelled = part.build(config, data, given.labels, bulk=True)
        images, truths = [*labelled.images], [*labelled.truths]
    more = options.image_files(unlabelled or [])
    options.tell(cascade.labels, [*filter(None, [data]), *(unlabelled or [])])
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("images", total=len(images) + len(more))
        scores, readable = embedded(cascade, [*images, *more], lambda _: progress.advance(task))
    truths += [""] * len(more)
    if unread := int((~readable).sum()):
        typer.echo(f"{unread} images cannot be read and are left out.", err=True)
    result = adapted(scores, [truth for truth, read in zip(truths, readable, strict=True) if read], method=METHODS[method])
    result.adapter.write(output)
    if as_json:
        typer.echo(json.dumps(_figures(result)))
        return
    print_summary(Console(highlight=False), f"Adapter ({output})", _rows(result))
    typer.echo(_conclusion(result))


def _bare(config: "Config") -> "Config":
    """The configuration with the scorer alone: without adapter, judges and calibration."""
    scorer = config.scorer.model_copy(update={"adapter": None})
    alone = {"scorer": scorer, "stage": (), "calibration": None, "follow_shares": False, "learn": False, "routing": False}
    return config.model_copy(update=alone)


def _figures(result: "Adapted") -> dict[str, object]:
    made = result.adapter.made
    return {
        "method": made.method,
        "images": made.images,
        "labelled": made.labelled,
        "measured": result.measured,
        "before": result.before,
        "after": result.after,
        "gain": result.gain,
        "gain_interval": result.gain_interval,
        "changed": result.changed,
        "digest": result.adapter.digest,
    }


def _rows(result: "Adapted") -> dict[str, str]:
    made = result.adapter.made
    rows = {"method": made.method, "images": f"{made.images} ({made.labelled} with a known label)"}
    if result.before is not None and result.after is not None:
        rows["labelled images, near-duplicates counted once"] = str(result.measured)
        rows["scorer, right"] = f"{result.before:.1%}"
        rows["adapted, right on images left out"] = f"{result.after:.1%}"
        low, high = result.gain_interval or (float("nan"),) * 2
        rows["gain"] = f"{100 * (result.gain or 0):+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"
    return rows | {"best label changed": f"{result.changed:.1%} of the images"}


def _conclusion(result: "Adapted") -> str:
    """What to do with the adapter, in words."""
    if result.gain is None:
        return "Without labelled images, the gain is unknown. To measure it, give a folder of labelled images, too."
    if not result.gains:
        return "These images show no gain: the interval reaches 0. Do not use the adapter, or try more images."
    return "The adapter gains. Use it as scorer.adapter; a calibration that was made without it has to be made again."

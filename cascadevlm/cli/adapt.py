"""``cascadevlm adapt``."""

import json
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cascadevlm.cli import options

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from cascadevlm.base.images import ImageSource
    from cascadevlm.base.types import Scores
    from cascadevlm.cascade.cascade import Cascade
    from cascadevlm.config.config import Config
    from cascadevlm.evaluation.adapting import Adapted
    from cascadevlm.scorers.adapters import Method

Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        help='The file to write, for scorer.adapter = "FILE" or scorer.pool = "FILE". With --again: a new or empty folder.',
    ),
]
Source = Annotated[
    Path | None,
    typer.Argument(
        help="Labelled images: a folder of folders, a table with path and label, a saved dataset, or a record from "
        "evaluate -o. Or the folder of a run: its judge's answers and labels from people teach. A record or run needs no options."
    ),
]


@options.grouped("judge", "policy", "candidates", "prompt")
def adapt(
    given: options.CascadeOptions,
    part: options.DataOptions,
    output: Output,
    source: Source = None,
    unlabelled: Annotated[
        list[Path] | None, typer.Option(help="Images without labels, or folders of them. May be given more than once.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="How to learn: means, cache or linear. Only means learns from images without labels. "
            "pool: how much each of several scorers counts."
        ),
    ] = "means",
    again: Annotated[
        bool,
        typer.Option(
            "--again",
            help="Decide a finished run with learn = true again, with all that it learned and with the labels from people, and "
            "ask nobody. --output is then a new folder for the predictions.",
        ),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Teach the scorer from its embeddings of images, write what was learned to a file, and measure what it gains.

    The gain is measured on labelled images that were left out of the learning, five times a fifth of them. For a run, these are
    the labelled images of its calibration.
    """
    from rich.console import Console

    from cascadevlm.base.errors import InputError
    from cascadevlm.cli.show import print_summary
    from cascadevlm.scorers.adapters import METHODS

    if again:
        _again(source, output, as_json=as_json)
        return
    if output.is_dir():
        raise InputError(f"{str(output)!r} is a folder.", hint="Name a file. Only --again writes a folder.")
    if method not in (*METHODS, "pool"):
        raise InputError(f"There is no method {method!r}.", hint=f"Known: {', '.join(METHODS)}, pool.")
    if source is None and not unlabelled:
        raise InputError("There are no images to learn from.", hint="Give a folder of labelled images, or --unlabelled IMAGES.")
    if unlabelled and method != "means":
        raise InputError(f"The method {method!r} needs labels.", hint="Leave --unlabelled out, or take --method means.")
    if method == "pool":
        _pool(given, part, source, output, as_json=as_json)
        return
    result = _learned(given, part, source, unlabelled or [], METHODS[method])
    result.adapter.write(output)
    if as_json:
        typer.echo(json.dumps(_figures(result)))
        return
    print_summary(Console(highlight=False), f"Adapter ({output})", _rows(result))
    typer.echo(_conclusion(result))


def _learned(
    given: options.CascadeOptions, part: options.DataOptions, source: Path | None, unlabelled: list[Path], method: "Method"
) -> "Adapted":
    """What the source and the images without labels teach."""
    from cascadevlm.base.errors import InputError
    from cascadevlm.runs.corrections import read_corrections
    from cascadevlm.runs.manifest import NAME, Manifest

    if source is None or not (source / NAME).is_file():
        return _of_images(given, part, source, unlabelled, method)
    if unlabelled:
        raise InputError("--unlabelled has no effect with a record or a run.", hint="Leave --unlabelled out.")
    if Manifest.read(source).labelled:
        return _of_record(source, method)
    if method == "means":
        return _of_run(source)
    if read_corrections(source).counting:
        return _of_corrected(source, method)
    raise InputError(f"The method {method!r} needs labels, and a run has none.", hint="Take --method means.")


def _again(run: Path | None, output: Path, *, as_json: bool) -> None:
    """Decide a run again, and say what changed."""
    from rich.console import Console

    from cascadevlm.base.errors import InputError
    from cascadevlm.base.labels import LabelSet
    from cascadevlm.cli.show import print_summary
    from cascadevlm.config.config import Config
    from cascadevlm.runs.again import decide_again
    from cascadevlm.runs.manifest import NAME, Manifest

    if run is None or not (run / NAME).is_file():
        raise InputError("--again needs the folder of a run.", hint="For example: cascadevlm adapt RUN --again -o FOLDER.")
    manifest = Manifest.read(run)
    cascade = Config.parse(manifest.config, name=str(run)).build(LabelSet(tuple(manifest.labels)), bulk=True)
    found = decide_again(run, output, cascade)
    if as_json:
        typer.echo(json.dumps(vars(found)))
        return
    rows = {
        "images": str(found.images),
        "labels changed": str(found.changed),
        "labelled images of the calibration, each without its own label": str(found.measured),
        "scorer before the run, right": f"{found.before:.1%}",
        "scorer after the run, right": f"{found.after:.1%}",
    }
    print_summary(Console(highlight=False), f"Predictions in {output}", rows)


def _of_images(
    given: options.CascadeOptions, part: options.DataOptions, data: Path | None, unlabelled: "list[Path]", method: "Method"
) -> "Adapted":
    """What labelled images teach, and images without labels."""
    from cascadevlm.evaluation.adapting import adapt as adapted

    config = _bare(given.parse())
    if data is None:
        cascade, images, truths = given.build(config, bulk=True), [], []
    else:
        cascade, labelled = part.build(config, data, given.labels, bulk=True)
        images, truths = [*labelled.images], [*labelled.truths]
    more = options.image_files(unlabelled)
    options.tell(cascade.labels, [*filter(None, [data]), *unlabelled])
    scores, readable = embed(cascade, [*images, *more])
    truths += [""] * len(more)
    return adapted(scores, [truth for truth, read in zip(truths, readable, strict=True) if read], method=method)


def _of_record(folder: Path, method: "Method") -> "Adapted":
    """What the labelled images of a record teach."""
    import numpy as np

    from cascadevlm.config.config import Config
    from cascadevlm.evaluation.adapting import adapt as adapted
    from cascadevlm.evaluation.record import read_record

    record = read_record(folder)
    record = record.take(np.flatnonzero(record.readable))
    scores, truths = record.scores, [record.labels.names[truth] for truth in record.truths]
    assert record.info is not None
    config = _bare(Config.parse(record.info.config, name=str(folder)))
    if scores.embeddings is None or any(part in scores.fingerprint for part in ("|adapter=", "|calibrated=", "|learning")):
        scores, readable = embed(config.build(record.labels, bulk=True), list(record.names))
        truths = [truth for truth, read in zip(truths, readable, strict=True) if read]
    return adapted(scores, truths, method=method)


def _of_run(folder: Path) -> "Adapted":
    """What the answers of a run's judge teach."""
    from cascadevlm.evaluation.adapting_to_runs import adapt_to_run, read_said

    said = read_said(folder)
    if said.scores is not None:
        return adapt_to_run(said.scores, said)
    config = _bare(said.config)
    scores, readable = embed(config.build(said.labels, bulk=True), said.images)
    return adapt_to_run(scores, said.rows(readable))


def _of_corrected(folder: Path, method: "Method") -> "Adapted":
    """What the images of a run that people labelled teach."""
    from cascadevlm.evaluation.adapting import adapt as adapted
    from cascadevlm.evaluation.corrected import read_corrected

    record = read_corrected(folder).scored(lambda config, labels, images: embed(_bare(config).build(labels, bulk=True), images))
    return adapted(record.scores, [record.labels.names[truth] for truth in record.truths], method=method)


def embed(cascade: "Cascade", images: "Sequence[ImageSource]") -> "tuple[Scores, NDArray[np.bool_]]":
    """The scores, with embeddings, of the images that can be read; and for each image whether it can. Shows the progress."""
    from cascadevlm.base.progress import progress_bar
    from cascadevlm.evaluation.adapting import embedded

    with progress_bar(len(images)) as show:
        done = count(1)
        scores, readable = embedded(cascade, images, lambda _: show(next(done), None))
    if unread := int((~readable).sum()):
        typer.echo(f"{unread} images cannot be read and are left out.", err=True)
    return scores, readable


def _pool(
    given: options.CascadeOptions,
    part: options.DataOptions,
    data: Path | None,
    output: Path,
    *,
    as_json: bool,
) -> None:
    """Fit a pool to labelled images, write it, and say what it gains."""
    from rich.console import Console

    from cascadevlm.base.errors import InputError
    from cascadevlm.base.progress import progress_bar
    from cascadevlm.cli.show import print_summary
    from cascadevlm.evaluation.pooling import pool

    config = given.parse()
    config = alone(config.model_copy(update={"scorer": config.scorer.model_copy(update={"pool": None})}))
    if isinstance(config.scorer.use, str) or data is None:
        what = "several scorers" if data else "labelled images"
        raise InputError(f"The method 'pool' needs {what}.", hint='Set scorer.use to a list such as ["open_clip:…", "hf:…"].')
    cascade, labelled = part.build(config, data, given.labels, bulk=True)
    options.tell(cascade.labels, [data])
    with progress_bar(len(labelled.images) * len(config.scorer.use)) as show:
        done = count(1)
        result = pool(cascade, labelled.images, labelled.truths, lambda _: show(next(done), None))
    result.pool.write(output)
    names, weights = [str(section.use) for section in config.scorer.use], result.pool.weights.tolist()
    low, high = result.gain_interval
    if as_json:
        figures = {"right": result.right, "gain": result.gain, "gain_interval": (low, high)}
        scorers = [
            {"scorer": name, "weight": weight, "right": right}
            for name, weight, right in zip(names, weights, result.each, strict=True)
        ]
        typer.echo(json.dumps({"method": "pool", "images": result.pool.images, "scorers": scorers} | figures))
        return
    rows = {"images": str(result.pool.images)}
    for number, (name, weight, right) in enumerate(zip(names, weights, result.each, strict=True), start=1):
        rows[f"{number}: {name}"] = f"{right:.1%} right, weight {weight:.2f}"
    rows["pool, right on images left out"] = f"{result.right:.1%}"
    rows["gain over the best scorer"] = f"{100 * result.gain:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"
    print_summary(Console(highlight=False), f"Pool ({output})", rows)
    typer.echo(
        "The pool gains. Use it as scorer.pool; a calibration that was made without it has to be made again."
        if low > 0
        else "These images show no gain over the best scorer alone: the interval reaches 0."
    )


def _bare(config: "Config") -> "Config":
    """The configuration with the scorer alone, without its adapter.

    Raises:
        InputError: if the scorer gives no embeddings.
    """
    from cascadevlm.config.scorer import require_embeddings

    require_embeddings(config.scorer.build(), config.scorer.use)
    return alone(config.model_copy(update={"scorer": config.scorer.model_copy(update={"adapter": None})}))


def alone(config: "Config") -> "Config":
    """The configuration with the scorer alone: without judges and calibration."""
    return type(config)(labels=config.labels, scorer=config.scorer, batch_size=config.batch_size, cache=config.cache)


def _figures(result: "Adapted") -> dict[str, object]:
    made = result.adapter.made
    return {
        "method": made.method,
        "images": made.images,
        "labelled": made.labelled,
        "measured": result.measured,
        "labels_without_images": result.unseen,
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
        if result.unseen:
            rows["labels without a labelled image"] = f"{result.unseen} of {len(result.adapter.labels)}"
        rows["scorer, right"] = f"{result.before:.1%}"
        rows["adapted, right on images left out"] = f"{result.after:.1%}"
        low, high = result.gain_interval or (float("nan"),) * 2
        rows["gain"] = f"{100 * (result.gain or 0):+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"
    return rows | {"best label changed": f"{result.changed:.1%} of the images"}


def _conclusion(result: "Adapted") -> str:
    """What to do with the adapter, in words."""
    if result.gain is None:
        return (
            "No labelled images were left out of the learning, so the gain is unknown. To measure it, give labelled images, or a "
            "run with a calibration that holds some."
        )
    if result.unseen:
        return (
            f"{result.unseen} of {len(result.adapter.labels)} labels have no labelled image, and the adapter may make images of "
            "these worse. Give labelled images of every label, or leave these labels out of the label set."
        )
    if not result.gains:
        return "These images show no gain: the interval reaches 0. Do not use the adapter, or try more images."
    return "The adapter gains. Use it as scorer.adapter; a calibration that was made without it has to be made again."

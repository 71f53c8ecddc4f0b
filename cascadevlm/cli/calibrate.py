"""``cascadevlm calibrate``."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cascadevlm.cli import options

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cascadevlm.base.images import ImageSource
    from cascadevlm.base.labels import LabelSet
    from cascadevlm.base.types import Scores
    from cascadevlm.config.config import Config
    from cascadevlm.evaluation.calibrating.recipe import Recipe
    from cascadevlm.evaluation.calibrating.unlabelled import Unlabelled
    from cascadevlm.evaluation.record import Record


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """The options of a calibration."""

    size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of images to calibrate on. The result is measured on the other images.",
            show_default="half of the images",
        ),
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of the random draw of these images.")] = 0
    without_labels: Annotated[
        bool,
        typer.Option(
            "--without-labels",
            help="Do not use the labels. The judge is treated as an annotator who makes errors. If the judge is weak, the result "
            "is too optimistic: label 20 images instead if you can.",
        ),
    ] = False
    fusion: Annotated[
        Literal["bayes", "judge"],
        typer.Option(
            help="How the final label is chosen after a question. bayes: by scorer and judge together. judge: by the judge alone."
        ),
    ] = "bayes"
    measure: Annotated[
        Literal["gain", "entropy", "margin", "top_probability"],
        typer.Option(help="What the policy for a target compares with its threshold."),
    ] = "gain"
    coverage: Annotated[
        float,
        typer.Option(help="Probability that a conformal list, candidates = { coverage = … }, contains the true class."),
    ] = 0.95
    class_conditional: Annotated[
        bool,
        typer.Option("--class-conditional", help="Make conformal lists reach the coverage for each class, not only on average."),
    ] = False
    shares: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with the expected share of each class by name. The calibration can adapt the scorer to these shares.",
            show_default="equal shares",
        ),
    ] = None
    deferral_rate: Annotated[
        float | None, typer.Option(help="Target: escalate at most this share of the images. Choose one target at most.")
    ] = None
    dollars_per_thousand: Annotated[
        float | None, typer.Option(help="Target: spend at most this number of US dollars per 1,000 images.")
    ] = None
    accuracy: Annotated[
        float | None, typer.Option(help="Target: reach at least this accuracy, with as few questions as possible.")
    ] = None
    judge_share: Annotated[
        float | None,
        typer.Option(
            help="Target: reach at least this share of the accuracy that the judge reaches if it is asked about every image."
        ),
    ] = None
    target_error: Annotated[
        float | None,
        typer.Option(help="Guarantee: at most this share of the accepted answers is wrong. Other images get no label."),
    ] = None
    confidence: Annotated[float, typer.Option(help="Probability that the guarantee holds.")] = 0.95

    def parse(self) -> "Recipe":
        """The recipe that the options describe.

        Raises:
            InputError: if an option is out of its range, or two options contradict each other.
        """
        from cascadevlm.base.errors import InputError
        from cascadevlm.evaluation.calibrating.recipe import Recipe, read_shares
        from cascadevlm.evaluation.calibrating.targets import Target, TargetKind

        values: dict[TargetKind, float | None] = {
            "deferral_rate": self.deferral_rate,
            "dollars_per_thousand": self.dollars_per_thousand,
            "accuracy": self.accuracy,
            "judge_share": self.judge_share,
        }
        targets = [Target(kind=kind, value=value) for kind, value in values.items() if value is not None]
        if len(targets) > 1:
            named = " and ".join(f"--{target.kind.replace('_', '-')}" for target in targets)
            raise InputError(f"A policy is chosen for one target, not for {named}.", hint="Remove all but one.")
        return Recipe(
            size=self.size,
            seed=self.seed,
            labelled=not self.without_labels,
            fusion=self.fusion,
            measure=self.measure,
            target=targets[0] if targets else None,
            target_error=self.target_error,
            confidence=self.confidence,
            coverage=self.coverage,
            class_conditional=self.class_conditional,
            shares=read_shares(self.shares) if self.shares else None,
        )


WITHOUT_LABELS = (
    "Without labels, nothing here was measured against the truth. The judge is believed to be good: if the judge is weak, "
    "probabilities and gains are too high. Label 20 images or more at random, and calibrate on these: --size 20."
)


@options.grouped()
def calibrate(
    run: Annotated[
        Path,
        typer.Argument(
            help="Folder of a record from: cascadevlm evaluate --judge-all -o FOLDER. Or the folder of a run with labels from "
            "people, see the command import."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help='File for the calibration. A configuration uses it with: calibration = "FILE".')
    ],
    given: RecipeOptions,
    unlabelled: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a run of the same cascade, whose images have no labels. What its judge said is used beside the "
            "labels, which helps if there are few labels."
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Learn how reliable the scorer and the judge are, and write a calibration file.

    A target also chooses the threshold of the policy. A guarantee also chooses which answers are accepted.
    """
    import json

    from rich.console import Console

    from cascadevlm.cli.show import calibration_rows, print_summary
    from cascadevlm.evaluation.calibrating.calibrate import calibrate as calibrated
    from cascadevlm.evaluation.corrected import read_corrected
    from cascadevlm.evaluation.record import read_record
    from cascadevlm.evaluation.report import is_bulk_run

    recipe, corrected = given.parse(), read_corrected(run) if is_bulk_run(run) else None
    record = corrected.scored(_embed) if corrected else read_record(run)
    result = calibrated(record, recipe, _beside(record, unlabelled) if unlabelled else None)
    result.calibration.write(output)
    if as_json:
        typer.echo(json.dumps(result.calibration.figures | {"policy": result.calibration.policy}))
        return
    title = f"Calibration, measured on images that it was not fitted on ({output})"
    print_summary(Console(highlight=False), title, calibration_rows(result))
    if not result.calibration.labelled:
        typer.echo(WITHOUT_LABELS)
    if corrected:
        typer.echo(corrected.describe())


def _embed(config: "Config", labels: "LabelSet", images: "list[ImageSource]") -> "tuple[Scores, NDArray[np.bool_]]":
    """The scores of the images that can be read, from the scorer alone; and for each image whether it can."""
    from cascadevlm.cli.adapt import alone, embed

    return embed(alone(config).build(labels, bulk=True), images)


def _beside(record: "Record", folder: Path) -> "Unlabelled":
    """What the judge of a run said, to be used beside the labelled images of a record."""
    from cascadevlm.evaluation.adapting_to_runs import read_said
    from cascadevlm.evaluation.calibrating.unlabelled import Unlabelled

    said = read_said(folder)
    scores, readable = _embed(said.config, said.labels, said.images)
    return Unlabelled.of(record, scores, said.rows(readable))

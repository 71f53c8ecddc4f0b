"""``cascadevlm calibrate``."""

from pathlib import Path
from typing import Annotated

import typer

from cascadevlm.cli import options

DEFAULT_SHARE = 0.5


def calibrate(
    run: Annotated[Path, typer.Argument(help="The folder of a record made by: evaluate --judge-all -o FOLDER.")],
    output: Annotated[Path, typer.Option("--output", "-o", help='The file to write, for calibration = "FILE".')],
    size: Annotated[
        int | None, typer.Option(min=1, help="Calibrate on so many images, measure on the others. [default: half]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Which images these are.")] = 0,
    without_labels: Annotated[
        bool, typer.Option("--without-labels", help="Do not look at their labels: take the judge for an annotator who errs.")
    ] = False,
    fusion: Annotated[
        str, typer.Option(help="Who decides after a question: bayes (both opinions) or judge (its answer).")
    ] = "bayes",
    measure: Annotated[str, typer.Option(help="What the policy goes by: gain, entropy, margin or top_probability.")] = "gain",
    coverage: Annotated[
        float, typer.Option(help="How often conformal lists, candidates = { coverage = … }, shall hold the truth.")
    ] = 0.95,
    class_conditional: Annotated[
        bool, typer.Option("--class-conditional", help="Conformal lists shall do so for every class, not only on average.")
    ] = False,
    shares: Annotated[
        Path | None, typer.Option(help="Shares of the classes, a JSON object by name, that the scorer may be matched to. [even]")
    ] = None,
    deferral_rate: Annotated[float | None, typer.Option(help="Target: escalate this share of the images.")] = None,
    dollars_per_thousand: Annotated[float | None, typer.Option(help="Target: spend this on a thousand images.")] = None,
    accuracy: Annotated[float | None, typer.Option(help="Target: this accuracy, with the fewest questions.")] = None,
    judge_share: Annotated[
        float | None, typer.Option(help="Target: this share of the accuracy of asking about everything.")
    ] = None,
    target_error: Annotated[
        float | None,
        typer.Option(help="Guarantee: at most this share of accepted answers is wrong; abstain from the others."),
    ] = None,
    confidence: Annotated[float, typer.Option(help="With this probability.")] = 0.95,
    as_json: options.AsJson = False,
) -> None:
    """Learn how far to trust scorer and judge, choose a threshold for a target, and write both to a file."""
    import json

    from rich.console import Console

    from cascadevlm.base.errors import InputError
    from cascadevlm.cli.show import calibration_rows, print_summary
    from cascadevlm.decision.calibration import FUSION_RULES
    from cascadevlm.evaluation.calibrating.calibrate import calibrate as calibrated
    from cascadevlm.evaluation.calibrating.calibrate import read_prior
    from cascadevlm.evaluation.calibrating.targets import Target, TargetKind
    from cascadevlm.evaluation.record import read_record
    from cascadevlm.evaluation.sweep import MEASURES

    if fusion not in FUSION_RULES:
        raise InputError(f"There is no fusion {fusion!r}.", hint=f"Known: {', '.join(FUSION_RULES)}.")
    if measure not in (known := ["gain", *MEASURES]):
        raise InputError(f"There is no measure {measure!r}.", hint=f"Known: {', '.join(known)}.")
    targets: dict[TargetKind, float | None] = {
        "deferral_rate": deferral_rate,
        "dollars_per_thousand": dollars_per_thousand,
        "accuracy": accuracy,
        "judge_share": judge_share,
    }
    given = [Target(kind=kind, value=value) for kind, value in targets.items() if value is not None]
    if len(given) > 1:
        raise InputError("A policy is chosen for one target.", hint="Give one of them.")
    if class_conditional and without_labels:
        raise InputError("Without labels, there are no conformal lists.", hint="Leave --class-conditional out.")
    if shares and without_labels:
        raise InputError("Without labels, shares are not matched.", hint="Leave --shares out.")
    record = read_record(run)
    result = calibrated(
        record,
        size=round(DEFAULT_SHARE * len(record)) if size is None else size,
        seed=seed,
        labelled=not without_labels,
        fusion=FUSION_RULES[fusion],
        measure=measure,
        target=given[0] if given else None,
        target_error=target_error,
        confidence=confidence,
        coverage=coverage,
        class_conditional=class_conditional,
        prior=read_prior(shares, record.labels) if shares else None,
    )
    result.calibration.write(output)
    if as_json:
        typer.echo(json.dumps(result.calibration.figures | {"policy": result.calibration.policy}))
        return
    print_summary(Console(highlight=False), f"Calibration, on images it was not fitted on ({output})", calibration_rows(result))

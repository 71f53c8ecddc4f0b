"""Evaluates a cascade on labelled images: makes a record, and computes the metrics of the run or of another policy."""

import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import JsonValue

from cascadevlm.cascade.cascade import Cascade
from cascadevlm.decision.calibration import FUSION_RULES
from cascadevlm.evaluation.data import Data
from cascadevlm.evaluation.deciding import BESIDE, calibration_beside, decided
from cascadevlm.evaluation.metrics import Evaluation, evaluate
from cascadevlm.evaluation.record import Record, read_record
from cascadevlm.evaluation.sweep import under
from cascadevlm.policies.base import Policy, PolicyLike
from cascadevlm.policies.language import parse_policy
from cascadevlm.policies.rules import Always
from cascadevlm.runs.bulk import run
from cascadevlm.runs.run_folder import SUMMARY
from cascadevlm.runs.tally import Tally


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The record of a cascade on labelled images, and its figures.

    Attributes:
        record: the record. If the judge was asked about every image, it contains these answers, too.
        evaluation: the figures.
        of_policy: true if the figures are for the policies of the cascade; false if they are for a judge that was asked about
            every image.
    """

    record: Record
    evaluation: Evaluation
    of_policy: bool


def measure(
    cascade: Cascade,
    data: Data,
    folder: Path | None = None,
    *,
    config: Mapping[str, JsonValue],
    judge_all: bool = False,
    progress: Callable[[Tally], None] = lambda tally: None,
    outlook: Callable[[str], None] = lambda sentence: None,
) -> Measured:
    """Run a cascade over labelled images, and evaluate the record.

    Args:
        cascade: the cascade.
        data: the labelled images.
        folder: folder of the record. An unfinished run in the folder is continued. Default: the record is not kept on disk.
        config: the configuration from which the cascade was built. It is stored in the record.
        judge_all: true to ask every judge about every image. The figures are for the policy of the cascade all the same, if the
            record can be replayed (`can_replay`).
        progress: function that is called after every prediction.
        outlook: function that is called with a sentence about the work that is left, if the folder contains predictions.

    Raises:
        DataError, RunError, JudgeError: in the same cases as `cascadevlm.runs.bulk.run`.
    """
    asking = asking_everything(cascade) if judge_all else cascade
    with nullcontext(folder) if folder else tempfile.TemporaryDirectory() as kept:
        record = record_run(asking, data, Path(kept), config=config, progress=progress, outlook=outlook)
    replays = judge_all and can_replay(record)
    evaluation = evaluate_replayed(record, cascade.stages[0].policy) if replays else evaluate(record)
    if folder:
        (folder / SUMMARY).write_text(json.dumps(evaluation.to_dict(), indent=2) + "\n", encoding="utf-8")
    return Measured(record=record, evaluation=evaluation, of_policy=replays or not judge_all)


def asking_everything(cascade: Cascade) -> Cascade:
    """A copy of the cascade that asks every judge about every image, so that every policy can be tried on its record."""
    return cascade.altered(stages=tuple(replace(stage, policy=Always()) for stage in cascade.stages), routing=False)


def record_run(
    cascade: Cascade,
    data: Data,
    folder: Path,
    *,
    config: Mapping[str, JsonValue],
    progress: Callable[[Tally], None] = lambda tally: None,
    outlook: Callable[[str], None] = lambda sentence: None,
) -> Record:
    """Run a cascade over labelled images into a folder, and read the record. An unfinished run in the folder is continued.

    Args:
        cascade: the cascade.
        data: the labelled images.
        folder: folder of the record. If the cascade has a calibration, the calibration is written into the folder.
        config: the configuration from which the cascade was built. It is stored in the record.
        progress: function that is called after every prediction.
        outlook: function that is called with a sentence about the work that is left, if the folder contains predictions.

    Raises:
        DataError, RunError, JudgeError: in the same cases as `cascadevlm.runs.bulk.run`.
    """
    run(cascade, data, folder, config=config, progress=progress, outlook=outlook)
    if cascade.calibration is not None:
        cascade.calibration.write(folder / BESIDE)
    return read_decided(folder)


def read_decided(folder: Path) -> Record:
    """Read the record in a folder. If the run used a calibration, the calibration and the fusion of the run are applied. They
    are not applied if ``widen`` was above 0.

    Raises:
        DataError: in the same cases as `read_record`.
        ConfigError: if the calibration in the folder is damaged or belongs to another cascade.
    """
    record, calibration = read_record(folder), calibration_beside(folder)
    if calibration is None or record.scores.fingerprint != calibration.calibrated_fingerprint:
        return record
    if any(stage.widen for stage in record.stated.stage):
        return record
    fusion = FUSION_RULES[record.stated.fusion] if record.stated.fusion else calibration.fusion
    return decided(record, replace(calibration, fusion=fusion))


def can_replay(record: Record) -> bool:
    """True if every policy can be tried on the record. Then the record has one stage, its judge was asked about every image,
    and ``widen`` was 0. With ``widen``, a record contains only the last question about an image.
    """
    asked_once = not any(stage.widen for stage in record.stated.stage)
    return len(record.stages) == 1 and asked_once and record.asked_everything


def evaluate_replayed(record: Record, policy: PolicyLike) -> Evaluation:
    """Evaluate a record as if its run had been made under a policy.

    The judge's answers about images that the policy does not escalate are known from the run. ``paid_dollars`` is the amount of
    the whole run.

    Raises:
        DataError: if the policy asks about images that the judge was not asked about.
    """
    return evaluate_part(under(record, policy), record)


def evaluate_part(part: Record, run: Record) -> Evaluation:
    """Evaluate a part of a run, such as the run under another policy, with the judge's answers in the whole run."""
    paid = float(sum(stage.paid.sum() for stage in run.stages))
    return replace(evaluate(part, everything=run.judged if run.stages else None), paid_dollars=paid)


def policies(record: Record) -> tuple[Policy, ...]:
    """The policies in the record's configuration; empty if the record has no configuration.

    Raises:
        PolicyError: if a policy is not installed.
    """
    return tuple(parse_policy(stage.policy) for stage in record.stated.stage if stage.policy)


def as_configured(record: Record) -> Record:
    """The record under the policy of its configuration, if the judge was asked about every image.

    In two cases, the record is returned unchanged: if the judge was not asked about every image, or if the run used a
    calibration that was not applied.
    """
    stated = policies(record)
    applied = record.stated.calibration is None or record.fused is not None
    replays = bool(stated) and applied and can_replay(record)
    return under(record, stated[0]) if replays else record

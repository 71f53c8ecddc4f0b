"""Evaluating a cascade on labelled images: the run with its record, and the metrics that another policy would have had."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cascadevlm.cascade.cascade import Cascade
from cascadevlm.config.config import Config
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
from cascadevlm.runs.run_folder import Tally


def asking_everything(cascade: Cascade) -> Cascade:
    """The cascade that asks every judge about every image, so that every policy can be tried on its record."""
    return cascade.altered(stages=tuple(replace(stage, policy=Always()) for stage in cascade.stages), routing=False)


def record_run(
    cascade: Cascade,
    data: Data,
    folder: Path,
    *,
    config: Config,
    progress: Callable[[Tally], None] = lambda tally: None,
    outlook: Callable[[str], None] = lambda sentence: None,
) -> Record:
    """Run a cascade over labelled images into a folder, or go on with the run in it, and read the record.

    Args:
        cascade: the cascade.
        data: the labelled images.
        folder: folder of the record. The calibration, if there is one, is copied into it.
        config: what the cascade was built from; it is kept with the record.
        progress: called after every prediction.
        outlook: called with a sentence about what is left to do, if the folder holds predictions.

    Raises:
        DataError, RunError, JudgeError: as `cascadevlm.runs.bulk.run`.
    """
    run(cascade, data, folder, config=config.model_dump(mode="json"), progress=progress, outlook=outlook)
    beside = folder / BESIDE
    if config.calibration is not None and config.calibration.resolve() != beside.resolve():
        shutil.copy(config.calibration, beside)
    return read_decided(folder)


def read_decided(folder: Path) -> Record:
    """The record in a folder. If a calibration decided in its run, the calibration and the run's fusion are applied, unless lists
    of candidates were widened.

    Raises:
        DataError: as `read_record`.
        ConfigError: if the calibration in the folder is damaged or of another cascade.
    """
    record, calibration = read_record(folder), calibration_beside(folder)
    if calibration is None or record.scores.fingerprint != calibration.calibrated_fingerprint:
        return record
    if any(stage.widen for stage in record.stated.stage):
        return record
    fusion = FUSION_RULES[record.stated.fusion] if record.stated.fusion else calibration.fusion
    return decided(record, replace(calibration, fusion=fusion))


def can_replay(record: Record) -> bool:
    """Whether every policy can be tried on the record: it has one stage, whose judge was asked about every image, and lists of
    candidates were not widened. Of widened lists, a record holds the last round only."""
    asked_once = not any(stage.widen for stage in record.stated.stage)
    return len(record.stages) == 1 and asked_once and record.asked_everything


def evaluate_replayed(record: Record, policy: PolicyLike) -> Evaluation:
    """Evaluate a record as if its run had been made under a policy.

    What the judge says about the images that the policy keeps is then known; ``paid_dollars`` are those of the whole run.

    Raises:
        DataError: if the policy asks about images that the judge was not asked about.
    """
    return evaluate_part(under(record, policy), record)


def evaluate_part(part: Record, run: Record) -> Evaluation:
    """Evaluate a part of a run, such as the run under a policy, with what the judge said in the whole run."""
    paid = float(sum(stage.paid.sum() for stage in run.stages))
    return replace(evaluate(part, everything=run.judged if run.stages else None), paid_dollars=paid)


def policies(record: Record) -> tuple[Policy, ...]:
    """The policies in the record's configuration; none if the record has no configuration.

    Raises:
        PolicyError: if a policy is not installed.
    """
    return tuple(parse_policy(stage.policy) for stage in record.stated.stage if stage.policy)


def as_configured(record: Record) -> Record:
    """The record under the policy of its configuration, if the judge was asked about every image.

    The record itself is returned if that is not so, or if a calibration decided in the run and was not applied.
    """
    stated = policies(record)
    applied = record.stated.calibration is None or record.fused is not None
    replays = bool(stated) and applied and can_replay(record)
    return under(record, stated[0]) if replays else record

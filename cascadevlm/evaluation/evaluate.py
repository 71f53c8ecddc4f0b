"""Evaluating a cascade on labelled images: a run and its record, and its metrics as another policy would have had them."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cascadevlm.base.types import Prediction
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.config.config import Config
from cascadevlm.decision.calibration import FUSION_RULES
from cascadevlm.evaluation.data import Data
from cascadevlm.evaluation.deciding import BESIDE, calibration_beside, decided
from cascadevlm.evaluation.metrics import Evaluation, evaluate
from cascadevlm.evaluation.record import Record, read_record
from cascadevlm.evaluation.recording import KeepingScorer, KeepingStage, write_record
from cascadevlm.evaluation.sweep import under
from cascadevlm.policies.base import Policy, PolicyLike
from cascadevlm.policies.language import parse_policy
from cascadevlm.policies.rules import Always


def asking_everything(cascade: Cascade) -> Cascade:
    """The cascade with every judge asked about every image, so that its record can be swept."""
    return cascade.altered(stages=tuple(replace(stage, policy=Always()) for stage in cascade.stages), routing=False)


def record_run(
    cascade: Cascade,
    data: Data,
    folder: Path,
    *,
    config: Config,
    progress: Callable[[Prediction], None] = lambda prediction: None,
) -> Record:
    """Run a cascade over labelled data and record it.

    Labelled images mostly come class by class, and their labels say more than any run can find out: no drift is looked for, and
    the shares of classes are not followed.

    Args:
        folder: of the record; there must be none in it. The calibration, if there is one, is copied to it.
        config: what the cascade was built from, to be kept with it.
        progress: told every prediction.

    Raises:
        DataError: if there is a record in the folder.
    """
    scorer, stages = KeepingScorer(cascade.scorer), [KeepingStage.of(stage) for stage in cascade.stages]
    keeping = cascade.altered(scorer=scorer, stages=stages, calibration=None, follow_shares=False)
    for prediction in write_record(
        folder,
        data=data,
        predictions=keeping.stream(data.images),
        scorer=scorer,
        stages=stages,
        labels=cascade.labels,
        config=config.model_dump(mode="json"),
        spec=config.scorer.use,
    ):
        progress(prediction)
    beside = folder / BESIDE
    if config.calibration is not None and config.calibration.resolve() != beside.resolve():
        shutil.copy(config.calibration, beside)
    return read_decided(folder)


def read_decided(folder: Path) -> Record:
    """The record in a folder; as the calibration saw it that decided in its run, by the run's fusion, unless lists grew wider in
    it.

    Raises:
        DataError: as `read_record`.
        ConfigError: if the calibration beside it is none, or another.
    """
    record, calibration = read_record(folder), calibration_beside(folder)
    if calibration is None or record.scores.fingerprint != calibration.calibrated_fingerprint:
        return record
    if any(stage.widen for stage in record.stated.stage):
        return record
    fusion = FUSION_RULES[record.stated.fusion] if record.stated.fusion else calibration.fusion
    return decided(record, replace(calibration, fusion=fusion))


def can_replay(record: Record) -> bool:
    """Whether the record has one stage, whose judge was asked about every image, so that it tells what any policy would give.

    Of lists that grew wider it holds the last round only.
    """
    asked_once = not any(stage.widen for stage in record.stated.stage)
    return len(record.stages) == 1 and asked_once and record.asked_everything


def evaluate_replayed(record: Record, policy: PolicyLike) -> Evaluation:
    """Evaluate a run in which the judge was asked about everything as one under a policy.

    What the judge says of the images that the policy keeps is known then; ``paid_dollars`` are those of the whole run.

    Raises:
        DataError: if the policy asks what was not asked.
    """
    return evaluate_part(under(record, policy), record)


def evaluate_part(part: Record, run: Record) -> Evaluation:
    """Evaluate what is left of a run under a policy, by what the judge is known to say of the images that the policy keeps."""
    paid = float(sum(stage.paid.sum() for stage in run.stages))
    return replace(evaluate(part, everything=run.judged if run.stages else None), paid_dollars=paid)


def policies(record: Record) -> tuple[Policy, ...]:
    """Those that the record's configuration states; none of a record without a configuration.

    Raises:
        PolicyError: if one is not installed here.
    """
    return tuple(parse_policy(stage.policy) for stage in record.stated.stage if stage.policy)


def as_configured(record: Record) -> Record:
    """The record under the policy of its configuration, where the judge was asked about everything; else the record itself.

    So it is, too, where a calibration decided and was not applied (`cascadevlm.decision.calibration.decided`).
    """
    stated = policies(record)
    applied = record.stated.calibration is None or record.fused is not None
    replays = bool(stated) and applied and can_replay(record)
    return under(record, stated[0]) if replays else record

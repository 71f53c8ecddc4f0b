"""Evaluating a cascade on labelled images: a run and its record, and its metrics as another policy would have had them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cascadevlm.cascade import Cascade
from cascadevlm.config import Config
from cascadevlm.data import Data
from cascadevlm.metrics import Evaluation, evaluate
from cascadevlm.policy import Always, PolicyLike
from cascadevlm.record import Record, read_record
from cascadevlm.recording import KeepingScorer, KeepingStage, write_record
from cascadevlm.sweep import under
from cascadevlm.types import Prediction


def asking_everything(cascade: Cascade) -> Cascade:
    """The cascade with every judge asked about every image, so that its record can be swept."""
    return cascade.altered(stages=[replace(stage, policy=Always()) for stage in cascade.stages])


def record_run(
    cascade: Cascade,
    data: Data,
    folder: Path,
    *,
    config: Config,
    progress: Callable[[Prediction], None] = lambda prediction: None,
) -> Record:
    """Run a cascade over labelled data and record it.

    Args:
        folder: of the record; there must be none in it.
        config: what the cascade was built from, to be kept with it.
        progress: told every prediction.

    Raises:
        DataError: if there is a record in the folder.
    """
    scorer, stages = KeepingScorer(cascade.scorer), [KeepingStage.of(stage) for stage in cascade.stages]
    for prediction in write_record(
        folder,
        data=data,
        predictions=cascade.altered(scorer=scorer, stages=stages).stream(data.images),
        scorer=scorer,
        stages=stages,
        labels=cascade.labels,
        config=config.model_dump(mode="json"),
        spec=config.scorer.use,
    ):
        progress(prediction)
    return read_record(folder)


def can_replay(record: Record) -> bool:
    """Whether the record has one stage, whose judge was asked about every image, so that it tells what any policy would give."""
    return len(record.stages) == 1 and bool(record.judged.asked[record.readable].all())


def evaluate_replayed(record: Record, policy: PolicyLike) -> Evaluation:
    """Evaluate a run in which the judge was asked about everything as one under a policy.

    What the judge says of the images that the policy keeps is known then; ``paid_dollars`` are those of the whole run.

    Raises:
        DataError: if the policy asks what was not asked.
    """
    evaluation = evaluate(under(record, policy), everything=record.judged)
    return replace(evaluation, paid_dollars=float(record.judged.paid.sum()))

"""Evaluating a cascade on labelled images: a run and its record, for the metrics to be computed of."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cascadevlm.cascade import Cascade
from cascadevlm.config import Config
from cascadevlm.data import Data
from cascadevlm.policy import Always
from cascadevlm.record import KeepingScorer, KeepingStage, Record, read_record, write_record
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

"""Runs several cascades over the same labelled images. Models, scores and answers are shared."""

import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from cascadevlm.base.errors import DataError
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Prediction
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.config.config import Config
from cascadevlm.config.loading import load_scorer
from cascadevlm.evaluation.data import Data
from cascadevlm.evaluation.evaluate import record_run
from cascadevlm.evaluation.record import Record, scores_kept
from cascadevlm.judges.base import Judge
from cascadevlm.judges.cache import MemoryStore
from cascadevlm.scorers.base import Scorer


def sharing(cascades: Mapping[str, Cascade], configs: Mapping[str, Config]) -> dict[str, Cascade]:
    """The cascades with shared models and one shared store of verdicts.

    The store is the one of the first cascade, or a store in memory if the first cascade has none.
    """
    first = next(iter(cascades.values()), None)
    store = MemoryStore() if first is None or first.store is None else first.store
    scorers: dict[str, Scorer] = {}
    judges: dict[str, Judge] = {}
    return {
        name: cascade.altered(
            scorer=scorers.setdefault(repr((configs[name].scorer, configs[name].calibration)), cascade.scorer),
            stages=[
                replace(stage, judge=judges.setdefault(repr((config.judge, config.options)), stage.judge))
                for stage, config in zip(cascade.stages, configs[name].stage, strict=True)
            ],
            store=store,
        )
        for name, cascade in cascades.items()
    }


def record_runs(
    cascades: Mapping[str, Cascade],
    data: Mapping[str, Data],
    *,
    configs: Mapping[str, Config],
    folder: Path | None,
    progress: Callable[[Prediction], None],
) -> dict[str, Record]:
    """Run every cascade over its labelled images.

    If several cascades have the same scorer and labels, only the first scores the images. The others use the recorded scores. A
    record with more than 1,000 labels does not contain all scores, so every cascade scores the images then.

    Args:
        cascades: the cascades by name. `sharing` makes them share models.
        data: the images of each cascade, by its name.
        configs: the configuration of each cascade, by its name. It is written to the record.
        folder: folder for the records, one subfolder per name. None: the records are not kept.
        progress: called with every prediction.

    Raises:
        DataError: if the folder contains one of the records already. This is checked before anything is run.
    """
    for name in cascades:
        if folder and (folder / name / "run.json").exists():
            raise DataError(f"{str(folder / name)!r} contains a record already.", hint="Choose another folder.")
    scored: dict[tuple[int, LabelSet], Path] = {}
    records = {}
    with nullcontext(folder) if folder else tempfile.TemporaryDirectory() as kept:
        for name, cascade in cascades.items():
            own = Path(kept) / name
            known = scored.setdefault((id(cascade.scorer), cascade.labels), own)
            replays = known != own and scores_kept(cascade.labels) == len(cascade.labels)
            running = cascade.altered(scorer=load_scorer(f"recorded:{known}")) if replays else cascade
            records[name] = record_run(running, data[name], own, config=configs[name], progress=progress)
    return records

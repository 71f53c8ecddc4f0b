"""Runs several cascades over the same labelled images. Models, scores and answers are shared."""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from cascadevlm.base.labels import LabelSet
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.config.config import Config
from cascadevlm.config.loading import load_scorer
from cascadevlm.evaluation.data import Data
from cascadevlm.evaluation.evaluate import record_run
from cascadevlm.evaluation.record import Record
from cascadevlm.judges.base import Judge
from cascadevlm.judges.budget import Ledger
from cascadevlm.judges.cache import DiskStore
from cascadevlm.runs.run_folder import spent_in
from cascadevlm.runs.scores_file import scores_kept
from cascadevlm.runs.tally import Tally
from cascadevlm.scorers.base import Scorer

ANSWERS = ".verdicts"
"""Folder of the judges' answers to all cascades, if the configuration keeps no cache."""


def sharing(cascades: Mapping[str, Cascade], configs: Mapping[str, Config]) -> dict[str, Cascade]:
    """The cascades with shared models. All of them use the store of verdicts of the first cascade."""
    store = next((cascade.store for cascade in cascades.values()), None)
    scorers: dict[str, Scorer] = {}
    judges: dict[str, Judge] = {}
    return {
        name: cascade.altered(
            scorer=scorers.setdefault(
                repr((configs[name].scorer, configs[name].calibration, configs[name].learn)), cascade.scorer
            ),
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
    progress: Callable[[Tally], None],
) -> dict[str, Record]:
    """Run every cascade over its labelled images.

    If several cascades have the same scorer and labels, only the first scores the images. The others use the recorded scores. A
    record with more than 1,000 labels does not contain all scores. Then every cascade scores the images. Cascades with the same
    ledger share its spending limit.

    Args:
        cascades: the cascades by name. `sharing` makes them share models.
        data: the images of each cascade, by its name.
        configs: the configuration of each cascade, by its name. It is written to the record.
        folder: folder for the records, with one subfolder per name. Records of an earlier session are continued. None: the
            records are not kept.
        progress: function that is called after every prediction.

    Raises:
        DataError: if the folder of a record is in use, or belongs to another run.
    """
    scored: dict[tuple[int, LabelSet], Path] = {}
    spent: defaultdict[int, float] = defaultdict(float)
    records = {}
    with nullcontext(folder) if folder else tempfile.TemporaryDirectory() as kept:
        for name, cascade in cascades.items():
            own = Path(kept) / name
            known = own
            if cascade.learns_from is None:  # the scores of one that learns depend on its judges
                known = scored.setdefault((id(cascade.scorer), cascade.labels), own)
            replays = known != own and scores_kept(cascade.labels) == len(cascade.labels)
            cap, ledger = cascade.ledger.cap_dollars, id(cascade.ledger)
            left = None if cap is None else max(cap - spent[ledger], 0.0)
            store = DiskStore(Path(kept) / ANSWERS) if cascade.store is None else cascade.store  # an empty store is falsy
            running = cascade.altered(ledger=Ledger(left), store=store)
            if replays:
                running = running.altered(scorer=load_scorer(f"recorded:{known}"))
            records[name] = record_run(running, data[name], own, config=configs[name].model_dump(mode="json"), progress=progress)
            spent[ledger] += spent_in(own)
    return records

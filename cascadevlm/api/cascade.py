"""The cascade of Python callers and notebooks: it is built from a configuration, and evaluates and runs itself."""

import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from pydantic import JsonValue

from cascadevlm.base.errors import ConfigError, DataError, PolicyError
from cascadevlm.base.frames import is_table
from cascadevlm.base.labels import Label, LabelSet
from cascadevlm.base.progress import progress_bar
from cascadevlm.base.remote import name_of, place_of
from cascadevlm.base.tables import USUAL, ColumnNames
from cascadevlm.base.types import NANODOLLARS
from cascadevlm.cascade import cascade
from cascadevlm.config.config import Config, read_config
from cascadevlm.evaluation.data import Data, Source, read_data
from cascadevlm.evaluation.evaluate import measure
from cascadevlm.evaluation.metrics import Evaluation
from cascadevlm.judges.budget import Ledger
from cascadevlm.policies.base import PolicyLike, as_policy
from cascadevlm.policies.language import parse_policy
from cascadevlm.runs import bulk
from cascadevlm.runs.inputs import Inputs, Named
from cascadevlm.runs.run_folder import spent_in
from cascadevlm.runs.tally import Tally


class Cascade(cascade.Cascade):
    """A cascade with the methods `from_config`, `evaluate` and `run`.

    Attributes:
        config: the configuration that the cascade was built from; None for a cascade that was built from objects.
    """

    config: Config | None = None

    @classmethod
    def from_config(
        cls,
        config: str | Path | Mapping[str, object],
        *,
        labels: LabelSet | Iterable[str | Label] | None = None,
        keep_embeddings: bool = False,
    ) -> Self:
        """Build a cascade from a configuration, as the command line does. Its models are not loaded yet.

        Args:
            config: path of a TOML file, or a mapping with the same content. Paths in it are relative to the working directory.
            labels: the label set, or names. Default: the labels of the configuration.
            keep_embeddings: true to keep the embeddings of images on disk, as ``cascadevlm run`` does. Default: false.

        Raises:
            ConfigError: if the argument is neither a path nor a mapping, if the file cannot be read, if a key is wrong, if there
                are no labels, or if the calibration does not belong to this cascade.
            InputError: if a spec, a policy, a prompt or a path in the configuration is wrong.
        """
        if not isinstance(config, str | Path | Mapping):
            told = f"config must be the path of a TOML file or a mapping, not {config!r}."
            raise ConfigError(told, hint='For example: Cascade.from_config("cascade.toml").')
        parsed = read_config(config)
        built = parsed.build_as(cls, None if labels is None else LabelSet.of(labels), bulk=keep_embeddings)
        built.config = parsed
        return built

    def evaluate(
        self,
        data: "Data | Source | str",
        folder: str | Path | None = None,
        *,
        columns: ColumnNames = USUAL,
        judge_all: bool = False,
        progress: bool = False,
    ) -> Evaluation:
        """Measure the cascade on labelled images.

        Args:
            data: the labelled images: `Data`, or a source that `read_data` reads.
            folder: folder for the record, which `read_record` reads. An unfinished record in the folder is continued. Default:
                the record is not kept.
            columns: the columns of a table or a data frame. `Data` was read with its own columns. Default: the usual columns.
            judge_all: true to ask the judge about every image, for `sweep` and `calibrate`. If the cascade has one stage without
                ``widen``, the figures are still the figures of the policy.
            progress: true to show a progress bar. Default: false.

        Raises:
            DataError: if the source is not labelled data, or if the folder is in use or belongs to another run.
            RunError: if the disk is full or fails. The results so far are kept.
            JudgeError: if a judge cannot work at all.
        """
        labelled = data if isinstance(data, Data) else read_data(data, self.labels, columns)
        with tempfile.TemporaryDirectory() as scratch, progress_bar(len(labelled), shown=progress) as show:
            kept = Path(scratch if folder is None else folder)
            with self.paying(kept) as running:
                return measure(
                    running,
                    labelled,
                    kept,
                    config=self.described(),
                    judge_all=judge_all,
                    progress=lambda tally: show(tally.images, tally.spent_dollars),
                ).evaluation

    def run(
        self,
        inputs: str | Path | Iterable[str | Path],
        folder: str | Path,
        *,
        columns: ColumnNames = USUAL,
        batch: bool = False,
        retry_failed: bool = False,
        progress: bool = False,
    ) -> Tally:
        """Classify any number of images into a folder. If the run is interrupted, the same call continues it.

        A cascade from a configuration with ``[agreement]`` makes a certificate (`Tally.certificate`).

        Args:
            inputs: a folder of images, a list or table of images (`Inputs`), or paths or addresses of images in an order that
                does not change.
            folder: the folder of the run. ``predictions.parquet`` in this folder has one row per image.
            columns: the columns of a table. Default: the usual columns.
            batch: true to ask hosted judges through the batch APIs of their providers: cheaper, but answers may take hours.
                Default: false.
            retry_failed: true to classify failed images again. Later images also get a new prediction, with the stored answers.
                Default: false.
            progress: true to show a progress bar. Default: false.

        Returns:
            The counts of all sessions of the run.

        Raises:
            DataError: if there are no images, if the inputs are a data frame, if columns are named and there is no table, or if
                the folder is in use or belongs to another run.
            RunError: if the disk is full or fails. The results so far are kept.
            JudgeError: if a judge cannot work at all.
        """
        images: Inputs | list[Named]
        if is_table(inputs):
            told = f"inputs is a table ({type(inputs).__name__}), from which a run cannot continue."
            raise DataError(told, hint="Write it to a Parquet file and give its path, or give its column of paths as a list.")
        if isinstance(inputs, str | Path):
            images = Inputs(inputs, columns, shuffled=self.learns_from is not None)
        elif columns != USUAL:
            raise DataError("Columns can only be named for a table.", hint="Give the path of a table.")
        else:
            images = [(name_of(place), place) for place in map(place_of, inputs)]
        if not (total := len(images)):
            raise DataError(f"{inputs!r} contains no images.", hint="Check the path and the formats of the images.")
        with progress_bar(total, shown=progress) as show, self.paying(Path(folder)) as running:
            return bulk.run(
                running,
                images,
                Path(folder),
                config=self.described(),
                promised=(self.config.agreement or self.config.find) if self.config else None,
                audit=self.config.audit if self.config else None,
                batch=batch,
                retry_failed=retry_failed,
                progress=lambda tally: show(tally.images, tally.spent_dollars),
                scored=lambda number: show(number, None),
                asked=show,
                outlook=_say if progress else lambda sentence: None,
            )

    @contextmanager
    def paying(self, folder: Path) -> Iterator[Self]:
        """A copy of the cascade for a run into a folder. The run may spend what is left in the ledger of the cascade.

        The ledger of the folder counts the earlier sessions of its run, too. While the run lasts, all money that is left is
        reserved for it.
        """
        before, cap = spent_in(folder), self.ledger.cap
        left = 0 if cap is None else max(cap - round((self.ledger.spent_dollars + self.ledger.reserved_dollars) * NANODOLLARS), 0)
        self.ledger.reserve_now(left)
        limit = None if cap is None else min(cap / NANODOLLARS, before + left / NANODOLLARS)
        try:
            yield self.altered(ledger=Ledger(limit))
        finally:
            spent = round((spent_in(folder) - before) * NANODOLLARS)
            self.ledger.settle(left, spent, standing=True)

    def described(self) -> dict[str, JsonValue]:
        """What the manifest of a run says about the cascade: its configuration, or the parts that replays of a record need."""
        if self.config is not None:
            return self.config.frozen(self).model_dump(mode="json")
        stages: list[JsonValue] = [
            {
                "judge": stage.judge.spec,
                "policy": _parsable(stage.policy),
                "candidates": repr(stage.candidates),
                "prompt": stage.prompt.name,
                "offer_none": stage.offer_none,
                "votes": stage.votes,
                "widen": stage.widen,
            }
            for stage in self.stages
        ]
        decided: dict[str, JsonValue] = {"fusion": self.stages[0].fusion} if self.stages else {}
        calibration = None if self.calibration is None else self.calibration.calibrated_fingerprint
        return decided | {
            "stage": stages,
            "on_failure": self.on_failure,
            "accept": self.accept,
            "routing": self.routing,
            "follow_shares": self.follow_shares,
            "learn": self.learns_from is not None,
            "calibration": calibration,
        }


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def _parsable(policy: PolicyLike) -> str | None:
    """The policy in string form; None if it contains a function, which has no string form."""
    try:
        return str(parse_policy(str(as_policy(policy))))
    except PolicyError:
        return None

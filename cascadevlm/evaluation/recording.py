"""Making a record: what a cascade must keep while it runs, and writing it down."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import JsonValue

from cascadevlm.base.arrays import NOBODY
from cascadevlm.base.environment import machine, versions
from cascadevlm.base.errors import DataError
from cascadevlm.base.files import valid_text, write_whole
from cascadevlm.base.images import ImageSource, pixel_digest
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.secrets import without_secrets
from cascadevlm.base.types import Candidate, Prediction, Question, Scores, Verdict
from cascadevlm.cascade.stage import Stage
from cascadevlm.evaluation.data import Data
from cascadevlm.evaluation.record import RunInfo, scores_kept, table_schemas
from cascadevlm.scorers.base import Prepared, Scorer, WrapperScorer

Number = TypeVar("Number", bound=np.generic)


class NotingScorer(WrapperScorer, ABC):
    """Scores as another scorer does and notes what it gave."""

    @abstractmethod
    def note(self, digests: Sequence[str], scores: Scores) -> None:
        """Keep N x C scores of N images, by the digests of their pixels."""

    def score(self, images: Sequence[Image.Image], labels: LabelSet) -> Scores:
        scores = super().score(images, labels)
        self.note([pixel_digest(image) for image in images], scores)
        return scores

    def prepare(self, source: ImageSource) -> Prepared:
        prepared = super().prepare(source)
        prepared.image_digest  # noqa: B018  # here, beside the model
        if prepared.features is not None:
            prepared.forget_large()
        return prepared

    def score_prepared(self, prepared: Sequence[Prepared], labels: LabelSet) -> Scores:
        scores = super().score_prepared(prepared, labels)
        self.note([each.image_digest for each in prepared], scores)
        return scores


class KeepingScorer(NotingScorer):
    """Scores as another scorer does and keeps what a record holds of it."""

    def __init__(self, wrapped: Scorer) -> None:
        super().__init__(wrapped)
        self.fingerprint = ""
        self.log_probs: list[NDArray[np.float32]] = []
        self.columns: list[NDArray[np.int32]] = []
        self.digests: list[str] = []

    def note(self, digests: Sequence[str], scores: Scores) -> None:
        log_probs, kept = scores.log_probs, scores_kept(scores.labels)
        if kept < len(scores.labels):
            best = np.argsort(-log_probs, axis=1, kind="stable")[:, :kept]
            log_probs = np.take_along_axis(log_probs, best, axis=1)
            self.columns.append(best.astype(np.int32))
        self.digests.extend(digests)
        self.log_probs.append(log_probs)
        self.fingerprint = scores.fingerprint


def asked_of(question: Question) -> dict[str, JsonValue]:
    """What tells one recorded question from another, beside its judge."""
    return {
        "image": question.image_digest,
        "candidates": [label.name for label in question.labels],
        "prompt": question.prompt.name,
        "offer_none": question.offer_none,
        "exemplars": [exemplar.digest for exemplar in question.exemplars],
        "rejected": question.rejected,
        "sample": question.sample,
    }


@dataclass(frozen=True, kw_only=True)
class KeepingStage(Stage):
    """Asks as another stage does and keeps what it asked, by the digest of the image: a prediction tells only what was shown
    last. Of lists that grew wider, all are kept."""

    kept: dict[str, list[dict[str, JsonValue]]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, stage: Stage) -> "KeepingStage":
        """One that asks as this one does and has kept nothing yet."""
        return cls(**{each.name: getattr(stage, each.name) for each in fields(Stage)})

    def question(self, image: Image.Image, candidates: tuple[Candidate, ...], label_set: LabelSet | None = None) -> Question:
        question = super().question(image, candidates, label_set)
        self.kept.setdefault(question.image_digest, []).append(asked_of(question))
        return question


def write_record(
    folder: Path,
    *,
    data: Data,
    predictions: Iterable[Prediction],
    scorer: KeepingScorer,
    stages: Sequence[KeepingStage],
    labels: LabelSet,
    config: Mapping[str, JsonValue],
    spec: str,
) -> Iterator[Prediction]:
    """Write a record while predictions come in, and pass them on. The folder is whole when the last has been taken.

    Args:
        folder: made, unless it is there; what an interrupted run left in it is overwritten.
        data: what the predictions are of.
        predictions: of the data, in its order.
        scorer: of the cascade; what it kept before is left out.
        stages: of the cascade.
        labels: of the cascade.
        config: what the cascade was built from.
        spec: of the scorer.

    Raises:
        DataError: at once, if the folder holds a record already or cannot be made.
    """
    if (folder / "run.json").exists():
        raise DataError(f"{str(folder)!r} holds a record already.", hint="Give another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise DataError(f"The folder {str(folder)!r} cannot be made: {exc.strerror}.") from exc

    def writing() -> Iterator[Prediction]:
        began = datetime.now(UTC)
        taken = []
        with (folder / "predictions.jsonl").open("w", encoding="utf-8") as lines:
            for name, truth, prediction in zip(data.names, data.truths, predictions, strict=True):
                lines.write(json.dumps({**prediction.to_dict(), "path": name, "truth": truth}) + "\n")
                lines.flush()
                taken.append(prediction)
                yield prediction
        readable = np.array([bool(prediction.candidates) for prediction in taken], dtype=bool)
        known = iter(scorer.digests[len(scorer.digests) - readable.sum() :])
        digests = [next(known) if read else None for read in readable]
        width = scores_kept(labels)
        np.save(folder / "scores.npy", _of_all(scorer.log_probs, readable, width, np.float32(np.nan)))
        if width < len(labels):
            np.save(folder / "columns.npy", _of_all(scorer.columns, readable, width, np.int32(NOBODY)))
        _write_tables(folder, data, taken, digests, stages)
        info = RunInfo(
            config=without_secrets(config),
            labels=list(labels),
            scorer=spec,
            fingerprint=scorer.fingerprint,
            judges=[stage.judge.spec for stage in stages],
            began=began,
            seconds=(datetime.now(UTC) - began).total_seconds(),
            versions=versions(),
            machine=machine(),
        )
        write_whole(folder / "run.json", info.model_dump_json(indent=2) + "\n")

    return writing()


def _of_all(batches: Sequence[NDArray[Number]], readable: NDArray[np.bool_], width: int, unreadable: Number) -> NDArray[Number]:
    """N x ``width``: the last rows of the batches for the images that could be read, one value for those that could not."""
    whole: NDArray[Number] = np.full((len(readable), width), unreadable)
    if readable.any():
        whole[readable] = np.concatenate(batches)[-readable.sum() :]
    return whole


def _write_tables(
    folder: Path,
    data: Data,
    predictions: Sequence[Prediction],
    digests: Sequence[str | None],
    stages: Sequence[KeepingStage],
) -> None:
    import pyarrow
    import pyarrow.parquet

    rows: dict[str, list[dict[str, object]]] = {
        "images": [
            {"name": name, "truth": truth, "split": split, "digest": digest}
            for name, truth, split, digest in zip(data.names, data.truths, data.splits, digests, strict=True)
        ],
        "predictions": [
            {"name": name, "label": p.label, "probability": p.probability, "decided_by": p.decided_by, "error": p.error}
            for name, p in zip(data.names, predictions, strict=True)
        ],
        "verdicts": [
            _answered(stages[verdict.stage].kept[digest], prediction)
            | _verdict_columns(verdict)
            | {"image": image, "judge": stages[verdict.stage].judge.spec}
            for image, (prediction, digest) in enumerate(zip(predictions, digests, strict=True))
            for verdict in prediction.verdicts
            if digest is not None
        ],
    }
    for name, schema in table_schemas().items():
        columns = [pyarrow.array([_valid(row[each.name]) for row in rows[name]], each.type) for each in schema]
        pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, schema=schema), folder / f"{name}.parquet")


def _answered(asked: Sequence[dict[str, JsonValue]], prediction: Prediction) -> dict[str, JsonValue]:
    """Of the questions a stage put about an image, the one whose verdict counts: that shown last, unless it came to nothing."""
    shown = [candidate.label.name for candidate in prediction.candidates]
    return next((each for each in reversed(asked) if each["candidates"] == shown), asked[-1])


def _verdict_columns(verdict: Verdict) -> dict[str, object]:
    columns = {each.name: getattr(verdict, each.name) for each in fields(Verdict) if each.name not in ("judge", "usage")}
    opinion = verdict.probabilities
    return columns | asdict(verdict.usage) | {"probabilities": None if opinion is None else list(opinion.items())}


def _valid(value: object) -> object:
    """A value of a table, which wants valid Unicode."""
    return valid_text(value) if isinstance(value, str) else value

"""Records: what a run over labelled images gave, in a folder that this and other tools can read.

::

    run.json              the frozen configuration, the labels, fingerprints, versions, when and where
    scores.npy            N x C float32, log-probabilities; NaN rows for images that could not be read
    images.parquet        N rows: name, truth, split, digest of the pixels (null if they could not be read)
    verdicts.parquet      a row for every verdict: image (its row), stage, judge, what was asked, outcome, label, what the judge
                          said and what that took
    predictions.parquet   N rows: name, label, probability, decided_by, error
    predictions.jsonl     the same with all that `Prediction.to_dict` tells, written while the run goes on
    summary.json          the metrics, once evaluated

``run.json`` comes last: without it, the run was interrupted. Every policy, threshold and fusion rule is a function of these, so
that all of them can be tried without asking anybody; ``recorded:`` replays them.
"""

import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, JsonValue, ValidationError

from cascadevlm.data import Data
from cascadevlm.engine import Stage
from cascadevlm.errors import CascadeError, DataError
from cascadevlm.images import pixel_digest
from cascadevlm.labels import Label, LabelSet
from cascadevlm.scorer import Scorer
from cascadevlm.types import Candidate, Prediction, Question, Scores, Usage, Verdict

if TYPE_CHECKING:
    import pyarrow

NOBODY = -1
"""In an array of columns: no label."""

Columns = NDArray[np.int64]
"""Columns of the score matrix, or `NOBODY`."""

PACKAGES = ("cascadevlm", "torch", "transformers", "open_clip_torch", "openai", "anthropic")
"""Those whose versions are recorded, where they are installed."""

PARTS = ("run.json", "scores.npy", "images.parquet", "verdicts.parquet", "predictions.parquet")
"""What a whole record has at least."""


class RunInfo(BaseModel):
    """``run.json``."""

    format: Literal[1] = 1
    config: dict[str, JsonValue]
    labels: list[Label]
    scorer: str
    fingerprint: str
    judges: list[str]
    began: datetime
    seconds: float
    versions: dict[str, str]
    machine: str


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What one stage's judge said of N images.

    Attributes:
        judge: its spec.
        asked: N booleans; an image skipped for want of money was not asked about.
        outcomes: N outcomes as in `Verdict`, "" where the stage did not escalate.
        answers: N columns; `NOBODY` where there is no answer.
        candidates: N x K columns in the order shown, `NOBODY` beyond the last.
        rationales: N texts: what it said before its answer, or all it said.
        dollars: N, what it cost; what the cache saved is counted in, so that a second run costs what the first did.
        seconds: N, how long it took; 0 from the cache.
        input_tokens: N; 0 from the cache.
        output_tokens: N; 0 from the cache.
        paid: N, the dollars of this very run.
    """

    judge: str
    asked: NDArray[np.bool_]
    outcomes: tuple[str, ...]
    answers: Columns
    candidates: Columns
    rationales: tuple[str, ...]
    dollars: NDArray[np.float64]
    seconds: NDArray[np.float64]
    input_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    paid: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Record:
    """A run over N labelled images.

    Attributes:
        scores: of those that could be read and those that could not, N x C; the latter's rows are uniform.
        readable: N booleans.
        names: of the images.
        truths: N columns.
        stages: what each stage's judge said.
        predicted: N columns; `NOBODY` where the cascade gave no label.
        probabilities: N, of the predicted label; NaN where none was given.
        decided_by: N, as in `Prediction`; "" where there is no label.
        digests: N, of the images' pixels; "" where they could not be read. Empty for records made of arrays.
        info: ``run.json``; None for records made of arrays.
    """

    scores: Scores
    readable: NDArray[np.bool_]
    names: tuple[str, ...]
    truths: Columns
    stages: tuple[Judged, ...]
    predicted: Columns
    probabilities: NDArray[np.float64]
    decided_by: tuple[str, ...]
    digests: tuple[str, ...] = ()
    info: RunInfo | None = None

    def __len__(self) -> int:
        return len(self.truths)

    @property
    def labels(self) -> LabelSet:
        return self.scores.labels

    @cached_property
    def scored(self) -> Columns:
        """The scorer's best column for each of N images; `NOBODY` for unreadable ones."""
        return np.where(self.readable, self.scores.log_probs.argmax(axis=1), NOBODY)

    @property
    def judged(self) -> Judged:
        """The last stage.

        Raises:
            DataError: if there is none.
        """
        if not self.stages:
            raise DataError("The record has no judge.", hint="Run a cascade with a stage.")
        return self.stages[-1]


class KeepingScorer(Scorer):
    """Scores as another scorer does and keeps all of it, with the digests of the images."""

    def __init__(self, wrapped: Scorer) -> None:
        self.wrapped = wrapped
        self.kept: list[Scores] = []
        self.digests: list[str] = []

    def score(self, images: Sequence[Image.Image], labels: LabelSet) -> Scores:
        scores = self.wrapped.score(images, labels)
        self.digests.extend(pixel_digest(image) for image in images)
        self.kept.append(scores)
        return scores


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
    last."""

    kept: dict[str, dict[str, JsonValue]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, stage: Stage) -> "KeepingStage":
        """One that asks as this one does and has kept nothing yet."""
        return cls(**{each.name: getattr(stage, each.name) for each in fields(Stage)})

    def question(self, image: Image.Image, candidates: tuple[Candidate, ...]) -> Question:
        question = super().question(image, candidates)
        self.kept[question.image_digest] = asked_of(question)
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
        log_probs = np.full((len(taken), len(labels)), np.nan, dtype=np.float32)
        if readable.any():
            log_probs[readable] = np.concatenate([scores.log_probs for scores in scorer.kept])[-readable.sum() :]
        np.save(folder / "scores.npy", log_probs)
        _write_tables(folder, data, taken, digests, stages)
        info = RunInfo(
            config=dict(config),
            labels=list(labels),
            scorer=spec,
            fingerprint=scorer.kept[-1].fingerprint if readable.any() else "",
            judges=[stage.judge.spec for stage in stages],
            began=began,
            seconds=(datetime.now(UTC) - began).total_seconds(),
            versions=_versions(),
            machine=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        )
        unfinished = folder / "run.json.part"
        unfinished.write_text(info.model_dump_json(indent=2) + "\n", encoding="utf-8")
        unfinished.replace(folder / "run.json")

    return writing()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


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
            stage.kept[digest] | _verdict_columns(verdict) | {"image": image, "stage": number, "judge": stage.judge.spec}
            for image, (prediction, digest) in enumerate(zip(predictions, digests, strict=True))
            for number, (stage, verdict) in enumerate(zip(stages, prediction.verdicts, strict=False))  # later ones said nothing
            if digest is not None
        ],
    }
    for name, schema in _schemas().items():
        columns = [pyarrow.array([_valid(row[each.name]) for row in rows[name]], each.type) for each in schema]
        pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, schema=schema), folder / f"{name}.parquet")


def _schemas() -> "dict[str, pyarrow.Schema]":
    import pyarrow
    from pyarrow import bool_, float64, int64, list_, map_, string

    verdicts = {
        **dict.fromkeys(("image", "stage"), int64()),
        **dict.fromkeys(("judge", "prompt", "outcome", "label", "rationale", "text", "error"), string()),
        **dict.fromkeys(("candidates", "exemplars"), list_(string())),
        "offer_none": bool_(),
        "probabilities": map_(string(), float64()),
        **{each.name: {int: int64(), float: float64(), bool: bool_()}[type(each.default)] for each in fields(Usage)},
    }
    return {
        "images": pyarrow.schema(dict.fromkeys(("name", "truth", "split", "digest"), string())),
        "predictions": pyarrow.schema(
            dict.fromkeys(("name", "label", "decided_by", "error"), string()) | {"probability": float64()}
        ),
        "verdicts": pyarrow.schema(verdicts),
    }


def _verdict_columns(verdict: Verdict) -> dict[str, object]:
    columns = {each.name: getattr(verdict, each.name) for each in fields(Verdict) if each.name not in ("judge", "usage")}
    opinion = verdict.probabilities
    return columns | asdict(verdict.usage) | {"probabilities": None if opinion is None else list(opinion.items())}


def _verdict(row: Mapping[str, Any]) -> Verdict:
    opinion = row["probabilities"]
    said = {name: row[name] for name in ("outcome", "label", "rationale", "text", "error", "judge")}
    usage = Usage(**{each.name: row[each.name] for each in fields(Usage)})
    return Verdict(**said, probabilities=None if opinion is None else dict(opinion), usage=usage)


def _valid(value: object) -> object:
    """What a judge says need not be valid Unicode; a table wants it."""
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def read_record(folder: str | Path) -> Record:
    """The record in a folder.

    Raises:
        DataError: if there is none, a part of it is missing, or its parts contradict each other.
    """
    folder = Path(folder)
    with _reading(folder):
        info = RunInfo.model_validate_json((folder / "run.json").read_bytes())
        labels = LabelSet(tuple(info.labels))
        column = {name: number for number, name in enumerate(labels.names)}
        images, predictions = (_read_table(folder, name).to_pydict() for name in ("images", "predictions"))
        log_probs = np.load(folder / "scores.npy")
        if log_probs.shape != (len(images["name"]), len(labels)) or predictions["name"] != images["name"]:
            raise ValueError("its parts are not of the same images")
        readable = ~np.isnan(log_probs).any(axis=1)
        log_probs[~readable] = -np.log(len(labels))
        verdicts = _read_table(folder, "verdicts").to_pylist()
        return Record(
            scores=Scores(log_probs=log_probs, labels=labels, fingerprint=info.fingerprint),
            readable=readable,
            names=tuple(images["name"]),
            truths=np.array([column[name] for name in images["truth"]], dtype=np.int64),
            stages=tuple(
                _judged([row for row in verdicts if row["stage"] == stage], judge, len(readable), column)
                for stage, judge in enumerate(info.judges)
            ),
            predicted=np.array([column.get(label, NOBODY) for label in predictions["label"]], dtype=np.int64),
            probabilities=np.array([np.nan if p is None else p for p in predictions["probability"]], dtype=np.float64),
            decided_by=tuple(by or "" for by in predictions["decided_by"]),
            digests=tuple(digest or "" for digest in images["digest"]),
            info=info,
        )


def read_verdicts(folder: str | Path) -> tuple[list[tuple[dict[str, JsonValue], Verdict]], ...]:
    """For every stage, what was asked, as `asked_of` tells it, and what the judge said.

    Raises:
        DataError: as `read_record`.
    """
    folder = Path(folder)
    with _reading(folder):
        info = RunInfo.model_validate_json((folder / "run.json").read_bytes())
        digests = _read_table(folder, "images").to_pydict()["digest"]
        stages: tuple[list[tuple[dict[str, JsonValue], Verdict]], ...] = tuple([] for _ in info.judges)
        for row in _read_table(folder, "verdicts").to_pylist():
            asked = {name: row[name] for name in ("candidates", "prompt", "offer_none", "exemplars")}
            asked |= {"image": digests[row["image"]], "rejected": None, "sample": 0}
            stages[row["stage"]].append((asked, _verdict(row)))
        return stages


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Tell in one sentence what is wrong with a record."""
    import pyarrow

    hint = "Make one: cascadevlm evaluate DATA -o RUN."
    missing = [part for part in PARTS if not (folder / part).is_file()]
    if missing and (folder / "predictions.jsonl").exists() and "run.json" in missing:
        raise DataError(f"{str(folder)!r} holds no whole record: its run was interrupted.", hint="Run it again.")
    if missing:
        raise DataError(f"{str(folder)!r} holds no whole record: it lacks {', '.join(missing)}.", hint=hint)
    try:
        yield
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{str(folder)!r} holds no whole record: run.json, {where}: {first['msg']}.", hint=hint) from exc
    except (OSError, EOFError, ValueError, KeyError, IndexError, CascadeError, pyarrow.ArrowException) as exc:
        why = str(exc).partition("\n")[0].rstrip(".")
        raise DataError(f"{str(folder)!r} holds no whole record: {why}.", hint=hint) from exc


def _read_table(folder: Path, name: str) -> "pyarrow.Table":
    import pyarrow.parquet

    schema = _schemas()[name]
    return pyarrow.parquet.read_table(folder / f"{name}.parquet").select(schema.names).cast(schema)


def _judged(rows: Sequence[Mapping[str, Any]], judge: str, size: int, column: Mapping[str, int]) -> Judged:
    images = np.array([row["image"] for row in rows], dtype=np.int64)
    by_image = {row["image"]: row for row in rows}

    def numbers(name: str) -> NDArray[np.float64]:
        whole = np.zeros(size)
        whole[images] = [row[name] for row in rows]
        return whole

    def texts(*names: str) -> tuple[str, ...]:
        """The first of the columns that has a text."""
        return tuple(
            next((row[name] for name in names if row[name]), "") if (row := by_image.get(i)) else "" for i in range(size)
        )

    asked = np.zeros(size, dtype=bool)
    asked[images] = [row["outcome"] != "skipped" for row in rows]
    answers = np.full(size, NOBODY, dtype=np.int64)
    answers[images] = [NOBODY if row["label"] is None else column[row["label"]] for row in rows]
    candidates = np.full((size, max((len(row["candidates"]) for row in rows), default=0)), NOBODY, dtype=np.int64)
    for row in rows:
        candidates[row["image"], : len(row["candidates"])] = [column[name] for name in row["candidates"]]
    return Judged(
        judge=judge,
        asked=asked,
        outcomes=texts("outcome"),
        answers=answers,
        candidates=candidates,
        rationales=texts("rationale", "text"),
        dollars=numbers("dollars") + numbers("saved_dollars"),
        seconds=numbers("seconds"),
        input_tokens=numbers("input_tokens").astype(np.int64),
        output_tokens=numbers("output_tokens").astype(np.int64),
        paid=numbers("dollars"),
    )

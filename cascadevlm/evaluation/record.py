"""Records: what a run over labelled images gave, in a folder that this and other tools can read.

::

    run.json              the frozen configuration, the labels, fingerprints, versions, when and where
    scores.npy            N x C float32, log-probabilities; NaN rows for images that could not be read. Of more than 1,000
                          labels, N x 50: those of the best, in descending order
    columns.npy           only then, N x 50 int32: the labels that these are of; -1 for images that could not be read
    images.parquet        N rows: name, truth, split, digest of the pixels (null if they could not be read)
    verdicts.parquet      a row for every verdict: image (its row), stage, judge, what was asked, outcome, label, what the judge
                          said and what that took
    predictions.parquet   N rows: name, label, probability, decided_by, error
    predictions.jsonl     the same with all that `Prediction.to_dict` tells, written while the run goes on
    summary.json          the metrics, once evaluated

Of more than 1,000 labels, reading shares what the best 50 leave of the probability evenly among the others. The 50 are exact, and
with them candidates, recall, margin and top probability; entropy comes out a little high, and the others' own probabilities are
lost.

``run.json`` comes last: without it, the run was interrupted. Every policy, threshold and fusion rule is a function of these, so
that all of them can be tried without asking anybody; ``recorded:`` replays them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, JsonValue, TypeAdapter, ValidationError

from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.base.errors import CascadeError, DataError
from cascadevlm.base.labels import Label, LabelSet
from cascadevlm.base.types import Scores, Usage, Verdict

if TYPE_CHECKING:
    import pyarrow


PARTS = ("run.json", "scores.npy", "images.parquet", "verdicts.parquet", "predictions.parquet")
"""What a whole record has at least."""

MOST_WHOLE = 1000
"""The largest label set whose log-probabilities are all recorded."""

BEST = 50
"""How many are recorded of an image where there are more labels."""

Number = TypeVar("Number", bound=np.generic)


class RunInfo(BaseModel):
    """``run.json``."""

    model_config = ConfigDict(title="run.json")

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


class StatedStage(BaseModel):
    """What of a stage's frozen configuration replays go by."""

    policy: str | None = None
    widen: int = 0


class Stated(BaseModel):
    """What of a frozen configuration replays go by."""

    on_failure: str = "scorer"
    accept: float | None = None
    calibration: str | None = None
    fusion: str | None = None
    stage: list[StatedStage] = []


def _some(texts: tuple[str, ...], rows: NDArray[np.intp]) -> tuple[str, ...]:
    return tuple(texts[row] for row in rows.tolist())


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
        none_offered: whether "none of these" was an option.
        probabilities: N x K, the judge's own of the candidates, NaN where it gave none; None if they are not known.
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
    none_offered: bool = False
    probabilities: NDArray[np.float64] | None = None

    def take(self, rows: NDArray[np.intp]) -> "Judged":
        """The same of some of the images."""
        return Judged(
            judge=self.judge,
            asked=self.asked[rows],
            outcomes=_some(self.outcomes, rows),
            answers=self.answers[rows],
            candidates=self.candidates[rows],
            rationales=_some(self.rationales, rows),
            dollars=self.dollars[rows],
            seconds=self.seconds[rows],
            input_tokens=self.input_tokens[rows],
            output_tokens=self.output_tokens[rows],
            paid=self.paid[rows],
            none_offered=self.none_offered,
            probabilities=None if self.probabilities is None else self.probabilities[rows],
        )


@dataclass(frozen=True, kw_only=True)
class Fused:
    """What scorer and judges say together of N images, by a calibration.

    Attributes:
        labels: N columns, the most probable label once the last stage's judge was asked.
        probabilities: N, of that label.
        gain: N, the expected gain in accuracy from asking the last stage's judge.
        word_final: whether that judge's answer is the label wherever it gave one.
    """

    labels: Columns
    probabilities: NDArray[np.float64]
    gain: NDArray[np.float64]
    word_final: bool

    def take(self, rows: NDArray[np.intp]) -> "Fused":
        """The same of some of the images."""
        return replace(self, labels=self.labels[rows], probabilities=self.probabilities[rows], gain=self.gain[rows])


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
        fused: what the opinions are together, where a calibration was applied (`cascadevlm.decision.decided`).
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
    fused: Fused | None = None

    def __len__(self) -> int:
        return len(self.truths)

    def take(self, rows: NDArray[np.intp]) -> "Record":
        """The record of some of the images, in this order."""
        return Record(
            scores=self.scores.rows(rows),
            readable=self.readable[rows],
            names=_some(self.names, rows),
            truths=self.truths[rows],
            stages=tuple(stage.take(rows) for stage in self.stages),
            predicted=self.predicted[rows],
            probabilities=self.probabilities[rows],
            decided_by=_some(self.decided_by, rows),
            digests=_some(self.digests, rows) if self.digests else (),
            info=self.info,
            fused=self.fused and self.fused.take(rows),
        )

    @property
    def labels(self) -> LabelSet:
        return self.scores.labels

    @cached_property
    def scored(self) -> Columns:
        """The scorer's best column for each of N images; `NOBODY` for unreadable ones."""
        return np.where(self.readable, self.scores.log_probs.argmax(axis=1), NOBODY)

    @cached_property
    def stated(self) -> Stated:
        """What its configuration says; the defaults for records made of arrays."""
        return Stated.model_validate(self.info.config if self.info else {})

    @property
    def asked_everything(self) -> bool:
        """Whether the last stage's judge was asked about every image that could be read."""
        return bool(self.judged.asked[self.readable].all())

    @property
    def judged(self) -> Judged:
        """The last stage.

        Raises:
            DataError: if there is none.
        """
        if not self.stages:
            raise DataError("The record has no judge.", hint="Run a cascade with a stage.")
        return self.stages[-1]


def scores_kept(labels: LabelSet) -> int:
    """How many log-probabilities of an image a record holds."""
    return BEST if len(labels) > MOST_WHOLE else len(labels)


def table_schemas() -> "dict[str, pyarrow.Schema]":
    """The columns of the tables, by the names of their files."""
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


def read_record(folder: str | Path) -> Record:
    """The record in a folder.

    Raises:
        DataError: if there is none, a part of it is missing, or its parts contradict each other.
    """
    folder = Path(folder)
    with _reading(folder):
        info = RunInfo.model_validate_json((folder / "run.json").read_bytes())
        labels = LabelSet(tuple(info.labels))
        column = labels.columns
        images, predictions = (_read_table(folder, name).to_pydict() for name in ("images", "predictions"))
        log_probs = _read_array(folder / "scores.npy", np.float32)
        if log_probs.shape != (len(images["name"]), scores_kept(labels)) or predictions["name"] != images["name"]:
            raise ValueError("its parts are not of the same images")
        readable = np.asarray(~np.isnan(log_probs).any(axis=1))
        if log_probs.shape[1] < len(labels):
            log_probs = _spread(log_probs, _read_array(folder / "columns.npy", np.int32), len(labels))
        log_probs[~readable] = -np.log(len(labels))
        verdicts = _read_table(folder, "verdicts")
        stages = verdicts["stage"].to_numpy()
        return Record(
            scores=Scores(log_probs=log_probs, labels=labels, fingerprint=info.fingerprint),
            readable=readable,
            names=tuple(images["name"]),
            truths=np.array([column[name] for name in images["truth"]], dtype=np.int64),
            stages=tuple(
                _judged(verdicts.filter(stages == stage), judge, len(readable), column) for stage, judge in enumerate(info.judges)
            ),
            predicted=np.array([column.get(label, NOBODY) for label in predictions["label"]], dtype=np.int64),
            probabilities=np.array([np.nan if p is None else p for p in predictions["probability"]], dtype=np.float64),
            decided_by=tuple(by or "" for by in predictions["decided_by"]),
            digests=tuple(digest or "" for digest in images["digest"]),
            info=info,
        )


def read_verdicts(folder: str | Path) -> tuple[list[tuple[dict[str, JsonValue], Verdict]], ...]:
    """For every stage, what was asked, as `cascadevlm.evaluation.recording.asked_of` tells it, and what the judge said.

    Raises:
        DataError: as `read_record`.
    """
    folder = Path(folder)
    with _reading(folder):
        info = RunInfo.model_validate_json((folder / "run.json").read_bytes())
        digests = _read_table(folder, "images").to_pydict()["digest"]
        stages: tuple[list[tuple[dict[str, JsonValue], Verdict]], ...] = tuple([] for _ in info.judges)
        verdict = TypeAdapter(Verdict)
        for row in _read_table(folder, "verdicts").to_pylist():
            asked = {name: row[name] for name in ("candidates", "prompt", "offer_none", "exemplars")}
            asked |= {"image": digests[row["image"]], "rejected": None, "sample": 0}
            opinion = row["probabilities"]
            said = row | {"probabilities": None if opinion is None else dict(opinion), "usage": row}
            stages[row["stage"]].append((asked, verdict.validate_python(said)))
        return stages


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Tell in one sentence what is wrong with a record."""
    import pyarrow

    hint = "Make one: cascadevlm evaluate DATA -o RUN."
    if (folder / "manifest.json").exists():
        raise DataError(f"{str(folder)!r} is a run without labels: it holds no record.", hint=hint)
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
        raise DataError(f"{str(folder)!r} holds no whole record: {exc.title}, {where}: {first['msg']}.", hint=hint) from exc
    except (OSError, EOFError, ValueError, KeyError, IndexError, CascadeError, pyarrow.ArrowException) as exc:
        why = str(exc).partition("\n")[0].rstrip(".")
        raise DataError(f"{str(folder)!r} holds no whole record: {why}.", hint=hint) from exc


def _read_array(path: Path, kind: type[Number]) -> NDArray[Number]:
    """The array in a file; numpy would unpickle one of objects."""
    array: NDArray[Number] = np.load(path, allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.dtype != kind:
        raise ValueError(f"{path.name} holds no array of {kind.__name__}")
    return array


def _read_table(folder: Path, name: str) -> "pyarrow.Table":
    import pyarrow.parquet

    schema = table_schemas()[name]
    return pyarrow.parquet.read_table(folder / f"{name}.parquet").select(schema.names).cast(schema)


def _spread(best: NDArray[np.float32], columns: NDArray[np.int32], classes: int) -> NDArray[np.float32]:
    """N x C log-probabilities from the best K: the other labels share the rest evenly, each with less than the least of the K."""
    left = np.maximum(1 - np.exp(best, dtype=np.float64).sum(axis=1, keepdims=True), np.finfo(np.float32).eps)
    share = np.log(left / (classes - best.shape[1])).astype(np.float32)
    whole = np.repeat(np.minimum(share, np.nextafter(best[:, -1:], np.float32(-np.inf))), classes, axis=1)
    np.put_along_axis(whole, columns, best, axis=1)
    return whole


def _judged(rows: "pyarrow.Table", judge: str, size: int, column: Mapping[str, int]) -> Judged:
    """What one stage's rows tell of N images."""
    said = rows.to_pydict()
    images = np.array(said["image"], dtype=np.int64)

    def spread(values: ArrayLike, whole: NDArray[Number]) -> NDArray[Number]:
        whole[images] = values
        return whole

    def numbers(name: str) -> NDArray[np.float64]:
        return spread(said[name], np.zeros(size))

    def texts(values: list[str]) -> tuple[str, ...]:
        return tuple(spread(values, np.full(size, "", dtype=object)).tolist())

    candidates = np.full((size, max(map(len, said["candidates"]), default=0)), NOBODY, dtype=np.int64)
    probabilities = np.full(candidates.shape, np.nan)
    for image, names, opinion in zip(images, said["candidates"], said["probabilities"], strict=True):
        candidates[image, : len(names)] = [column[name] for name in names]
        if opinion is not None:
            given = dict(opinion)
            probabilities[image, : len(names)] = [given.get(name, 0.0) for name in names]
    return Judged(
        judge=judge,
        asked=spread([outcome != "skipped" for outcome in said["outcome"]], np.zeros(size, dtype=bool)),
        outcomes=texts(said["outcome"]),
        answers=spread(
            [NOBODY if label is None else column[label] for label in said["label"]], np.full(size, NOBODY, dtype=np.int64)
        ),
        candidates=candidates,
        rationales=texts([rationale or text for rationale, text in zip(said["rationale"], said["text"], strict=True)]),
        dollars=numbers("dollars") + numbers("saved_dollars"),
        seconds=numbers("seconds"),
        input_tokens=numbers("input_tokens").astype(np.int64),
        output_tokens=numbers("output_tokens").astype(np.int64),
        paid=numbers("dollars"),
        none_offered=any(said["offer_none"]),
        probabilities=probabilities,
    )

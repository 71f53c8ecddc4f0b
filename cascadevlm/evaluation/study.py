"""Studies: those of the CascadeVLM paper (Wei, Findings of EMNLP 2024, arXiv 2405.11301), on any labelled data and any models.

A study over images asks the judge of a cascade of one stage about all of them in every variant, so that the cascade with its
policy and the judge on everything are figures of the same answers. Images are scored once and no question is put twice. Such
studies take:

``cascade``, ``data``
    what is varied, and the labelled images.
``config``
    what the cascade was built from; it is kept with the records, altered as each variant is.
``folder``
    where the records are kept, each in a folder of its variant's name; nowhere, unless given.
``begin``
    told, before anybody is asked, the cascade of all variants as stages that ask about everything: the questions of the study.
``progress``
    told every prediction.

They raise `InputError` for a cascade of none or several stages, `DataError` if a folder holds a record already or no image can be
read, and `BudgetExhausted` if the budget does not suffice. Studies of a record ask nobody.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import JsonValue

from cascadevlm.base.arrays import NOBODY
from cascadevlm.base.errors import BudgetExhausted, DataError, InputError
from cascadevlm.base.images import pixel_digest
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Prediction, Scores
from cascadevlm.cascade.candidates import Order, TopK
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.cascade.item import stacked
from cascadevlm.cascade.stage import Stage
from cascadevlm.config.config import Config, override
from cascadevlm.config.loading import load_prompt
from cascadevlm.evaluation.data import Data
from cascadevlm.evaluation.evaluate import asking_everything, record_run
from cascadevlm.evaluation.metrics import Bools, Interval, coverage, covered_by, interval, mean
from cascadevlm.evaluation.record import Record
from cascadevlm.evaluation.sweep import sweep, under
from cascadevlm.judges.cache import MemoryStore
from cascadevlm.judges.support import SupportSet
from cascadevlm.policies.base import PolicyLike
from cascadevlm.policies.rules import Always, EntropyAbove
from cascadevlm.scorers.base import Scorer

KS = (1, 2, 3, 5, 10)
"""How many candidates `study_candidates` tries, unless told otherwise."""

SHOTS = (0, 1, 2)
"""How many exemplars a class `study_shots` tries, unless told otherwise."""

ORDERS: tuple[Order, ...] = ("ranked", "reversed", "shuffled")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant.

    Attributes:
        variant: its name.
        accuracy: of the images that could be read.
        interval: of the accuracy: 95 % bootstrap.
        calls: questions that the policy asks.
        dollars: what they cost; answers from the cache at what they cost when they were asked.
        seconds: what they took the judge, one after the other; answers from the cache count as the mean of the others. None if
            all came from there.
        figures: further ones by name; None where no image tells anything about it.
    """

    variant: str
    accuracy: float
    interval: Interval | None
    calls: int
    dollars: float
    seconds: float | None
    figures: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Study:
    """What came of a study: its name, the question it answers, a row for every variant, and remarks."""

    name: str
    question: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, JsonValue]:
        """The study as JSON-serialisable data; the further figures stand in the rows beside the others."""
        rows: list[JsonValue] = [
            {
                "variant": row.variant,
                "accuracy": row.accuracy,
                "interval": list(row.interval) if row.interval else None,
                "calls": row.calls,
                "dollars": row.dollars,
                "seconds": row.seconds,
                **row.figures,
            }
            for row in self.rows
        ]
        return {"study": self.name, "question": self.question, "rows": rows, "notes": list(self.notes)}


@dataclass(frozen=True, kw_only=True)
class PositionBias:
    """Where the judge's answers stood among the candidates, over the questions that it answered.

    Attributes:
        chosen: K counts of the answers that stood first, second, …
        true: K counts of the truths that stood there; where the truth was no candidate, it stood nowhere.
        p_value: how probable counts at least as uneven are, were every position as likely (Pearson's chi-square test). It
            tells of the judge only where the candidates were shuffled. None without answers, or with a single position.
    """

    chosen: NDArray[np.int64]
    true: NDArray[np.int64]
    p_value: float | None


def position_bias(record: Record) -> PositionBias:
    """The position bias of a record's last judge."""
    from scipy.stats import chisquare

    judged = record.judged
    answered = judged.answers != NOBODY
    candidates = judged.candidates[answered]
    chosen, true = (
        (candidates == columns[answered, None]).sum(axis=0, dtype=np.int64) for columns in (judged.answers, record.truths)
    )
    shown = candidates != NOBODY
    expected = (shown / shown.sum(axis=1, keepdims=True)).sum(axis=0)
    used = expected > 0
    p_value = float(chisquare(chosen[used], expected[used]).pvalue) if used.sum() > 1 else None
    return PositionBias(chosen=chosen, true=true, p_value=p_value)


class RememberingScorer(Scorer):
    """Scores as another scorer does, every image once; for one label set."""

    def __init__(self, wrapped: Scorer) -> None:
        self.wrapped = wrapped
        self.known: dict[str, Scores] = {}

    def score(self, images: Sequence[Image.Image], labels: LabelSet) -> Scores:
        digests = [pixel_digest(image) for image in images]
        new = {digest: image for digest, image in zip(digests, images, strict=True) if digest not in self.known}
        if new:
            scores = self.wrapped.score([*new.values()], labels)
            self.known.update((digest, scores.rows(slice(row, row + 1))) for row, digest in enumerate(new))
        return stacked([self.known[digest] for digest in digests])


Variant = tuple[Stage, dict[str, JsonValue]]
"""A stage, and what it changes in the configuration's."""

Begin = Callable[[Cascade], None]
Progress = Callable[[Prediction], None]


def _nothing(_: Cascade | Prediction) -> None:
    """For nobody to be told."""


def study_candidates(
    cascade: Cascade,
    data: Data,
    *,
    config: Config,
    ks: Sequence[int] = KS,
    folder: Path | None = None,
    begin: Begin = _nothing,
    progress: Progress = _nothing,
) -> Study:
    """The effect of k, the number of candidates; more than there are labels are all labels."""
    stage = _stage_of(cascade)
    variants: dict[str, Variant] = {}
    for k in sorted({min(k, len(cascade.labels)) for k in ks}):
        rule = TopK(k=k, order=stage.candidates.order, seed=stage.candidates.seed)
        variants[f"k={k}"] = (
            replace(stage, candidates=rule),
            {f"candidates.{key}": k if key == "k" else None for key in ("k", "mass", "coverage", "minimum", "maximum")},
        )
    records = _ask(variants, cascade, data, config, folder, begin, progress)
    return Study(
        name="candidates",
        question="How many candidates should the judge be offered?",
        rows=_rows(records, stage.policy),
    )


def study_order(
    cascade: Cascade,
    data: Data,
    *,
    config: Config,
    folder: Path | None = None,
    begin: Begin = _nothing,
    progress: Progress = _nothing,
) -> Study:
    """The effect of the order of the candidates, and the judge's position bias; shuffled with the seed of the candidates."""
    stage = _stage_of(cascade)
    variants: dict[str, Variant] = {
        order: (replace(stage, candidates=replace(stage.candidates, order=order)), {"candidates.order": order})
        for order in ORDERS
    }
    records = _ask(variants, cascade, data, config, folder, begin, progress)
    rows = [
        replace(row, figures={**row.figures, **_position_figures(record, shuffled=row.variant == "shuffled")})
        for row, record in zip(_rows(records, stage.policy), records.values(), strict=True)
    ]
    return Study(
        name="order",
        question="Does the order of the candidates matter, and does the judge favour a position?",
        rows=tuple(rows),
        notes=(
            "chosen_1 and true_1 are the shares of answers and of truths that stood first among the candidates, and so on.",
            "p_value is the probability of positions chosen as unevenly by a judge without position bias (chi-square test).",
        ),
    )


def study_reasoning(
    cascade: Cascade,
    data: Data,
    *,
    config: Config,
    folder: Path | None = None,
    begin: Begin = _nothing,
    progress: Progress = _nothing,
) -> Study:
    """The effect of chain-of-thought: the prompt ``select_cot`` against ``select``."""
    stage = _stage_of(cascade)
    variants = {prompt: _prompted(stage, prompt) for prompt in ("select", "select_cot")}
    records = _ask(variants, cascade, data, config, folder, begin, progress)
    return Study(
        name="reasoning",
        question="Is the judge better if it reasons before it answers?",
        rows=_rows(records, stage.policy),
    )


def study_shots(
    cascade: Cascade,
    data: Data,
    *,
    config: Config,
    support: Path,
    shots: Sequence[int] = SHOTS,
    folder: Path | None = None,
    begin: Begin = _nothing,
    progress: Progress = _nothing,
) -> Study:
    """The effect of exemplars: the prompt ``select_fewshot`` with images of the folder ``support`` against ``select_cot``.

    Raises:
        InputError: also if a number of exemplars is below 0, or the folder has no image of any label.
    """
    stage = _stage_of(cascade)
    variants: dict[str, Variant] = {}
    exemplars: set[str] = set()
    for number in sorted(set(shots)):
        if number < 0:
            raise InputError(f"A class cannot have {number} exemplars.")
        if number == 0:
            variants["shots=0"] = _prompted(stage, "select_cot")
            continue
        shown = SupportSet.read(support, cascade.labels, shots=number)
        exemplars.update(exemplar.digest for given in shown.exemplars.values() for exemplar in given)
        settings: dict[str, JsonValue] = {"prompt": "select_fewshot", "support": {"folder": str(support), "shots": number}}
        variants[f"shots={number}"] = replace(stage, prompt=load_prompt("select_fewshot"), support=shown), settings
    records = _ask(variants, cascade, data, config, folder, begin, progress)
    common = sum(digest in exemplars for digest in next(iter(records.values())).digests)
    return Study(
        name="shots",
        question="Is the judge better if it is shown exemplars of the candidates?",
        rows=_rows(records, stage.policy),
        notes=(f"{common} of the images are exemplars too, which flatters the judge.",) if common else (),
    )


def study_threshold(record: Record, *, thresholds: Sequence[float] | None = None) -> Study:
    """The effect of the threshold of CascadeVLM's entropy gate, from a record where the judge was asked about everything.

    Args:
        thresholds: from 0 to 1; those that escalate 0, 5, … 100 % of the images, unless given.

    Raises:
        DataError: if it was not, or the record is not of one judge.
    """
    if thresholds is None:
        curve = sweep(record).curve("entropy")
        assert curve.thresholds is not None
        thresholds = np.unique(curve.thresholds[~np.isnan(curve.thresholds)].clip(0, 1)).tolist()
    rows = [_row(f"entropy > {t:.3g}", record, EntropyAbove(t), {"threshold": t}) for t in sorted(thresholds)]
    return Study(name="threshold", question="From which entropy on should the judge be asked?", rows=tuple(rows))


def study_errors(record: Record) -> Study:
    """The split of the errors of the predictions, as `split_errors` has it; accuracies are without the errors of the row.

    Raises:
        DataError: if no image could be read.
    """
    _require_images(record)
    right, readable = record.predicted == record.truths, record.readable
    errors = int((~right & readable).sum())
    rows = []
    for name, here in split_errors(record).items():
        cured = (right | here)[readable]
        asked = [stage.asked & here for stage in record.stages]
        rows.append(
            Row(
                variant=name,
                accuracy=float(cured.mean()),
                interval=interval(cured),
                calls=int(sum(put.sum() for put in asked)),
                dollars=float(sum(stage.dollars[put].sum() for stage, put in zip(record.stages, asked, strict=True))),
                seconds=None,
                figures={"errors": int(here.sum()), "share": int(here.sum()) / errors if errors else None},
            )
        )
    return Study(
        name="errors",
        question="What are the errors of the cascade due to?",
        rows=tuple(rows),
        notes=(
            f"{errors} of {int(readable.sum())} predictions are wrong.",
            "Accuracies are those without the errors of the row; calls and dollars are those spent on them.",
        ),
    )


def split_errors(record: Record) -> dict[str, Bools]:
    """Which of N predictions are wrong, by the first cause that holds; an image that could not be read is in none.

    ``not escalated``: no judge was to be asked. ``truth not among the candidates``: of the last stage that it came to. ``no
    answer``: of no judge, be it for none of these, a refusal, a failure or the budget. ``judge wrong``: what remains.
    """
    escalated, covered, answered = np.zeros((3, len(record)), dtype=bool)
    for stage in record.stages:
        reached = np.array(stage.outcomes, dtype=str) != ""
        escalated = escalated | reached
        covered = np.where(reached, covered_by(stage.candidates, record.truths), covered)
        answered = answered | (stage.answers != NOBODY)
    wrong = record.readable & (record.predicted != record.truths)
    return {
        "not escalated": wrong & ~escalated,
        "truth not among the candidates": wrong & escalated & ~covered,
        "no answer": wrong & escalated & covered & ~answered,
        "judge wrong": wrong & escalated & covered & answered,
    }


def _stage_of(cascade: Cascade) -> Stage:
    if len(cascade.stages) != 1:
        raise InputError(f"A study is of one judge; the cascade has {len(cascade.stages)}.", hint="Give it one [[stage]].")
    return cascade.stages[0]


def _prompted(stage: Stage, prompt: str) -> tuple[Stage, dict[str, JsonValue]]:
    """The stage with another prompt, and without exemplars."""
    return replace(stage, prompt=load_prompt(prompt), support=None), {"prompt": prompt, "support": None}


def _ask(
    variants: Mapping[str, Variant],
    cascade: Cascade,
    data: Data,
    config: Config,
    folder: Path | None,
    begin: Begin,
    progress: Progress,
) -> dict[str, Record]:
    """A record of each variant, its judge asked about everything."""
    together = asking_everything(
        cascade.altered(
            scorer=RememberingScorer(cascade.scorer),
            stages=[stage for stage, _ in variants.values()],
            store=MemoryStore() if cascade.store is None else None,
        )
    )
    configs = {}
    for name, (_, settings) in variants.items():
        if folder and (folder / name / "run.json").exists():
            raise DataError(f"{str(folder / name)!r} holds a record already.", hint="Give another folder.")
        altered = config.model_dump(mode="json")
        for key, value in settings.items():
            override(altered, f"stage.0.{key}", value)
        configs[name] = Config.parse(altered)
    begin(together)
    records = {}
    with nullcontext(folder) if folder else tempfile.TemporaryDirectory() as kept:
        for (name, each), stage in zip(configs.items(), together.stages, strict=True):
            alone = together.altered(stages=[stage])
            record = record_run(alone, data, Path(kept) / name, config=each, progress=progress)
            if lacking := int((record.readable & ~record.judged.asked).sum()):
                raise BudgetExhausted(
                    f"The budget is spent, and the judge was not asked about {lacking} images with {name}.",
                    hint="Raise budget.usd, or take fewer images with --limit; answers in the cache are not asked for again.",
                )
            records[name] = record
    return records


def _rows(records: Mapping[str, Record], policy: PolicyLike) -> tuple[Row, ...]:
    """Of records where the judge was asked about everything: the cascade with its policy; as further figures, how often the truth
    was among the candidates, how often the judge answered and how often its answer was right where it could be; and the cascade
    that asks about everything, with the paired difference of its accuracy to the first record's."""
    first = next(iter(records.values()))
    rows = []
    for name, record in records.items():
        judged, truths, readable = record.judged, record.truths, record.readable
        everything = _row(name, record, Always(), {})
        covered = covered_by(judged.candidates, truths) & readable
        gain = ((record.predicted == truths) * 1.0 - (first.predicted == truths))[readable]
        low, high = (None if record is first else interval(gain)) or (None, None)
        figures: dict[str, float | None] = {
            "coverage": coverage(judged.candidates[readable], truths[readable]),
            "answered": mean((judged.answers != NOBODY)[readable]),
            "judge_accuracy_covered": mean((judged.answers == truths)[covered]),
            "judge_all_accuracy": everything.accuracy,
            "judge_all_calls": everything.calls,
            "judge_all_dollars": everything.dollars,
            "judge_all_seconds": everything.seconds,
            "judge_all_input_tokens": _total(judged.input_tokens, judged.asked),
            "judge_all_output_tokens": _total(judged.output_tokens, judged.asked),
            "judge_all_difference": None if record is first else mean(gain),
            "judge_all_difference_low": low,
            "judge_all_difference_high": high,
        }
        rows.append(_row(name, record, policy, figures))
    return tuple(rows)


def _row(variant: str, record: Record, policy: PolicyLike, figures: Mapping[str, float | None]) -> Row:
    """A policy on a record where the judge was asked about everything."""
    if len(record.stages) != 1:
        raise DataError(f"A study is of one judge; the record has {len(record.stages)}.")
    _require_images(record)
    live = under(record, policy)
    asked, right = live.judged.asked, (live.predicted == record.truths)[record.readable]
    return Row(
        variant=variant,
        accuracy=float(right.mean()),
        interval=interval(right),
        calls=int(asked.sum()),
        dollars=float(record.judged.dollars[asked].sum()),
        seconds=_total(record.judged.seconds, asked),
        figures={"deferral_rate": mean(asked[record.readable]), **figures},
    )


def _require_images(record: Record) -> None:
    if not record.readable.any():
        raise DataError("None of the images could be read.")


def _total(values: NDArray[np.float64] | NDArray[np.int64], asked: Bools) -> float | None:
    """The sum over the questions asked; those from the cache, which are zero, count as the mean of the others."""
    known = values[asked & (values > 0)]
    if known.size:
        return float(known.mean() * asked.sum())
    return None if asked.any() else 0.0


def _position_figures(record: Record, *, shuffled: bool) -> dict[str, float | None]:
    bias = position_bias(record)
    answers = int(bias.chosen.sum())
    shares = {
        f"{name}_{position}": count / answers if answers else None
        for name, counts in (("chosen", bias.chosen), ("true", bias.true))
        for position, count in enumerate(counts.tolist(), start=1)
    }
    return {**shares, "p_value": bias.p_value if shuffled else None}

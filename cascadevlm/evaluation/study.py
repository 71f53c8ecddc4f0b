"""Studies: those of the CascadeVLM paper (Wei, Findings of EMNLP 2024, arXiv 2405.11301), on any labelled data and any models.

A study over images compares variants of the configuration of a cascade with one judge. The judge is asked about all images in
every variant, so that the cascade with its policy and the judge on everything are figures of the same answers. Images are scored
once and no question is put twice. Studies of a record ask nobody.

Raises:
    InputError: if the cascade does not have one stage.
    DataError: if a folder holds a record already, or no image can be read.
    BudgetExhausted: if the budget does not suffice.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from cascadevlm.base.arrays import NOBODY
from cascadevlm.base.errors import BudgetExhausted, DataError, InputError
from cascadevlm.cascade.candidates import Order
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.cascade.stage import Stage
from cascadevlm.config.config import Config
from cascadevlm.evaluation.data import Data
from cascadevlm.evaluation.evaluate import asking_everything
from cascadevlm.evaluation.metrics import Bools, coverage, covered_by, interval, mean
from cascadevlm.evaluation.record import Record
from cascadevlm.evaluation.results import Row, Study
from cascadevlm.evaluation.sharing import record_runs, sharing
from cascadevlm.evaluation.sweep import sweep, under
from cascadevlm.judges.support import SupportSet
from cascadevlm.policies.base import PolicyLike
from cascadevlm.policies.rules import Always, EntropyAbove
from cascadevlm.runs.run_folder import Tally

KS = (1, 2, 3, 5, 10)
"""How many candidates `study_candidates` tries, unless told otherwise."""

SHOTS = (0, 1, 2)
"""How many exemplars a class `study_shots` tries, unless told otherwise."""

ORDERS: tuple[Order, ...] = ("ranked", "reversed", "shuffled")


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


Begin = Callable[[Cascade], None]
Progress = Callable[[Tally], None]


class Asking(TypedDict, total=False):
    """How a study over images is run.

    Attributes:
        folder: for the records, each in a folder of its variant's name. Default: the records are not kept.
        begin: told, before anybody is asked, a cascade whose stages put all questions of the study.
        progress: called after every prediction.
    """

    folder: Path | None
    begin: Begin
    progress: Progress


Variants = Mapping[str, Mapping[str, JsonValue]]
"""By name, what each variant changes in the configuration of the stage."""


def study_candidates(cascade: Cascade, data: Data, *, config: Config, ks: Sequence[int] = KS, **asking: Unpack[Asking]) -> Study:
    """The effect of k, the number of candidates; a k above the number of labels takes all labels."""
    rule = _stage_of(cascade).candidates
    numbers = sorted({min(k, len(cascade.labels)) for k in ks})
    variants: Variants = {f"k={k}": {"candidates": {"k": k, "order": rule.order, "seed": rule.seed}} for k in numbers}
    return Study(
        study="candidates",
        question="How many candidates should the judge be offered?",
        rows=_rows(_ask(variants, cascade, data, config, **asking), cascade.stages[0].policy),
    )


def study_order(cascade: Cascade, data: Data, *, config: Config, **asking: Unpack[Asking]) -> Study:
    """The effect of the order of the candidates, and the judge's position bias; shuffled with the seed of the candidates."""
    variants: Variants = {order: {"candidates.order": order} for order in ORDERS}
    records = _ask(variants, cascade, data, config, **asking)
    rows = [
        row.with_figures(**_position_figures(record, shuffled=row.variant == "shuffled"))
        for row, record in zip(_rows(records, cascade.stages[0].policy), records.values(), strict=True)
    ]
    return Study(
        study="order",
        question="Does the order of the candidates matter, and does the judge favour a position?",
        rows=tuple(rows),
        notes=(
            "chosen_1 and true_1 are the shares of answers and of truths that stood first among the candidates, and so on.",
            "p_value is the probability of positions chosen as unevenly by a judge without position bias (chi-square test).",
        ),
    )


def study_reasoning(cascade: Cascade, data: Data, *, config: Config, **asking: Unpack[Asking]) -> Study:
    """The effect of chain-of-thought: the prompt ``select_cot`` against ``select``."""
    variants: Variants = {prompt: {"prompt": prompt, "support": None} for prompt in ("select", "select_cot")}
    return Study(
        study="reasoning",
        question="Is the judge better if it reasons before it answers?",
        rows=_rows(_ask(variants, cascade, data, config, **asking), cascade.stages[0].policy),
    )


def study_shots(
    cascade: Cascade,
    data: Data,
    *,
    config: Config,
    support: Path,
    shots: Sequence[int] = SHOTS,
    **asking: Unpack[Asking],
) -> Study:
    """The effect of exemplars: the prompt ``select_fewshot`` with images of the folder ``support`` against ``select_cot``.

    Raises:
        InputError: also if a number of exemplars is below 0, or the folder has no image of any label.
    """
    if min(shots) < 0:
        raise InputError(f"A class cannot have {min(shots)} exemplars.", hint="Give numbers from 0 on.")
    variants: Variants = {
        f"shots={number}": {"prompt": "select_fewshot", "support": {"folder": str(support), "shots": number}}
        if number
        else {"prompt": "select_cot", "support": None}
        for number in sorted(set(shots))
    }
    records = _ask(variants, cascade, data, config, **asking)
    shown = SupportSet.read(support, cascade.labels, shots=max(*shots, 1))
    exemplars = {exemplar.digest for given in shown.exemplars.values() for exemplar in given}
    common = sum(digest in exemplars for digest in next(iter(records.values())).digests)
    return Study(
        study="shots",
        question="Is the judge better if it is shown exemplars of the candidates?",
        rows=_rows(records, cascade.stages[0].policy),
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
    return Study(study="threshold", question="From which entropy on should the judge be asked?", rows=tuple(rows))


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
            ).with_figures(errors=int(here.sum()), share=int(here.sum()) / errors if errors else None)
        )
    return Study(
        study="errors",
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


def _ask(
    variants: Variants,
    cascade: Cascade,
    data: Data,
    config: Config,
    *,
    folder: Path | None = None,
    begin: Begin = lambda cascade: None,
    progress: Progress = lambda tally: None,
) -> dict[str, Record]:
    """A record of each variant, its judge asked about everything."""
    stage = _stage_of(cascade)
    configs = {
        name: config.altered({f"stage.0.{key}": value for key, value in changes.items()}) for name, changes in variants.items()
    }
    cascades = {
        name: asking_everything(cascade.altered(stages=[each.stage[0].questions_of(stage, cascade.labels)]))
        for name, each in configs.items()
    }
    cascades = sharing(cascades, configs)
    begin(cascade.altered(stages=[each.stages[0] for each in cascades.values()]))
    of_all = dict.fromkeys(cascades, data)
    records = record_runs(cascades, of_all, configs=configs, folder=folder, progress=progress)
    for name, record in records.items():
        if lacking := int((record.readable & ~record.judged.asked).sum()):
            raise BudgetExhausted(
                f"The budget is spent, and the judge was not asked about {lacking} images with {name}.",
                hint="Raise budget.usd, or take fewer images with --limit; answers in the cache are not asked for again.",
            )
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
    ).with_figures(deferral_rate=mean(asked[record.readable]), **figures)


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

"""The studies of the CascadeVLM paper (Wei, Findings of EMNLP 2024, arXiv 2405.11301), on any labelled data and any models.

A study over images compares variants of the configuration of a cascade with one judge. In every variant, the judge is asked
about all images. So the same answers give the figures of the cascade with its policy and the figures of the judge on every
image. Images are scored once, and each question is asked once. Studies of a record ask no judge.

Raises:
    InputError: if the cascade does not have exactly one stage.
    DataError: if a folder contains a record already, or no image can be read.
    BudgetExhausted: if the budget is used up before all questions are asked.
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
from cascadevlm.runs.tally import Tally

KS = (1, 2, 3, 5, 10)
"""Default numbers of candidates in `study_candidates`."""

SHOTS = (0, 1, 2)
"""Default numbers of exemplars per class in `study_shots`."""

ORDERS: tuple[Order, ...] = ("ranked", "reversed", "shuffled")


@dataclass(frozen=True, kw_only=True)
class PositionBias:
    """Positions of the judge's answers in the lists of candidates, over the questions that it answered.

    Attributes:
        chosen: ``(K,)`` numbers of answers at the first, second, … position.
        true: ``(K,)`` numbers of truths at these positions. Truths that were not candidates are not counted.
        p_value: p-value of Pearson's chi-square test that every position is equally probable. A small value means that the
            counts are uneven. It shows a bias of the judge only if the candidates were shuffled. None without answers, or with
            one position.
    """

    chosen: NDArray[np.int64]
    true: NDArray[np.int64]
    p_value: float | None


def position_bias(record: Record) -> PositionBias:
    """The position bias of the last stage's judge in a record."""
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
    """Options of a study over images.

    Attributes:
        folder: folder for the records, one subfolder per variant. Default: the records are not kept.
        begin: function that is called once before the first question, with a cascade whose stages ask all questions of the
            study.
        progress: function that is called after every prediction.
    """

    folder: Path | None
    begin: Begin
    progress: Progress


Variants = Mapping[str, Mapping[str, JsonValue]]
"""The changes of each variant in the configuration of the stage, by the name of the variant."""


def study_candidates(cascade: Cascade, data: Data, *, config: Config, ks: Sequence[int] = KS, **asking: Unpack[Asking]) -> Study:
    """The effect of k, the number of candidates. If k is larger than the number of labels, all labels are candidates."""
    rule = _stage_of(cascade).candidates
    numbers = sorted({min(k, len(cascade.labels)) for k in ks})
    variants: Variants = {f"k={k}": {"candidates": {"k": k, "order": rule.order, "seed": rule.seed}} for k in numbers}
    return Study(
        study="candidates",
        question="How many candidates should the judge see?",
        rows=_rows(_ask(variants, cascade, data, config, **asking), cascade.stages[0].policy),
    )


def study_order(cascade: Cascade, data: Data, *, config: Config, **asking: Unpack[Asking]) -> Study:
    """The effect of the order of the candidates, and the judge's position bias.

    The seed of the candidates' configuration shuffles them.
    """
    variants: Variants = {order: {"candidates.order": order} for order in ORDERS}
    records = _ask(variants, cascade, data, config, **asking)
    rows = [
        row.with_figures(**_position_figures(record, shuffled=row.variant == "shuffled"))
        for row, record in zip(_rows(records, cascade.stages[0].policy), records.values(), strict=True)
    ]
    return Study(
        study="order",
        question="Does the order of the candidates matter, and does the judge prefer a position?",
        rows=tuple(rows),
        notes=(
            "chosen_1 is the share of answers that are the first candidate; true_1 is the share of truths there; and so on.",
            "p_value is the probability that a judge without position bias chooses positions this unevenly (chi-square test).",
        ),
    )


def study_reasoning(cascade: Cascade, data: Data, *, config: Config, **asking: Unpack[Asking]) -> Study:
    """The effect of chain-of-thought: compares the prompts ``select_cot`` and ``select``."""
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
    """The effect of exemplars: compares the prompt ``select_fewshot`` with ``select_cot``, which shows no exemplars.

    Args:
        support: folder of exemplars, with one subfolder per class.
        shots: numbers of exemplars per class.

    Raises:
        InputError: if a number of exemplars is negative, or the folder has no image of any label.
    """
    if min(shots) < 0:
        raise InputError(f"A class cannot have {min(shots)} exemplars.", hint="Use numbers of at least 0.")
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
        question="Is the judge better if it sees exemplars of the candidates?",
        rows=_rows(records, cascade.stages[0].policy),
        notes=(f"{common} of the images are also exemplars, which makes the judge look better than it is.",) if common else (),
    )


def study_threshold(record: Record, *, thresholds: Sequence[float] | None = None) -> Study:
    """The effect of the threshold of CascadeVLM's entropy policy.

    Args:
        record: a record with one judge that was asked about every image.
        thresholds: thresholds from 0 to 1. Default: the thresholds that escalate 0, 5, …, 100 % of the images.

    Raises:
        DataError: if the judge was not asked about every image, or the record does not have exactly one judge.
    """
    if thresholds is None:
        curve = sweep(record).curve("entropy")
        assert curve.thresholds is not None
        thresholds = np.unique(curve.thresholds[~np.isnan(curve.thresholds)].clip(0, 1)).tolist()
    rows = [_row(f"entropy > {t:.3g}", record, EntropyAbove(t), {"threshold": t}) for t in sorted(thresholds)]
    return Study(study="threshold", question="Above which entropy should the judge be asked?", rows=tuple(rows))


def study_errors(record: Record) -> Study:
    """The errors of the predictions by their causes, see `split_errors`.

    The accuracy of a row is the accuracy if the errors of this row did not happen.

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
        question="What causes the errors of the cascade?",
        rows=tuple(rows),
        notes=(
            f"{errors} of {int(readable.sum())} predictions are wrong.",
            "The accuracy of a row is the accuracy without its errors. Calls and dollars are sums over these images.",
        ),
    )


def split_errors(record: Record) -> dict[str, Bools]:
    """``(N,)`` booleans per cause: the prediction is wrong for this cause. The first cause in this list that applies counts.

    - ``not escalated``: the policy of no stage escalated the image.
    - ``truth not among the candidates``: the candidates of the image's last stage did not contain the truth.
    - ``no answer``: no judge named a label, for example because of a refusal, a failure or the budget.
    - ``judge wrong``: all other errors.

    Images that could not be read are in no group.
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
        raise InputError(
            f"A study needs a cascade with one stage; this cascade has {len(cascade.stages)}.", hint="Configure one [[stage]]."
        )
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
    """The record of each variant. Its judge is asked about every image."""
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
                f"The budget is used up, and the judge was not asked about {lacking} images in the variant {name}.",
                hint="Raise budget.usd, or use fewer images with --limit. Answers in the cache are not paid for again.",
            )
    return records


def _rows(records: Mapping[str, Record], policy: PolicyLike) -> tuple[Row, ...]:
    """One row per record, in which the judge was asked about every image.

    The fields are figures of the cascade with its policy. There are three further figures: the share of images whose truth was
    among the candidates (``coverage``), the share of images that the judge answered (``answered``), and the judge's accuracy if
    the truth was among the candidates (``judge_accuracy_covered``). Figures with ``judge_all`` are figures of the judge on
    every image. ``judge_all_difference`` is this accuracy minus the accuracy of the first record on the same images.
    """
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
    """The row of a policy on a record in which the judge was asked about every image."""
    if len(record.stages) != 1:
        raise DataError(
            f"A study needs a record with one judge; this record has {len(record.stages)}.",
            hint="Make a record of a cascade with one stage.",
        )
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
        raise DataError("No image could be read.", hint="Make a record of readable images.")


def _total(values: NDArray[np.float64] | NDArray[np.int64], asked: Bools) -> float | None:
    """The sum over the questions asked. Zeros are answers from the cache, and count as the mean of the other values."""
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

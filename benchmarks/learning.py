"""What a cascade that learns is worth: ``python -m benchmarks.learning --embeddings FOLDER``.

A folder has one folder per set: unit image embeddings, a scorer's prototypes (logits are 100 times the cosine), truths, and the
answers of one judge, who saw all labels at once. The judge's answer therefore stands whatever it is shown, and all labels are
candidates. In each draw, 200 random images are labelled: they calibrate the scorer, fit the model of the judge, and are the
support set. The others are a stream in batches of 64. A policy decides on each batch, and the opinions are fused.

One line of JSON per set, kind and policy, mean over the draws:

- right: share of right predictions over the whole stream; believed: mean probability that the cascade gave its predictions;
- asked and right per 500 images of the stream; ms: milliseconds of processor time per image for learning and scoring;
- kinds: scorer and judge alone; "fixed": calibrated, nothing learned; "support": the labelled images as a support set, nothing
  learned in the run; "learning": learned in the run, without the support set; "support + learning"; "transduced": support set and
  unlabelled images, nothing learned in the run; "transduced + learning"; the same of a stream sorted by class.

Then, per set: how often the scorer with the support set, and with the unlabelled images too, is right without a judge
(transduction); and how often a 1-shot scorer is right that was adapted with 3 and with 15 labelled images per class, beside
4-shot and 16-shot scorers.
"""

import asyncio
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer
from numpy.typing import NDArray
from scipy.special import log_softmax

from cascadevlm import LabelSet, Scores
from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.decision.judge_fit import fit_judge
from cascadevlm.decision.judge_model import Answers, JudgeModel
from cascadevlm.decision.learning import Learning
from cascadevlm.decision.means import Sums
from cascadevlm.decision.scorer_calibration import Floats
from cascadevlm.decision.teaching import Labelled, Scored, Taught, transduced
from cascadevlm.policies.base import Spending, as_budgeted

LABELLED, BATCH, BLOCK = 200, 64, 500
"""Labelled images per draw; images per batch; images per reported part of the stream."""

POLICIES = ("deferral <= 0.2", "deferral <= 0.1", "deferral <= 0.3", "gain > 0.05", "accuracy >= 0.7")

Kind = Literal[
    "fixed", "support", "learning", "support + learning", "transduced", "transduced + learning", "sorted, transduced + learning"
]
KINDS: tuple[Kind, ...] = (
    "fixed",
    "support",
    "learning",
    "support + learning",
    "transduced",
    "transduced + learning",
    "sorted, transduced + learning",
)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A set of N images of C classes.

    Attributes:
        embeddings: `(N, D)`, of unit length.
        prototypes: `(C, D)` per number of shots, of unit length.
        truths: `(N,)` columns.
        answers: `(N,)` columns that the judge named, or `NOBODY`.
    """

    name: str
    embeddings: Floats
    prototypes: dict[int, Floats]
    truths: Columns
    answers: Columns

    @classmethod
    def read(cls, folder: Path) -> "Stored":
        prototypes = {shots_of(path): unit(np.load(path)) for path in folder.glob("prototypes_*shot.npy")}
        return cls(
            name=folder.name,
            embeddings=unit(np.load(folder / "image_embeddings.npy")),
            prototypes=prototypes,
            truths=np.load(folder / "truth.npy").astype(np.int64),
            answers=np.maximum(np.load(folder / "judge_answers.npy").astype(np.int64), NOBODY),
        )

    def scored(self, shots: int) -> Floats:
        """`(N, C)` log-probabilities of the scorer."""
        scores: Floats = log_softmax(100 * self.embeddings @ self.prototypes[shots].T, axis=1)
        return scores

    def answered(self, rows: NDArray[np.intp]) -> Answers:
        candidates = np.tile(np.arange(len(self.prototypes[1])), (len(rows), 1))
        return Answers(candidates=candidates, answers=self.answers[rows], none_offered=False)


def shots_of(path: Path) -> int:
    return int(path.stem.removeprefix("prototypes_").removesuffix("shot"))


def unit(rows: NDArray[np.floating]) -> Floats:
    wide = rows.astype(np.float64)
    normalised: Floats = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return normalised


class WithoutSupport(Labelled):
    """Labelled images that calibrate, and fit the strength of what is learned, but teach no class."""

    @cached_property
    def support(self) -> tuple[Sums, ...]:
        nothing = self.nothing()
        return tuple(nothing.opinion(number) for number in range(len(self.calibrations)))


@dataclass(frozen=True, kw_only=True)
class Draw:
    """A calibration on random images, and the others as a stream."""

    images: Stored
    log_probs: Floats
    labelled: Labelled
    model: JudgeModel
    stream: NDArray[np.intp]

    @classmethod
    def of(cls, images: Stored, shots: int, seed: int) -> "Draw":
        order, log_probs = np.random.default_rng(seed).permutation(len(images.truths)), images.scored(shots)
        own = order[:LABELLED]
        labelled = Labelled.of(log_probs[own], images.embeddings[own], images.truths[own])
        model, _ = fit_judge(labelled.fit.held_out, labelled.responsibilities, images.answered(own))
        return cls(images=images, log_probs=log_probs, labelled=labelled, model=model, stream=order[LABELLED:])

    def chunks(self) -> Iterator[Scored]:
        for begin in range(0, len(self.stream), BATCH):
            rows = self.stream[begin : begin + BATCH]
            yield self.log_probs[rows], self.images.embeddings[rows]

    def run(self, kind: Kind, policy: str) -> dict[str, list[float]]:
        draw = self
        if kind.startswith("sorted"):
            draw = replace(self, stream=self.stream[np.argsort(self.images.truths[self.stream], kind="stable")])
        return asyncio.run(draw._run(kind, policy))

    async def _run(self, kind: Kind, policy: str) -> dict[str, list[float]]:
        labelled, images = self.labelled, self.images
        if kind in ("fixed", "learning"):
            labelled = WithoutSupport(embeddings=labelled.embeddings, truths=labelled.truths, fit=labelled.fit)
        began = time.process_time()
        unlabelled = transduced(labelled, self.chunks) if "transduced" in kind else None
        learning = Learning(labelled, BATCH, unlabelled=unlabelled)
        seconds = time.process_time() - began
        asking = _Asking(policy, len(self.stream), len(images.prototypes[1]))
        asked, right, believed = [], [], []
        for begin in range(0, len(self.stream), BATCH):
            rows = self.stream[begin : begin + BATCH]
            scored, began = (self.log_probs[rows], images.embeddings[rows]), time.process_time()
            taught = await learning.taught(begin if "learning" in kind else 0)
            before = taught(*scored)
            seconds += time.process_time() - began
            answers = images.answered(rows)
            judged = asking.select(before, self.model.gain(before, answers.candidates))
            after = np.where(judged[:, None], self.model.posterior(before, answers), before)
            if "learning" in kind:
                began = time.process_time()
                await learning.take(*scored, np.exp(after), judged, begin)
                seconds += time.process_time() - began
            asked.append(judged)
            right.append(after.argmax(axis=1) == images.truths[rows])
            believed.append(np.exp(after.max(axis=1)))
        parts = range(0, len(self.stream), BLOCK)
        return {
            "asked": [float(np.concatenate(asked).mean())],
            "right": [float(np.concatenate(right).mean())],
            "believed": [float(np.concatenate(believed).mean())],
            "ms": [1000 * seconds / len(self.stream)],
            "asked per part": [float(np.concatenate(asked)[part : part + BLOCK].mean()) for part in parts],
            "right per part": [float(np.concatenate(right)[part : part + BLOCK].mean()) for part in parts],
        }


class _Asking:
    """A policy over a stream of known length."""

    def __init__(self, policy: str, images: int, classes: int) -> None:
        self.policy, self.images = as_budgeted(policy), images
        self.labels, self.spending = LabelSet.of(f"class {number}" for number in range(classes)), Spending()

    def select(self, log_probs: Floats, gain: Floats) -> NDArray[np.bool_]:
        scores = Scores(log_probs=log_probs.astype(np.float32), labels=self.labels, fingerprint="stored")
        decided = self.spending.images + len(scores)
        spending = replace(self.spending, remaining=float(self.images - decided), gain=tuple(gain.tolist()))
        selected = self.policy.select(scores, spending)
        self.spending = replace(
            spending,
            images=decided,
            calls=spending.calls + int(selected.sum()),
            recent=self.policy.remembered(scores, spending),
        )
        return selected


def unlabelled_figures(draw: Draw) -> dict[str, list[float]]:
    """How often the scorer is right without a judge."""
    labelled, rows, images = draw.labelled, draw.stream, draw.images
    scored, truths = (draw.log_probs[rows], images.embeddings[rows]), images.truths[rows]
    without = Labelled.none(labelled.fit.calibration, images.embeddings.shape[1])
    taught = {
        "scorer": None,
        "support": labelled.taught(labelled.nothing()),
        "unlabelled": _of_all(without, draw),
        "support and unlabelled": _of_all(labelled, draw),
    }
    found = {
        name: float(((scored[0] if each is None else each(*scored)).argmax(axis=1) == truths).mean())
        for name, each in taught.items()
    }
    found["calibrated"] = float((labelled.fit.calibration(scored[0]).argmax(axis=1) == truths).mean())
    found["judge"] = float((images.answers[rows] == truths).mean())
    return {name: [value] for name, value in found.items()}


def _of_all(labelled: Labelled, draw: Draw) -> Taught:
    unlabelled = transduced(labelled, draw.chunks)
    return labelled.taught(unlabelled.sums, unlabelled.fold)


def few_shot_figures(images: Stored) -> dict[str, float]:
    """A 1-shot scorer adapted with further images per class, beside scorers of as many shots, on the same images; one draw."""
    order, log_probs = np.random.default_rng(0).permutation(len(images.truths)), images.scored(1)
    place = np.empty(len(order), dtype=np.int64)  # of each image among those of its class, in random order
    for column in range(len(images.prototypes[1])):
        rows = order[images.truths[order] == column]
        place[rows] = np.arange(len(rows))
    rest = place >= 15
    found = {}
    for shots in (4, 16):
        own = place < shots - 1
        taught = Labelled.of(log_probs[own], images.embeddings[own], images.truths[own], matrix=False)
        adapted = taught.taught(taught.nothing()).linear()(log_probs[rest], images.embeddings[rest])
        found[f"adapted, {shots} shots"] = float((adapted.argmax(axis=1) == images.truths[rest]).mean())
    for shots in sorted(images.prototypes):
        right = images.scored(shots)[rest].argmax(axis=1) == images.truths[rest]
        found[f"scorer, {shots} shots"] = float(right.mean())
    return {name: round(value, 4) for name, value in found.items()}


def mean(figures: list[dict[str, list[float]]]) -> dict[str, float | list[float]]:
    """Over draws."""
    found: dict[str, float | list[float]] = {}
    for name in figures[0]:
        values = np.mean([each[name] for each in figures], axis=0).round(4).tolist()
        found[name] = values[0] if len(values) == 1 else values
    return found


def main(
    embeddings: Annotated[Path, typer.Option(help="Folder with one folder per set.")],
    draws: Annotated[int, typer.Option(help="Number of random draws of the labelled images.")] = 3,
    only: Annotated[str, typer.Option(help="Name of one set. Default: all sets.")] = "",
    policies: Annotated[str, typer.Option(help="Policies, separated by semicolons.")] = ";".join(POLICIES),
    shots: Annotated[
        int, typer.Option(help="Images per prototype. Default: 1, or 2 if the 1-shot scorer is right on less than 20 %.")
    ] = 0,
) -> None:
    for folder in sorted(embeddings.iterdir()):
        if not folder.is_dir() or (only and folder.name != only):
            continue
        images = Stored.read(folder)
        weak = bool((images.scored(1).argmax(axis=1) == images.truths).mean() < 0.2)
        tell = partial(_tell, images.name)
        drawn = [Draw.of(images, shots or 1 + weak, seed) for seed in range(draws)]
        tell("without a judge", mean([unlabelled_figures(draw) for draw in drawn]))
        for policy in policies.split(";"):
            for kind in KINDS:
                tell(kind, mean([draw.run(kind, policy) for draw in drawn]), policy)
        tell("few shots", few_shot_figures(images))


def _tell(name: str, kind: str, figures: Mapping[str, float | list[float]], policy: str = "") -> None:
    print(json.dumps({"set": name, "policy": policy, "kind": kind, **figures}), flush=True)


if __name__ == "__main__":
    typer.run(main)

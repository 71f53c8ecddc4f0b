"""What a cascade that learns is worth: ``python -m benchmarks.learning --embeddings FOLDER``.

A folder has one folder per set: unit image embeddings, a scorer's prototypes (logits are 100 times the cosine), truths, and the
answers of one judge, who saw all labels at once. The judge's answer therefore stands whatever it is shown, and all labels are
candidates. In each draw, 200 random images are labelled: they calibrate the scorer, fit the model of the judge, and are the
support set. The others are a stream in batches of 64. A policy decides on each batch, and the opinions are fused. Each question
costs 0.1 cents.

One line of JSON per set, order, policy and kind, mean over the draws:

- right: share of right predictions over the whole stream; believed: mean probability that the cascade gave its predictions;
- asked and right per 500 images of the stream; ms: milliseconds of processor time per image for learning and scoring;
- kinds: "fixed": calibrated, nothing learned; "support": the labelled images as a support set, nothing learned in the run;
  "learning": learned in the run, without the support set; "support + learning": what ``learn = true`` does; "transduced": support
  set and unlabelled images, nothing learned in the run; "transduced + learning";
- orders: "random"; "grouped": near-duplicates stand together, and none of them is labelled if another one is in the stream;
  "sorted": by class.

The last policy asks for the accuracy that "support" reached with 20 % asked. Then, per set: how often the scorer with the support
set, and with the unlabelled images too, is right without a judge (transduction); and how often a 1-shot scorer is right that was
adapted with 3 and with 15 labelled images per class, beside 4-shot and 16-shot scorers.

``--table FILE`` writes the same figures as a page. All sets take about 25 minutes on one core; ``--quick`` takes two.
"""

import asyncio
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
import typer
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import log_softmax

from cascadevlm import LabelSet, Scores
from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.decision.judge_fit import fit_judge
from cascadevlm.decision.judge_model import Answers, JudgeModel
from cascadevlm.decision.learning import Learning
from cascadevlm.decision.means import Sums
from cascadevlm.decision.scorer_calibration import Floats
from cascadevlm.decision.teaching import Labelled, Scored, Transduced, transduced
from cascadevlm.policies.base import Spending, as_budgeted

LABELLED, BATCH, BLOCK = 200, 64, 500
"""Labelled images per draw; images per batch; images per reported part of the stream."""

PRICE = 0.001
"""US dollars per question."""

FIRST = "deferral <= 0.2"
POLICIES = (FIRST, "deferral <= 0.1", "deferral <= 0.3", "dollars <= 0.3", "gain > 0.05")

ALIKE = 0.96
"""Cosine from which two images are near-duplicates. Few images of these sets reach the 0.98 of `cascadevlm adapt`."""

Kind = Literal["fixed", "support", "learning", "support + learning", "transduced", "transduced + learning"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MAIN: tuple[Kind, ...] = ("fixed", "support", "support + learning", "transduced + learning")

Order = Literal["random", "grouped", "sorted"]


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

    @cached_property
    def groups(self) -> NDArray[np.intp]:
        """`(N,)` the group of near-duplicates of each image, by number."""
        near = self.embeddings @ self.embeddings.T >= ALIKE
        found: NDArray[np.intp] = connected_components(coo_array(near), directed=False)[1]
        return found

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
    def of(cls, images: Stored, shots: int, seed: int, order: Order) -> "Draw":
        rng, log_probs = np.random.default_rng(seed), images.scored(shots)
        shuffled = rng.permutation(len(images.truths))
        size = LABELLED
        if order == "grouped":
            groups = images.groups[shuffled]
            _, begins, group = np.unique(groups, return_index=True, return_inverse=True)
            shuffled = shuffled[np.argsort(begins[group], kind="stable")]
            size += int(np.flatnonzero(np.diff(images.groups[shuffled])[size - 1 :])[0])
        own, stream = shuffled[:size], shuffled[size:]
        if order == "sorted":
            stream = stream[np.argsort(images.truths[stream], kind="stable")]
        labelled = Labelled.of(log_probs[own], images.embeddings[own], images.truths[own])
        model, _ = fit_judge(labelled.fit.held_out, labelled.responsibilities, images.answered(own))
        return cls(images=images, log_probs=log_probs, labelled=labelled, model=model, stream=stream)

    def chunks(self) -> Iterator[Scored]:
        for begin in range(0, len(self.stream), BATCH):
            rows = self.stream[begin : begin + BATCH]
            yield self.log_probs[rows], self.images.embeddings[rows]

    @cached_property
    def unlabelled(self) -> tuple[Transduced, float]:
        """What the images of the stream teach, and the seconds that it took to learn."""
        began = time.process_time()
        return transduced(self.labelled, self.chunks), time.process_time() - began

    def run(self, kind: Kind, policy: str) -> dict[str, list[float]]:
        return asyncio.run(self._run(kind, policy))

    async def _run(self, kind: Kind, policy: str) -> dict[str, list[float]]:
        labelled, images = self.labelled, self.images
        if kind in ("fixed", "learning"):
            labelled = WithoutSupport(embeddings=labelled.embeddings, truths=labelled.truths, fit=labelled.fit)
        began = time.process_time()
        unlabelled, seconds = self.unlabelled if "transduced" in kind else (None, 0.0)
        learning = Learning(labelled, BATCH, unlabelled=unlabelled)
        seconds += time.process_time() - began
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
        prices = (PRICE,) * len(scores)
        spending = replace(self.spending, remaining=float(self.images - decided), gain=tuple(gain.tolist()), prices=prices)
        selected = self.policy.select(scores, spending)
        self.spending = replace(
            spending,
            images=decided,
            calls=spending.calls + int(selected.sum()),
            dollars=spending.dollars + PRICE * int(selected.sum()),
            dollars_for_all=spending.dollars_for_all + PRICE * len(scores),
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
        "unlabelled": without.taught(transduced(without, draw.chunks).sums),
        "support and unlabelled": labelled.taught(draw.unlabelled[0].sums, draw.unlabelled[0].fold),
    }
    found = {
        name: float(((scored[0] if each is None else each(*scored)).argmax(axis=1) == truths).mean())
        for name, each in taught.items()
    }
    found["calibrated"] = float((labelled.fit.calibration(scored[0]).argmax(axis=1) == truths).mean())
    found["judge"] = float((images.answers[rows] == truths).mean())
    return {name: [value] for name, value in found.items()}


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


Figures = Mapping[str, float | list[float]]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The figures of one kind on one set."""

    name: str
    order: str
    policy: str
    kind: str
    figures: Figures

    def tell(self) -> None:
        print(
            json.dumps({"set": self.name, "order": self.order, "policy": self.policy, "kind": self.kind, **self.figures}),
            flush=True,
        )


def measure(images: Stored, draws: int, *, quick: bool) -> Iterator[Measured]:
    weak = bool((images.scored(1).argmax(axis=1) == images.truths).mean() < 0.2)
    shots = 1 + weak  # a 1-shot scorer of aircraft is right on 16 %

    @cache
    def drawn(order: Order) -> list[Draw]:
        return [Draw.of(images, shots, seed, order) for seed in range(draws)]

    def all_of(order: Order, policy: str, kinds: Sequence[Kind]) -> Iterator[Measured]:
        for kind in kinds:
            figures = mean([draw.run(kind, policy) for draw in drawn(order)])
            yield Measured(name=images.name, order=order, policy=policy, kind=kind, figures=figures)

    without = mean([unlabelled_figures(draw) for draw in drawn("random")])
    yield Measured(name=images.name, order="random", policy="", kind="without a judge", figures=without)
    accuracy = ""
    for policy in POLICIES[:1] if quick else POLICIES:
        for found in all_of("random", policy, KINDS if policy == FIRST else MAIN):
            if (found.policy, found.kind) == (FIRST, "support"):
                accuracy = f"accuracy >= {found.figures['right']:.2f}"
            yield found
    yield from all_of("random", accuracy, MAIN)
    yield from all_of("grouped", FIRST, MAIN)
    yield from all_of("sorted", FIRST, MAIN)
    few = few_shot_figures(images)
    yield Measured(name=images.name, order="random", policy="", kind="few shots", figures=few)


WORDS = {
    "fixed": "nothing learned",
    "support": "support set",
    "support + learning": "support set, `learn = true`",
    "transduced + learning": "the same, all images looked at first",
}

INTRODUCTION = f"""# Learning, measured

`python -m benchmarks.learning --embeddings FOLDER --table FILE` makes this page. CLIP ViT-B/32 embeddings and GPT-4V's
answers to the same images are real. The scorer has one image per class (Aircraft: two) as prototypes. In each draw,
{LABELLED} labelled images calibrate all cascades and are the support set. The other images are the stream. Each cell has the
share of images asked about, the share of right predictions, and the mean probability of the predictions, in percent. The last
two numbers are equal where beliefs are honest. With {LABELLED} labelled images, chance alone moves them apart by two to three
points.

In the order "grouped", images with a cosine of at least {ALIKE:g} stand together, and none of them is labelled if another one
is in the stream. A question costs 0.1 cents. The accuracy that is asked for is the one that the support set reached with 20 %
asked.
"""


def page(found: Sequence[Measured]) -> str:
    """The figures as Markdown."""
    parts = [INTRODUCTION]
    for name in dict.fromkeys(each.name for each in found):
        known = {(each.order, each.policy, each.kind): each.figures for each in found if each.name == name}
        columns = " | ".join(WORDS.values())
        parts.append(f"## {name}\n\n| order | policy | {columns} |\n|---|---|{'---|' * len(WORDS)}")
        for order, policy in dict.fromkeys((order, policy) for order, policy, _ in known if policy):
            cells = [known.get((order, policy, kind), {}) for kind in WORDS]
            parts.append(f"| {order} | `{policy}` | {' | '.join(map(_cell, cells))} |")
        parts.append(f"\nPer 500 images, with `{FIRST}` and with `gain > 0.05`, asked / right:\n\n| policy | | |\n|---|---|---|")
        for policy in (FIRST, "gain > 0.05"):
            for kind in WORDS:
                figures = known.get(("random", policy, kind), {})
                told = zip(_series(figures, "asked per part"), _series(figures, "right per part"), strict=True)
                parts.append(f"| `{policy}` | {WORDS[kind]} | {', '.join(f'{100 * a:.0f} / {100 * r:.0f}' for a, r in told)} |")
        for kind, title in (("without a judge", "Right without a judge"), ("few shots", "Adapted with few labels")):
            shown = ", ".join(f"{what} {_percent(value)} %" for what, value in known[("random", "", kind)].items())
            parts.append(f"\n{title}: {shown}.\n")
    return "\n".join(parts)


def _cell(figures: Figures) -> str:
    return " / ".join(_percent(figures[each]) for each in ("asked", "right", "believed")) if figures else ""


def _percent(value: float | list[float]) -> str:
    return f"{100 * np.mean(value):.1f}"


def _series(figures: Figures, name: str) -> list[float]:
    found = figures.get(name, [])
    return found if isinstance(found, list) else [found]


def main(
    embeddings: Annotated[Path, typer.Option(help="Folder with one folder per set.")],
    draws: Annotated[int, typer.Option(help="Number of random draws of the labelled images.")] = 3,
    only: Annotated[str, typer.Option(help="Name of one set. Default: all sets.")] = "",
    quick: Annotated[bool, typer.Option(help="One draw, and only the policies of 20 % and of an accuracy.")] = False,
    table: Annotated[Path | None, typer.Option(help="File for a page with the figures. Default: no page.")] = None,
) -> None:
    found = []
    for folder in sorted(embeddings.iterdir()):
        if folder.is_dir() and only in ("", folder.name):
            for each in measure(Stored.read(folder), 1 if quick else draws, quick=quick):
                each.tell()
                found.append(each)
    if table is not None:
        table.write_text(page(found))


if __name__ == "__main__":
    typer.run(main)

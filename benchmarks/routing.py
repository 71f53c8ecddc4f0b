"""Two judges, asked in order or by routing: ``python -m benchmarks.routing [--recorded FOLDER]``.

Images are classified by a cascade of two stages with the policy "gain_per_dollar > X" for several X, after calibration on 200
labelled ones; told is, for each X, how often it is right and what a thousand images cost, in order and with routing. With
``../shared/recorded/artdl`` the judges are gpt-4o-mini, taken to cost a tenth, and gpt-4o. Without a folder they are made up:
each knows one half of twenty classes, where it is right in 95 of 100 cases, and guesses among the others.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image

from benchmarks.decision import made_up
from benchmarks.sweep import judged_all, pairs
from cascadevlm import Cascade, LabelSet, Scorer, Scores, Stage, TopK, load_prompt, parse_policy
from cascadevlm.base.types import NANODOLLARS, Question
from cascadevlm.cascade.fusing import CalibratedScorer
from cascadevlm.evaluation.calibrating.fitting import fit_calibration
from cascadevlm.evaluation.record import Record
from cascadevlm.judges.prompt import options
from cascadevlm.testing import FakeJudge

LABELLED = 200
WANTED = (20.0, 50.0, 100.0, 200.0, 500.0)
"""Right answers for a dollar."""

CHEAP, DEAR = "siglip-so400m→gpt-4o-mini", "siglip-large→gpt-4o"
"""Of the recorded pairs, that whose scorer and judge, and that whose judge is taken."""


def picture(number: int) -> NDArray[np.uint8]:
    """An image that tells its number."""
    return np.array([[divmod(number, 256) + (0,)]], dtype=np.uint8)


def number_of(image: Image.Image) -> int:
    high, low, _ = np.asarray(image)[0, 0].tolist()
    return int(256 * high + low)


class Known(Scorer):
    """Scores that were made before."""

    def __init__(self, scores: Scores) -> None:
        self.scores = scores

    def score(self, images: Sequence[Image.Image], labels: LabelSet) -> Scores:
        return self.scores.rows(np.array([number_of(image) for image in images]))


class Answering(FakeJudge):
    """Answers that were given before, at a price."""

    def __init__(self, answers: NDArray[np.int64], labels: LabelSet, dollars: float) -> None:
        super().__init__(dollars=dollars, reply=self._said)
        self.answers, self.labels, self.price = answers, labels, dollars

    def _said(self, question: Question) -> str:
        answer = self.labels[int(self.answers[number_of(question.image)])].name
        return f"ANSWER: {next((key for key, name in options(question).items() if name == answer), 'nothing')}"

    def usual_case(self, question: Question) -> int:
        return int(self.price * NANODOLLARS)


def specialists(seed: int) -> Record:
    """A scorer of twenty classes, and two judges of a tenth of a cent who know a half each."""
    scorer = made_up(seed, 2200, 20, 5)
    rng, truths = np.random.default_rng(seed), scorer.truths
    judged = []
    for name, half in (("first", truths < 10), ("second", truths >= 10)):
        right = np.where(half, rng.random(len(truths)) < 0.95, False)
        answers = np.where(right, truths, rng.integers(0, 20, len(truths)))
        judged.append(judged_all(scorer.scores, truths, answers, name, 0.001))
    return replace(judged[0], stages=(judged[0].judged, judged[1].judged))


def recorded(folder: Path) -> Record:
    """Of one scorer and two judges."""
    records = pairs(folder)
    cheap, dear = records[CHEAP], records[DEAR].judged
    return replace(cheap, stages=(replace(cheap.judged, dollars=dear.dollars / 10), dear))


def outcome(record: Record, seed: int) -> dict[str, list[float]]:
    """Right answers and dollars per thousand images, for each of `WANTED`, in order and with routing."""
    order = np.random.default_rng(seed).permutation(len(record))
    calibration = fit_calibration(record.take(np.sort(order[:LABELLED])))
    rest = np.sort(order[LABELLED:])
    scorer = CalibratedScorer(Known(record.scores), calibration)
    found: dict[str, list[float]] = {}
    for wanted in WANTED:
        stages = [
            Stage(
                judge=Answering(judged.answers, record.labels, float(judged.dollars[0])),
                prompt=load_prompt("select"),
                policy=parse_policy(f"gain_per_dollar > {wanted}"),
                candidates=TopK(k=len(record.labels)),
                fusion="bayes",
                model=known.model,
            )
            for judged, known in zip(record.stages, calibration.judges, strict=True)
        ]
        for way, routing in (("in order", False), ("routing", True)):
            cascade = Cascade(scorer, stages, labels=record.labels, routing=routing, batch_size=256)
            predictions = cascade.classify([picture(number) for number in rest])
            names = [record.labels[int(truth)].name for truth in record.truths[rest]]
            right = np.mean([each.label == name for each, name in zip(predictions, names, strict=True)])
            found.setdefault(f"{way}, right", []).append(float(right))
            found.setdefault(f"{way}, dollars", []).append(1000 * float(np.mean([each.cost.dollars for each in predictions])))
    return found


def main(
    recorded_in: Annotated[Path | None, typer.Option("--recorded", help="A folder of recorded predictions, as artdl.")] = None,
    seeds: Annotated[int, typer.Option(help="Random draws, or images made up anew.")] = 8,
) -> None:
    """Print a line for the mean of each figure, for every number of right answers wanted for a dollar."""
    measured = [outcome(recorded(recorded_in) if recorded_in else specialists(seed), seed) for seed in range(seeds)]
    print(json.dumps({"wanted for a dollar": WANTED}))
    for name in measured[0]:
        print(json.dumps({name: np.mean([each[name] for each in measured], axis=0).round(4).tolist()}))


if __name__ == "__main__":
    typer.run(main)

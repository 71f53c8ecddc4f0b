"""Measures the time of a sweep, and sweeps real records: ``python -m benchmarks.sweep [--recorded FOLDER]``.

Without a folder, a record of 100,000 images is simulated. Each ranking (three measures, random and the oracle) is swept at 1,000
thresholds. With the folder ``../shared/recorded/artdl``, its four pairs of scorer and judge are swept on all images, for shares
of escalated images from 0 to 1 in steps of .05. The area of each ranking and accuracies are printed.
"""

import json
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from cascadevlm import LabelSet, Scores
from cascadevlm.base.arrays import NOBODY
from cascadevlm.evaluation.record import Judged, Record
from cascadevlm.evaluation.sweep import sweep

PAIRS = {
    "siglip-large→gpt-4o": ("siglip-large-384_descriptions", "gpt-4o"),
    "siglip-so400m→gpt-4o-mini": ("siglip-so400m-384_descriptions", "gpt-4o-mini"),
    "clip-vit-l14→gpt-4o": ("clip-vit-l14_descriptions", "gpt-4o"),
    "siglip-base→gpt-4o-mini": ("siglip-base-512_names", "gpt-4o-mini"),
}
DOLLARS = {"gpt-4o": 4.77}
"""Cost of all images in US dollars, per judge. The cost of other judges is unknown."""


def judged_all(scores: Scores, truths: NDArray[np.int64], answers: NDArray[np.int64], judge: str, dollars: float) -> Record:
    """A record in which the judge was asked about every image, with all labels as candidates, for ``dollars`` per question."""
    size, nothing = len(truths), np.zeros(len(truths), dtype=np.int64)
    judged = Judged(
        judge=judge,
        asked=np.ones(size, dtype=bool),
        outcomes=tuple(np.where(answers == NOBODY, "unparsed", "answered").tolist()),
        answers=answers,
        candidates=np.broadcast_to(np.arange(len(scores.labels)), scores.log_probs.shape),
        rationales=("",) * size,
        dollars=np.full(size, dollars),
        seconds=np.zeros(size),
        input_tokens=nothing,
        output_tokens=nothing,
        paid=np.zeros(size),
    )
    best = scores.log_probs.argmax(axis=1)
    return Record(
        scores=scores,
        readable=np.ones(size, dtype=bool),
        names=tuple(map(str, range(size))),
        truths=truths,
        stages=(judged,),
        predicted=np.where(answers == NOBODY, best, answers),
        probabilities=np.where(answers == NOBODY, scores.probabilities.max(axis=1), np.nan),
        decided_by=tuple(np.where(answers == NOBODY, "scorer", "judge").tolist()),
    )


def pairs(folder: Path) -> dict[str, Record]:
    """The records of `PAIRS`, by name."""
    labels = LabelSet.of(json.loads((folder / "labels.json").read_text()))
    truths = np.load(folder / "truth.npy")
    records = {}
    for name, (scorer, judge) in PAIRS.items():
        scores = recorded_scores(folder, scorer, labels)
        answers = np.load(folder / f"answers_{judge}.npy")
        records[name] = judged_all(scores, truths, answers, judge, DOLLARS.get(judge, 0) / len(truths))
    return records


def recorded_scores(folder: Path, scorer: str, labels: LabelSet) -> Scores:
    """The scores in a file. The independent probabilities of a sigmoid scorer are first converted to logits."""
    probabilities = np.load(folder / f"scores_{scorer}.npy").astype(np.float64)
    logits = np.log(probabilities / (1 - probabilities) if scorer.startswith("siglip") else probabilities)
    return Scores.from_logits(logits, labels, fingerprint=scorer)


def made_up(images: int, classes: int) -> Record:
    """A simulated record. The scorer is right for about 50 % of the images, and the judge is right for 80 %."""
    rng = np.random.default_rng(0)
    truths = rng.integers(0, classes, images)
    logits = rng.normal(size=(images, classes)) * 3
    logits[np.arange(images), truths] += 8
    answers = np.where(rng.random(images) < 0.8, truths, rng.integers(0, classes, images))
    scores = Scores.from_logits(logits, LabelSet.of(f"class {number}" for number in range(classes)), fingerprint="made up")
    return judged_all(scores, truths, answers, "made up", 0.002)


def main(
    recorded: Annotated[Path | None, typer.Option(help="Folder of recorded predictions, in the form of artdl.")] = None,
    images: Annotated[int, typer.Option(help="Number of simulated images.")] = 100_000,
    classes: Annotated[int, typer.Option(help="Number of simulated classes.")] = 100,
    thresholds: Annotated[int, typer.Option(help="Number of thresholds per ranking.")] = 1000,
) -> None:
    if recorded:
        for name, record in pairs(recorded).items():
            result = sweep(record)
            areas = {curve.name: round(curve.area, 4) for curve in result.curves}
            accuracies = {"scorer": round(result.scorer_accuracy, 4), "judge": round(result.judge_accuracy, 4)}
            print(json.dumps({"pair": name, "accuracy": accuracies, "area": areas}, ensure_ascii=False))
        return
    record = made_up(images, classes)
    began = time.perf_counter()
    rankings = len(sweep(record, steps=thresholds).curves)
    seconds = round(time.perf_counter() - began, 2)
    print(json.dumps({"images": images, "rankings": rankings, "thresholds": thresholds, "seconds": seconds}))


if __name__ == "__main__":
    typer.run(main)

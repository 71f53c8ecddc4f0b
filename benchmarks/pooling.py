"""Measures a pool of several scorers on recorded scores and answers: ``python -m benchmarks.pooling --recorded FOLDER``.

In each draw, a judge's answers to 400 random images teach the calibration of each scorer and the weights of the pool, in place
of human labels. All figures are shares of right predictions among the other images, means over the draws: of the judge; of each
scorer, as it is and calibrated; of the scorers, averaged and as a fitted pool. The weights are those of the last draw.
"""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.sweep import recorded_scores
from cascadevlm import LabelSet
from cascadevlm.decision.pooling import fit_pool
from cascadevlm.scorers.several import EqualPool

TAUGHT = 400
"""Number of answers that teach."""


def main(
    recorded: Annotated[Path, typer.Option(help="Folder of recorded scores and answers of one data set.")],
    judge: Annotated[str, typer.Option(help="Name of the judge that teaches.")] = "gpt-4o",
    draws: Annotated[int, typer.Option(help="Number of random draws of the taught images.")] = 5,
) -> None:
    labels = LabelSet.of(json.loads((recorded / "labels.json").read_text()))
    truths, answers = np.load(recorded / "truth.npy"), np.load(recorded / f"answers_{judge}.npy")
    names = [path.stem.removeprefix("scores_") for path in sorted(recorded.glob("scores_*.npy"))]
    scored = [recorded_scores(recorded, name, labels) for name in names]
    figures: dict[str, list[float]] = {}
    weights: list[float] = []
    for seed in range(draws):
        order = np.random.default_rng(seed).permutation(len(truths))
        taught, rest = order[:TAUGHT], order[TAUGHT:]
        taught = taught[answers[taught] >= 0]
        pool = fit_pool([scores.rows(taught) for scores in scored], np.eye(len(labels))[answers[taught]]).pool
        others, weights = [scores.rows(rest) for scores in scored], pool.weights.round(2).tolist()
        predicted: dict[str, NDArray[np.integer]] = {judge: answers[rest]}
        for name, scores, calibration in zip(names, others, pool.calibrations, strict=True):
            predicted[name] = scores.log_probs.argmax(axis=1)
            predicted[f"{name}, calibrated"] = calibration(scores.log_probs).argmax(axis=1)
        predicted |= {"averaged": EqualPool()(others).argmax(axis=1), "pool": pool(others).argmax(axis=1)}
        for name, columns in predicted.items():
            figures.setdefault(name, []).append(float((columns == truths[rest]).mean()))
    print(
        json.dumps({name: round(float(np.mean(values)), 4) for name, values in figures.items()} | {"weights": weights}, indent=2)
    )


if __name__ == "__main__":
    typer.run(main)

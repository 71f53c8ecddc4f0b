"""What following the shares of classes is worth: ``python -m benchmarks.shares``.

Made-up images of ten classes (`benchmarks.decision.made_up`), all alike among the 200 labelled ones that scorer and judge are
calibrated on. Of those that the cascade then sees, the shares are the same, or half of the classes have an eighth of theirs. The
policy is "gain > 0.1". Told is, over the second half of the run, how often the answer is right, with shares fixed and followed,
and which part of the images was asked about.
"""

import json
from typing import Annotated

import numpy as np
import typer

from benchmarks.decision import made_up
from benchmarks.routing import Answering, Known, picture
from cascadevlm import Cascade, Stage, TopK, load_prompt, parse_policy
from cascadevlm.cascade.fusing import CalibratedScorer
from cascadevlm.evaluation.calibrating.fitting import fit_calibration
from cascadevlm.evaluation.record import Record

LABELLED = 200
CLASSES = 10


def outcome(record: Record, seed: int, images: int, *, changed: bool) -> dict[str, float]:
    """Of one draw."""
    calibration = fit_calibration(record.take(np.arange(LABELLED)))
    rows = np.arange(LABELLED, len(record))
    rng = np.random.default_rng(seed)
    if changed:
        rare = rng.permutation(CLASSES)[: CLASSES // 2]
        rows = rows[~np.isin(record.truths[rows], rare) | (rng.random(len(rows)) < 1 / 8)]
    rows = rows[:images]
    stage = Stage(
        judge=Answering(record.judged.answers, record.labels, 0.0),
        prompt=load_prompt("select"),
        policy=parse_policy("gain > 0.1"),
        candidates=TopK(k=CLASSES),
        fusion="bayes",
        model=calibration.judges[0].model,
    )
    scorer, late = CalibratedScorer(Known(record.scores), calibration), rows[images // 2 :]
    found: dict[str, float] = {}
    for name, follow in (("fixed", False), ("followed", True)):
        cascade = Cascade(scorer, [stage], labels=record.labels, calibration=calibration, follow_shares=follow, batch_size=64)
        predictions = cascade.classify([picture(int(number)) for number in rows])[images // 2 :]
        truths = [record.labels[int(truth)].name for truth in record.truths[late]]
        right = [each.label == truth for each, truth in zip(predictions, truths, strict=True)]
        found |= {f"{name}, right": float(np.mean(right)), f"{name}, asked": float(np.mean([p.escalated for p in predictions]))}
    return found


def main(
    images: Annotated[int, typer.Option(help="That the cascade sees.")] = 12_000,
    seeds: Annotated[int, typer.Option(help="Images made up anew.")] = 8,
) -> None:
    """Print a line for shares that stay and one for shares that change: means over the seeds."""
    for changed in (False, True):
        measured = [
            outcome(made_up(seed, LABELLED + 2 * images, CLASSES, CLASSES), seed, images, changed=changed)
            for seed in range(seeds)
        ]
        means = {name: round(float(np.mean([each[name] for each in measured])), 4) for name in measured[0]}
        print(json.dumps({"shares": "changed" if changed else "the same"} | means), flush=True)


if __name__ == "__main__":
    typer.run(main)

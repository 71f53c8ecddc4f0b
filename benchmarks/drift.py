"""What the warnings of drift miss and invent: ``python -m benchmarks.drift [--runs 200]``.

Images are made up as in `benchmarks.decision`, of ten classes of which the judge is shown five. A calibration is fitted on the
first 200 or 600 of them. Then, over 50,000 further images, every one of which the judge is asked about: how many runs warn though
nothing has changed; and over 20,000 images of which the later half is different, in how many runs that is told and after how many
of them (median). Different is either the scorer, whose logits are flattened so that its mean calibrated probability of the best
label falls by 10 points, or the judge, who is right in 71 instead of 91 of 100 answers. The change comes anywhere in a window.
"""

import json
import warnings
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import typer
from scipy.optimize import brentq
from scipy.special import log_softmax

from benchmarks.decision import made_up
from cascadevlm import Stage, load_prompt
from cascadevlm.cascade.drift import WINDOW, Drift
from cascadevlm.decision.calibration import Calibration
from cascadevlm.decision.scorer_calibration import Floats
from cascadevlm.evaluation.calibrating.fitting import fit_calibration
from cascadevlm.evaluation.deciding import answers_of
from cascadevlm.evaluation.record import Record
from cascadevlm.testing import FakeJudge

CLASSES, SHOWN = 10, 5
WORSE = 2.5
"""The noise with which the judge sees once it has changed."""


@dataclass(frozen=True, kw_only=True)
class Watched:
    """N images as drift sees them: the scorer's best probability, whether the judge named that label, and how likely that was."""

    best: Floats
    agreed: Floats
    likely: Floats

    @classmethod
    def of(cls, calibration: Calibration, record: Record) -> "Watched":
        log_probs = calibration.calibrated(record.scores).log_probs.astype(np.float64)
        agreed, likely = calibration.judges[0].model.agreement(log_probs, answers_of(record.judged))
        return cls(best=np.exp(log_probs.max(axis=1)), agreed=agreed.astype(np.float64), likely=likely)


def told(calibration: Calibration, watched: Watched) -> tuple[int | None, int | None]:
    """After how many images the scores and the answers give a warning."""
    drift = Drift(calibration, [Stage(judge=FakeJudge(), prompt=load_prompt("select"), model=calibration.judges[0].model)])
    assert drift.sureness is not None
    assert drift.agreement is not None
    found: dict[str, int] = {}
    for number, (best, agreed, likely) in enumerate(zip(watched.best, watched.agreed, watched.likely, strict=True), start=1):
        drift.sureness.add(float(best))
        drift.agreement.add(float(agreed), expected=float(likely), variance=float(likely * (1 - likely)))
        if number % WINDOW == 0:
            for name, windows in (("scores", drift.sureness), ("answers", drift.agreement)):
                if windows.warned:
                    found.setdefault(name, number)
    return found.get("scores"), found.get("answers")


def flattened(calibration: Calibration, record: Record, fall: float) -> Floats:
    """N best probabilities, their mean less by so much."""
    log_probs = calibration.calibrated(record.scores).log_probs.astype(np.float64)

    def best(scale: float) -> Floats:
        flat: Floats = np.exp(log_softmax(scale * log_probs, axis=1).max(axis=1))
        return flat

    wanted = best(1.0).mean() - fall
    return best(float(brentq(lambda scale: best(scale).mean() - wanted, 0.05, 1.0)))


def false_alarms(size: int, images: int, runs: int) -> dict[str, float]:
    """How many runs warn without a cause."""
    found = []
    for seed in range(runs):
        record = made_up(seed, size + images, CLASSES, SHOWN)
        calibration = fit_calibration(record.take(np.arange(size)))
        found.append(told(calibration, Watched.of(calibration, record.take(np.arange(size, size + images)))))
    scores, answers = (sum(number is not None for number in numbers) for numbers in zip(*found, strict=True))
    return {"runs": runs, "scores": scores, "answers": answers}


def delays(size: int, images: int, runs: int) -> dict[str, float | None]:
    """How many runs tell of a change after half of the images, and after how many images (median)."""
    found: dict[str, list[int]] = {"scores": [], "answers": []}
    for seed in range(runs):
        change = images // 2 + int(np.random.default_rng(seed).integers(WINDOW))
        before, after = (made_up(seed, size + images, CLASSES, SHOWN, judge_noise=noise) for noise in (1.0, WORSE))
        calibration = fit_calibration(before.take(np.arange(size)))
        rest = np.arange(size, size + images)
        same, other = (Watched.of(calibration, record.take(rest)) for record in (before, after))
        changed = np.arange(images) >= change
        scores, answers = told(
            calibration,
            Watched(
                best=np.where(changed, flattened(calibration, before.take(rest), 0.1), same.best),
                agreed=np.where(changed, other.agreed, same.agreed),
                likely=same.likely,
            ),
        )
        for name, number in (("scores", scores), ("answers", answers)):
            if number is not None:
                found[name].append(number - change)
    return {f"{name}_told": len(after) for name, after in found.items()} | {
        f"{name}_after": float(np.median(after)) if after else None for name, after in found.items()
    }


def main(runs: Annotated[int, typer.Option(help="Of each kind.")] = 200) -> None:
    """Print the figures as JSON."""
    warnings.simplefilter("ignore", RuntimeWarning)
    for size in (200, 600):
        figures = {"calibrated_on": size, "false_alarms": false_alarms(size, 50_000, runs), "changes": delays(size, 20_000, runs)}
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    typer.run(main)

"""What the decision layer is worth, and what it takes: ``python -m benchmarks.decision [--recorded FOLDER]``.

With ``../shared/recorded/artdl``, for each of the four pairs of `benchmarks.sweep`, on the images that nothing was fitted on,
mean over random draws of the others: the area under accuracy against deferral (0 to 1 in steps of .05) by entropy with the
judge's word final, and by gain with the opinions fused, after calibration on 200 labelled images (fused by one weight, too), on
50, and on 200 without their labels; how often the calibrated scorer is right, and, with everything asked, how often the opinions
together are, and how well they know it. Then, on 800 labelled images, of conformal lists with one threshold and with one for each
class: how often they hold the truth, overall and of the class where that is least often, and how long they are.

Without a folder, images are made up: 200 labelled ones to calibrate on and others to measure, of 1,000 classes of which the judge
is shown five, and of 10 of which it is shown all. Told are accuracies, and seconds for the fit and for the gain of 1,000 images;
then, with everything asked, what a judge's own probabilities add to its answers (mean log-likelihood of the truth in nats,
calibration error, weight), for judges timid, right, overconfident, and with probabilities drawn blindly.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from scipy.special import softmax

from benchmarks.sweep import judged_all, pairs
from cascadevlm import LabelSet, Scores
from cascadevlm.base.arrays import NOBODY
from cascadevlm.cascade.candidates import ConformalSet, TopK
from cascadevlm.decision.calibration import Calibration, FusionRule
from cascadevlm.decision.scorer_calibration import Floats
from cascadevlm.evaluation.calibrating.fitting import fit_calibration
from cascadevlm.evaluation.calibrating.recipe import Recipe
from cascadevlm.evaluation.deciding import answers_of, decided
from cascadevlm.evaluation.metrics import expected_calibration_error
from cascadevlm.evaluation.record import Record
from cascadevlm.evaluation.sweep import sweep

FAMILY = 10
"""Classes that look alike."""

DIMENSIONS = 64

CALIBRATED_ON: list[tuple[str, int, bool, FusionRule]] = [
    ("200 labels", 200, True, "bayes"),
    ("50 labels", 50, True, "bayes"),
    ("200, no labels", 200, False, "bayes"),
]
"""Name, images, whether their labels are looked at, and how opinions are fused."""


def made_up(
    seed: int, images: int, classes: int, shown: int, *, judge_noise: float = 1.0, sharpness: float | None = None
) -> Record:
    """A scorer and a judge who see the same images, each in their own way.

    A class is a point: normal in 64 dimensions, of which the families of ten classes share two thirds of the variance. An image
    is its class's point and normal noise, more of it in hard images than in easy ones (log-normal). The scorer sees it with
    noise of its own; its logits are 0.35 times the scalar products with the classes, which is overconfident, and a normal bias
    of every class. The judge is shown the scorer's best, sees the image with other noise, and says which of them is nearest; in
    one of twenty cases it says the one shown first whatever it sees. With a ``sharpness``, it tells probabilities, too: the
    softmax of so many times its nearness to the candidates, the one it says for no reason being the nearest; 4 is overconfident,
    0.2 timid. The model that is fitted knows nothing of this.
    """
    rng = np.random.default_rng(seed)
    families = np.repeat(rng.normal(size=(-(-classes // FAMILY), DIMENSIONS)), FAMILY, axis=0)[:classes]
    points = np.sqrt(2 / 3) * families + np.sqrt(1 / 3) * rng.normal(size=(classes, DIMENSIONS))
    truths = rng.integers(0, classes, images)
    hard = np.exp(rng.normal(0, 0.5, (images, 1)))
    seen = points[truths] + 0.6 * hard * rng.normal(size=(images, DIMENSIONS))

    def nearness(noise: float) -> Floats:
        noisy = seen + noise * hard * rng.normal(size=seen.shape)
        near: Floats = noisy @ points.T - (points**2).sum(axis=1) / 2
        return near

    logits = 0.35 * nearness(1.3) + rng.normal(0, 1.5, classes)
    scores = Scores.from_logits(
        logits, LabelSet.of(f"class {number}" for number in range(classes)), fingerprint=f"made up {seed}"
    )
    candidates = TopK(k=shown).columns(scores)
    near = np.take_along_axis(nearness(judge_noise), candidates, axis=1)
    careless = rng.random(images) < 0.05
    near[careless, 0] = near[careless].max(axis=1) + 1
    chosen = near.argmax(axis=1)
    record = judged_all(scores, truths, candidates[np.arange(images), chosen], "made up", 0.002)
    probabilities = None if sharpness is None else softmax(sharpness * near, axis=1)
    return replace(record, stages=(replace(record.judged, candidates=candidates, probabilities=probabilities),))


def worth(rest: Record, calibration: Calibration) -> dict[str, float]:
    """Of a calibration, on images that it was not fitted on."""
    fused = decided(rest, calibration)
    assert fused.fused is not None
    right = fused.fused.labels == rest.truths
    areas = {curve.name: curve.area for curve in sweep(fused).curves}
    found = {
        "area": areas["gain"],
        "scorer": float((fused.scored == rest.truths).mean()),
        "fused": float(right.mean()),
        "calibration_error": expected_calibration_error(fused.fused.probabilities, right) or 0.0,
    }
    fitted = calibration.judges[-1].log_likelihood
    return found if fitted is None else found | {"cross_validated_log_likelihood": fitted}


def on_recorded(record: Record, seeds: int) -> dict[str, dict[str, float]]:
    """Mean over random draws of the images to calibrate on."""
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(record))
        for name, size, labelled, fusion in CALIBRATED_ON:
            own, rest = (record.take(np.sort(rows)) for rows in (order[:size], order[size:]))
            found.setdefault(name, []).append(worth(rest, fit_calibration(own, Recipe(labelled=labelled, fusion=fusion))))
            if name == "200 labels":
                entropy = next(curve.area for curve in sweep(rest).curves if curve.name == "entropy")
                judge = float((rest.predicted == rest.truths).mean())
                before = {"area": entropy, "scorer": float((rest.scored == rest.truths).mean()), "judge": judge}
                found.setdefault("entropy, judge's word", []).append(before)
    return {
        name: {key: round(float(np.mean([each[key] for each in measured])), 4) for key in measured[0]}
        for name, measured in found.items()
    }


def of_lists(record: Record, seeds: int, *, coverage: float = 0.9) -> dict[str, dict[str, float]]:
    """Mean over random draws of the 800 images to calibrate on."""
    found = {}
    for name, class_conditional in (("one threshold", False), ("by class", True)):
        inside, lengths = np.full((seeds, len(record)), np.nan), []
        for seed in range(seeds):
            order = np.random.default_rng(seed).permutation(len(record))
            own, rows = np.sort(order[:800]), np.sort(order[800:])
            calibration = fit_calibration(record.take(own), Recipe(coverage=coverage, class_conditional=class_conditional))
            rule, rest = ConformalSet(rule=calibration.conformal_for(coverage)), record.take(rows)
            columns = rule.columns(calibration.calibrated(rest.scores))
            inside[seed, rows] = (columns == rest.truths[:, None]).any(axis=1)
            lengths.append((columns != NOBODY).sum(axis=1).mean())
        classes = [np.nanmean(inside[:, record.truths == column]) for column in range(len(record.labels))]
        means = {"covered": np.nanmean(inside), "worst class": min(classes), "length": np.mean(lengths)}
        found[name] = {key: round(float(value), 4) for key, value in means.items()}
    return found


def on_made_up(classes: int, shown: int, seeds: int) -> dict[str, float]:
    """Mean over images made up anew."""
    measured = []
    for seed in range(seeds):
        record = made_up(seed, 2200, classes, shown)
        own, rest = record.take(np.arange(200)), record.take(np.arange(200, 2200))
        began = time.perf_counter()
        calibration = fit_calibration(own, Recipe())
        fitted = time.perf_counter()
        thousand = rest.take(np.arange(1000))
        log_probs = calibration.calibrated(thousand.scores).log_probs.astype(np.float64)
        model, candidates = calibration.judges[0].model, answers_of(thousand.judged).candidates
        ready = time.perf_counter()
        model.gain(log_probs, candidates)
        done = time.perf_counter()
        scorer, judge = float((rest.scored == rest.truths).mean()), float((rest.predicted == rest.truths).mean())
        after = worth(rest, calibration)
        measured.append(
            {"scorer": scorer, "judge": judge, "fused": after["fused"], "beyond_better": after["fused"] - max(scorer, judge)}
            | {"calibration_error": after["calibration_error"], "fit_seconds": fitted - began, "gain_seconds": done - ready}
        )
    return {key: round(float(np.mean([each[key] for each in measured])), 4) for key in measured[0]}


def on_own_probabilities(sharpness: float | None, seeds: int) -> dict[str, float]:
    """Mean over images made up anew, of 10 classes; with a ``sharpness`` of None, probabilities are drawn blindly."""
    measured = []
    for seed in range(seeds):
        record = made_up(seed, 2200, 10, 10, sharpness=sharpness)
        if sharpness is None:
            blind = np.random.default_rng(seed).dirichlet(np.full(10, 0.5), len(record))
            record = replace(record, stages=(replace(record.judged, probabilities=blind),))
        own, rest = record.take(np.arange(200)), record.take(np.arange(200, 2200))
        calibration = fit_calibration(own, Recipe())
        (judge,) = calibration.judges
        before, answers = calibration.calibrated(rest.scores).log_probs.astype(np.float64), answers_of(rest.judged)
        found = {"weight": judge.model.probability_weight}
        by_answers = replace(judge.model, probability_weight=0.0)
        for name, model in (("answers", by_answers), ("own", judge.model)):
            after = model.posterior(before, answers)
            right = after.argmax(axis=1) == rest.truths
            found[f"{name}_log_likelihood"] = float(after[np.arange(len(rest)), rest.truths].mean())
            found[f"{name}_calibration_error"] = expected_calibration_error(np.exp(after.max(axis=1)), right) or 0.0
            found[f"{name}_right"] = float(right.mean())
        measured.append(found)
    return {key: round(float(np.mean([each[key] for each in measured])), 4) for key in measured[0]}


def main(
    recorded: Annotated[Path | None, typer.Option(help="A folder of recorded predictions, as artdl.")] = None,
    seeds: Annotated[int, typer.Option(help="Random draws, or images made up anew.")] = 20,
) -> None:
    if recorded:
        for name, record in pairs(recorded).items():
            print(json.dumps({"pair": name} | on_recorded(record, seeds), ensure_ascii=False), flush=True)
            print(json.dumps({"pair": name, "lists": of_lists(record, seeds)}, ensure_ascii=False), flush=True)
        return
    for classes, shown in ((1000, 5), (10, 10)):
        print(json.dumps({"classes": classes, "shown": shown} | on_made_up(classes, shown, seeds)), flush=True)
    for sharpness in (0.2, 1.0, 4.0, None):
        print(json.dumps({"sharpness": sharpness} | on_own_probabilities(sharpness, seeds)), flush=True)


if __name__ == "__main__":
    typer.run(main)

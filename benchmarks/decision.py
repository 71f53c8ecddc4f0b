"""Measures the benefit and the time of the decision layer: ``python -m benchmarks.decision [--recorded FOLDER]``.

With the folder ``../shared/recorded/artdl``, each of the four pairs of `benchmarks.sweep` is measured. All figures are means over
random draws of the calibration images, measured on the other images:

- The area under accuracy against the share of escalated images (0 to 1 in steps of .05). It is measured for the entropy with the
  judge's answer as the result, and for the gain with fused opinions. The calibrations use 200 labelled images (also with fusion
  by one weight), 50 labelled images, and 200 images without labels.
- The accuracy of the calibrated scorer and, with all images escalated, the accuracy and the calibration error of the fused
  answers.
- Conformal lists from 800 labelled images, with one threshold and with one threshold per class: their coverage, the coverage of
  the class with the lowest coverage, and their length.

Without a folder, images are simulated: 200 labelled images for calibration and other images for the measurement. With 1,000
classes, the judge sees five candidates; with 10 classes, it sees all. Printed are accuracies, and the seconds for the fit and
for the gain of 1,000 images. Then, with all images escalated, the benefit of the judge's own probabilities is measured: the mean
log-likelihood of the true label in nats, the calibration error, and the weight. The simulated judges are underconfident,
calibrated and overconfident; a last judge gives random probabilities.
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
"""Number of classes per family of look-alikes."""

DIMENSIONS = 64

CALIBRATED_ON: list[tuple[str, int, bool, FusionRule]] = [
    ("200 labels", 200, True, "bayes"),
    ("50 labels", 50, True, "bayes"),
    ("200, no labels", 200, False, "bayes"),
]
"""Per calibration: its name, the number of images, True if their labels are used, and the fusion rule."""


def made_up(
    seed: int, images: int, classes: int, shown: int, *, judge_noise: float = 1.0, sharpness: float | None = None
) -> Record:
    """Simulate a record of a scorer and a judge.

    A class is a normally distributed point in 64 dimensions. The ten classes of a family share two thirds of the variance. An
    image is the point of its class plus normal noise, whose size differs between images (log-normal).

    The scorer sees the image with additional noise. Its logits are 0.35 times the scalar products with the classes, plus a
    normally distributed bias per class. The factor 0.35 makes the scorer overconfident. The judge sees the image with other
    noise, and the scorer's best labels as candidates. It answers the nearest candidate; in 5 % of the cases, it answers the
    first candidate.

    With a ``sharpness``, the judge also gives probabilities: the softmax of the nearness of the candidates, times the sharpness.
    (In the 5 % of the cases above, the first candidate counts as the nearest.) A sharpness of 4 is overconfident, and 0.2 is
    underconfident. The fitted model does not know how the record was simulated.
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
    """The figures of a calibration, measured on images that were not used for its fit."""
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
    """The mean figures of each calibration, over random draws of the calibration images."""
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
    """The mean figures of conformal lists, over random draws of 800 calibration images."""
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
    """The mean figures over several simulations."""
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
    """The mean figures over several simulations with 10 classes. With a ``sharpness`` of None, the probabilities are random."""
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
    recorded: Annotated[Path | None, typer.Option(help="Folder of recorded predictions, in the form of artdl.")] = None,
    seeds: Annotated[int, typer.Option(help="Number of random draws or simulations.")] = 20,
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

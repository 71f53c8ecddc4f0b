"""What a certificate costs: ``python -m benchmarks.agreement --embeddings FOLDER --recorded FOLDER``.

A folder of embeddings is that of `benchmarks.learning`, and a folder of recorded predictions is that of `benchmarks.decision`.
The judge saw all labels at once, so its answer stands whatever it is shown.

One line of JSON per set, number of copies of each image, T and delta, as means over the draws:

- asked: share of the images that the judge is asked about, teaching and testing included, and its standard error;
- planned: the same, as planned before the test; estimated: as estimated from the first 200 answers;
- broken: number of draws with more final answers that are not the judge's than promised;
- right, judge and fused: where the truth is known, share of right final answers, of right answers of the judge to all images,
  and of right answers of both opinions fused for each image that was asked about;
- seconds per draw and peak memory, without scorer and judge: see ``--simulated 200000``;
- BARGAIN: share of the images that its oracle is asked about, on the scorer's own probabilities, and broken promises.

``--law`` adds many draws of the test alone: for the orders that some draws taught, for reversed and random orders, for a judge
that refuses a tenth of the questions or answers at random, and for 50 of the images.
"""

import json
import resource
import subprocess
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from scipy.special import log_softmax
from scipy.stats import binomtest

from benchmarks.learning import Stored
from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.decision.agreement import Promise, driven, longest_prefix
from cascadevlm.decision.certified_accuracy import certified_accuracy
from cascadevlm.decision.certifying import Certificate, certify, first_rows, planned
from cascadevlm.decision.opinions import Images, most_probable

ESTIMATED_FROM = 200
"""Number of answers that the cost is estimated from."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A set of images with the answers of a judge."""

    name: str
    images: Images
    answers: Columns
    truths: Columns

    def copies(self, number: int) -> "Judged":
        """Every image so many times."""
        embeddings = self.images.embeddings
        return Judged(
            name=self.name,
            images=Images(
                log_probs=np.tile(self.images.log_probs, (number, 1)),
                embeddings=None if embeddings is None else np.tile(embeddings, (number, 1)),
            ),
            answers=np.tile(self.answers, number),
            truths=np.tile(self.truths, number),
        )


def of_embeddings(folder: Path) -> Judged:
    stored = Stored.read(folder)
    weak = bool((stored.scored(1).argmax(axis=1) == stored.truths).mean() < 0.2)
    images = Images(log_probs=stored.scored(1 + weak).astype(np.float32), embeddings=stored.embeddings.astype(np.float32))
    return Judged(name=stored.name, images=images, answers=stored.answers, truths=stored.truths)


def of_record(folder: Path) -> Judged:
    """SigLIP-large with descriptions, and gpt-4o."""
    probabilities = np.load(folder / "scores_siglip-large-384_descriptions.npy").astype(np.float64)
    log_probs = log_softmax(np.log(probabilities / (1 - probabilities)), axis=1)
    answers = np.maximum(np.load(folder / "answers_gpt-4o.npy").astype(np.int64), NOBODY)
    return Judged(name=folder.name, images=Images(log_probs=log_probs), answers=answers, truths=np.load(folder / "truth.npy"))


def simulated(images: int, classes: int = 100, dimension: int = 512) -> Judged:
    """Gaussian classes, texts near their centres, and a judge that is right on 90 %. 2,000 truths are known."""
    rng, unit = np.random.default_rng(0), partial(np.linalg.norm, axis=1, keepdims=True)
    centres = rng.normal(size=(classes, dimension)).astype(np.float32)
    texts = centres + 2 * rng.normal(size=centres.shape).astype(np.float32)
    truths = rng.integers(0, classes, images)
    log_probs, embeddings = np.empty((images, classes), np.float32), np.empty((images, dimension), np.float16)
    for some in np.array_split(np.arange(images), images // 10_000 + 1):
        seen = centres[truths[some]] + 4 * rng.normal(size=(len(some), dimension)).astype(np.float32)
        embeddings[some] = seen / unit(seen)
        log_probs[some] = log_softmax(60 * embeddings[some].astype(np.float32) @ (texts / unit(texts)).T, axis=1)
    answers = np.where(rng.random(images) < 0.9, truths, rng.integers(0, classes, images))
    truths[2000:] = NOBODY
    return Judged(name="simulated", images=Images(log_probs=log_probs, embeddings=embeddings), answers=answers, truths=truths)


def certificate(judged: Judged, promise: Promise, seed: int) -> Certificate:
    return driven(certify(judged.images, promise, seed=seed), judged.answers)


def figures(judged: Judged, promise: Promise, draws: int) -> dict[str, object]:
    asked, foretold, estimated, broken, right = [], [], [], 0, []
    began, total, before = time.process_time(), len(judged.images), _most_memory()
    for seed in range(draws):
        found = certificate(judged, promise, seed)
        asked.append(found.questions / total)
        foretold.append(found.planned / total)
        broken += int((found.labels[found.kept] != judged.answers[found.kept]).sum()) > found.allowed
        right.append(certified_accuracy(found, judged.images, judged.answers, judged.truths))
        first = first_rows(judged.images.numbers, ESTIMATED_FROM, seed)
        estimated.append(planned(judged.images, first, judged.answers[first], [promise])[0].questions / total)
    return {
        "asked": round(float(np.mean(asked)), 4),
        "standard error": round(float(np.std(asked) / np.sqrt(draws)), 4),
        "planned": round(float(np.mean(foretold)), 4),
        "estimated": round(float(np.mean(estimated)), 4),
        "broken": broken,
        "draws": draws,
        "right": round(float(np.mean([each.certified for each in right])), 4),
        "judge": round(float((judged.answers == judged.truths)[judged.truths != NOBODY].mean()), 4),
        "fused": round(float(np.mean([each.fused for each in right])), 4),
        "seconds per draw": round((time.process_time() - began) / draws, 2),
        "peak GB above the arrays": round(_most_memory() - before, 2),
    }


def _most_memory() -> float:
    """Most memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def law(judged: Judged, promise: Promise, draws: int, opinions: int = 4) -> dict[str, object]:
    """Draws of the test alone. A quarter of the images is drawn, of all that a few taught opinions say."""
    broken: dict[str, int] = {}
    for seed in range(opinions):
        found, rng = certificate(judged, promise, seed), np.random.default_rng(seed)
        wrong = (found.labels != judged.answers)[np.argsort(-found.log_odds, kind="stable")]
        cases = {
            "taught": wrong,
            "reversed": wrong[::-1],
            "random": rng.permutation(wrong),
            "refuses 10 %": wrong | (rng.random(len(wrong)) < 0.1),
            "answers at random": rng.random(len(wrong)) > 1 / judged.images.classes,
            "50 images": wrong[np.sort(rng.permutation(len(wrong))[:50])],
        }
        for case, values in cases.items():
            images, allowed = len(values), promise.allowed(len(values))
            for _ in range(draws // opinions):
                test = rng.permutation(images) < images // 4
                prefix = longest_prefix(test, test & values, allowed=allowed, level=promise.level)
                broken[case] = broken.get(case, 0) + (int((values & ~test)[:prefix].sum()) > allowed)
    total = draws // opinions * opinions
    values = {case: binomtest(count, total, promise.level, alternative="greater").pvalue for case, count in broken.items()}
    return {"draws": total, "broken": broken, "p": {case: round(value, 3) for case, value in values.items()}}


def bargain(judged: Judged, promise: Promise, draws: int) -> dict[str, object]:
    labels, odds = most_probable(np.asarray(judged.images.log_probs, dtype=np.float64))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scored.npz"
        np.savez(path, labels=labels, confidences=1 / (1 + np.exp(-odds)), answers=judged.answers)
        script = Path(__file__).with_name("bargain_asked.py")
        command = ["uv", "run", "--no-project", "--python", "3.11", "--with", "bargain", "python", str(script), str(path)]
        wanted = json.dumps({"target": promise.agreement, "delta": promise.level, "seeds": list(range(draws))})
        done = subprocess.run(command, input=wanted, capture_output=True, text=True, check=True)
    found = np.array([json.loads(line) for line in done.stdout.splitlines()])
    asked, wrong = found[:, 0], found[:, 1]
    return {"asked": round(float(asked.mean()), 4), "broken": int((wrong > promise.allowed(len(odds))).sum()), "draws": draws}


def main(
    embeddings: Annotated[Path | None, typer.Option(help="Folder with one folder per set.")] = None,
    recorded: Annotated[Path | None, typer.Option(help="Folder of one record.")] = None,
    draws: Annotated[int, typer.Option(help="Draws with full teaching per line.")] = 20,
    copies: Annotated[str, typer.Option(help="How many times every image is there; separated by commas.")] = "1,20",
    agreements: Annotated[str, typer.Option(help="Values of T, separated by commas.")] = "0.9,0.95,0.8",
    deltas: Annotated[str, typer.Option(help="Values of delta, separated by commas.")] = "0.05,0.1",
    images: Annotated[int, typer.Option("--simulated", help="Number of simulated images. Default: none.")] = 0,
    only: Annotated[str, typer.Option(help="Name of one set. Default: all sets.")] = "",
    law_draws: Annotated[int, typer.Option("--law", help="Draws of the test alone per line. Default: none.")] = 0,
    bargain_draws: Annotated[int, typer.Option("--bargain", help="Draws of BARGAIN per line. Default: none.")] = 0,
) -> None:
    sets = [of_embeddings(folder) for folder in sorted(embeddings.iterdir()) if folder.is_dir()] if embeddings else []
    sets += [of_record(recorded)] if recorded else []
    sets += [simulated(images)] if images else []
    for delta in map(float, deltas.split(",")):
        for number in map(int, copies.split(",")):
            for agreement in map(float, agreements.split(",")):
                for judged in sets:
                    if not only or judged.name in only.split(","):
                        promise = Promise(agreement=agreement, confidence=round(1 - delta, 6))
                        _tell(judged.copies(number), promise, draws, law_draws, bargain_draws, number)


def _tell(judged: Judged, promise: Promise, draws: int, law_draws: int, bargain_draws: int, copies: int) -> None:
    found: dict[str, object] = {"set": judged.name, "copies": copies, "T": promise.agreement, "delta": promise.level}
    if draws:
        found |= figures(judged, promise, draws)
    if law_draws:
        found["law"] = law(judged, promise, law_draws)
    if bargain_draws:
        found["BARGAIN"] = bargain(judged, promise, bargain_draws)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    typer.run(main)

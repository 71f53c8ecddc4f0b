"""Images of classes that lie apart in the embeddings of a scorer, a judge that sees the truth, and a calibration with support."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cascadevlm import Cascade, LabelSet, Stage, load_prompt, parse_policy
from cascadevlm.base.types import Question, Verdict
from cascadevlm.decision.calibration import Calibration
from cascadevlm.decision.judge_fit import fit_judge
from cascadevlm.decision.judge_model import Answers
from cascadevlm.decision.shares import Shares
from cascadevlm.decision.teaching import Labelled
from cascadevlm.scorers.base import EmbeddingScorer
from cascadevlm.testing import FakeJudge
from tests.calibrations import some_calibration

NAMES = ["ant", "bee", "cicada", "dragonfly", "earwig", "firefly"]
LABELS = LabelSet.of(NAMES)
WIDTH = 16
"""Number of values per embedding."""

OWN = 25
"""Images of the calibration."""

CENTRES = np.random.default_rng(7).normal(0, 30, (len(NAMES), WIDTH))


class Pixels(EmbeddingScorer):
    """Embeds an image as its pixels but the last, and a label as the centre of its class with noise."""

    def embed_images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        return unit(np.stack([np.asarray(image, dtype=np.float32)[0, :WIDTH, 0] for image in images]) - 127.5)

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        columns = [next(column for column, name in enumerate(NAMES) if name in text) for text in texts]
        return unit(CENTRES[columns] + np.stack([np.random.default_rng(column).normal(0, 45, WIDTH) for column in columns]))

    def logits(self, similarities: NDArray[np.float32]) -> NDArray[np.float32]:
        return 4 * similarities

    def model_fingerprint(self) -> str:
        return "pixels"


def unit(rows: NDArray[np.floating]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return found


def insects(count: int, seed: int = 0, *, noise: float = 25.0) -> list[Image.Image]:
    """Images of random classes. The last pixel of an image is its truth."""
    rng = np.random.default_rng(seed)
    truths = rng.integers(0, len(NAMES), count)
    pixels = np.clip(np.round(127.5 + CENTRES[truths] + rng.normal(0, noise, (count, WIDTH))), 0, 255)
    rows = np.concatenate([pixels, truths[:, None]], axis=1).astype(np.uint8)
    return [Image.fromarray(np.repeat(row[None, :, None], 3, axis=2)) for row in rows]


def truth_of(image: Image.Image) -> int:
    return int(np.asarray(image)[0, WIDTH, 0])


class Naturalist(FakeJudge):
    """Names the truth if it is shown, sooner or later; else, and at random, another candidate."""

    def __init__(self, seed: int = 0, *, right: float = 1.0, jitter: float = 0.0) -> None:
        super().__init__(reply=self._said)
        self.random, self.right, self.jitter = random.Random(seed), right, jitter

    async def judge(self, question: Question) -> Verdict:
        await asyncio.sleep(self.random.random() * self.jitter)
        return await super().judge(question)

    def _said(self, question: Question) -> str:
        names, truth = [label.name for label in question.labels], NAMES[truth_of(question.image)]
        draw = random.Random(question.image_digest)  # an image gets the same answer however often it is asked about
        if truth in names and draw.random() < self.right:
            return f"ANSWER: {truth}"
        return f"ANSWER: {draw.choice(names)}"


@cache
def made_calibration(right: float = 1.0) -> Calibration:
    """Of the scorer, and of a judge that is right so often among all labels."""
    images, scorer = insects(OWN, seed=99), Pixels()
    scores = scorer.score(images, LABELS)
    truths = np.array([truth_of(image) for image in images])
    assert scores.embeddings is not None
    labelled = Labelled.of(scores.log_probs, scores.embeddings, truths)
    rng = np.random.default_rng(1)
    said = np.where(rng.random(OWN) < right, truths, rng.integers(0, len(NAMES), OWN))
    answers = Answers(candidates=np.tile(np.arange(len(NAMES)), (OWN, 1)), answers=said, none_offered=False)
    model, _ = fit_judge(labelled.fit.held_out, labelled.responsibilities, answers)
    return replace(
        some_calibration(NAMES, model),
        fingerprint=scores.fingerprint,
        scorer=labelled.fit.calibration,
        support=labelled,
        images=OWN,
        shares=Shares.of(np.exp(labelled.fit.held_out)),
    )


def cascade(
    judge: FakeJudge | None = None,
    *,
    policy: str = "gain > 0.1",
    learn: bool = True,
    calibration: Calibration | None = None,
    **options: object,
) -> Cascade:
    known = calibration or made_calibration()
    stage = Stage(
        judge=judge or Naturalist(),
        prompt=load_prompt("select"),
        policy=parse_policy(policy),
        fusion="bayes",
        model=known.judges[0].model,
    )
    given = {"batch_size": 16, "calibration": known, "learn": learn} | options
    return Cascade(Pixels(), [stage], labels=LABELS, **given)  # type: ignore[arg-type]

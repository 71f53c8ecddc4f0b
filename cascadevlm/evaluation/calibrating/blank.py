"""What a judge prefers where there is nothing to see: its answers about a grey image, as a prior of its biases.

Contextual calibration (Zhao et al., "Calibrate before use: improving few-shot performance of language models", ICML 2021, arXiv
2102.09690) divides out what a model says of an input without content. Here it only is where the fit of biases begins, if that is
better on held-out images.
"""

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from cascadevlm.base.arrays import NOBODY
from cascadevlm.base.errors import DataError
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.secrets import HIDDEN
from cascadevlm.base.types import Scores
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.config.config import Config
from cascadevlm.decision.judge_model import NONE_CHOSEN, Answers
from cascadevlm.evaluation.record import Record
from cascadevlm.policies.rules import Always
from cascadevlm.scorers.base import Scorer

QUESTIONS = 32
"""The most that are asked about the blank image."""

BLANK = Image.new("RGB", (512, 512), (128, 128, 128))


class _Recorded(Scorer):
    """Scores the first, second, … image of a batch as that of a record, whatever it shows."""

    def __init__(self, scores: Scores) -> None:
        self.scores = scores

    def score(self, images: Sequence[Image.Image], labels: LabelSet) -> Scores:
        return self.scores.rows(slice(len(images)))


def blank_cascade(record: Record, *, seed: int = 0) -> tuple[Config, Cascade]:
    """The cascade of a record, with the budget and the cache of its configuration, that asks about the blank image with the
    candidates of some of the record's images, drawn at random; and its configuration.

    Raises:
        DataError: if the record has no configuration, or not one stage.
        InputError: if the configuration does not hold here.
    """
    if record.info is None or len(record.stages) != 1:
        raise DataError("A blank image is for the record of a run with one judge.", hint="Leave --blank out.")
    if HIDDEN in json.dumps(record.info.config):
        raise DataError("The judge of the record wants headers or credentials, which no record keeps.", hint="Leave --blank out.")
    config = Config.parse(record.info.config, name="run.json")
    built = config.build(record.labels)
    rows = np.flatnonzero(record.readable)
    drawn = np.random.default_rng(seed).permutation(rows)[:QUESTIONS]
    (stage,) = built.stages
    return config, Cascade(
        _Recorded(record.scores.rows(drawn)),
        [replace(stage, policy=Always(), widen=0)],
        labels=record.labels,
        store=built.store,
        ledger=built.ledger,
        batch_size=len(drawn),
    )


def blank_images(cascade: Cascade) -> list[Image.Image]:
    """One for every question."""
    return [BLANK] * cascade.batch_size


def ask_blank(cascade: Cascade) -> Answers:
    """What the judge says.

    Raises:
        DataError: if it never answers.
        JudgeError: if it cannot work at all.
    """
    column = cascade.labels.columns
    predictions = [
        (prediction.candidates, verdict)
        for prediction in cascade.classify(blank_images(cascade))
        if (verdict := prediction.verdict) is not None and verdict.valid
    ]
    if not predictions:
        raise DataError("The judge gave no answer about a blank image.", hint="Leave --blank out.")
    candidates = np.full((len(predictions), max(len(shown) for shown, _ in predictions)), NOBODY)
    for row, (shown, _) in enumerate(predictions):
        candidates[row, : len(shown)] = [column[candidate.label.name] for candidate in shown]
    return Answers(
        candidates=candidates,
        answers=np.array([NONE_CHOSEN if verdict.label is None else column[verdict.label] for _, verdict in predictions]),
        none_offered=cascade.stages[0].offer_none,
    )

"""A fake scorer and a fake judge, and functions that make images and a question for tests."""

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache

import numpy as np
from PIL import Image
from pydantic import JsonValue

from cascadevlm.base.images import pixel_digest
from cascadevlm.base.labels import Label, LabelSet
from cascadevlm.base.types import Candidate, Prompt, Question, Scores, Usage, Verdict
from cascadevlm.config.loading import load_prompt
from cascadevlm.judges.base import Judge, verdict_from_text
from cascadevlm.scorers.base import Scorer


class FakeScorer(Scorer):
    """Takes scores from a table, by the colour of an image's first pixel. Without a table, the scores are random numbers that
    depend only on the image and the labels.

    Args:
        model: any text; it is part of the fingerprint.
        table: logits of the C labels, by RGB colour. Default: no table.
    """

    def __init__(self, model: str = "fake", *, table: Mapping[tuple[int, int, int], Sequence[float]] | None = None) -> None:
        self.model = model
        self.table = table

    def score(self, images: Sequence[Image.Image], labels: LabelSet) -> Scores:
        logits = np.array([self._logits(image, labels) for image in images])
        return Scores.from_logits(logits, labels, fingerprint=f"fake:{self.model}")

    def _logits(self, image: Image.Image, labels: LabelSet) -> Sequence[float]:
        if self.table is not None:
            colour = image.getpixel((0, 0))
            assert isinstance(colour, tuple)
            return self.table[colour[0], colour[1], colour[2]]
        seeds = (hashlib.sha256(f"{pixel_digest(image)}:{label.name}".encode()).digest() for label in labels)
        return [float(np.random.default_rng(int.from_bytes(seed)).normal(0, 2)) for seed in seeds]


Reply = str | Exception
"""The text that a fake judge answers, or the error that it raises."""


class FakeJudge(Judge):
    """Gives the answers that a test sets, and remembers every question in ``questions``.

    Args:
        model: any text; it is part of the spec.
        reply: the text of the answer, an error to raise, a list of texts and errors to use in order, or a function that makes a
            text or an error from the question.
        dollars: cost of each answer, in US dollars.
        seconds: time for each answer, in seconds.
    """

    def __init__(
        self,
        model: str = "fake",
        *,
        reply: Reply | Iterable[Reply] | Callable[[Question], Reply] = "ANSWER: A",
        dollars: float = 0.0,
        seconds: float = 0.0,
    ) -> None:
        self.spec = f"fake:{model}"
        self.reply = iter(reply) if not isinstance(reply, Exception | str) and not callable(reply) else reply
        self.dollars = dollars
        self.seconds = seconds
        self.questions: list[Question] = []
        self.most_at_once = 0
        self._at_once = 0

    async def judge(self, question: Question) -> Verdict:
        self.questions.append(question)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            await asyncio.sleep(self.seconds)
            reply = self._next(question)
        finally:
            self._at_once -= 1
        if isinstance(reply, Exception):
            raise reply
        usage = Usage(input_tokens=100, output_tokens=10, dollars=self.dollars, seconds=self.seconds, requests=1)
        return verdict_from_text(reply, question, judge=self.spec, usage=usage)

    def _next(self, question: Question) -> Reply:
        if isinstance(self.reply, str | Exception):
            return self.reply
        return self.reply(question) if callable(self.reply) else next(self.reply)

    def identity(self) -> Mapping[str, JsonValue]:
        return {"judge": self.spec}


def picture(colour: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (48, 32)) -> Image.Image:
    """An RGB image of one colour. The size is width and height, in pixels."""
    return Image.new("RGB", size, colour)


def noise(seed: int, size: tuple[int, int] = (48, 32)) -> Image.Image:
    """An RGB image of random pixels. Different seeds give different images. The size is width and height, in pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@cache
def _select() -> Prompt:
    return load_prompt("select")


def question(names: Sequence[str] = ("red finch", "blue finch", "grey owl"), *, image: Image.Image | None = None) -> Question:
    """A question with these candidates and the ``select`` prompt. Default image: `picture`."""
    candidates = [
        Candidate(label=Label(name=name), probability=1 / len(names), rank=rank) for rank, name in enumerate(names, start=1)
    ]
    return Question(image=image or picture(), candidates=tuple(candidates), prompt=_select())

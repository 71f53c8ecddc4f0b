"""An example plug-in: a scorer, a judge and a policy that know only colours."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cascadevlm import EmbeddingScorer, LocalJudge, Policy, PolicyError, Question, Scores, Spending, Usage, Verdict

COLOURS = {"red": (200, 30, 30), "green": (40, 150, 60), "blue": (40, 70, 200), "white": (235, 235, 235), "black": (20, 20, 20)}


def colour_in(text: str) -> NDArray[np.float32]:
    """``(3,) float32``: the unit vector of the first colour in a text. Without a colour, it is the unit vector of grey."""
    found = next((COLOURS[word] for word in text.lower().split() if word in COLOURS), (128, 128, 128))
    return unit(np.array([found], dtype=np.float32))[0]


def colour_of(image: Image.Image) -> NDArray[np.float32]:
    """``(3,) float32``: the unit vector of the mean colour of an image."""
    return unit(np.asarray(image, dtype=np.float32).reshape(-1, 3).mean(axis=0, keepdims=True))[0]


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """``(N, 3) float32``: the rows, centred at grey and scaled to length 1."""
    centred = rows - 127.5
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.where(length > 0, centred / np.maximum(length, 1e-6), 1 / np.sqrt(3)).astype(np.float32)


class ColourScorer(EmbeddingScorer):
    """``colours:NAME``: compares the mean colour of an image with the colour in the name of a label.

    Args:
        model: any name; it becomes part of the fingerprint.
        scale: factor for the cosine. With a higher factor, the scorer is more certain.
    """

    def __init__(self, model: str, *, scale: float = 10.0) -> None:
        super().__init__(templates=("{label}",))
        self.model = model
        self.scale = scale

    def embed_images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        return np.stack([colour_of(image) for image in images])

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.stack([colour_in(text) for text in texts])

    def logits(self, similarities: NDArray[np.float32]) -> NDArray[np.float32]:
        return self.scale * similarities

    def model_fingerprint(self) -> str:
        return f"colours:{self.model}|scale={self.scale}"


class ColourJudge(LocalJudge):
    """``colours:NAME``: chooses the candidate whose colour is most similar to the middle of the image.

    Args:
        model: any name.
        batch_size: maximum number of questions that are answered together.
    """

    def __init__(self, model: str, *, batch_size: int = 8) -> None:
        super().__init__(batch_size=batch_size)
        self.model = model

    def judge_batch(self, questions: Sequence[Question]) -> list[Verdict]:
        return [self.choose(question) for question in questions]

    def choose(self, question: Question) -> Verdict:
        """Answer one question."""
        width, height = question.image.size
        middle = question.image.crop((width // 4, height // 4, max(width * 3 // 4, 1), max(height * 3 // 4, 1)))
        seen = colour_of(middle)
        best = max(question.labels, key=lambda label: float(colour_in(label.name) @ seen))
        return Verdict(outcome="answered", label=best.name, judge=self.spec, usage=Usage(requests=1))


@dataclass(frozen=True)
class TiesAbove(Policy):
    """``ties > N``: escalates an image if more than N other labels have over half of the best label's probability."""

    comparison = ">"
    labels: int

    def __post_init__(self) -> None:
        if self.labels < 0:
            raise PolicyError(f"ties must be a number of at least 0, not {self.labels!r}.")

    def select(self, scores: Scores, spending: Spending | None = None) -> NDArray[np.bool_]:
        best = scores.probabilities.max(axis=1, keepdims=True)
        selected: NDArray[np.bool_] = (scores.probabilities > best / 2).sum(axis=1) - 1 > self.labels
        return selected

    def __str__(self) -> str:
        return f"ties > {self.labels}"

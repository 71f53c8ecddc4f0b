"""Scorers rank every label for every image. Write one by subclassing `Scorer` or, for two-tower models, `EmbeddingScorer`."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cascadevlm.errors import InputError
from cascadevlm.labels import LabelSet, one_line
from cascadevlm.types import Scores

DEFAULT_TEMPLATES = ("a photo of a {label}.",)


class Scorer(ABC):
    """Gives log-probabilities over a label set. Constructors store parameters; models load at first use.

    Attributes:
        requires: distributions a backend needs beyond cascadevlm itself, as pip names them.
    """

    requires: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def score(self, images: Sequence[Image.Image], labels: LabelSet) -> Scores:
        """Score N upright RGB images against C labels. May be called from any thread, one call at a time."""


class EmbeddingScorer(Scorer):
    """A model that embeds images and texts apart and compares them by cosine.

    A label's embedding is the mean of its normalised embeddings under every template, normalised again: the ensembling of
    CLIP (Radford et al. 2021, section 3.1.4). The embeddings of a label set are computed once.

    Attributes:
        templates: texts in which ``{label}`` stands for a label's prompt text.

    Raises:
        InputError: if a template lacks ``{label}``.
    """

    def __init__(self, *, templates: Sequence[str] = DEFAULT_TEMPLATES) -> None:
        if isinstance(templates, str) or not templates:
            raise InputError(f"templates must be a list of texts, not {templates!r}.")
        for template in templates:
            if "{label}" not in template:
                raise InputError(f"Template {template!r} lacks '{{label}}'.", hint="It stands for the class name.")
        self.templates = tuple(templates)
        self._embedded: tuple[LabelSet, NDArray[np.float32]] | None = None

    @abstractmethod
    def embed_images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """N x D, rows of length 1."""

    @abstractmethod
    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """T x D, rows of length 1."""

    @abstractmethod
    def logits(self, similarities: NDArray[np.float32]) -> NDArray[np.float32]:
        """The model's own scale, and bias where it has one, applied to N x C cosines."""

    @abstractmethod
    def model_fingerprint(self) -> str:
        """Names the weights, revision, precision and preprocessing."""

    @property
    def fingerprint(self) -> str:
        """The model's fingerprint and a digest of the templates."""
        digest = hashlib.sha256("\0".join(self.templates).encode()).hexdigest()[:12]
        return f"{self.model_fingerprint()}|templates={digest}"

    def label_embeddings(self, labels: LabelSet) -> NDArray[np.float32]:
        """C x D, rows of length 1; computed at the first call with this label set."""
        if self._embedded is None or self._embedded[0] != labels:
            texts = [template.replace("{label}", one_line(label.prompt_text)) for template in self.templates for label in labels]
            embedded = self.embed_texts(texts).reshape(len(self.templates), len(labels), -1).mean(axis=0)
            self._embedded = labels, embedded / np.linalg.norm(embedded, axis=1, keepdims=True)
        return self._embedded[1]

    def score(self, images: Sequence[Image.Image], labels: LabelSet) -> Scores:
        """Softmax over the model's logits; for a sigmoid model too, whose per-class logits it makes one distribution of."""
        similarities = self.embed_images(images) @ self.label_embeddings(labels).T
        return Scores.from_logits(self.logits(similarities), labels, self.fingerprint)

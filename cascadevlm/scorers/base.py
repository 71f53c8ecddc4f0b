"""Scorers rank every label for every image. Write one by subclassing `Scorer` or, for two-tower models, `EmbeddingScorer`."""

import hashlib
import os
import sys
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cascadevlm.base.arrays import Columns
from cascadevlm.base.errors import BackendError, ImageError, InputError
from cascadevlm.base.images import ImageSource, WithoutPixels, decoded, is_large, load_image, pixel_digest, size_of
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.portable import Portable
from cascadevlm.base.types import Scores
from cascadevlm.scorers.adapters import Adapter

DEFAULT_TEMPLATES = ("a photo of a {label}.",)

LABELS_AT_ONCE = 256
"""How many labels are embedded at once, under every template: of 20,000 under 80, no array of all texts is made."""

SECONDS_UNTOLD = 5.0
"""How long labels are embedded before stderr is told how many are done."""

OTHER_PRECISION = "Another precision may help, such as dtype = 'float32'."


@dataclass(kw_only=True, eq=False)
class Prepared:
    """An image on its way through a scorer.

    Attributes:
        source: what it is read from.
        features: what the scorer made of it beside the model; None where it makes nothing.
        pixels: the image, upright RGB; None where it is not in memory.
        file_digest: the sha256 of the file that it was read from; "" where it is not known.
        size: width and height in pixels, found when the image was first read; None before. It is kept when the pixels are let go.
    """

    source: ImageSource
    features: NDArray[np.uint8 | np.float32] | None = None
    pixels: Image.Image | None = None
    file_digest: str = ""
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.pixels is not None:
            self.size = self.pixels.size

    @property
    def image(self) -> Image.Image:
        """Upright RGB, read at first use.

        Raises:
            ImageError: if it cannot be read.
        """
        if self.pixels is None:
            self.pixels = load_image(self.source)
            self.size = self.pixels.size
        return self.pixels

    @cached_property
    def image_digest(self) -> str:
        """Of the pixels; kept when they are let go.

        Raises:
            ImageError: if it cannot be read.
        """
        return pixel_digest(self.image)

    @property
    def unread(self) -> Image.Image:
        """The image or, where it is not in memory, an image without pixels that has its size. A file is opened for that only if
        its size is not known.

        Raises:
            ImageError: if it cannot be read.
        """
        if self.decoded or not isinstance(self.source, str | Path | bytes):
            return self.image
        if self.size is None:
            self.size = size_of(self.source)
        return WithoutPixels(self.size)

    @property
    def decoded(self) -> bool:
        """Whether the pixels are in memory."""
        return self.pixels is not None

    def forget_large(self) -> None:
        """Let the pixels of a large file go: they are read again should a judge be asked, which few images need."""
        if isinstance(self.source, str | Path | bytes) and is_large(self.image):
            self.pixels = None


class Scorer(Portable, ABC):
    """Gives log-probabilities over a label set. Constructors store parameters; models load at first use.

    Attributes:
        requires: distributions a backend needs beyond cascadevlm itself, as pip names them.
    """

    requires: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def score(self, images: Sequence[Image.Image], labels: LabelSet) -> Scores:
        """Score N upright RGB images against C labels. May be called from any thread, one call at a time."""

    def load(self) -> None:
        """Load the model, where there is one to load; called once before `prepare`."""

    def prepare(self, source: ImageSource) -> Prepared:
        """Read an image and do beside the model what can be done there. Called from many threads at once.

        Raises:
            ImageError: if it cannot be read.
        """
        return Prepared(source=source, pixels=load_image(source))

    def score_prepared(self, prepared: Sequence[Prepared], labels: LabelSet) -> Scores:
        """`score`, of images that this scorer prepared."""
        return self.score([each.image for each in prepared], labels)


@dataclass(kw_only=True)
class _Use:
    """How a scorer is used by all runs: by turns, and loaded once."""

    turn: threading.RLock = field(default_factory=threading.RLock)
    loaded: bool = False


_uses: dict[int, _Use] = {}
_using = threading.Lock()


def _use(scorer: Scorer) -> _Use:
    with _using:
        if id(scorer) not in _uses:
            _uses[id(scorer)] = _Use()
            weakref.finalize(scorer, _uses.pop, id(scorer), None)
        return _uses[id(scorer)]


def _turn(scorer: Scorer) -> threading.RLock:
    """The lock of the model that a scorer goes by; wrappers of one model share it."""
    while isinstance(wrapped := getattr(scorer, "wrapped", None), Scorer):
        scorer = wrapped
    return _use(scorer).turn


def load_once(scorer: Scorer) -> None:
    """`Scorer.load`, unless it was loaded before; from any thread."""
    with _turn(scorer):
        use = _use(scorer)
        if not use.loaded:
            scorer.load()
            use.loaded = True


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What scoring N images gave.

    Attributes:
        errors: for each of the N images, why it has no scores; None for the n images that have scores.
        images: the n images.
        scores: `(n, C)` their scores; None if n is 0.
    """

    errors: Sequence[ImageError | None]
    images: Sequence[Prepared]
    scores: Scores | None


def prepare_in(
    readers: Executor, scorer: Scorer, sources: Sequence[ImageSource], *seen: Callable[[Prepared], None]
) -> list[Future[list[Prepared | ImageError]]]:
    """Begin to prepare N images in threads. The results in order, one after another, are what the scorer prepared of each image,
    or why the image cannot be read.

    Args:
        readers: the threads.
        scorer: prepares the images; loaded before.
        sources: the images.
        seen: called in the threads with each image that was prepared. An `ImageError` that it raises is the image's error.
    """
    size = -(-len(sources) // (os.cpu_count() or 1))
    shares = [sources[start : start + size] for start in range(0, len(sources), size)] if size else []
    return [readers.submit(_prepare, scorer, share, seen) for share in shares]


def _prepare(
    scorer: Scorer, sources: Sequence[ImageSource], seen: Sequence[Callable[[Prepared], None]]
) -> list[Prepared | ImageError]:
    results: list[Prepared | ImageError] = []
    for source in sources:
        try:
            prepared = scorer.prepare(source)
            for see in seen:
                see(prepared)
            results.append(prepared)
        except ImageError as exc:
            results.append(exc)
    return results


def score_together(scorer: Scorer, read: Sequence[Prepared | ImageError], labels: LabelSet) -> Scored:
    """Score the images of a chunk that can be read. May be called from any thread: the model gets one call at a time.

    An image that the scorer cannot embed does not fail its neighbours: they are scored again in halves.

    Args:
        scorer: the scorer that prepared the images; loaded before.
        read: N images, or why they cannot be read.
        labels: the C labels.
    """
    images = [each for each in read if isinstance(each, Prepared)]
    scores, errors = _scored_or_errors(scorer, images, labels) if images else (None, [])
    left = iter(errors)
    return Scored(
        errors=[each if isinstance(each, ImageError) else next(left) for each in read],
        images=[image for image, error in zip(images, errors, strict=True) if error is None],
        scores=scores,
    )


def _scored_or_errors(
    scorer: Scorer, prepared: Sequence[Prepared], labels: LabelSet
) -> tuple[Scores | None, list[ImageError | None]]:
    """`(n, C)` scores of the n images that have scores, None if n is 0; and for each of N images why it has no scores."""
    try:
        return score_in_turn(scorer, prepared, labels), [None] * len(prepared)
    except ImageError as exc:
        if len(prepared) == 1:
            return None, [exc]
    half = len(prepared) // 2
    parts = [_scored_or_errors(scorer, some, labels) for some in (prepared[:half], prepared[half:])]
    return joined([scores for scores, _ in parts if scores is not None]), [error for _, errors in parts for error in errors]


def score_in_turn(scorer: Scorer, prepared: Sequence[Prepared], labels: LabelSet) -> Scores:
    """`Scorer.score_prepared`, from any thread: the model gets one call at a time."""
    with _turn(scorer):
        return scorer.score_prepared(prepared, labels)


def joined(chunks: Sequence[Scores]) -> Scores | None:
    """`(N, C)` the scores of several chunks; None if there are no chunks."""
    return Scores.joined(chunks) if chunks else None


class WrapperScorer(Scorer):
    """Does as another scorer does; subclass it and override what shall be different."""

    def __init__(self, wrapped: Scorer) -> None:
        self.wrapped = wrapped

    def score(self, images: Sequence[Image.Image], labels: LabelSet) -> Scores:
        return self.altered(self.wrapped.score(images, labels))

    def load(self) -> None:
        load_once(self.wrapped)

    def prepare(self, source: ImageSource) -> Prepared:
        return self.wrapped.prepare(source)

    def score_prepared(self, prepared: Sequence[Prepared], labels: LabelSet) -> Scores:
        return self.altered(self.wrapped.score_prepared(prepared, labels))

    def altered(self, scores: Scores) -> Scores:
        """What becomes of the wrapped scorer's scores."""
        return scores


LabelReader: TypeAlias = Callable[["EmbeddingScorer", Sequence[str]], NDArray[np.float32]]
"""Gives the embeddings, C x D, of the prompt texts of C labels."""


def _embed_labels(scorer: "EmbeddingScorer", names: Sequence[str]) -> NDArray[np.float32]:
    return np.concatenate([embeddings for _, embeddings in scorer.embed_in_blocks(names)])


class EmbeddingScorer(Scorer):
    """A model that embeds images and texts apart and compares them by cosine.

    A label's embedding is the mean of its normalised embeddings under every template, normalised again: the ensembling of
    CLIP (Radford et al. 2021, section 3.1.4). The embeddings of a label set are computed once.

    Attributes:
        templates: texts in which ``{label}`` stands for a label's prompt text.
        keep_labels: reads the embeddings of labels where they are kept; None where they are not.
        adapter: what was learned about the embeddings of this scorer, as ``read_adapter("birds.adapter")`` reads it. It changes
            all scores and the fingerprint. Set it before the scorer is used. Default: None.

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
        self.keep_labels: LabelReader | None = None
        self.adapter: Adapter | None = None
        self._embedded: tuple[LabelSet, NDArray[np.float32]] | None = None
        self._adapted: tuple[Adapter, LabelSet, Columns | None] | None = None

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

    def fingerprint(self, labels: LabelSet) -> str:
        """Names the model, the templates, the texts that stand for the labels in the templates, and the adapter."""
        bare = self.bare_fingerprint(labels)
        return bare if self.adapter is None else f"{bare}|adapter={self.adapter.digest[:12]}"

    def bare_fingerprint(self, labels: LabelSet) -> str:
        """The fingerprint without an adapter."""
        digest = hashlib.sha256("\0".join(self.templates).encode()).hexdigest()[:12]
        return f"{self.model_fingerprint()}|templates={digest}|{labels.texts_part}"

    def label_embeddings(self, labels: LabelSet) -> NDArray[np.float32]:
        """C x D, rows of length 1; computed at the first call with this label set, or read where they are kept.

        Raises:
            BackendError: if an embedding is not finite.
        """
        if self._embedded is None or self._embedded[0] != labels:
            read = self.keep_labels or _embed_labels
            embeddings = read(self, labels.texts)
            if not np.isfinite(embeddings).all():
                raise BackendError("The scorer's embeddings of the labels are not finite.", hint=OTHER_PRECISION)
            self._embedded = labels, embeddings
        return self._embedded[1]

    def embed_in_blocks(self, names: Sequence[str]) -> Iterator[tuple[Sequence[str], NDArray[np.float32]]]:
        """Prompt texts of labels and their embeddings, n x D, a block at a time; where it takes long, stderr is told."""
        told_at = time.monotonic()
        for start in range(0, len(names), LABELS_AT_ONCE):
            block = names[start : start + LABELS_AT_ONCE]
            yield block, self._embed_names(block)
            if time.monotonic() - told_at > SECONDS_UNTOLD:
                told_at = time.monotonic()
                print(f"Embedded {start + len(block):,} of {len(names):,} labels.", file=sys.stderr)

    def _embed_names(self, names: Sequence[str]) -> NDArray[np.float32]:
        texts = [template.replace("{label}", name) for template in self.templates for name in names]
        mean = self.embed_texts(texts).reshape(len(self.templates), len(names), -1).mean(axis=0)
        unit: NDArray[np.float32] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        return unit

    def score(self, images: Sequence[Image.Image], labels: LabelSet) -> Scores:
        return self.score_embeddings(self.embed_images(images), labels)

    def preprocess(self, image: Image.Image) -> NDArray[np.uint8 | np.float32] | None:
        """What `embed_prepared` wants of an image; None where `embed_images` sees to it. Called from many threads."""
        return None

    def embed_prepared(self, prepared: Sequence[Prepared]) -> NDArray[np.float32]:
        """`embed_images`, of images that this scorer prepared."""
        return self.embed_images([each.image for each in prepared])

    def prepare(self, source: ImageSource) -> Prepared:
        with decoded(source) as image:
            prepared = Prepared(source=source, features=self.preprocess(image), pixels=image)
            if prepared.features is not None:
                prepared.forget_large()
        return prepared

    def score_prepared(self, prepared: Sequence[Prepared], labels: LabelSet) -> Scores:
        return self.score_embeddings(self.embed_prepared(prepared), labels)

    def score_embeddings(self, embeddings: NDArray[np.float32], labels: LabelSet) -> Scores:
        """Softmax over the model's logits; for a sigmoid model too, whose per-class logits it makes one distribution of.

        Args:
            embeddings: N x D, of images.
            labels: the C labels.

        Raises:
            ImageError: if an embedding is not finite.
            ConfigError: if the adapter does not fit the scorer or the labels.
        """
        if not np.isfinite(embeddings).all():
            raise ImageError("The scorer's embedding of the image is not finite.", hint=OTHER_PRECISION)
        logits = self.logits(embeddings @ self.label_embeddings(labels).T)
        if self.adapter is not None:
            logits = self.adapter.logits(embeddings, logits, self._columns(self.adapter, labels))
        return Scores.from_logits(logits, labels, self.fingerprint(labels), embeddings=embeddings.astype(np.float16))

    def _columns(self, adapter: Adapter, labels: LabelSet) -> Columns | None:
        """`Adapter.columns_in`, checked once per adapter and label set."""
        if self._adapted is None or self._adapted[0] is not adapter or self._adapted[1] != labels:
            self._adapted = adapter, labels, adapter.columns_in(labels, self.bare_fingerprint)
        return self._adapted[2]

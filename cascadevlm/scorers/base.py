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
from cascadevlm.base.remote import fetching
from cascadevlm.base.types import Scores
from cascadevlm.scorers.adapters import Adapter

DEFAULT_TEMPLATES = ("a photo of a {label}.",)

LABELS_AT_ONCE = 256
"""Number of labels whose texts are embedded together. So 20,000 labels with 80 templates need no array of 1.6 million texts."""

SECONDS_UNTOLD = 5.0
"""Seconds between two messages on stderr about the progress of embedding labels."""

ROUNDING = 0.005
"""How far the length of a normalised embedding may be from 1, because a model may compute it in bfloat16."""

OTHER_PRECISION = "Another precision may help, such as dtype = 'float32'."


@dataclass(kw_only=True, eq=False)
class Prepared:
    """An image on its way through a scorer.

    Attributes:
        source: the image as it was given, for example its path.
        features: result of the scorer's preprocessing of the image; None if the scorer has no preprocessing.
        pixels: the image, upright and RGB; None if the pixels are not in memory.
        digest: the sha256 of the image's file or bytes, in hexadecimal; for other images, the digest of the pixels. "" if it is
            not known.
        size: width and height in pixels; None before the image is first read. It stays known after the pixels are released.
    """

    source: ImageSource
    features: NDArray[np.uint8 | np.float32] | None = None
    pixels: Image.Image | None = None
    digest: str = ""
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.pixels is not None:
            self.size = self.pixels.size

    @property
    def image(self) -> Image.Image:
        """The image, upright and RGB. It is read at first use.

        Raises:
            ImageError: if the image cannot be read.
        """
        if self.pixels is None:
            self.pixels = load_image(self.source)
            self.size = self.pixels.size
        return self.pixels

    @cached_property
    def image_digest(self) -> str:
        """The digest of the pixels. It is kept after the pixels are released.

        Raises:
            ImageError: if the image cannot be read.
        """
        return pixel_digest(self.image)

    @property
    def unread(self) -> Image.Image:
        """The image if its pixels are in memory. If not, an image of the same size without pixels. The file is opened only if
        its size is not known.

        Raises:
            ImageError: if the image cannot be read.
        """
        if self.decoded or not isinstance(self.source, str | Path | bytes):
            return self.image
        if self.size is None:
            self.size = size_of(self.source)
        return WithoutPixels(self.size)

    @property
    def decoded(self) -> bool:
        """True if the pixels are in memory."""
        return self.pixels is not None

    def forget_large(self) -> None:
        """Release the pixels of a large image. They are read again if a judge is asked, which is true for few images."""
        if isinstance(self.source, str | Path | bytes) and is_large(self.image):
            self.pixels = None


class Scorer(Portable, ABC):
    """Computes the log-probability of every label for every image. The constructor only stores parameters. Models are loaded at
    first use.

    Attributes:
        requires: the distributions that the backend needs in addition to cascadevlm, by their names on PyPI.
        spec: the spec string that names this scorer, for example ``"open_clip:aviary"``; "" for a scorer that no spec made.
    """

    requires: ClassVar[tuple[str, ...]] = ()
    spec: str = ""

    @abstractmethod
    def score(self, images: Sequence[Image.Image], labels: LabelSet) -> Scores:
        """Score N upright RGB images for C labels. Any thread may call this method, but only one at a time."""

    def check(self) -> str:
        """Find out whether the first use can work. No model is loaded, and nothing is sent.

        Returns:
            A remark for people, for example that the model is downloaded at its first use. "" if there is nothing to say.

        Raises:
            BackendError: if something is missing: a package, a key, a price, or a model on a machine without a connection.
        """
        return ""

    def load(self) -> None:
        """Load the model, if there is one. Called once, before `prepare`."""

    def prepare(self, source: ImageSource) -> Prepared:
        """Read an image, and do the preprocessing that does not need the model. Called from many threads at once.

        Raises:
            ImageError: if the image cannot be read.
        """
        return Prepared(source=source, pixels=load_image(source))

    def score_prepared(self, prepared: Sequence[Prepared], labels: LabelSet) -> Scores:
        """The same as `score`, for images that this scorer prepared."""
        return self.score([each.image for each in prepared], labels)


@dataclass(kw_only=True)
class _Use:
    """State that all runs share, so that a scorer is loaded once and gets one call at a time."""

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
    """The lock of a scorer's model. All wrappers of one model share this lock."""
    while isinstance(wrapped := getattr(scorer, "wrapped", None), Scorer):
        scorer = wrapped
    return _use(scorer).turn


def load_once(scorer: Scorer) -> None:
    """Call `Scorer.load`, unless the scorer is loaded already. Safe across threads."""
    with _turn(scorer):
        use = _use(scorer)
        if not use.loaded:
            scorer.load()
            use.loaded = True


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The result of scoring N images.

    Attributes:
        errors: for each of the N images, the reason why it has no scores; None for the n images that have scores.
        images: the n images.
        scores: the scores of these n images, `(n, C)`; None if n is 0.
    """

    errors: Sequence[ImageError | None]
    images: Sequence[Prepared]
    scores: Scores | None


def prepare_in(
    readers: Executor, scorer: Scorer, sources: Sequence[ImageSource], *seen: Callable[[Prepared], None]
) -> list[Future[list[Prepared | ImageError]]]:
    """Start to prepare N images in threads. The results come in input order: the prepared image, or the error of an image that
    cannot be read.

    Args:
        readers: the threads.
        scorer: the scorer that prepares the images. It must be loaded.
        sources: the images.
        seen: function that the threads call with each prepared image. If it raises an `ImageError`, this is the error of the
            image.
    """
    size = -(-len(sources) // (os.cpu_count() or 1))
    shares = [sources[start : start + size] for start in range(0, len(sources), size)] if size else []
    return [readers.submit(_prepare, scorer, share, seen) for share in shares]


def _prepare(
    scorer: Scorer, sources: Sequence[ImageSource], seen: Sequence[Callable[[Prepared], None]]
) -> list[Prepared | ImageError]:
    results: list[Prepared | ImageError] = []
    for fetched in fetching(sources):  # an address is read once, so that a later question needs no second download
        try:
            prepared = scorer.prepare(fetched())
            for see in seen:
                see(prepared)
            results.append(prepared)
        except ImageError as exc:
            results.append(exc)
    return results


def score_together(scorer: Scorer, read: Sequence[Prepared | ImageError], labels: LabelSet) -> Scored:
    """Score the readable images of a chunk. Any thread may call this function; the model gets one call at a time.

    If the scorer cannot embed an image, the chunk is divided into halves and scored again. So the other images get their
    scores.

    Args:
        scorer: the scorer that prepared the images. It must be loaded.
        read: N prepared images. An error stands in place of an image that cannot be read.
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
    """`(n, C)` scores of the n images that have scores (None if n is 0), and for each of the N images its error or None."""
    try:
        return score_in_turn(scorer, prepared, labels), [None] * len(prepared)
    except ImageError as exc:
        if len(prepared) == 1:
            return None, [exc]
    half = len(prepared) // 2
    parts = [_scored_or_errors(scorer, some, labels) for some in (prepared[:half], prepared[half:])]
    found = [scores for scores, _ in parts if scores is not None]
    return Scores.joined(found) if found else None, [error for _, errors in parts for error in errors]


def score_in_turn(scorer: Scorer, prepared: Sequence[Prepared], labels: LabelSet) -> Scores:
    """`Scorer.score_prepared`, from any thread: the model gets one call at a time."""
    with _turn(scorer):
        return scorer.score_prepared(prepared, labels)


class WrapperScorer(Scorer):
    """A scorer that calls another scorer for everything. Subclasses override the methods that differ."""

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
        """Change the scores of the wrapped scorer. Default: the scores are returned unchanged."""
        return scores


LabelReader: TypeAlias = Callable[["EmbeddingScorer", Sequence[str]], NDArray[np.float32]]
"""Returns ``(C, D) float32``, the embeddings of the texts of C labels."""


def _embed_labels(scorer: "EmbeddingScorer", names: Sequence[str]) -> NDArray[np.float32]:
    return np.concatenate([embeddings for _, embeddings in scorer.embed_in_blocks(names)])


class EmbeddingScorer(Scorer):
    """A scorer whose model embeds images and texts separately, and compares the embeddings by their cosine.

    Each template gives one text per label. The embedding of a label is the mean of the normalised embeddings of its texts,
    normalised again (the ensembling of CLIP, Radford et al. 2021, section 3.1.4). The embeddings of a label set are computed
    once.

    Attributes:
        templates: texts in which ``{label}`` stands for the text of a label.
        keep_labels: function that gets the embeddings of labels from disk; None if embeddings are not kept on disk.
        adapter: what was learned about the embeddings of this scorer, as ``read_adapter("birds.adapter")`` reads it. It changes
            all scores and the fingerprint. Set it before the scorer is used. Default: None.

    Raises:
        InputError: if a template lacks ``{label}``.
    """

    def __init__(self, *, templates: Sequence[str] = DEFAULT_TEMPLATES) -> None:
        if isinstance(templates, str) or not templates:
            raise InputError(
                f"templates must be a list of texts, not {templates!r}.", hint="For example: ['a photo of a {label}.']."
            )
        for template in templates:
            if "{label}" not in template:
                raise InputError(f"Template {template!r} lacks '{{label}}'.", hint="Write {label} in place of the class name.")
        self.templates = tuple(templates)
        self.keep_labels: LabelReader | None = None
        self.adapter: Adapter | None = None
        self._embedded: tuple[LabelSet, NDArray[np.float32]] | None = None
        self._adapted: tuple[Adapter, LabelSet, Columns | None] | None = None

    @abstractmethod
    def embed_images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """``(N, D) float32``, the embeddings of N images. Each row has length 1."""

    @abstractmethod
    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """``(T, D) float32``, the embeddings of T texts. Each row has length 1."""

    @abstractmethod
    def logits(self, similarities: NDArray[np.float32]) -> NDArray[np.float32]:
        """``(N, C)`` logits: the cosines with the scale and, if the model has one, the bias of the model."""

    @abstractmethod
    def model_fingerprint(self) -> str:
        """A text that identifies the weights, revision, precision and preprocessing of the model."""

    def fingerprint(self, labels: LabelSet) -> str:
        """A text that identifies the model, the templates, the texts of the labels, and the adapter."""
        bare = self.bare_fingerprint(labels)
        return bare if self.adapter is None else f"{bare}|adapter={self.adapter.digest[:12]}"

    def bare_fingerprint(self, labels: LabelSet) -> str:
        """The fingerprint without an adapter."""
        digest = hashlib.sha256("\0".join(self.templates).encode()).hexdigest()[:12]
        return f"{self.model_fingerprint()}|templates={digest}|{labels.texts_part}"

    def label_embeddings(self, labels: LabelSet) -> NDArray[np.float32]:
        """``(C, D) float32``, the embeddings of the labels. Each row has length 1. The first call with a label set computes or
        reads them.

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
        """Yield the texts of n labels and their ``(n, D)`` embeddings, block by block. A message on stderr reports a long
        computation.
        """
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
        """The preprocessed image for `embed_prepared`; None if `embed_images` does it. Called from many threads."""
        return None

    def embed_prepared(self, prepared: Sequence[Prepared]) -> NDArray[np.float32]:
        """The same as `embed_images`, for images that this scorer prepared."""
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
        """Scores from embeddings: the softmax of the model's logits. The per-class logits of a sigmoid model get a softmax,
        too.

        Args:
            embeddings: ``(N, D)`` embeddings of images. Rows whose length is not 1 are normalised.
            labels: the C labels.

        Raises:
            InputError: if the embeddings are not an array of numbers with D columns.
            ImageError: if an embedding is zero or not finite.
            ConfigError: if the adapter does not fit the scorer or the labels.
        """
        of_labels = self.label_embeddings(labels)
        embeddings = _normalised(embeddings, of_labels.shape[1])
        logits = self.logits(embeddings @ of_labels.T)
        if self.adapter is not None:
            logits = self.adapter.logits(embeddings, logits, self._columns(self.adapter, labels))
        return Scores.from_logits(logits, labels, self.fingerprint(labels), embeddings=embeddings.astype(np.float16))

    def _columns(self, adapter: Adapter, labels: LabelSet) -> Columns | None:
        """`Adapter.columns_in`, checked once per adapter and label set."""
        if self._adapted is None or self._adapted[0] is not adapter or self._adapted[1] != labels:
            self._adapted = adapter, labels, adapter.columns_in(labels, self.bare_fingerprint)
        return self._adapted[2]


def _normalised(embeddings: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """The embeddings with rows of length 1. Rows that have this length already are not changed."""
    is_array = isinstance(embeddings, np.ndarray)
    if not is_array or embeddings.dtype.kind not in "fiu" or embeddings.shape[1:] != (width,):
        given = f"{embeddings.dtype} {embeddings.shape}" if is_array else type(embeddings).__name__
        hint = "Give one row per image, from the model of this scorer."
        raise InputError(f"The embeddings are {given}, not a NumPy array of numbers with {width} columns.", hint=hint)
    embeddings = embeddings.astype(np.float32, copy=False)
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise ImageError("The scorer's embedding of the image is zero or not finite.", hint=OTHER_PRECISION)
    off = np.abs(lengths - 1) > ROUNDING
    return np.divide(embeddings, lengths, out=embeddings.copy(), where=off) if off.any() else embeddings

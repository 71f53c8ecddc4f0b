"""What passes between scorer, policy, judge and cascade: plain, frozen values."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from operator import add
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import JsonValue
from scipy.special import log_softmax

from cascadevlm.base.encoding import EncodedImage, ImageLimits
from cascadevlm.base.images import pixel_digest
from cascadevlm.base.labels import Label, LabelSet

Outcome = Literal["answered", "none", "refused", "unparsed", "failed", "skipped"]
"""How asking a judge ended: with one of the candidates, with "none of these", with a refusal, with text that names no
candidate, with an error, or not at all because the budget was spent."""

DecidedBy = Literal["scorer", "judge", "fusion"]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Log-probabilities of every label for a batch of images.

    Attributes:
        log_probs: N x C float32, natural logarithms; the exponentials of a row sum to 1.
        labels: the C labels, in column order.
        fingerprint: names what produced the numbers: the model, its revision and preprocessing, the texts of the labels, and the
            adapter if there is one.
        embeddings: `(N, D) float16`, the embeddings of the images, rows of length 1. None if the scorer makes none.
    """

    log_probs: NDArray[np.float32]
    labels: LabelSet
    fingerprint: str
    embeddings: NDArray[np.float16] | None = None

    @classmethod
    def from_logits(
        cls, logits: NDArray[np.floating], labels: LabelSet, fingerprint: str, *, embeddings: NDArray[np.float16] | None = None
    ) -> "Scores":
        """Normalise N x C logits by softmax (per-class sigmoid scores too: the softmax is over their logits)."""
        log_probs = log_softmax(np.asarray(logits, dtype=np.float64), axis=1).astype(np.float32)
        return cls(log_probs=log_probs, labels=labels, fingerprint=fingerprint, embeddings=embeddings)

    @classmethod
    def joined(cls, parts: "Sequence[Scores]") -> "Scores":
        """The scores of all images of one or more parts, in their order. Embeddings are kept if every part has them."""
        rows = [part.embeddings for part in parts if part.embeddings is not None]
        return replace(
            parts[0],
            log_probs=np.concatenate([part.log_probs for part in parts]),
            embeddings=np.concatenate(rows) if len(rows) == len(parts) else None,
        )

    def __post_init__(self) -> None:
        if self.embeddings is not None and (self.embeddings.ndim != 2 or len(self.embeddings) != len(self.log_probs)):
            raise ValueError(f"embeddings has shape {self.embeddings.shape}, not ({len(self.log_probs)}, D)")
        if self.log_probs.ndim != 2 or self.log_probs.shape[1] != len(self.labels):
            raise ValueError(f"log_probs has shape {self.log_probs.shape}, not (N, {len(self.labels)})")
        if np.isnan(self.log_probs).any():
            raise ValueError("log_probs holds NaN: the scorer gave numbers that are no scores")

    def __len__(self) -> int:
        return len(self.log_probs)

    @cached_property
    def probabilities(self) -> NDArray[np.float32]:
        """N x C, rows sum to 1."""
        return np.exp(self.log_probs)

    def rows(self, index: NDArray[np.bool_] | NDArray[np.intp] | slice) -> "Scores":
        """The scores of some of the images."""
        embeddings = None if self.embeddings is None else self.embeddings[index]
        return replace(self, log_probs=self.log_probs[index], embeddings=embeddings)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A label offered to the judge, with the scorer's ``probability`` of it and its ``rank`` (1 is the scorer's best)."""

    label: Label
    probability: float
    rank: int


@dataclass(frozen=True, kw_only=True)
class Exemplar:
    """A reference image of a label, shown to the judge as part of the question; ``encoded`` as in `Question`."""

    image: Image.Image
    label: Label
    encoded: dict[ImageLimits, EncodedImage] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def digest(self) -> str:
        return pixel_digest(self.image)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt template.

    Attributes:
        name: what it is called in records.
        text: the template: ``$image`` and ``$candidates``, optionally ``$references``, stand for what the question brings.
        reasoning: whether it asks for observations before the answer.
        max_tokens: how long an answer to it may be.
    """

    name: str
    text: str
    reasoning: bool
    max_tokens: int

    @property
    def shows_references(self) -> bool:
        """Whether it has a place for reference images."""
        return "references" in string.Template(self.text).get_identifiers()


@dataclass(frozen=True, kw_only=True)
class Question:
    """One image and the candidates to choose from, as put to a judge.

    Attributes:
        image: upright RGB.
        candidates: in the order in which they are shown.
        prompt: the template that words it.
        exemplars: reference images, in the order in which they are shown.
        offer_none: whether "none of these" is one of the options.
        rejected: a previous answer that named no candidate; the question then asks once more.
        label_set: what the candidates are from; an answer that names another label of it chooses none of them.
        sample: distinguishes repeated questions that shall not share an answer.
        encoded: the image as hosted judges send it, by their limits; filled as they need it.
    """

    image: Image.Image
    candidates: tuple[Candidate, ...]
    prompt: Prompt
    exemplars: tuple[Exemplar, ...] = ()
    offer_none: bool = False
    rejected: str | None = None
    label_set: LabelSet | None = None
    sample: int = 0
    encoded: dict[ImageLimits, EncodedImage] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def labels(self) -> tuple[Label, ...]:
        """The labels of the candidates, in the order shown."""
        return tuple(candidate.label for candidate in self.candidates)

    @cached_property
    def image_digest(self) -> str:
        return pixel_digest(self.image)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a verdict took: tokens, US dollars, seconds, requests; and what a cached verdict saved, in dollars.

    ``input_tokens`` are all of the input, with what the provider's own prompt cache gave or took (``cached_input_tokens``,
    ``cache_write_tokens``), which has its own price.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cached_input_tokens: int = 0
    cache_write_tokens: int = 0
    dollars: float = 0.0
    seconds: float = 0.0
    requests: int = 0
    cached: bool = False
    saved_dollars: float = 0.0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            cached_input_tokens=self.cached_input_tokens + other.cached_input_tokens,
            cache_write_tokens=self.cache_write_tokens + other.cache_write_tokens,
            dollars=self.dollars + other.dollars,
            seconds=self.seconds + other.seconds,
            requests=self.requests + other.requests,
            cached=self.cached and other.cached,
            saved_dollars=self.saved_dollars + other.saved_dollars,
        )

    def to_dict(self) -> dict[str, JsonValue]:
        """The usage as JSON-serialisable data."""
        return dict(vars(self))


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of asking a judge.

    Attributes:
        outcome: see `Outcome`.
        label: the name of the chosen candidate; there exactly when ``outcome`` is ``"answered"``.
        probabilities: the judge's own probability of each candidate by name, where it gives any; they sum to 1.
        rationale: what the judge said before its answer.
        text: the whole raw answer.
        error: why there is no answer, for ``"failed"``, ``"refused"``, ``"unparsed"`` and ``"skipped"``.
        judge: the spec of the judge asked.
        stage: the position, from 0, of the stage that asked; of one that is stored or was never part of a run, 0.
        usage: what it took.
    """

    outcome: Outcome
    label: str | None = None
    probabilities: Mapping[str, float] | None = None
    rationale: str = ""
    text: str = ""
    error: str = ""
    judge: str = ""
    stage: int = 0
    usage: Usage = field(default_factory=Usage)

    def __post_init__(self) -> None:
        if (self.label is not None) != (self.outcome == "answered"):
            raise ValueError(f"outcome {self.outcome!r} with label {self.label!r}")

    def to_dict(self) -> dict[str, JsonValue]:
        """The verdict as JSON-serialisable data."""
        probabilities = dict(self.probabilities) if self.probabilities is not None else None
        return vars(self) | {"probabilities": probabilities, "usage": self.usage.to_dict()}

    @property
    def valid(self) -> bool:
        """Whether this is an answer to the question, worth keeping."""
        return self.outcome in ("answered", "none")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the cascade says of one image.

    Attributes:
        path: of the image, or "" where it came from memory.
        label: the predicted name; None if the cascade abstained or the image could not be read.
        probability: of the label, given by whoever decided; None where a judge decided that gives no probabilities.
        decided_by: None if there is no label.
        candidates: the scorer's best in ranked order; in the order last shown, where a judge was asked.
        reasons: for every stage whose policy was consulted, what it went by.
        verdicts: what each judge asked said, in order of the stages; a stage that did not ask has none.
        error: why there is no label.
    """

    path: str = ""
    label: str | None = None
    probability: float | None = None
    decided_by: DecidedBy | None = None
    candidates: tuple[Candidate, ...] = ()
    reasons: tuple[str, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    error: str = ""

    @property
    def escalated(self) -> bool:
        return bool(self.verdicts)

    @property
    def asked(self) -> bool:
        """Whether a judge was asked, or its answer known; not so where the budget was spent."""
        return any(verdict.outcome != "skipped" for verdict in self.verdicts)

    @property
    def answered(self) -> bool:
        """Whether a judge gave an answer: one of the candidates, or none of them."""
        return any(verdict.valid for verdict in self.verdicts)

    @property
    def verdict(self) -> Verdict | None:
        """The last verdict."""
        return self.verdicts[-1] if self.verdicts else None

    @property
    def cost(self) -> Usage:
        """What all verdicts took together."""
        return reduce(add, (verdict.usage for verdict in self.verdicts)) if self.verdicts else Usage()

    def to_dict(self) -> dict[str, JsonValue]:
        """The prediction as JSON-serialisable data, one line in a record."""
        return {
            "path": self.path,
            "label": self.label,
            "probability": self.probability,
            "decided_by": self.decided_by,
            "candidates": [{"label": c.label.name, "probability": c.probability, "rank": c.rank} for c in self.candidates],
            "reasons": list(self.reasons),
            "verdict": self.verdict.to_dict() if self.verdict else None,
            "earlier_verdicts": [verdict.to_dict() for verdict in self.verdicts[:-1]],
            "cost": self.cost.to_dict(),
            "error": self.error,
        }


NANODOLLARS = 1_000_000_000

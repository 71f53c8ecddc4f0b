"""Frozen values that scorer, policy, judge and cascade exchange."""

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
from cascadevlm.base.html import card
from cascadevlm.base.images import pixel_digest
from cascadevlm.base.labels import Label, LabelSet

Outcome = Literal["answered", "none", "refused", "unparsed", "failed", "skipped"]
"""The result of a question to a judge: a candidate ("answered"), "none of these" ("none"), a refusal ("refused"), text that
names no candidate ("unparsed"), an error ("failed"), or no question because the budget was used up ("skipped").
"""

AUDITED = "audit"
"""The last of the reasons of an image that was not escalated by a policy, but drawn for an audit."""

PROMISE_BROKEN = "audit: too few labels are the judge's"
"""The last of the reasons of an image that was not escalated by a policy, but because an audit shows a broken promise."""

DecidedBy = Literal["scorer", "judge", "fusion"]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Log-probabilities of every label for a batch of images.

    Attributes:
        log_probs: ``(N, C) float32``, natural logarithms of probabilities. The probabilities of a row sum to 1.
        labels: the C labels, in column order.
        fingerprint: text that identifies the model, its revision and preprocessing, the texts of the labels, and the adapter if
            there is one.
        embeddings: ``(N, D) float16``, the embeddings of the images, rows of length 1. None if the scorer makes none.
        thresholds: for each coverage of lists of candidates, the threshold that was fitted for these scores
            (`Conformal.threshold`). It replaces the threshold of the calibration. Empty unless the scorer learns.

    Raises:
        ValueError: if ``log_probs`` or ``embeddings`` has a wrong shape, or ``log_probs`` contains NaN.
    """

    log_probs: NDArray[np.float32]
    labels: LabelSet
    fingerprint: str
    embeddings: NDArray[np.float16] | None = None
    thresholds: Mapping[float, float] = field(default_factory=dict)

    @classmethod
    def from_logits(
        cls, logits: NDArray[np.floating], labels: LabelSet, fingerprint: str, *, embeddings: NDArray[np.float16] | None = None
    ) -> "Scores":
        """Scores from ``(N, C)`` logits, normalised by softmax. Logits of a per-class sigmoid are normalised by softmax, too.

        If a label has its own text, a part that identifies the texts is added to the fingerprint, unless the fingerprint has
        such a part. So a calibration that was made with other texts is refused.
        """
        if any(label.text for label in labels) and labels.texts_part not in fingerprint.split("|"):
            fingerprint = f"{fingerprint}|{labels.texts_part}"
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
            raise ValueError("log_probs contains NaN; the scorer must return finite scores")

    def __len__(self) -> int:
        return len(self.log_probs)

    @cached_property
    def probabilities(self) -> NDArray[np.float32]:
        """``(N, C) float32``, the probability of each label. Each row sums to 1."""
        return np.exp(self.log_probs)

    def rows(self, index: NDArray[np.bool_] | NDArray[np.intp] | slice) -> "Scores":
        """The scores of the selected images."""
        embeddings = None if self.embeddings is None else self.embeddings[index]
        return replace(self, log_probs=self.log_probs[index], embeddings=embeddings)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A label that is offered to the judge.

    Attributes:
        label: the label.
        probability: the scorer's probability of the label, from 0 to 1.
        rank: the scorer's rank of the label; 1 is the best.
    """

    label: Label
    probability: float
    rank: int


@dataclass(frozen=True, kw_only=True)
class Exemplar:
    """A reference image of a label, which the judge sees as part of the question. ``encoded`` is the same as in `Question`."""

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
        name: name of the template in records.
        text: the template. The question replaces ``$image``, ``$candidates`` and, if the text contains it, ``$references``.
        reasoning: True if the template asks for observations before the answer.
        max_tokens: maximum length of an answer, in tokens.
    """

    name: str
    text: str
    reasoning: bool
    max_tokens: int

    @property
    def shows_references(self) -> bool:
        """True if the template contains ``$references``."""
        return "references" in string.Template(self.text).get_identifiers()


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question to a judge: one image, and the candidates to choose from.

    Attributes:
        image: the image, upright and RGB.
        candidates: the candidates, in the order in which the judge sees them.
        prompt: the prompt template.
        exemplars: reference images, in the order in which the judge sees them.
        offer_none: True if "none of these" is one of the options.
        rejected: an earlier answer that named no candidate. The judge is asked again and sees it. None in a first question.
        label_set: the label set of the candidates. An answer with another label of this set names no candidate; it counts as
            "none of these" if ``offer_none`` is true.
        sample: a number that separates repeated questions, so that they do not share a cached answer.
        encoded: the image in the form that is sent to hosted judges, per limit. Judges fill this cache.
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
        """The labels of the candidates, in the order in which the judge sees them."""
        return tuple(candidate.label for candidate in self.candidates)

    @cached_property
    def image_digest(self) -> str:
        return pixel_digest(self.image)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """The tokens, money and time that a verdict needed.

    Attributes:
        input_tokens: number of all input tokens, including the two kinds of cached tokens.
        output_tokens: number of output tokens.
        cached_input_tokens: number of input tokens that were read from the provider's prompt cache. They have their own price.
        cache_write_tokens: number of input tokens that were written to the provider's prompt cache. They have their own price.
        dollars: cost in US dollars.
        seconds: time in seconds.
        requests: number of requests.
        cached: True if the verdict came from the cache.
        saved_dollars: the US dollars that a cached verdict saved.
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
    """The result of a question to a judge.

    Attributes:
        outcome: see `Outcome`.
        label: the name of the chosen candidate if ``outcome`` is "answered"; None for every other outcome.
        probabilities: the judge's probability of each candidate, by name; they sum to 1. None if the judge gives none.
        rationale: the text before the answer.
        text: the complete text of the answer.
        error: the reason for a missing answer: for the outcomes "failed", "refused", "unparsed" and "skipped".
        judge: the spec of the judge.
        stage: the position of the stage that asked the judge; the first stage is 0. A stored verdict has stage 0.
        usage: the tokens, money and time of the question.

    Raises:
        ValueError: if there is a label without the outcome ``"answered"``, or this outcome without a label.
    """

    outcome: Outcome
    label: str | None = None
    probabilities: Mapping[str, float] | None = field(default=None, repr=False)
    rationale: str = field(default="", repr=False)
    text: str = field(default="", repr=False)
    error: str = ""
    judge: str = ""
    stage: int = 0
    usage: Usage = field(default_factory=Usage, repr=False)

    def __post_init__(self) -> None:
        if (self.label is not None) != (self.outcome == "answered"):
            raise ValueError(f"outcome {self.outcome!r} with label {self.label!r}")

    def to_dict(self) -> dict[str, JsonValue]:
        """The verdict as JSON-serialisable data."""
        probabilities = dict(self.probabilities) if self.probabilities is not None else None
        return vars(self) | {"probabilities": probabilities, "usage": self.usage.to_dict()}

    @property
    def valid(self) -> bool:
        """True if the judge answered the question: with a candidate or with "none of these"."""
        return self.outcome in ("answered", "none")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The cascade's result for one image.

    Attributes:
        path: path of the image; "" if the image came from memory.
        label: the predicted name; None if the cascade abstained or the image could not be read.
        probability: probability of the label, from 0 to 1. None without a label, or if a judge without probabilities decided.
        decided_by: the part that chose the label; None if there is no label.
        candidates: the scorer's best labels. They are in ranked order or, if a judge was asked, in the order that it saw last.
        reasons: the reason of the policy's decision, for each stage whose policy was used.
        verdicts: one verdict per judge that was asked, in the order of the stages.
        error: the reason for a missing label.
    """

    path: str = ""
    label: str | None = None
    probability: float | None = None
    decided_by: DecidedBy | None = None
    candidates: tuple[Candidate, ...] = field(default=(), repr=False)
    reasons: tuple[str, ...] = field(default=(), repr=False)
    verdicts: tuple[Verdict, ...] = field(default=(), repr=False)
    error: str = ""

    def _repr_html_(self) -> str:
        sure = "" if self.probability is None else f", probability {self.probability:.2f}"
        best = sorted(self.candidates, key=lambda candidate: candidate.rank)
        said = [f"{each.judge} ({each.outcome}): {each.rationale or each.text or each.error}" for each in self.verdicts]
        rows = {
            "image": self.path,
            "decided by": self.decided_by or "",
            "candidates": [f"{candidate.probability:.2f} {candidate.label.name}" for candidate in best],
            "escalated" if self.escalated else "kept": self.reasons,
            "judge": said,
            "error": self.error,
        }
        return card("no label" if self.label is None else f"{self.label}{sure}", rows, path=self.path)

    @property
    def escalated(self) -> bool:
        return bool(self.verdicts)

    @property
    def asked(self) -> bool:
        """True if a judge was asked or a stored answer was used. False if the budget was used up."""
        return any(verdict.outcome != "skipped" for verdict in self.verdicts)

    @property
    def answered(self) -> bool:
        """True if a judge answered: with a candidate or with "none of these"."""
        return any(verdict.valid for verdict in self.verdicts)

    @property
    def audited(self) -> bool:
        """True if the judge was asked because of an audit."""
        return AUDITED in self.reasons

    @property
    def differing(self) -> bool:
        """True if the judge answered a question of an audit, and did not give the scorer's label.

        The scorer's label has rank 1. After the answer "none of these", the judge is shown later ranks only.
        """
        if self.verdict is None or not (self.audited and self.answered):
            return False
        best = next((candidate.label.name for candidate in self.candidates if candidate.rank == 1), None)
        return best is None or self.verdict.label != best

    @property
    def verdict(self) -> Verdict | None:
        """The last verdict; None if no judge was asked."""
        return self.verdicts[-1] if self.verdicts else None

    @property
    def cost(self) -> Usage:
        """The sum of the usage of all verdicts."""
        return reduce(add, (verdict.usage for verdict in self.verdicts)) if self.verdicts else Usage()

    def to_dict(self) -> dict[str, JsonValue]:
        """The prediction as JSON-serialisable data. A record has one line of this form per image."""
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

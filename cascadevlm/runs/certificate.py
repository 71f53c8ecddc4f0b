"""The certificate of a run as its files contain it, and its check from these files alone."""

from pathlib import Path
from typing import Literal, Self, TypeAlias, TypedDict, Unpack

from pydantic import BaseModel, ValidationError

from cascadevlm.decision.certifying import Certificate

Phase = Literal["taught", "tested", "kept", "asked"]
"""What a certificate did with an image: it was asked about before the test, in the test, or after the test, or its label was kept
without a question.
"""


class Standing(BaseModel):
    """The field ``certificate`` of a line of ``predictions.jsonl``.

    Attributes:
        phase: see `Phase`.
        label: name of the label without a question. The opinion that gives the label is fixed before the test.
        log_odds: the confidence of this label, by which the images of the test are in order.
    """

    phase: Phase
    label: str
    log_odds: float


class Known(TypedDict):
    """The attributes of `Facts` that a `Certificate` does not contain."""

    unanswered: int
    scorer: str
    labels: str
    judge: str
    identity: str
    prompt: str


class Facts(BaseModel):
    """A certificate, as ``summary.json`` contains it.

    Attributes:
        agree: T, the least share of images whose label is the judge's.
        confidence: the least probability that the certificate is true.
        seed: seed of all draws.
        images: N, number of images that could be read.
        allowed: W, number of labels that may not be the judge's.
        first: number of random images that the judge was asked about first.
        taught: number of images that the judge was asked about before the test.
        ordered: R, number of the other images, which are in order.
        tested: n, number of images that were drawn for the test.
        most: c, number of drawn images that may disagree in the prefix; -1 if no prefix could pass the test.
        prefix: e, number of images of the order in the prefix that is kept.
        found: number of drawn images of the prefix that disagree.
        kept: number of images whose label was kept without a question.
        questions: number of images that the judge was asked about.
        unanswered: number of these images for which the judge gave no answer.
        planned: expected number of questions before the test.
        scorer: fingerprint of the scorer.
        labels: digest of the texts of the labels.
        judge: spec of the judge.
        identity: digest of the identity of the judge.
        prompt: digest of the prompt.
        sentence: the certificate in words.
    """

    agree: float
    confidence: float
    seed: int
    images: int
    allowed: int
    first: int
    taught: int
    ordered: int
    tested: int
    most: int
    prefix: int
    found: int
    kept: int
    questions: int
    unanswered: int
    planned: float
    scorer: str
    labels: str
    judge: str
    identity: str
    prompt: str
    sentence: str = ""

    @classmethod
    def of(cls, certificate: Certificate, **known: Unpack[Known]) -> Self:
        """The facts of a certificate whose questions are all asked. ``known`` contains what the certificate does not."""
        promise = certificate.promise
        facts = cls(
            agree=promise.agreement,
            confidence=promise.confidence,
            seed=certificate.seed,
            images=certificate.images,
            allowed=certificate.allowed,
            first=certificate.first,
            taught=len(certificate.taught),
            ordered=len(certificate.order),
            tested=int(certificate.drawn.sum()),
            most=certificate.most,
            prefix=certificate.prefix,
            found=certificate.found,
            kept=len(certificate.kept),
            questions=certificate.questions,
            planned=round(certificate.planned, 1),
            **known,
        )
        return facts.model_copy(update={"sentence": facts.in_words()})

    def in_words(self) -> str:
        """The certificate in words."""
        sure, share = 100 * self.confidence, 100 * self.agree
        asked = f"The judge was asked about {self.questions:,} of {self.images:,} images."
        if self.kept <= self.allowed:
            promise = (
                f"No label of the other {self.kept:,} images needed a test: at least {share:.4g} % of all labels are the judge's."
            )
        else:
            promise = (
                f"With {sure:.4g} % confidence, it would give another label to at most {self.allowed:,} of the other "
                f"{self.kept:,} images: at least {share:.4g} % of all labels are the judge's."
            )
        missing = f" This does not count {self.unanswered:,} images that got no answer: their labels are the scorer's."
        return f"{asked} {promise}{missing if self.unanswered else ''}"


class Finding(BaseModel):
    """What a run with ``[find]`` found, as ``summary.json`` contains it.

    Attributes:
        label: name of the class.
        recall: at least this share of the images that the judge would give this label to have it.
        precision: at least this share of the images with the label are such images; None if the judge was asked about each.
        confidence: least probability that these promises are kept.
        seed: seed of all draws.
        images: number of images that could be read.
        questions: number of images that the judge was asked about.
        named: number of these to which the judge gave the label.
        accepted: number of images with the label that the judge was not asked about.
    """

    label: str
    recall: float
    precision: float | None
    confidence: float
    seed: int
    images: int
    questions: int
    named: int
    accepted: int

    @property
    def sentence(self) -> str:
        """The promise in words."""
        precise = "" if self.precision is None else f", and at least {100 * self.precision:.4g} % of the found images are right"
        sure, share, found = 100 * self.confidence, 100 * self.recall, self.named + self.accepted
        return (
            f"The judge was asked about {self.questions:,} of {self.images:,} images. "
            f"{found:,} images have the label {self.label!r}. With {sure:.4g} % confidence, these are at least "
            f"{share:.4g} % of the images to which the judge would give this label{precise}."
        )


class Missing(BaseModel):
    """What is missing for a certificate, because the budget was used up, as ``summary.json`` contains it.

    Attributes:
        asked: number of images that the judge was asked about.
        questions: number of missing questions. Before the test, this is an expected number. None if it is not known.
        dollars: usual cost of the missing questions in US dollars; None if no question was answered yet.
    """

    asked: int
    questions: int | None
    dollars: float | None

    @property
    def sentence(self) -> str:
        """What is missing, in words."""
        told = f"There is no certificate, because the budget was used up after {self.asked:,} questions."
        if self.questions is None:
            return told
        price = "" if self.dollars is None else f", for about ${self.dollars:.2f}"
        return f"{told} About {self.questions:,} questions are missing{price}."


Statement: TypeAlias = Facts | Finding | Missing


class _Summary(BaseModel):
    certificate: Statement | None = None


def read_certificate(summary: Path) -> Statement | None:
    """The certificate in ``summary.json``, or what is missing for it; None if there is neither, or if the file is damaged."""
    try:
        return _Summary.model_validate_json(summary.read_bytes()).certificate
    except (OSError, ValidationError):
        return None

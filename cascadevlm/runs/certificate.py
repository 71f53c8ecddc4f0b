"""The certificate of a run as its files contain it, and its check from these files alone."""

from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias, TypedDict, Unpack

from pydantic import BaseModel, Field, NonNegativeInt, ValidationError

from cascadevlm.decision.certifying import Certificate

Phase = Literal["taught", "tested", "kept", "asked", "accepted"]
"""What a run with a promise did with an image: the judge was asked about it before the test ("taught"), in the test ("tested") or
after the test ("asked"), or its label needed no question. In a run with ``[find]``, "accepted" images have the label of the class
without a question, and "kept" images have another label.
"""

UNASKED: tuple[Phase, ...] = ("kept", "accepted")
"""The phases of images that the judge was not asked about."""

Share = Annotated[float, Field(gt=0, lt=1)]


class Standing(BaseModel):
    """The field ``certificate`` of a line of ``predictions.jsonl``.

    Attributes:
        phase: see `Phase`.
        label: name of the label without a question. In a certificate, it is fixed before the test.
        log_odds: the confidence by which the images of the test are in order: log-odds of the label; in a run with ``[find]``,
            log-odds that the image is not of the class.
    """

    phase: Phase
    label: str
    log_odds: float


class Known(TypedDict):
    """The attributes of `Stated` that only the folder of the run contains."""

    unanswered: int
    scorer: str
    labels: str
    judge: str
    identity: str
    prompt: str


class Stated(BaseModel):
    """What every promise about a run contains.

    Attributes:
        confidence: the least probability that the promise is kept.
        seed: seed of all draws.
        images: N, number of images that could be read.
        taught: number of images that the judge was asked about before the test.
        tested: n, number of images that were drawn for the test.
        questions: number of images that the judge was asked about.
        unanswered: number of these that the promise does not count: the judge gave no answer, or, in a certificate, chose none of
            the candidates.
        scorer: fingerprint of the scorer.
        labels: digest of the texts of the labels.
        judge: spec of the judge.
        identity: digest of the identity of the judge.
        prompt: digest of the prompt.
    """

    confidence: Share
    seed: NonNegativeInt
    images: NonNegativeInt
    taught: NonNegativeInt
    tested: NonNegativeInt
    questions: NonNegativeInt
    unanswered: NonNegativeInt
    scorer: str
    labels: str
    judge: str
    identity: str
    prompt: str


class Facts(Stated):
    """A certificate, as ``summary.json`` contains it.

    Attributes:
        agree: T, the least share of images whose label is the judge's.
        allowed: W, number of labels that may not be the judge's.
        first: number of random images that the judge was asked about first.
        ordered: R, number of the images that were not asked about before the test; they are in order.
        most: c, number of drawn images that may disagree in the prefix; -1 if no prefix could pass the test.
        prefix: e, number of images of the order in the prefix that is kept.
        found: number of drawn images of the prefix that disagree.
        kept: number of images whose label was kept without a question.
        planned: expected number of questions before the test.
        sentence: the certificate in words.
    """

    agree: Share
    allowed: NonNegativeInt
    first: NonNegativeInt
    ordered: NonNegativeInt
    most: int
    prefix: NonNegativeInt
    found: NonNegativeInt
    kept: NonNegativeInt
    planned: float
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
        asked = f"The judge was asked about {self.questions:,} of {self.images:,} images."
        if self.unanswered:
            others = self.images - self.unanswered
            least = others - min(self.kept, self.allowed)
            none = f"It gave no label to {self.unanswered:,} of them; only the labels of the other {others:,} images count here."
            asked = f"{asked} {none}"
            claim = f"at least {least:,} of these {others:,} labels are the judge's."
            if least < self.agree * others:
                claim += (
                    f" This is less than {percent(self.agree)} %, because the images without a label from the judge count too."
                )
        else:
            claim = f"at least {percent(self.agree)} % of all labels are the judge's."
        if not self.kept:
            return f"{asked} {claim.capitalize()}"
        if self.kept <= self.allowed:
            return f"{asked} No label of the {self.kept:,} images without a question needed a test: {claim}"
        return (
            f"{asked} With {percent(self.confidence)} % confidence, it would give another label to at most {self.allowed:,} of "
            f"the {self.kept:,} images without a question: {claim}"
        )


class Finding(Stated):
    """What a run with ``[find]`` found, as ``summary.json`` contains it.

    Attributes:
        label: name of the class.
        recall: at least this share of the images that the judge would give this label to have it.
        precision: at least this share of the images with the label are such images; None if the judge was asked about each.
        named: number of images that the judge was asked about and gave the label to.
        accepted: number of images with the label that the judge was not asked about.
    """

    label: str
    recall: Share
    precision: Share | None
    named: NonNegativeInt
    accepted: NonNegativeInt

    @property
    def sentence(self) -> str:
        """The promise in words."""
        precise = "" if self.precision is None else f", and at least {percent(self.precision)} % of the found images are right"
        missing = f" The judge gave no answer for {self.unanswered:,} images, which do not count here."
        found = self.named + self.accepted
        return (
            f"The judge was asked about {self.questions:,} of {self.images:,} images. "
            f"{found:,} images have the label {self.label!r}. With {percent(self.confidence)} % confidence, these are at "
            f"least {percent(self.recall)} % of the images to which the judge would give this label{precise}."
            f"{missing if self.unanswered else ''}"
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
        told = f"The budget was used up after {self.asked:,} questions, so nothing is promised about the labels."
        if self.questions is None:
            return told
        price = "" if self.dollars is None else f", for about ${self.dollars:.2f}"
        return f"{told} About {self.questions:,} questions are missing{price}."


def percent(share: float) -> str:
    """A share as a percentage with all its digits, for example "99.995"."""
    return f"{(100 * Decimal(str(share))).normalize():f}"


Statement: TypeAlias = Facts | Finding | Missing


class _Summary(BaseModel):
    certificate: Statement | None = None


def read_certificate(summary: Path) -> Statement | None:
    """The certificate in ``summary.json``, or what is missing for it; None if there is neither, or if the file is damaged."""
    try:
        return _Summary.model_validate_json(summary.read_bytes()).certificate
    except (OSError, ValidationError):
        return None

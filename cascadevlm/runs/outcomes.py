"""What the rule of a run with a promise decided about its images, and the predictions of images without a question."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue
from scipy.special import expit

from cascadevlm.base.types import Candidate, Prediction, Scores
from cascadevlm.config.finding import FindConfig
from cascadevlm.decision.certifying import Certificate
from cascadevlm.decision.finding import Found
from cascadevlm.judges.cache import key_of
from cascadevlm.runs.certificate import Facts, Finding, Phase, Standing, Statement
from cascadevlm.runs.run_folder import RunFolder
from cascadevlm.runs.scored_first import ScoredImages


class Outcome(ABC):
    """What a rule decided about the N readable images of a run. Images have numbers from 0 to N - 1 here.

    Attributes:
        unasked: numbers of the images that the judge was not asked about.
    """

    unasked: NDArray[np.intp]

    @abstractmethod
    def fields(self, row: int) -> dict[str, JsonValue]:
        """Further fields of the line of an image."""

    @abstractmethod
    def prediction(self, row: int, candidates: tuple[Candidate, ...], scores: Scores) -> Prediction:
        """The prediction of an image that the judge was not asked about.

        Args:
            row: number of the image.
            candidates: the candidates that a question would have.
            scores: `(1, C)` scores of the image.
        """

    def is_rejected(self, content: Mapping[str, JsonValue]) -> bool:
        """True if an image that the judge was asked about must not keep its label. It then gets the label of `prediction`.

        Args:
            content: the fields of its line.
        """
        return False

    @abstractmethod
    def statement(self, folder: RunFolder, images: ScoredImages) -> Statement:
        """The outcome for the summary, after all predictions are written."""


class Certified(Outcome):
    """A certificate of agreement.

    Args:
        certificate: the certificate.
        names: names of the labels.
    """

    def __init__(self, certificate: Certificate, names: Sequence[str]) -> None:
        self.certificate, self.names = certificate, names
        self.unasked = certificate.kept
        phases: dict[Phase, NDArray[np.intp]] = {
            "taught": certificate.taught,
            "tested": certificate.order[certificate.drawn],
            "kept": certificate.kept,
            "asked": certificate.rest,
        }
        self._phase_names = tuple(phases)
        self._phases = np.zeros(certificate.images, dtype=np.int8)
        for number, rows in enumerate(phases.values()):
            self._phases[rows] = number

    def standing(self, row: int) -> Standing:
        """What the certificate did with an image."""
        return Standing(
            phase=self._phase_names[self._phases[row]],
            label=self.names[int(self.certificate.labels[row])],
            log_odds=float(self.certificate.log_odds[row]),
        )

    def fields(self, row: int) -> dict[str, JsonValue]:
        return {"certificate": self.standing(row).model_dump()}

    def prediction(self, row: int, candidates: tuple[Candidate, ...], scores: Scores) -> Prediction:
        standing = self.standing(row)
        return Prediction(
            label=standing.label,
            probability=float(expit(standing.log_odds)),
            decided_by="scorer",
            candidates=candidates,
            reasons=(f"certificate: kept, log-odds {standing.log_odds:.2f}",),
        )

    def statement(self, folder: RunFolder, images: ScoredImages) -> Facts:
        manifest, tally = folder.manifest, folder.tally
        return Facts.of(
            self.certificate,
            unanswered=tally.asked - tally.counts["answered"],
            scorer=images.fingerprint,
            labels=images.labels.texts_digest,
            judge=manifest.stages[0],
            identity=key_of(manifest.judges[0]),
            prompt=manifest.contents["stage.0.prompt"],
        )


class Sought(Outcome):
    """The images of a class. An image that was not accepted, and that the judge gave no label to, has its most probable other
    label.

    Args:
        config: what was promised.
        result: what was found.
        images: N, number of readable images.
    """

    def __init__(self, config: FindConfig, result: Found, images: int) -> None:
        self.config, self.result, self.images = config, result, images
        self.unasked = np.setdiff1d(np.arange(images), result.asked)
        self._accepted = {*result.accepted.tolist()}

    def fields(self, row: int) -> dict[str, JsonValue]:
        return {}

    def is_rejected(self, content: Mapping[str, JsonValue]) -> bool:
        return content["label"] == self.config.label and content["decided_by"] != "judge"

    def prediction(self, row: int, candidates: tuple[Candidate, ...], scores: Scores) -> Prediction:
        accepted, column = row in self._accepted, self.result.column
        others = np.where(np.arange(len(scores.labels)) == column, -np.inf, scores.log_probs[0])
        chosen = column if accepted else int(others.argmax())
        return Prediction(
            label=scores.labels[chosen].name,
            probability=float(scores.probabilities[0, chosen]),
            decided_by="scorer",
            candidates=candidates,
            reasons=(f"find: {'accepted' if accepted else 'not likely to be'} {self.config.label}",),
        )

    def statement(self, folder: RunFolder, images: ScoredImages) -> Finding:
        known = self.config.model_dump()
        named, accepted = len(self.result.named), len(self.result.accepted)
        questions = self.images - len(self.unasked)
        unanswered = folder.tally.asked - folder.tally.answered
        return Finding(**known, images=self.images, questions=questions, named=named, accepted=accepted, unanswered=unanswered)

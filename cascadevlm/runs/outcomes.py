"""What the rule of a run with a promise decided about its images, and the predictions of images without a question."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue
from scipy.special import expit

from cascadevlm.base.arrays import Columns
from cascadevlm.base.types import Candidate, Prediction, Scores
from cascadevlm.config.finding import FindConfig
from cascadevlm.decision.certifying import Certificate
from cascadevlm.decision.finding import Found
from cascadevlm.judges.cache import key_of
from cascadevlm.runs.certificate import UNASKED, Facts, Finding, Known, Phase, Standing, Statement
from cascadevlm.runs.run_folder import RunFolder
from cascadevlm.runs.scored_first import ScoredImages


class Outcome(ABC):
    """What a rule decided about the N readable images of a run. Images have numbers from 0 to N - 1 here.

    Args:
        phases: numbers of the images of each phase. Each image is in one phase.
        labels: `(N,)` columns, the labels without a question.
        log_odds: `(N,)`, the confidences by which the images are in order.
        names: names of the labels.

    Attributes:
        unasked: numbers of the images that the judge was not asked about.
    """

    def __init__(
        self, phases: Mapping[Phase, NDArray[np.intp]], labels: Columns, log_odds: NDArray[np.float32], names: Sequence[str]
    ) -> None:
        self.labels, self.log_odds, self.names = labels, log_odds, names
        self._phases: tuple[Phase, ...] = tuple(phases)
        self._phase = np.zeros(len(labels), dtype=np.int8)
        for number, rows in enumerate(phases.values()):
            self._phase[rows] = number
        self.unasked = np.concatenate([phases[phase] for phase in UNASKED if phase in phases])

    def standing(self, row: int) -> Standing:
        """What the rule did with an image."""
        return Standing(
            phase=self._phases[self._phase[row]],
            label=self.names[int(self.labels[row])],
            log_odds=float(self.log_odds[row]),
        )

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
        self.certificate = certificate
        phases: dict[Phase, NDArray[np.intp]] = {
            "taught": certificate.taught,
            "tested": certificate.order[certificate.drawn],
            "kept": certificate.kept,
            "asked": certificate.rest,
        }
        super().__init__(phases, certificate.labels, certificate.log_odds, names)

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
        return Facts.of(self.certificate, **_known(folder, images, folder.tally.counts["answered"]))


class Sought(Outcome):
    """The images of a class. An image that was not accepted, and that the judge gave no label to, has its most probable other
    label.

    Args:
        config: what was promised.
        result: what was found.
        names: names of the labels.
    """

    def __init__(self, config: FindConfig, result: Found, names: Sequence[str]) -> None:
        self.config, self.result = config, result
        phases: dict[Phase, NDArray[np.intp]] = {
            "taught": result.taught,
            "tested": result.order[result.drawn],
            "kept": result.kept,
            "asked": result.rest,
            "accepted": result.accepted,
        }
        super().__init__(phases, result.labels, result.log_odds, names)

    def is_rejected(self, content: Mapping[str, JsonValue]) -> bool:
        return content["label"] == self.config.label and content["decided_by"] != "judge"

    def prediction(self, row: int, candidates: tuple[Candidate, ...], scores: Scores) -> Prediction:
        standing = self.standing(row)
        return Prediction(
            label=standing.label,
            probability=float(scores.probabilities[0, int(self.labels[row])]),
            decided_by="scorer",
            candidates=candidates,
            reasons=(f"find: {'accepted' if standing.phase == 'accepted' else 'not likely to be'} {self.config.label}",),
        )

    def statement(self, folder: RunFolder, images: ScoredImages) -> Finding:
        result = self.result
        return Finding(
            **self.config.model_dump(),
            images=len(self.labels),
            taught=len(result.taught),
            tested=int(result.drawn.sum()),
            questions=len(self.labels) - len(self.unasked),
            named=len(result.named),
            accepted=len(result.accepted),
            **_known(folder, images, folder.tally.answered),
        )


def _known(folder: RunFolder, images: ScoredImages, counted: int) -> Known:
    """What a statement contains about its run.

    Args:
        folder: the folder, with all predictions.
        images: the scores of all images.
        counted: number of images with an answer of the judge that the promise counts.
    """
    return Known(
        unanswered=folder.tally.asked - counted,
        scorer=images.fingerprint,
        labels=images.labels.texts_digest,
        judge=folder.manifest.stages[0],
        identity=key_of(folder.manifest.judges[0]),
        prompt=folder.manifest.contents["stage.0.prompt"],
    )

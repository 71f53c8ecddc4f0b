"""The images of a run that people labelled, as a record: for metrics, calibrations and adapters."""

from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cascadevlm.base.errors import DataError
from cascadevlm.base.images import ImageSource, load_image, pixel_digest
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.remote import place_of
from cascadevlm.base.types import Scores
from cascadevlm.config.config import Config
from cascadevlm.decision.certified_accuracy import Accuracy, accuracy_of
from cascadevlm.decision.finding import precise_prefix
from cascadevlm.decision.guarantee import complement, require_probability
from cascadevlm.evaluation.content import Content
from cascadevlm.evaluation.metrics import Evaluation, evaluate
from cascadevlm.evaluation.record import Record, record_of
from cascadevlm.runs.corrections import random_order, read_corrections
from cascadevlm.runs.lines import Asked, JudgedLine, LabelledLine, read_lines
from cascadevlm.runs.manifest import Manifest
from cascadevlm.runs.predictions import predictions_of, require_same_row, table_of
from cascadevlm.runs.run_folder import PREDICTIONS

FEWEST = 30
"""The fewest images of a random sample. Fewer images can be the first ones of the random order by chance."""

SMALLEST = 1e-12
"""The smallest probability of a label in scores that are made of candidates."""

Embed: TypeAlias = Callable[[Config, LabelSet, list[ImageSource]], tuple[Scores, NDArray[np.bool_]]]
"""Scores n of N images, those that can be read; and says for each of N images whether it can."""


@dataclass(frozen=True, kw_only=True)
class Surest:
    """The surest labels of a run, of which enough are right.

    Attributes:
        accuracy: the least share of right labels among them.
        confidence: the least probability that this is true.
        images: number of these labels; 0 if the sample is too small to promise anything.
        labelled: number of all labels of the run.
        down_to: the lowest confidence among these labels.
    """

    accuracy: float
    confidence: float
    images: int
    labelled: int
    down_to: float

    @property
    def sentence(self) -> str:
        """The promise in words."""
        sure, right = f"{100 * self.confidence:.4g} %", f"{100 * self.accuracy:.4g} %"
        if not self.images:
            return (
                f"The random sample does not show that at least {right} of the surest labels are right. "
                "Label a larger one: cascadevlm export RUN --review 'random 400'."
            )
        return (
            f"With {sure} confidence, at least {right} of the {self.images:,} surest of {self.labelled:,} labels are right. "
            f"Their confidence is at least {self.down_to:.4f}."
        )


@dataclass(frozen=True, kw_only=True)
class Corrected:
    """The N images of a run that people labelled, without the images that show none of the labels.

    Attributes:
        record: the N images. Its scores contain only the candidates: the other labels share the remaining probability.
        paths: the names of the N images in the run, by the numbers of their predictions.
        random: ``(N,)`` booleans: the image belongs to a random sample of the run, all of whose images people looked at. It
            contains at least `FEWEST` images, or all images of the run.
        begun: people looked at the first images of the random order, and at no others. They are a random sample, which may be too
            small.
        skipped: number of images that people looked at and did not label.
        outside: number of images that show none of the labels.
        outside_labelled: number of these to which the cascade gave a label.
        confidence: mean confidence of the N predictions.
        confidences: ``(R,)`` confidences of the predictions of all readable images.
        drawn: ``(R,)`` booleans: the image belongs to the random sample.
        wrong: ``(R,)`` booleans: a person looked at the image and did not give the cascade's label. So it is true for images that
            people skipped or that show none of the labels.
        abstained: ``(R,)`` booleans: the cascade gave no label.
        candidates: number of candidates in the shortest list.
    """

    record: Record
    paths: dict[int, str]
    random: NDArray[np.bool_]
    begun: bool
    skipped: int
    outside: int
    outside_labelled: int
    confidence: float
    confidences: NDArray[np.float64]
    drawn: NDArray[np.bool_]
    wrong: NDArray[np.bool_]
    abstained: NDArray[np.bool_]
    candidates: int

    def evaluate(self) -> Evaluation:
        """The metrics of the random sample or, if there is none, of all N images. Recalls are known up to the number of
        candidates.
        """
        found = evaluate(self._measured)
        return replace(found, top_k_recall={k: recall for k, recall in found.top_k_recall.items() if k <= self.candidates})

    @property
    def _measured(self) -> Record:
        """The random sample or, if there is none, all N images."""
        return self.record.take(np.flatnonzero(self.random)) if self.random.any() else self.record

    def of_certificate(self) -> Accuracy:
        """How often the labels of a run with a certificate are right, beside the judge and beside both opinions together."""
        record = self._measured
        (judged,) = record.stages
        return accuracy_of(record.predicted, judged.asked, record.scores.log_probs, judged.answers, record.truths)

    def describe(self) -> str:
        """One or two sentences that say for which images the metrics hold."""
        labelled = f"People labelled {len(self.record):,} images"
        if self.outside:
            labelled += (
                f"; {self.outside:,} others show none of the labels, and the cascade labelled {self.outside_labelled:,} of these"
            )
        if self.skipped:
            labelled += f"; {self.skipped:,} others were skipped"
        if self.random.all():
            return f"{labelled}. These are a random sample, so the figures hold for the whole run."
        if self.random.any():
            sample = int(self.random.sum())
            return f"{labelled}. The figures are of {sample:,} of them, a random sample, and hold for the whole run."
        return (
            f"{labelled}. Their mean confidence is {self.confidence:.0%}, and {self.confidences.mean():.0%} in the whole run. "
            f"They are {self._no_sample}, so the figures hold only for these images. "
            "For the whole run, label a random sample: cascadevlm export RUN --review 'random 200'."
        )

    @property
    def _no_sample(self) -> str:
        return f"a random sample of fewer than {FEWEST} images" if self.begun else "not a random sample"

    def surest(self, accuracy: float, confidence: float) -> Surest:
        """The longest list of surest labels for which the random sample shows that enough of them are right.

        The test is exact, and needs no assumption about the confidences (`precise_prefix`). An image of the sample that people
        skipped counts as wrong.

        Raises:
            InputError: if a number is not above 0 and below 1.
            DataError: if people did not label a random sample.
        """
        require_probability("accuracy", accuracy)
        require_probability("confidence", confidence)
        if not self.drawn.any():
            raise DataError(
                f"The labels of people are {self._no_sample}, so they do not show how many labels of the run are right.",
                hint="Label a random sample: cascadevlm export RUN --review 'random 200'.",
            )
        labelled = np.flatnonzero(~self.abstained)
        order = labelled[np.argsort(-self.confidences[labelled], kind="stable")]
        share, level = complement(accuracy), complement(confidence)
        images = precise_prefix(self.drawn[order], self.wrong[order], share=share, level=level)
        return Surest(
            accuracy=accuracy,
            confidence=confidence,
            images=images,
            labelled=len(order),
            down_to=float(self.confidences[order[images - 1]]) if images else 1.0,
        )

    def scored(self, embed: Embed) -> Record:
        """The record with all scores and embeddings, from the scorer of the run without a calibration. Images that cannot be read
        any more are left out.

        Raises:
            DataError: if the table of the run contains other images than during the run.
        """
        manifest = self.record.info
        assert manifest is not None
        table = table_of(manifest.inputs, manifest.columns)
        images: list[ImageSource] = [place_of(path) for path in self.paths.values()]
        if table is not None:
            images, rows = [], table.rows(self.paths)
            for number, path in self.paths.items():
                name, image = next(rows, ("", b""))
                require_same_row(table, number, path, name)
                images.append(image)
        scores, readable = embed(Config.parse(manifest.config, name="the run"), self.record.labels, images)
        digests = tuple(pixel_digest(load_image(image)) for image, read in zip(images, readable, strict=True) if read)
        return replace(self.record.take(np.flatnonzero(readable)), scores=scores, digests=digests)


def read_corrected(folder: Path) -> Corrected:
    """The images of a run that people labelled.

    Raises:
        DataError: if nobody labelled an image of the run, or a line cannot be read.
    """
    manifest, corrections = Manifest.read(folder), read_corrections(folder)
    labels, offered = LabelSet(tuple(manifest.labels)), _offered(manifest)
    keys, seen, confidences = array("Q"), bytearray(), array("d")
    wrong, abstained = bytearray(), bytearray()
    places, paths, outside = list[int](), dict[int, str](), list[JudgedLine]()
    lines: list[LabelledLine] = []
    for number, line in read_lines(folder / PREDICTIONS, JudgedLine, predictions_of(folder, None).end):
        if not line.candidates:
            continue
        corrected = corrections.counting.get(line.key)
        if corrected is not None and corrected.label is None:
            outside.append(line)
        elif corrected is not None:
            places.append(len(keys))
            paths[number - 1] = line.path
            lines.append(_labelled(line, corrected.label, offered))
        keys.append(random_order(line.path))
        seen.append(line.key in corrections.standing)
        wrong.append(seen[-1] and (corrected is None or corrected.label != line.label))
        abstained.append(line.label is None)
        confidences.append(line.confidence)
    if not lines:
        raise DataError(
            f"Nobody labelled an image of the run in {str(folder)!r}.",
            hint="Import labels of people: cascadevlm import FILE --into RUN.",
        )
    content = Content(labels, manifest, len(lines))
    for number, labelled in enumerate(lines):
        content.add(number, labelled, labelled.truth)
    order, looked = np.array(keys), np.frombuffer(seen, dtype=np.bool_)
    drawn = random_sample(order, looked)
    return Corrected(
        record=record_of(content, _scores(lines, labels, manifest.fingerprint or "")),
        paths=paths,
        random=drawn[places],
        begun=np.array_equal(random_sample(order, looked, fewest=1), looked),
        skipped=sum(seen) - len(lines) - len(outside),
        outside=len(outside),
        outside_labelled=sum(line.label is not None for line in outside),
        confidence=float(np.array(confidences)[places].mean()),
        confidences=np.array(confidences),
        drawn=drawn,
        wrong=np.frombuffer(wrong, dtype=np.bool_),
        abstained=np.frombuffer(abstained, dtype=np.bool_),
        candidates=min(len(line.candidates) for line in lines),
    )


def _offered(manifest: Manifest) -> list[bool]:
    """For each stage, true if "none of these" was an option."""
    return [stage.offer_none for stage in Config.parse(manifest.config, name="the run").stage]


def _labelled(line: JudgedLine, truth: str | None, offered: list[bool]) -> LabelledLine:
    """The line as if the image had had a label. A run does not keep the questions, so each has the candidates of the image."""
    shown = [candidate.label for candidate in line.candidates]
    questions = [Asked(candidates=shown, prompt="", offer_none=offered[each.stage], exemplars=[]) for each in line.verdicts]
    return LabelledLine(**{**dict(line), "truth": truth, "split": "", "scores": 0, "questions": questions})


def random_sample(keys: NDArray[np.uint64], seen: NDArray[np.bool_], *, fewest: int = FEWEST) -> NDArray[np.bool_]:
    """The largest random sample all of whose images people looked at.

    It does not matter why people looked at an image: the sample consists of the first images in the random order, and ends before
    the first image that nobody looked at. A selection by confidence soon leaves out an image of this order.

    Args:
        keys: ``(N,)`` the values of `random_order`.
        seen: ``(N,)`` booleans: a person looked at the image.
        fewest: the least size of the sample, unless it is the whole run.

    Returns:
        ``(N,)`` booleans: the image belongs to the sample. All are false if the sample has fewer than ``fewest`` images and is
        not the whole run.
    """
    order = np.argsort(keys, kind="stable")
    looked = seen[order]
    size = len(looked) if looked.all() else int(looked.argmin())
    sample = np.zeros(len(keys), dtype=np.bool_)
    if size >= min(fewest, len(keys)):
        sample[order[:size]] = True
    return sample


def _scores(lines: list[LabelledLine], labels: LabelSet, fingerprint: str) -> Scores:
    """Scores with the probabilities of the candidates. Other labels share the rest, and have less than the last candidate."""
    probabilities = np.empty((len(lines), len(labels)))
    for row, line in enumerate(lines):
        shown = [labels.columns[candidate.label] for candidate in line.candidates]
        own = np.array([candidate.probability for candidate in line.candidates])
        left = (1 - own.sum()) / max(len(labels) - len(own), 1)
        probabilities[row] = min(left, own.min() / 2)
        probabilities[row, shown] = own
    log_probs = np.log(np.maximum(probabilities, SMALLEST)).astype(np.float32)
    return Scores(log_probs=log_probs, labels=labels, fingerprint=fingerprint)

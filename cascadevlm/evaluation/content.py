"""The content of the lines of labelled images, from which a record is made."""

import numpy as np

from cascadevlm.base.arrays import NOBODY
from cascadevlm.base.files import valid_text
from cascadevlm.base.image_table import About
from cascadevlm.base.labels import LabelSet
from cascadevlm.runs.lines import Asked, LabelledLine, WholeVerdict
from cascadevlm.runs.manifest import Manifest


class Content:
    """Collects the lines of N labelled images as columns and, for each stage, the image, the verdict and the question of each
    answer.
    """

    def __init__(self, labels: LabelSet, manifest: Manifest, images: int) -> None:
        self.column = labels.columns
        self.manifest = manifest
        self.names: list[str] = []
        self.digests: list[str] = []
        self.decided_by: list[str] = []
        self.about: list[About] = []
        self.truths = np.full(images, NOBODY, dtype=np.int64)
        self.predicted = np.full(images, NOBODY, dtype=np.int64)
        self.probabilities = np.full(images, np.nan)
        self.readable = np.zeros(images, dtype=bool)
        self.embedded = np.zeros(images, dtype=bool)
        self.said: list[list[tuple[int, WholeVerdict, Asked | None]]] = [[] for _ in manifest.stages]

    def add(self, number: int, line: LabelledLine, truth: str | None) -> None:
        """Add the next line, with the name of its true label."""
        self.names.append(valid_text(line.path))
        self.digests.append(line.pixels)
        self.about.append({"id": line.id, "kept": line.kept})
        self.decided_by.append(line.decided_by or "")
        self.truths[number] = self.column[truth or ""]
        self.readable[number] = bool(line.candidates)
        self.embedded[number] = line.embedding is not None
        if line.label is not None:
            self.predicted[number] = self.column[line.label]
        if line.probability is not None:
            self.probabilities[number] = line.probability
        for verdict, asked in zip(line.verdicts, line.questions, strict=True):
            self.said[verdict.stage].append((number, verdict, asked))

"""``cascadevlm demo --learn``."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import JsonValue

from cascadevlm.base.errors import InputError
from cascadevlm.base.labels import LabelSet
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.config.config import Config
from cascadevlm.decision.calibration import Calibration
from cascadevlm.evaluation.calibrating.fitting import fit_calibration
from cascadevlm.evaluation.calibrating.recipe import Recipe
from cascadevlm.evaluation.data import Data
from cascadevlm.evaluation.metrics import Interval, interval
from cascadevlm.evaluation.record import read_record
from cascadevlm.judges.cache import MemoryStore
from cascadevlm.policies.language import parse_policy
from cascadevlm.runs import bulk

LABELLED = 200
"""Number of labelled images, which calibrate all three cascades."""

IMAGES = 1000
"""Number of images that are classified, unless the caller wants another number."""

POLICY = "deferral <= 0.2"

SEED = 4
"""The seeds below draw the images of the training, of the measurements and of the plain demo."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """What one cascade did.

    Attributes:
        asked: share of the images that the judge was asked about.
        right: ``(N,)`` 1 where the prediction is right, else 0.
        believed: mean probability that the cascade gave its predictions.
    """

    asked: float
    right: NDArray[np.float64]
    believed: float

    def to_dict(self) -> dict[str, float]:
        """The figures as JSON. ``right_second_half`` is the share of right predictions among the second half of the images."""
        return {
            "asked": self.asked,
            "right": float(self.right.mean()),
            "right_second_half": float(self.right[len(self.right) // 2 :].mean()),
            "believed": self.believed,
        }


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What three cascades did with the same images.

    Attributes:
        ways: by name. "fixed" is calibrated on the labelled images; "support" has them as a support set, too; "learning" starts
            as "support" does and learns during the run.
        gain: share of right predictions of "learning" less that of "support".
        interval: 95 % interval of the gain. The images are resampled in pairs.
    """

    ways: dict[str, Way]
    gain: float
    interval: Interval

    def to_dict(self) -> dict[str, JsonValue]:
        """The figures as JSON."""
        ways: dict[str, JsonValue] = {name: dict(way.to_dict()) for name, way in self.ways.items()}
        return {"policy": POLICY, **ways, "learning_gain": self.gain, "learning_gain_interval": list(self.interval)}


def learning_figures(config: Config, labels: LabelSet, images: int, labelled: int = LABELLED) -> Compared:
    """Classify drawn birds with three cascades, which ask the judge about the same share of the images.

    Args:
        config: the cascade of the demo.
        labels: the species that were not used in training.
        images: number of images to classify, at least 2.
        labelled: number of labelled images.

    Raises:
        InputError: if there are fewer than 2 images.
    """
    if images < 2:
        raise InputError("With --learn, the demo needs at least 2 images.", hint="Give a larger number: --images 1000.")
    drawn = _drawn(labels, labelled + images)
    pictures, truths = [image for _, image in drawn], [name for name, _ in drawn]
    asking_all = config.altered({"stage.0.policy": "always"}).build(labels)
    calibration = _calibration(asking_all, pictures[:labelled], truths[:labelled])
    store = MemoryStore()
    ways = {
        name: _way(asking_all, calibration, store, pictures[labelled:], truths[labelled:], teaches=teaches, learn=learn)
        for name, teaches, learn in (("fixed", False, False), ("support", True, False), ("learning", True, True))
    }
    gains = ways["learning"].right - ways["support"].right
    return Compared(ways=ways, gain=float(gains.mean()), interval=interval(gains) or (0.0, 0.0))


def _drawn(labels: LabelSet, count: int) -> list[tuple[str, Image.Image]]:
    """Names and images of birds in random order, as many of each species as possible."""
    birds = import_module("cascadevlm_backends.aviary.birds")
    kinds = birds.species()[1]
    individuals: Iterator[tuple[int, Image.Image]] = birds.individuals(kinds, -(-count // len(labels)), SEED)
    drawn = [(str(kinds[index].name), image) for index, image in individuals]
    return [drawn[place] for place in np.random.default_rng(SEED).permutation(len(drawn))[:count]]


def _calibration(asking_all: Cascade, pictures: Sequence[Image.Image], truths: Sequence[str]) -> Calibration:
    names = tuple(str(number) for number in range(len(pictures)))
    data = Data(images=pictures, names=names, truths=tuple(truths), splits=("",) * len(pictures))
    with tempfile.TemporaryDirectory() as folder:
        bulk.run(asking_all, data, Path(folder), config={})
        return fit_calibration(read_record(Path(folder)), Recipe())


def _way(
    asking_all: Cascade,
    calibration: Calibration,
    store: MemoryStore,
    pictures: Sequence[Image.Image],
    truths: Sequence[str],
    *,
    teaches: bool,
    learn: bool,
) -> Way:
    (stage,) = asking_all.stages
    model = calibration.judges[0].model
    stage = replace(stage, policy=parse_policy(POLICY), fusion="bayes", model=model)
    known = replace(calibration, teaches=teaches)
    cascade = Cascade(
        asking_all.scorer, [stage], labels=asking_all.labels, store=store, batch_size=asking_all.batch_size,
        calibration=known, learn=learn,
    )  # fmt: skip
    predictions = cascade.classify(pictures)
    return Way(
        asked=float(np.mean([each.asked for each in predictions])),
        right=np.array([each.label == truth for each, truth in zip(predictions, truths, strict=True)], dtype=np.float64),
        believed=float(np.mean([each.probability or 0.0 for each in predictions])),
    )

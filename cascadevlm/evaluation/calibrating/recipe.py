"""What to calibrate for: the options of the command line and of Python callers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from pydantic import NonNegativeFloat, TypeAdapter, ValidationError

from cascadevlm.base.errors import InputError
from cascadevlm.base.labels import LabelSet
from cascadevlm.decision.calibration import FusionRule
from cascadevlm.decision.guarantee import require_probability
from cascadevlm.decision.scorer_calibration import Floats
from cascadevlm.evaluation.calibrating.targets import Target

PolicyMeasure = Literal["gain", "entropy", "margin", "top_probability"]
"""What the policy compares with a threshold."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to calibrate for, and on which images.

    Attributes:
        size: number of images to calibrate on, at least 1. Default: half of the readable images. The result is measured on the
            other images.
        seed: seed of the random draw of these images.
        labelled: whether the labels of the images are used. Without labels, the judge is treated as an annotator who makes
            errors.
        fusion: who decides after a question. "bayes": the scorer and the judge together; "judge": the judge alone.
        measure: what the policy for the target compares with its threshold.
        target: what the policy must reach. Default: no policy is chosen.
        target_error: the largest share of accepted answers that may be wrong, between 0 and 1. The cascade abstains from all
            other answers. Default: no guarantee.
        confidence: probability that the guarantee holds, between 0 and 1.
        coverage: probability that a conformal list of candidates contains the truth, between 0 and 1.
        class_conditional: whether every class with enough images gets its own conformal threshold.
        shares: expected share of each class by label name, in any unit. The calibration can adapt the scorer to these shares.
            Default: equal shares.

    Raises:
        InputError: if a value is out of its range, or two values contradict each other.
    """

    size: int | None = None
    seed: int = 0
    labelled: bool = True
    fusion: FusionRule = "bayes"
    measure: PolicyMeasure = "gain"
    target: Target | None = None
    target_error: float | None = None
    confidence: float = 0.95
    coverage: float = 0.95
    class_conditional: bool = False
    shares: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise InputError(f"The size of a calibration is at least 1 image, not {self.size!r}.")
        for name, value, known in (("fusion", self.fusion, FusionRule), ("measure", self.measure, PolicyMeasure)):
            if value not in get_args(known):
                raise InputError(f"There is no {name} {value!r}.", hint=f"Known: {', '.join(get_args(known))}.")
        require_probability("confidence", self.confidence)
        require_probability("coverage", self.coverage)
        if self.target_error is not None:
            require_probability("target_error", self.target_error)
            if self.fusion == "judge":
                raise InputError("A guarantee needs probabilities, and the judge's answer has none.", hint='Use fusion "bayes".')
        if self.shares is not None and not (0 < sum(self.shares.values()) < math.inf and min(self.shares.values()) >= 0):
            raise InputError("Shares of classes must not be negative, and their sum must be positive and finite.")
        if not self.labelled:
            self._require_labels_unused()

    def _require_labels_unused(self) -> None:
        if self.target is not None or self.target_error is not None:
            raise InputError(
                "Targets and guarantees need labels, because both are measured on labels.",
                hint='Remove the target, and set a policy yourself, for example "calls <= 500".',
            )
        if self.class_conditional:
            raise InputError("Conformal lists need labels.", hint="Remove class_conditional.")
        if self.shares is not None:
            raise InputError("Only a calibration with labels is matched to shares.", hint="Remove the shares.")

    @property
    def parts(self) -> int:
        """Number of equal parts of the calibration images: one fits the models, one chooses a policy, one gives a guarantee."""
        return 1 + (self.target is not None) + (self.target_error is not None)

    def prior(self, labels: LabelSet) -> Floats | None:
        """The shares as ``(C,) float64`` in the order of the label set, with sum 1; None for equal shares.

        Raises:
            InputError: if a label has no share, or a share has no label.
        """
        if self.shares is None:
            return None
        if odd := sorted(self.shares.keys() ^ set(labels.names)):
            problem = "is not a label of the record" if odd[0] in self.shares else "has no share"
            raise InputError(f"{odd[0]!r} {problem}.", hint="Give every label a share under its name.")
        shares = np.array([self.shares[name] for name in labels.names], dtype=np.float64)
        prior: Floats = shares / shares.sum()
        return prior


def read_shares(path: Path) -> dict[str, float]:
    """Shares of the classes by label name, from a JSON file with one object.

    Raises:
        InputError: if the file cannot be read, or does not contain an object of non-negative numbers.
    """
    try:
        return TypeAdapter(dict[str, NonNegativeFloat]).validate_json(path.read_bytes())
    except OSError as exc:
        raise InputError(f"{str(path)!r} cannot be read: {exc.strerror}.", hint="Check the path.") from exc
    except ValidationError as exc:
        raise InputError(
            f"{str(path)!r} does not contain shares of classes: {exc.errors()[0]['msg']}.",
            hint='Write a JSON object with one number per label name, for example {"robin": 3, "wren": 1}.',
        ) from exc

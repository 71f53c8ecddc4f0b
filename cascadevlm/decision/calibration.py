"""A calibration: what was learned about a scorer and its judges from a record. It is one readable JSON file.

A calibration is refused for another scorer, judge, prompt or label set.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from pydantic import JsonValue, TypeAdapter

from cascadevlm.base.errors import ConfigError, DataError
from cascadevlm.base.secrets import without_secrets
from cascadevlm.base.tables import read_form
from cascadevlm.base.types import Scores
from cascadevlm.decision.conformal import Conformal
from cascadevlm.decision.judge_model import JudgeModel
from cascadevlm.decision.scorer_calibration import Floats, ScorerCalibration
from cascadevlm.decision.shares import Shares
from cascadevlm.decision.teaching import Labelled, Taught

FusionRule = Literal["judge", "bayes"]
"""Who decides after a question: "judge" takes the judge's answer; "bayes" takes the more probable label after the judge's answer,
by Bayes' rule with the model of the judge."""

FUSION_RULES: dict[str, FusionRule] = {rule: rule for rule in get_args(FusionRule)}
"""The fusion rules by their names."""

SETTINGS = ("judge", "prompt", "offer_none", "support", "votes", "options")
"""Keys of a stage's configuration that change the judge's answers, without the keys of the candidates."""


WORDING = {"templates": "templates", "texts": "texts for the labels", "adapter": "settings of the adapter"}
"""Parts of a scorer's fingerprint that do not identify its model, and their names in messages."""

SAME_WORDING = "Use what the calibration was made with, or calibrate again: cascadevlm calibrate."


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Mean and standard deviation of a number over the ``images`` of a calibration. Drift compares other images with them."""

    images: int
    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Floats) -> "Reference":
        """The reference of ``(N,)`` numbers, one per image."""
        return cls(images=len(values), mean=float(values.mean()), deviation=float(values.std()))


@dataclass(frozen=True, kw_only=True)
class CalibratedJudge:
    """The model of a judge, and the judge's settings.

    Attributes:
        judge: the judge as ``backend:model``.
        settings: the settings of the stage that change the judge's answers (`SETTINGS`); empty for records made of arrays.
        model: how the judge chooses.
        log_likelihood: mean cross-validated log-likelihood of the truth after the judge's answers, in nats; None without labels.
        gain: the foretold gain: how many more predictions per image are right after the judge's answers than before, by
            cross-validation, and the standard error of this number; None without labels.
        best_size: the number of candidates with the highest expected accuracy, by the model.
        reference: mean and deviation of one number per answer: 1 if the answer is the most probable candidate and 0 if not,
            minus the model's probability of this. The mean is not exactly 0, because the priors shrink the model.
    """

    judge: str
    settings: dict[str, JsonValue]
    model: JudgeModel
    best_size: int
    reference: Reference
    log_likelihood: float | None = None
    gain: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was learned about a scorer and its judges.

    Attributes:
        labels: names of the C labels, in column order.
        fingerprint: the fingerprint of the scorer that the calibration is for.
        scorer: the calibration of this scorer's log-probabilities.
        judges: one calibrated judge per stage.
        images: number of images that the models were fitted on.
        labelled: whether the labels of the images were used. If not, the judge was treated as an annotator who makes errors.
        fitted_on: digests of all images that were used, or their names if the record has no digests. These images are left out
            when the result is measured.
        conformal: the rule for lists of candidates with a coverage; None without labels.
        reference: the scorer's probability of its best label, by calibrations fitted on the other folds; None without labels.
        support: the labelled images with their embeddings, for scores with embeddings; None without embeddings or labels. A run
            that learns starts from these images.
        teaches: whether calibrated scores use what these images teach about the embeddings.
        shares: estimated shares of the classes among the images.
        descriptions: digest of the labels' descriptions, which the judges saw; empty if there were none.
        policy: the policy that was chosen for a target; None without a target.
        fusion: who decides after a question.
        accept: the lowest probability of an accepted label, if there is a guarantee. The cascade abstains below it.
        promised_with: the settings for which the guarantee is valid: policy, fusion, ``follow_shares``, and the settings of the
            stage that decide about candidates.
        figures: figures of the scorer and the cascade with and without calibration, on images that nothing was fitted on.
        made: time of the calibration.
        format: version of the file format.

    Raises:
        ValueError: if the labelled images are missing or are of other labels.
    """

    labels: tuple[str, ...]
    fingerprint: str
    scorer: ScorerCalibration
    judges: tuple[CalibratedJudge, ...]
    images: int
    labelled: bool
    fitted_on: tuple[str, ...]
    shares: Shares
    conformal: Conformal | None = None
    reference: Reference | None = None
    support: Labelled | None = None
    teaches: bool = False
    descriptions: str = ""
    policy: str | None = None
    fusion: FusionRule = "bayes"
    accept: float | None = None
    promised_with: dict[str, JsonValue] = field(default_factory=dict)
    figures: dict[str, JsonValue] = field(default_factory=dict)
    made: datetime = field(default_factory=lambda: datetime.now(UTC))
    format: Literal[1] = 1

    def __post_init__(self) -> None:
        if self.teaches and self.support is None:
            raise ValueError("there are no labelled images that teach")
        if self.support is not None and self.support.fit.held_out.shape[1] != len(self.labels):
            raise ValueError("the labelled images are of other labels")

    @cached_property
    def calibrated_fingerprint(self) -> str:
        """The fingerprint of calibrated scores."""
        calibrated = f"{self.fingerprint}|calibrated={_digest(TypeAdapter(ScorerCalibration).dump_json(self.scorer))}"
        return f"{calibrated}|support={self.support_digest}" if self.teaches else calibrated

    @cached_property
    def support_digest(self) -> str:
        """The digest of all that `support` is made of: part of the fingerprint of scores that use what was learned from it."""
        return _digest(TypeAdapter(Labelled | None).dump_json(self.support))

    @cached_property
    def taught(self) -> Taught | None:
        """What the labelled images teach; None if `teaches` is false."""
        return self.support.taught(self.support.nothing()) if self.teaches and self.support is not None else None

    def calibrated(self, scores: Scores) -> Scores:
        """The scores with calibrated probabilities. Scores that this calibration made are returned unchanged.

        Raises:
            ConfigError: if the scores have another scorer, label set or descriptions of the labels, or if the labelled images
                teach and the scores have no embeddings.
        """
        if scores.labels.names != self.labels:
            raise ConfigError(
                f"The calibration was made for {len(self.labels)} labels that differ from these in their names or order.",
                hint="Make a calibration for this label set: cascadevlm calibrate.",
            )
        if scores.labels.descriptions_digest != self.descriptions:
            raise ConfigError("The calibration was made with other descriptions of the labels.", hint=SAME_WORDING)
        if scores.fingerprint == self.calibrated_fingerprint:
            return scores
        if scores.fingerprint != self.fingerprint:
            raise _of_another_scorer(self.fingerprint, scores.fingerprint)
        log_probs = self.scorer(scores.log_probs) if self.taught is None else self._supported(self.taught, scores)
        return replace(scores, log_probs=log_probs.astype(np.float32), fingerprint=self.calibrated_fingerprint)

    def _supported(self, taught: Taught, scores: Scores) -> Floats:
        """`(N, C)` log-probabilities by what the labelled images teach."""
        if scores.embeddings is None:
            raise ConfigError(
                "The calibration uses its labelled images as a support set, which needs embeddings, and these scores have none.",
                hint="Use the scorer of the calibration. Or delete embeddings.npy in the record, and calibrate again.",
            )
        return taught(scores.log_probs, scores.embeddings)

    def judge_of(self, stage: int, settings: Mapping[str, JsonValue]) -> CalibratedJudge:
        """The calibrated judge of a stage.

        Args:
            stage: number of the stage, from 0.
            settings: the stage's settings from the configuration.

        Raises:
            ConfigError: if the calibration has no such stage, or was made with another judge, prompt or other settings.
        """
        hint = "Make a calibration for this judge: cascadevlm calibrate."
        if stage >= len(self.judges):
            raise ConfigError(
                f"The calibration has {len(self.judges)} judges, and the configuration has a stage {stage + 1}.", hint=hint
            )
        known, shown = self.judges[stage], without_secrets(settings)
        for name, value in known.settings.items():
            if (given := shown.get(name)) != value:
                raise ConfigError(
                    f"The calibration was made with {name} = {value!r}, and the configuration has {given!r}.", hint=hint
                )
        return known

    def require_promised(self, given: Mapping[str, JsonValue]) -> None:
        """Refuse settings that the guarantee was not made for.

        Raises:
            ConfigError: if a setting differs. The message names the first one.
        """
        for name, value in self.promised_with.items():
            if given[name] != value:
                raise ConfigError(
                    f"The guarantee was made for {name} = {value!r}, and the configuration has {given[name]!r}.",
                    hint="Change the setting, calibrate again, or set accept yourself, without a guarantee.",
                )

    def conformal_for(self, coverage: float) -> Conformal:
        """The rule for lists with a coverage.

        Raises:
            ConfigError: if the calibration has no rule, or a rule for another coverage.
        """
        if self.conformal is None or self.conformal.coverage != coverage:
            known = "no coverage" if self.conformal is None else f"a coverage of {self.conformal.coverage:g}"
            raise ConfigError(
                f"The calibration was made for {known}, and the configuration has a coverage of {coverage:g}.",
                hint=f"Calibrate with labels: cascadevlm calibrate RUN --coverage {coverage:g}.",
            )
        return self.conformal

    def write(self, path: Path) -> None:
        """Write the calibration as JSON.

        Raises:
            DataError: if the file cannot be written.
        """
        try:
            path.write_bytes(_ADAPTER.dump_json(self, indent=2) + b"\n")
        except OSError as exc:
            raise DataError(
                f"{str(path)!r} cannot be written: {exc.strerror}.",
                hint="Check the path, its permissions and the free space on the disk.",
            ) from exc


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _of_another_scorer(known: str, given: str) -> ConfigError:
    """The error for different fingerprints. If only the texts of the scorer differ, the message says so."""
    parts = {part.partition("=")[0] for part in {*known.split("|")} ^ {*given.split("|")}}
    if parts <= WORDING.keys():
        wording = " and ".join(words for part, words in WORDING.items() if part in parts)
        return ConfigError(f"The calibration was made with other {wording}.", hint=SAME_WORDING)
    return ConfigError(
        f"The calibration was made for the scorer {known!r}, and this scorer is {given!r}.",
        hint="Make a calibration for this scorer: cascadevlm calibrate.",
    )


_ADAPTER = TypeAdapter(Calibration)


def read_calibration(path: Path) -> Calibration:
    """Read a calibration from its JSON file.

    Raises:
        ConfigError: if the file cannot be read, or is not a calibration.
    """
    return read_form(path, _ADAPTER, name="calibration", again="Make a calibration: cascadevlm calibrate.")

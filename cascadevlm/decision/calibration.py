"""What was learned of a scorer and its judges from a record, in one readable JSON file that other models are refused with."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from pydantic import JsonValue, TypeAdapter, ValidationError

from cascadevlm.base.errors import ConfigError, DataError
from cascadevlm.base.secrets import without_secrets
from cascadevlm.base.types import Scores
from cascadevlm.decision.conformal import Conformal
from cascadevlm.decision.judge_model import JudgeModel
from cascadevlm.decision.scorer_calibration import Floats, ScorerCalibration
from cascadevlm.decision.shares import Shares

FusionRule = Literal["judge", "bayes"]
"""Who decides after a question: "judge" takes the judge's answer; "bayes" takes the more probable label after the judge's answer,
by Bayes' rule with the model of the judge."""

FUSION_RULES: dict[str, FusionRule] = {rule: rule for rule in get_args(FusionRule)}
"""By name."""

SETTINGS = ("judge", "prompt", "offer_none", "support", "votes", "options")
"""Of a stage's configuration: what changes the judge's answers, beside the candidates."""


WORDING = {"templates": "templates", "texts": "texts for the labels", "adapter": "settings of the adapter"}
"""Parts of a scorer's fingerprint that do not name its model, in words."""

SAME_WORDING = "Give those that it was made with, or make one for these: cascadevlm calibrate."


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A number over the ``images`` of a calibration, to hold other images against: its mean and standard deviation."""

    images: int
    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Floats) -> "Reference":
        """Of N images."""
        return cls(images=len(values), mean=float(values.mean()), deviation=float(values.std()))


@dataclass(frozen=True, kw_only=True)
class CalibratedJudge:
    """A judge's model and what the judge was.

    Attributes:
        judge: its spec.
        settings: of its stage, as far as they change its answers (`SETTINGS`); empty for records made of arrays.
        model: how it chooses.
        log_likelihood: mean cross-validated log-likelihood of the truth after its answers, in nats; None without labels.
        best_size: how many candidates to show that the expected accuracy is highest, of `SIZES`, by the model.
        reference: whether it named the likeliest candidate, 1 or 0, less the model's probability of that: a model that shrinks
            what it learns can be some points off on average.
    """

    judge: str
    settings: dict[str, JsonValue]
    model: JudgeModel
    best_size: int
    reference: Reference
    log_likelihood: float | None = None


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The decision layer's knowledge.

    Attributes:
        labels: names of the C labels, in column order.
        fingerprint: of the scorer that it holds for.
        scorer: makes that scorer's log-probabilities calibrated.
        judges: of every stage.
        images: how many it was fitted on.
        labelled: whether their truths were known; if not, the judge was taken for a noisy annotator.
        fitted_on: digests of these images (names, where a record has none), so that they can be left out where the outcome is
            measured.
        conformal: how long lists of candidates must be for a coverage; None without labels.
        reference: the scorer's probability of its best label, calibrated on the other images each time; None without labels.
        shares: of the classes among its images, as the calibrated scorer has them.
        descriptions: digest of the labels' descriptions, which the judges were shown; empty where there were none.
        policy: when to ask, if it was chosen for a target.
        fusion: whose word is final.
        accept: the least probable label that is not abstained from, if an error was to be guaranteed.
        promised_with: what the guarantee holds with: policy, fusion, whether shares are followed and, of the stage, what decides
            who is asked about what.
        figures: what was measured when it was fitted: before and after calibration, and on held-out images.
        made: when.
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
    descriptions: str = ""
    policy: str | None = None
    fusion: FusionRule = "bayes"
    accept: float | None = None
    promised_with: dict[str, JsonValue] = field(default_factory=dict)
    figures: dict[str, JsonValue] = field(default_factory=dict)
    made: datetime = field(default_factory=lambda: datetime.now(UTC))
    format: Literal[1] = 1

    @cached_property
    def calibrated_fingerprint(self) -> str:
        """What calibrated scores have instead of the scorer's own."""
        digest = hashlib.sha256(TypeAdapter(ScorerCalibration).dump_json(self.scorer)).hexdigest()[:12]
        return f"{self.fingerprint}|calibrated={digest}"

    def calibrated(self, scores: Scores) -> Scores:
        """The scores with calibrated probabilities; themselves, if they are.

        Raises:
            ConfigError: if they are of another scorer or label set, or of labels that are described otherwise.
        """
        if scores.labels.names != self.labels:
            raise ConfigError(
                f"The calibration is of {len(self.labels)} other labels, or of these in another order.",
                hint="Make one for this label set: cascadevlm calibrate.",
            )
        if scores.labels.descriptions_digest != self.descriptions:
            raise ConfigError("The calibration was made with other descriptions of the labels.", hint=SAME_WORDING)
        if scores.fingerprint == self.calibrated_fingerprint:
            return scores
        if scores.fingerprint != self.fingerprint:
            raise _of_another_scorer(self.fingerprint, scores.fingerprint)
        log_probs = self.scorer(scores.log_probs).astype(np.float32)
        return replace(scores, log_probs=log_probs, fingerprint=self.calibrated_fingerprint)

    def judge_of(self, stage: int, settings: Mapping[str, JsonValue]) -> CalibratedJudge:
        """A stage's judge.

        Args:
            stage: its number, from 0 on.
            settings: of the stage, as its configuration has them.

        Raises:
            ConfigError: if there is none, or it is of another judge, prompt or options.
        """
        hint = "Make one for this judge: cascadevlm calibrate."
        if stage >= len(self.judges):
            raise ConfigError(f"The calibration knows {len(self.judges)} judges, not {stage + 1}.", hint=hint)
        known, shown = self.judges[stage], without_secrets(settings)
        for name, value in known.settings.items():
            if (given := shown.get(name)) != value:
                raise ConfigError(f"The calibration is of {name} {value!r}, not of {given!r}.", hint=hint)
        return known

    def require_promised(self, given: Mapping[str, JsonValue]) -> None:
        """Refuse what the guarantee was not fitted with.

        Raises:
            ConfigError: naming the first difference.
        """
        for name, value in self.promised_with.items():
            if given[name] != value:
                raise ConfigError(
                    f"The guarantee is for {name} {value!r}, not for {given[name]!r}.",
                    hint="Take that, calibrate again, or set accept yourself, without a guarantee.",
                )

    def conformal_for(self, coverage: float) -> Conformal:
        """The rule for a coverage.

        Raises:
            ConfigError: if there is none, or it is for another.
        """
        if self.conformal is None or self.conformal.coverage != coverage:
            known = "no coverage" if self.conformal is None else f"a coverage of {self.conformal.coverage:g}"
            raise ConfigError(
                f"The calibration is for {known}, not for {coverage:g}.", hint=f"cascadevlm calibrate RUN --coverage {coverage:g}"
            )
        return self.conformal

    def write(self, path: Path) -> None:
        """Write the file.

        Raises:
            DataError: if it cannot be written.
        """
        try:
            path.write_bytes(_ADAPTER.dump_json(self, indent=2) + b"\n")
        except OSError as exc:
            raise DataError(f"{str(path)!r} cannot be written: {exc.strerror}.") from exc


def _of_another_scorer(known: str, given: str) -> ConfigError:
    """What to raise where fingerprints differ; a difference in wording alone is named."""
    parts = {part.partition("=")[0] for part in {*known.split("|")} ^ {*given.split("|")}}
    if parts <= WORDING.keys():
        wording = " and ".join(words for part, words in WORDING.items() if part in parts)
        return ConfigError(f"The calibration was made with other {wording}.", hint=SAME_WORDING)
    return ConfigError(
        f"The calibration is of the scorer {known!r}, not of {given!r}.", hint="Make one for this scorer: cascadevlm calibrate."
    )


_ADAPTER = TypeAdapter(Calibration)


def read_calibration(path: Path) -> Calibration:
    """Read the file.

    Raises:
        ConfigError: if it is none.
    """
    try:
        return _ADAPTER.validate_json(path.read_bytes())
    except OSError as exc:
        raise ConfigError(f"Calibration {str(path)!r} cannot be read: {exc.strerror}.") from exc
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{str(path)!r} is no calibration: {where}: {first['msg']}.") from exc

"""What was learned of a scorer and its judges from a record, in one readable JSON file that other models are refused with."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue, TypeAdapter, ValidationError

from cascadevlm.base.errors import ConfigError, DataError
from cascadevlm.base.secrets import without_secrets
from cascadevlm.base.types import Scores
from cascadevlm.cascade.candidates import TopK
from cascadevlm.decision.conformal import Conformal, best_size
from cascadevlm.decision.judge_fit import fit_judge
from cascadevlm.decision.judge_model import NONE_CHOSEN, Answers, JudgeModel
from cascadevlm.decision.pool import Pool, fit_pool
from cascadevlm.decision.scorer_calibration import Floats, ScorerCalibration, fit_scorer
from cascadevlm.decision.shares import Shares
from cascadevlm.decision.without_labels import fit_without_labels
from cascadevlm.evaluation.record import NOBODY, Columns, Fused, Judged, Record

FusionRule = Literal["judge", "bayes", "weighted"]
"""Whose word is final: the judge's where it gave an answer, or the more probable label by both, by the model of the judge or by
one weight."""

FUSION_RULES: dict[str, FusionRule] = {rule: rule for rule in get_args(FusionRule)}
"""By name."""

SETTINGS = ("judge", "prompt", "offer_none", "support", "votes", "options")
"""Of a stage's configuration: what changes the judge's answers, beside the candidates."""

BESIDE = "calibration.json"
"""What the file is called in the folder of a record."""

COVERAGE = 0.95
"""How often a list of candidates shall hold the truth, unless said otherwise."""

WORDING = {"templates": "templates", "texts": "texts for the labels"}
"""Parts of a scorer's fingerprint that name what it was prompted with, in words."""

SAME_WORDING = "Give those that it was made with, or make one for these: cascadevlm calibrate."

SIZES = range(2, 11)
"""Lengths of the list of candidates that are tried."""

FEWEST = 20
"""Fewer images tell too little of a scorer and a judge."""


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
        pool: how much its opinion counts where opinions are weighted.
        log_likelihoods: mean cross-validated log-likelihood of the truth in nats, by the rule of fusion; None without labels.
        best_size: how many candidates to show that the expected accuracy is highest, of `SIZES`, by the model.
        reference: whether it named the likeliest candidate, 1 or 0, less the model's probability of that: a model that shrinks
            what it learns can be some points off on average.
    """

    judge: str
    settings: dict[str, JsonValue]
    model: JudgeModel
    pool: Pool
    best_size: int
    reference: Reference
    log_likelihoods: dict[FusionRule, float] | None = None

    def fuser(self, fusion: FusionRule) -> JudgeModel | Pool:
        """What learns from its answers."""
        return self.pool if fusion == "weighted" else self.model


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


def calibration_beside(folder: Path) -> Calibration | None:
    """The calibration that lies in a record's folder.

    Raises:
        ConfigError: if there is a file of its name that is none.
    """
    path = folder / BESIDE
    return read_calibration(path) if path.exists() else None


def answers_of(judged: Judged) -> Answers:
    """What a record's stage was shown and said, as a model of the judge takes it."""
    answers = np.where(np.array(judged.outcomes, dtype=str) == "none", NONE_CHOSEN, judged.answers)
    return Answers(
        candidates=judged.candidates,
        answers=answers,
        none_offered=judged.none_offered,
        probabilities=judged.probabilities,
    )


def heard(judged: Judged) -> NDArray[np.bool_]:
    """N: whether the judge was asked and what came of it says something; errors and spent budgets do not."""
    return judged.asked & np.isin(judged.outcomes, ["answered", "none", "refused", "unparsed"])


def fit_calibration(
    record: Record,
    *,
    labelled: bool = True,
    fusion: FusionRule = "bayes",
    coverage: float = COVERAGE,
    class_conditional: bool = False,
    prior: Floats | None = None,
    blank: Answers | None = None,
) -> Calibration:
    """Learn from a record how far to trust its scorer and its judges.

    Args:
        record: its images that could be read are used.
        labelled: whether to look at the truths; without, the judge is the annotator.
        coverage: of the conformal sets. They are fitted on what the scorer's calibrations on other folds say of each image, which
            holds the promise closely, not strictly.
        class_conditional: whether they shall hold the truth so often for every class that has enough images.
        prior: C shares of the classes, for calibrations that match them; even, unless given.
        blank: of the last judge, about an image without content; only looked at where there are labels.

    Raises:
        InputError: if the images cannot promise the coverage.
        DataError: if there is no judge, or one answered about too few images; if the scores are calibrated already; without
            labels, if there are several stages.
    """
    record = record.take(np.flatnonzero(record.readable))
    if "|calibrated=" in record.scores.fingerprint:
        raise DataError("The record's scores are calibrated already.", hint="Evaluate without a calibration.")
    asked = min(int(heard(judged).sum()) for judged in (record.judged, *record.stages))
    if asked < FEWEST:
        raise DataError(f"A judge answered about {asked} images, too few to calibrate on.", hint=f"Ask about {FEWEST} or more.")
    log_probs, conformal, reference = record.scores.log_probs, None, None
    if labelled:
        responsibilities = np.eye(len(record.labels))[record.truths]
        scorer, belief = fit_scorer(log_probs, responsibilities, prior=prior)
        conformal = Conformal.fit(np.exp(belief), record.truths, coverage=coverage, class_conditional=class_conditional)
        reference = Reference.of(np.exp(belief.max(axis=1)))
    else:
        if len(record.stages) != 1:
            raise DataError(f"Without labels, one judge is the annotator: the record has {len(record.stages)} stages.")
        known = heard(record.judged)
        answers = answers_of(record.stages[0])
        scorer, model = fit_without_labels(log_probs[known], answers.rows(known))
        belief = scorer(log_probs)
        responsibilities = np.exp(model.posterior(belief, answers))
    judges, weighted = [], belief.copy()
    for number, judged in enumerate(record.stages):
        known, likelihoods = heard(judged), None
        before, truth, answers = belief[known], responsibilities[known], answers_of(judged).rows(known)
        pool, weighted[known] = fit_pool(weighted[known], truth, answers)
        if labelled:
            own_blank = blank if judged is record.judged else None
            model, belief[known] = fit_judge(before, truth, answers, blank=own_blank)
            beliefs: dict[FusionRule, Floats] = {"bayes": belief, "weighted": weighted}
            likelihoods = {rule: float((truth * after[known]).sum(axis=1).mean()) for rule, after in beliefs.items()}
        sizes = [size for size in SIZES if size <= len(record.labels)] or [1]
        agreed, likely = model.agreement(before, answers)
        judges.append(
            CalibratedJudge(
                judge=judged.judge,
                settings=settings_of(record, number, SETTINGS),
                model=model,
                pool=pool,
                log_likelihoods=likelihoods,
                best_size=best_size(before, model, sizes, none_offered=judged.none_offered, word_final=fusion == "judge"),
                reference=Reference.of(agreed - likely),
            )
        )
    return Calibration(
        labels=record.labels.names,
        fingerprint=record.scores.fingerprint,
        scorer=scorer,
        judges=tuple(judges),
        images=len(record),
        labelled=labelled,
        fitted_on=images_of(record),
        conformal=conformal,
        reference=reference,
        shares=Shares.of(np.exp(scorer(log_probs))),
        descriptions=record.labels.descriptions_digest,
        fusion=fusion,
    )


def decided(record: Record, calibration: Calibration) -> Record:
    """The record as the decision layer sees it: calibrated scores, and what scorer and judges say together.

    Its measures are then those of calibrated probabilities; policies of gain can be tried on it. The candidates are those that
    were shown, though a calibrated scorer might have shown others; of images that the judge was not asked about, those that are
    likeliest, as many as in the longest list.

    Raises:
        ConfigError: if the calibration is of another scorer, label set, number of stages, judge or prompt, or has no weights that
            its fusion wants.
    """
    if len(record.stages) != len(calibration.judges):
        raise ConfigError(f"The calibration is of {len(calibration.judges)} judges, the record of {len(record.stages)}.")
    scores = calibration.calibrated(record.scores)
    before = belief = scores.log_probs.astype(np.float64)
    for number, (judge, judged) in enumerate(zip(calibration.judges, record.stages, strict=True)):
        if settings := settings_of(record, number, SETTINGS):
            calibration.judge_of(number, settings)
        before, known = belief, heard(judged)
        belief = np.where(known[:, None], judge.fuser(calibration.fusion).posterior(before, answers_of(judged)), before)
    last, answers = calibration.judges[-1], answers_of(record.judged)
    labels, probabilities = belief.argmax(axis=1), np.exp(belief.max(axis=1))
    word_final = calibration.fusion == "judge"
    if word_final:
        answered = record.judged.answers != NOBODY
        labels = np.where(answered, record.judged.answers, scores.log_probs.argmax(axis=1))
        own = np.full(answers.candidates.shape, np.nan) if answers.probabilities is None else answers.probabilities
        of_answer = np.where(answers.candidates == answers.answers[:, None], own, 0.0).sum(axis=1)
        probabilities = np.where(answered, of_answer, scores.probabilities.max(axis=1))
    candidates = _shown_if_asked(answers.candidates, replace(scores, log_probs=before.astype(np.float32)))
    fused = Fused(
        labels=np.where(record.readable, labels, NOBODY),
        probabilities=probabilities,
        gain=last.model.gain(before, candidates, none_offered=answers.none_offered, word_final=word_final),
        word_final=word_final,
    )
    return replace(record, scores=scores, fused=fused)


def _shown_if_asked(shown: Columns, scores: Scores) -> Columns:
    """N x K: what was shown; where nothing was, the likeliest labels."""
    if not shown.shape[1]:
        return TopK().columns(scores)
    likeliest = TopK(k=shown.shape[1]).columns(scores)
    return np.where((shown == NOBODY).all(axis=1, keepdims=True), likeliest, shown)


def held_out(record: Record, calibration: Calibration) -> Record:
    """The record of the images that the calibration was not fitted on.

    Raises:
        DataError: if there are none.
    """
    rows = np.flatnonzero(~np.isin(images_of(record), calibration.fitted_on))
    if not len(rows):
        raise DataError("The calibration was fitted on every image of the record.", hint="Evaluate on others.")
    return record.take(rows)


def images_of(record: Record) -> tuple[str, ...]:
    """What tells the images of a record from others: digests, or their names in a record made of arrays."""
    return record.digests or record.names


def settings_of(record: Record, stage: int, names: Collection[str]) -> dict[str, JsonValue]:
    """Some of a stage's settings, as the record's configuration has them; none of a record made of arrays."""
    stages = record.info.config.get("stage") if record.info else None
    settings = stages[stage] if isinstance(stages, list) else None
    return {name: settings[name] for name in names if name in settings} if isinstance(settings, dict) else {}

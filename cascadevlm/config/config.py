"""Validates the configuration, one TOML file, and builds a cascade from it."""

import reprlib
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    JsonValue,
    PlainValidator,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from cascadevlm.base.bounds import Count, Mass, Natural, Probability, require_number
from cascadevlm.base.entry_points import nearest
from cascadevlm.base.errors import ConfigError, InputError
from cascadevlm.base.labels import LabelSet
from cascadevlm.cascade.candidates import CandidateRule, ConformalSet, CumulativeMass, Order, TopK
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.cascade.item import OnFailure
from cascadevlm.cascade.stage import Stage
from cascadevlm.config.agreement import AgreementConfig, require_certifiable
from cascadevlm.config.audit import AuditConfig
from cascadevlm.config.finding import FindConfig
from cascadevlm.config.loading import load_judge, load_prompt
from cascadevlm.config.scorer import ScorerConfig
from cascadevlm.config.section import MayChange, Options, Section
from cascadevlm.decision.calibration import Calibration, FusionRule, read_calibration
from cascadevlm.judges.budget import Ledger
from cascadevlm.judges.cache import DiskStore, VerdictStore, default_cache_folder
from cascadevlm.judges.support import SupportSet
from cascadevlm.policies.language import parse_policy
from cascadevlm.scorers.base import EmbeddingScorer, Scorer
from cascadevlm.scorers.kept import CachedEmbeddings, kept_labels
from cascadevlm.scorers.several import SeveralScorers

_CALIBRATE = 'Make a calibration with cascadevlm calibrate, and set calibration = "FILE".'
_KEY_PATH = "Write the key as a path, such as stage.0.judge."

AnyCascade = TypeVar("AnyCascade", bound=Cascade)

_SHORT = reprlib.Repr()
"""Writes values in Python notation. Deeply nested and long values are shortened."""
_SHORT.maxstring = _SHORT.maxother = 80


_BY_IDENTITY = MayChange("the manifest contains the identity of the judge")
_BY_DIGEST = MayChange("the manifest contains a digest of the content")


def _size(value: JsonValue) -> JsonValue:
    if value is None or value == "best":
        return value
    try:
        require_number("k", value, Count)
    except InputError as exc:
        raise PydanticCustomError("size", 'Input should be a whole number of at least 1, or "best"') from exc
    return value


class CandidatesConfig(Section):
    """``candidates = {…}``: the number of candidates and their order. One of ``k``, ``mass`` and ``coverage`` is required.

    Attributes:
        k: number of candidates. "best" means the number that the calibration found best.
        mass: the candidates are the best labels whose probabilities together reach this value.
        coverage: the list of candidates contains the true label with this probability, according to the calibration.
        minimum: minimum number of candidates, for ``mass`` and ``coverage``.
        maximum: maximum number of candidates, for ``mass`` and ``coverage``.
        order: the order in which the judge sees the candidates.
        seed: seed of a random order.
    """

    k: Annotated[int | Literal["best"] | None, PlainValidator(_size)] = None
    mass: Mass | None = None
    coverage: Annotated[float, Field(gt=0, lt=1)] | None = None
    minimum: Count | None = None
    maximum: Count | None = None
    order: Order = "ranked"
    seed: int = 0

    def build(self, calibration: Calibration | None, stage: int) -> CandidateRule:
        """The rule for a stage. The first stage has the number 0.

        Raises:
            ConfigError: if not exactly one of ``k``, ``mass`` and ``coverage`` is set, if ``minimum`` or ``maximum`` is set with
                ``k``, or if ``coverage`` or ``k = "best"`` is set without a calibration.
        """
        if [self.k, self.mass, self.coverage].count(None) != 2:
            raise ConfigError(
                "candidates needs exactly one of k, mass and coverage.", hint="For example: candidates = { mass = 0.95 }."
            )
        given = {"minimum": self.minimum, "maximum": self.maximum}
        bounds = {name: bound for name, bound in given.items() if bound is not None}
        if self.k is not None and bounds:
            raise ConfigError(
                f"candidates with k cannot have {' or '.join(bounds)}.", hint="Remove it, or use mass or coverage in place of k."
            )
        if self.k == "best":
            if calibration is None:
                raise ConfigError('candidates = "best" needs a calibration.', hint=_CALIBRATE)
            return TopK(k=calibration.judges[stage].best_size, order=self.order, seed=self.seed)
        if self.k is not None:
            return TopK(k=self.k, order=self.order, seed=self.seed)
        if self.mass is not None:
            return CumulativeMass(mass=self.mass, **bounds, order=self.order, seed=self.seed)
        assert self.coverage is not None
        if calibration is None:
            raise ConfigError("candidates with a coverage need a calibration.", hint=_CALIBRATE)
        rule = calibration.conformal_for(self.coverage)
        return ConformalSet(rule=rule, **bounds, order=self.order, seed=self.seed)

    def frozen(self, built: CandidateRule) -> Self:
        """This section. The number of candidates of the built rule replaces ``k = "best"``."""
        return self.model_copy(update={"k": built.most()}) if self.k == "best" else self


def _k_alone(value: JsonValue) -> JsonValue:
    """Read ``candidates = 5`` as ``candidates = { k = 5 }``, and ``candidates = "best"`` as ``candidates = { k = "best" }``."""
    return {"k": value} if isinstance(value, int | float | str) else value


class SupportConfig(Section):
    """``support = {…}``: reference images for the judge.

    Attributes:
        folder: a folder with one sub-folder of images per class.
        shots: number of images per class that are shown to the judge.
    """

    folder: Annotated[Path, _BY_DIGEST]
    shots: Count = 1

    def read(self, labels: LabelSet) -> SupportSet:
        """Read the support set.

        Raises:
            InputError: if the folder has no image of any label.
        """
        return SupportSet.read(self.folder, labels, shots=self.shots)


class StageConfig(Section):
    """``[[stage]]``: a judge, and when and how it is asked.

    Attributes:
        judge: the spec, ``backend:model``.
        policy: the policy in string form. Default: the policy of the calibration or, without a calibration, "always".
        candidates: which candidates the judge sees. Default: the 5 best.
        prompt: name of a prompt, or path of a prompt file.
        offer_none: True to offer "none of these" as an option.
        support: reference images. Default: no reference images.
        votes: number of questions per image. Each question has another order of candidates.
        widen: maximum number of further questions, about the next candidates, after the answer "none of these".
        options: options of the backend.
    """

    judge: str
    policy: str | None = None
    candidates: Annotated[CandidatesConfig, BeforeValidator(_k_alone)] = CandidatesConfig(k=5)
    prompt: str = "select"
    offer_none: bool = False
    support: SupportConfig | None = None
    votes: Count = 1
    widen: Natural = 0
    options: Annotated[Options, _BY_IDENTITY] = Field(default_factory=dict)

    def build(self, labels: LabelSet, calibration: Calibration | None, number: int, fusion: FusionRule) -> Stage:
        """The stage. Its judge is not loaded yet.

        Raises:
            InputError: if a spec, a policy, a prompt or the candidates are wrong, or if the calibration belongs to another judge.
        """
        policy = self.policy or (calibration.policy if calibration else None) or "always"
        known = calibration.judge_of(number, self.model_dump(mode="json")) if calibration else None
        return Stage(
            judge=load_judge(self.judge, **self.options),
            prompt=load_prompt(self.prompt),
            policy=parse_policy(policy),
            candidates=self.candidates.build(calibration, number),
            offer_none=self.offer_none,
            support=self.support.read(labels) if self.support else None,
            fusion=fusion,
            model=known.model if known else None,
            votes=self.votes,
            widen=self.widen,
        )

    def questions_of(self, stage: Stage, labels: LabelSet) -> Stage:
        """A copy of the stage, with the prompt, candidates and reference images of this configuration."""
        support = self.support.read(labels) if self.support else None
        return replace(stage, prompt=load_prompt(self.prompt), candidates=self.candidates.build(None, 0), support=support)


class BudgetConfig(Section):
    """``[budget]``: limits for money, in US dollars.

    Attributes:
        usd: maximum amount that a run may spend on hosted judges. Default: no maximum.
        ask_above_usd: the command line asks for confirmation if the expected cost is above this amount.
    """

    usd: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    ask_above_usd: Annotated[float, Field(ge=0)] = 1.0


class CacheConfig(Section):
    """``[cache]``: the cache on disk. Attributes: enabled: True to keep verdicts. embeddings: True to keep embeddings of labels
    and, in bulk runs, embeddings of images. folder: folder of the cache. Default: the folder of the user's cache.
    """

    enabled: bool = True
    embeddings: bool = True
    folder: Path | None = None

    def build(self) -> VerdictStore | None:
        """The store of verdicts, which is not open yet; None if verdicts are not kept."""
        return DiskStore(self.folder) if self.enabled else None

    def keeping_embeddings(self, scorer: Scorer, *, images: bool) -> Scorer:
        """A scorer that keeps the embeddings of labels on disk and, if ``images`` is true, the embeddings of images.

        The scorer is returned unchanged if it has no embeddings, or if ``embeddings`` is false.
        """
        if isinstance(scorer, SeveralScorers):
            return SeveralScorers([self.keeping_embeddings(each, images=images) for each in scorer.scorers], pool=scorer.pool)
        if not (self.embeddings and isinstance(scorer, EmbeddingScorer)):
            return scorer
        folder = (self.folder or default_cache_folder()) / "embeddings"
        scorer.keep_labels = partial(kept_labels, folder=folder)
        return CachedEmbeddings(scorer, folder) if images else scorer


class Config(Section):
    """The whole configuration file.

    Attributes:
        scorer: the scorer. Default: `DEFAULT_SCORER`.
        stage: the stages, in the order in which judges are asked.
        labels: path of a file or folder of labels, or a list of names.
        calibration: path of a calibration file.
        fusion: how the scores and the verdict are combined. Default: the rule of the calibration; without a calibration,
            "judge".
        accept: minimum probability of a prediction; below it, the cascade abstains. Default: the value of the calibration, or 0.
        routing: True to choose one judge per image by its expected gain.
        follow_shares: True to estimate the shares of classes during the run.
        learn: True to teach the scorer during the run, by the answers of the judges and by the images.
        on_failure: how an image is predicted if no judge gives an answer.
        batch_size: number of images that are scored together.
        cache: the cache on disk.
        budget: limits for money.
        agreement: a certificate of how many labels of a run are the judge's. Default: no certificate. A certificate always learns
            from the answers; `learn` has no effect then.
        audit: questions about images whose label was kept. Default: no audit.
        find: a run finds nearly all images of one class. Default: all classes are equal.
    """

    scorer: ScorerConfig = ScorerConfig()
    stage: tuple[StageConfig, ...] = ()
    labels: Annotated[Path | tuple[str, ...] | None, MayChange("the manifest contains the labels")] = None
    calibration: Annotated[Path | None, _BY_DIGEST] = None
    fusion: FusionRule | None = None
    accept: Probability | None = None
    routing: bool = False
    follow_shares: bool = False
    learn: bool = False
    on_failure: OnFailure = "scorer"
    batch_size: Count = 32
    cache: Annotated[CacheConfig, MayChange("the folder of the cache does not change an answer")] = CacheConfig()
    budget: Annotated[BudgetConfig, MayChange("with a higher limit, judges are asked about the skipped images")] = BudgetConfig()
    agreement: AgreementConfig | None = None
    audit: AuditConfig | None = None
    find: FindConfig | None = None

    @classmethod
    def parse(cls, data: Mapping[str, object], *, name: str = "config") -> Self:
        """Make a configuration from the content of a TOML file. All paths are relative to the working directory.

        Raises:
            ConfigError: if a key is wrong. The message names the key. For an unknown key, it suggests the most similar valid key.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as exc:
            raise ConfigError(f"{name}: {_explain(cls, exc)}") from exc

    def altered(self, changes: Mapping[str, JsonValue]) -> Self:
        """A copy of the configuration, with new values for some keys.

        Args:
            changes: the new values by key. A key is written as a path, such as ``stage.0.prompt``.

        Raises:
            ConfigError: if a key or a value is wrong.
        """
        data = self.model_dump(mode="json")
        for key, value in changes.items():
            override(data, key, value)
        return self.parse(data)

    def build(self, labels: LabelSet | None = None, *, bulk: bool = False) -> Cascade:
        """Build the cascade. The arguments and errors are the same as in `build_as`."""
        return self.build_as(Cascade, labels, bulk=bulk)

    def build_as(
        self,
        kind: type[AnyCascade],
        labels: LabelSet | None = None,
        *,
        bulk: bool = False,
        calibration: Calibration | None = None,
    ) -> AnyCascade:
        """Build a cascade of a class. Its models are not loaded yet.

        Args:
            kind: the class.
            labels: the label set. Default: the labels of the configuration.
            bulk: True to keep the embeddings of images on disk.
            calibration: the calibration. Default: the file that the configuration names, if it names one.

        Raises:
            ConfigError: if there are no labels, or if the calibration does not belong to this cascade.
            InputError: if a spec, a policy, a prompt or a path in the configuration is wrong.
        """
        given = [name for name in ("audit", "agreement", "find") if getattr(self, name) is not None]
        if len(given) > 1:
            hint = "Remove one of them."
            if "find" not in given:
                hint = "A certificate tests its kept labels itself; for images that come later, begin a new run with [audit]."
            raise ConfigError(f"A run cannot have both [{given[0]}] and [{given[1]}].", hint=hint)
        if self.audit is not None:
            without = self.model_copy(update={"audit": None})
            return self.audit.added_to(without.build_as(kind, labels, bulk=bulk, calibration=calibration))
        if given:
            cascade = self._for_certificate().build_as(kind, labels, bulk=bulk, calibration=calibration)
            require_certifiable(cascade)
            if self.find is not None:
                self.find.column(cascade.labels)
            return cascade
        labels = self._own_labels() if labels is None else labels
        scorer = self.cache.keeping_embeddings(self.scorer.build(), images=bulk)
        if calibration is None and self.calibration:
            calibration = read_calibration(self.calibration)
        if calibration:
            self._require_same_stages(calibration)
        fusion = self.fusion or (calibration.fusion if calibration else "judge")
        accept = self.accept if self.accept is not None else calibration.accept if calibration else None
        stages = [stage.build(labels, calibration, number, fusion) for number, stage in enumerate(self.stage)]
        if calibration and calibration.promised_with and self.accept is None:
            settings = self.stage[0].model_dump(mode="json")
            of_run = {"policy": str(stages[0].policy), "fusion": fusion}
            calibration.require_promised(settings | of_run | {"follow_shares": self.follow_shares, "learn": self.learn})
        return kind(
            scorer,
            stages,
            labels=labels,
            on_failure=self.on_failure,
            accept=accept or 0.0,
            routing=self.routing,
            store=self.cache.build(),
            ledger=Ledger(self.budget.usd),
            batch_size=self.batch_size,
            calibration=calibration,
            follow_shares=self.follow_shares,
            learn=self.learn,
        )

    def _own_labels(self) -> LabelSet:
        if self.labels is None:
            raise ConfigError("No labels are given.", hint="Set labels (or --labels) to a file with one class name per line.")
        return LabelSet.read(self.labels) if isinstance(self.labels, Path) else LabelSet.of(self.labels)

    def _require_same_stages(self, calibration: Calibration) -> None:
        if len(calibration.judges) != len(self.stage):
            raise ConfigError(
                f"The calibration has {len(calibration.judges)} stages, but the configuration has {len(self.stage)}.",
                hint="Make a calibration for this cascade: cascadevlm calibrate.",
            )

    def _for_certificate(self) -> Self:
        """A copy of the configuration in which the judge alone decides, unless a key says how to decide."""
        stages = tuple(stage.model_copy(update={"policy": stage.policy or "always"}) for stage in self.stage)
        decides = {"fusion": self.fusion or "judge", "accept": self.accept or 0.0, "learn": False}
        return self.model_copy(update={"stage": stages, "agreement": None, "find": None, **decides})

    def frozen(self, cascade: Cascade) -> Self:
        """A copy of the configuration that contains all values that come from the calibration.

        The policies, the numbers of candidates, the fusion rule and the acceptance threshold come from the built cascade.
        """
        stages = [
            stage.model_copy(update={"policy": str(built.policy), "candidates": stage.candidates.frozen(built.candidates)})
            for stage, built in zip(self.stage, cascade.stages, strict=True)
        ]
        fusion = cascade.stages[0].fusion if cascade.stages else None
        return self.model_copy(update={"stage": tuple(stages), "fusion": fusion, "accept": cascade.accept})


def read_config(source: str | Path | Mapping[str, object]) -> Config:
    """The configuration in a TOML file, or in a mapping with the same content.

    Raises:
        ConfigError: if the file cannot be read or is not valid TOML, or if a key is wrong.
    """
    if isinstance(source, Mapping):
        return Config.parse(source)
    return Config.parse(read_toml(Path(source)), name=str(source))


def read_toml(path: Path) -> dict[str, JsonValue]:
    """Read the content of a TOML file.

    Raises:
        ConfigError: if the file cannot be read or is not valid TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as exc:
        raise ConfigError(f"Config file {str(path)!r} cannot be read: {exc.strerror}.", hint="Check the path.") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ConfigError(f"Config file {str(path)!r} is not valid TOML: {exc}.", hint="Correct the file.") from exc


def override(data: dict[str, JsonValue], key: str, value: JsonValue) -> None:
    """Set the value of one key. Missing sections and stages are added.

    Args:
        data: the content of a TOML file; it is changed.
        key: path of the key, such as ``stage.0.judge``.
        value: the new value.

    Raises:
        ConfigError: if a part of the path is not a section.
    """
    *parents, last = key.split(".")
    here: JsonValue = data
    for step, following in zip(parents, [*parents, last][1:], strict=True):
        empty: JsonValue = [] if following.isdigit() else {}
        if isinstance(here, dict):
            here = here.setdefault(step, empty)
        elif isinstance(here, list) and step.isdigit() and int(step) <= len(here):
            if int(step) == len(here):
                here.append({})
            here = here[int(step)]
        else:
            raise ConfigError(f"{key!r} cannot be set: {step!r} does not exist.", hint=_KEY_PATH)
    if not isinstance(here, dict):
        raise ConfigError(f"{key!r} cannot be set: it is not a key of a section.", hint=_KEY_PATH)
    here[last] = value


def toml_value(text: str) -> JsonValue:
    """Read a value in TOML notation. A text that is not a TOML value is returned as a string."""
    try:
        value: JsonValue = tomllib.loads(f"value = {text}")["value"]
        return value
    except (tomllib.TOMLDecodeError, RecursionError):
        return text


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    """The first error, in one sentence."""
    first = error.errors()[0]
    *parents, key = first["loc"]
    where = ".".join(str(step) for step in first["loc"] if "[" not in str(step))  # brackets: pydantic's own steps
    if first["type"] == "extra_forbidden":
        return f"The key {where!r} is unknown. {nearest(str(key), _keys(model, parents))}"
    if first["type"] == "missing":
        return f"The key {where!r} is missing. Add it."
    return f"{where}: {first['msg']} (given: {_SHORT.repr(first['input'])})."


def _keys(model: type[BaseModel], path: list[int | str]) -> list[str]:
    """The valid keys of the section at a path."""
    for step in path:
        if step in model.model_fields:
            model = next(_sections(model.model_fields[str(step)].annotation), model)
    return list(model.model_fields)


def _sections(annotation: object) -> Iterator[type[BaseModel]]:
    """The sections in the annotation of a key."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)

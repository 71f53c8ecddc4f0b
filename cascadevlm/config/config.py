"""Configuration: one TOML file, validated; it builds a cascade from specs and names."""

import reprlib
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, PlainValidator, ValidationError
from pydantic_core import PydanticCustomError, to_jsonable_python

from cascadevlm.base.entry_points import Option, nearest
from cascadevlm.base.errors import ConfigError
from cascadevlm.base.labels import LabelSet
from cascadevlm.cascade.candidates import CandidateRule, ConformalSet, CumulativeMass, Order, TopK
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.cascade.item import OnFailure
from cascadevlm.cascade.stage import Stage
from cascadevlm.config.loading import load_judge, load_prompt, load_scorer
from cascadevlm.decision.calibration import Calibration, FusionRule, read_calibration
from cascadevlm.judges.budget import Ledger
from cascadevlm.judges.cache import DiskStore, VerdictStore, default_cache_folder
from cascadevlm.judges.support import SupportSet
from cascadevlm.policies.language import parse_policy
from cascadevlm.scorers.adapters import read_adapter
from cascadevlm.scorers.base import EmbeddingScorer, Scorer
from cascadevlm.scorers.kept import CachedEmbeddings, kept_labels

Options = dict[str, Option]

_SHORT = reprlib.Repr()
"""Writes values as Python does, cut where they are deep or long."""
_SHORT.maxstring = _SHORT.maxother = 80


@dataclass(frozen=True)
class MayChange:
    """Marks a key that may have another value when a bulk run goes on, and says why that is safe."""

    because: str


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def deciding(self) -> dict[str, JsonValue]:
        """The values of all keys, without those that `MayChange`."""
        marked = {name for name, key in type(self).model_fields.items() if any(isinstance(m, MayChange) for m in key.metadata)}
        return {name: _deciding(value) for name, value in self if name not in marked}


def _deciding(value: object) -> JsonValue:
    if isinstance(value, _Section):
        return value.deciding()
    if isinstance(value, tuple):
        return [_deciding(each) for each in value]
    plain: JsonValue = to_jsonable_python(value)
    return plain


_BY_FINGERPRINT = MayChange("the manifest holds the fingerprint of the scorer")
_BY_IDENTITY = MayChange("the manifest holds the identity of the judge")
_BY_DIGEST = MayChange("the manifest holds a digest of the content")


class ScorerConfig(_Section):
    """``[scorer]``: the spec, its templates (where the backend takes any), the backend's own ``options``, and the file of an
    adapter that ``cascadevlm adapt`` made for this scorer."""

    use: str
    templates: list[str] | None = None
    options: Annotated[Options, _BY_FINGERPRINT] = {}
    adapter: Annotated[Path | None, _BY_FINGERPRINT] = None

    def build(self) -> Scorer:
        """The scorer with its adapter, its model not yet loaded.

        Raises:
            ConfigError: if templates are given twice, the adapter cannot be read, or the scorer makes no embeddings to adapt.
            BackendError: as `load_scorer`.
        """
        options = dict(self.options)
        if self.templates is not None:
            if "templates" in options:
                raise ConfigError("scorer.templates are given twice.", hint="Take them out of scorer.options.")
            options["templates"] = [*self.templates]
        scorer = load_scorer(self.use, **options)
        if self.adapter is not None:
            require_embeddings(scorer, self.use).adapter = read_adapter(self.adapter)
        return scorer


def require_embeddings(scorer: Scorer, spec: str) -> EmbeddingScorer:
    """The scorer, if it makes embeddings.

    Raises:
        ConfigError: if it makes none.
    """
    if not isinstance(scorer, EmbeddingScorer):
        raise ConfigError(f"{spec!r} has no embeddings, which an adapter needs.", hint="Use an open_clip or hf scorer.")
    return scorer


def _size(value: JsonValue) -> JsonValue:
    if value is None or value == "best" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise PydanticCustomError("size", 'a number from 1 on, or "best"')


class CandidatesConfig(_Section):
    """``candidates = {…}``: the ``k`` best (``k = "best"``: as many as the calibration finds best), those that reach ``mass``, or
    as many as hold the truth with a probability of ``coverage`` by the calibration, within bounds; and the order they are shown
    in."""

    k: Annotated[int | Literal["best"] | None, PlainValidator(_size)] = None
    mass: Annotated[float, Field(gt=0, le=1)] | None = None
    coverage: Annotated[float, Field(gt=0, lt=1)] | None = None
    minimum: int | None = None
    maximum: int | None = None
    order: Order = "ranked"
    seed: int = 0

    def build(self, calibration: Calibration | None, stage: int) -> CandidateRule:
        """The rule for a stage, counted from 0 on.

        Raises:
            ConfigError: unless exactly one of ``k``, ``mass`` and ``coverage`` is given; if ``k`` has bounds; if there is no
                calibration for the coverage or the best.
        """
        if [self.k, self.mass, self.coverage].count(None) != 2:
            raise ConfigError("candidates wants one of k, mass and coverage.", hint="For example: candidates = { mass = 0.95 }.")
        given = {"minimum": self.minimum, "maximum": self.maximum}
        bounds = {name: bound for name, bound in given.items() if bound is not None}
        if self.k is not None and bounds:
            raise ConfigError(f"candidates with k have no {' or '.join(bounds)}.", hint="Bounds are for mass and coverage.")
        if self.k == "best":
            if calibration is None:
                raise ConfigError('candidates = "best" needs a calibration.', hint="Make one: cascadevlm calibrate.")
            return TopK(k=calibration.judges[stage].best_size, order=self.order, seed=self.seed)
        if self.k is not None:
            return TopK(k=self.k, order=self.order, seed=self.seed)
        if self.mass is not None:
            return CumulativeMass(mass=self.mass, **bounds, order=self.order, seed=self.seed)
        assert self.coverage is not None
        if calibration is None:
            raise ConfigError("candidates with a coverage need a calibration.", hint="Make one: cascadevlm calibrate.")
        rule = calibration.conformal_for(self.coverage)
        return ConformalSet(rule=rule, **bounds, order=self.order, seed=self.seed)

    def frozen(self, built: CandidateRule) -> Self:
        """With the number that the calibration found best, if that was asked for."""
        return self.model_copy(update={"k": built.most()}) if self.k == "best" else self


def _k_alone(value: JsonValue) -> JsonValue:
    """``candidates = 5`` is short for ``candidates = { k = 5 }``; so is "best"."""
    return {"k": value} if isinstance(value, int | float | str) else value


class SupportConfig(_Section):
    """``support = {…}``: a folder of reference images by class, and how many of each to show."""

    folder: Annotated[Path, _BY_DIGEST]
    shots: Annotated[int, Field(ge=1)] = 1

    def read(self, labels: LabelSet) -> SupportSet:
        """The support set.

        Raises:
            InputError: if it has no image of any label.
        """
        return SupportSet.read(self.folder, labels, shots=self.shots)


class StageConfig(_Section):
    """``[[stage]]``: a judge and when and how it is asked."""

    judge: str
    policy: str | None = None
    candidates: Annotated[CandidatesConfig, BeforeValidator(_k_alone)] = CandidatesConfig(k=5)
    prompt: str = "select"
    offer_none: bool = False
    support: SupportConfig | None = None
    votes: Annotated[int, Field(ge=1)] = 1
    widen: Annotated[int, Field(ge=0)] = 0
    options: Annotated[Options, _BY_IDENTITY] = {}

    def build(self, labels: LabelSet, calibration: Calibration | None, number: int, fusion: FusionRule) -> Stage:
        """The stage, its judge not yet loaded.

        Raises:
            ConfigError: if the calibration is of another judge.
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
        """The stage with the prompt, candidates and reference images of this configuration."""
        support = self.support.read(labels) if self.support else None
        return replace(stage, prompt=load_prompt(self.prompt), candidates=self.candidates.build(None, 0), support=support)


class BudgetConfig(_Section):
    """``[budget]``: the most a run may spend on hosted judges, and what the command line spends without asking, in US dollars."""

    usd: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    ask_above_usd: Annotated[float, Field(ge=0)] = 1.0


class CacheConfig(_Section):
    """``[cache]``: whether verdicts and embeddings (of labels and, in bulk runs, of images) are kept, and where."""

    enabled: bool = True
    embeddings: bool = True
    folder: Path | None = None

    def build(self) -> VerdictStore | None:
        """The store, not yet opened."""
        return DiskStore(self.folder) if self.enabled else None

    def keeping_embeddings(self, scorer: Scorer, *, images: bool) -> Scorer:
        """The scorer; if it makes embeddings and they are wanted, those of labels, and of ``images``, are kept on disk."""
        if not (self.embeddings and isinstance(scorer, EmbeddingScorer)):
            return scorer
        folder = (self.folder or default_cache_folder()) / "embeddings"
        scorer.keep_labels = partial(kept_labels, folder=folder)
        return CachedEmbeddings(scorer, folder) if images else scorer


class Config(_Section):
    """The whole file."""

    scorer: ScorerConfig
    stage: tuple[StageConfig, ...] = ()
    labels: Annotated[Path | tuple[str, ...] | None, MayChange("the manifest holds the labels themselves")] = None
    calibration: Annotated[Path | None, _BY_DIGEST] = None
    fusion: FusionRule | None = None
    accept: Annotated[float, Field(ge=0, le=1)] | None = None
    routing: bool = False
    follow_shares: bool = False
    on_failure: OnFailure = "scorer"
    batch_size: Annotated[int, Field(ge=1)] = 32
    cache: Annotated[CacheConfig, MayChange("answers are the same wherever they are kept")] = CacheConfig()
    budget: Annotated[BudgetConfig, MayChange("a higher cap asks about what was skipped")] = BudgetConfig()

    @classmethod
    def parse(cls, data: Mapping[str, JsonValue], *, name: str = "config") -> Self:
        """Validate what a TOML file holds. Paths, those in specs too, are relative to the working directory.

        Raises:
            ConfigError: naming the key that is wrong and, if it is unknown, the nearest valid one.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as exc:
            raise ConfigError(f"{name}: {_explain(cls, exc)}") from exc

    def altered(self, changes: Mapping[str, JsonValue]) -> Self:
        """The configuration with other values of some keys, as ``stage.0.prompt``.

        Raises:
            ConfigError: as `parse`.
        """
        data = self.model_dump(mode="json")
        for key, value in changes.items():
            override(data, key, value)
        return self.parse(data)

    def build(self, labels: LabelSet | None = None, *, bulk: bool = False) -> Cascade:
        """The cascade, its models not yet loaded; in ``bulk``, the embeddings of images are kept.

        Raises:
            ConfigError: if neither the argument nor the file names labels.
            InputError: if a spec, policy, prompt or path in the file is wrong.
        """
        if labels is None:
            if self.labels is None:
                raise ConfigError("There are no labels.", hint="Give a file of class names.")
            labels = LabelSet.read(self.labels) if isinstance(self.labels, Path) else LabelSet.of(self.labels)
        scorer = self.cache.keeping_embeddings(self.scorer.build(), images=bulk)
        calibration = read_calibration(self.calibration) if self.calibration else None
        if calibration and len(calibration.judges) != len(self.stage):
            raise ConfigError(
                f"The calibration is of {len(calibration.judges)} stages, the configuration has {len(self.stage)}.",
                hint="Make one for this cascade: cascadevlm calibrate.",
            )
        fusion = self.fusion or (calibration.fusion if calibration else "judge")
        accept = self.accept if self.accept is not None else calibration.accept if calibration else None
        stages = [stage.build(labels, calibration, number, fusion) for number, stage in enumerate(self.stage)]
        if calibration and calibration.promised_with and self.accept is None:
            settings = self.stage[0].model_dump(mode="json")
            of_run = {"policy": str(stages[0].policy), "fusion": fusion, "follow_shares": self.follow_shares}
            calibration.require_promised(settings | of_run)
        return Cascade(
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
        )

    def frozen(self, cascade: Cascade) -> Self:
        """The configuration with the policies, the best lengths of lists, the fusion and the acceptance of the cascade built from
        it, be they its calibration's."""
        stages = [
            stage.model_copy(update={"policy": str(built.policy), "candidates": stage.candidates.frozen(built.candidates)})
            for stage, built in zip(self.stage, cascade.stages, strict=True)
        ]
        fusion = cascade.stages[0].fusion if cascade.stages else None
        return self.model_copy(update={"stage": tuple(stages), "fusion": fusion, "accept": cascade.accept})


def read_toml(path: Path) -> dict[str, JsonValue]:
    """What a TOML file holds.

    Raises:
        ConfigError: if it cannot be read.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as exc:
        raise ConfigError(f"Config file {str(path)!r} cannot be read: {exc.strerror}.") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ConfigError(f"Config file {str(path)!r} is no TOML: {exc}.") from exc


def override(data: dict[str, JsonValue], key: str, value: JsonValue) -> None:
    """Set one value, as ``stage.0.judge``; sections and stages that are not there yet are made.

    Raises:
        ConfigError: if the path leads through something that is no section.
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
            raise ConfigError(f"{key!r} cannot be set: there is nothing at {step!r}.")
    if not isinstance(here, dict):
        raise ConfigError(f"{key!r} cannot be set: it is no key of a section.")
    here[last] = value


def toml_value(text: str) -> JsonValue:
    """A value as TOML writes it; what is no TOML value is a string."""
    try:
        value: JsonValue = tomllib.loads(f"value = {text}")["value"]
        return value
    except (tomllib.TOMLDecodeError, RecursionError):
        return text


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    """The first thing wrong, in one sentence."""
    first = error.errors()[0]
    *parents, key = first["loc"]
    where = ".".join(str(step) for step in first["loc"] if "[" not in str(step))  # brackets: pydantic's own steps
    if first["type"] == "extra_forbidden":
        return f"There is no key {where!r}. {nearest(str(key), _keys(model, parents))}"
    if first["type"] == "missing":
        return f"The key {where!r} is missing."
    return f"{where}: {first['msg']} (given: {_SHORT.repr(first['input'])})."


def _keys(model: type[BaseModel], path: list[int | str]) -> list[str]:
    """The valid keys of the section at a path."""
    for step in path:
        if step in model.model_fields:
            model = next(_sections(model.model_fields[str(step)].annotation), model)
    return list(model.model_fields)


def _sections(annotation: object) -> Iterator[type[BaseModel]]:
    """Those in the annotation of a key."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)

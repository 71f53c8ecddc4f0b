"""``[scorer]`` in the configuration: one scorer, or several scorers as one."""

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Discriminator, Field, JsonValue, Tag

from cascadevlm.base.errors import ConfigError
from cascadevlm.config import DEFAULT_SCORER
from cascadevlm.config.loading import load_scorer
from cascadevlm.config.section import MayChange, Options, Section
from cascadevlm.decision.pooling import read_pool
from cascadevlm.scorers.adapters import read_adapter
from cascadevlm.scorers.base import EmbeddingScorer, Scorer
from cascadevlm.scorers.several import SeveralScorers

_BY_FINGERPRINT = MayChange("the manifest contains the fingerprint of the scorer")


def _specs_alone(value: JsonValue) -> JsonValue:
    """Read each spec in a list as a section with this spec alone: ``["a:b"]`` as ``[{ use = "a:b" }]``."""
    return [{"use": each} if isinstance(each, str) else each for each in value] if isinstance(value, list) else value


def _one_or_several(value: object) -> str:
    return "[several]" if isinstance(value, list | tuple) else "[one]"  # brackets: the step is not shown in messages


class ScorerConfig(Section):
    """``[scorer]``: the scorer.

    Attributes:
        use: the spec, ``backend:model``; or a list of specs, or of sections like this one, for several scorers as one. Default:
            `DEFAULT_SCORER`.
        templates: prompt templates, if the backend supports them. Default: the templates of the backend.
        options: options of the backend.
        adapter: file of an adapter that ``cascadevlm adapt`` made for this scorer. Default: no adapter.
        pool: for several scorers, the file that ``cascadevlm adapt --method pool`` made. Default: all scorers have equal weights.
    """

    use: Annotated[
        Annotated[str, Tag("[one]")] | Annotated[tuple["ScorerConfig", ...], BeforeValidator(_specs_alone), Tag("[several]")],
        Discriminator(_one_or_several),
    ] = DEFAULT_SCORER
    templates: list[str] | None = None
    options: Annotated[Options, _BY_FINGERPRINT] = Field(default_factory=dict)
    adapter: Annotated[Path | None, _BY_FINGERPRINT] = None
    pool: Annotated[Path | None, _BY_FINGERPRINT] = None

    def build(self) -> Scorer:
        """The scorer with its adapter, its model not yet loaded.

        Raises:
            ConfigError: if templates are given twice, if the adapter or the pool cannot be read, or if the scorer makes no
                embeddings to adapt; if a key for one scorer is set for several, or the reverse.
            InputError: if the list has fewer than two scorers.
            BackendError: as `load_scorer`.
        """
        if not isinstance(self.use, str):
            return self._build_several(self.use)
        if self.pool is not None:
            raise ConfigError("A pool needs several scorers.", hint='Set scorer.use to a list such as ["open_clip:…", "hf:…"].')
        options = dict(self.options)
        if self.templates is not None:
            if "templates" in options:
                raise ConfigError("The templates of the scorer are given twice.", hint="Remove templates from scorer.options.")
            options["templates"] = [*self.templates]
        scorer = load_scorer(self.use, **options)
        if self.adapter is not None:
            require_embeddings(scorer, self.use).adapter = read_adapter(self.adapter)
        return scorer

    def _build_several(self, sections: tuple["ScorerConfig", ...]) -> Scorer:
        for name in ("templates", "options", "adapter"):
            if getattr(self, name):
                hint = f'Write {name} beside the spec it is for: use = [{{ use = "open_clip:…", {name} = … }}, "hf:…"].'
                raise ConfigError(f"scorer.{name} is for one scorer, and scorer.use names {len(sections)}.", hint=hint)
        for number, section in enumerate(sections):
            if "use" not in section.model_fields_set:  # the default is for one scorer
                raise ConfigError(f"The key 'scorer.use.{number}.use' is missing.", hint="Add it.")
        scorers = [section.build() for section in sections]
        return SeveralScorers(scorers, pool=read_pool(self.pool) if self.pool else None)


def require_embeddings(scorer: Scorer, use: str | tuple[ScorerConfig, ...]) -> EmbeddingScorer:
    """The scorer, if it is one scorer that makes embeddings.

    Raises:
        ConfigError: if there are several scorers, or if the scorer makes no embeddings.
    """
    if not isinstance(use, str):
        raise ConfigError(f"An adapter is for one scorer, and scorer.use names {len(use)}.", hint="Adapt each scorer alone.")
    if not isinstance(scorer, EmbeddingScorer):
        raise ConfigError(f"{use!r} has no embeddings, which an adapter needs.", hint="Use an open_clip or hf scorer.")
    return scorer

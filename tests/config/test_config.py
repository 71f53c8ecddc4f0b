from pathlib import Path

import pytest
from pydantic import JsonValue

from cascadevlm.base.errors import ConfigError, InputError
from cascadevlm.base.labels import LabelSet
from cascadevlm.cascade.candidates import CumulativeMass, TopK
from cascadevlm.config import DEFAULT_SCORER
from cascadevlm.config.config import Config, override, read_toml, toml_value
from cascadevlm.policies.rules import EntropyAbove
from cascadevlm.scorers.kept import CachedEmbeddings
from cascadevlm.scorers.several import SeveralScorers

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
LABELS = LabelSet.of(["a", "b"])


def data(**stage: JsonValue) -> dict[str, JsonValue]:
    return {"scorer": {"use": "open_clip:aviary"}, "stage": [{"judge": "hf_chat:aviary", **stage}]}


def test_builds_what_it_says() -> None:
    config = Config.parse(
        {**data(policy="entropy > 0.2", candidates=3, prompt="select_cot", offer_none=True), "on_failure": "abstain"}
    )
    cascade = config.build(LABELS)
    (stage,) = cascade.stages
    assert cascade.on_failure == "abstain"
    assert stage.policy == EntropyAbove(0.2)
    assert stage.candidates == TopK(k=3)
    assert stage.prompt.name == "select_cot"
    assert stage.offer_none
    assert stage.judge.spec == "hf_chat:aviary"


def test_candidates_by_mass() -> None:
    cascade = Config.parse(data(candidates={"mass": 0.8, "maximum": 4, "order": "shuffled", "seed": 7})).build(LABELS)
    assert cascade.stages[0].candidates == CumulativeMass(mass=0.8, maximum=4, order="shuffled", seed=7)


@pytest.mark.parametrize("candidates", [{}, {"k": 3, "mass": 0.9}])
def test_candidates_want_one_rule(candidates: JsonValue) -> None:
    with pytest.raises(ConfigError, match="one of k, mass and coverage"):
        Config.parse(data(candidates=candidates)).build(LABELS)


@pytest.mark.parametrize("candidates", [{"k": 5, "minimum": 2}, {"k": "best", "maximum": 10}])
def test_lists_of_one_length_have_no_bounds(candidates: JsonValue) -> None:
    with pytest.raises(ConfigError, match=r"candidates with k cannot have (minimum|maximum)\. Remove it"):
        Config.parse(data(candidates=candidates)).build(LABELS)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"scorer": {"use": "x:y"}, "stages": []}, "The key 'stages' is unknown. Did you mean 'stage'?"),
        ({"scorer": {"use": "x:y", "template": []}}, "The key 'scorer.template' is unknown. Did you mean 'templates'?"),
        (data(polcy="always"), "Did you mean 'policy'?"),
        (data(candidates={"mas": 0.9}), "Did you mean 'mass'?"),
        (data(candidates="five"), "'five'"),
        (
            data(candidates="beste"),
            "candidates.k: Input should be a whole number of at least 1, or \"best\" (given: 'beste').",
        ),
        (data(candidates=0), 'stage.0.candidates.k: Input should be a whole number of at least 1, or "best" (given: 0).'),
        (data(candidates=True), 'stage.0.candidates.k: Input should be a whole number of at least 1, or "best" (given: True).'),
        (data(candidates={"k": 2.5}), 'a whole number of at least 1, or "best" (given: 2.5).'),
        (data(support={"folder": "x", "shot": 1}), "The key 'stage.0.support.shot' is unknown. Did you mean 'shots'?"),
        ({"scorer": {"use": "x:y"}, "budget": {"us": 3}}, "The key 'budget.us' is unknown. Did you mean 'usd'?"),
        ({"scorer": {"use": 5}}, "scorer.use: Input should be a valid string (given: 5)."),
        ({"scorer": {"use": ["x:y", {"us": "x:y"}]}}, "The key 'scorer.use.1.us' is unknown. Did you mean 'use'?"),
        ({"scorer": {"use": ["x:y", {"use": "x:z", "template": []}]}}, "The key 'scorer.use.1.template' is unknown."),
    ],
)
def test_mistakes_name_the_key_and_the_fix(wrong: dict[str, JsonValue], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.parse(wrong, name="my.toml")
    assert sentence in str(caught.value)
    assert str(caught.value).startswith("my.toml: ")


@pytest.mark.parametrize("given", [{}, {"scorer": {}}, {"scorer": {"templates": ["a {label}"]}}])
def test_a_scorer_that_is_not_named_is_the_default(given: dict[str, JsonValue]) -> None:
    assert Config.parse(given).scorer.use == DEFAULT_SCORER
    several = Config.parse({"scorer": {"use": ["open_clip:aviary", {"templates": ["a {label}"]}]}, "labels": ["a", "b"]})
    with pytest.raises(ConfigError, match=r"The key 'scorer.use.1.use' is missing\. Add it"):
        several.build()


def test_labels_are_wanted() -> None:
    with pytest.raises(ConfigError, match="No labels are given"):
        Config.parse(data()).build()


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (data(policy="gain > 0.02"), "The policy 'gain > 0.02' needs a calibration. Make a calibration"),
        (data(widen=2), "widen = 2 needs the answer 'none of these'"),
        ({**data(), "routing": True}, "Routing needs two judges"),
        (
            {**data(), "routing": True, "stage": [{"judge": "hf_chat:aviary"}] * 2},
            "The policy 'always' cannot choose between judges",
        ),
        (data(policy="~(calls <= 3)"), "a limit must stand alone or after &"),
        (data(policy="calls <= 1e999"), "a whole number of at least 0, not inf"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(wrong: dict[str, JsonValue], sentence: str) -> None:
    config = Config.parse(wrong)
    with pytest.raises(InputError) as caught:
        config.build(LABELS)
    assert sentence in str(caught.value)


def test_a_study_of_a_length_can_be_read_again() -> None:
    bounded = Config.parse(data(candidates={"mass": 0.9, "minimum": 3}))
    again = Config.parse(bounded.model_dump(mode="json"))
    assert again == bounded
    assert again.build(LABELS).stages[0].candidates == CumulativeMass(mass=0.9, minimum=3)


def test_an_unknown_option_of_a_backend_is_refused() -> None:
    with pytest.raises(InputError, match=r"'hf_chat' has no option 'modes'\. Did you mean 'mode'"):
        Config.parse(data(options={"modes": "likelihood"})).build(LABELS)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_build(recipe: Path) -> None:
    cascade = Config.parse(read_toml(recipe), name=recipe.name).build(LABELS)
    assert cascade.stages


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("scorer = [")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        read_toml(tmp_path / "bad.toml")


def test_overrides_make_what_is_missing_and_keep_the_rest() -> None:
    settings = data(policy="always")
    override(settings, "stage.0.policy", "never")
    override(settings, "stage.1.judge", "hf_chat:other")
    override(settings, "cache.enabled", False)
    config = Config.parse(settings)
    assert [stage.judge for stage in config.stage] == ["hf_chat:aviary", "hf_chat:other"]
    assert config.stage[0].policy == "never"
    assert not config.cache.enabled


@pytest.mark.parametrize("key", ["scorer.use.more", "stage.5.judge", "stage.judge"])
def test_overrides_that_lead_nowhere(key: str) -> None:
    settings = data()
    with pytest.raises(ConfigError, match="cannot be set"):
        override(settings, key, "x")


@pytest.mark.parametrize(
    ("text", "value"), [("3", 3), ("true", True), ("'x'", "x"), ("openai:gpt-4o", "openai:gpt-4o"), ("{k = 2}", {"k": 2})]
)
def test_values_are_toml_or_strings(text: str, value: JsonValue) -> None:
    assert toml_value(text) == value


@pytest.mark.parametrize("content", [b"a = " + b"[" * 20_000, b"\xff\xfe", b"labels" + b".a" * 6_000 + b" = 1"])
def test_a_config_file_that_is_too_deep_or_no_text_is_said(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.toml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        Config.parse(read_toml(tmp_path / "config.toml") | {"scorer": {"use": "open_clip:aviary"}})
    assert len(str(caught.value)) < 500


def test_a_config_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b"\xef\xbb\xbfbatch_size = 1\n")
    assert read_toml(tmp_path / "config.toml") == {"batch_size": 1}


def test_a_value_that_is_too_deep_is_a_text() -> None:
    assert toml_value("[" * 20_000) == "[" * 20_000


def test_several_scorers_have_their_own_templates_and_options(tmp_path: Path) -> None:
    use: JsonValue = ["open_clip:aviary", {"use": "open_clip:aviary", "templates": ["{label}"], "options": {"device": "cpu"}}]
    config = Config.parse({"scorer": {"use": use}, "cache": {"folder": str(tmp_path)}})
    assert Config.parse(config.model_dump(mode="json")) == config
    scorer = config.build(LABELS).scorer
    assert isinstance(scorer, SeveralScorers)
    assert [getattr(each, "templates", None) for each in scorer.scorers] == [("a photo of a {label}.",), ("{label}",)]
    bulk = config.build(LABELS, bulk=True).scorer
    assert isinstance(bulk, SeveralScorers)
    assert all(isinstance(each, CachedEmbeddings) for each in bulk.scorers)
    assert config.altered({"scorer.use.1.options.device": "cuda"}).deciding() == config.deciding()
    assert config.altered({"scorer.use.1.use": "hf:other"}).deciding() != config.deciding()


@pytest.mark.parametrize(
    ("scorer", "sentence"),
    [
        ({"use": "open_clip:aviary", "pool": "x"}, "A pool needs several scorers."),
        ({"use": ["open_clip:aviary"]}, "Several scorers are at least 2, not 1."),
        (
            {"use": ["open_clip:aviary"] * 2, "templates": ["{label}"]},
            "scorer.templates is for one scorer, and scorer.use names 2.",
        ),
        ({"use": ["open_clip:aviary"] * 2, "adapter": "x"}, "scorer.adapter is for one scorer"),
        ({"use": ["open_clip:aviary"] * 2, "pool": "x"}, "The pool 'x' cannot be read"),
    ],
)
def test_keys_for_one_scorer_and_for_several(scorer: dict[str, JsonValue], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        Config.parse({"scorer": scorer}).build(LABELS)
    assert sentence in str(caught.value)

"""The decision layer in a running cascade: fusion, gain, widening, abstaining, and the settings of a configuration."""

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import JsonValue
from scipy.special import expit, softmax

from cascadevlm import Cascade, Prediction, Stage, TopK, load_prompt, parse_policy
from cascadevlm.base import images as reading
from cascadevlm.base.arrays import NOBODY
from cascadevlm.base.errors import BudgetExhausted, ConfigError, InputError, PermanentError, PolicyError
from cascadevlm.base.images import ImageSource
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import NANODOLLARS, Question, Scores, Verdict
from cascadevlm.cascade.candidates import Order
from cascadevlm.cascade.fusing import Asking, CalibratedScorer
from cascadevlm.config.config import Config
from cascadevlm.decision.calibration import Calibration, FusionRule
from cascadevlm.decision.judge_model import JudgeModel
from cascadevlm.decision.scorer_calibration import ScorerCalibration
from cascadevlm.evaluation.calibrating.fitting import fit_calibration
from cascadevlm.evaluation.calibrating.recipe import Recipe
from cascadevlm.evaluation.data import Data
from cascadevlm.evaluation.deciding import decided
from cascadevlm.evaluation.evaluate import asking_everything, record_run
from cascadevlm.evaluation.record import Record, read_record
from cascadevlm.evaluation.sweep import under
from cascadevlm.judges.base import Judge, Quote
from cascadevlm.judges.budget import Ledger
from cascadevlm.judges.cache import MemoryStore
from cascadevlm.judges.prompt import NONE_OF_THESE, options
from cascadevlm.policies.base import Spending, as_policy
from cascadevlm.runs import bulk
from cascadevlm.scorers.base import Prepared
from cascadevlm.testing import FakeJudge, FakeScorer, noise, picture
from cascadevlm.testing.fakes import Reply
from tests.calibrations import some_calibration
from tests.observers import Seen

NAMES = ["ant", "bee", "cicada", "dragonfly", "earwig", "fly"]
LABELS = LabelSet.of(NAMES)
SELECT = load_prompt("select")
RED = (200, 0, 0)
MODEL = replace(JudgeModel.prior(len(NAMES)), ability=2.5, class_bias=np.linspace(-0.4, 0.4, len(NAMES)))


def known(model: JudgeModel = MODEL, fingerprint: str = "fake:fake", **changed: object) -> Calibration:
    """A calibration of the fake scorer and a fake judge."""
    calibration = replace(
        some_calibration(NAMES, model),
        fingerprint=fingerprint,
        scorer=ScorerCalibration(method="bias", scale=0.5, bias=np.linspace(-0.3, 0.3, len(NAMES))),
        images=200,
    )
    return replace(calibration, **changed)  # type: ignore[arg-type]


def by_pixels(question: Question) -> str:
    """One of the options, the same for the same image."""
    keys = list(options(question))
    return f"ANSWER: {keys[int(question.image_digest, 16) % len(keys)]}"


def says(name: str) -> Callable[[Question], str]:
    """Answers the option with this name, or "none of these" if it is not shown."""

    def reply(question: Question) -> str:
        keys = {option: key for key, option in options(question).items()}
        return f"ANSWER: {keys.get(name, keys.get(NONE_OF_THESE, 'nothing'))}"

    return reply


def cascade(judge: Judge, calibration: Calibration | None = None, policy: str = "always", **options: object) -> Cascade:
    calibration = calibration or known()
    of_cascade = {name: options.pop(name) for name in ("accept", "on_failure", "ledger", "batch_size") if name in options}
    (known_judge,) = calibration.judges
    stage = Stage(judge=judge, prompt=SELECT, policy=parse_policy(policy), model=known_judge.model)
    scorer = CalibratedScorer(FakeScorer(), calibration)
    given_stage = replace(stage, **({"fusion": "bayes"} | options))  # type: ignore[arg-type]
    return Cascade(scorer, [given_stage], labels=LABELS, **of_cascade)  # type: ignore[arg-type]


def recorded(folder: Path, cascade: Cascade, images: int) -> tuple[Record, list[Prediction]]:
    """The predictions of a cascade for images of noise, and their record."""
    pictures = [noise(seed) for seed in range(images)]
    names = tuple(map(str, range(images)))
    data = Data(images=tuple(pictures), names=names, truths=("ant",) * images, splits=("",) * images)
    stage_config: dict[str, JsonValue] = {
        "judge": "fake:fake",
        "prompt": "select",
        "offer_none": cascade.stages[0].offer_none,
        "support": None,
        "options": {},
    }
    seen = Seen()
    config: dict[str, JsonValue] = {"stage": [stage_config], "on_failure": cascade.on_failure}
    bulk.run(cascade.altered(observers=[seen]), data, folder, config=config)
    return read_record(folder), seen.predictions


# fusing


@pytest.mark.parametrize("offer_none", [False, True])
@pytest.mark.parametrize("order", ["ranked", "reversed"])
@pytest.mark.parametrize("policy", ["always", "gain > 0.1", "entropy > 0.6 & calls <= 9", "gain > 0.05 & calls <= 7"])
@pytest.mark.parametrize("fusion", ["bayes", "judge"])
def test_a_live_cascade_is_what_its_record_says_it_would_be(
    tmp_path: Path, offer_none: bool, order: Order, policy: str, fusion: FusionRule
) -> None:
    """Two ways give the same result: ask about all images and decide later on the record, or ask with the calibration. The
    candidates are the same in both: all labels, in the order of the calibrated scores.
    """
    calibration = known(fusion=fusion)

    def asking(judge: Judge, policy: str) -> Cascade:
        candidates = TopK(k=6, order=order)
        return cascade(judge, policy=policy, candidates=candidates, offer_none=offer_none, fusion=fusion, batch_size=64)

    record, _ = recorded(tmp_path / "all", asking(FakeJudge(reply=by_pixels), "always"), 32)
    judge = FakeJudge(reply=by_pixels)
    _, live = recorded(tmp_path / "live", asking(judge, policy), 32)
    replayed = under(decided(record, calibration), parse_policy(policy))
    assert [prediction.label for prediction in live] == [NAMES[column] for column in replayed.predicted]
    given_probabilities = [np.nan if prediction.probability is None else prediction.probability for prediction in live]
    np.testing.assert_allclose(given_probabilities, replayed.probabilities, atol=1e-5)
    assert tuple(prediction.decided_by for prediction in live) == replayed.decided_by
    assert [prediction.escalated for prediction in live] == replayed.judged.asked.tolist()
    assert len(judge.questions) == replayed.judged.asked.sum()
    assert ("fusion" if fusion == "bayes" else "judge") in replayed.decided_by


def test_where_its_word_is_final_a_judge_is_not_asked_that_knows_less_than_the_scorer() -> None:
    ignorant = known(replace(MODEL, ability=0.0))
    images = [noise(seed) for seed in range(20)]
    asked = {
        fusion: sum(p.escalated for p in cascade(FakeJudge(), ignorant, "gain > -0.05", fusion=fusion).classify(images))
        for fusion in ("bayes", "judge")
    }
    assert asked["bayes"] == 20
    assert asked["judge"] < 10


class Opinionated(FakeJudge):
    """Gives probabilities that depend on the pixels, for three of four images."""

    async def judge(self, question: Question) -> Verdict:
        verdict = await super().judge(question)
        rng = np.random.default_rng(int(question.image_digest[:8], 16))
        if rng.random() < 0.25:
            return verdict
        shares = rng.dirichlet(np.full(len(question.labels), 0.3)).tolist()
        return replace(verdict, probabilities=dict(zip([label.name for label in question.labels], shares, strict=True)))


@pytest.mark.parametrize("offer_none", [False, True])
def test_a_live_cascade_weighs_the_judges_probabilities_as_its_record_does(tmp_path: Path, offer_none: bool) -> None:
    calibration = known(replace(MODEL, probability_weight=1.5))
    asking = cascade(Opinionated(reply=by_pixels), calibration, candidates=TopK(k=6), offer_none=offer_none)
    record, live = recorded(tmp_path, asking, 32)
    own = record.judged.probabilities
    assert own is not None
    assert 0 < np.isnan(own).all(axis=1).sum() < 32
    for row, prediction in enumerate(live):
        assert prediction.verdict is not None
        opinion = prediction.verdict.probabilities
        assert np.isnan(own[row]).all() == (opinion is None)
        if opinion is not None:
            assert dict(zip(np.array(NAMES)[record.judged.candidates[row]], own[row], strict=True)) == opinion
    replayed = under(decided(record, calibration), parse_policy("always"))
    assert [prediction.label for prediction in live] == [NAMES[column] for column in replayed.predicted]
    np.testing.assert_allclose([prediction.probability or 0 for prediction in live], replayed.probabilities, atol=1e-5)
    unopinionated = replace(record, stages=(replace(record.judged, probabilities=None),))
    by_answers = under(decided(unopinionated, calibration), parse_policy("always"))
    assert np.abs(replayed.probabilities - by_answers.probabilities).max() > 0.1
    some = record.take(np.array([3, 1])).judged.probabilities
    np.testing.assert_array_equal(some, own[[3, 1]])


@settings(max_examples=15)
@given(st.integers(0, 1000), st.sampled_from(["ANSWER: A", "ANSWER: B", "ANSWER: E", "I see nothing."]))
def test_both_opinions_are_weighed_by_bayes_rule(seed: int, reply: str) -> None:
    """Four of six labels are shown. An unreadable answer is also a missing answer."""
    judge = FakeJudge(reply=reply)
    found = cascade(judge, candidates=TopK(k=4), offer_none=True).classify(noise(seed))
    before = known().calibrated(FakeScorer().score([noise(seed)], LABELS)).log_probs[0].astype(float)
    shown = [NAMES.index(label.name) for label in judge.questions[-1].labels]
    assert shown == np.argsort(-before)[:4].tolist()
    place = {"ANSWER: A": 0, "ANSWER: B": 1, "ANSWER: E": 4, "I see nothing.": 5}[reply]
    after = np.exp(before)
    for truth in range(6):
        utilities = [
            *(MODEL.following * before[c] + MODEL.class_bias[c] + MODEL.ability * (c == truth) for c in shown),
            MODEL.none_bias + MODEL.none_ability * (truth not in shown),
        ]
        silent = expit(MODEL.silence + MODEL.silence_ability * (truth not in shown))
        after[truth] *= [*softmax(utilities) * (1 - silent), silent][place]
    after /= after.sum()
    assert found.label == NAMES[after.argmax()]
    assert found.probability == pytest.approx(after.max(), abs=1e-5)
    assert found.decided_by == "fusion"


def test_where_the_judge_fails_the_calibrated_scorer_decides() -> None:
    found = cascade(FakeJudge(reply=BudgetExhausted("spent"))).classify(noise(1))
    before = known().calibrated(FakeScorer().score([noise(1)], LABELS)).probabilities[0]
    assert (found.label, found.decided_by) == (NAMES[before.argmax()], "scorer")
    assert found.probability == pytest.approx(before.max())


def test_the_word_of_the_judge_is_final_without_fusion() -> None:
    found = cascade(FakeJudge(reply="ANSWER: D"), candidates=TopK(k=4), fusion="judge").classify(noise(3))
    assert found.label == found.candidates[3].label.name
    assert (found.decided_by, found.probability) == ("judge", None)


def test_a_second_judge_is_asked_about_what_is_still_in_doubt() -> None:
    """The policy and the candidates of the second stage use the probabilities after the first judge's answer."""
    first, second = FakeJudge("one", reply="ANSWER: B"), FakeJudge("two", reply="ANSWER: A")
    one = cascade(first).stages[0]
    both = Cascade(
        CalibratedScorer(FakeScorer(), known()),
        [one, replace(one, judge=second, policy=parse_policy("top_probability < 0.8"))],
        labels=LABELS,
    )
    alone = Cascade(both.scorer, [one], labels=LABELS)
    images = [noise(seed) for seed in range(20)]
    doubtful = [p.probability is not None and p.probability < 0.8 for p in alone.classify(images)]
    found = both.classify(images)
    assert 0 < sum(doubtful) < 20
    assert [len(prediction.verdicts) == 2 for prediction in found] == doubtful
    for before, after, asked in zip(alone.classify(images), found, doubtful, strict=True):
        if asked:
            assert after.candidates[0].label.name == before.label
            assert (after.probability or 0) > (before.probability or 0)


def test_policies_of_gain_and_fusion_want_a_model() -> None:
    judge = FakeJudge()
    with pytest.raises(InputError, match="needs a calibration"):
        Stage(judge=judge, prompt=SELECT, fusion="bayes")
    for policy in ("gain > 0.1", "never | ~(gain_per_dollar > 3)", "gain > 0.1 & calls <= 3"):
        with pytest.raises(PolicyError, match=r"^The policy '.*' needs a calibration"):
            Stage(judge=judge, prompt=SELECT, policy=parse_policy(policy))
    with pytest.raises(PolicyError, match="needs a calibration"):
        parse_policy("gain > 0.1").select(FakeScorer().score([noise(1)], LABELS))


def test_the_reason_tells_the_gain() -> None:
    asked = cascade(FakeJudge(), policy="gain > 0.1").classify(noise(1))
    scores = known().calibrated(FakeScorer().score([noise(1)], LABELS))
    gain = Asking(model=MODEL, candidates=TopK(), none_offered=False, word_final=False).gain(scores)[0]
    assert asked.reasons == (f"gain {gain:.2f} (rule: gain > 0.1)",)


def test_a_budget_goes_where_the_gain_is() -> None:
    images = [noise(seed) for seed in range(20)]
    scores = known().calibrated(FakeScorer().score(images, LABELS))
    gain = Asking(model=MODEL, candidates=TopK(), none_offered=False, word_final=False).gain(scores)
    found = cascade(FakeJudge(), policy="calls <= 5").classify(images)
    assert {number for number, p in enumerate(found) if p.escalated} == set(np.argsort(-gain, kind="stable")[:5].tolist())


def test_where_asking_costs_more_the_gain_must_be_greater() -> None:
    images = [noise(seed) for seed in range(20)]
    free = cascade(FakeJudge(), policy="gain_per_dollar > 10").classify(images)
    assert sum(p.escalated for p in free) == 20

    class Priced(FakeJudge):
        def quote(self, question: Question) -> Quote:
            return Quote(usual_case=20_000_000)  # nanodollars

    scores = known().calibrated(FakeScorer().score(images, LABELS))
    worth = Asking(model=MODEL, candidates=TopK(), none_offered=False, word_final=False).gain(scores) > 10 * 0.02
    assert 0 < worth.sum() < 20
    assert [p.escalated for p in cascade(Priced(), policy="gain_per_dollar > 10").classify(images)] == worth.tolist()


# none of these, and widening


def ranked(seed: int) -> list[str]:
    """The labels as the calibrated scorer ranks them."""
    log_probs = known().calibrated(FakeScorer().score([noise(seed)], LABELS)).log_probs[0]
    return [NAMES[column] for column in np.argsort(-log_probs)]


SURE_OF_NONE = replace(MODEL, none_ability=8.0, class_bias=np.zeros(6))


@pytest.mark.parametrize("fusion", ["judge", "bayes"])
@pytest.mark.parametrize(("widen", "asked"), [(0, 1), (1, 2), (2, 3), (5, 3)])
def test_none_of_these_shows_the_next_candidates(fusion: FusionRule, widen: int, asked: int) -> None:
    """The truth is the scorer's last label. The judge finds it in the third list of two labels, if it is asked three times."""
    judge = FakeJudge(reply=says(ranked(1)[-1]), dollars=0.01)
    calibration = known(SURE_OF_NONE)
    found = cascade(judge, calibration, candidates=TopK(k=2), offer_none=True, widen=widen, fusion=fusion).classify(noise(1))
    shown = [[label.name for label in question.labels] for question in judge.questions]
    assert shown == [ranked(1)[0:2], ranked(1)[2:4], ranked(1)[4:6]][:asked]
    assert len(found.verdicts) == 1
    assert found.verdict is not None
    assert found.verdict.usage.requests == asked
    assert found.verdict.usage.input_tokens == 100 * asked
    assert found.cost.dollars == pytest.approx(0.01 * asked)
    assert [candidate.label.name for candidate in found.candidates] == shown[-1]
    if asked == 3:
        assert found.label == ranked(1)[-1]


def test_a_judge_that_names_what_was_not_shown_is_shown_it() -> None:
    judge = FakeJudge(reply=f"ANSWER: {ranked(1)[2]}")
    found = cascade(judge, known(SURE_OF_NONE), candidates=TopK(k=2), offer_none=True, widen=1).classify(noise(1))
    assert found.label == ranked(1)[2]
    assert len(judge.questions) == 2
    assert cascade(judge, candidates=TopK(k=2)).classify(noise(1)).verdicts[0].outcome == "unparsed"


@pytest.mark.parametrize("fusion", ["judge", "bayes"])
def test_widening_stops_where_nothing_new_is_left(fusion: FusionRule) -> None:
    judge = FakeJudge(reply=says("no such label"))
    calibration = known(SURE_OF_NONE)
    found = cascade(judge, calibration, candidates=TopK(k=3), offer_none=True, widen=9, fusion=fusion).classify(noise(2))
    shown = [{label.name for label in question.labels} for question in judge.questions]
    assert set().union(*shown) == set(NAMES)
    assert len(judge.questions) == 2
    assert found.verdict is not None
    assert found.verdict.outcome == "none"
    assert [candidate.label for candidate in found.candidates] == [*judge.questions[-1].labels]
    everything = FakeJudge(reply=says("no such label"))
    cascade(everything, candidates=TopK(k=6), offer_none=True, widen=9, fusion=fusion).classify(noise(2))
    assert len(everything.questions) == 1


@pytest.mark.parametrize("order", ["reversed", "shuffled"])
def test_where_nothing_new_is_left_the_candidates_stay_in_the_order_shown(order: Order) -> None:
    judge = FakeJudge(reply=says("no such label"))
    found = cascade(judge, candidates=TopK(k=6, order=order), offer_none=True, widen=2).classify(noise(2))
    (question,) = judge.questions
    assert [candidate.label for candidate in found.candidates] == [*question.labels]


@pytest.mark.parametrize("fusion", ["judge", "bayes"])
@pytest.mark.parametrize("widen", [2, 3, 4, 9])
def test_a_list_widens_as_often_as_it_may(fusion: FusionRule, widen: int) -> None:
    judge = FakeJudge(reply=says("no such label"))
    calibration = known(SURE_OF_NONE)
    cascade(judge, calibration, candidates=TopK(k=1), offer_none=True, widen=widen, fusion=fusion).classify(noise(1))
    assert [question.labels[0].name for question in judge.questions] == ranked(1)[: widen + 1]


class Metered(FakeJudge):
    """Every question costs a dollar, and its price is known before."""

    def quote(self, question: Question) -> Quote:
        return Quote(worst_case=1_000_000_000)


@pytest.mark.parametrize("fusion", ["judge", "bayes"])
def test_a_budget_spent_between_two_rounds_keeps_what_was_said(tmp_path: Path, fusion: FusionRule) -> None:
    judge = Metered(reply=says("no such label"), dollars=1.0)
    wide = cascade(
        judge,
        known(SURE_OF_NONE),
        candidates=TopK(k=2),
        offer_none=True,
        widen=3,
        fusion=fusion,
        ledger=Ledger(2.5),
    )
    record, (found,) = recorded(tmp_path, wide, 1)
    assert len(judge.questions) == 2
    assert found.verdict is not None
    assert found.verdict.outcome == "none"
    assert found.cost.dollars == 2.0
    shown = [label.name for label in judge.questions[-1].labels]
    assert [candidate.label.name for candidate in found.candidates] == shown
    assert [NAMES[column] for column in record.judged.candidates[0]] == shown


def test_an_error_in_a_later_round_keeps_what_was_said() -> None:
    replies: list[Reply] = ["ANSWER: C", BudgetExhausted("spent")]
    found = cascade(FakeJudge(reply=replies), candidates=TopK(k=2), offer_none=True, widen=1).classify(noise(1))
    once = cascade(FakeJudge(reply="ANSWER: C"), candidates=TopK(k=2), offer_none=True).classify(noise(1))
    assert (found.label, found.probability, found.candidates) == (once.label, once.probability, once.candidates)
    assert found.verdict is not None
    assert found.verdict.outcome == "none"


class CutOff(FakeJudge):
    """Its second answer is cut off, and paid for."""

    async def judge(self, question: Question) -> Verdict:
        verdict = await super().judge(question)
        return verdict if len(self.questions) == 1 else replace(verdict, outcome="failed", label=None, error="cut off")


@pytest.mark.parametrize("on_failure", ["scorer", "raise", "abstain"])
@pytest.mark.parametrize("judge", [FakeJudge, CutOff])
def test_no_answer_in_a_later_round_keeps_what_was_said_and_is_paid(judge: type[FakeJudge], on_failure: str) -> None:
    asked = judge(reply=["ANSWER: C", "mumble", "mumble"], dollars=0.01)
    ledger = Ledger()
    wide = cascade(asked, candidates=TopK(k=2), offer_none=True, widen=3, on_failure=on_failure, ledger=ledger)
    found = wide.classify(noise(1))
    assert found.verdict is not None
    assert found.verdict.outcome == "none"
    assert [candidate.label.name for candidate in found.candidates] == [label.name for label in asked.questions[0].labels]
    assert found.cost.requests == len(asked.questions) >= 2
    assert found.cost.dollars == pytest.approx(ledger.spent_dollars) == pytest.approx(0.01 * len(asked.questions))


# abstaining


@pytest.mark.parametrize("fusion", ["judge", "bayes"])
def test_labels_too_improbable_are_not_given(fusion: FusionRule) -> None:
    images = [noise(seed) for seed in range(20)]
    given_all = cascade(FakeJudge(), policy="gain > 0.25", fusion=fusion).classify(images)
    accept = float(np.median([p.probability for p in given_all if p.probability is not None]))
    given_some = cascade(FakeJudge(), policy="gain > 0.25", fusion=fusion, accept=accept).classify(images)
    abstained = [p.probability is not None and p.probability < accept for p in given_all]
    assert any(abstained)
    assert not all(abstained)
    for before, after, left_out in zip(given_all, given_some, abstained, strict=True):
        if left_out:
            assert (after.label, after.probability, after.decided_by) == (None, None, None)
            assert f"{before.label!r} has a probability of {before.probability:.2f}, below {accept:g}." in after.error
            assert after.candidates == before.candidates
        else:
            assert after == replace(before, verdicts=after.verdicts)
    if fusion == "judge":
        assert all(p.label for p in given_some if p.escalated)


# configurations


CONFIG: dict[str, JsonValue] = {"scorer": {"use": "open_clip:aviary"}, "stage": [{"judge": "hf_chat:aviary"}], "labels": [*NAMES]}


def written(folder: Path, *, policy: str | None = None, accept: float | None = None) -> str:
    path = folder / "calibration.json"
    settings: dict[str, JsonValue] = {
        "judge": "hf_chat:aviary",
        "prompt": "select",
        "offer_none": False,
        "support": None,
        "options": {},
    }
    (judge,) = known().judges
    known(judges=(replace(judge, settings=settings),), policy=policy, accept=accept).write(path)
    return str(path)


def test_a_configuration_takes_what_was_learned(tmp_path: Path) -> None:
    path = written(tmp_path, policy="gain > 0.25", accept=0.6)
    built = Config.parse({**CONFIG, "calibration": path}).build()
    (stage,) = built.stages
    assert isinstance(built.scorer, CalibratedScorer)
    assert (str(stage.policy), stage.fusion, built.accept) == ("gain > 0.25", "bayes", 0.6)
    assert stage.model is not None
    assert stage.model.ability == MODEL.ability

    own: dict[str, JsonValue] = {"calibration": path, "fusion": "judge", "accept": 0.0}
    built = Config.parse({**CONFIG, **own, "stage": [{"judge": "hf_chat:aviary", "policy": "margin < 0.1"}]}).build()
    assert (str(built.stages[0].policy), built.stages[0].fusion, built.accept) == ("margin < 0.1", "judge", 0.0)

    plain = Config.parse(CONFIG).build()
    assert (str(plain.stages[0].policy), plain.stages[0].fusion, plain.stages[0].model) == ("always", "judge", None)


@pytest.mark.parametrize(
    ("changed", "error", "sentence"),
    [
        ({"stage": [{"judge": "openai:gpt-4o"}]}, ConfigError, "with judge = 'hf_chat:aviary', and"),
        ({"stage": [{"judge": "hf_chat:aviary", "prompt": "select_cot"}]}, ConfigError, "with prompt = 'select'"),
        ({"stage": [{"judge": "hf_chat:aviary", "offer_none": True}]}, ConfigError, "with offer_none = False"),
        ({"stage": [{"judge": "hf_chat:aviary"}] * 2}, ConfigError, "has 1 stages, but the configuration has 2"),
        ({"calibration": "nowhere.json"}, ConfigError, "cannot be read"),
        ({"calibration": None, "fusion": "bayes"}, InputError, "needs a calibration"),
        ({"fusion": "median"}, ConfigError, "fusion: "),
        ({"accept": 1.5}, ConfigError, "accept: "),
        ({"stage": [{"judge": "hf_chat:aviary", "widen": -1}]}, ConfigError, "widen: "),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    tmp_path: Path, changed: dict[str, object], error: type[Exception], sentence: str
) -> None:
    whole = {**CONFIG, "calibration": written(tmp_path), **changed}
    with pytest.raises(error, match=sentence):
        Config.parse(json.loads(json.dumps(whole))).build()


def test_another_scorer_is_refused_at_the_first_image() -> None:
    other = Cascade(CalibratedScorer(FakeScorer("another"), known()), [], labels=LABELS)
    with pytest.raises(ConfigError, match="'fake:fake', and this scorer is 'fake:another'"):
        other.classify([picture(RED)])


@pytest.mark.parametrize(("mode", "fusion"), [("generate", "bayes"), ("likelihood", "bayes"), ("likelihood", "judge")])
def test_the_bundled_models_decide_as_their_record_says(tmp_path: Path, mode: str, fusion: FusionRule) -> None:
    """Eight bundled images with all eight names as candidates. The calibration comes from a record in which the judge was asked
    about all images. The run and the evaluation use the fusion of the configuration, not the fusion of the calibration.
    """
    from importlib import resources

    from cascadevlm.evaluation.data import read_data

    folder = Path(str(resources.files("cascadevlm_backends") / "aviary" / "images"))
    birds = sorted(folder.glob("*.jpg"))[:8]
    (tmp_path / "data.csv").write_text("path,label\n" + "".join(f"{bird},{bird.stem}\n" for bird in birds))
    labels = LabelSet.of(bird.stem for bird in birds)
    data = read_data(tmp_path / "data.csv", labels)
    whole: dict[str, object] = {
        "scorer": {"use": "open_clip:aviary"},
        "stage": [{"judge": "hf_chat:aviary", "candidates": {"k": 8}, "options": {"mode": mode}}],
        "cache": {"enabled": False},
    }

    def configured(**changed: object) -> Config:
        return Config.parse(json.loads(json.dumps(whole | changed)))

    asking = configured()
    record = record_run(asking.build(labels), data, tmp_path / "run", config=asking.model_dump(mode="json"))
    assert record.judged.probabilities is not None
    assert np.isnan(record.judged.probabilities).all() == (mode == "generate")
    calibration = replace(fit_calibration(three_times(record), Recipe()), policy="gain > 0.01")
    calibration.write(tmp_path / "calibration.json")
    deciding = configured(calibration=str(tmp_path / "calibration.json"), fusion=fusion)
    live = deciding.build(labels).classify(data.images)
    asked = asking_everything(deciding.build(labels))
    everything = record_run(asked, data, tmp_path / "decided", config=deciding.frozen(asked).model_dump(mode="json"))
    for known_all in (decided(record, replace(calibration, fusion=fusion)), everything):
        replayed = under(known_all, parse_policy("gain > 0.01"))
        assert [prediction.label for prediction in live] == [labels.names[column] for column in replayed.predicted]
        told = [np.nan if prediction.probability is None else prediction.probability for prediction in live]
        np.testing.assert_allclose(told, replayed.probabilities, atol=1e-4)
        if fusion != "judge":  # a replay calls what a calibration concludes fusion
            assert tuple(prediction.decided_by or "" for prediction in live) == replayed.decided_by


def three_times(record: Record) -> Record:
    """Enough to calibrate on."""
    return record.take(np.tile(np.arange(len(record)), 3))


def stage_of_expert(*names: str, policy: str) -> Stage:
    """The model of a judge that knows some classes, and names one of them for every image."""
    abilities = np.array([3.0 if name in names else -3.0 for name in NAMES])
    return Stage(
        judge=FakeJudge(model="-".join(names), reply=says(names[0])),
        prompt=SELECT,
        policy=parse_policy(policy),
        fusion="bayes",
        model=replace(JudgeModel.prior(len(NAMES)), abilities=abilities),
    )


INSECT, SWARM = (0, 200, 0), (0, 0, 200)
IN_DOUBT = FakeScorer(table={RED: [9, 0, 0, 0, 0, 0], INSECT: [5, 5, 0, 0, 0, 0], SWARM: [0, 0, 5, 5, 0, 0]})


def test_with_routing_an_image_goes_to_the_judge_who_knows_it() -> None:
    stages = [stage_of_expert(*names, policy="gain > 0.05") for names in (("ant", "bee"), ("dragonfly", "cicada"))]
    images = [picture(colour) for colour in (RED, INSECT, SWARM)]

    def heard(*, routing: bool) -> list[tuple[str | None, list[str]]]:
        predictions = Cascade(IN_DOUBT, stages, labels=LABELS, routing=routing).classify(images)
        return [(each.label, [verdict.judge for verdict in each.verdicts]) for each in predictions]

    assert heard(routing=True) == [("ant", []), ("ant", ["fake:ant-bee"]), ("dragonfly", ["fake:dragonfly-cicada"])]
    assert heard(routing=False) == [("ant", []), ("ant", ["fake:ant-bee"]), ("cicada", [])]


@pytest.mark.parametrize("policy", ["gain > 0.05", "gain_per_dollar > 40000"])
def test_a_record_with_routing_tells_who_said_what(tmp_path: Path, policy: str) -> None:
    stages = [
        replace(stage_of_expert(*names, policy=policy), judge=ByPixels(names[0], reply=says(names[0])))
        for names in (("ant", "bee"), ("dragonfly", "cicada"))
    ]
    images = {"red": RED, "insect": INSECT, "swarm": SWARM}
    data = Data(
        images=tuple(map(picture, images.values())), names=tuple(images), truths=("ant", "ant", "dragonfly"), splits=("",) * 3
    )
    config = Config.parse({"scorer": {"use": "fake:fake"}, "stage": [{"judge": each.judge.spec} for each in stages]})
    routed = Cascade(IN_DOUBT, stages, labels=LABELS, routing=True, store=MemoryStore())
    record = record_run(routed, data, tmp_path / "run", config=config.model_dump(mode="json"))
    assert [stage.asked.tolist() for stage in record.stages] == [[False, True, False], [False, False, True]]
    assert [stage.answers.tolist() for stage in record.stages] == [[NOBODY, 0, NOBODY], [NOBODY, NOBODY, 3]]
    lines = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert [line["verdict"] and line["verdict"]["stage"] for line in lines] == [None, 0, 1]


def test_an_answer_from_the_cache_is_of_the_stage_that_asks() -> None:
    judge, store = FakeJudge(reply="ANSWER: A"), MemoryStore()
    stage = Stage(judge=judge, prompt=SELECT)
    for stages in ([stage], [replace(stage, judge=FakeJudge("mute", reply="")), stage]):
        (prediction,) = Cascade(FakeScorer(), stages, labels=LABELS, store=store).classify([noise(1)])
        assert [verdict.stage for verdict in prediction.verdicts] == [*range(len(stages))]
    assert len(judge.questions) == 1


@pytest.mark.parametrize(("dollars", "judge"), [(0.01, "dear"), (0.5, "cheap")])
def test_with_routing_a_dear_judge_has_to_be_worth_its_price(dollars: float, judge: str) -> None:
    class Priced(FakeJudge):
        def quote(self, question: Question) -> Quote:
            return Quote(usual_case=int((dollars if self.spec == "fake:dear" else 0.01) * NANODOLLARS))

    cheap, dear = (
        replace(stage_of_expert("ant", "bee", policy="gain_per_dollar > 1"), judge=Priced(name, reply=says("ant")))
        for name in ("cheap", "dear")
    )
    better = replace(dear, model=replace(JudgeModel.prior(len(NAMES)), ability=9.0))
    (prediction,) = Cascade(IN_DOUBT, [cheap, better], labels=LABELS, routing=True).classify([picture(INSECT)])
    assert [verdict.judge for verdict in prediction.verdicts] == [f"fake:{judge}"]
    assert ("a later judge is worth more" in prediction.reasons[0]) == (judge == "dear")


class ByPixels(FakeJudge):
    """A judge with a price per pixel. The price of a question is computed outside the event loop."""

    def quote(self, question: Question) -> Quote:
        is_asked = question.label_set is not None
        assert is_asked or threading.current_thread().name.startswith("reading")
        return Quote(usual_case=question.image.width * question.image.height)


@pytest.mark.parametrize(("votes", "asked"), [(1, 2), (3, 1)])
def test_a_large_image_has_to_be_worth_its_price(votes: int, asked: int) -> None:
    """Equal pictures of 100, 10,000 and 1,000,000 pixels, in one or three batches. Only cheap pictures are escalated."""
    images = [picture(INSECT, size) for size in ((10, 10), (100, 100), (1000, 1000))]
    stage = stage_of_expert("ant", "bee", policy="gain_per_dollar > 20000")
    assert stage.asking is not None
    np.testing.assert_allclose(stage.asking.gain(IN_DOUBT.score(images, LABELS)), 0.49, atol=0.01)
    for batch in (1, 3):
        paid = replace(stage, judge=ByPixels(reply=says("ant")), votes=votes)
        predictions = Cascade(IN_DOUBT, [paid], labels=LABELS, batch_size=batch).classify(images)
        assert [each.escalated for each in predictions] == [number < asked for number in range(3)]


def test_a_file_is_not_opened_again_for_its_price(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large image is removed from memory after preprocessing, but the policy still needs its price."""
    picture(INSECT, (1500, 1000)).save(tmp_path / "large.png")
    opened: list[ImageSource] = []
    open_image = reading._open

    def noting(source: str | Path | bytes) -> Image.Image:
        opened.append(source)
        return open_image(source)

    class Preprocessing(FakeScorer):
        def prepare(self, source: ImageSource) -> Prepared:
            prepared = super().prepare(source)
            prepared.pixels = None
            return prepared

        def score_prepared(self, prepared: Sequence[Prepared], labels: LabelSet) -> Scores:
            return IN_DOUBT.score([picture(INSECT) for _ in prepared], labels)

    monkeypatch.setattr(reading, "_open", noting)
    dear = replace(stage_of_expert("ant", "bee", policy="gain_per_dollar > 1e12"), judge=ByPixels(reply=says("ant")))
    (prediction,) = Cascade(Preprocessing(), [dear], labels=LABELS).classify([tmp_path / "large.png"])
    assert (prediction.escalated, opened) == (False, [tmp_path / "large.png"])


def test_a_question_whose_price_is_not_known_fails_alone() -> None:
    """There is no price for this length. The question costs nothing, because it is not sent."""

    class KnownUpTo500Pixels(FakeJudge):
        def quote(self, question: Question) -> Quote:
            if question.image.width > 500:
                raise PermanentError("The question is too long.")
            return Quote(usual_case=1000)

    images = [picture(INSECT, size) for size in ((10, 10), (1000, 1000))]
    judge = KnownUpTo500Pixels(reply=says("ant"))
    stage = replace(stage_of_expert("ant", "bee", policy="gain_per_dollar > 20000"), judge=judge)
    short, long = Cascade(IN_DOUBT, [stage], labels=LABELS).classify(images)
    assert [verdict.outcome for verdict in short.verdicts] == ["answered"]
    assert [verdict.error for verdict in long.verdicts] == ["The question is too long."]
    assert len(judge.questions) == 1


def test_a_price_is_told_by_the_size_of_a_file_that_is_not_decoded(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for file, size in zip(files, ((10, 10), (1000, 1000), (2000, 1000)), strict=True):
        picture(INSECT, size).save(file)
    scored = IN_DOUBT.score([picture(INSECT)], LABELS)

    class Knowing(FakeScorer):
        """A scorer that has scored the images before. The second image is deleted now."""

        def prepare(self, source: ImageSource) -> Prepared:
            return Prepared(source=source)

        def score_prepared(self, prepared: Sequence[Prepared], labels: LabelSet) -> Scores:
            files[1].unlink()
            return replace(scored, log_probs=np.repeat(scored.log_probs, len(prepared), axis=0))

    stage = replace(stage_of_expert("ant", "bee", policy="gain_per_dollar > 20000"), judge=ByPixels(reply=says("ant")))
    predictions = Cascade(Knowing(), [stage], labels=LABELS).classify(files)
    assert [each.verdict and each.verdict.outcome for each in predictions] == ["answered", "failed", None]
    assert predictions[1].label == "ant"


@pytest.mark.parametrize("policies", [*permutations(["gain > 0.1", "entropy > 0.1"])])
@pytest.mark.parametrize("also", ["", " & gain > 0.1", " & calls <= 5", " | never"])
def test_routing_wants_policies_of_gain_alone(policies: tuple[str, str], also: str) -> None:
    stages = [stage_of_expert("ant", policy=policy + also) for policy in policies]
    with pytest.raises(PolicyError, match=r"cannot choose between judges. With routing, use only a gain policy"):
        Cascade(IN_DOUBT, stages, labels=LABELS, routing=True)


def test_routing_wants_judges_to_choose_between() -> None:
    with pytest.raises(InputError, match="Routing needs two judges to choose between"):
        Cascade(IN_DOUBT, [stage_of_expert("ant", policy="gain > 0.1")], labels=LABELS, routing=True)


def test_stages_of_different_fusion_are_no_cascade() -> None:
    """The first judge's final answer would be lost behind a second judge that gives no answer and whose answers are fused."""
    fused = stage_of_expert("ant", policy="always")
    with pytest.raises(InputError, match=r"The stages have different fusions: 'bayes' and 'judge'\."):
        Cascade(IN_DOUBT, [replace(fused, fusion="judge"), fused], labels=LABELS)


def test_asking_everything_asks_every_judge_whatever_the_routing() -> None:
    stages = [stage_of_expert("ant", "bee", policy="gain > 0.05"), stage_of_expert("fly", policy="gain > 0.05")]
    routed = Cascade(IN_DOUBT, stages, labels=LABELS, routing=True)
    predictions = asking_everything(routed).classify([picture(colour) for colour in (RED, INSECT)])
    assert [len(each.verdicts) for each in predictions] == [2, 2]
    assert routed.routing


def test_with_routing_nothing_is_left_to_a_later_judge_where_no_policy_wants_it() -> None:
    """The gain of the later judge is larger, but below the threshold of its policy."""
    stages = [stage_of_expert("ant", "bee", policy="gain > 0.9"), stage_of_expert("ant", "bee", policy="gain > 0.8")]
    for prediction in Cascade(IN_DOUBT, stages, labels=LABELS, routing=True).classify([picture(RED), picture(INSECT)]):
        assert not prediction.verdicts
        (reason,) = prediction.reasons
        assert "a later judge" not in reason


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 99), st.floats(0, 0.3), st.floats(0, 0.3), st.integers(1, 9))
def test_with_routing_no_image_is_asked_about_where_no_policy_wants_it(
    seed: int, first: float, second: float, batch: int
) -> None:
    stages = [stage_of_expert("ant", "bee", policy=f"gain > {first}"), stage_of_expert("fly", policy=f"gain > {second}")]
    images = [noise(seed + number) for number in range(12)]
    predictions = Cascade(FakeScorer(), stages, labels=LABELS, routing=True, batch_size=batch).classify(images)
    scores = FakeScorer().score(images, LABELS)
    wanted = [as_policy(stage.policy).select(scores, Spending(gain=stage.gain(scores))) for stage in stages]
    for prediction, by_first, by_second in zip(predictions, *wanted, strict=True):
        assert bool(prediction.verdicts) == (by_first or by_second)
        assert prediction.escalated == bool(prediction.verdicts)

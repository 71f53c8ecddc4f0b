"""The calibration file and its refusals, records with a calibration, thresholds for targets, and the data that a calibration
uses.
"""

import asyncio
import json
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import JsonValue, TypeAdapter

from benchmarks.decision import made_up
from benchmarks.sweep import judged_all
from cascadevlm import Cascade, Label, Stage, load_prompt, load_scorer
from cascadevlm.base.arrays import NOBODY
from cascadevlm.base.errors import ConfigError, DataError
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Scores, Verdict
from cascadevlm.cascade.candidates import TopK
from cascadevlm.cascade.fusing import Asking
from cascadevlm.cascade.item import Item, believed, current
from cascadevlm.cli.show import calibration_rows
from cascadevlm.config.config import CandidatesConfig, Config
from cascadevlm.decision.calibration import Calibration, FusionRule, read_calibration
from cascadevlm.decision.guarantee import fit_acceptance
from cascadevlm.decision.judge_model import JudgeModel
from cascadevlm.decision.scorer_calibration import ScorerCalibration
from cascadevlm.decision.shares import Following, Seen
from cascadevlm.evaluation.calibrating.calibrate import calibrate
from cascadevlm.evaluation.calibrating.fitting import fit_calibration
from cascadevlm.evaluation.calibrating.recipe import PolicyMeasure, Recipe
from cascadevlm.evaluation.calibrating.targets import Target, TargetKind, outcome, policy_for
from cascadevlm.evaluation.deciding import decided, held_out
from cascadevlm.evaluation.metrics import expected_calibration_error
from cascadevlm.evaluation.record import Record
from cascadevlm.evaluation.sweep import sweep, under
from cascadevlm.policies.language import parse_policy
from cascadevlm.policies.limits import WithinCalls
from cascadevlm.policies.measures import entropy, margin, top_probability
from cascadevlm.policies.rules import Always, EntropyAbove, GainAbove
from cascadevlm.runs.ray.workers import ScoredBatch, packed, unpacked
from cascadevlm.scorers.base import Prepared
from cascadevlm.testing import FakeJudge, FakeScorer, noise
from tests.calibrations import some_calibration

seeds = st.integers(0, 10_000)
ADAPTER = TypeAdapter(Calibration)


def content(calibration: Calibration) -> JsonValue:
    """All fields except the time."""
    data = json.loads(ADAPTER.dump_json(calibration))
    return {name: value for name, value in data.items() if name != "made"}


@cache
def learned() -> Calibration:
    return fit_calibration(record().take(np.arange(100)), Recipe())


@cache
def record() -> Record:
    return made_up(1, 300, 6, 4)


def known_to(record: Record) -> Calibration:
    """A calibration for a record's scorer and judge, without a fit."""
    classes = len(record.labels)
    model = replace(JudgeModel.prior(classes), ability=2.0)
    return replace(
        some_calibration(record.labels.names, model, judge=record.judged.judge),
        fingerprint=record.scores.fingerprint,
        scorer=ScorerCalibration(method="bias", scale=0.6, bias=np.linspace(-0.5, 0.5, classes)),
    )


# the artifact


@pytest.mark.parametrize("labelled", [True, False])
def test_a_calibration_is_read_as_it_was_written(tmp_path: Path, labelled: bool) -> None:
    calibration = replace(
        fit_calibration(record().take(np.arange(100)), Recipe(labelled=labelled)),
        policy="gain > 0.02",
        accept=0.6,
        figures={"area": 0.9, "nothing": None, "nested": {"a": [1, 2]}},
    )
    path = tmp_path / "calibration.json"
    calibration.write(path)
    again = read_calibration(path)
    assert ADAPTER.dump_json(again) == ADAPTER.dump_json(calibration)
    assert again.labelled is json.loads(path.read_text())["labelled"] is labelled
    assert again.calibrated_fingerprint == calibration.calibrated_fingerprint
    for fused in (decided(record(), each) for each in (again, calibration)):
        assert fused.fused is not None
        np.testing.assert_array_equal(fused.fused.labels, _labels(decided(record(), calibration)))


def _labels(fused: Record) -> list[int]:
    assert fused.fused is not None
    return [int(label) for label in fused.fused.labels]


def test_calibrated_scores_are_calibrated_once() -> None:
    once = learned().calibrated(record().scores)
    assert once.fingerprint != record().scores.fingerprint
    assert learned().calibrated(once) is once
    other = replace(learned(), scorer=replace(learned().scorer, scale=learned().scorer.scale * 2))
    with pytest.raises(ConfigError, match="was made for the scorer"):
        other.calibrated(once)


def test_other_scorers_label_sets_and_stages_are_refused() -> None:
    scores = record().scores
    with pytest.raises(ConfigError, match=r"for the scorer 'made up 1', and this scorer is 'another'\. Make a"):
        learned().calibrated(replace(scores, fingerprint="another"))
    backwards = LabelSet.of(reversed(scores.labels.names))
    with pytest.raises(ConfigError, match="differ from these in their names or order"):
        learned().calibrated(Scores(log_probs=scores.log_probs[:, ::-1], labels=backwards, fingerprint=scores.fingerprint))
    fewer = Scores.from_logits(scores.log_probs[:, :4], LabelSet(scores.labels.labels[:4]), scores.fingerprint)
    with pytest.raises(ConfigError, match="6 labels that differ"):
        learned().calibrated(fewer)
    with pytest.raises(ConfigError, match="has 1 judges, and the record has 2"):
        decided(replace(record(), stages=(record().judged,) * 2), learned())


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("clip:b|templates=1|texts=3", r"was made with other texts for the labels\."),
        ("clip:b|templates=2|texts=2", r"was made with other templates\."),
        ("clip:b|templates=2|texts=3", "was made with other templates and texts for the labels"),
        ("clip:l|templates=1|texts=3", r"for the scorer 'clip:b\|templates=1\|texts=2', and this scorer is"),
    ],
)
def test_other_wordings_are_refused_and_named(given: str, sentence: str) -> None:
    calibration = replace(learned(), fingerprint="clip:b|templates=1|texts=2")
    with pytest.raises(ConfigError, match=sentence):
        calibration.calibrated(replace(record().scores, fingerprint=given))


def test_a_calibration_is_refused_where_the_judge_is_shown_other_descriptions() -> None:
    def described(*descriptions: str) -> Scores:
        labels = LabelSet.of(map(lambda label, text: replace(label, description=text), record().labels, descriptions))
        return replace(record().scores, labels=labels)

    plain, brown, white = described(*[""] * 6), described(*["brown"] * 6), described(*["brown"] * 5, "white")
    made = fit_calibration(replace(record(), scores=brown).take(np.arange(100)), Recipe())
    assert made.calibrated(described(*[" brown\n"] * 6)).fingerprint == made.calibrated_fingerprint
    assert learned().calibrated(plain).fingerprint == learned().calibrated_fingerprint
    for calibration, others in ((made, (plain, white)), (learned(), (brown,))):
        for other in (*others, *(replace(each, fingerprint=calibration.calibrated_fingerprint) for each in others)):
            with pytest.raises(ConfigError, match="made with other descriptions of the labels"):
                calibration.calibrated(other)


def test_a_calibration_is_refused_where_the_labels_have_other_texts() -> None:
    names = ["red-crowned plain owl", "blue-crowned spotted duck", "yellow-crowned barred wren"]
    drawn = LabelSet.of(Label(name=name, text=f"a drawing of a {name}") for name in names)
    scorer = load_scorer("open_clip:aviary", device="cpu")
    made_with = scorer.score([noise(1)], LabelSet.of(names)).fingerprint
    calibration = replace(some_calibration(names, JudgeModel.prior(len(names))), fingerprint=made_with)
    Cascade(scorer, [], labels=names, calibration=calibration).classify(noise(1))
    with pytest.raises(ConfigError, match="made with other texts for the labels"):
        Cascade(scorer, [], labels=drawn, calibration=calibration).classify(noise(1))


def test_texts_of_labels_are_in_the_fingerprint_of_any_scorer() -> None:
    names = LabelSet.of(["ant", "bee"])
    drawn, painted = (LabelSet.of(Label(name=name, text=f"a {kind} of a {name}") for name in names.names) for kind in ("a", "b"))
    plain, *others = (FakeScorer().score([noise(1)], labels).fingerprint for labels in (names, drawn, painted))
    assert plain == "fake:fake"
    assert others == [f"fake:fake|{labels.texts_part}" for labels in (drawn, painted)]
    assert drawn.texts_part != painted.texts_part
    known = "model|templates=1|" + drawn.texts_part
    assert Scores.from_logits(np.zeros((1, 2)), drawn, known).fingerprint == known


@dataclass(frozen=True, kw_only=True)
class NotedScores(Scores):
    """Scores with one more field, as in later versions."""

    note: str


def test_no_field_of_scores_is_lost_on_their_way() -> None:
    labels = record().labels
    noted = NotedScores(log_probs=record().scores.log_probs[:1], labels=labels, fingerprint=learned().fingerprint, note="kept")
    candidates = TopK(k=2).choose(noted)[0]
    item = Item(number=0, path="", prepared=Prepared(source=""), chunk=noted.rows(np.array([0, 0])), row=1, candidates=candidates)
    item.hear(Stage(judge=FakeJudge(), prompt=load_prompt("select")), Verdict(outcome="none"))
    asking = Asking(model=JudgeModel.prior(len(labels)), candidates=TopK(), none_offered=False, word_final=False)
    answered = Verdict(outcome="answered", label=candidates[1].label.name)
    batch = ScoredBatch(paths=["a"], errors=[None], digests=[""], sizes=[None], scores=noted)
    sent = unpacked(packed(batch), labels)
    assert isinstance(sent, ScoredBatch)
    on_its_way = [
        noted.rows(slice(1)),
        learned().calibrated(noted),
        believed([item]),
        believed([item, item]),
        sent.scores,
        Scores.joined([noted, noted]),
        item.belief,
        asking.fuse(noted, candidates, answered),
        asyncio.run(Following(learned().shares, Seen(), 32).adjusted(noted, 0)),
    ]
    item.verdicts.append(answered)
    on_its_way += [current([item]), item.scores]
    assert [each.note for each in on_its_way if isinstance(each, NotedScores)] == ["kept"] * len(on_its_way)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"judge": "openai:gpt-4o-mini"}, "with judge = 'openai:gpt-4o', and the configuration has 'openai:gpt-4o-mini'"),
        ({"prompt": "select"}, "with prompt = 'select_cot', and the configuration has 'select'"),
        ({"offer_none": True}, "with offer_none = False, and the configuration has True"),
        ({"options": {"temperature": 1}}, "with options = {}, and the configuration has {'temperature': 1}"),
    ],
)
def test_other_judges_are_refused(changed: dict[str, JsonValue], sentence: str) -> None:
    settings: dict[str, JsonValue] = {
        "judge": "openai:gpt-4o",
        "prompt": "select_cot",
        "offer_none": False,
        "support": None,
        "options": {},
    }
    (judge,) = learned().judges
    calibration = replace(learned(), judges=(replace(judge, judge="openai:gpt-4o", settings=settings),))
    assert calibration.judge_of(0, settings | {"policy": "always", "candidates": 3}) is calibration.judges[0]
    with pytest.raises(ConfigError, match=sentence):
        calibration.judge_of(0, settings | changed)
    with pytest.raises(ConfigError, match="has 1 judges, and the configuration has a stage 2"):
        calibration.judge_of(1, settings)


@pytest.mark.parametrize("text", ["", "no json", "[]", "{}", '{"format": 2}', '{"format": 1, "labels": ["a"], "fingerprint": 3}'])
def test_what_is_no_calibration_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="is not a calibration: ") as caught:
        read_calibration(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"cannot be read: No such file"):
        read_calibration(tmp_path / "nowhere.json")
    with pytest.raises(DataError, match="cannot be written"):
        learned().write(tmp_path / "nowhere" / "calibration.json")


def configured(calibration: Calibration, folder: Path, candidates: JsonValue) -> Config:
    """As many judges as the calibration has. They do not exist."""
    calibration.write(folder / "calibration.json")
    data: dict[str, JsonValue] = {"scorer": {"use": "recorded:nothing"}, "labels": [*calibration.labels]}
    stages: list[JsonValue] = [{"judge": "recorded:nothing", "candidates": candidates} for _ in calibration.judges]
    return Config.parse(data | {"calibration": str(folder / "calibration.json"), "stage": stages})


def test_the_best_list_is_that_of_each_stage(tmp_path: Path) -> None:
    first = record().judged
    calibration = fit_calibration(replace(record(), stages=(first, first)), Recipe())
    assert all(judge.best_size in range(2, 7) for judge in calibration.judges)
    sizes = 3, 5
    judges = [replace(judge, best_size=size) for judge, size in zip(calibration.judges, sizes, strict=True)]
    calibration = replace(calibration, judges=tuple(judges))
    config = configured(calibration, tmp_path, "best")
    cascade = config.build()
    assert tuple(stage.candidates.k for stage in config.frozen(cascade).stage) == sizes
    assert tuple(stage.candidates for stage in cascade.stages) == tuple(TopK(k=size) for size in sizes)


def test_a_best_list_without_a_calibration_is_refused(tmp_path: Path) -> None:
    without = configured(known_to(record()), tmp_path, {"k": "best"}).model_copy(update={"calibration": None})
    with pytest.raises(ConfigError, match='"best" needs a calibration'):
        without.build()


def test_a_judge_that_is_lost_in_long_lists_gets_short_ones() -> None:
    found = []
    for ability in (0.5, 9.0):
        rng, whole = np.random.default_rng(3), made_up(3, 400, 10, 10)
        utilities = rng.gumbel(size=(400, 10)) + ability * np.eye(10)[whole.truths]
        answering = judged_all(whole.scores, whole.truths, utilities.argmax(axis=1), "made up", 0.0)
        found.append(fit_calibration(answering, Recipe()).judges[0].best_size)
    lost, able = found
    assert lost is not None
    assert able is not None
    assert lost < able


def test_lists_may_have_a_threshold_for_every_class(tmp_path: Path) -> None:
    calibration = fit_calibration(record(), Recipe(coverage=0.8, class_conditional=True))
    cascade = configured(calibration, tmp_path, {"coverage": 0.8, "minimum": 1, "maximum": 4}).build()
    rule, scores = cascade.stages[0].candidates, calibration.calibrated(record().scores)
    assert calibration.conformal is not None
    assert calibration.conformal.class_thresholds is not None
    for row, shown in enumerate(rule.choose(scores)):
        probabilities = scores.probabilities[row]
        ranks = (-probabilities).argsort(kind="stable").argsort() + 1
        columns = [scores.labels.columns[candidate.label.name] for candidate in shown]
        assert [candidate.rank for candidate in shown] == ranks[columns].tolist() == sorted(ranks[columns])
        assert [candidate.probability for candidate in shown] == probabilities[columns].tolist()


def test_without_labels_no_likelihood_is_told() -> None:
    (judge,) = fit_calibration(record().take(np.arange(100)), Recipe(labelled=False)).judges
    assert judge.log_likelihood is None


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(json.loads(ADAPTER.dump_json(learned())) | {"format": 2}))
    with pytest.raises(ConfigError, match="format"):
        read_calibration(path)


# records


def test_too_little_is_refused() -> None:
    with pytest.raises(DataError, match="answered only 10 images"):
        fit_calibration(record().take(np.arange(10)), Recipe())
    gated = under(record(), WithinCalls(5))
    with pytest.raises(DataError, match="answered only 5 images"):
        fit_calibration(gated, Recipe(labelled=False))


def test_unreadable_images_are_left_out_of_the_fit_and_of_the_decisions() -> None:
    given_record = record()
    readable = np.arange(300) >= 40
    scores = given_record.scores.log_probs.copy()
    scores[~readable] = -np.log(6)
    judged = given_record.judged
    broken = replace(
        given_record,
        readable=readable,
        scores=replace(given_record.scores, log_probs=scores),
        stages=(
            replace(
                judged,
                asked=judged.asked & readable,
                outcomes=tuple(outcome if read else "" for outcome, read in zip(judged.outcomes, readable, strict=True)),
                answers=np.where(readable, judged.answers, NOBODY),
                candidates=np.where(readable[:, None], judged.candidates, NOBODY),
            ),
        ),
    )
    calibration = fit_calibration(broken, Recipe())
    assert calibration.fitted_on == given_record.names[40:]
    assert content(calibration) == content(fit_calibration(given_record.take(np.arange(40, 300)), Recipe()))
    fused = decided(broken, calibration)
    assert fused.fused is not None
    assert set(fused.fused.labels[:40]) == {NOBODY}
    gated = under(fused, GainAbove(0.02))
    assert not gated.judged.asked[:40].any()
    assert set(gated.predicted[:40]) == {NOBODY}


def test_what_was_fitted_on_is_left_out() -> None:
    rest = held_out(record(), learned())
    assert rest.names == record().names[100:]
    np.testing.assert_array_equal(rest.truths, record().truths[100:])
    with pytest.raises(DataError, match="every image"):
        held_out(record().take(np.arange(50)), learned())


@settings(max_examples=30)
@given(seeds, st.booleans())
def test_the_gain_curve_is_what_the_policy_gives(seed: int, word_of_judge: bool) -> None:
    given_record = made_up(seed, 60, 5, 3)
    calibration = replace(known_to(given_record), fusion="judge" if word_of_judge else "bayes")
    fused = decided(given_record, calibration)
    (curve,) = [curve for curve in sweep(fused).curves if curve.name == "gain"]
    assert curve.thresholds is not None
    for rate, accuracy, dollars, least in zip(
        curve.deferral_rates, curve.accuracies, curve.dollars, curve.thresholds, strict=True
    ):
        gated = under(fused, GainAbove(float(np.nan_to_num(least, nan=1).clip(-1, 1))))
        if gated.judged.asked.mean() == rate:
            assert (gated.predicted == gated.truths).mean() == pytest.approx(accuracy)
            assert 1000 * gated.judged.dollars.mean() == pytest.approx(dollars)


@settings(max_examples=30)
@given(seeds)
def test_records_are_decided_by_bayes_rule(seed: int) -> None:
    """For every image alone: the scorer's probabilities times the likelihood of the answer, computed by hand."""
    given_record = made_up(seed, 30, 5, 3)
    calibration = known_to(given_record)
    fused = under(decided(given_record, calibration), EntropyAbove(0.5))
    calibrated = calibration.calibrated(given_record.scores)
    asked = entropy(calibrated) > 0.5
    np.testing.assert_array_equal(fused.judged.asked, asked)
    for row in range(30):
        belief = np.exp(calibrated.log_probs[row].astype(float))
        if asked[row]:
            shown, answer = given_record.judged.candidates[row], given_record.judged.answers[row]
            for truth in range(5):
                weights = np.exp(0.5 * calibrated.log_probs[row, shown].astype(float) + 2.0 * (shown == truth))
                belief[truth] *= weights[shown == answer][0] / weights.sum()
            belief /= belief.sum()
        assert fused.predicted[row] == belief.argmax()
        assert fused.probabilities[row] == pytest.approx(belief.max(), abs=1e-6)
        assert fused.decided_by[row] == ("fusion" if asked[row] else "scorer")


def test_images_the_judge_failed_on_keep_the_scorers_belief() -> None:
    given_record = made_up(3, 30, 5, 3)
    failed = replace(given_record.judged, outcomes=("failed",) * 30, answers=np.full(30, NOBODY))
    fused = decided(replace(given_record, stages=(failed,)), known_to(given_record))
    assert _labels(fused) == [int(label) for label in fused.scored]
    assert fused.fused is not None
    np.testing.assert_allclose(fused.fused.probabilities, fused.scores.probabilities.max(axis=1), atol=1e-6)


def test_two_judges_are_heard_one_after_the_other() -> None:
    """A second judge that is always right is trusted, and the first judge does not reduce this."""
    first = record()
    perfect = replace(first.judged, answers=first.truths, candidates=np.tile(np.arange(6), (300, 1)))
    both = replace(first, stages=(first.judged, perfect))
    calibration = fit_calibration(both.take(np.arange(100)), Recipe())
    assert calibration.judges[1].model.ability > calibration.judges[0].model.ability
    fused, alone = decided(both, calibration), decided(first, replace(calibration, judges=calibration.judges[:1]))
    assert fused.fused is not None
    assert alone.fused is not None
    assert (fused.fused.labels == first.truths).mean() > 0.98 > (alone.fused.labels == first.truths).mean()


# targets

KINDS: list[TargetKind] = ["deferral_rate", "dollars_per_thousand", "accuracy", "judge_share"]


def reached(fused: Record, policy_text: str) -> dict[TargetKind, float]:
    """The result of a policy, and the cost of each image."""
    gated = under(fused, parse_policy(policy_text))
    accuracy = float((gated.predicted == gated.truths).mean())
    whole = under(fused, parse_policy("always"))
    return {
        "deferral_rate": float(gated.judged.asked.mean()),
        "dollars_per_thousand": float(1000 * gated.judged.dollars.mean()),
        "accuracy": accuracy,
        "judge_share": accuracy / float((whole.predicted == whole.truths).mean()),
    }


def all_policies(fused: Record, measure: str) -> list[str]:
    """One policy for every set of images that a threshold of a measure can escalate."""
    assert fused.fused is not None
    measures = {"entropy": entropy, "margin": margin, "top_probability": top_probability}
    values = fused.fused.gain if measure == "gain" else measures[measure](fused.scores).astype(float)
    edges = np.unique(values)
    comparison = ">" if measure in ("gain", "entropy") else "<"
    return ["always", "never", *(f"{measure} {comparison} {value:.17g}" for value in (edges[1:] + edges[:-1]) / 2)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("measure", ["gain", "margin"])
@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_targets_are_met_with_the_fewest_questions(kind: TargetKind, measure: str, level: float) -> None:
    """Compared with all possible thresholds. Limits are used up as far as possible."""
    given_record = made_up(2, 25, 4, 3)
    fused = decided(given_record, known_to(given_record))
    possible = [reached(fused, policy) for policy in all_policies(fused, measure)]
    limited = kind in ("deferral_rate", "dollars_per_thousand")
    wanted = float(np.quantile([each[kind] for each in possible], level, method="nearest"))
    wanted = min(wanted + 1e-9, 1.0 if kind == "deferral_rate" else np.inf) if limited else wanted - 1e-9
    found = reached(fused, policy_for(fused, measure, Target(kind=kind, value=wanted)))
    meeting = [each for each in possible if (each[kind] <= wanted if limited else each[kind] >= wanted)]
    assert found[kind] <= wanted if limited else found[kind] >= wanted
    best = (max if limited else min)(each["deferral_rate"] for each in meeting)
    assert found["deferral_rate"] == pytest.approx(best)


def equal_scores() -> Record:
    """Forty images of four labels. Twenty images have the same scores, so no threshold can separate them."""
    given_record = made_up(5, 40, 4, 4)
    logits = given_record.scores.log_probs.copy()
    logits[10:30] = logits[10]
    return judged_all(
        Scores.from_logits(logits, given_record.labels, "equal"), given_record.truths, given_record.truths, "perfect", 0.01
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", [0.3, 0.7])
def test_targets_are_met_where_images_are_equal(kind: TargetKind, level: float) -> None:
    fused = decided(equal_scores(), known_to(equal_scores()))
    limited = kind in ("deferral_rate", "dollars_per_thousand")
    possible = [reached(fused, policy)[kind] for policy in all_policies(fused, "gain")]
    wanted = min(possible) + level * (max(possible) - min(possible)) + (1e-9 if limited else -1e-9)
    found = reached(fused, policy_for(fused, "gain", Target(kind=kind, value=wanted)))[kind]
    assert found <= wanted if limited else found >= wanted


@pytest.mark.parametrize(
    ("kind", "value", "sentence"),
    [
        ("accuracy", 0.999, r"reaches the target accuracy = 0\.999"),
        ("judge_share", 2.0, r"reaches the target judge_share = 2"),
    ],
)
def test_a_target_out_of_reach_is_told_with_what_can_be_had(kind: TargetKind, value: float, sentence: str) -> None:
    fused = decided(record().take(np.arange(60)), known_to(record()))
    values = [reached(fused, policy)[kind] for policy in all_policies(fused, "gain")]
    with pytest.raises(DataError, match=sentence) as caught:
        policy_for(fused, "gain", Target(kind=kind, value=value))
    assert f"The highest value on these 60 images is {max(values):.4g}." in caught.value.hint


def test_the_outcome_is_that_of_the_policy_on_other_images() -> None:
    fused = decided(record(), learned())
    found = outcome(fused, GainAbove(0.02))
    gated = under(fused, GainAbove(0.02))
    assert found.accuracy == pytest.approx((gated.predicted == gated.truths).mean())
    assert found.deferral_rate == pytest.approx(gated.judged.asked.mean())
    assert found.judge_accuracy == pytest.approx((np.array(_labels(fused)) == fused.truths).mean())
    assert found.accuracy_interval is not None
    assert found.accuracy_interval[0] < found.accuracy < found.accuracy_interval[1]
    assert json.loads(json.dumps(found.to_dict()))["images"] == 300


# calibrating


def truths_swapped(record: Record, names: tuple[str, ...], *, inside: bool) -> Record:
    """A copy with other truths, for the selected images or for all other images."""
    rows = np.flatnonzero(np.isin(record.names, names) == inside)
    truths = record.truths.copy()
    truths[rows] = np.roll(truths[rows], 7)
    return replace(record, truths=truths)


TARGETS: list[Target | None] = [None, Target(kind="accuracy", value=0.8)]


@pytest.mark.parametrize("target", TARGETS)
def test_labels_of_other_images_are_not_looked_at(target: Target | None) -> None:
    one = calibrate(record(), Recipe(size=120, target=target)).calibration
    moved = truths_swapped(record(), one.fitted_on, inside=False)
    other = calibrate(moved, Recipe(size=120, target=target)).calibration
    assert one.fitted_on == other.fitted_on
    assert content(replace(one, figures={})) == content(replace(other, figures={}))
    assert one.figures != other.figures


@pytest.mark.parametrize("fusion", ["bayes", "judge"])
def test_without_labels_none_are_looked_at(fusion: FusionRule) -> None:
    shuffled = replace(record(), truths=np.random.default_rng(0).permutation(record().truths))
    one, other = (calibrate(each, Recipe(size=120, labelled=False, fusion=fusion)) for each in (record(), shuffled))
    assert not one.calibration.labelled
    assert content(one.calibration) == content(other.calibration)
    assert calibration_rows(one) == calibration_rows(other)


def test_with_labels_those_of_its_own_images_are_looked_at() -> None:
    one = calibrate(record(), Recipe(size=120)).calibration
    labelled = [
        calibrate(each, Recipe(size=120)).calibration.judges[0].model.ability
        for each in (record(), truths_swapped(record(), one.fitted_on, inside=True))
    ]
    assert labelled[0] > labelled[1] + 1


def test_figures_are_those_of_the_held_out_images() -> None:
    result = calibrate(record(), Recipe(size=120))
    rest = held_out(record(), result.calibration)
    assert len(rest) == 180
    after = decided(rest, result.calibration)
    for figures, scores in ((result.before, rest.scores), (result.after, after.scores)):
        assert figures is not None
        right = scores.log_probs.argmax(axis=1) == rest.truths
        assert figures["accuracy"] == pytest.approx(right.mean())
        assert figures["log_likelihood"] == pytest.approx(scores.log_probs[np.arange(180), rest.truths].mean())
        error = expected_calibration_error(scores.probabilities.max(axis=1), right)
        assert figures["calibration_error"] == pytest.approx(error)
    areas = [{curve.name: curve.area for curve in sweep(each).curves} for each in (rest, after)]
    assert result.areas == pytest.approx((areas[0]["entropy"], areas[1]["gain"]))
    assert result.calibration.figures["area_gain_fused"] == result.areas[1]  # type: ignore[index]


@pytest.mark.parametrize("measure", ["gain", "margin"])
def test_a_target_gives_a_policy_that_is_told_on_other_images(measure: PolicyMeasure) -> None:
    result = calibrate(record(), Recipe(size=150, measure=measure, target=Target(kind="deferral_rate", value=0.3)))
    assert result.calibration.policy is not None
    assert str(parse_policy(result.calibration.policy)) == result.calibration.policy
    assert result.calibration.policy.startswith(measure)
    assert len(result.calibration.fitted_on) == 150
    assert result.outcome is not None
    assert result.outcome.images == 150
    assert result.outcome.deferral_rate == pytest.approx(0.3, abs=0.15)


def test_what_chose_the_policy_promises_nothing() -> None:
    big = made_up(4, 1500, 6, 6)
    result = calibrate(big, Recipe(size=900, target=Target(kind="deferral_rate", value=0.3), target_error=0.2))
    assert result.calibration.policy is not None
    last = np.array_split(np.random.default_rng(0).permutation(1500)[:900], 3)[-1]
    part = under(decided(big.take(np.sort(last)), result.calibration), result.calibration.policy)
    assert result.acceptance == fit_acceptance(part.probabilities, part.predicted == part.truths, target_error=0.2)


def test_a_promised_error_is_one_among_accepted_answers() -> None:
    big = made_up(4, 1500, 6, 6)
    result = calibrate(big, Recipe(size=1000, target_error=0.2))
    assert result.acceptance is not None
    assert result.acceptance.threshold == result.calibration.accept
    assert result.calibration.accept is not None
    fused = decided(held_out(big, result.calibration), result.calibration).fused
    assert fused is not None
    accepted = fused.probabilities >= result.calibration.accept
    right = fused.labels == held_out(big, result.calibration).truths
    assert accepted.mean() > 0.3
    assert 1 - right[accepted].mean() < 0.22


@pytest.mark.parametrize(
    ("stage", "others", "told"),
    [
        ({"policy": "entropy > 0.3"}, {}, r"policy = 'always', and the configuration has 'entropy > 0\.3'\. .* set accept"),
        ({}, {"fusion": "judge"}, "for fusion = 'bayes', and the configuration has 'judge'"),
        ({}, {"follow_shares": True}, "for follow_shares = False, and the configuration has True"),
        ({}, {"learn": True}, "for learn = False, and the configuration has True"),
        ({"widen": 1, "offer_none": True}, {}, "for widen = 0, and the configuration has 1"),
        ({"candidates": 3}, {}, "for candidates ="),
        ({"policy": "entropy > 0.3"}, {"accept": 0.7}, None),
        ({}, {}, None),
    ],
)
def test_a_guarantee_is_of_what_it_was_fitted_with(
    tmp_path: Path, stage: dict[str, JsonValue], others: dict[str, JsonValue], told: str | None
) -> None:
    made = calibrate(made_up(4, 1500, 6, 6), Recipe(size=1000, target_error=0.2)).calibration
    assert made.promised_with == {"policy": "always", "fusion": "bayes", "follow_shares": False, "learn": False}
    file = tmp_path / "calibration.json"
    shown: dict[str, JsonValue] = {"candidates": CandidatesConfig(k=5).model_dump(mode="json"), "widen": 0}
    replace(made, promised_with=made.promised_with | shown).write(file)
    data: dict[str, JsonValue] = {"scorer": {"use": "recorded:nothing"}, "labels": [*made.labels], "calibration": str(file)}
    data["stage"] = [{**stage, "judge": "recorded:nothing"}]
    config = Config.parse(data | others)
    with nullcontext() if told is None else pytest.raises(ConfigError, match=told):
        assert config.build().accept == others.get("accept", made.accept)


def test_a_promise_that_the_images_do_not_support_is_refused() -> None:
    with pytest.raises(DataError, match="With 60 labelled images, no threshold guarantees"):
        calibrate(record(), Recipe(size=120, target_error=0.01))


def test_half_of_the_readable_images_are_the_default_to_calibrate_on() -> None:
    readable = np.arange(300) >= 40
    result = calibrate(replace(record(), readable=readable), Recipe())
    assert len(result.calibration.fitted_on) == 130
    assert not set(result.calibration.fitted_on) & set(record().names[:40])


def test_several_stages_have_no_target_and_no_guarantee_and_need_labels() -> None:
    both = replace(record(), stages=(record().judged, record().judged))
    for recipe in (Recipe(target=Target(kind="accuracy", value=0.5)), Recipe(target_error=0.2), Recipe(labelled=False)):
        with pytest.raises(DataError, match="this record has 2"):
            calibrate(both, recipe)


def test_too_much_for_calibrating_is_refused() -> None:
    with pytest.raises(DataError, match="leaves none of the 300 readable images"):
        calibrate(record(), Recipe(size=300))
    with pytest.raises(DataError, match="answered only 15 images"):
        calibrate(record(), Recipe(size=30, target=Target(kind="accuracy", value=0.5)))
    with pytest.raises(DataError, match="no judge"):
        calibrate(replace(record(), stages=()), Recipe(size=100))


@pytest.mark.parametrize("labelled", [True, False])
def test_a_gated_record_calibrates_but_has_no_curves(labelled: bool) -> None:
    gated = under(record(), EntropyAbove(0.4))
    assert 0.2 < gated.judged.asked.mean() < 0.9
    result = calibrate(gated, Recipe(size=150, labelled=labelled))
    assert result.areas is None
    assert result.calibration.judges[0].model.ability > 0


def test_a_target_needs_an_answer_for_every_image() -> None:
    with pytest.raises(DataError, match="--judge-all"):
        calibrate(under(record(), EntropyAbove(0.4)), Recipe(size=250, target=Target(kind="accuracy", value=0.5)))


@pytest.mark.parametrize("fusion", ["bayes", "judge"])
@pytest.mark.parametrize("threshold", [0.4, 1])
def test_the_gain_is_known_of_images_not_asked_about(fusion: FusionRule, threshold: float) -> None:
    """A record in the form that a run writes: without candidates for images without a question. Half of the images, or none,
    have a question.
    """
    calibration = replace(known_to(record()), fusion=fusion)
    gated = under(record(), EntropyAbove(threshold)).judged
    width = gated.candidates.shape[1] if gated.asked.any() else 0
    gated = replace(gated, candidates=np.where(gated.asked[:, None], gated.candidates, NOBODY)[:, :width])
    fused = decided(replace(record(), stages=(gated,)), calibration).fused
    assert fused is not None
    scores = calibration.calibrated(record().scores)
    likeliest = np.argsort(-scores.log_probs, axis=1)[:, : width or 5]
    shown = np.where(gated.asked[:, None], gated.candidates, likeliest) if width else likeliest
    log_probs = scores.log_probs.astype(np.float64)
    expected = calibration.judges[0].model.gain(log_probs, shown, word_final=fusion == "judge")
    np.testing.assert_allclose(fused.gain, expected, atol=1e-6)


def test_a_gated_record_is_not_replayed_under_a_policy_that_asks_more() -> None:
    """An image without a question also has a gain, although its candidates are not recorded. It is not left out silently."""
    gated = decided(under(record(), EntropyAbove(0.4)), known_to(record()))
    with pytest.raises(DataError, match="was not asked"):
        under(gated, Always())
    with pytest.raises(DataError, match="was not asked"):
        under(gated, GainAbove(0.0))


def test_none_of_these_is_an_option_whether_or_not_it_was_chosen() -> None:
    """The gain of a question depends on its options, not on the options of other images."""
    one = record().take(np.arange(30))
    scores = known_to(one).calibrated(one.scores)
    model = known_to(one).judges[0].model
    for none_offered in (False, True):
        fused = decided(replace(one, stages=(replace(one.judged, none_offered=none_offered),)), known_to(one)).fused
        assert fused is not None
        expected = model.gain(scores.log_probs.astype(float), one.judged.candidates, none_offered=none_offered)
        np.testing.assert_allclose(fused.gain, expected)

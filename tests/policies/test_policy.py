import math
from dataclasses import replace
from functools import reduce
from operator import and_

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from cascadevlm.base.errors import InputError, PolicyError
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Scores
from cascadevlm.cascade.candidates import CumulativeMass, TopK
from cascadevlm.policies import measures
from cascadevlm.policies.base import Policy, PolicyLike, Selection, Spending, as_budgeted, as_policy
from cascadevlm.policies.language import parse_policy
from cascadevlm.policies.limits import AccuracyAtLeast, WithinCalls, WithinDollars, WithinShare
from cascadevlm.policies.rules import (
    Always,
    EntropyAbove,
    GainAbove,
    GainPerDollarAbove,
    MarginBelow,
    Never,
    Random,
    TopFraction,
    TopProbabilityBelow,
)
from cascadevlm.testing import noise


def make_scores(seed: int, images: int, classes: int, sharpness: float = 3.0) -> Scores:
    logits = np.random.default_rng(seed).normal(0, sharpness, (images, classes))
    return Scores.from_logits(logits, LabelSet.of(f"class {i}" for i in range(classes)), "test")


def composed(parts: st.SearchStrategy[Policy]) -> st.SearchStrategy[Policy]:
    both = st.tuples(parts, parts)
    return st.one_of(both.map(lambda two: two[0] & two[1]), both.map(lambda two: two[0] | two[1]), parts.map(lambda one: ~one))


scores = st.builds(make_scores, st.integers(0, 10_000), st.integers(1, 60), st.integers(1, 12), st.floats(0, 50))
shares = st.floats(0, 1)
rules = st.one_of(
    st.builds(EntropyAbove, shares),
    st.builds(MarginBelow, shares),
    st.builds(TopProbabilityBelow, shares),
    st.builds(TopFraction, shares),
    st.builds(Random, shares, st.integers(0, 5)),
    st.just(Always()),
    st.just(Never()),
)
measured = st.one_of(
    rules,
    st.builds(EntropyAbove, st.floats(0, 9), st.just("nats")),
    st.builds(GainAbove, st.floats(-1, 1)),
    st.builds(GainPerDollarAbove, st.floats(0, 1e9)),
)
limits = st.one_of(
    st.builds(WithinCalls, st.integers(0, 10**12)),
    st.builds(WithinDollars, st.floats(0, 1e12)),
    st.builds(WithinShare, shares),
    st.builds(AccuracyAtLeast, shares),
).map(as_policy)
unlimited = st.recursive(measured, composed, max_leaves=8)
limited = st.one_of(
    unlimited, st.lists(st.one_of(unlimited, limits), min_size=1, max_size=4).map(lambda parts: reduce(and_, parts))
)
"""Policies of all kinds, and combinations of them."""


@given(scores)
def test_measures_agree_with_scipy(given_scores: Scores) -> None:
    probabilities = np.exp(given_scores.log_probs.astype(np.float64))
    nats = stats.entropy(probabilities, axis=1)
    np.testing.assert_allclose(measures.entropy(given_scores, "nats"), nats, atol=1e-4)
    if len(given_scores.labels) > 1:
        np.testing.assert_allclose(measures.entropy(given_scores), nats / np.log(len(given_scores.labels)), atol=1e-4)
        ordered = np.sort(probabilities, axis=1)
        np.testing.assert_allclose(measures.margin(given_scores), ordered[:, -1] - ordered[:, -2], atol=1e-5)
    np.testing.assert_allclose(measures.top_probability(given_scores), probabilities.max(axis=1), atol=1e-5)


def test_entropy_runs_from_certain_to_uniform() -> None:
    labels = LabelSet.of(list("abcd"))
    certain, uniform = [0.0, -np.inf, -np.inf, -np.inf], [np.log(0.25)] * 4
    extremes = Scores(log_probs=np.array([certain, uniform], dtype=np.float32), labels=labels, fingerprint="")
    np.testing.assert_allclose(measures.entropy(extremes), [0, 1], atol=1e-6)


def test_reasons_know_no_negative_zero() -> None:
    certain = Scores(log_probs=np.array([[0.0, -np.inf]], dtype=np.float32), labels=LabelSet.of(["a", "b"]), fingerprint="")
    little_lost = Spending(gain=(-0.001,))
    for policy in (EntropyAbove(0.5), EntropyAbove(0.5, unit="nats"), GainAbove(0.1)):
        (reason,) = policy.reasons(certain, little_lost)
        assert reason.split()[1] == "0.00"
        assert " 0.00 " in (~policy).reasons(certain, little_lost)[0]


@given(scores, rules, rules)
def test_composition_is_boolean_algebra(given_scores: Scores, a: Policy, b: Policy) -> None:
    both, either, neither = (a & b).select(given_scores), (a | b).select(given_scores), (~(a | b)).select(given_scores)
    np.testing.assert_array_equal(both, a.select(given_scores) & b.select(given_scores))
    np.testing.assert_array_equal(either, a.select(given_scores) | b.select(given_scores))
    np.testing.assert_array_equal(neither, (~a & ~b).select(given_scores))
    np.testing.assert_array_equal((~~a).select(given_scores), a.select(given_scores))


@given(scores, shares, st.integers(0, 9), st.data())
def test_random_does_not_depend_on_batches(given_scores: Scores, rate: float, seed: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(given_scores)))
    policy = Random(rate, seed)
    parts = [
        policy.select(given_scores.rows(slice(0, cut))),
        policy.select(given_scores.rows(slice(cut, None)), Spending(images=cut)),
    ]
    np.testing.assert_array_equal(np.concatenate(parts), policy.select(given_scores))


def test_random_asks_about_its_share() -> None:
    many = make_scores(0, 20_000, 2)
    assert abs(Random(0.3, 1).select(many).mean() - 0.3) < 0.015
    assert (Random(0.3, 1).select(many) != Random(0.3, 2).select(many)).any()


@given(scores, shares)
def test_top_fraction_takes_the_least_certain(given_scores: Scores, fraction: float) -> None:
    selected = TopFraction(fraction).select(given_scores)
    assert selected.sum() == round(fraction * len(given_scores))
    if selected.any() and not selected.all():
        entropy = measures.entropy(given_scores)
        assert entropy[selected].min() >= entropy[~selected].max()


@given(scores, rules, st.integers(0, 40), st.integers(0, 40))
def test_a_budget_of_calls_is_never_exceeded_nor_wasted(given_scores: Scores, rule: Policy, calls: int, spent: int) -> None:
    selected = (rule & WithinCalls(calls)).select(given_scores, Spending(calls=spent))
    wanted = rule.select(given_scores)
    assert selected.sum() == min(wanted.sum(), max(calls - spent, 0))
    assert not (selected & ~wanted).any()


@given(scores, st.floats(0, 1), st.floats(0, 1), st.data())
def test_a_budget_of_dollars_is_never_exceeded(given_scores: Scores, dollars: float, spent: float, data: st.DataObject) -> None:
    prices = data.draw(st.tuples(*[st.floats(0.001, 0.5)] * len(given_scores)))
    selected = as_policy(WithinDollars(dollars)).select(given_scores, Spending(dollars=spent, prices=prices))
    assert selected @ np.array(prices) <= max(dollars - spent, 0) + 1e-9
    assert as_policy(WithinDollars(0)).select(given_scores).all()  # local judges cost nothing and are never blocked


def test_a_budget_goes_to_the_best_of_what_the_other_side_selects() -> None:
    given_scores = make_scores(3, 50, 5)
    selected = (MarginBelow(0.5) & WithinCalls(4)).select(given_scores)
    margin = measures.margin(given_scores)
    assert set(np.flatnonzero(selected)) == set(np.argsort(margin)[:4])


def asked_in_a_stream(
    policy: PolicyLike,
    whole: Scores,
    batch: int,
    *,
    known: bool = True,
    prices: NDArray[np.floating] | None = None,
    gain: NDArray[np.floating] | None = None,
) -> Selection:
    """The images that a policy escalates in batches, if their number is known or not. Default price: one cent per question."""
    budgeted, spending, parts = as_budgeted(policy), Spending(), []
    prices = np.full(len(whole), 0.01) if prices is None else prices
    for start in range(0, len(whole), batch):
        some = whole.rows(slice(start, start + batch))
        images = start + len(some)
        spending = replace(
            spending,
            remaining=len(whole) - images if known else None,
            prices=tuple(prices[start:images]),
            gain=None if gain is None else tuple(gain[start:images]),
        )
        selected = budgeted.select(some, spending)
        recent = budgeted.remembered(some, spending)
        spending = replace(
            spending,
            images=images,
            calls=spending.calls + int(selected.sum()),
            dollars=spending.dollars + float(selected @ prices[start:images]),
            dollars_for_all=float(prices[:images].sum()),
            recent=recent,
        )
        parts.append(selected)
    return np.concatenate(parts)


@given(scores, rules, st.integers(0, 40), st.integers(1, 30), st.booleans())
def test_in_a_stream_a_budget_is_never_exceeded(
    given_scores: Scores, rule: Policy, calls: int, batch: int, dollars: bool
) -> None:
    budget = WithinDollars(0.01 * calls) if dollars else WithinCalls(calls)
    assert asked_in_a_stream(rule & budget, given_scores, batch).sum() <= calls


@given(st.integers(0, 1000), shares, st.integers(1, 64))
def test_in_a_stream_of_known_length_the_share_is_exact_at_the_end(seed: int, share: float, batch: int) -> None:
    asked = asked_in_a_stream(WithinShare(share), make_scores(seed, 300, 4), batch)
    assert asked.sum() == math.floor(share * 300 + 1e-9)


@given(scores, rules, shares, st.integers(1, 30), st.booleans())
def test_in_a_stream_no_more_than_the_share_is_asked_about(
    given_scores: Scores, rule: Policy, share: float, batch: int, known: bool
) -> None:
    asked = asked_in_a_stream(rule & WithinShare(share), given_scores, batch, known=known)
    ends = np.minimum(np.arange(batch, len(asked) + batch, batch), len(asked))
    most = share * (len(asked) if known else ends)
    assert (np.cumsum(asked)[ends - 1] <= most + 1e-6).all()
    assert not (asked & ~rule.select(given_scores)).any() or isinstance(rule, TopFraction)


@pytest.mark.parametrize("batch", [1, 16, 100])
def test_in_a_stream_of_unknown_length_the_share_is_kept_and_goes_to_the_best(batch: int) -> None:
    whole = make_scores(5, 6000, 5)
    doubt, policy = measures.entropy(whole), as_policy(WithinShare(0.2))
    asked = asked_in_a_stream(policy, whole, batch, known=False)
    assert 0.19 * 6000 < asked.sum() <= 0.2 * 6000
    assert doubt[asked].sum() > 0.95 * doubt[policy.select(whole)].sum()


def test_questions_that_grow_worthless_in_a_run_are_asked_all_the_same() -> None:
    """A scorer that learns makes every question worth less; what is remembered was worth more."""
    whole = make_scores(5, 6000, 5)
    gain = gain_of(whole) * np.linspace(1, 0.1, 6000)
    for known in (True, False):
        asked = asked_in_a_stream(WithinShare(0.2), whole, 32, gain=gain, known=known)
        late = asked[3000:].mean()
        assert 0.12 < late < 0.25
        assert 0.15 < asked.mean() <= 0.2
        assert asked.sum() == 1200 or not known


@pytest.mark.parametrize("batch", [1, 32, 6000])
def test_the_fewest_questions_reach_an_accuracy(batch: int) -> None:
    whole = make_scores(5, 6000, 5, sharpness=2.0)
    sure, gain = measures.top_probability(whole), gain_of(whole)
    asked = asked_in_a_stream(AccuracyAtLeast(0.9), whole, batch, gain=gain)
    assert (sure + gain * asked).mean() == pytest.approx(0.9, abs=0.005)
    best = np.argsort(-gain)
    fewest = 1 + int(np.searchsorted(np.cumsum(gain[best]), (0.9 - sure.mean()) * 6000))
    assert fewest * 0.95 < asked.sum() < fewest * 1.05


def test_an_accuracy_that_is_believed_already_asks_nobody_and_one_out_of_reach_asks_where_there_is_a_gain() -> None:
    four, gain = doubts(0.8, 0.8, 0.8, 0.9), (0.1, 0.0, 0.2, 0.3)
    assert asked(AccuracyAtLeast(0.5), four, gain=gain) == []
    assert asked(AccuracyAtLeast(1.0), four, gain=gain) == [0, 2, 3]
    assert asked(MarginBelow(0.95) & AccuracyAtLeast(1.0) & WithinCalls(1), four, gain=gain) == [3]
    with pytest.raises(PolicyError, match="needs a calibration"):
        asked(AccuracyAtLeast(0.5), four)


@given(st.integers(0, 1000), st.floats(0.05, 1), st.integers(1, 64))
def test_in_a_stream_dollars_are_spent_and_not_exceeded_whatever_each_image_costs(seed: int, dollars: float, batch: int) -> None:
    prices = np.random.default_rng(seed).choice([0.001, 0.004, 0.02], 300)
    asked = asked_in_a_stream(WithinDollars(dollars), make_scores(seed, 300, 4), batch, prices=prices)
    spent = asked @ prices
    assert spent <= dollars + 1e-9
    assert spent > min(dollars, prices.sum()) - 2 * prices.max()  # what the last one or two would have cost


@given(st.integers(0, 1000), st.integers(1, 200), st.integers(1, 64))
def test_in_a_stream_a_budget_is_spent(seed: int, calls: int, batch: int) -> None:
    asked = asked_in_a_stream(WithinCalls(calls), make_scores(seed, 300, 4), batch)
    assert asked.sum() == calls


@pytest.mark.parametrize("seed", range(25))
def test_in_a_stream_no_more_dollars_are_left_than_one_question_costs_where_prices_are_uneven(seed: int) -> None:
    """One of ten images costs fifty times as much. Later images may cost much less than expected."""
    prices = np.random.default_rng(seed).choice([0.001, 0.05], 200, p=[0.9, 0.1])
    dollars = 0.6 * float(prices.sum())
    spent = asked_in_a_stream(WithinDollars(dollars), make_scores(seed, 200, 4), 8, prices=prices) @ prices
    assert dollars - prices.max() < spent <= dollars + 1e-9


@pytest.mark.parametrize(
    "text",
    [
        "calls <= 300",
        "calls <= 300 & margin < 0.5",
        "entropy > 0.3 & calls <= 300",
        "random(0.3) & entropy > 0.1 & calls <= 300",
        "~(top_probability < 0.5 | random(0.7)) & calls <= 300",
    ],
)
def test_in_a_stream_a_budget_goes_to_the_best_of_all_images(text: str) -> None:
    whole, policy = make_scores(5, 6000, 5), parse_policy(text)
    priority = policy.priority(whole)
    assert priority is not None
    doubt = priority.values

    def worth(asked: Selection) -> float:
        return float(doubt[asked].mean())

    at_once, in_batches = policy.select(whole), asked_in_a_stream(policy, whole, 32)
    as_they_come = asked_in_a_stream(policy, whole, 32, known=False)
    assert in_batches.sum() == at_once.sum() == as_they_come.sum()
    assert worth(in_batches) > 0.05 * worth(as_they_come) + 0.95 * worth(at_once)


@pytest.mark.parametrize(
    "text", ["dollars <= 3", "gain > 0.05 & dollars <= 3", "gain_per_dollar > 3 & dollars <= 3 & calls <= 900"]
)
def test_in_a_stream_dollars_buy_as_much_gain_as_of_all_images(text: str) -> None:
    whole, prices = make_scores(5, 6000, 5), np.random.default_rng(1).choice([0.001, 0.004, 0.02], 6000)
    policy, gain = parse_policy(text), gain_of(whole)
    at_once = policy.select(whole, Spending(prices=tuple(prices), gain=tuple(gain)))
    in_batches = asked_in_a_stream(policy, whole, 32, prices=prices, gain=gain)
    assert in_batches @ prices == pytest.approx(3, abs=0.02)
    assert in_batches @ prices <= 3 + 1e-9
    assert gain[in_batches].sum() > 0.95 * gain[at_once].sum()


def gain_of(scores: Scores) -> NDArray[np.floating]:
    gain: NDArray[np.floating] = measures.entropy(scores) / 2
    return gain


def doubts(*entropies: float) -> Scores:
    """Scores of two labels. A higher number means a higher uncertainty."""
    logits = np.array([[4 / entropy - 4, 0] for entropy in entropies])
    return Scores.from_logits(logits, LabelSet.of(["a", "b"]), "test")


def asked(policy: PolicyLike, given_scores: Scores, *prices: float, gain: tuple[float, ...] | None = None) -> list[int]:
    spending = Spending(prices=prices, gain=gain)
    selected: list[int] = np.flatnonzero(as_policy(policy).select(given_scores, spending)).tolist()
    return selected


def test_what_is_too_dear_keeps_nothing_cheaper_from_being_asked() -> None:
    four = doubts(0.9, 0.8, 0.7, 0.6)
    assert asked(WithinDollars(1), four, 1.5, 0.1, 0.1, 0.1) == [1, 2, 3]
    assert asked(WithinDollars(0.25), four, 0.2, 0.1, 0.1, 0.05) == [0, 3]
    assert asked(WithinDollars(1) & WithinCalls(1), four.rows(slice(0, 0))) == []


@pytest.mark.parametrize("text", ["dollars <= 1", "gain > 0.1 & dollars <= 1", "gain_per_dollar > 0.1 & dollars <= 1"])
def test_dollars_buy_the_most_gain(text: str) -> None:
    policy, gain = parse_policy(text), (0.30, 0.29, 0.29, 0.29)
    four = doubts(0.6, 0.7, 0.8, 0.9)
    assert asked(policy, four, 1.0, 0.3, 0.3, 0.3, gain=gain) == [1, 2, 3]
    assert asked(policy, four, 0.6, 0.6, 0.6, 0.6, gain=gain) == [0]
    assert asked(policy, four, 0, 0, 0, 0, gain=gain) == [0, 1, 2, 3]  # local judges cost nothing and are never blocked


def test_calls_go_to_the_highest_gain_whatever_it_costs() -> None:
    policy = parse_policy("gain_per_dollar > 0.1 & calls <= 1")
    assert asked(policy, doubts(0.9, 0.8, 0.7, 0.6), 0.3, 1.0, 0.3, 0.3, gain=(0.29, 0.30, 0.29, 0.29)) == [1]


@pytest.mark.parametrize("other", ["", "always & ", "random(1) & ", "~never & ", "(always | never) & "])
def test_where_others_rank_none_above_another_a_limit_ranks(other: str) -> None:
    policy, four = parse_policy(f"{other}calls <= 1"), doubts(0.6, 0.7, 0.9, 0.8)
    assert asked(policy, four) == [2]
    assert asked(policy, four, gain=(0, 0, 0, 0.9)) == [3]
    assert asked(as_policy(lambda scores: np.ones(4, dtype=bool)) & WithinCalls(1), four) == [2]


@pytest.mark.parametrize(
    "text",
    ["~(calls <= 3)", "calls <= 3 | entropy > 0.8", "~(always & dollars <= 3)", "(entropy > 0.8 & calls <= 9) | margin < 0.1"],
)
def test_a_limit_stands_alone_or_behind_and(text: str) -> None:
    with pytest.raises(PolicyError, match="a limit must stand alone or after &"):
        parse_policy(text)
    with pytest.raises(PolicyError, match=r"'~.* has a limit such as calls or deferral inside"):
        ~(Always() & WithinCalls(3))
    with pytest.raises(PolicyError, match="must stand alone or after &"):
        Always() | WithinCalls(3)


def test_of_what_is_negated_the_least_is_asked_first() -> None:
    four = doubts(0.6, 0.9, 0.7, 0.8)
    assert asked(parse_policy("~(entropy > 0.9) & calls <= 2"), four) == [0, 2]
    assert asked(parse_policy("~(margin < 0.01) & calls <= 1"), four) == [0]
    assert asked(parse_policy("~~(entropy > 0.01) & calls <= 1"), four) == [1]
    assert asked(parse_policy("~(random(0) | entropy > 0.9) & calls <= 1"), four) == [0]


def test_limits_among_limits_hold_all() -> None:
    many = make_scores(1, 50, 4)
    policy = (MarginBelow(0.5) & WithinCalls(9)) & (WithinCalls(5) & EntropyAbove(0.1))
    assert policy == parse_policy("margin < 0.5 & calls <= 9 & (calls <= 5 & entropy > 0.1)")
    assert policy.select(many).sum() == 5
    assert (as_budgeted(policy).policy.select(many) == (MarginBelow(0.5) & EntropyAbove(0.1)).select(many)).all()


def test_a_budget_in_a_stream_follows_images_that_become_harder() -> None:
    easy, hard = make_scores(1, 4000, 5, sharpness=9), make_scores(2, 4000, 5, sharpness=2)
    whole = replace(easy, log_probs=np.concatenate([easy.log_probs, hard.log_probs]))
    asked = asked_in_a_stream(WithinCalls(400), whole, 32)
    assert asked.sum() == 400
    assert asked[4000:].sum() > 150


def test_a_function_is_a_policy() -> None:
    given_scores = make_scores(1, 6, 3)

    def odd(scores: Scores) -> "np.typing.NDArray[np.bool_]":
        selected: np.typing.NDArray[np.bool_] = np.arange(len(scores)) % 2 == 1
        return selected

    policy = as_policy(odd) & Always()
    assert policy.select(given_scores).tolist() == [False, True] * 3
    assert str(as_policy(odd)) == "odd"


@pytest.mark.parametrize(
    "wrong", [lambda scores: True, lambda scores: np.zeros(len(scores)), lambda scores: np.ones(3, dtype=bool)]
)
def test_a_function_of_the_wrong_shape_is_told_so(wrong: object) -> None:
    with pytest.raises(PolicyError, match="Return an array of 5 booleans"):
        as_policy(wrong).select(make_scores(1, 5, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("entropy > 0.35", EntropyAbove(0.35)),
        ("entropy>1.5nats", EntropyAbove(1.5, "nats")),
        ("margin < .2 & calls <= 500", MarginBelow(0.2) & parse_policy("calls <= 500")),
        ("~always | random(0.1, seed=7)", ~Always() | Random(0.1, 7)),
        ("never | always & never", Never() | (Always() & Never())),
        ("(never | always) & never", (Never() | Always()) & Never()),
        ("top_fraction(2e-1)", TopFraction(0.2)),
        ("never()", Never()),
    ],
)
def test_the_string_form(text: str, policy: Policy) -> None:
    assert parse_policy(text) == policy


@given(limited)
def test_a_policy_says_itself_in_the_string_form(policy: Policy) -> None:
    assert parse_policy(str(policy)) == policy


@pytest.mark.parametrize(
    ("text", "column", "sentence"),
    [
        ("entropy < 0.3", 9, "entropy needs the operator '>', not '<'"),
        ("margin < 0.1 & entropi > 0.3", 16, "no policy 'entropi'. Did you mean 'entropy'?"),
        ("entropy >", 10, "expected a number"),
        ("entropy > 0.3 && never", 16, "expected '(' or '~' or a policy"),
        ("(never", 7, "')'"),
        ("margin", 1, "such as 'margin < 0.5'"),
        ("random > 0.5", 1, "has no comparison"),
        ("random(2)", 1, "a number from 0 to 1, not 2"),
        ("entropy > 1.5", 1, 'must be a number from 0 to 1, not 1.5. For a threshold in nats, write "entropy > 1.5 nats".'),
        ("entropy > -1 nats", 1, "entropy must be a number of at least 0, not -1"),
        ("margin < -1", 1, "margin must be a number from 0 to 1, not -1"),
        ("always & top_probability < 2", 10, "top_probability must be a number from 0 to 1, not 2"),
        ("gain > 5", 1, "gain must be a number from -1 to 1, not 5"),
        ("gain_per_dollar > 1e999", 1, "gain_per_dollar must be a number of at least 0, not inf"),
        ("calls <= -3", 1, "calls must be a whole number of at least 0, not -3"),
        ("calls <= 1e999", 1, "calls must be a whole number of at least 0, not inf"),
        (f"calls <= {'9' * 5000}", 1, "calls must be a whole number of at least 0, not inf"),
        ("dollars <= -3", 1, "dollars must be an amount of at least 0, not -3"),
        ("deferral <= 1.5", 1, "deferral must be a share from 0 to 1, not 1.5"),
        ("accuracy >= 90", 1, "accuracy must be a number from 0 to 1, not 90"),
        ("accuracy > 0.9", 10, "accuracy"),
        ("dollars <= 1e999", 1, "dollars must be an amount of at least 0, not inf"),
        ("random(0.1, 1e999)", 1, "The seed of random must be a whole number of at least 0, not inf"),
        ("random(0.1, sed=3)", 1, "'sed'"),
        ("top_fraction(0.5, measure=1)", 1, "must be a function of scores, not 1"),
        ("calls <= 2.5", 1, "a whole number"),
        ("never; import os", 6, "expected"),
        ("", 1, "expected"),
    ],
)
def test_the_column_of_a_mistake_is_named(text: str, column: int, sentence: str) -> None:
    with pytest.raises(PolicyError) as caught:
        parse_policy(text)
    message = str(caught.value)
    assert sentence in message
    assert f"column {column}:" in message
    assert "\n" not in message


@given(scores, st.floats(0.01, 1), st.integers(1, 3), st.integers(3, 8))
def test_cumulative_mass_is_the_smallest_set(given_scores: Scores, mass: float, minimum: int, maximum: int) -> None:
    rule = CumulativeMass(mass=mass, minimum=minimum, maximum=maximum)
    for row, candidates in zip(given_scores.probabilities, rule.choose(given_scores), strict=True):
        chosen = [candidate.probability for candidate in candidates]
        assert chosen == sorted(chosen, reverse=True)
        assert [candidate.rank for candidate in candidates] == list(range(1, len(candidates) + 1))
        assert min(minimum, len(row)) <= len(candidates) <= maximum
        if minimum < len(candidates):
            assert sum(chosen[:-1]) < mass
        if len(candidates) < min(maximum, len(row)):
            assert sum(chosen) >= mass - 2e-6


@given(scores, st.integers(1, 20))
def test_top_k_are_the_k_best(given_scores: Scores, k: int) -> None:
    for row, candidates in zip(given_scores.probabilities, TopK(k=k).choose(given_scores), strict=True):
        np.testing.assert_allclose([c.probability for c in candidates], np.sort(row)[::-1][:k])


def test_orders_are_arrangements_and_shuffles_hang_on_seed_and_image_alone() -> None:
    (candidates,) = TopK(k=8).choose(make_scores(0, 1, 8))
    assert TopK(k=8).arrange(candidates, noise(0)) == candidates
    assert TopK(k=8, order="reversed").arrange(candidates, noise(0)) == candidates[::-1]
    shuffled = {seed: TopK(k=8, order="shuffled", seed=seed).arrange(candidates, noise(0)) for seed in range(4)}
    assert all(sorted(order, key=lambda c: c.rank) == list(candidates) for order in shuffled.values())
    assert len(set(shuffled.values())) == 4
    assert TopK(k=8, order="shuffled").arrange(candidates, noise(0)) == shuffled[0]
    assert TopK(k=8, order="shuffled").arrange(candidates, noise(1)) != shuffled[0]


@pytest.mark.parametrize(
    "make", [lambda: TopK(k=0), lambda: CumulativeMass(mass=0), lambda: CumulativeMass(minimum=5, maximum=3)]
)
def test_impossible_candidate_rules_are_refused(make: object) -> None:
    with pytest.raises(InputError):
        make()  # type: ignore[operator]

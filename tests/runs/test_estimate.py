"""Estimates of runs, compared with counts by hand and with the runs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import JsonValue

from cascadevlm import Cascade, Stage, load_prompt, parse_policy
from cascadevlm.base.errors import BackendError, ImageError, InputError, PermanentError
from cascadevlm.base.images import ImageSource, load_image
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import NANODOLLARS, Exemplar, Question, Scores
from cascadevlm.decision.auditing import Sampling
from cascadevlm.decision.judge_model import JudgeModel
from cascadevlm.judges.base import Judge, Quote
from cascadevlm.judges.hosted.base import input_bytes
from cascadevlm.judges.hosted.sdk import SdkJudge
from cascadevlm.judges.support import SupportSet
from cascadevlm.policies.base import PolicyLike, Selection
from cascadevlm.runs.estimate import Estimate, estimate
from cascadevlm.testing import FakeJudge, FakeScorer, noise, picture
from cascadevlm_backends.anthropic import AnthropicJudge
from cascadevlm_backends.openai import OpenAIJudge
from tests.server import JudgeServer

LABELS = LabelSet.of(["red bird", "blue bird", "grey bird"])
SURE, UNSURE = (200, 0, 0), (90, 90, 90)
SCORER = FakeScorer(table={SURE: [9, 0, 0], UNSURE: [1, 0.5, 0]})
SELECT = load_prompt("select")
ROUND: dict[str, JsonValue] = {"input": 1, "output": 1000, "image": {"rule": "patches", "size": 16, "multiplier": 1, "most": 100}}
"""$1 per million input tokens and $1,000 per million output tokens: 1,000 and 1,000,000 nanodollars per token. 16 x 16 pixels
are one token.
"""


def mixture(sure: int, unsure: int) -> list[ImageSource]:
    return [*[picture(SURE)] * sure, *[picture(UNSURE)] * unsure]


def hosted(**options: object) -> SdkJudge:
    return OpenAIJudge("gpt-9", base_url="http://127.0.0.1:1/v1", **{"price": ROUND, **options})  # type: ignore[arg-type]


def stage(judge: Judge, policy: PolicyLike | str = "entropy > 0.5", **options: object) -> Stage:
    policy = parse_policy(policy) if isinstance(policy, str) else policy
    return replace(Stage(judge=judge, prompt=SELECT, policy=policy), **options)  # type: ignore[arg-type]


def estimated(judge: Judge, images: list[ImageSource], policy: str = "entropy > 0.5", **options: int) -> Estimate:
    (only,) = estimate(Cascade(SCORER, [stage(judge, policy)], labels=LABELS), images, **options)
    return only


def test_the_share_escalated_and_its_interval() -> None:
    one = estimated(hosted(), mixture(70, 30))
    assert (one.images, one.sample, one.deferral_rate, one.calls) == (100, 100, 0.3, 30)
    assert one.deferral_range == pytest.approx((0.2189, 0.3958), abs=1e-4)  # Wilson's, from a table
    some = estimated(hosted(), mixture(700, 300), sample=50)
    assert (some.images, some.sample) == (1000, 50)
    assert some.deferral_range[0] < 0.3 < some.deferral_range[1]
    assert some.calls == round(some.deferral_rate * 1000)
    assert some == estimated(hosted(), mixture(700, 300), sample=50)
    assert some != estimated(hosted(), mixture(700, 300), sample=50, seed=3)


def test_questions_of_an_audit_are_counted() -> None:
    for agree, most in ((None, 0.25 + 0.75 * 0.3958), (0.9, 1.0)):
        audited = replace(stage(hosted()), audit=Sampling(share=0.25, agree=agree))
        (found,) = estimate(Cascade(SCORER, [audited], labels=LABELS), mixture(70, 30))
        assert found.deferral_rate == pytest.approx(0.3 + 0.7 * 0.25)
        assert found.calls == round(100 * found.deferral_rate)
        assert found.deferral_range == pytest.approx((0.25 + 0.75 * 0.2189, most), abs=1e-4)
    limited = replace(stage(hosted(), "entropy > 0.5 & calls <= 10"), audit=Sampling(share=0.5))
    (found,) = estimate(Cascade(SCORER, [limited], labels=LABELS), mixture(70, 30))
    assert found.calls == 10 + 45  # the limits of the policy are not those of the audit


def test_the_interval_holds_the_truth_nineteen_times_of_twenty() -> None:
    images = mixture(300, 100)
    ranges = [estimated(FakeJudge(), images, sample=40, seed=seed).deferral_range for seed in range(100)]
    assert sum(low <= 0.25 <= high for low, high in ranges) >= 93


def test_dollars_by_hand() -> None:
    judge = hosted(max_tokens=30)
    cascade = Cascade(SCORER, [stage(judge)], labels=LABELS)
    (one,) = estimate(cascade, mixture(10, 10))
    scores = SCORER.score([picture(UNSURE)], LABELS)
    question = cascade.stages[0].question(picture(UNSURE), cascade.stages[0].candidates.choose(scores)[0])
    letters = input_bytes(question)
    image = 3 * 2  # 48 x 32 pixels
    usual = (letters // 4 + image) * 1e-6 + 10 * 1e-3
    most = (letters + image + 600) * 1e-6 + 30 * 1e-3
    assert one.dollars == pytest.approx(10 * usual)
    low, high = one.deferral_range
    assert one.dollars_range == pytest.approx((low * 20 * usual, np.ceil(high * 20) * most))


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
async def test_the_range_holds_what_the_run_costs(provider: str) -> None:
    """The server bills an answer of the usual length, and the number of tokens that the rules give."""
    images: list[ImageSource] = [noise(seed) for seed in range(200)]
    async with JudgeServer(usage=(150, 25), keep_requests=False) as server:
        judge: Judge
        if provider == "openai":
            judge = OpenAIJudge("gpt-9", base_url=server.openai_url, price=ROUND)
        else:
            judge = AnthropicJudge("claude-9", base_url=server.anthropic_url, price=ROUND)
        cascade = Cascade(FakeScorer(), [stage(judge)], labels=LABELS)
        (guess,) = estimate(cascade, images, sample=80)
        predictions = await cascade.aclassify(images)
        calls = sum(prediction.escalated for prediction in predictions)
        assert guess.deferral_range[0] <= calls / 200 <= guess.deferral_range[1]
        assert guess.dollars_range[0] <= cascade.ledger.spent_dollars <= guess.dollars_range[1]
        assert guess.dollars_range[0] < guess.dollars < guess.dollars_range[1]


def test_where_none_is_escalated_it_may_still_cost() -> None:
    one = estimated(hosted(), mixture(20, 0))
    assert (one.calls, one.dollars, one.dollars_range[0]) == (0, 0, 0)
    assert one.deferral_range == pytest.approx((0, 0.161), abs=1e-3)
    assert one.dollars_range[1] > 0
    all_of_them = estimated(hosted(), mixture(0, 20))
    assert (all_of_them.deferral_rate, all_of_them.deferral_range[1]) == (1, 1)


def test_a_local_judge_costs_nothing() -> None:
    one = estimated(FakeJudge(), mixture(5, 5))
    assert (one.judge, one.calls, one.dollars, one.dollars_range, one.minutes) == ("fake:fake", 5, 0, (0, 0), 0)


@pytest.mark.parametrize("unsure", [0, 5])
def test_an_unknown_price_is_an_error_whoever_is_escalated(unsure: int) -> None:
    judge = OpenAIJudge("gpt-unheard-of")
    with pytest.raises(BackendError, match=r"The price of 'openai:gpt-unheard-of' is unknown\."):
        estimated(judge, mixture(5, unsure))


def test_a_price_that_does_not_hold_is_an_error() -> None:
    with pytest.raises(PermanentError, match="the price is only known up to 5"):
        estimated(hosted(price={**ROUND, "input_limit": 5}), mixture(5, 5))


def test_no_images() -> None:
    with pytest.raises(InputError, match=r"^There are no images\.$"):
        estimated(hosted(), [])


def test_unreadable_images_are_not_escalated() -> None:
    images: list[ImageSource] = [*mixture(5, 5), *[b"junk"] * 10]
    one = estimated(hosted(), images)
    assert (one.sample, one.deferral_rate, one.calls) == (20, 0.25, 5)
    with pytest.raises(ImageError, match="None of the images in the sample can be read"):
        estimated(hosted(), [b"junk", "nowhere.png"])


def test_exemplars_are_paid_for() -> None:
    def of(shots: int) -> float:
        support = SupportSet({label.name: (Exemplar(image=noise(1, (160, 160)), label=label),) * shots for label in LABELS})
        few_shot = stage(hosted(max_tokens=3), support=support, prompt=load_prompt("select_fewshot"))
        return estimate(Cascade(SCORER, [few_shot], labels=LABELS), mixture(0, 10))[0].dollars

    assert 10 * 3 * 100 * 1e-6 < of(2) - of(1) < 10 * 3 * 120 * 1e-6  # 3 images of 100 tokens, and their wording


def test_a_later_stage_gets_what_its_predecessor_was_asked() -> None:
    def few(scores: Scores) -> Selection:
        return np.resize([True, False], len(scores))

    stages = [stage(FakeJudge(), "entropy > 0.5"), stage(hosted(), few), stage(hosted(), "entropy > 0.99")]
    first, second, third = estimate(Cascade(SCORER, stages, labels=LABELS), mixture(20, 20))
    assert (first.calls, second.calls, third.calls) == (20, 10, 0)
    assert first.dollars == third.dollars == 0 < second.dollars
    assert estimate(Cascade(SCORER, [], labels=LABELS), mixture(1, 1)) == []


def test_minutes_go_by_the_slowest_limit() -> None:
    images = mixture(0, 120)
    assert estimated(hosted(concurrency=4), images).minutes == pytest.approx(2)
    assert estimated(hosted(concurrency=4, requests_per_minute=12), images).minutes == pytest.approx(10)
    assert estimated(hosted(concurrency=4, tokens_per_minute=100), images).minutes > 120 * 600 / 100


class Cents(FakeJudge):
    """A hundredth of a dollar for a small image, ten times as much for a large one."""

    def quote(self, question: Question) -> Quote:
        usual = NANODOLLARS // (100 if question.image.width < 100 else 10)
        return Quote(worst_case=3 * usual, usual_case=usual)


def test_a_limit_on_calls_bounds_the_whole_not_the_sample() -> None:
    one = estimated(Cents(), mixture(100, 100), "entropy > 0.5 & calls <= 500", total=100_000)
    assert (one.calls, one.deferral_rate, one.deferral_range) == (500, 0.005, (0.005, 0.005))
    assert one.dollars == pytest.approx(5)
    assert one.dollars_range == pytest.approx((5, 15))
    loose = estimated(Cents(), mixture(100, 100), "entropy > 0.5 & calls <= 60000", total=100_000)
    assert (loose.calls, loose.deferral_rate) == (50_000, 0.5)
    assert loose.deferral_range[0] < 0.5 < loose.deferral_range[1]


@pytest.mark.parametrize("policy", ["dollars <= 0.1", "calls <= 50 & always & dollars <= 0.1"])
def test_a_limit_on_dollars_bounds_the_whole(policy: str) -> None:
    one = estimated(Cents(), mixture(0, 200), policy)
    assert one.calls == 10
    assert one.deferral_rate == pytest.approx(0.05)
    assert one.dollars == pytest.approx(0.1)
    assert estimated(FakeJudge(), mixture(0, 200), "dollars <= 0.1").calls == 200  # costs nothing


def test_what_a_limit_keeps_from_a_judge_does_not_reach_the_next() -> None:
    stages = [stage(Cents(), "calls <= 20"), stage(Cents(), "entropy > 0.5")]
    first, second = estimate(Cascade(SCORER, stages, labels=LABELS), mixture(50, 50))
    assert (first.calls, second.calls, second.deferral_rate) == (20, 10, 0.1)


def test_policies_by_price_see_the_price_of_every_image() -> None:
    images: list[ImageSource] = [*[picture(UNSURE, (10, 10))] * 15, *[picture(UNSURE, (200, 200))] * 5]

    class Gaining(Stage):
        def gain(self, scores: Scores) -> tuple[float, ...]:
            return (0.3,) * len(scores)

    def asked(policy: str) -> tuple[int, float]:
        gaining = Gaining(judge=Cents(), prompt=SELECT, policy=parse_policy(policy), model=JudgeModel.prior(3))
        (one,) = estimate(Cascade(SCORER, [gaining], labels=LABELS), images)
        return one.calls, round(one.dollars, 6)

    assert asked("gain_per_dollar > 1") == (20, 0.65)
    assert asked("gain_per_dollar > 10") == (15, 0.15)
    assert asked("gain_per_dollar > 1000") == (0, 0)


def test_files_are_decoded_once_and_prepared_as_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6):
        noise(number).save(tmp_path / f"{number}.png")
    decoded: list[ImageSource] = []
    loaded: list[bool] = []

    def decode(source: ImageSource) -> Image.Image:
        decoded.append(source)
        return load_image(source)

    class Loading(FakeScorer):
        def load(self) -> None:
            loaded.append(True)

    monkeypatch.setattr("cascadevlm.scorers.base.load_image", decode)
    files: list[ImageSource] = [*sorted(tmp_path.iterdir())]
    cascade = Cascade(Loading(), [stage(hosted(), "dollars <= 100"), stage(hosted(), "always")], labels=LABELS)
    assert [each.calls for each in estimate(cascade, files)] == [6, 6]
    assert sorted(map(str, decoded)) == sorted(map(str, files))
    assert loaded == [True]


def test_no_more_images_in_hand_than_a_batch() -> None:
    sizes: list[int] = []

    class Counting(FakeScorer):
        def score(self, images: list[Image.Image], labels: LabelSet) -> Scores:  # type: ignore[override]
            sizes.append(len(images))
            return super().score(images, labels)

    cascade = Cascade(Counting(), [stage(FakeJudge())], labels=LABELS, batch_size=8)
    (one,) = estimate(cascade, [noise(seed) for seed in range(50)], sample=20)
    assert (sizes, one.sample) == ([8, 8, 4], 20)

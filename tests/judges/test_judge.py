"""Batching, repair questions, retries, and the contracts of the fakes."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tenacity import wait_none

from cascadevlm.base.errors import BudgetExhausted, FatalError, PermanentError, RateLimited, TransientError
from cascadevlm.base.types import Question, Usage, Verdict
from cascadevlm.judges.base import Judge, LocalJudge, Quote, verdict_from_text
from cascadevlm.judges.prompt import NONE_OF_THESE
from cascadevlm.judges.retry import Retrying, retry_after, wait_as_told
from cascadevlm.judges.voting import Repairing, Voting
from cascadevlm.scorers.base import Scorer
from cascadevlm.testing import FakeJudge, FakeScorer, JudgeContract, ScorerContract, question
from cascadevlm.testing.fakes import Reply


class Local(LocalJudge):
    """Answers with the first candidate. Fails if a candidate is called "poison"."""

    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size=batch_size)
        self.spec = "local:test"
        self.batches: list[int] = []

    def judge_batch(self, questions: Sequence[Question]) -> list[Verdict]:
        self.batches.append(len(questions))
        time.sleep(0.005)
        if any(q.labels[0].name == "poison" for q in questions):
            raise PermanentError("poisoned")
        return [verdict_from_text("ANSWER: A", q, judge=self.spec, usage=Usage(requests=1)) for q in questions]


async def test_concurrent_questions_share_batches() -> None:
    judge = Local(batch_size=4)
    verdicts = await asyncio.gather(*(judge.judge(question([f"bird {i}", "other"])) for i in range(10)))
    assert [verdict.label for verdict in verdicts] == [f"bird {i}" for i in range(10)]
    assert judge.batches == [4, 4, 2]


async def test_one_bad_question_does_not_fail_its_neighbours() -> None:
    judge = Local(batch_size=4)
    names = ["one", "poison", "two"]
    outcomes = await asyncio.gather(*(judge.judge(question([name, "other"])) for name in names), return_exceptions=True)
    assert [getattr(outcome, "label", outcome.__class__.__name__) for outcome in outcomes] == ["one", "PermanentError", "two"]
    assert (await judge.judge(question(["three", "other"]))).label == "three"


async def test_a_subclass_that_overrides_a_private_method_keeps_nobody_waiting() -> None:
    class Overriding(Local):
        def _answer(self, question: Question) -> Verdict:  # type: ignore[override]
            raise AssertionError

    answers = await asyncio.wait_for(
        asyncio.gather(*(Overriding(2).judge(question()) for _ in range(3)), return_exceptions=True), 5
    )
    assert [type(answer) for answer in answers] == [AssertionError] * 3


async def test_a_cancelled_question_leaves_its_batch_alone() -> None:
    judge = Local(batch_size=4)
    first, second = (asyncio.create_task(judge.judge(question([name, "other"]))) for name in ("one", "two"))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).label == "two"


def test_a_local_judge_serves_one_event_loop_after_another() -> None:
    judge = Local(batch_size=2)
    assert [asyncio.run(judge.judge(question())).label for _ in range(2)] == ["red finch"] * 2


async def test_event_loops_at_once_do_not_lose_each_others_answers() -> None:
    judge = Local(batch_size=2)
    at_work = most = 0

    def counted(questions: Sequence[Question]) -> list[Verdict]:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        verdicts = Local.judge_batch(judge, questions)
        at_work -= 1
        return verdicts

    judge.judge_batch = counted  # type: ignore[method-assign]

    async def ask(loop: int) -> list[str | None]:
        asked = (judge.judge(question([f"bird {loop} {number}", "other"])) for number in range(20))
        return [verdict.label for verdict in await asyncio.wait_for(asyncio.gather(*asked), 30)]

    elsewhere = [asyncio.to_thread(asyncio.run, ask(loop)) for loop in range(3)]
    for loop, labels in enumerate(await asyncio.gather(*elsewhere, ask(3))):
        assert labels == [f"bird {loop} {number}" for number in range(20)]
    assert most == 1
    assert judge._waiting == {}


@pytest.mark.parametrize("missing", [1, 4])
async def test_verdicts_that_are_missing_are_told_to_all(missing: int) -> None:
    class Short(Local):
        def judge_batch(self, questions: Sequence[Question]) -> list[Verdict]:
            return super().judge_batch(questions)[missing:]

    judge = Short(batch_size=4)
    answers = asyncio.gather(*(judge.judge(question()) for _ in range(4)), return_exceptions=True)
    for outcome in await asyncio.wait_for(answers, 30):
        with pytest.raises(FatalError, match=f"'local:test' returned {4 - missing} verdicts for 4 questions"):
            raise outcome  # type: ignore[misc]


async def test_what_fails_all_questions_is_not_asked_again_one_by_one() -> None:
    class Broken(Local):
        def judge_batch(self, questions: Sequence[Question]) -> list[Verdict]:
            self.batches.append(len(questions))
            raise FatalError("The model is broken.")

    judge = Broken(batch_size=4)
    outcomes = await asyncio.gather(*(judge.judge(question()) for _ in range(4)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [FatalError] * 4
    assert judge.batches == [4]


async def test_an_answer_that_names_nothing_is_asked_about_once_more() -> None:
    judge = FakeJudge(reply=["A sparrow.", "ANSWER: B", "ANSWER: C"], dollars=0.1)
    verdict = await Repairing(judge).judge(question())
    assert (verdict.label, verdict.rationale, verdict.usage.requests) == ("blue finch", "A sparrow.", 2)
    assert verdict.usage.dollars == pytest.approx(0.2)
    assert judge.questions[1].rejected == "A sparrow."
    assert (await Repairing(judge).judge(question())).usage.requests == 1


async def test_it_is_not_asked_a_third_time() -> None:
    judge = FakeJudge(reply="A sparrow.")
    assert (await Repairing(judge).judge(question())).outcome == "unparsed"
    assert len(judge.questions) == 2


async def test_silence_is_not_repaired() -> None:
    judge = FakeJudge(reply="")
    assert (await Repairing(judge).judge(question())).outcome == "unparsed"
    assert len(judge.questions) == 1


@pytest.mark.parametrize("error", [RateLimited("slow down", retry_after=0), TransientError("again")])
async def test_what_may_pass_is_tried_again(error: Exception) -> None:
    judge = FakeJudge(reply=[error, error, "ANSWER: A"])
    assert (await Retrying(judge, wait=wait_none()).judge(question())).label == "red finch"


@pytest.mark.parametrize("error", [PermanentError("no"), FatalError("never"), ValueError("bug")])
async def test_what_will_not_pass_is_not(error: Exception) -> None:
    judge = FakeJudge(reply=error)
    with pytest.raises(type(error)):
        await Retrying(judge, wait=wait_none()).judge(question())
    assert len(judge.questions) == 1


async def test_attempts_and_time_are_bounded() -> None:
    judge = FakeJudge(reply=TransientError("down"))
    with pytest.raises(TransientError):
        await Retrying(judge, attempts=3, wait=wait_none()).judge(question())
    assert len(judge.questions) == 3
    slow = FakeJudge(reply=RateLimited("later", retry_after=3600))
    with pytest.raises(FatalError, match="no request for 3600 seconds"):
        await asyncio.wait_for(Retrying(slow, seconds=5).judge(question()), timeout=2)
    assert len(slow.questions) == 1


async def test_the_wait_is_what_this_response_says() -> None:
    waits: list[float] = []

    def remember(state: object) -> float:
        waits.append(wait_as_told(state))  # type: ignore[arg-type]
        return 0

    judge = FakeJudge(reply=[RateLimited("", retry_after=7), RateLimited(""), TransientError(""), "ANSWER: A"])
    await Retrying(judge, wait=remember).judge(question())
    assert waits[0] == 7
    assert all(0 <= wait <= 60 for wait in waits[1:])


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "2.5"}, 2.5),
        ({"retry-after": "2", "retry-after-ms": "1500"}, 1.5),
        ({"retry-after": formatdate(time.time() - 100, usegmt=True)}, 0),
        ({"retry-after": "soon"}, None),
        ({"retry-after-ms": "soon"}, None),
        ({"retry-after": "-3"}, 0),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


def test_retry_after_a_date() -> None:
    seconds = retry_after({"retry-after": formatdate(time.time() + 30, usegmt=True)})
    assert seconds is not None
    assert 25 < seconds <= 30


NAMES = ("red finch", "blue finch", "grey owl")


@pytest.mark.parametrize("votes", [2, 3, 5])
async def test_what_a_judge_has_for_a_place_averages_out(votes: int) -> None:
    judge = FakeJudge(reply="ANSWER: A", dollars=0.01)
    verdict = await Voting(judge, votes).judge(question(NAMES))
    most = min(votes, 3)
    assert [each.labels[0].name for each in judge.questions] == [NAMES[vote * 3 // most] for vote in range(most)]
    assert all({label.name for label in each.labels} == set(NAMES) for each in judge.questions)
    assert verdict.label == "red finch"
    assert verdict.probabilities == {name: (1 / most if name in NAMES[:most] else 0) for name in NAMES}
    assert verdict.usage.requests == most
    assert verdict.usage.dollars == pytest.approx(0.01 * most)


@given(st.lists(st.sampled_from([*NAMES, NONE_OF_THESE, "a tree"]), min_size=3, max_size=3))
def test_the_most_votes_win(said: list[str]) -> None:
    def reply(asked: Question) -> str:
        return f"ANSWER: {said[NAMES.index(asked.labels[0].name)]}"

    asked = replace(question(NAMES), offer_none=True)
    verdict = asyncio.run(Voting(FakeJudge(reply=reply), 3).judge(asked))
    counts = Counter(said)
    named = [name for name in said if name in NAMES]
    if len(named) < counts[NONE_OF_THESE]:
        assert (verdict.outcome, verdict.label) == ("none", None)
    elif not named:
        assert verdict.outcome == ("none" if counts[NONE_OF_THESE] else "unparsed")
    else:
        assert verdict.label == max(NAMES, key=lambda name: (counts[name], -NAMES.index(name)))
        assert verdict.probabilities == pytest.approx({name: counts[name] / len(named) for name in NAMES})


async def test_own_probabilities_are_averaged() -> None:
    class Likely(FakeJudge):
        async def judge(self, question: Question) -> Verdict:
            first, second, third = (label.name for label in question.labels)
            return replace(await super().judge(question), probabilities={first: 0.6, second: 0.3, third: 0.1})

    verdict = await Voting(Likely(), 3).judge(question(NAMES))
    assert verdict.probabilities == pytest.approx(dict.fromkeys(NAMES, 1 / 3))


async def test_a_vote_that_fails_does_not_count() -> None:
    said: list[Reply] = [PermanentError("no"), "ANSWER: blue finch", "ANSWER: blue finch"]
    verdict = await Voting(FakeJudge(reply=said), 3).judge(question(NAMES))
    assert verdict.probabilities == {"red finch": 0, "blue finch": 1, "grey owl": 0}


async def test_where_there_is_no_money_for_a_vote_there_is_no_answer() -> None:
    with pytest.raises(BudgetExhausted):
        await Voting(FakeJudge(reply=["ANSWER: A", PermanentError("no"), BudgetExhausted("spent")]), 3).judge(question(NAMES))


@pytest.mark.parametrize("worst", [FatalError("the key is wrong"), ValueError("a bug")])
async def test_what_ends_a_run_is_not_voted_on(worst: Exception) -> None:
    with pytest.raises(type(worst)):
        await Voting(FakeJudge(reply=["ANSWER: A", PermanentError("no"), worst]), 3).judge(question(NAMES))


async def test_where_no_vote_is_left_the_error_is_told() -> None:
    with pytest.raises(PermanentError, match="first"):
        await Voting(FakeJudge(reply=[PermanentError("first"), PermanentError("second")]), 2).judge(question(NAMES))


class TestFakeScorer(ScorerContract):
    def make(self) -> Scorer:
        return FakeScorer()


class TestFakeJudge(JudgeContract):
    def make(self) -> Judge:
        return FakeJudge(reply="Seen.\nANSWER: A")


class TestLocalJudge(JudgeContract):
    def make(self) -> Judge:
        return Local(batch_size=3)


@given(st.integers(2, 9), st.integers(1, 6))
def test_the_price_of_votes_is_that_of_the_questions_asked(votes: int, candidates: int) -> None:
    class Priced(FakeJudge):
        def quote(self, question: Question) -> Quote:
            return Quote(worst_case=30, usual_case=10, tokens=100)

    judge, asked = Priced(), question([f"bird {number}" for number in range(candidates)])
    voting = Voting(judge, votes)
    asyncio.run(voting.judge(asked))
    times = len(judge.questions)
    assert times == min(votes, candidates)
    assert voting.quote(asked) == Quote(worst_case=30 * times, usual_case=10 * times, tokens=100 * times)

"""Questions during an outage of a judge."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.kills import predictions as lines
from cascadevlm.base.errors import BudgetExhausted, FatalError, PermanentError, RateLimited, TransientError
from cascadevlm.base.types import Verdict
from cascadevlm.judges import outage
from cascadevlm.judges.outage import FEWEST, MOST, Reachable
from cascadevlm.runs import bulk
from cascadevlm.testing import FakeJudge, question
from cascadevlm.testing.fakes import Reply
from tests.runs.test_bulk import Pictures, cascade

DOWN = TransientError("The connection was refused.")


def reachable(*replies: Reply, concurrency: int) -> Reachable:
    judge = FakeJudge(reply=replies)
    judge.concurrency = concurrency
    return Reachable(judge)


async def ask(judge: Reachable, times: int) -> Sequence[Verdict | BaseException]:
    asked = asyncio.gather(*(judge.judge(question()) for _ in range(times)), return_exceptions=True)
    return await asyncio.wait_for(asked, 10)


@pytest.mark.parametrize(("concurrency", "most"), [(1, FEWEST), (12, 12), (64, MOST)])
async def test_so_many_failures_in_a_row_are_an_outage(concurrency: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "PATIENCE", 0.01)
    judge = reachable(*[DOWN] * 64, concurrency=concurrency)
    for number in range(1, most):
        with pytest.raises(TransientError):
            await judge.judge(question())
        assert len(judge.wrapped.questions) == number  # type: ignore[attr-defined]
    with pytest.raises(FatalError, match=rf"does not answer\. The last {most} questions failed .* refused\. The answers so far"):
        await judge.judge(question())


async def test_in_an_outage_none_of_those_under_way_fails_alone() -> None:
    assert {type(said) for said in await ask(reachable(*[DOWN] * 12, concurrency=12), 12)} == {FatalError}


async def test_a_question_that_fails_alone_is_a_failure_of_its_own() -> None:
    replies: list[Reply] = [*[DOWN] * 5, "ANSWER: A", *[DOWN] * 5, PermanentError("no image"), *[DOWN] * 5]
    said = await ask(reachable(*replies, concurrency=8), len(replies))
    assert [type(each) for each in said] == [type(reply) if isinstance(reply, Exception) else Verdict for reply in replies]


async def test_who_fails_alone_waits_for_the_next_one_that_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "PATIENCE", 0.5)
    judge = reachable(DOWN, "ANSWER: A", concurrency=8)
    first = asyncio.create_task(judge.judge(question()))
    await asyncio.sleep(0.05)
    judge.wrapped.seconds = 1.0  # type: ignore[attr-defined]
    second = asyncio.create_task(judge.judge(question()))
    await asyncio.sleep(0.7)  # the patience with the first is over
    assert not first.done()
    assert (await second).label == "red finch"
    with pytest.raises(TransientError):
        await asyncio.wait_for(first, 10)


async def test_patience_begins_anew_with_whoever_fails_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "PATIENCE", 0.6)
    judge = reachable(DOWN, DOWN, concurrency=8)
    first = asyncio.create_task(judge.judge(question()))
    await asyncio.sleep(0.3)
    second = asyncio.create_task(judge.judge(question()))
    await asyncio.sleep(0.45)  # since the first is held .75 s, since the second .45
    assert not first.done()
    assert not second.done()
    assert {type(said) for said in await asyncio.gather(first, second, return_exceptions=True)} == {TransientError}


async def test_who_gives_up_waiting_keeps_nobody_else_waiting() -> None:
    judge = reachable(DOWN, DOWN, concurrency=8)
    judge.wrapped.seconds = 0.05  # type: ignore[attr-defined]
    first = asyncio.create_task(judge.judge(question()))
    await asyncio.sleep(0.03)
    second = asyncio.create_task(judge.judge(question()))
    await asyncio.sleep(0.04)  # the first is held
    first.cancel()
    with pytest.raises(TransientError):
        await asyncio.wait_for(second, 10)


async def test_an_outage_is_seen_while_the_money_runs_out() -> None:
    """A question that was not asked because of the budget does not show that the judge works."""
    poor = BudgetExhausted("The budget has $0.0000 left.")
    replies: list[Reply] = [reply for _ in range(FEWEST) for reply in (DOWN, poor)]
    said = await ask(reachable(*replies, concurrency=2 * FEWEST), 2 * FEWEST)
    assert {type(each) for each in said} == {BudgetExhausted, TransientError}
    judge = reachable(*replies, concurrency=FEWEST)
    said = await ask(judge, 2 * FEWEST)
    assert {type(each) for each in said} == {BudgetExhausted, FatalError}


def test_an_outage_leaves_images_without_a_line_and_the_run_goes_on_after_it(tmp_path: Path) -> None:
    judge = FakeJudge(reply=["ANSWER: A"] * 6 + [RateLimited("The server is down.", retry_after=0)] * 10_000)
    with pytest.raises(FatalError, match=r"'fake:fake' does not answer.* Run the same command again"):
        bulk.run(cascade(judge, "always"), Pictures(60), tmp_path, config={})
    assert {line["label"] for line in lines(tmp_path)} <= {None, *["finch", "owl", "wren", "stork"]}
    assert len(lines(tmp_path)) <= 6
    assert (tmp_path / "failures.jsonl").read_text() == ""
    assert bulk.run(cascade(FakeJudge(), "always"), Pictures(60), tmp_path, config={}).counts == {"answered": 60}

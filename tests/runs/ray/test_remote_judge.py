"""Judges in workers that are lost, come back, or come back and cannot work: their questions and places."""

import asyncio
import pickle
import random
import warnings
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import replace
from itertools import count

import pytest
from pydantic import JsonValue
from tenacity import wait_none

from cascadevlm import load_judge
from cascadevlm.base.errors import BackendError, BudgetExhausted, CascadeError, FatalError, TransientError
from cascadevlm.base.labels import Label
from cascadevlm.base.types import NANODOLLARS, Exemplar, Question, Usage, Verdict
from cascadevlm.judges.base import Quote, WrapperJudge
from cascadevlm.judges.budget import Ledger, Metered
from cascadevlm.judges.dependable import dependable
from cascadevlm.judges.hosted.replies import Reply
from cascadevlm.judges.hosted.sdk import SdkJudge
from cascadevlm.judges.retry import Retrying
from cascadevlm.runs.ray import judging
from cascadevlm.runs.ray.judging import RemoteJudge, Worker
from cascadevlm.testing import FakeJudge, noise, question

with warnings.catch_warnings():  # not ours
    warnings.simplefilter("ignore")
    exceptions = pytest.importorskip("ray.exceptions")


class Method:
    """A method of a worker, in Ray's form."""

    def __init__(self, method: Callable[..., Coroutine[None, None, object]]) -> None:
        self.remote = method


class OneWorker:
    """A worker that, after its preparation, gives a defined outcome or error for every question."""

    def __init__(self, judged: Iterator[Verdict | BaseException], back: CascadeError | None = None) -> None:
        self.judged, self.back, self.asked = judged, back, 0

    @property
    def identity(self) -> Method:
        return Method(self._identity)

    @property
    def judge(self) -> Method:
        return Method(self._judge)

    async def _identity(self) -> Mapping[str, JsonValue] | CascadeError:
        return self.back if self.back and self.asked else {"judge": "fake:fake"}

    async def _judge(self, _: Question) -> Verdict:
        self.asked += 1
        said = next(self.judged)
        if isinstance(said, BaseException):
            raise said
        return said


ANSWER = Verdict(outcome="answered", label="owl")
BILL = 0.01
"""In US dollars."""


async def prepared(*workers: OneWorker, concurrency: int = 1) -> RemoteJudge:
    judge, begun = FakeJudge(), iter(workers)
    judge.concurrency = concurrency
    remote = RemoteJudge(judge, len(workers), begin=lambda: as_worker(next(begun)), end=lambda _: None)
    await remote.prepare()
    return remote


def as_worker(worker: OneWorker) -> Worker:
    return worker  # type: ignore[return-value]  # what its methods return is not known so exactly


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "ASK_AGAIN_SECONDS", 0.01)


async def test_no_worker_that_can_work_is_a_fatal_error_for_all_who_wait() -> None:
    lost = OneWorker(iter([exceptions.ActorDiedError()] * 2), back=BackendError("The key is missing."))
    remote = await prepared(lost, concurrency=2)
    with pytest.warns(RuntimeWarning, match="lost is back, but 'fake:fake' cannot be asked in it: The key is missing"):
        said = await asyncio.wait_for(asyncio.gather(*_ask(remote, 5), return_exceptions=True), 10)
    assert [type(each) for each in said] == [TransientError] * 2 + [FatalError] * 3
    assert "No worker with the judge 'fake:fake' is left: The key is missing." in str(said[-1])
    await remote.aclose()


def _ask(remote: RemoteJudge, count: int) -> list[Coroutine[None, None, Verdict]]:
    return [remote.judge(question(image=noise(number))) for number in range(count)]


async def test_workers_that_are_left_go_on() -> None:
    lost = OneWorker(iter([exceptions.ActorDiedError()]), back=BackendError("The key is missing."))
    sound = OneWorker(iter([ANSWER] * 9))
    remote = await prepared(lost, sound)
    with pytest.warns(RuntimeWarning, match="key is missing"):
        said = await asyncio.wait_for(asyncio.gather(*_ask(remote, 10), return_exceptions=True), 10)
    assert (said.count(ANSWER), sound.asked, lost.asked) == (9, 9, 1)
    await remote.aclose()


@pytest.mark.parametrize(
    "error",
    [
        exceptions.RayTaskError("judge", "Traceback", ValueError("a defect")),
        asyncio.CancelledError(),
        exceptions.ActorDiedError(),
    ],
)
async def test_a_place_is_free_again_whatever_became_of_the_question(error: BaseException) -> None:
    remote = await prepared(OneWorker(iter([error, ANSWER])))
    with pytest.raises((type(error), TransientError)):
        await remote.judge(question())
    assert await asyncio.wait_for(remote.judge(question()), 10) == ANSWER
    await remote.aclose()


async def test_a_defect_while_a_judge_is_made_ready_is_one_sentence() -> None:
    class Broken(OneWorker):
        async def _identity(self) -> Mapping[str, JsonValue] | CascadeError:
            raise exceptions.RayTaskError("identity", "Traceback", OSError("no space left"))

    with pytest.raises(BackendError, match="cannot be made ready in a worker: no space left"):
        await prepared(Broken(iter([])))


async def test_replays_that_a_lost_worker_failed_are_asked_again() -> None:
    replaying = FakeJudge()
    replaying.replays = True
    worker = OneWorker(iter([exceptions.ActorDiedError(), ANSWER]))
    remote = RemoteJudge(replaying, 1, begin=lambda: as_worker(worker), end=lambda _: None)
    await remote.prepare()
    assert await asyncio.wait_for(dependable(remote, None, Ledger()).judge(question()), 10) == ANSWER
    await remote.aclose()


async def test_a_worker_that_does_not_come_back_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "SILENT_SECONDS", 0.05)

    class Late(OneWorker):
        async def _identity(self) -> Mapping[str, JsonValue] | CascadeError:
            await asyncio.sleep(0.2 * self.asked)
            return await super()._identity()

    remote = await prepared(Late(iter([*[exceptions.ActorDiedError()] * 3, ANSWER])), concurrency=3)
    lost = await asyncio.gather(*_ask(remote, 3), return_exceptions=True)
    assert [type(each) for each in lost] == [TransientError] * 3
    with pytest.warns(RuntimeWarning, match=r"'fake:fake' is asked has not been ready since \d\d:\d\d:\d\d: ") as told:
        assert await asyncio.wait_for(remote.judge(question()), 10) == ANSWER
    assert len(told) == 1
    await remote.aclose()


async def test_all_places_of_a_worker_that_is_back_are_free_again() -> None:
    remote = await prepared(OneWorker(iter([*[exceptions.ActorDiedError()] * 3, *[ANSWER] * 3])), concurrency=3)
    await asyncio.gather(*_ask(remote, 3), return_exceptions=True)
    assert await asyncio.wait_for(asyncio.gather(*_ask(remote, 3)), 10) == [ANSWER] * 3
    assert remote._places.qsize() == 3
    await remote.aclose()


async def test_a_worker_that_is_back_in_time_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "SILENT_SECONDS", 0.1)
    remote = await prepared(OneWorker(iter([exceptions.ActorDiedError(), ANSWER])))
    with warnings.catch_warnings(record=True, action="always") as told:  # an error in a callback would fail nobody
        with pytest.raises(TransientError):
            await remote.judge(question())
        assert await asyncio.wait_for(remote.judge(question()), 10) == ANSWER
        await asyncio.sleep(0.2)
    assert not told
    await remote.aclose()


async def test_a_worker_that_never_begins_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "SILENT_SECONDS", 0.05)

    class Never(OneWorker):
        async def _identity(self) -> Mapping[str, JsonValue] | CascadeError:
            return await asyncio.Event().wait()  # type: ignore[return-value]

    with pytest.warns(RuntimeWarning, match="has not been ready since"), pytest.raises(TimeoutError):
        await asyncio.wait_for(prepared(Never(iter([]))), 0.2)


class Priced(WrapperJudge):
    def quote(self, question: Question) -> Quote:
        return Quote(worst_case=round(BILL * NANODOLLARS))


@pytest.mark.parametrize("seed", range(5))
async def test_the_cap_holds_whatever_becomes_of_the_workers(seed: int) -> None:
    """Every question that reaches a worker is billed, even if the worker dies before it answers."""
    draw, enough_for = random.Random(seed), 25
    answer = replace(ANSWER, usage=Usage(dollars=BILL, requests=1))
    workers = [OneWorker(answer if draw.random() < 0.7 else exceptions.ActorDiedError() for _ in count()) for _ in range(2)]
    remote = await prepared(*workers, concurrency=4)
    ledger = Ledger(enough_for * BILL)
    patient = Retrying(Metered(Priced(remote), ledger), wait=wait_none())
    asking = asyncio.gather(*(patient.judge(question()) for _ in range(40)), return_exceptions=True)
    said = await asyncio.wait_for(asking, 20)
    assert workers[0].asked + workers[1].asked == enough_for
    assert ledger.spent_dollars == pytest.approx(enough_for * BILL)
    assert {type(each) for each in said} == {Verdict, BudgetExhausted}
    assert 0 < said.count(answer) < enough_for
    await remote.aclose()


async def test_who_gives_up_before_a_worker_is_free_pays_nothing() -> None:
    class Slow(OneWorker):
        async def _judge(self, asked: Question) -> Verdict:
            await asyncio.sleep(0.05)
            return await super()._judge(asked)

    remote, ledger = await prepared(Slow(iter([ANSWER] * 3))), Ledger(1)
    tasks = [asyncio.create_task(Metered(Priced(remote), ledger).judge(question())) for _ in range(3)]
    await asyncio.sleep(0.01)
    for task in tasks[1:]:
        task.cancel()
    await asyncio.wait(tasks)
    assert (ledger.spent_dollars, ledger.reserved_dollars) == (0, 0)  # the answer of the first costs nothing
    await remote.aclose()


def test_images_are_told_apart_though_their_pixels_stay_here() -> None:
    judge = load_judge("openai:any", base_url="http://localhost:9", price={"input": 1, "output": 2})
    assert isinstance(judge, SdkJudge)
    exemplars = tuple(Exemplar(image=noise(number), label=Label(name=str(number))) for number in range(2))
    asked = replace(question(image=noise(9)), exemplars=exemplars)
    sent = [judge.sent(image, asked).data for image in (asked.image, *(each.image for each in exemplars))]
    there: Question = pickle.loads(pickle.dumps(judging._packed(asked)))
    images = [there.image, *(each.image for each in there.exemplars)]
    assert [image.size for image in images] == [(1, 1)] * 3
    assert [judge.sent(image, there).data for image in images] == sent
    assert len(set(sent)) == 3


@pytest.mark.parametrize("size", [(1024, 1024), (3000, 700), (40, 30)])
@pytest.mark.parametrize("rule", [{}, {"image": {"rule": "tiles", "base": 85, "tile": 170}}])
def test_a_worker_knows_the_worst_case_though_the_pixels_stay_here(size: tuple[int, int], rule: dict[str, JsonValue]) -> None:
    """An answer without usage costs the reserved amount."""
    judge = load_judge("openai:any", base_url="http://localhost:9", price={"input": 1, "output": 2, **rule})
    assert isinstance(judge, SdkJudge)
    asked = replace(question(image=noise(1, size)), exemplars=(Exemplar(image=noise(2, size), label=Label(name="owl")),))
    worst = judge.quote(asked).worst_case
    judge.image_digest(asked)
    judge.encoded(asked.exemplars[0])
    there: Question = pickle.loads(pickle.dumps(judging._packed(asked)))
    assert there.image.size == (1, 1)
    assert judge.quote(there).worst_case == judge.quote(asked).worst_case == worst
    assert judge.quote(there).usual_case == judge.quote(asked).usual_case
    unbilled = judge.read(Reply(text="ANSWER: A", usage=None), there)
    assert round(unbilled.usage.dollars * NANODOLLARS) == worst

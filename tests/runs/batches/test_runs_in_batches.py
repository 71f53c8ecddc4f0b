"""Runs into a folder whose questions go through a provider's batch API, with and without a certificate."""

import json
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from pydantic import JsonValue

from benchmarks.kills import predictions as without_usage
from cascadevlm import Cascade, Stage, load_prompt, parse_policy
from cascadevlm.base.errors import BackendError, DataError, FatalError, InputError, JudgeError, PermanentError
from cascadevlm.base.types import Prediction, Question
from cascadevlm.cascade.candidates import TopK
from cascadevlm.config.agreement import AgreementConfig
from cascadevlm.config.finding import FindConfig
from cascadevlm.decision.auditing import Sampling
from cascadevlm.judges.budget import Ledger
from cascadevlm.judges.cache import VerdictStore
from cascadevlm.runs import bulk
from cascadevlm.runs.answers_file import ASKED, AnswersFile
from cascadevlm.runs.batches import batch
from cascadevlm.runs.batches.batch import BATCHES
from cascadevlm.runs.batches.batch_judge import BatchJudge, Chunk
from cascadevlm.runs.certificate import Facts, Missing
from cascadevlm.runs.inputs import Inputs
from cascadevlm.runs.run_folder import RunFolder, spent_in
from cascadevlm.runs.tally import Tally
from cascadevlm.runs.verify import verify
from cascadevlm.testing import FakeJudge, FakeScorer, noise, question
from cascadevlm_backends.openai import OpenAIJudge
from tests.runs.test_certified import LABELS, Pictures
from tests.server import Conversation, Fault, JudgeServer

PRICE = {"input": 2.5, "output": 10, "batch_discount": 0.5}
BILL = (1000 * 2.5 + 20 * 10) / 1e6 / 2
"""Cost of an answer of the server in a batch, in US dollars."""

CERTIFIED, ORDINARY = AgreementConfig(agree=0.8), None
IMAGES = 120
both = pytest.mark.parametrize("agreement", [CERTIFIED, ORDINARY], ids=["certified", "ordinary"])


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "POLL_SECONDS", 0.01)


def mostly_first(asked: Conversation) -> str:
    """An answer that depends only on the image, and is mostly the first candidate."""
    return asked.say(asked.choices[0 if sum(asked.images[-1]) % 4 else 1])


def cascade(url: str, dollars: float | None = None) -> Cascade:
    judge = OpenAIJudge("gpt-9", base_url=url, price=PRICE)
    stage = Stage(judge=judge, prompt=load_prompt("select"), policy=parse_policy("entropy > 0.3"))
    return Cascade(FakeScorer(), [stage], labels=LABELS, batch_size=8, ledger=Ledger(dollars))


def run(
    folder: Path,
    url: str,
    agreement: AgreementConfig | None,
    *,
    dollars: float | None = None,
    batches: bool = True,
    retry_failed: bool = False,
    stopping: Callable[[], bool] = lambda: False,
    told: Callable[[str], None] = lambda sentence: None,
) -> Tally:
    return bulk.run(
        cascade(url, dollars),
        Pictures(IMAGES, broken=(3,)),
        folder,
        config={} if agreement is None else {"agreement": agreement.model_dump()},
        promised=agreement,
        batch=batches,
        retry_failed=retry_failed,
        stopping=stopping,
        outlook=told,
    )


def changed(cascade: Cascade, **changes: Any) -> Cascade:  # noqa: ANN401
    """The cascade with other values of attributes of its stage."""
    return cascade.altered(stages=[replace(cascade.stages[0], **changes)])


def lines(folder: Path) -> list[dict[str, Any]]:
    """The predictions without usage, because an answer from the store has no cost."""
    return [dict(line) for line in without_usage(folder)]


def rows(server: JudgeServer) -> list[str]:
    """The keys of all questions in all batches."""
    return [row.custom_id for each in server.batches for row in each.rows]


@both
def test_answers_from_batches_are_those_of_direct_questions_at_half_the_price(
    tmp_path: Path, agreement: AgreementConfig | None
) -> None:
    said: list[str] = []
    with JudgeServer(answer=mostly_first) as server:
        direct = run(tmp_path / "direct", server.openai_url, agreement, batches=False)
        assert server.batches == []
        asked = len(server.requests)
        tally = run(tmp_path / "batches", server.openai_url, agreement, told=said.append)
        again = run(tmp_path / "batches", server.openai_url, agreement)
        assert len(server.requests) == asked == len(rows(server))
    assert lines(tmp_path / "batches") == lines(tmp_path / "direct")
    assert tally.spent_dollars == pytest.approx(asked * BILL)
    assert direct.spent_dollars == pytest.approx(2 * asked * BILL)
    assert again == tally
    assert not (tmp_path / "batches" / BATCHES).exists()
    assert sum("wait for their batches" in sentence for sentence in said) == len(server.batches)
    if agreement is not None:
        assert isinstance(tally.certificate, Facts)
        assert tally.certificate == direct.certificate
        assert tally.certificate.kept > tally.certificate.allowed
        assert len(server.batches) > 2  # one per step of the rule
        assert verify(tmp_path / "batches") == []


KILLS = (
    ("collecting", 9),
    ("submitting", 1),
    ("submitted", 1),
    ("waiting", 2),
    ("read", 1),
    ("spending", 5),
    ("answered", 12),
    ("finishing", 1),
    ("submitted", 2),
    ("answered", 30),
    ("none", 0),
)
"""Before a question is collected, before and after a batch is submitted, while it is waited for, before its results are stored,
while its bill is written, while answers are written, and before its state is deleted.
"""


def run_until_killed(folder: Path, url: str, agreement: AgreementConfig | None, where: str, count: int) -> None:
    """Kill this process at a step, after it was reached ``count`` times."""
    seen: Counter[str] = Counter()

    def note(what: str) -> None:
        seen[what] += 1
        if (what, seen[what]) == (where, count):
            os.kill(os.getpid(), signal.SIGKILL)

    class Killed(BatchJudge):
        def _collect(self, key: str, question: Question) -> None:
            note("collecting")
            super()._collect(key, question)

        async def _submit(self, chunk: Chunk) -> str:
            note("submitting")
            submitted = await super()._submit(chunk)
            note("submitted")
            return submitted

        async def _results(self, chunk: Chunk) -> Mapping[str, JsonValue] | None:
            note("waiting")
            results = await super()._results(chunk)
            if results is not None:
                note("read")
            return results

        def _release(self, key: str, *, spent: int = 0) -> None:
            if self.concluding:
                note("spending")
            super()._release(key, spent=spent)

        def finish(self, store: VerdictStore) -> None:
            note("finishing")
            super().finish(store)

    predicted, append = AnswersFile.predicted, RunFolder.append

    def answering(file: AnswersFile, number: int, prediction: Prediction) -> None:
        note("answered")
        predicted(file, number, prediction)

    def appending(opened: RunFolder, path: str, also: Mapping[str, JsonValue], prediction: Prediction) -> None:
        note("answered" if agreement is None else "written")
        append(opened, path, also, prediction)

    with (
        patch.object(batch, "BatchJudge", Killed),
        patch.object(batch, "POLL_SECONDS", 0.01),
        patch.object(AnswersFile, "predicted", answering),
        patch.object(RunFolder, "append", appending),
    ):
        run(folder, url, agreement)


@both
def test_a_run_that_is_killed_anywhere_goes_on_and_asks_nothing_twice(tmp_path: Path, agreement: AgreementConfig | None) -> None:
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.runs.batches.test_runs_in_batches"])
    with JudgeServer(answer=mostly_first) as server:
        ends = []
        for where, count in KILLS if agreement else KILLS[::2]:
            arguments = (tmp_path / "run", server.openai_url, agreement, where, count)
            process = processes.Process(target=run_until_killed, args=arguments)
            process.start()
            process.join()
            ends.append(process.exitcode)
        assert ends[-1] == 0
        assert ends.count(-signal.SIGKILL) >= len(ends) - 2  # an ordinary run has one batch
        asked = rows(server)
        assert len(asked) == len(set(asked))
        whole = run(tmp_path / "whole", server.openai_url, agreement)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert whole.spent_dollars <= spent_in(tmp_path / "run") <= whole.spent_dollars + 2 * BILL  # killed while it was booked
    assert not (tmp_path / "run" / BATCHES).exists()


@both
def test_a_budget_holds_in_batches_and_a_higher_one_goes_on(tmp_path: Path, agreement: AgreementConfig | None) -> None:
    with JudgeServer(answer=mostly_first) as server:
        whole = run(tmp_path / "whole", server.openai_url, agreement)
        before = len(rows(server))
        for dollars in (0.01, 0.03, 0.05):
            tally = run(tmp_path / "run", server.openai_url, agreement, dollars=dollars)
            assert tally.counts["skipped"] > 0
            assert tally.spent_dollars == pytest.approx(BILL * (len(rows(server)) - before))
            assert tally.spent_dollars <= dollars
            if agreement is not None:
                assert isinstance(tally.certificate, Missing)
        assert tally.spent_dollars > 0.03
        last = run(tmp_path / "run", server.openai_url, agreement, dollars=1.0)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert last.spent_dollars == pytest.approx(whole.spent_dollars)


@both
def test_a_run_that_stops_while_it_waits_goes_on_with_batches_only(tmp_path: Path, agreement: AgreementConfig | None) -> None:
    said: list[str] = []
    with JudgeServer(answer=mostly_first, batch_polls=10**9) as server:
        tally = run(tmp_path / "run", server.openai_url, agreement, told=said.append, stopping=lambda: bool(said))
        assert (tally.images, tally.spent_dollars) == (0, 0)
        with pytest.raises(DataError, match=r"Questions of the run in '.*' are in batches .* Repeat the command with --batch"):
            run(tmp_path / "run", server.openai_url, agreement, batches=False)
        assert len(server.batches) == 1
        server.batch_polls = 1
        run(tmp_path / "run", server.openai_url, agreement)
        asked = rows(server)
        assert len(asked) == len(set(asked))
        run(tmp_path / "whole", server.openai_url, agreement)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def billed(server: JudgeServer) -> float:
    """US dollars that the provider charges for all batches."""
    return BILL * len(rows(server))


def test_votes_wait_for_each_other_so_that_nothing_needless_is_asked(tmp_path: Path) -> None:
    """Two votes: "none of these", and an answer that is repaired. Together they name a candidate, so nothing is widened."""

    def answer(asked: Conversation) -> str:
        if len(asked.texts) >= 4:  # the repair question
            return asked.say(asked.choices[0])
        seen[asked.images[-1]] += 1
        return asked.say(asked.choices[-1]) if seen[asked.images[-1]] == 1 else "A bird, surely."

    seen: Counter[bytes] = Counter()
    with JudgeServer(answer=answer) as server:
        cautious = {"votes": 2, "widen": 1, "offer_none": True, "candidates": TopK(k=2)}
        for name, batches in (("direct", False), ("batches", True)):
            seen.clear()
            made = changed(cascade(server.openai_url), **cautious)
            tally = bulk.run(made, Pictures(30), tmp_path / name, config={}, batch=batches)
        assert len(rows(server)) == len(server.requests)
        assert tally.spent_dollars == pytest.approx(billed(server))


def asked_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / ASKED).read_text().splitlines()]


def test_a_failed_question_that_is_asked_again_is_paid_again(tmp_path: Path) -> None:
    """The run is stopped while its second batch is waited for, so that it is not complete when the first one is asked again."""
    said: list[str] = []
    short = Fault("length")  # the answer is cut off, and billed
    with JudgeServer(answer=mostly_first, faults=lambda number: short if number < 20 and number % 5 == 0 else None) as server:
        run(tmp_path, server.openai_url, CERTIFIED, told=said.append, stopping=lambda: len(said) >= 2)
        first = len(rows(server))
        failed = [line["number"] for line in asked_in(tmp_path) if line["verdict"]["outcome"] == "failed"]
        tally = run(tmp_path, server.openai_url, CERTIFIED, retry_failed=True)
        assert len(rows(server)) > first
        assert len(set(rows(server))) < len(rows(server))
        assert billed(server) <= tally.spent_dollars + 1e-9
    assert failed
    assert all(line["cost"]["dollars"] > 0 for line in asked_in(tmp_path) if line["number"] in failed)


def test_two_stages_with_one_judge_ask_a_question_once(tmp_path: Path) -> None:
    with JudgeServer(answer=lambda asked: asked.say(asked.choices[-1 if sum(asked.images[-1]) % 3 else 0])) as server:
        made = cascade(server.openai_url)
        first, second = changed(made, offer_none=True).stages[0], changed(cascade(server.openai_url), offer_none=True).stages[0]
        twice = made.altered(stages=[first, replace(second, policy=parse_policy("always"))])
        tally = bulk.run(twice, Pictures(60), tmp_path / "batches", config={}, batch=True)
        assert len(rows(server)) == len(set(rows(server)))
        assert tally.spent_dollars == pytest.approx(billed(server))
        bulk.run(twice, Pictures(60), tmp_path / "direct", config={})
        assert len(server.requests) == len(rows(server))
    found, expected = (
        [{**line, "earlier_verdicts": [each["outcome"] for each in line["earlier_verdicts"]]} for line in lines(tmp_path / name)]
        for name in ("batches", "direct")
    )
    assert found == expected


def test_what_is_no_longer_asked_is_paid_for(tmp_path: Path) -> None:
    """All images change while their questions are in a batch."""
    pictures, said = tmp_path / "pictures", list[str]()
    pictures.mkdir()

    def classify(dollars: float, *, stopping: Callable[[], bool] = lambda: False) -> Tally:
        made = cascade(server.openai_url, dollars)
        images = Inputs(pictures)
        return bulk.run(made, images, tmp_path / "run", config={}, batch=True, stopping=stopping, outlook=said.append)

    with JudgeServer(answer=mostly_first, batch_polls=10**9) as server:
        for session in range(2):
            for number in range(40):
                noise(number + 100 * session, (8, 8)).save(pictures / f"{number:03}.png")
            if session == 0:
                classify(0.06, stopping=lambda: bool(said))
                old = len(rows(server))
                os.utime(pictures)
        server.batch_polls = 1
        with pytest.warns(RuntimeWarning, match="was changed after it was scored"):
            tally = classify(0.06)
        assert billed(server) <= tally.spent_dollars <= 0.06
        assert tally.counts["skipped"] > 0
        worst = cascade(server.openai_url).stages[0].judge.quote(question()).worst_case / 1e9 / 2
        assert tally.spent_dollars == pytest.approx(BILL * (len(rows(server)) - old) + worst * old, rel=0.2)


def test_a_small_budget_is_not_spent_in_ever_smaller_batches(tmp_path: Path) -> None:
    with JudgeServer(answer=mostly_first, batch_polls=0) as server:
        tally = bulk.run(cascade(server.openai_url, 0.1), Pictures(300), tmp_path, config={}, batch=True)
        sizes = [len(each.rows) for each in server.batches]
    assert tally.counts["skipped"] > 0
    assert len(sizes) > 1
    assert all(size >= 0.1 * sum(sizes[:place]) for place, size in enumerate(sizes))
    assert tally.spent_dollars == pytest.approx(BILL * sum(sizes))


@pytest.mark.parametrize("agreement", [CERTIFIED, ORDINARY])
def test_rows_that_all_fail_for_the_account_stop_the_run_which_goes_on_later(
    tmp_path: Path, agreement: AgreementConfig | None
) -> None:
    empty = True
    with JudgeServer(answer=mostly_first, faults=lambda number: Fault("quota") if empty else None) as server:
        with pytest.raises(FatalError, match="quota"):
            run(tmp_path, server.openai_url, agreement)
        assert len(server.batches) == 1
        empty = False
        assert run(tmp_path, server.openai_url, agreement).images == IMAGES


@pytest.mark.parametrize("error", [PermanentError, FatalError])
def test_an_address_without_batches_is_said_and_direct_questions_are_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[JudgeError]
) -> None:
    async def refusing(judge: OpenAIJudge, path: Path, token: str) -> str:
        raise error("404: there is no such route.")

    with JudgeServer(answer=mostly_first) as server:
        monkeypatch.setattr(OpenAIJudge, "submit_batch", refusing)
        with pytest.raises(error, match="no such route") as caught:
            run(tmp_path / "run", server.openai_url, CERTIFIED)
        assert error is PermanentError or "If there is no batch API at this address, leave out --batch." in str(caught.value)
        assert isinstance(run(tmp_path / "run", server.openai_url, CERTIFIED, batches=False).certificate, Facts)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"follow_shares": True}, InputError, "do not support follow_shares"),
        ({"audit": Sampling(share=0.1, agree=0.9)}, InputError, "do not support an audit with a promise"),
        ({"judge": FakeJudge()}, BackendError, "No judge of this cascade has a batch API"),
        ({"judge": OpenAIJudge("gpt-9", mode="decision", price=PRICE)}, BackendError, "has no batch API in mode 'decision'"),
    ],
)
def test_what_batches_cannot_do_is_said(tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    made = cascade("http://127.0.0.1:1/v1")
    made = made.altered(follow_shares=True) if "follow_shares" in changes else changed(made, **changes)
    with pytest.raises(error, match=message):
        bulk.run(made, Pictures(4), tmp_path / "run", config={}, batch=True)
    assert not (tmp_path / "run").exists()


def test_images_of_unknown_number_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Batches need a known number of images without true labels"):
        bulk.run(cascade("http://127.0.0.1:1/v1"), iter(Pictures(4)), tmp_path, config={}, batch=True)


def test_a_search_for_one_class_is_refused(tmp_path: Path) -> None:
    promised = FindConfig(label="owl", recall=0.9)
    with pytest.raises(InputError, match=r"\[find\] asks in many small steps"):
        bulk.run(cascade("http://127.0.0.1:1/v1"), Pictures(4), tmp_path, config={}, promised=promised, batch=True)

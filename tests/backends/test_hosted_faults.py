"""For every fault of a provider: the outcome of the image, the number of requests, the counted cost, and the stored answers."""

import io
import json
import logging
import time
import traceback
from pathlib import Path
from typing import get_args

import pytest

from cascadevlm.base.errors import BackendError, FatalError, RateLimited, TransientError
from cascadevlm.base.types import NANODOLLARS
from cascadevlm.cascade.stage import Stage
from cascadevlm.config.loading import load_prompt
from cascadevlm.judges.budget import Ledger
from cascadevlm.judges.cache import DiskStore, MemoryStore
from cascadevlm.judges.hosted import transport
from cascadevlm.testing import noise, question
from tests.backends.hosted_judges import BILL, EITHER, EVERY, USAGE, Make, always, cascade, images, no_waiting, one_in_three
from tests.server import Fault, FaultKind, JudgeServer
from tests.server.faults import ERRORS

__all__ = ["no_waiting"]

TIMEOUT = 0.4
WORST = "worst"
"""The maximum cost is counted, because it is not known whether the request was billed."""

# kind: (ends as, requests, what each of them is counted as) if every request fails so; the same if only the first does
TABLE: dict[FaultKind, tuple[tuple[str, int, list[int | str]], tuple[str, int, list[int | str]]]] = {
    "rate_limit": (("failed", 6, [0] * 6), ("answered", 2, [0, BILL])),
    "server_error": (("failed", 6, [0] * 6), ("answered", 2, [0, BILL])),
    "unavailable": (("failed", 6, [0] * 6), ("answered", 2, [0, BILL])),
    "overloaded": (("failed", 6, [0] * 6), ("answered", 2, [0, BILL])),
    "bad_request": (("failed", 1, [0]), ("failed", 1, [0])),
    "unauthorized": (("fatal", 1, [0]), ("fatal", 1, [0])),
    "forbidden": (("fatal", 1, [0]), ("fatal", 1, [0])),
    "not_found": (("fatal", 1, [0]), ("fatal", 1, [0])),
    "quota": (("fatal", 1, [0]), ("fatal", 1, [0])),
    "reset": (("failed", 6, [WORST] * 6), ("answered", 2, [WORST, BILL])),
    "slow": (("failed", 6, [WORST] * 6), ("answered", 2, [WORST, BILL])),
    "drip": (("failed", 6, [WORST] * 6), ("answered", 2, [WORST, BILL])),
    "endless": (("failed", 6, [WORST] * 6), ("answered", 2, [WORST, BILL])),
    "bomb": (("failed", 6, [WORST] * 6), ("answered", 2, [WORST, BILL])),
    "redirect": (("fatal", 1, [0]), ("fatal", 1, [0])),
    "truncated": (("failed", 6, [WORST] * 6), ("answered", 2, [WORST, BILL])),
    "invalid_json": (("failed", 6, [WORST] * 6), ("answered", 2, [WORST, BILL])),
    "wrong_label": (("unparsed", 2, [BILL] * 2), ("answered", 2, [BILL] * 2)),
    "not_offered_letter": (("unparsed", 2, [BILL] * 2), ("answered", 2, [BILL] * 2)),
    "huge": (("unparsed", 2, [BILL] * 2), ("answered", 2, [BILL] * 2)),
    "empty": (("unparsed", 1, [BILL]), ("unparsed", 1, [BILL])),
    "refusal": (("refused", 1, [BILL]), ("refused", 1, [BILL])),
    "content_filter": (("refused", 1, [BILL]), ("refused", 1, [BILL])),
    "length": (("failed", 1, [BILL]), ("failed", 1, [BILL])),
}


@EVERY
@pytest.mark.parametrize("once", [False, True], ids=["always", "once"])
@pytest.mark.parametrize("kind", TABLE)
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # aiohttp's, of a huge answer shown again
@pytest.mark.usefixtures("no_waiting")
async def test_what_comes_of_a_fault(kind: FaultKind, once: bool, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(transport.MOST_BYTES, "POST", 4 << 20)
    ends_as, requests, counted = TABLE[kind][once]
    fault = Fault(kind, seconds=30 if kind == "slow" else 0.05, location="http://localhost:9/v1" if kind == "redirect" else "")
    ledger, store = Ledger(), MemoryStore()
    async with JudgeServer(usage=USAGE, faults=[fault] if once else always(fault)) as server:
        judge = make(server, timeout=TIMEOUT if kind in ("slow", "drip") else 20)
        asking = cascade(judge, ledger=ledger, store=store)
        if ends_as == "fatal":
            with pytest.raises(FatalError):
                await asking.aclassify([noise(1)])
        else:
            (prediction,) = await asking.aclassify([noise(1)])
            verdict = prediction.verdict
            assert verdict is not None
            assert verdict.outcome == ends_as
            assert (prediction.decided_by == "judge") == (ends_as == "answered")
            assert bool(verdict.error) == (ends_as != "answered")
            stage = Stage(judge=judge, prompt=load_prompt("select"))
            worst = judge.quote(stage.question(noise(1), prediction.candidates)).worst_case
            assert worst > BILL
            assert ledger._spent == sum(worst if amount == WORST else int(amount) for amount in counted)
            assert verdict.usage.dollars == pytest.approx(counted.count(BILL) * BILL / NANODOLLARS)
    assert len(server.requests) == requests
    assert len(store.verdicts) == (ends_as == "answered")
    assert ledger._reserved == 0
    assert ends_as != "fatal" or ledger._spent == 0


def test_the_table_has_every_fault() -> None:
    assert set(TABLE) == {kind for part in get_args(FaultKind) for kind in (get_args(part) or [part])} - {"expired", "body"}


@EVERY
async def test_the_wait_is_what_the_response_says(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float | None] = []

    def remember(state: object) -> float:
        error = state.outcome.exception()  # type: ignore[attr-defined]
        assert isinstance(error, RateLimited)
        waits.append(error.retry_after)
        return 0

    monkeypatch.setattr("cascadevlm.judges.retry._BACKOFF", remember)
    told = [Fault("rate_limit", retry_after=0.01), Fault("overloaded", retry_after_ms=20), Fault("unavailable")]
    async with JudgeServer(usage=USAGE, faults=told) as server:
        (prediction,) = await cascade(make(server)).aclassify([noise(1)])
    assert prediction.decided_by == "judge"
    assert waits == [None]  # the others were waited for as told
    assert len(server.requests) == 4


@EITHER
@pytest.mark.parametrize("kind", ["unauthorized", "quota"])
def test_what_stops_one_question_stops_the_run(kind: FaultKind, make: Make) -> None:
    with JudgeServer(usage=USAGE, faults=always(Fault(kind)), latency=0.02) as server, pytest.raises(FatalError):
        cascade(make(server, concurrency=5)).classify(images(100))
    assert 1 <= len(server.requests) <= 5


@EITHER
def test_nothing_is_asked_after_the_run(make: Make) -> None:
    later = Fault("rate_limit", retry_after=0.1)
    with JudgeServer(faults=lambda number: Fault("unauthorized") if number == 3 else later) as server:
        with pytest.raises(FatalError):
            cascade(make(server, concurrency=4)).classify(images(20))
        asked = len(server.requests)
        time.sleep(0.4)
        assert len(server.requests) == asked


@EITHER
@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("body", body="<html><title>Sign in</title></html>"), r"not JSON: 'Sign in'\. Check base_url\."),
        (Fault("body", body={"error": {"message": "Upstream is overloaded", "code": 502}}), "Upstream is overloaded"),
        (Fault("body", body={"error": "boom"}), "boom"),
    ],
)
def test_an_endpoint_that_gives_no_answers_stops_the_run(fault: Fault, words: str, make: Make) -> None:
    """After the usual number of failures, the message has the provider's words. Requests that are not billed are not counted."""
    ledger = Ledger()
    with JudgeServer(faults=always(fault)) as server, pytest.raises(FatalError, match=f"does not answer\\. .*{words}"):
        cascade(make(server, concurrency=8), ledger=ledger).classify(images(30))
    assert len(server.requests) <= 8 * 6 + 6
    assert ledger._spent == 0


@EVERY
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("body", body={"error": {"message": "No credits", "code": 402}}), "No credits"),
        (Fault("body", status=400, body={"error": {"message": "Your credit balance is too low"}}), "balance is too low"),
        (Fault("body", status=403, body={"error": {"message": "The key is blocked"}}), "The key is blocked"),
    ],
)
def test_what_concerns_all_stops_the_run_at_once(fault: Fault, words: str, make: Make) -> None:
    with JudgeServer(faults=always(fault)) as server, pytest.raises(FatalError, match=words):
        cascade(make(server)).classify(images(30))
    assert len(server.requests) == 1


@EVERY
async def test_what_concerns_one_image_is_refused_and_the_run_goes_on(make: Make) -> None:
    flagged = Fault("body", status=403, body={"code": "permission-denied", "error": "Content violates usage guidelines."})
    filtered = Fault("body", status=400, body={"error": {"message": "no", "code": "content_filter"}})
    ledger = Ledger()
    async with JudgeServer(usage=USAGE, faults=[None, flagged, None, filtered]) as server:
        predictions = await cascade(make(server, concurrency=1), ledger=ledger).aclassify(images(6))
    verdicts = [prediction.verdict for prediction in predictions if prediction.verdict]
    outcomes = [verdict.outcome for verdict in verdicts]
    assert sorted(outcomes) == ["answered"] * 4 + ["refused"] * 2
    assert "Content violates usage guidelines." in str([verdict.error for verdict in verdicts])
    assert len(server.requests) == 6
    assert ledger._spent == 4 * BILL


@EITHER
@pytest.mark.parametrize("key", ["sk-abcdef\r", "sk-abcdef\n", " sk-abcdef", "sk-abcdef ", "“sk-abcdef”", "\ufeffsk-abcdef"])
def test_a_malformed_key_is_told_at_once(key: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, key)
    with (
        JudgeServer() as server,
        pytest.raises(BackendError, match=r"The key of .* has .*_API_KEY without line breaks") as caught,
    ):
        cascade(make(server)).classify(images(3))
    assert server.requests == []
    assert "abc" not in str(caught.value)


@EITHER
@pytest.mark.parametrize("has_aiohttp", [True, False])
def test_a_malformed_header_is_told_at_once(has_aiohttp: bool, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in ("openai", "anthropic"):
        monkeypatch.setattr(f"cascadevlm_backends.{backend}.HAS_AIOHTTP", has_aiohttp)
    with JudgeServer() as server, pytest.raises(FatalError, match="No request can be sent") as caught:
        cascade(make(server, headers={"x-token": "secret\r"})).classify(images(3))
    assert server.requests == []
    assert "secret" not in str(caught.value)


@EITHER
@pytest.mark.usefixtures("no_waiting")
async def test_a_server_that_goes_away_may_come_back(make: Make) -> None:
    """After a first answer of the server, a refused connection is a temporary error, and the message names it."""
    async with JudgeServer() as server:
        judge = make(server)
        await judge.judge(question())
    with pytest.raises(TransientError):  # the connection that was open
        await judge.judge(question())
    with pytest.raises(TransientError, match=r"No connection to http://127\.0\.0\.1:\d+: Connection refused\.$"):
        await judge.judge(question())
    await judge.disconnect()


MIXED = [
    Fault(kind, retry_after_ms=1)
    for kind in (
        *("rate_limit", "server_error", "reset", "overloaded", "bad_request", "truncated", "wrong_label"),
        *("invalid_json", "refusal", "unavailable", "empty", "length", "content_filter", "not_offered_letter"),
    )
]


@EITHER
@pytest.mark.usefixtures("no_waiting")
async def test_hundreds_of_images_while_a_third_of_the_calls_fail(make: Make) -> None:
    store, ledger, failing = MemoryStore(), Ledger(), one_in_three(MIXED)
    sick = True
    async with JudgeServer(usage=USAGE, faults=lambda number: failing(number) if sick else None) as server:
        asking = cascade(make(server), store=store, ledger=ledger)
        predictions = await asking.aclassify(images(400))
        verdicts = [prediction.verdict for prediction in predictions]
        outcomes = [verdict.outcome for verdict in verdicts if verdict is not None]
        assert len(outcomes) == 400
        answered = outcomes.count("answered")
        assert len(store.verdicts) == answered
        assert {"answered", "failed", "refused", "unparsed"} == set(outcomes)
        assert 280 < answered < 400
        assert all(verdict.error for verdict in verdicts if verdict is not None and not verdict.valid)
        assert all(prediction.label for prediction in predictions)
        assert ledger._reserved == 0
        before, sick = len(server.requests), False
        assert before > 400
        again = await asking.aclassify(images(400))
        assert len(server.requests) - before == 400 - answered
    assert all(prediction.verdict is not None and prediction.verdict.outcome == "answered" for prediction in again)
    assert sum(prediction.cost.cached for prediction in again) == answered
    labels = [(earlier.label, later.label) for earlier, later in zip(predictions, again, strict=True) if later.cost.cached]
    assert all(earlier == later for earlier, later in labels)


KEY = "sk-marker-7f3a9c"


@EVERY
@pytest.mark.usefixtures("no_waiting")
def test_the_key_shows_nowhere(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Even if the provider repeats the key in every error."""
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, KEY)
    for kind, error in ERRORS.items():
        monkeypatch.setitem(ERRORS, kind, error._replace(message=f"Incorrect API key provided: {KEY}. Bearer {KEY}"))
    caplog.set_level(logging.DEBUG)
    shown = io.StringIO()
    errors = 0
    for number, kind in enumerate(TABLE):
        with JudgeServer(usage=USAGE, faults=[Fault(kind, seconds=30, location="http://localhost:9/v1")]) as server:
            judge = make(server, timeout=TIMEOUT if kind in ("slow", "drip") else 20)
            try:
                (prediction,) = cascade(judge, store=DiskStore(tmp_path / "cache")).classify([noise(number)])
                print(json.dumps(prediction.to_dict()), repr(prediction), file=shown)
            except FatalError as exc:
                errors += 1
                print(str(exc), repr(exc), traceback.format_exc(), file=shown)
            print(repr(judge), json.dumps(dict(judge.identity())), file=shown)
        received = server.requests[0].headers
        assert KEY in (received.get("x-api-key") or received.get("authorization", ""))  # so it was in use
    assert errors == 6  # a bad request that names the key and a redirect among them
    assert shown.getvalue().count("***") > 20  # where the provider repeated it
    ours = [record for record in caplog.records if record.name.startswith("cascadevlm")]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    for text in (shown.getvalue(), *(record.getMessage() for record in ours)):
        assert KEY not in text
    for path in files:
        assert KEY.encode() not in path.read_bytes()

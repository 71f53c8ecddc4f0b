"""Connections and files: no redirect, no endless wait and no secret, with and without aiohttp."""

import asyncio
import base64
import json
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import anthropic
import openai
import pytest
from aiohttp import web
from pydantic import JsonValue

from cascadevlm.base.errors import BackendError, FatalError, TransientError
from cascadevlm.base.secrets import HIDDEN, credentials_of, scrubbed, shown_address, without_secrets
from cascadevlm.config.config import Config
from cascadevlm.config.loading import load_judge
from cascadevlm.evaluation.data import Data
from cascadevlm.evaluation.evaluate import record_run
from cascadevlm.judges.budget import Ledger
from cascadevlm.judges.cache import DiskStore, question_payload
from cascadevlm.judges.hosted import transport
from cascadevlm.judges.hosted.sdk import Client, SdkJudge
from cascadevlm.runs import bulk
from cascadevlm.testing import noise, question
from cascadevlm_backends.anthropic import AnthropicJudge
from cascadevlm_backends.openai import OpenAIJudge
from tests.backends.hosted_judges import EITHER, EVERY, LABELS, USAGE, Make, always, cascade, chat, images, messages
from tests.server import Fault, JudgeServer

QUESTION = question()


@pytest.fixture(params=["aiohttp", "httpx"], autouse=True)
def transports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in ("openai", "anthropic"):
        monkeypatch.setattr(f"cascadevlm_backends.{backend}.HAS_AIOHTTP", request.param == "aiohttp")


async def asked(judge: SdkJudge) -> object:
    try:
        return await judge.judge(QUESTION)
    finally:
        await judge.disconnect()


def at(make: Make, url: str, *, timeout: float = 20) -> SdkJudge:
    """A judge with an address that is not a `JudgeServer`."""
    return (AnthropicJudge if make is messages else OpenAIJudge)("any", base_url=url, timeout=timeout)


def own_client(make: Make, server: JudgeServer) -> SdkJudge:
    """A judge with the user's own client, which would follow redirects."""
    if make is messages:
        claude = anthropic.AsyncAnthropic(api_key="k", base_url=server.anthropic_url, max_retries=0)
        return make(server, client=claude, base_url=None)
    return make(server, client=openai.AsyncOpenAI(api_key="k", base_url=server.openai_url, max_retries=0), base_url=None)


@EITHER
@pytest.mark.parametrize("own", [False, True])
async def test_no_redirect_is_followed(make: Make, own: bool) -> None:
    """Neither the image nor the headers are sent to another host. This also holds in tests: the judge is local, but the target
    of a redirect may not be.
    """
    async with JudgeServer(usage=USAGE) as elsewhere:
        there = f"{elsewhere.anthropic_url.replace('127.0.0.1', 'localhost')}/v1/messages"
        async with JudgeServer(usage=USAGE, faults=always(Fault("redirect", location=there))) as server:
            judge = own_client(make, server) if own else make(server, headers={"X-Token": "open-sesame"})
            with pytest.raises(FatalError, match=r"'127.0.0.1' redirects to 'localhost', and .* not followed\. Give") as caught:
                await asked(judge)
            assert not caught.value.may_be_billed
            if own:
                await judge.client.close()  # type: ignore[union-attr]
    assert len(server.requests) == 1
    assert elsewhere.requests == []


@EITHER
async def test_the_time_that_an_answer_may_take_is_total(make: Make) -> None:
    async with JudgeServer(usage=USAGE, faults=always(Fault("drip", seconds=0.05))) as server:
        began = time.monotonic()
        with pytest.raises(TransientError, match=r"no answer within 0\.3 seconds") as caught:
            await asked(make(server, timeout=0.3))
        assert time.monotonic() - began < 2
        assert caught.value.may_be_billed


@EITHER
async def test_a_connection_that_is_not_made_costs_nothing(make: Make) -> None:
    """The system drops new connections while the queue of a listening socket is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listening, ExitStack() as waiting:
        host, port = listening.getsockname()
        for _ in range(3):
            client = waiting.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex((host, port))
        with pytest.raises(TransientError, match=f"No connection to http://{host}:{port} was made in time") as caught:
            await asked(at(make, f"http://{host}:{port}", timeout=2))
        assert not caught.value.may_be_billed


@EITHER
@pytest.mark.parametrize(
    "said", [b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 2\r\n\r\n{}"]
)
async def test_what_is_no_http_may_pass_and_so_counts_as_an_outage(make: Make, said: bytes) -> None:
    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        await writer.drain()
        await reader.read(1 << 20)
        writer.close()

    async with await asyncio.start_server(say, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        with pytest.raises(TransientError) as caught:
            await asked(at(make, f"http://{host}:{port}"))
    assert "\n" not in str(caught.value)


@EITHER
async def test_a_server_without_tls_is_told_as_what_it_is(make: Make) -> None:
    async with JudgeServer() as server:
        url = server.anthropic_url.replace("http:", "https:")
        with pytest.raises(FatalError, match=rf"No connection to {url}: .*(?i:ssl).*Is the server running") as caught:
            await asked(at(make, url))
    assert "format" not in str(caught.value)


@EITHER
@pytest.mark.parametrize("kind", ["endless", "bomb"])
async def test_no_response_is_endless(make: Make, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(transport.MOST_BYTES, "POST", 1 << 20)
    async with JudgeServer(usage=USAGE, faults=always(Fault(kind))) as server:  # type: ignore[arg-type]
        with pytest.raises(TransientError, match="is longer than") as caught:
            await asked(make(server))
        assert caught.value.may_be_billed


@pytest.mark.parametrize("encoding", ["gzip", "deflate", None, "br"])
async def test_a_compressed_answer_is_read(encoding: str | None) -> None:
    completion = {"choices": [{"message": {"role": "assistant", "content": "ANSWER: B"}, "finish_reason": "stop"}]}

    async def answer(request: web.Request) -> web.Response:
        assert "br" not in request.headers["accept-encoding"]
        response = web.json_response(completion)
        if encoding == "br":
            response.headers["content-encoding"] = encoding
        elif encoding is not None:
            response.enable_compression(web.ContentCoding(encoding))
        return response

    app = web.Application(client_max_size=1 << 30)
    app.add_routes([web.post("/v1/chat/completions", answer)])
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = "http://{}:{}/v1".format(*runner.addresses[0])
        judge = load_judge("openai:any", base_url=url, structured=False)
        assert isinstance(judge, SdkJudge)
        if encoding == "br":
            with pytest.raises(TransientError, match="the encoding 'br', not in gzip"):
                await asked(judge)
        else:
            assert getattr(await asked(judge), "label") == "blue finch"  # noqa: B009
    finally:
        await runner.cleanup()


USER, PASSWORD, TOKEN, QUERY = "polly", "pa%2Fss-w0rd", "open-sesame-77", "q-k3y-11"
MEANT = "pa/ss-w0rd"
BASIC = base64.b64encode(f"{USER}:{MEANT}".encode()).decode()
SECRETS = [USER, PASSWORD, MEANT, TOKEN, QUERY, BASIC]


def with_login(url: str) -> str:
    return url.replace("http://", f"http://{USER}:{PASSWORD}@")


def secretive(make: Make, server: JudgeServer) -> SdkJudge:
    url = with_login(server.anthropic_url if make is messages else server.openai_url)
    return make(server, base_url=url, headers={"X-Token": f"Token {TOKEN}"})


def assert_no_secret(*texts: str | bytes) -> None:
    for text in texts:
        shown = text if isinstance(text, str) else text.decode(errors="replace")
        assert not [secret for secret in SECRETS if secret in shown]


@EVERY
async def test_a_login_in_the_address_and_headers_are_sent(make: Make) -> None:
    async with JudgeServer(usage=USAGE) as server, JudgeServer(usage=USAGE) as plain:
        judge = secretive(make, server)
        await asked(judge)
        (received,) = server.requests
        assert received.headers["authorization"] == f"Basic {BASIC}"
        assert received.headers["x-token"] == f"Token {TOKEN}"
        assert_no_secret(json.dumps(question_payload(judge, QUESTION)), repr(judge))
        assert judge.identity()["endpoint"] == (server.anthropic_url if make is messages else server.openai_url)
        assert plain.requests == []


@EITHER
@pytest.mark.parametrize("status", [200, 400, 401, 500])
async def test_a_server_that_repeats_secrets_is_not_quoted(make: Make, status: int) -> None:
    """In the message of an error, and in an error in a body with status 200."""
    echo = f"Not for {USER} with {MEANT}, {PASSWORD}, {TOKEN} or {BASIC}"
    error = {"error": {"message": echo, "type": "invalid_request_error"}, "type": "error"}

    async def answer(request: web.Request) -> web.Response:
        return web.json_response(error, status=status)

    app = web.Application(client_max_size=1 << 30)
    app.add_routes([web.post("/{path:.*}", answer)])
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = with_login("http://{}:{}/v1".format(*runner.addresses[0]))
        spec = "anthropic:claude-sonnet-5" if make is messages else "openai:gpt-4o"
        judge = load_judge(spec, base_url=url, price=0, headers={"X-Token": f"Token {TOKEN}"})
        assert isinstance(judge, SdkJudge)
        with pytest.raises(Exception, match=r"\*\*\*") as caught:
            await asked(judge)
        cause = caught.value.__cause__
        assert_no_secret(str(caught.value), repr(caught.value), str(cause), repr(cause))
    finally:
        await runner.cleanup()


def test_a_wrong_address_is_told_without_its_login() -> None:
    wrong = (
        "ftp://{}@host/v1",
        "{}@host/v1",
        "http://{}@/v1",
        "http://{}@host:x/v1",
        "http://{}@host:99999/v1",
        "http://{}@[::1/v1",
    )
    unquoted = [f"http://{USER}:{part}{PASSWORD}@host/v1" for part in ("a/", "a#", "a?")]
    for address in (*(each.format(f"{USER}:{PASSWORD}") for each in wrong), *unquoted):
        judge = load_judge("openai:any", base_url=address)
        assert isinstance(judge, SdkJudge)
        with pytest.raises(BackendError, match="is not an address") as caught:
            _ = judge.price
        assert_no_secret(str(caught.value))
    with pytest.raises(BackendError, match="headers") as caught:
        load_judge("openai:any", headers={"X-Token": [TOKEN]})
    assert_no_secret(str(caught.value))


def configured(server: JudgeServer, folder: Path) -> Config:
    options: dict[str, JsonValue] = {"base_url": with_login(server.openai_url), "headers": {"X-Token": TOKEN}, "price": 0}
    (folder / "labels.txt").write_text("\n".join(LABELS))
    return Config.parse(
        {
            "labels": str(folder / "labels.txt"),
            "scorer": {"use": "open_clip:aviary"},
            "cache": {"folder": str(folder / "cache")},
            "stage": [{"judge": "openai:gpt-4o", "options": options}],
        }
    )


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_no_secret_is_in_a_run_a_record_or_the_cache(tmp_path: Path) -> None:
    with JudgeServer(usage=USAGE) as server:
        config = configured(server, tmp_path)
        asking = cascade(secretive(chat, server), store=DiskStore(tmp_path / "cache"), ledger=Ledger())
        pictures = [(str(number), noise(number)) for number in range(3)]
        bulk.run(asking, pictures, tmp_path / "run", config=config.model_dump(mode="json"))
        data = Data(images=images(3), truths=tuple(LABELS), names=("a", "b", "c"), splits=("", "", ""))
        record_run(asking, data, tmp_path / "record", config=config.model_dump(mode="json"))
        assert HIDDEN in (tmp_path / "run" / "manifest.json").read_text()
        assert HIDDEN in (tmp_path / "record" / "manifest.json").read_text()
        bulk.run(asking, pictures, tmp_path / "run", config=config.model_dump(mode="json"))  # and is known again
    found = files_in(tmp_path)
    assert {"manifest.json", "predictions.jsonl", "cache.db"} <= {path.name for path in found}
    assert_no_secret(*(path.read_bytes() for path in found))


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://host/v1", "https://host/v1"),
        ("https://u:p@host:8/v1", "https://host:8/v1"),
        ("https://u:p@ss@host/v1", "https://host/v1"),
        ("https://token@host/v1?api-version=1&key=abc", "https://host/v1?api-version=***&key=***"),
        ("u:p@host/v1", "host/v1"),
        ("https://u:p w@host/v1", "https://host/v1"),
    ],
)
def test_an_address_is_shown_without_its_credentials(address: str, shown: str) -> None:
    assert shown_address(address) == shown
    assert scrubbed(f"at {address}.", [*credentials_of(address), "token", "abc"]).count("token") == 0


def test_settings_are_kept_without_secrets() -> None:
    address = "http://u:p@h/?k=v"
    settings: dict[str, JsonValue] = {"a": [{"headers": {"A": "x"}, "base_url": address}], "b": address, "c": 3, "headers": "z"}
    assert without_secrets(settings) == {
        "a": [{"headers": {"A": HIDDEN}, "base_url": f"http://h/?k={HIDDEN}"}],
        "b": "http://h/?k=v",
        "c": 3,
        "headers": HIDDEN,
    }


@EITHER
def test_two_event_loops_share_a_judge(make: Make) -> None:
    """`classify` in a thread, at the same time as `aclassify`: each loop has its own client, and closes no other client."""
    with JudgeServer(usage=USAGE, latency=0.01) as server:
        judge = make(server, **({"structured": None} if make is chat else {}))
        asking = cascade(judge)

        async def both() -> None:
            for number in range(0, 24, 8):
                beside = asyncio.to_thread(asking.classify, images(number + 4)[number:])
                here, there = await asyncio.gather(asking.aclassify(images(number + 8)[number + 4 :]), beside)
                assert [prediction.decided_by for prediction in [*here, *there]] == ["judge"] * 8

        asyncio.run(both())
        asyncio.run(both())


@EITHER
async def test_the_first_of_two_runs_closes_no_client_of_the_second(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    async with JudgeServer(usage=USAGE, latency=0.02) as server:
        judge = make(server, concurrency=2)
        new = judge._new_client

        def counted() -> Client:
            made.append(client := new())
            return client

        monkeypatch.setattr(judge, "_new_client", counted)
        short, long = await asyncio.gather(cascade(judge).aclassify(images(1)), cascade(judge).aclassify(images(9)[1:]))
        assert [prediction.decided_by for prediction in (*short, *long)] == ["judge"] * 9
        assert len(made) == 1
        assert judge._connections.pop() is None

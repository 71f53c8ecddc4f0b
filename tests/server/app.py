"""The server itself."""

import asyncio
import gzip
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from itertools import count
from typing import Self

from aiohttp import web
from aiohttp.typedefs import Handler
from PIL import Image
from pydantic import JsonValue

from tests.server.batches import (
    ENDPOINTS,
    Batch,
    Outcome,
    Row,
    Submitted,
    anthropic_batch,
    anthropic_rows,
    openai_batch,
    openai_rows,
)
from tests.server.conversation import Conversation, Received, provider_of, read_json, read_request
from tests.server.faults import ERRORS, Fault, Json, Problem, Provider, new_id
from tests.server.replies import REPLIES, say


class JudgeServer:
    """A server for ``async with``, or for ``with``, which runs it in a separate thread.

    Args:
        answer: the text of the model, or a function that makes it from the conversation. Default: the first choice.
        faults: one fault per judging request and row of a batch, in order of arrival; or a function of the number of the
            request, from 0.
        refuse: function that gives a fault by the content of a request, for example for an unknown parameter. Such a request
            uses no entry of ``faults``.
        latency: time of every judging request, in seconds.
        usage: numbers of input and output tokens of every answer.
        cached: number of the input tokens that come from the provider's prompt cache.
        structured: whether schemas are accepted. If not, a request with a schema gets status 400.
        logprobs: whether Chat Completions gives token probabilities if they are requested.
        altered: function that changes a correct reply before it is sent.
        batch_polls: number of retrievals for which a batch is still in progress.
        batch_expires: whether batches expire.
        check_images: whether a request without an image, or with an image that cannot be decoded, gets status 400.
        keep_requests: whether requests are kept. Long runs with large images may not need this.

    Attributes:
        requests: every judging request, except requests without a key and requests in batches.
        batches: every batch submitted.
        most_at_once: maximum number of judging requests that were in flight at the same time.
    """

    def __init__(
        self,
        *,
        answer: str | Callable[[Conversation], str] = lambda asked: asked.say(asked.choices[0]),
        faults: Iterable[Fault | None] | Callable[[int], Fault | None] = (),
        refuse: Callable[[Received], Fault | None] = lambda _: None,
        latency: float = 0.0,
        usage: tuple[int, int] = (1000, 20),
        cached: int = 0,
        structured: bool = True,
        logprobs: bool = True,
        altered: Callable[[Json], Json] = lambda reply: reply,
        batch_polls: int = 2,
        batch_expires: bool = False,
        check_images: bool = True,
        keep_requests: bool = True,
    ) -> None:
        self.answer = answer
        self.refuse = refuse
        self.latency = latency
        self.usage = usage
        self.cached = cached
        self.structured = structured
        self.logprobs = logprobs
        self.altered = altered
        self.batch_polls = batch_polls
        self.batch_expires = batch_expires
        self.check_images = check_images
        self.keep_requests = keep_requests
        self.requests: list[Received] = []
        self.batches: list[Batch] = []
        self.most_at_once = 0
        self._at_once = 0
        self._faults = map(faults, count()) if callable(faults) else iter(faults)
        self._files: dict[str, tuple[Json, bytes]] = {}

    @property
    def anthropic_url(self) -> str:
        """The ``base_url`` for a client of Anthropic."""
        host, port = self._runner.addresses[0]
        return f"http://{host}:{port}"

    @property
    def openai_url(self) -> str:
        """The ``base_url`` for a client of OpenAI."""
        return f"{self.anthropic_url}/v1"

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=1 << 30, middlewares=[_gate])
        app.add_routes([web.post(path, self._judge) for path in REPLIES])
        app.add_routes(
            [
                web.post("/v1/files", self._upload),
                web.get("/v1/files/{id}", self._file),
                web.get("/v1/files/{id}/content", self._file_content),
                web.post("/v1/batches", self._submit_file),
                web.post("/v1/messages/batches", self._submit_messages),
                web.get("/v1/messages/batches/{id}/results", self._results),
            ]
        )
        for batches in ("/v1/batches", "/v1/messages/batches"):
            app.router.add_get(batches, self._list)
            app.router.add_get(f"{batches}/{{id}}", self._retrieve)
            app.router.add_post(f"{batches}/{{id}}/cancel", self._cancel)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        self._listening = socket.create_server(("127.0.0.1", 0))
        await web.SockSite(self._runner, self._listening, backlog=1024).start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        asyncio.get_running_loop().remove_reader(self._listening)
        for _ in range(4):  # asyncio loses connections that it accepted less than three steps before its server closes
            await asyncio.sleep(0)
        connections = self._runner.server.connections if self._runner.server else []
        transports = [connection.transport for connection in connections]  # aiohttp forgets them when it closes them
        await self._runner.cleanup()
        for transport in filter(None, transports):  # a client may have stopped reading
            transport.abort()
        await asyncio.sleep(0)  # connections end in the next step of the loop

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="JudgeServer", daemon=True)
        self._thread.start()
        return asyncio.run_coroutine_threadsafe(self.__aenter__(), self._loop).result()

    def __exit__(self, *exc: object) -> None:
        asyncio.run_coroutine_threadsafe(self.__aexit__(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _judge(self, request: web.Request) -> web.StreamResponse:
        received = Received(path=request.path, headers=request.headers, body=read_json(await request.read()))
        if self.keep_requests:
            self.requests.append(received)
        fault = self.refuse(received) or next(self._faults, None)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            await asyncio.sleep(self.latency + (fault.seconds if fault and fault.kind == "slow" else 0))
            return await _deliver(request, *self._reply(received, fault), fault)
        finally:
            self._at_once -= 1

    def _reply(self, received: Received, fault: Fault | None) -> tuple[int, JsonValue | Json]:
        """Status and body of the response to a judging request or a row of a batch."""
        if fault and fault.kind == "body":
            return fault.status, fault.body
        try:
            if fault and fault.kind in ERRORS:
                raise Problem(fault.kind)
            asked = read_request(received)
            if asked.schema is not None and not self.structured:
                raise Problem("bad_request", "This model does not support answers held to a JSON schema.")
            if self.check_images:
                _check_images(asked)
        except Problem as problem:
            return problem.reply(provider_of(received.path))
        said = say(asked, fault.kind if fault else None, self.answer)
        proper = REPLIES[received.path](asked, replace(said, usage=self.usage, cached=self.cached, logprobs=self.logprobs))
        return 200, self.altered(proper)

    async def _upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        file = form.get("file")
        if form.get("purpose") != "batch" or not isinstance(file, web.FileField):
            raise Problem("bad_request", "Only files for batches are taken.")
        return web.json_response(self._stored(self._store(file.filename, "batch", file.file.read()))[0])

    def _store(self, filename: str, purpose: str, data: bytes) -> str:
        name = new_id("file")
        about: Json = {
            "id": name,
            "object": "file",
            "bytes": len(data),
            "created_at": int(time.time()),
            "filename": filename,
            "purpose": purpose,
            "status": "processed",
        }
        self._files[name] = about, data
        return name

    def _stored(self, name: object) -> tuple[Json, bytes]:
        if not isinstance(name, str) or name not in self._files:
            raise Problem("not_found", f"There is no file {name!r}.")
        return self._files[name]

    async def _file(self, request: web.Request) -> web.Response:
        return web.json_response(self._stored(request.match_info["id"])[0])

    async def _file_content(self, request: web.Request) -> web.Response:
        return web.Response(body=self._stored(request.match_info["id"])[1])

    async def _submit_file(self, request: web.Request) -> web.Response:
        body = read_json(await request.read())
        endpoint, file = str(body.get("endpoint")), body.get("input_file_id")
        rows = openai_rows(self._stored(file)[1], endpoint, request.headers)
        return self._submit("openai", rows, endpoint=endpoint, input_file_id=file, metadata=body.get("metadata"))

    async def _submit_messages(self, request: web.Request) -> web.Response:
        rows = anthropic_rows(read_json(await request.read()), request.headers)
        return self._submit("anthropic", rows, endpoint="/v1/messages")

    def _submit(
        self,
        provider: Provider,
        rows: Submitted,
        *,
        endpoint: str,
        input_file_id: JsonValue = None,
        metadata: JsonValue = None,
    ) -> web.Response:
        if endpoint not in ENDPOINTS or not rows or len(dict(rows)) < len(rows):
            raise Problem("bad_request", "A batch wants an endpoint that takes batches, and requests, each custom_id once.")
        batch = Batch(
            id=new_id("batch" if provider == "openai" else "msgbatch"),
            provider=provider,
            rows=[self._row(custom_id, received) for custom_id, received in rows],
            ending="expired" if self.batch_expires else "completed",
            endpoint=endpoint,
            input_file_id=input_file_id,
            metadata=metadata,
        )
        self.batches.append(batch)
        return web.json_response(self._shown(batch))

    def _row(self, custom_id: str, received: Received) -> Row:
        fault = self.refuse(received) or next(self._faults, None)
        status, reply = self._reply(received, fault)
        outcome: Outcome = "expired" if fault and fault.kind == "expired" else "succeeded" if status == 200 else "errored"
        return Row(custom_id=custom_id, received=received, status=status, reply=reply, outcome=outcome)

    def _shown(self, batch: Batch) -> Json:
        return openai_batch(batch, self.usage) if batch.provider == "openai" else anthropic_batch(batch, self.anthropic_url)

    def _newest(self, request: web.Request) -> list[Batch]:
        return [batch for batch in reversed(self.batches) if batch.provider == provider_of(request.path)]

    def _batch(self, request: web.Request) -> Batch:
        name = request.match_info["id"]
        for batch in self._newest(request):
            if batch.id == name:
                return batch
        raise Problem("not_found", f"There is no batch {name!r}.")

    async def _retrieve(self, request: web.Request) -> web.Response:
        batch = self._batch(request)
        batch.polls += 1
        if batch.state == "canceling" or (batch.state == "in_progress" and batch.polls > self.batch_polls):
            batch.state = "ended"
            for kind, data in batch.files().items() if batch.provider == "openai" else ():
                batch.file_ids[f"{kind}_file_id"] = self._store(f"{batch.id}_{kind}.jsonl", "batch_output", data)
        return web.json_response(self._shown(batch))

    async def _cancel(self, request: web.Request) -> web.Response:
        batch = self._batch(request)
        if batch.state == "in_progress":
            batch.state, batch.ending = "canceling", "cancelled"
        return web.json_response(self._shown(batch))

    async def _list(self, request: web.Request) -> web.Response:
        batches = self._newest(request)
        names = [batch.id for batch in batches]
        after = request.query.get("after") or request.query.get("after_id")
        start = names.index(after) + 1 if after in names else 0
        page = batches[start : start + int(request.query.get("limit", 20))]
        return web.json_response(
            {
                "object": "list",
                "data": [self._shown(batch) for batch in page],
                "first_id": page[0].id if page else None,
                "last_id": page[-1].id if page else None,
                "has_more": start + len(page) < len(batches),
            }
        )

    async def _results(self, request: web.Request) -> web.Response:
        batch = self._batch(request)
        if batch.state != "ended":
            raise Problem("not_found", "The batch has not ended.")
        return web.Response(body=batch.results())


@web.middleware
async def _gate(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuses requests without a key, and reports problems in the provider's form."""
    try:
        if "x-api-key" not in request.headers and not request.headers.get("authorization", "").startswith(("Bearer ", "Basic ")):
            raise Problem("unauthorized", "A key is missing.")
        return await handler(request)
    except Problem as problem:
        status, reply = problem.reply(provider_of(request.path))
        return web.json_response(reply, status=status)


def _check_images(asked: Conversation) -> None:
    if not asked.images:
        raise Problem("bad_request", "There is no image.")
    for image in asked.images:
        try:
            Image.open(io.BytesIO(image)).load()
        except (OSError, SyntaxError, ValueError) as exc:
            raise Problem("bad_request", f"An image cannot be decoded: {exc}") from exc


ENDLESS_CHUNK = 1 << 20
BOMB_BYTES = 1 << 26


@cache
def _bomb() -> bytes:
    return gzip.compress(bytes(BOMB_BYTES))


async def _deliver(request: web.Request, status: int, reply: JsonValue | Json, fault: Fault | None) -> web.StreamResponse:
    number = str((isinstance(reply, Mapping) and reply.get("request_id")) or new_id("req"))
    headers = {"x-request-id": number, "request-id": number, **(fault.headers if fault else {})}
    match fault:
        case Fault("reset") if request.transport:
            request.transport.abort()
        case Fault("body", body=str(page)):
            return web.Response(text=page, content_type="text/html", status=status, headers=headers)
        case Fault("drip" | "endless" | "bomb" as kind):
            response = web.StreamResponse(headers={**headers, **({"content-encoding": "gzip"} if kind == "bomb" else {})})
            response.content_type = "application/json"
            await response.prepare(request)
            if kind == "bomb":
                await response.write(_bomb())
                return response
            while True:  # until the client hangs up
                await response.write(b" " * (1 if kind == "drip" else ENDLESS_CHUNK))
                await asyncio.sleep(fault.seconds if kind == "drip" else 0)
        case Fault("redirect"):
            return web.Response(status=307, headers=headers)
        case Fault("invalid_json"):
            return web.Response(text='{"id": "', content_type="application/json", headers=headers)
        case Fault("truncated") if request.transport:
            body = json.dumps(reply).encode()
            response = web.StreamResponse(headers={**headers, "content-length": str(len(body))})
            response.content_type = "application/json"
            await response.prepare(request)
            await response.write(body[: len(body) // 2])
            request.transport.close()
            return response
    return web.json_response(reply, status=status, headers=headers)

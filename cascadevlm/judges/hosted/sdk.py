"""Base class of judges that reach their model through a provider's SDK: one client per event loop, and batches."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from pydantic import JsonValue

from cascadevlm.base.errors import BackendError, Refused
from cascadevlm.base.loop import PerLoop
from cascadevlm.base.secrets import login_of
from cascadevlm.base.types import Question, Verdict
from cascadevlm.judges.hosted.base import HostedJudge, PriceOption
from cascadevlm.judges.hosted.errors import ErrorResponse, translate
from cascadevlm.judges.hosted.replies import Reply
from cascadevlm.judges.hosted.transport import guard

if TYPE_CHECKING:
    import httpx2


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """Maximum number of requests and of bytes that a provider accepts in one batch."""

    requests: int
    bytes: int


class Client(Protocol):
    """A client of an SDK."""

    _client: "httpx2.AsyncClient"

    @property
    def base_url(self) -> object: ...

    async def close(self) -> None: ...


@dataclass(kw_only=True)
class _Connection:
    """The client of one event loop, and the number of runs that use it."""

    client: Client | None = None
    runs: int = 0


class SdkJudge(HostedJudge):
    """A judge that reaches its model through a provider's SDK, with a batch API.

    Attributes:
        batch_limits: the batches that the provider accepts.
        client: the user's own client. None: the judge makes one.
    """

    batch_limits: ClassVar[BatchLimits]

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None,
        api_key_env: str,
        headers: Mapping[str, str] | None,
        client: Client | None,
        timeout: float | None,
        price: PriceOption,
        concurrency: int,
        requests_per_minute: float | None,
        tokens_per_minute: float | None,
        max_tokens: int | None,
    ) -> None:
        super().__init__(
            model,
            base_url=str(client.base_url) if client else base_url,
            api_key_env=api_key_env,
            headers=headers,
            timeout=timeout,
            price=price,
            concurrency=concurrency,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            max_tokens=max_tokens,
        )
        self.client = client
        self._connections: PerLoop[_Connection] = PerLoop(_Connection)

    def __getstate__(self) -> dict[str, object]:
        if self.client is not None:
            raise BackendError(
                f"{self.spec!r} has a client that cannot be copied.", hint="Give base_url and headers in place of client."
            )
        return super().__getstate__()

    async def prepare(self) -> None:
        self._connections.get().runs += 1
        self.costs_money  # noqa: B018  # raises if the price is unknown
        self.connected()

    async def aclose(self) -> None:
        """Close the client when the last run in this event loop has ended."""
        connection = self._connections.get()
        connection.runs -= 1
        if connection.runs <= 0:
            await self.disconnect()

    @abstractmethod
    def _new_client(self) -> Client:
        """A client of the SDK.

        Raises:
            BackendError: if there is no key.
        """

    def connected(self) -> Client:
        """The user's own client, or the client of this event loop. The first call makes the client.

        Raises:
            BackendError: if there is no key, or if ``$CASCADEVLM_LOCAL_ONLY`` is set and the endpoint is on another machine.
        """
        connection = self._connections.get()
        if connection.client is None:
            self.require_allowed()
            connection.client = self.client or self._new_client()
            guard(connection.client._client)
            if self.client is None and self.endpoint and (login := login_of(self.endpoint)):
                connection.client._client.auth = login
        return connection.client

    async def disconnect(self) -> None:
        """Forget the client of this event loop. Close it, unless it is the user's own."""
        connection = self._connections.pop()
        if self.client is None and connection is not None and connection.client is not None:
            await connection.client.close()

    def read_row(self, row: JsonValue, question: Question) -> Verdict:
        """The verdict for a row of a batch's results.

        Raises:
            JudgeError: if the row contains an error in place of an answer.
        """
        try:
            return self.read(self.of_batch_row(row, question), question, batch=True)
        except ErrorResponse as exc:
            error = translate(exc, self.errors, secret=self.secret)
            if isinstance(error, Refused):
                return self._refused(error)
            raise error from None

    def require_batch_api(self) -> None:
        """Check that questions can be asked in batches.

        Raises:
            BackendError: if the judge has a mode without a batch API.
        """

    @abstractmethod
    def batch_row(self, key: str, question: Question) -> JsonValue:
        """The row of a question in a batch. The result of the question has the same ``key``."""

    @abstractmethod
    async def submit_batch(self, rows: Path, token: str) -> str:
        """Submit a file of rows, one JSON object per line, and return the id of the batch. `find_batch` finds it by ``token``."""

    @abstractmethod
    async def find_batch(self, token: str) -> str | None:
        """The id of the batch that was submitted with this token. None if there is none."""

    @abstractmethod
    async def batch_results(self, batch_id: str) -> Mapping[str, JsonValue] | None:
        """The rows of a batch's results by their keys. None while the batch runs. Rows without an answer may be missing.

        Raises:
            PermanentError: if the provider refused the whole batch.
        """

    @abstractmethod
    def of_batch_row(self, row: JsonValue, question: Question) -> Reply:
        """The reply in a row of results.

        Raises:
            ErrorResponse: if the row contains an error response.
            JudgeError: if the row contains no response.
        """

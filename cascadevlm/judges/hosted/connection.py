"""How a judge reaches a model behind an API: its endpoint, its key, and the errors of its requests."""

import importlib.util
import os
import re
from abc import abstractmethod
from collections.abc import Awaitable, Mapping
from typing import ClassVar, TypeVar
from urllib.parse import urlsplit

from cascadevlm.base.errors import BackendError, CascadeError, FatalError, JudgeError
from cascadevlm.base.secrets import credentials_of, scrubbed, shown_address
from cascadevlm.judges.base import Judge
from cascadevlm.judges.hosted.errors import translate

HAS_AIOHTTP = importlib.util.find_spec("aiohttp") is not None
"""Whether the faster transport of the SDKs is installed."""

LOCAL_ONLY = "CASCADEVLM_LOCAL_ONLY"
"""If this environment variable is set, judges connect to servers on this machine only."""

NO_KEY = "no-key-needed"
"""The key that is sent to servers on this machine if no key is set."""

T = TypeVar("T")


class RemoteJudge(Judge):
    """A judge whose model runs behind an API.

    Attributes:
        provider: name of the provider. Its prices are valid for its own ``hosts``.
        hosts: host names of the provider's own endpoint.
        errors: the error class of cascadevlm for each exception class of the SDK, by class name. If an exception has a status,
            the response decides instead.
        base_url: address of the endpoint. None: the provider's own endpoint.
        api_key_env: name of the environment variable that contains the key.
        headers: extra headers of every request. They are secret.
        timeout: maximum total time of one request, in seconds. None: no limit.
    """

    provider: ClassVar[str]
    hosts: ClassVar[tuple[str, ...]]
    errors: ClassVar[Mapping[str, type[JudgeError]]]

    def __init__(
        self,
        *,
        base_url: str | None,
        api_key_env: str,
        headers: Mapping[str, str] | None,
        timeout: float | None,
    ) -> None:
        self.base_url = base_url
        self.api_key_env = api_key_env
        self.headers = headers
        self.timeout = timeout
        self._reached = False  # true after the first connection to the endpoint

    @property
    def endpoint(self) -> str | None:
        """Address of the endpoint: ``base_url``, or the address that the SDK reads from the environment. None: the provider's
        own endpoint.
        """
        return self.base_url or os.environ.get(f"{self.provider.upper()}_BASE_URL") or None

    @property
    def address(self) -> str | None:
        """The endpoint without credentials, for messages and keys."""
        return shown_address(self.endpoint) if self.endpoint else None

    @property
    def host(self) -> str | None:
        """Host name of the endpoint. None: the provider's own endpoint."""
        return urlsplit(self.endpoint).hostname if self.endpoint else None

    @property
    def is_own_endpoint(self) -> bool:
        """Whether the endpoint is the provider's own."""
        return self.host in (None, *self.hosts)

    @property
    def is_local(self) -> bool:
        """Whether the endpoint is on this machine. Such an endpoint is free and needs no key."""
        return self.host in ("localhost", "127.0.0.1", "::1")

    def api_key(self) -> str:
        """The key from the environment. On this machine, a placeholder if no key is set.

        Raises:
            BackendError: if the variable is not set, or contains a character that no key has.
        """
        key = os.environ.get(self.api_key_env) or (NO_KEY if self.is_local else None)
        if key is None:
            raise BackendError(f"{self.spec!r} needs a key.", hint=f"Set the environment variable {self.api_key_env}.")
        if stray := re.search(r"^\s|[^ -~]|\s$", key):
            raise BackendError(
                f"The key of {self.spec!r} has the invalid character {stray[0]!r} at position {stray.start() + 1} of {len(key)}.",
                hint=f"Set {self.api_key_env} without line breaks, typographic quotes, and spaces around the key.",
            )
        return key

    def require_allowed(self) -> None:
        """Refuse to connect to another machine if only this machine is allowed, for example in tests.

        Raises:
            BackendError: if ``$CASCADEVLM_LOCAL_ONLY`` is set and the endpoint is on another machine.
        """
        if os.environ.get(LOCAL_ONLY) and not self.is_local:
            raise BackendError(
                f"{self.spec!r} is not on this machine, and {LOCAL_ONLY} is set.",
                hint=f"Unset {LOCAL_ONLY}, or use a judge on this machine.",
            )

    @property
    @abstractmethod
    def secret(self) -> str:
        """The key in use. Messages must not contain it."""

    @property
    def secrets(self) -> list[str]:
        """All texts that messages must not contain: the key, the values of headers, the credentials of the address."""
        headers = [text for value in (self.headers or {}).values() for text in (value, value.rpartition(" ")[2])]
        return [self.secret, *headers, *(credentials_of(self.endpoint) if self.endpoint else ())]

    async def call(self, request: Awaitable[T]) -> T:
        """The result of a request to the provider.

        Raises:
            JudgeError: for every exception of the SDK; `translate` decides which error.
        """
        try:
            result = await request
        except Exception as exc:
            known = exc if isinstance(exc, CascadeError) else exc.__cause__  # an SDK may wrap our error
            if isinstance(known, CascadeError):
                error = known
            else:
                error = translate(exc, self.errors, secret=self.secret, reached=self._reached)
                self._reached = self._reached or not isinstance(error, FatalError)
            error.args = tuple(scrubbed(str(text), self.secrets) for text in error.args)
            shows_secret = error is known or scrubbed(str(exc), self.secrets) != str(exc)
            raise error from (None if shows_secret else exc)
        self._reached = True
        return result

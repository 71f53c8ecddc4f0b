"""Hides secrets that must not be written or shown: API keys, headers, and the credentials in addresses."""

import re
from base64 import b64encode
from collections.abc import Iterable, Mapping
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic import JsonValue

HIDDEN = "***"

SHORTEST = 3
"""Minimum number of characters of a secret that is removed from texts. A shorter secret would match too much of a text."""

_LOGIN = re.compile(r"(^|://)[^/?#]*@")
_TAIL = re.compile(r"[?#].*", re.DOTALL)
_VALUE = re.compile(r"([?&#][^=&#]*=)[^&#]*|([?&])[^=&#]+")


def is_address(text: str) -> bool:
    """Returns True if a text is the address of a server, such as ``http://host`` or ``https://host:port/path``."""
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port or the IPv6 address is not valid
        return False


def without_login(address: str) -> str:
    """An address without its user and password."""
    return _LOGIN.sub(r"\1", address)


def shown_address(address: str) -> str:
    """An address without credentials: user and password are removed, and ``***`` replaces the values of the query and of the
    fragment, and words of the query that have no name.
    """
    return _TAIL.sub(lambda tail: _VALUE.sub(rf"\1\2{HIDDEN}", tail[0]), without_login(address))


def login_of(address: str) -> tuple[str, str] | None:
    """The user and password of an address; None if the address has neither."""
    parts = urlsplit(address)
    return (unquote(parts.username or ""), unquote(parts.password or "")) if "@" in parts.netloc else None


def credentials_of(address: str) -> list[str]:
    """All secrets that `shown_address` hides: as written in the address, after percent-decoding, and as sent in the header."""
    parts = urlsplit(address)
    named = [value for _, value in (*parse_qsl(parts.query), *parse_qsl(parts.fragment))]
    unnamed = [word for word in parts.query.split("&") if "=" not in word]
    values = [parts.username or "", parts.password or "", *named, *unnamed]
    sent = b64encode(":".join(login_of(address) or ()).encode()).decode()
    return [*values, *map(unquote, values), sent]


def without_secrets(settings: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Settings that are safe to write to a file: without the values of headers and without credentials in addresses."""
    return {name: _kept(name, value) for name, value in settings.items()}


def _kept(name: str, value: JsonValue) -> JsonValue:
    match value:
        case dict() if name == "headers":
            return dict.fromkeys(value, HIDDEN)
        case dict():
            return without_secrets(value)
        case list():
            return [_kept(name, each) for each in value]
        case str() if name == "headers":
            return HIDDEN
        case str() if name == "base_url":
            return shown_address(value)
        case str() if "://" in value:
            return without_login(value)
    return value


def scrubbed(text: str, secrets: Iterable[str]) -> str:
    """The text, with ``***`` in place of each secret."""
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= SHORTEST:
            text = text.replace(secret, HIDDEN)
    return text

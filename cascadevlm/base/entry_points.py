"""Finds plug-ins (backends, policies, prompts) through entry points, and imports each plug-in when it is first used."""

import difflib
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import Literal

from pydantic import JsonValue

from cascadevlm.base.errors import BackendError

Kind = Literal["scorers", "judges", "policies", "prompts"]


Option = JsonValue

_BROKEN = "Correct the entry point of the package, or install the package again."


def installed(kind: Kind) -> Mapping[str, EntryPoint]:
    """All entry points of a kind, sorted by name. Packages that are installed later are found by the next process only."""
    return _installed(kind, tuple(sys.path))


@cache
def _installed(kind: Kind, path: tuple[str, ...]) -> Mapping[str, EntryPoint]:
    """The entry points of the packages on the path."""
    found = entry_points(group=f"cascadevlm.{kind}")
    return {point.name: point for point in sorted(found, key=lambda point: point.name)}


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for an unknown word. It names the most similar known word or, if no word is similar, all known words."""
    known = list(known)
    return similar(word, known) or f"Known: {', '.join(sorted(known))}."


def similar(word: str, known: Iterable[str]) -> str:
    """A hint that names the known word that is most similar to an unknown word; "" if no word is similar."""
    close = difflib.get_close_matches(word, [*known], n=1)
    return f"Did you mean {close[0]!r}?" if close else ""


def load(point: EntryPoint) -> object:
    """Import the object that an entry point names.

    Raises:
        BackendError: if the import fails. If a package is missing, the hint is the pip command that installs the package.
    """
    try:
        return point.load()
    except ModuleNotFoundError as exc:
        package = (exc.name or "").partition(".")[0]
        if package == point.module.partition(".")[0]:
            raise BackendError(f"{point.name!r} ({point.value}) cannot be imported: {exc}.", hint=_BROKEN) from exc
        raise BackendError(f"{point.name!r} needs the package {package!r}.", hint=f"Install it: pip install {package}") from exc
    except (ImportError, AttributeError) as exc:
        raise BackendError(f"{point.name!r} ({point.value}) cannot be imported: {exc}.", hint=_BROKEN) from exc


def describe(kind: Kind, point: EntryPoint) -> dict[str, str]:
    """A description of an entry point for people: its kind, name and package, and the packages that must still be installed."""
    package = f"{point.dist.name} {point.dist.version}" if point.dist else ""
    try:
        required = getattr(load(point), "requires", ())
        missing = [name for name in required if not is_installed(name)]
        needs = f"pip install {' '.join(missing)}" if missing else "nothing more"
    except BackendError as exc:
        needs = str(exc)
    return {
        "kind": "policy" if kind == "policies" else kind.removesuffix("s"),
        "name": point.name,
        "package": package,
        "needs": needs,
    }


def is_installed(distribution: str) -> bool:
    """True if a distribution is installed, by its name on PyPI."""
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True

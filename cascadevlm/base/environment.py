"""What a run runs on: the machine, and the versions of packages."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("cascadevlm", "torch", "transformers", "open_clip_torch", "openai", "anthropic")
"""Those whose versions are recorded, where they are installed."""


def machine() -> str:
    """What a run runs on."""
    return f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"


def versions() -> dict[str, str]:
    """Of cascadevlm and what its figures depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

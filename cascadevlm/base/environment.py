"""The environment of a run: the machine and the versions of packages."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("cascadevlm", "torch", "transformers", "open_clip_torch", "openai", "anthropic", "genai-prices", "llm")
"""Packages whose versions are recorded if they are installed."""


def machine() -> str:
    """The operating system, the processor architecture and the Python version."""
    return f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"


def versions() -> dict[str, str]:
    """The version of each package in `PACKAGES` that is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

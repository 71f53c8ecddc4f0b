"""The time of imports, and the modules that they load."""

import subprocess
import sys
from importlib.metadata import version

import pytest

HEAVY = "torch transformers open_clip openai anthropic scipy scipy.stats numpy pydantic"


def loaded_by(code: str) -> set[str]:
    script = f"import sys; {code}; print(*(name for name in {HEAVY.split()!r} if name in sys.modules))"
    return set(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split())


def test_importing_the_package_or_the_command_line_loads_nothing_heavy() -> None:
    assert loaded_by("import cascadevlm") == set()
    assert loaded_by("import cascadevlm.cli") == set()
    assert loaded_by("import cascadevlm; cascadevlm.__version__") == set()


def test_the_whole_core_does_without_models_and_sdks() -> None:
    core = "import cascadevlm; [getattr(cascadevlm, name) for name in cascadevlm.__all__]; import cascadevlm.config.config"
    assert not loaded_by(core) & {"torch", "transformers", "open_clip", "openai", "anthropic"}
    assert "scipy.stats" not in loaded_by("import cascadevlm.runs.bulk, cascadevlm.runs.estimate, cascadevlm.config.config")


def test_the_version_is_that_of_the_distribution() -> None:
    import cascadevlm

    assert cascadevlm.__version__ == version("cascadevlm")
    shown = subprocess.run([sys.executable, "-c", "from cascadevlm.cli import main; main()", "--version"], capture_output=True)
    assert (shown.returncode, shown.stdout.decode()) == (0, f"cascadevlm {version('cascadevlm')}\n")
    with pytest.raises(AttributeError, match="No cascadevlm attribute nothing"):
        cascadevlm.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_all_public_names_are_there() -> None:
    import cascadevlm

    assert {"Cascade", "Stage", "Scorer", "Judge", "LabelSet", "Policy"} <= set(cascadevlm.__all__)
    for name in cascadevlm.__all__:
        assert getattr(cascadevlm, name).__name__ == name

"""A folder imports only from the folders above it in the list."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import cascadevlm

ROOT = Path(cascadevlm.__file__).parent

ROOMS = (
    "base",
    "scorers",
    "judges",
    "judges.hosted",
    "policies",
    "decision",
    "cascade",
    "config",
    "runs.batches",
    "runs",
    "runs.ray",
    "evaluation",
    "evaluation.calibrating",
    "evaluation.report",
    "api",
    "cli",
    "testing",
)


def room_of(parts: tuple[str, ...]) -> str:
    """The innermost folder of a module."""
    return max((room for room in ROOMS if parts[: room.count(".") + 1] == tuple(room.split("."))), key=len)


def is_face(parts: tuple[str, ...]) -> bool:
    """True for a name that the package itself defines, such as its version."""
    return parts[0] not in {room.partition(".")[0] for room in ROOMS}


def imported(path: Path) -> Iterator[tuple[str, ...]]:
    """The modules of the package that a file imports, anywhere in the file, without the name of the package."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            package, *module = node.module.split(".")
            if package == "cascadevlm":
                yield from ((*module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")[1:]) for alias in node.names if alias.name.startswith("cascadevlm."))


MODULES = [path for path in sorted(ROOT.rglob("*.py")) if path.parent != ROOT]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_folder_imports_only_from_those_above_it(path: Path) -> None:
    own = ROOMS.index(room_of(path.relative_to(ROOT).parts))
    below = [module for module in imported(path) if not is_face(module) and ROOMS.index(room_of(module)) > own]
    assert not below


def test_no_module_stands_outside_a_room() -> None:
    assert [path.name for path in ROOT.glob("*.py")] == ["__init__.py"]

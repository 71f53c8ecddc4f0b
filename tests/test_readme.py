"""Every code block of the README does what it says, in a folder like the one it speaks of."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from cascadevlm.config.config import Config
from cascadevlm.judges.prompt import parse_template
from cascadevlm.testing.server import JudgeServer
from tests.cli.test_cli import run as run_here

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
FEWER = {
    r"--each \d+": "--each 2",
    r"--limit \d+": "--limit 8",
    r"--size \d+": "--size 40",
    r"--target-error \S+": "--target-error 0.9",
}
"""What the README does with many images is done here with few, which promise less."""

BARE_MACHINE = re.compile(r"pip install uv && uv run (--no-dev )?")
PLAIN = re.compile(r"cascadevlm ([^|&;<>$`*?~#!(){}\[\]]*)")
"""A command that needs no shell, and no process of its own, which would spend most of its time on loading torch."""


def blocks(language: str) -> list[int]:
    return [number for number, (written_in, _) in enumerate(BLOCKS) if written_in == language]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Images, labels, and hosted judges on this machine."""
    folder = tmp_path_factory.mktemp("readme")
    aviary = resources.files("cascadevlm_backends") / "aviary"
    (folder / "images").mkdir()
    with resources.as_file(aviary) as bundled:
        for source, name in zip(sorted((bundled / "images").glob("*.jpg")), ("one.jpg", "two.jpg"), strict=False):
            shutil.copy(source, folder / "images" / name)
        shutil.copy(bundled / "labels.txt", folder)
    with JudgeServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_BASE_URL", server.openai_url)
        patch.setenv("PYTHONPATH", str(README.parent))
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        patch.chdir(folder)
        yield folder


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def demo(folder: Path) -> str:
    return run("cascadevlm", "demo")


def test_all_blocks_are_tested() -> None:
    assert {language for language, _ in BLOCKS} == {"sh", "python", "toml", "text"}


@pytest.mark.parametrize("number", blocks("sh"))
def test_commands_run(folder: Path, number: int) -> None:
    configurations = [text for language, text in BLOCKS[:number] if language == "toml"]
    if configurations:
        (folder / "cascade.toml").write_text(configurations[-1])
    for line in BLOCKS[number][1].replace("\\\n", "").splitlines():
        command = BARE_MACHINE.sub("", line)
        for many, few in FEWER.items():
            command = re.sub(many, few, command)
        if command in ("pytest", "cascadevlm demo"):  # this very suite, and the fixture
            continue
        if (plain := PLAIN.fullmatch(command)) and number != blocks("sh")[2]:
            run_here(*shlex.split(plain[1]))
        else:
            run("bash", "-c", command)


@pytest.mark.parametrize("number", blocks("python"))
def test_python_runs(folder: Path, number: int) -> None:
    run(sys.executable, "-W", "error::SyntaxWarning", "-c", BLOCKS[number][1])


@pytest.mark.parametrize("number", blocks("toml"))
def test_configurations_build(folder: Path, number: int) -> None:
    cascade = Config.parse(tomllib.loads(BLOCKS[number][1])).build()
    assert len(cascade.stages) == 1


@pytest.mark.parametrize("number", blocks("text"))
def test_shown_text_is_so(demo: str, number: int) -> None:
    text = BLOCKS[number][1]
    if text.startswith("+++"):
        assert parse_template("mine", text).reasoning
        return
    shown = [line.rstrip() for line in demo.splitlines()]
    expected = [line.rstrip() for line in text.splitlines() if line.strip() not in ("", "…") and "seconds" not in line]
    missing = [line for line in expected if line not in shown]
    assert not missing

"""Every code block of the README and of the documentation is run, in a folder with the files that it needs."""

import io
import re
import runpy
import shlex
import shutil
import subprocess
import tomllib
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib import resources
from pathlib import Path
from unittest.mock import patch

import pytest

from cascadevlm.config.config import Config
from cascadevlm.judges.prompt import parse_template
from docs.generate import PAGES
from tests.cli.test_cli import run as run_here
from tests.server import JudgeServer

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

FEWER = {
    r"--each \d+": "--each 2",
    r"--limit \d+": "--limit 8",
    r"--size \d+": "--size 40",
    r"--target-error \S+": "--target-error 0.9",
    r"--accuracy \S+": "--accuracy 0.3",
    r"--judge-share \S+": "--judge-share 0.5",
}
"""The tests use fewer images than the pages, so guarantees are weaker."""

BARE_MACHINE = re.compile(r"pip install uv && uv run (--no-dev )?")
PLAIN = re.compile(r"(cascadevlm|python -m training\.render) ((?:[^|&;<>$`*?~#!(){}\[\]\"']|\"[^$`\"]*\"|'[^']*')*)")
"""Run a command without a shell and in this process, because a new process would spend most of its time on loading torch."""

RUN = ("sh", "python", "toml")
SHOWN = ("text", "console", "yaml")


def pages() -> list[Path]:
    written = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name not in PAGES]
    return [README, *written]


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Images, labels, and hosted judges on this machine."""
    aviary = resources.files("cascadevlm_backends") / "aviary"
    with resources.as_file(aviary) as bundled:
        images = sorted((bundled / "images").glob("*.jpg"))
        (tmp_path / "images").mkdir()
        for source, name in zip(images, ("one.jpg", "two.jpg"), strict=False):
            shutil.copy(source, tmp_path / "images" / name)
            (tmp_path / "support" / source.stem).mkdir(parents=True)
            shutil.copy(source, tmp_path / "support" / source.stem)
        shutil.copy(bundled / "labels.txt", tmp_path)
    with JudgeServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_BASE_URL", server.openai_url)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.chdir(tmp_path)
        yield tmp_path


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def lines_of(text: str) -> list[str]:
    return text.replace("\\\n", "").splitlines()


def typed(line: str) -> str:
    """What a command of a page prints."""
    command = BARE_MACHINE.sub("", line)
    for many, few in FEWER.items():
        command = re.sub(many, few, command)
    if command in ("pytest", "cascadevlm demo"):  # this very suite, and the test of what the demo shows
        return ""
    if plain := PLAIN.fullmatch(command):
        program, arguments = plain[1], shlex.split(plain[2])
        if program == "cascadevlm":
            return run_here(*arguments).stdout
        with patch("sys.argv", [program, *arguments]), pytest.raises(SystemExit, match=r"^0$"):
            runpy.run_module("training.render", run_name="__main__")
        return ""
    return run("bash", "-c", command)


def execute(code: str) -> None:
    """Run the code of a block in this process, which has loaded torch already. Warnings are no errors, as for a user."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", SyntaxWarning)
        exec(compile(code, "block", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_run_in_their_order(folder: Path, page: Path) -> None:
    for language, text in blocks(page):
        assert language in RUN + SHOWN
        if "--8<--" in text:  # a file of the example package, which has its own test
            assert (ROOT / text.split('"')[1]).exists()
        elif language == "toml":
            (folder / "cascade.toml").write_text(text)
            if "calibration" not in text:  # that one is refused until the page has made it
                Config.parse(tomllib.loads(text)).build()
        elif language == "sh":
            for line in lines_of(text):
                typed(line)
        elif language == "python":
            execute(text)
        elif text.startswith("+++"):
            assert parse_template("mine", text).reasoning


def test_the_readme_shows_what_the_demo_shows(folder: Path) -> None:
    shown = [line.rstrip() for line in run("cascadevlm", "demo").splitlines()]
    (text,) = (text for language, text in blocks(README) if language == "text")
    expected = [line.rstrip() for line in text.splitlines() if line.strip() not in ("", "…")]
    assert not [line for line in expected if line not in shown]


@pytest.mark.parametrize("name", PAGES)
def test_pages_made_from_the_program_are_up_to_date(name: str) -> None:
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == PAGES[name](), "Run: python -m docs.generate"


def test_links_lead_to_pages(folder: Path) -> None:
    for page in pages():
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"

"""The example plug-in, built and installed for real: its own tests, and its scorer, judge and policy in a configuration."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cascadevlm.base.entry_points import installed
from cascadevlm.testing import picture

PLUGIN = Path(__file__).parents[2] / "examples" / "plugin"

CONFIG = """
labels = ["a red finch", "a blue finch", "a red owl"]
[scorer]
use = "colours:mean"
options = { scale = 5.0 }
[[stage]]
judge = "colours:middle"
policy = "ties > 0"
candidates = 2
[cache]
enabled = false
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    source = shutil.copytree(PLUGIN, tmp_path_factory.mktemp("source") / "plugin")
    site = tmp_path_factory.mktemp("site")
    project = source / "pyproject.toml"
    broken = '[project.entry-points."cascadevlm.judges"]\nbroken = "cascadevlm_colours_missing:Judge"'
    project.write_text(project.read_text().replace('[project.entry-points."cascadevlm.judges"]', broken))
    build = f"import hatchling.build; print(hatchling.build.build_wheel({str(source)!r}))"
    built = subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, text=True).stdout
    zipfile.ZipFile(source / built.split()[-1]).extractall(site)  # how a wheel of pure Python is installed
    return {**os.environ, "PYTHONPATH": str(site)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.toml").write_text(CONFIG)
    picture((20, 20, 220)).save(tmp_path / "blue.png")
    picture((220, 20, 20)).save(tmp_path / "red.png")
    return tmp_path


def cascadevlm(environment: dict[str, str], *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", "from cascadevlm.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_its_own_tests_pass(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "pyproject.toml", "."]
    done = subprocess.run(command, cwd=PLUGIN, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_all_three_from_a_config(environment: dict[str, str], folder: Path) -> None:
    done = cascadevlm(environment, "classify", folder, "--config", folder / "config.toml", "--json")
    assert done.returncode == 0, done.stderr
    kept, asked = map(json.loads, done.stdout.splitlines())
    assert (kept["label"], kept["decided_by"]) == ("a blue finch", "scorer")
    assert (asked["label"], asked["decided_by"]) == ("a red finch", "judge")
    assert asked["verdict"]["judge"] == "colours:middle"


def test_listed_with_its_package(environment: dict[str, str]) -> None:
    rows = json.loads(cascadevlm(environment, "backends", "--json").stdout)
    found = {(row["kind"], row["name"]): row for row in rows}
    assert found["scorer", "colours"]["package"] == "cascadevlm-colours 1.0.0"
    assert found["judge", "colours"]["needs"] == "nothing more"
    assert "cascadevlm_colours_missing" in found["judge", "broken"]["needs"]


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("stage.0.judge='colour:any'", "There is no judge backend 'colour'. Did you mean 'colours'?"),
        ("stage.0.judge='broken:any'", "cannot be imported"),
        ("scorer.options={scal=1}", "'colours' has no option 'scal'. Did you mean 'scale'?"),
        ("stage.0.policy='tie > 1'", "There is no policy 'tie'. Did you mean 'ties'?"),
        ("stage.0.policy='ties > -1'", "ties must be a number of at least 0, not -1"),
    ],
)
def test_mistakes_are_one_sentence_with_the_fix(environment: dict[str, str], folder: Path, setting: str, sentence: str) -> None:
    done = cascadevlm(environment, "classify", folder, "--config", folder / "config.toml", "--set", setting)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_packages_on_a_longer_path_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = installed("scorers")
    (tmp_path / "slow-1.dist-info").mkdir()
    (tmp_path / "slow-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: slow\nVersion: 1\n")
    (tmp_path / "slow-1.dist-info" / "entry_points.txt").write_text("[cascadevlm.scorers]\nslow = slow:Slow\n")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        assert set(installed("scorers")) == {*before, "slow"}
    assert installed("scorers") == before

"""A third-party package, built and installed for real, whose scorer, judge and policy are used from a config."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cascadevlm.testing import noise

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "tiny-plugin"
version = "1.2.3"
[project.entry-points."cascadevlm.scorers"]
flat = "tiny_plugin:FlatScorer"
[project.entry-points."cascadevlm.judges"]
last = "tiny_plugin:LastJudge"
broken = "tiny_plugin_missing:Judge"
[project.entry-points."cascadevlm.policies"]
wide = "tiny_plugin:Wide"
"""

MODULE = """
from dataclasses import dataclass
import numpy as np
import cascadevlm
from cascadevlm.policies.base import START

class FlatScorer(cascadevlm.Scorer):
    def __init__(self, model, *, slope=0.0):
        self.model, self.slope = model, slope
    def score(self, images, labels):
        logits = np.tile(-self.slope * np.arange(len(labels)), (len(images), 1))
        return cascadevlm.Scores.from_logits(logits, labels, f"flat:{self.model}")

class LastJudge(cascadevlm.Judge):
    def __init__(self, model):
        self.model = model
    async def judge(self, question):
        return cascadevlm.Verdict(outcome="answered", label=question.labels[-1].name, judge=self.spec)

@dataclass(frozen=True)
class Wide(cascadevlm.Policy):
    comparison = ">"
    threshold: float
    def select(self, scores, spending=START):
        return np.array([image > self.threshold for image in range(len(scores))])
"""

CONFIG = """
labels = ["ant", "bee", "cicada"]
[scorer]
use = "flat:any"
options = { slope = 0.5 }
[[stage]]
judge = "last:any"
policy = "wide > 0"
candidates = 2
[cache]
enabled = false
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    source = tmp_path_factory.mktemp("source")
    site = tmp_path_factory.mktemp("site")
    (source / "pyproject.toml").write_text(PYPROJECT)
    (source / "tiny_plugin.py").write_text(MODULE)
    build = f"import hatchling.build; print(hatchling.build.build_wheel({str(source)!r}))"
    wheel = subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, text=True).stdout.split()[
        -1
    ]
    zipfile.ZipFile(source / wheel).extractall(site)  # how a wheel of pure Python is installed
    return {**os.environ, "PYTHONPATH": str(site)}


def cascadevlm(environment: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", "from cascadevlm.cli import main; main()", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_all_three_from_a_config(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(CONFIG)
    for seed in range(2):
        noise(seed).save(tmp_path / f"{seed}.png")
    done = cascadevlm(environment, "classify", str(tmp_path), "--config", str(tmp_path / "config.toml"), "--json")
    assert done.returncode == 0, done.stderr
    kept, asked = map(json.loads, done.stdout.splitlines())
    assert (kept["label"], kept["decided_by"]) == ("ant", "scorer")
    assert (asked["label"], asked["decided_by"]) == ("bee", "judge")
    assert asked["verdict"]["judge"] == "last:any"


def test_listed_with_its_package(environment: dict[str, str]) -> None:
    rows = json.loads(cascadevlm(environment, "backends", "--json").stdout)
    found = {(row["kind"], row["name"]): row for row in rows}
    assert found["scorer", "flat"]["package"] == "tiny-plugin 1.2.3"
    assert found["judge", "last"]["needs"] == "nothing more"
    assert "tiny_plugin_missing" in found["judge", "broken"]["needs"]


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("stage.0.judge='lost:any'", "There is no judge backend 'lost'. Did you mean 'last'?"),
        ("stage.0.judge='broken:any'", "cannot be imported"),
        ("scorer.options={slop=1}", "'flat' has no option 'slop'. Did you mean 'slope'?"),
        ("stage.0.policy='wider > 1'", "There is no policy 'wider'. Did you mean 'wide'?"),
    ],
)
def test_mistakes_are_one_sentence_with_the_fix(environment: dict[str, str], tmp_path: Path, setting: str, sentence: str) -> None:
    (tmp_path / "config.toml").write_text(CONFIG)
    noise(0).save(tmp_path / "image.png")
    done = cascadevlm(environment, "classify", str(tmp_path), "--config", str(tmp_path / "config.toml"), "--set", setting)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr

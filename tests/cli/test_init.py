"""``cascadevlm init``: the file that it writes, and its questions on a real terminal."""

import os
import pty
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from cascadevlm.base.environment import LOCAL_ONLY
from cascadevlm.base.errors import LabelError
from cascadevlm.base.labels import LabelSet
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.cli.init import HOSTED, _labels, _toml
from cascadevlm.config import DEFAULT_SCORER
from cascadevlm.config.config import Config, read_toml
from cascadevlm.testing import noise
from tests.cli.test_cli import run


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with images in class folders, and a file of names. No key is set."""
    monkeypatch.chdir(tmp_path)
    for hosted in HOSTED.values():
        monkeypatch.delenv(hosted.key, raising=False)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        noise(1, (30, 30)).save(tmp_path / "photos" / name / "1.png")
    (tmp_path / "labels.txt").write_text("cat\ndog\nbird\n")
    (tmp_path / "table.csv").write_text("sku\nA-1\n")


def parsed() -> Config:
    return Config.parse(read_toml(Path("cascade.toml")))


def written(*arguments: str) -> Cascade:
    run("init", "--images", "photos", *arguments)
    return parsed().build()


@pytest.mark.parametrize(
    ("labels", "names"),
    [("labels.txt", ["cat", "dog", "bird"]), ("photos", ["cat", "dog"]), ("tabby cat, 'dog\"', ", ["tabby cat", "'dog\"'"])],
)
def test_labels_are_a_file_a_folder_or_names(labels: str, names: list[str]) -> None:
    assert [label.name for label in written("--labels", labels).labels] == names


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters=",\0"), min_size=1), min_size=2, max_size=4))
def test_any_names_survive_the_file(names: list[str]) -> None:
    stripped = [name.strip() for name in names if name.strip()]
    assume(len(stripped) >= 2)
    try:
        expected = [label.name for label in LabelSet.of(stripped)]
    except LabelError:
        assume(False)
    assert tomllib.loads(_toml(_labels(",".join(names)), "laptop", "none", 1))["labels"] == expected


@pytest.mark.parametrize(
    ("judge", "spec", "usd"),
    [
        ("openai", "openai:gpt-4o", 2.5),
        ("anthropic", "anthropic:claude-sonnet-5-5", 2.5),
        ("gemini", "openai:gemini-2.5-flash", 2.5),
        ("local", "hf_chat:HuggingFaceTB/SmolVLM-500M-Instruct", None),
        ("none", None, None),
    ],
)
def test_every_judge_gives_a_valid_cascade(judge: str, spec: str | None, usd: float | None) -> None:
    cascade = written("--labels", "labels.txt", "--machine", "laptop", "--judge", judge, "--usd", "2.5")
    assert [stage.judge.spec for stage in cascade.stages] == ([spec] if spec else [])
    assert all(stage.judge.costs_money == (usd is not None) for stage in cascade.stages)
    assert cascade.ledger.cap_dollars == usd
    assert parsed().scorer.use == DEFAULT_SCORER
    assert "aviary" not in Path("cascade.toml").read_text()


@pytest.mark.parametrize(("key", "spec"), [(each.key, each.spec) for each in HOSTED.values()])
def test_the_key_that_is_set_chooses_the_judge(key: str, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(key, "a-secret-key")
    (stage,) = written("--labels", "labels.txt").stages
    assert stage.judge.spec == spec
    assert "a-secret-key" not in Path("cascade.toml").read_text()


def test_the_file_works_with_the_commands_that_are_named_next() -> None:
    done = run("init", "--images", "photos", "--labels", "photos", "--judge", "openai")
    assert "cascadevlm estimate photos --config cascade.toml" in done.stdout
    assert "cascadevlm run photos --config cascade.toml --output predictions" in done.stdout
    assert "set the environment variable OPENAI_API_KEY" in done.stdout
    bundled = ["--set", "scorer.use=open_clip:aviary", "--set", "stage.0.policy=always"]
    assert "prices.toml of cascadevlm, read on 20" in run("estimate", "photos", "--config", "cascade.toml", *bundled).stdout
    kept = [*bundled, "--set", "stage.0.policy=never", "--set", "stage.0.judge=hf_chat:aviary"]
    run("run", "photos", "--config", "cascade.toml", "--output", "predictions", *kept)
    assert Path("predictions").is_dir()


def test_images_may_be_at_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def next_command(address: str) -> str:
        Path("cascade.toml").unlink(missing_ok=True)
        done = run("init", "--images", address, "--labels", "labels.txt", "--judge", "none")
        return done.stdout.splitlines()[-1].strip()

    options = "--config cascade.toml --output predictions"
    assert next_command("memory://photos/table.parquet") == f"cascadevlm run memory://photos/table.parquet {options}"
    assert "hunter2" not in next_command("memory://user:hunter2@photos")
    monkeypatch.delenv(LOCAL_ONLY)
    assert next_command("hf://datasets/owner/name") == f"cascadevlm run hf://datasets/owner/name {options}"
    if find_spec("s3fs"):
        assert next_command("s3://bucket/photos") == f"cascadevlm run s3://bucket/photos {options}"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--images", "s3://bucket/photos", "--labels", "labels.txt"], f"is not on this machine, and {LOCAL_ONLY} is set."),
        (
            ["--images", "http://127.0.0.1/a.csv", "--labels", "labels.txt"],
            "and only images are read over https.",
        ),
        (["--images", "memory://a.zip::b", "--labels", "labels.txt"], "is followed by '::' and another address"),
        (["--labels", "labels.txt"], "--images is missing, and the input is not a terminal. Add --images."),
        (["--images", "photos/cat/1.png", "--labels", "labels.txt"], "1.png' is neither a folder nor a list of images."),
        (["--images", "table.csv", "--labels", "labels.txt"], "'table.csv' has no column 'path'. Its columns: 'sku'."),
        (["--images", "photos"], "--labels is missing, and the input is not a terminal. Add --labels."),
        (["--images", "nowhere", "--labels", "labels.txt"], "'nowhere' does not exist."),
        (["--images", "photos", "--labels", "lables.txt"], "'lables.txt' is not a file, not a folder, and not several names."),
        (["--images", "photos", "--labels", "cat, cat"], "cat"),
        (["--images", "photos", "--labels", "labels.txt", "--judge", "openai", "--usd", "inf"], "budget.usd"),
    ],
)
def test_wrong_answers_write_nothing(arguments: list[str], sentence: str) -> None:
    done = run("init", *arguments, check=False)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert not Path("cascade.toml").exists()


@pytest.mark.parametrize("yes", [[], ["--yes"]])
def test_an_existing_file_is_kept(yes: list[str]) -> None:
    Path("cascade.toml").write_text("mine")
    done = run("init", "--images", "photos", "--labels", "labels.txt", *yes, check=False)
    assert (done.returncode, Path("cascade.toml").read_text()) == (2, "mine")
    assert "'cascade.toml' exists already. Give another file: --output FILE." in done.stderr


def on_a_terminal(answers: str) -> tuple[int, str]:
    """Exit code and output of ``cascadevlm init``, with these answers typed on a terminal."""
    ours, theirs = pty.openpty()
    command = [str(Path(sys.executable).with_name("cascadevlm")), "init"]
    shown = b""
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as program:
        os.close(theirs)
        os.write(ours, answers.encode())
        try:
            while chunk := os.read(ours, 1024):
                shown += chunk
        except OSError:  # Linux reports the end of a terminal as an error
            pass
    os.close(ours)
    return program.returncode, shown.decode()


def test_five_questions_on_a_terminal() -> None:
    code, shown = on_a_terminal("photos\nlabels.txt\nlaptop\nclaude\nanthropic\n1.5\n")
    assert code == 0, shown
    assert "'claude' is not one of" in shown
    config = parsed()
    assert (config.stage[0].judge, config.budget.usd) == ("anthropic:claude-sonnet-5-5", 1.5)
    before = Path("cascade.toml").read_text()
    code, shown = on_a_terminal("photos\nphotos\nlaptop\nnone\nn\n")
    assert code != 0
    assert "Overwrite cascade.toml?" in shown
    assert Path("cascade.toml").read_text() == before

"""``cascadevlm run`` for a user: runs that are started, interrupted, continued and refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from tests.cli.test_cli import Done, run
from tests.server import JudgeServer

AVIARY = Path(str(resources.files("cascadevlm_backends") / "aviary"))


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer(latency=0.2) as running:
        yield running


@pytest.fixture
def call(server: JudgeServer, tmp_path: Path) -> list[str | Path]:
    """Arguments that ask questions about twelve birds, one after another."""
    (tmp_path / "images").mkdir()
    for bird in sorted(AVIARY.glob("images/*"))[:12]:
        shutil.copy(bird, tmp_path / "images")
    return [
        *("run", tmp_path / "images", "-o", tmp_path / "run", "--labels", AVIARY / "labels.txt", "--yes"),
        *("--scorer", "open_clip:aviary", "--judge", "openai:gpt-4o", "--policy", "always"),
        *("--set", f"stage.0.options.base_url={server.openai_url}", "--set", "stage.0.options.concurrency=2"),
        *("--set", f"cache.folder={tmp_path / 'cache'}", "--set", "batch_size=2"),
    ]


def signalled(call: list[str | Path], server: JudgeServer, number: signal.Signals) -> Done:
    """The command, in this process, which gets a signal after some of its questions."""

    def send() -> None:
        while len(server.requests) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    server.latency = 0.5  # the command must not end before the signal, which would then end the tests
    sending = threading.Thread(target=send, daemon=True)
    sending.start()
    done = run(*call, check=False)
    sending.join()
    return done


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_in_order_and_the_same_command_goes_on(
    call: list[str | Path], server: JudgeServer, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    done = signalled(call, server, number)
    assert done.returncode == code
    assert "The run stops when all open questions are finished" in done.stderr
    assert "The same command continues it" in done.stderr
    assert "spent" in done.stdout
    served = len(server.requests)
    predictions = tmp_path / "run" / "predictions.jsonl"
    assert len(predictions.read_text().splitlines()) == served < 12
    server.latency = 0
    tally = json.loads(run(*call, "--json").stdout)
    assert tally["counts"] == {"answered": 12}
    assert len(server.requests) == 12
    assert [Path(json.loads(line)["path"]) for line in predictions.read_text().splitlines()] == sorted(tmp_path.glob("images/*"))


def test_a_second_interrupt_ends_at_once(call: list[str | Path], server: JudgeServer, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("cascadevlm")
    process = subprocess.Popen([program, *call], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while len(server.requests) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    server.latency = 600
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "Press Ctrl-C again to stop at once" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)  # the server would answer after ten minutes
    assert process.returncode == 130
    assert "The run was stopped" not in errors
    server.latency = 0
    assert json.loads(run(*call, "--json").stdout)["images"] == 12


def test_what_ends_in_nothing_says_so_and_can_be_tried_again(call: list[str | Path], tmp_path: Path) -> None:
    images = sorted((tmp_path / "images").iterdir())
    contents = [image.read_bytes() for image in images]
    for image in images:
        image.write_text("no image")
    done = run(*call, check=False)
    assert done.returncode == 1
    assert "12, in failures.jsonl" in done.stdout
    assert "failures.jsonl lists the reasons. Correct the cause, and run the same command with --retry-failed." in done.stderr
    for image, content in zip(images, contents, strict=True):
        image.write_bytes(content)
    assert run(*call, check=False).returncode == 1
    assert json.loads(run(*call, "--retry-failed", "--json").stdout)["counts"] == {"answered": 12}
    assert json.loads(run(*call, "--json").stdout)["failures"] == 0


def test_wrong_calls_say_so(call: list[str | Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    done = run("run", empty, *call[2:], check=False)
    assert done.returncode == 2
    assert "contains no images" in done.stderr
    done = run("run", tmp_path / "gone", *call[2:], check=False)
    assert "does not exist" in done.stderr
    assert not list(empty.iterdir())


def test_an_interrupt_in_the_last_batch_ends_as_any_run(call: list[str | Path], server: JudgeServer, tmp_path: Path) -> None:
    done = signalled([*call, "--set", "batch_size=12"], server, signal.SIGINT)
    assert "The run stops when all open questions are finished" in done.stderr
    assert "continues it" not in done.stderr
    assert done.returncode == 0
    assert (tmp_path / "run" / "summary.json").exists()
    again = run(*call, "--set", "batch_size=12")
    assert "Nothing is left to do: all 12 images have a prediction." in again.stderr


def test_where_no_question_gets_an_answer_the_work_failed(call: list[str | Path], server: JudgeServer, tmp_path: Path) -> None:
    server.answer, server.latency = (lambda asked: "No idea."), 0
    done = run(*call, check=False)
    assert done.returncode == 1
    assert "unparsed" in done.stdout
    assert "failures.jsonl lists the reasons" in done.stderr
    assert run("classify", tmp_path / "images", *call[4:], check=False).returncode == 1
    names = (AVIARY / "labels.txt").read_text().splitlines()
    rows = [f"images/{image.name},{names[0]}\n" for image in sorted((tmp_path / "images").iterdir())[:3]]
    (tmp_path / "data.csv").write_text("path,label\n" + "".join(rows))
    evaluated = run("evaluate", tmp_path / "data.csv", *call[4:], check=False)
    assert evaluated.returncode == 1
    assert "None of 3 questions got an answer." in evaluated.stderr


def test_a_higher_budget_asks_about_what_was_skipped(call: list[str | Path], server: JudgeServer, tmp_path: Path) -> None:
    server.latency = 0
    call += ["--set", "stage.0.options.price={ input = 2.5, output = 10 }"]
    first = run(*call, "--set", "budget.usd=0.02")
    skipped = json.loads((tmp_path / "run" / "summary.json").read_text())["counts"]["skipped"]
    assert 0 < skipped < 12
    assert f"{skipped} images were escalated but not asked about, because the budget was used up" in first.stderr
    served = len(server.requests)
    second = run(*call, "--set", "budget.usd=5", "--json")
    assert "The budget was raised from $0.02" in second.stderr
    assert json.loads(second.stdout)["counts"] == {"answered": 12}
    assert len(server.requests) == served + skipped == 12


def test_the_hint_of_the_spending_question_helps(call: list[str | Path]) -> None:
    priced = "stage.0.options.price={ input = 1000, output = 1000 }"
    arguments = [*(argument for argument in call if argument != "--yes"), "--set", priced]
    asked = run(*arguments, check=False)
    hint = asked.stderr.split()[-1].rstrip(".")
    assert hint == "budget.usd=1"
    assert run(*arguments, "--set", hint, check=False).returncode == 0


def test_money_is_asked_about_by_a_sample(call: list[str | Path], server: JudgeServer) -> None:
    priced = "stage.0.options.price={ input = 1000, output = 1000 }"
    done = run(*(argument for argument in call if argument != "--yes"), "--set", priced, check=False)
    assert done.returncode == 2
    assert "about 12 questions" in done.stderr
    assert not server.requests

"""The bundled judge behind ``transformers serve``, asked through ``openai:``, gives the same answers as in this process."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from cascadevlm import Cascade, Judge, LabelSet, Stage, load_judge, load_prompt, load_scorer
from cascadevlm.base.types import Prediction

AVIARY = Path(str(resources.files("cascadevlm_backends") / "aviary"))
SECONDS_TO_START = 120


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    hub = tmp_path_factory.mktemp("hub")
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(AVIARY / "judge")]
    options = ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", str(hub))
        server = subprocess.Popen([*command, *options], stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", server, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait(30)


def _wait_for(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"transformers serve did not start:\n{log.read_text()[-2000:]}")


def predictions(judge: Judge) -> list[Prediction]:
    stage = Stage(judge=judge, prompt=load_prompt("select_cot"))
    cascade = Cascade(load_scorer("open_clip:aviary"), [stage], labels=LabelSet.read(AVIARY / "labels.txt"))
    return cascade.classify(sorted((AVIARY / "images").glob("*.jpg"))[::4])


def test_served_judge_gives_the_same_verdicts(url: str) -> None:
    served = predictions(load_judge(f"openai:{AVIARY / 'judge'}", base_url=url, temperature=0.0, structured=False))
    local = predictions(load_judge("hf_chat:aviary"))
    assert [(p.label, p.verdict and p.verdict.outcome, p.verdict and p.verdict.text) for p in served] == [
        (p.label, p.verdict and p.verdict.outcome, p.verdict and p.verdict.text) for p in local
    ]
    assert sum(p.decided_by == "judge" for p in served) > len(served) / 2
    assert sum(p.cost.dollars for p in served) == 0
    assert all(p.cost.input_tokens > 0 for p in served)

"""``cascadevlm doctor``: what it shows, and what it finds missing. Also the error of a model that cannot be downloaded."""

import json
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import pytest

from cascadevlm import load_judge, load_scorer
from cascadevlm.base.environment import LOCAL_ONLY
from cascadevlm.base.errors import BackendError
from cascadevlm.config import DEFAULT_SCORER
from cascadevlm.testing import noise
from tests.cli.test_cli import run

KEY = "sk-very-secret"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No connection is opened, and judges elsewhere are allowed. One key is set."""

    def refuse(*_: object) -> NoReturn:
        pytest.fail("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv(LOCAL_ONLY)
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)


def test_the_machine_is_described_without_keys() -> None:
    done = run("doctor", "--json")
    figures = json.loads(done.stdout)
    assert (figures["keys"]["OPENAI_API_KEY"], figures["keys"]["ANTHROPIC_API_KEY"]) == (True, False)
    assert {"torch", "open_clip_torch", "genai-prices"} <= set(figures["versions"])
    assert figures["extras"]["llm"] is True
    assert figures["extras"]["remote"] is (find_spec("gcsfs") is not None and find_spec("s3fs") is not None)
    assert figures["devices"]["cpus"] >= 1
    assert figures["disk_free_bytes"] > 0
    assert len(figures["caches"]) == 2
    assert figures["checks"] == []
    assert KEY not in done.stdout + run("doctor").stdout


@pytest.mark.parametrize(
    ("spec", "missing", "remark"),
    [
        ("open_clip:aviary", "", ""),
        ("hf_chat:aviary", "", ""),
        ("openai:gpt-4o", "", "prices.toml of cascadevlm, read on"),
        ("llm:gpt-4o", "", "prices.toml of cascadevlm, read on"),
        ("anthropic:claude-sonnet-5-5", "needs a key. Set the environment variable ANTHROPIC_API_KEY.", ""),
        ("openai:gpt-99", "The price of 'openai:gpt-99' is unknown.", ""),
        (DEFAULT_SCORER, "is not on this machine, and it cannot be downloaded: HF_HUB_OFFLINE is set. Connect", ""),
        ("open_clip:ViT-B-16-SigLIP3/webli", "Did you mean", ""),
        ("open_clip:local-dir:nowhere", "The folder 'nowhere' of the model does not exist.", ""),
        ("hf:google/siglip2-base-patch16-224", "is not on this machine", ""),
        ("hf_chat:Qwen/Qwen2.5-VL-7B-Instruct", "is not on this machine", ""),
        ("llm:no-such-model", "llm has no model 'no-such-model'.", ""),
        ("opan_clip:x", "There is no backend 'opan_clip'. Did you mean 'open_clip'?", ""),
    ],
)
def test_what_is_missing_for_a_spec(spec: str, missing: str, remark: str) -> None:
    done = run("doctor", spec, "--json", check=False)
    (check,) = json.loads(done.stdout)["checks"]
    assert done.returncode == (1 if missing else 0)
    assert check["what"] == spec
    assert missing in check["missing"]
    assert bool(check["missing"]) == bool(missing)
    assert remark in check["remark"]


def test_all_parts_of_a_configuration_are_checked(tmp_path: Path) -> None:
    toml = tmp_path / "cascade.toml"
    toml.write_text(
        f"""labels = "{tmp_path / "labels.txt"}"
[[stage]]
judge = "openai:gpt-4o"
[[stage]]
judge = "anthropic:claude-sonnet-5-5"
options = {{ api_key_env = "MINE" }}
"""
    )
    done = run("doctor", "--config", toml, "--json", check=False)
    checks = {check["what"]: check["missing"] for check in json.loads(done.stdout)["checks"]}
    assert list(checks) == [str(toml), DEFAULT_SCORER, "openai:gpt-4o", "anthropic:claude-sonnet-5-5"]
    assert "labels.txt" in checks[str(toml)]
    assert "cannot be downloaded" in checks[DEFAULT_SCORER]
    assert checks["openai:gpt-4o"] == ""
    assert "Set the environment variable MINE" in checks["anthropic:claude-sonnet-5-5"]
    assert done.returncode == 1
    assert "missing" in run("doctor", "--config", toml, check=False).stdout


def test_a_complete_configuration_is_ready(tmp_path: Path) -> None:
    toml = tmp_path / "cascade.toml"
    toml.write_text('labels = ["cat", "dog"]\nscorer.use = "open_clip:aviary"\n[[stage]]\njudge = "hf_chat:aviary"\n')
    shown = run("doctor", "--config", toml).stdout
    assert "ready: 2 labels" in shown
    assert "missing" not in shown


def test_a_wrong_configuration_is_one_sentence(tmp_path: Path) -> None:
    toml = tmp_path / "cascade.toml"
    toml.write_text("scorrer = 1")
    done = run("doctor", "--config", toml, check=False)
    assert done.returncode == 2
    assert "Did you mean 'scorer'?" in done.stderr


def test_the_default_scorer_is_named_where_it_cannot_be_downloaded(tmp_path: Path) -> None:
    noise(1, (30, 30)).save(tmp_path / "1.png")
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    done = run("classify", tmp_path / "1.png", "--labels", tmp_path / "labels.txt", check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        f"Error: The model '{DEFAULT_SCORER.partition(':')[2]}' is not on this machine, and it cannot be downloaded: "
        "HF_HUB_OFFLINE is set. Connect this machine to huggingface.co once, or use a model in a folder."
    )


def test_without_offline_a_download_is_only_a_remark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "is downloaded" in load_scorer(DEFAULT_SCORER).check()
    assert "is downloaded" in load_judge("hf_chat:a/b").check()
    weights = tmp_path / "models--timm--ViT-B-16-SigLIP2" / "snapshots" / "abc" / "open_clip_model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    assert load_scorer(DEFAULT_SCORER).check() == ""
    monkeypatch.setenv(LOCAL_ONLY, "1")
    with pytest.raises(BackendError, match=f"is not on this machine, and {LOCAL_ONLY} is set"):
        load_judge("openai:gpt-4o").check()

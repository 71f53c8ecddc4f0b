"""Messages and questions of the command line about money, with a hosted judge on this machine that has a price."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from cascadevlm.testing import noise
from tests.cli.test_cli import run
from tests.server import JudgeServer

PRICE = "{ input = 1000, output = 1000 }"


@pytest.fixture(scope="module")
def server() -> Iterator[JudgeServer]:
    with JudgeServer(batch_polls=0) as running:
        yield running


@pytest.fixture
def call(server: JudgeServer, tmp_path: Path) -> list[str | Path]:
    """Arguments that classify four images. A judge that costs a dollar per thousand tokens is asked about each image."""
    for seed in range(4):
        noise(seed, (60, 60)).save(tmp_path / f"{seed}.png")
    (tmp_path / "labels.txt").write_text("red finch\nblue finch\ngrey owl\n")
    return [
        *(tmp_path, "--labels", tmp_path / "labels.txt", "--scorer", "open_clip:aviary", "--judge", "openai:priced"),
        *("--policy", "always", "--set", f"stage.0.options.base_url={server.openai_url}"),
        *("--set", f"stage.0.options.price={PRICE}", "--set", f"cache.folder={tmp_path / 'cache'}"),
    ]


def test_a_run_that_may_cost_more_than_a_dollar_is_asked_about(call: list[str | Path], server: JudgeServer) -> None:
    before = len(server.requests)
    done = run("classify", *call, check=False)
    assert done.returncode == 2
    assert "about 4 questions" in done.stderr
    assert "--yes" in done.stderr
    assert len(server.requests) == before


def test_with_yes_it_runs_and_the_second_run_is_free(call: list[str | Path]) -> None:
    first = [json.loads(line) for line in run("classify", *call, "--yes", "--json").stdout.splitlines()]
    assert [row["cost"]["dollars"] for row in first] == [pytest.approx(1.02)] * 4
    shown = run("classify", *call, "--yes").stdout
    assert "$0.0000" in shown
    assert "$4.0800" in shown


def test_a_small_run_or_a_small_cap_is_not_asked_about(call: list[str | Path]) -> None:
    run("classify", *call, "--set", "budget.ask_above_usd=100", "--json")
    capped = run("classify", *call, "--set", "budget.usd=0.5", "--set", "cache.enabled=false", "--json").stdout
    assert [json.loads(line)["verdict"]["outcome"] for line in capped.splitlines()] == ["skipped"] * 4


def test_estimate_tells_calls_and_dollars_and_asks_nobody(call: list[str | Path], server: JudgeServer) -> None:
    before = len(server.requests)
    (stage,) = json.loads(run("estimate", *call, "--json").stdout)
    assert (stage["calls"], stage["deferral_rate"]) == (4, 1.0)
    low, high = stage["dollars_range"]
    assert 0 < low <= stage["dollars"] <= high
    assert "openai:priced" in run("estimate", *call).stdout
    assert len(server.requests) == before


@pytest.mark.parametrize("name", ["list.txt", "list.csv", "list.jsonl", "list.parquet", "images.parquet"])
def test_estimate_takes_what_run_takes(call: list[str | Path], tmp_path: Path, name: str) -> None:
    paths = [f"{seed}.png" for seed in range(4)]
    match name:
        case "images.parquet":
            stored = {"image": [{"bytes": (tmp_path / path).read_bytes(), "path": path} for path in paths]}
            pyarrow.parquet.write_table(pyarrow.table(stored), tmp_path / name)
        case "list.parquet":
            pyarrow.parquet.write_table(pyarrow.table({"path": paths}), tmp_path / name)
        case _:
            texts = {"list.txt": paths, "list.csv": ["path", *paths], "list.jsonl": map(json.dumps, paths)}
            (tmp_path / name).write_text("\n".join(texts[name]))
    (stage,) = json.loads(run("estimate", tmp_path / name, *call[1:], "--sample", "3", "--json").stdout)
    assert (stage["images"], stage["sample"], stage["calls"]) == (4, 3, 4)
    assert "4 images" in run("estimate", tmp_path / name, *call[1:]).stdout


def test_a_list_is_estimated_alone(call: list[str | Path], tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("0.png")
    done = run("estimate", tmp_path / "list.txt", *call, check=False)
    assert done.returncode == 2
    assert "list.txt' is a list of images, and other paths are given, too" in done.stderr


def test_a_run_that_goes_on_is_asked_about_what_is_left(call: list[str | Path], tmp_path: Path) -> None:
    """Each question costs a dollar. Two questions are answered, two are skipped because the budget is used up, and then the
    budget is raised.
    """
    images = tmp_path / "some"
    images.mkdir()

    def add(*seeds: int) -> None:
        for seed in seeds:
            noise(seed, (60, 60)).save(images / f"{seed}.png")

    into = ["run", images, "--output", tmp_path / "run", *call[1:], "--json", "--set"]
    add(0, 1)
    run(*into, "budget.usd=100", "--yes")
    assert "Nothing is left" in run(*into, "budget.usd=100").stderr
    add(2, 3)
    assert "about 2 questions" in run(*into, "budget.usd=100", check=False).stderr
    assert json.loads(run(*into, "budget.usd=2.2", "--yes").stdout)["counts"] == {"answered": 2, "skipped": 2}
    assert run(*into, "budget.usd=2.2").returncode == 0
    assert "about 2 questions" in run(*into, "budget.usd=50", check=False).stderr


def test_batch_costs_half(call: list[str | Path], server: JudgeServer) -> None:
    before = len(server.requests)
    halved = "{ input = 1000, output = 1000, batch_discount = 0.5 }"
    arguments = [*call, "--set", f"stage.0.options.price={halved}", "--batch", "--yes", "--json"]
    rows = [json.loads(line) for line in run("classify", *arguments).stdout.splitlines()]
    assert [row["cost"]["dollars"] for row in rows] == [pytest.approx(0.51)] * 4
    assert len(server.requests) == before

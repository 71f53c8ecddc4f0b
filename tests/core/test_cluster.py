"""Runs on a real Ray cluster of this machine, two workers and a judge that counts, against the same runs in one process."""

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import count
from pathlib import Path

import pyarrow.parquet
import pytest
from pydantic import JsonValue

from benchmarks.kills import predictions as lines
from cascadevlm import bulk, cluster
from cascadevlm.cluster import Arriving, on_ray
from cascadevlm.cluster.workers import ScoredBatch
from cascadevlm.config import Config
from cascadevlm.errors import BackendError, DataError, ImageError
from cascadevlm.inputs import Inputs
from cascadevlm.labels import LabelSet
from cascadevlm.run_folder import Tally
from cascadevlm.testing import noise
from cascadevlm.testing.server import JudgeServer

with warnings.catch_warnings():  # not ours
    warnings.simplefilter("ignore")
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")

pytestmark = pytest.mark.filterwarnings(r"ignore:::ray\..*")

SLOW = """
import os, time
from pathlib import Path
from cascadevlm.testing import FakeScorer

class Slow(FakeScorer):
    def score(self, images, labels):
        with Path(__file__).with_name("scored_by").open("a") as file:
            print(os.getpid(), file=file)
        time.sleep(0.1)
        return super().score(images, labels)
"""
COUNT, SIZE = 48, 4
BILL = 0.0012
"""Dollars: 1,000 tokens in and 20 out, at the price of the configuration."""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A package on the path of this process and of all workers, whose scorer takes its time."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "slow_scorer.py").write_text(SLOW)
    (folder / "slow-1.dist-info").mkdir()
    (folder / "slow-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: slow\nVersion: 1\n")
    (folder / "slow-1.dist-info" / "entry_points.txt").write_text("[cascadevlm.scorers]\nslow = slow_scorer:Slow\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield folder
        ray.shutdown()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("images")
    for number in range(COUNT):
        noise(number, (16, 16)).save(folder / f"{number:02}.png")
    (folder / "07.png").write_text("no image")
    return Inputs(folder)


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer(latency=0.05) as server:
        yield server


def run(
    engine: str,
    folder: Path,
    images: Inputs,
    server: JudgeServer,
    *,
    policy: str = "calls <= 15",
    dollars: float | None = None,
    stopping: Callable[[], bool] = lambda: False,
    progress: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    options: dict[str, JsonValue] = {
        "base_url": server.openai_url,
        "structured": False,
        "concurrency": 6,
        "price": {"input": 1, "output": 10},
    }
    config = Config.parse(
        {
            "scorer": {"use": "slow:any"},
            "stage": [{"judge": "openai:any", "policy": policy, "candidates": 3, "options": options}],
            "labels": ["finch", "owl", "wren", "stork"],
            "batch_size": SIZE,
            "cache": {"enabled": False},
            "budget": {"usd": dollars},
        }
    )
    cascade, frozen = config.build(), config.frozen(config.build()).model_dump(mode="json")
    with on_ray(cascade, config, images, workers=2) if engine == "ray" else nullcontext(cascade) as running:
        return bulk.run(running, images, folder, config=frozen, stopping=stopping, progress=progress)


def workers(plugin: Path, name: str) -> list[int]:
    """The processes of our cluster that run a class."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if name in (process / "cmdline").read_text() and str(plugin) in (process / "environ").read_text():
                found.append(int(process.name))
        except (OSError, ValueError):  # no process, or gone
            continue
    return found


def test_a_cluster_says_what_one_process_says(plugin: Path, images: Inputs, server: JudgeServer, tmp_path: Path) -> None:
    alone = run("local", tmp_path / "alone", images, server)
    asked = len(server.requests)
    (plugin / "scored_by").unlink()
    together = run("ray", tmp_path / "together", images, server)
    assert lines(tmp_path / "together") == lines(tmp_path / "alone")
    assert together == alone
    assert together.counts == {"answered": 15, "kept": COUNT - 16, "unreadable": 1}
    assert (asked, len(server.requests)) == (15, 30)
    scored_by = (plugin / "scored_by").read_text().split()
    assert len(scored_by) == COUNT // SIZE
    assert len(set(scored_by)) == 2
    assert str(os.getpid()) not in scored_by
    table, other = (pyarrow.parquet.read_table(tmp_path / name / "predictions.parquet") for name in ("alone", "together"))
    assert table.equals(other)


def test_the_cap_holds_across_workers_and_engines(plugin: Path, images: Inputs, server: JudgeServer, tmp_path: Path) -> None:
    """Begun in one process, gone on with by the cluster, against one process all along."""
    cap, batches = 19.5 * BILL, count()
    alone = run("local", tmp_path / "alone", images, server, policy="always", dollars=cap)
    asked = len(server.requests)
    run("local", tmp_path / "both", images, server, policy="always", dollars=cap, stopping=lambda: next(batches) == 2)
    assert 0 < len(server.requests) - asked < 10
    both = run("ray", tmp_path / "both", images, server, policy="always", dollars=cap)
    assert both.counts == alone.counts
    assert both.counts["skipped"] > 0
    assert both.spent_dollars == pytest.approx((len(server.requests) - asked) * BILL)
    assert both.spent_dollars <= cap


def test_workers_that_die_cost_no_result(plugin: Path, images: Inputs, server: JudgeServer, tmp_path: Path) -> None:
    """One that scores is killed with the first prediction; one that judges with the tenth, its questions under way. Stopped
    then, the run is gone on with in one process."""
    killed = []
    stop = False

    def kill(tally: Tally) -> None:
        nonlocal stop
        name = {1: "ScoringWorker", 10: "JudgingWorker"}.get(tally.images)
        if name:
            killed.append(workers(plugin, name)[0])
            os.kill(killed[-1], signal.SIGKILL)
        stop = tally.images >= 20

    begun = run("ray", tmp_path / "killed", images, server, policy="always", progress=kill, stopping=lambda: stop)
    assert begun.spent_dollars >= len(server.requests) * BILL - 1e-9
    tally = run("local", tmp_path / "killed", images, server, policy="always")
    run("local", tmp_path / "alone", images, server, policy="always")
    assert len(killed) == 2
    assert 20 <= begun.images < COUNT
    assert lines(tmp_path / "killed") == lines(tmp_path / "alone")
    assert tally.counts == {"answered": COUNT - 1, "unreadable": 1}


async def test_other_images_in_the_workers_are_an_error() -> None:
    labels = LabelSet.of(["finch", "owl"])
    batch = ScoredBatch(paths=["b.png"], errors=[ImageError("gone")], log_probs=None, fingerprint="")
    for batches in (iter([batch]), iter([])):
        with pytest.raises(DataError, match="find other images than this machine does"):
            await Arriving(batches, labels)([Path("a.png")])
    with pytest.raises(BackendError, match="no such model"):
        await Arriving(iter([BackendError("no such model")]), labels)([Path("a.png")])
    assert await Arriving(iter([batch]), labels)([Path("b.png")]) == [("b.png", batch.errors[0])]


def test_without_ray_there_is_a_command(images: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    config = Config.parse({"scorer": {"use": "open_clip:aviary"}, "labels": ["finch", "owl"]})
    with pytest.raises(BackendError, match=r"pip install 'cascadevlm\[ray\]'"), on_ray(config.build(), config, images):
        pass


async def test_a_silent_cluster_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "SILENT_SECONDS", 0.05)
    given = threading.Event()

    def batches() -> Iterator[ScoredBatch]:
        given.wait(10)
        yield ScoredBatch(paths=["a.png"], errors=[ImageError("torn")], log_probs=None, fingerprint="")

    threading.Timer(0.3, given.set).start()
    with pytest.warns(RuntimeWarning, match="'ray status' tells whether its workers are there"):
        (read,) = await Arriving(batches(), LabelSet.of(["ant"]))([Path("a.png")])
    assert read[0] == "a.png"

"""Runs on a real Ray cluster of this machine with two workers and a judge that counts, compared with the same runs in one
process.
"""

import json
import os
import shutil
import signal
import sys
import threading
import tomllib
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, nullcontext
from itertools import count, islice
from pathlib import Path

import pyarrow.parquet
import pytest

from benchmarks.kills import predictions as lines
from cascadevlm.base.errors import BackendError, CascadeError, DataError, ImageError
from cascadevlm.config.config import Config
from cascadevlm.runs import bulk
from cascadevlm.runs import ray as cluster
from cascadevlm.runs.answers_file import ASKED
from cascadevlm.runs.certificate import Facts
from cascadevlm.runs.inputs import Inputs, Named
from cascadevlm.runs.ray import Arriving, on_ray
from cascadevlm.runs.ray.workers import ScoredBatch
from cascadevlm.runs.run_folder import LEARNED
from cascadevlm.runs.tally import Tally
from cascadevlm.runs.verify import verify
from cascadevlm.testing import noise
from tests.cli.test_cli import run as command
from tests.learning import NAMES, insects, made_calibration
from tests.server import JudgeServer

with warnings.catch_warnings():  # not ours
    warnings.simplefilter("ignore")
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")

pytestmark = pytest.mark.filterwarnings(r"ignore:::ray\..*")

SLOW = """
import os, time
from pathlib import Path
from cascadevlm import LocalJudge, Verdict
from cascadevlm.testing import FakeScorer
from tests.learning import Pixels

def note(name, count=1):
    with Path(__file__).with_name(name).open("a") as file:
        file.write(f"{os.getpid()}\\n" * count)

class Slow(FakeScorer):
    def score(self, images, labels):
        note("scored_by")
        time.sleep(0.05)
        return super().score(images, labels)

class Seeing(Pixels):
    def __init__(self, model):
        super().__init__()

class Weighing(LocalJudge):
    def __init__(self, model):
        super().__init__(batch_size=2)
    def judge_batch(self, questions):
        note("judged_by", len(questions))
        time.sleep(0.05)
        return [self.weighed(question) for question in questions]
    def weighed(self, question):
        answer = question.labels[sum(question.image.tobytes()) % len(question.labels)]
        return Verdict(outcome="answered", label=answer.name, judge=self.spec)
"""
ENTRY_POINTS = """
[cascadevlm.scorers]
slow = slow_scorer:Slow
pixels = slow_scorer:Seeing
[cascadevlm.judges]
weighing = slow_scorer:Weighing
"""
COUNT, SIZE = 200, 4
FEW = 40
"""Images of the run with a hosted judge."""

BILL = 0.0012
"""US dollars for 1,000 input tokens and 20 output tokens, at the price of the configuration."""

HOSTED = """
labels = ["finch", "owl", "wren", "stork"]
batch_size = {size}
scorer.use = "slow:any"
cache.enabled = false

[[stage]]
judge = "openai:any"
policy = "calls <= 15"
candidates = 3

[stage.options]
base_url = "{url}"
structured = false
concurrency = 6
price = {{ input = 1, output = 10 }}
"""
LOCAL = f"""
labels = ["finch", "owl", "wren", "stork"]
batch_size = {SIZE}
scorer.use = "slow:any"
cache.enabled = false

[[stage]]
judge = "weighing:any"
policy = "always"
candidates = 3
"""
LEARNING = f"""
labels = {NAMES}
batch_size = 16
learn = true
calibration = "{{calibration}}"
scorer.use = "pixels:any"
cache.folder = "{{cache}}"

[[stage]]
judge = "weighing:any"
policy = "gain > 0.1"
candidates = 3
"""
CERTIFIED = LOCAL.replace('policy = "always"\n', "") + "\n[agreement]\nagree = 0.4\n"


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A package on the path of this process and of all workers. Its scorer is slow."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "slow_scorer.py").write_text(SLOW)
    (folder / "slow-1.dist-info").mkdir()
    (folder / "slow-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: slow\nVersion: 1\n")
    (folder / "slow-1.dist-info" / "entry_points.txt").write_text(ENTRY_POINTS)
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
        noise(number, (16, 16)).save(folder / f"{number:03}.png")
    (folder / "007.png").write_text("no image")
    return Inputs(folder)


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer(latency=0.05) as server:
        yield server


def run(
    engine: str,
    folder: Path,
    images: Iterable[Named],
    config: str,
    *,
    batch: bool = False,
    stopping: Callable[[], bool] = lambda: False,
) -> Tally:
    parsed = Config.parse(tomllib.loads(config))
    cascade, frozen = parsed.build(), parsed.frozen(parsed.build()).model_dump(mode="json")
    with (
        on_ray(cascade, parsed, images, workers=1 if batch else 2, batch=batch)
        if engine == "ray"
        else nullcontext(cascade) as running
    ):
        promised = parsed.agreement or parsed.find
        return bulk.run(running, images, folder, config=frozen, promised=promised, batch=batch, stopping=stopping)


def workers(plugin: Path, name: str) -> list[int]:
    """The processes of this cluster that run a class."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if name in (process / "cmdline").read_text() and str(plugin) in (process / "environ").read_text():
                found.append(int(process.name))
        except (OSError, ValueError):  # no process, or gone
            continue
    return found


def test_a_cluster_says_what_one_process_says(plugin: Path, images: Inputs, server: JudgeServer, tmp_path: Path) -> None:
    """A run that starts in one process and continues on the cluster, compared with a run in one process."""
    few, config = list(islice(images, FEW)), HOSTED.format(url=server.openai_url, size=SIZE)
    alone = run("local", tmp_path / "alone", few, config)
    asked, batches = len(server.requests), count()
    begun = run("local", tmp_path / "both", few, config, stopping=lambda: next(batches) == 2)
    (plugin / "scored_by").unlink()
    both = run("ray", tmp_path / "both", few, config)
    assert lines(tmp_path / "both") == lines(tmp_path / "alone")
    assert both == alone
    assert 0 < begun.asked < 15
    assert both.counts == {"answered": 15, "kept": FEW - 16, "unreadable": 1}
    assert (asked, len(server.requests)) == (15, 30)
    assert both.spent_dollars == pytest.approx(15 * BILL)
    scored_by = (plugin / "scored_by").read_text().split()
    assert len(scored_by) == (FEW - begun.images) // SIZE
    assert len(set(scored_by)) == 2
    assert str(os.getpid()) not in scored_by
    table, other = (pyarrow.parquet.read_table(tmp_path / name / "predictions.parquet") for name in ("alone", "both"))
    assert table.equals(other)


def test_a_cluster_learns_what_one_process_learns(plugin: Path, tmp_path: Path) -> None:
    """Begun in one process, gone on with by the cluster while the images are scored, and finished in one process."""
    made_calibration().write(tmp_path / "calibration.json")
    (tmp_path / "images").mkdir()
    for number, image in enumerate(insects(250) + insects(150)):  # the last 150 images come for the second time
        image.save(tmp_path / "images" / f"{number:03}.png")
    images, first, batches = Inputs(tmp_path / "images"), count(), count()
    alone, both = (
        LEARNING.format(calibration=tmp_path / "calibration.json", cache=tmp_path / f"cache {name}") for name in ("alone", "both")
    )
    run("local", tmp_path / "alone", images, alone)
    run("local", tmp_path / "both", images, both, stopping=lambda: next(first) == 10)
    assert 256 < run("ray", tmp_path / "both", images, both, stopping=lambda: next(batches) == 15 + 20).images < 400
    run("local", tmp_path / "both", images, both)
    assert lines(tmp_path / "both") == lines(tmp_path / "alone")
    assert (tmp_path / "both" / LEARNED).read_bytes() == (tmp_path / "alone" / LEARNED).read_bytes()
    assert 20 < sum(line["verdict"] is not None for line in lines(tmp_path / "both")) < 380

    shutil.rmtree(tmp_path / "images")  # what was learned comes from the folder of the run
    again = json.loads(command("adapt", tmp_path / "both", "--again", "-o", tmp_path / "again", "--json").stdout)
    assert (again["images"], again["measured"]) == (400, len(made_calibration().support.truths))  # type: ignore[union-attr]
    assert [line["path"] for line in lines(tmp_path / "again")] == [line["path"] for line in lines(tmp_path / "both")]
    adapted = json.loads(command("adapt", tmp_path / "both", "-o", tmp_path / "of run.adapter", "--json").stdout)
    assert adapted["images"] > 400


def test_workers_that_die_and_ctrl_c_cost_no_answer_and_no_certificate(plugin: Path, images: Inputs, tmp_path: Path) -> None:
    """A scoring worker is killed after twenty images, and one of two judging workers at the twentieth question. The run is
    interrupted at the fiftieth question, and continues in one process.
    """
    alone = run("local", tmp_path / "alone", images, CERTIFIED)
    (tmp_path / "config.toml").write_text(CERTIFIED)
    scored_by, judged_by, ended, killed = plugin / "scored_by", plugin / "judged_by", threading.Event(), list[int]()
    for noted in (scored_by, judged_by):
        noted.write_text("")

    def disturb() -> None:
        for noted, calls, name in ((scored_by, 5, "ScoringWorker"), (judged_by, 20, "JudgingWorker"), (judged_by, 50, "")):
            while noted.read_text().count("\n") < calls:
                if ended.wait(0.01):
                    return
            if name:
                killed.append(workers(plugin, name)[0])
                os.kill(killed[-1], signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGINT)

    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    folder, config = tmp_path / "run", tmp_path / "config.toml"
    done = command("run", images.path, "-o", folder, "--config", config, "--engine", "ray", "--workers", "2", check=False)
    ended.set()
    disturbing.join()
    assert done.returncode == 130
    assert "The same command continues it" in done.stderr
    assert isinstance(alone.certificate, Facts)
    begun = len((folder / ASKED).read_text().splitlines())
    assert 20 < begun < alone.certificate.questions
    judges = Counter(judged_by.read_text().split())
    assert len(judges) >= 2
    assert killed[1] in map(int, judges)
    assert run("local", folder, images, CERTIFIED).certificate == alone.certificate
    assert lines(folder) == lines(tmp_path / "alone")
    assert verify(folder) == []
    assert len(judged_by.read_text().split()) - judges.total() <= alone.certificate.questions - begun


def arriving(*batches: ScoredBatch | CascadeError) -> Arriving:
    return Arriving(batch for batch in batches)


async def test_other_images_in_the_workers_are_an_error() -> None:
    batch = ScoredBatch(paths=["b.png"], errors=[ImageError("gone")], digests=[], sizes=[], scores=None)
    for arrived in (arriving(batch), arriving()):
        with pytest.raises(DataError, match="find other images than this machine does"):
            await arrived([Path("a.png")])
    with pytest.raises(BackendError, match="no such model"):
        await arriving(BackendError("no such model"))([Path("a.png")])
    assert await arriving(batch)([Path("b.png")]) == [("b.png", batch.errors[0])]


def test_without_ray_there_is_a_command(images: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    config = Config.parse({"scorer": {"use": "open_clip:aviary"}, "labels": ["finch", "owl"]})
    with pytest.raises(BackendError, match=r"pip install 'cascadevlm\[ray\]'"), on_ray(config.build(), config, images):
        pass


def test_a_ray_that_does_not_begin_is_one_sentence(images: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nMore.")  # as Ray does

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "init", late)
    config = Config.parse({"scorer": {"use": "open_clip:aviary"}, "labels": ["finch", "owl"]})
    with (
        pytest.raises(BackendError, match=r"Ray does not start: The current node timed out during startup\. On a busy machine"),
        on_ray(config.build(), config, images),
    ):
        pass


async def test_arriving_batches_are_waited_for_no_more_once_closed() -> None:
    closed = arriving()
    closed.close()
    with pytest.raises(RuntimeError, match="after shutdown"):
        await closed([Path("a.png")])


async def test_the_iterator_of_ray_ends_before_ray() -> None:
    ended: list[str] = []

    def batches() -> Generator[ScoredBatch, None, None]:
        try:
            yield ScoredBatch(paths=["a.png"], errors=[ImageError("torn")], digests=[], sizes=[], scores=None)
        finally:
            ended.append("the executor of Ray")

    given = batches()
    with closing(Arriving(given)) as arrived:
        await arrived([Path("a.png")])
    assert ended


async def test_a_silent_cluster_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "SILENT_SECONDS", 0.05)
    given = threading.Event()

    def batches() -> Generator[ScoredBatch, None, None]:
        given.wait(10)
        yield ScoredBatch(paths=["a.png"], errors=[ImageError("torn")], digests=[], sizes=[], scores=None)

    threading.Timer(0.3, given.set).start()
    with pytest.warns(RuntimeWarning, match="'ray status' shows whether its workers are there"):
        (read,) = await Arriving(batches())([Path("a.png")])
    assert read[0] == "a.png"


def test_a_cluster_scores_and_this_process_asks_in_batches(
    plugin: Path, images: Inputs, server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cascadevlm.runs.batches.batch.POLL_SECONDS", 0.01)
    few, config = list(islice(images, FEW)), HOSTED.format(url=server.openai_url, size=SIZE)
    run("ray", tmp_path / "batch", few, config, batch=True)
    assert server.requests == []
    assert [len(each.rows) for each in server.batches] == [15]
    run("local", tmp_path / "direct", few, config)
    assert lines(tmp_path / "batch") == lines(tmp_path / "direct")

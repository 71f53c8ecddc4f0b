"""``cascadevlm run --engine ray``: images are read, scored and judged by the machines of a Ray cluster.

Ray Data lists the images, a batch a row, and hands the batches to scoring workers; their log-probabilities come back in the
order of the input. They are those of one process to the last bit where ``OMP_NUM_THREADS`` is the same, and else to a few units
in the last place of a float32: with other threads, numerical libraries add up in another order. Judges answer in workers too.
All that has an order or costs money stays in the process that runs the command: decisions, ledger, rate limits, retries, the
answers that are kept and the folder of the run are those of the local engine. What a question may cost is reserved here before
it is sent to a worker, so the cap holds whatever becomes of the worker.
"""

import asyncio
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from cascadevlm.base.errors import BackendError, CascadeError, DataError, ImageError, RunError
from cascadevlm.base.images import ImageSource, path_of
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Scores
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.cascade.engine import Read
from cascadevlm.cascade.stage import Stage
from cascadevlm.config.config import Config, StageConfig
from cascadevlm.judges.base import LocalJudge
from cascadevlm.runs.inputs import Named
from cascadevlm.runs.ray.judging import SILENT_SECONDS, RemoteJudge, Worker
from cascadevlm.runs.ray.workers import SAME_FILES, JudgingWorker, ScoredBatch, ScoringWorker, Workplace, list_images, unpacked
from cascadevlm.scorers.base import Prepared, WrapperScorer

if TYPE_CHECKING:
    from ray.actor import ActorHandle

CPU_SHARE = 0.5
"""Of a core, and of all cores, what scoring workers ask for at most: where they hold every core there is none left to list the
images, and Ray waits for ever."""

LISTING_CPUS = 0.01

CALLS_AT_ONCE = 2
"""Batches that a scoring worker has in work: one is read while another one is scored."""

CALLS_AHEAD = 4
"""Batches that a scoring worker has been given."""


@contextmanager
def on_ray(cascade: Cascade, config: Config, inputs: Iterable[Named], *, workers: int | None = None) -> Iterator[Cascade]:
    """The cascade, to be run over these inputs by a cluster: the one that ``$RAY_ADDRESS`` names or this machine is part of, else
    one of this machine alone, which ends with the context.

    Args:
        cascade: as the configuration built it.
        config: builds the scorer and the judges in the workers.
        inputs: what the cascade will be run over, from some image to the end.
        workers: that score, and as many for every judge with a model; one a GPU or, without any, one a machine, unless given.

    Raises:
        BackendError: if Ray is not installed or does not begin.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # under "uv run", Ray would send the working directory around
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as exc:
        raise BackendError("--engine ray needs Ray.", hint="Install it: pip install 'cascadevlm[ray]'") from exc
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    joined = ray.is_initialized()
    with ExitStack() as stack:
        if not joined:
            stack.callback(ray.shutdown)
            try:
                ray.init(log_to_driver=False, logging_level=logging.ERROR)
            except Exception as exc:  # it raises that very class, where its processes do not come up in time
                hint = "On a busy machine, try again; a cluster that is elsewhere is named by $RAY_ADDRESS."
                raise BackendError(f"Ray does not begin: {str(exc).strip().partition(chr(10))[0]}", hint=hint) from exc
        cluster = _Cluster.of(cascade, config, inputs, workers)
        judges = [cluster.judge(stage, of_config) for stage, of_config in zip(cascade.stages, config.stage, strict=True)]
        yield cascade.altered(
            scorer=_ScoredElsewhere(cascade.scorer),
            stages=[replace(stage, judge=judge) for stage, judge in zip(cascade.stages, judges, strict=True)],
            reading=lambda first: stack.enter_context(closing(Arriving(cluster.scored(first)))),
        )


@dataclass(frozen=True, kw_only=True)
class _Cluster:
    """What the workers are, and what they are given.

    Attributes:
        workers: that score, and of every judge whose model runs in them; other judges have one on every machine.
        gpus: what each worker with a model asks for: a GPU for all those of a cascade.
        cpus: what each scoring worker asks for.
    """

    config: Config
    labels: LabelSet
    inputs: Iterable[Named]
    workers: int
    machines: int
    gpus: float
    cpus: float
    place: Workplace

    @classmethod
    def of(cls, cascade: Cascade, config: Config, inputs: Iterable[Named], workers: int | None) -> "_Cluster":
        import ray

        resources = ray.cluster_resources()
        cpus, gpus = resources.get("CPU", 1.0), resources.get("GPU", 0.0)
        machines = sum(node["Alive"] for node in ray.nodes())
        workers = workers or int(gpus) or machines
        models = 1 + sum(isinstance(stage.judge, LocalJudge) for stage in cascade.stages)
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, int(cpus // workers)))
        return cls(
            config=config.frozen(cascade),
            labels=cascade.labels,
            inputs=inputs,
            workers=workers,
            machines=machines,
            gpus=min(1.0, gpus / workers) / models,
            cpus=CPU_SHARE * min(1.0, cpus / workers),
            place=Workplace(folder=str(Path.cwd()), threads=threads),
        )

    def scored(self, first: int) -> Iterator[ScoredBatch | CascadeError]:
        """The batches from an image on, in order."""
        import ray.data

        listing = partial(list_images, images=self.inputs, batch_size=self.config.batch_size, place=self.place)
        dataset = (
            ray.data.from_items([first])
            .map_batches(listing, batch_size=1, num_cpus=LISTING_CPUS)
            .map_batches(
                ScoringWorker,
                fn_constructor_args=(self.config.model_dump(mode="json"), self.labels, self.place),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(
                    size=self.workers,
                    max_tasks_in_flight_per_actor=CALLS_AHEAD,
                    max_concurrent_calls_per_actor=CALLS_AT_ONCE,
                    enable_true_multi_threading=True,
                ),
                num_cpus=self.cpus,
                num_gpus=self.gpus,
            )
        )
        dataset.context.target_max_block_size = 1  # a row a block: batches are handed on one by one
        dataset.context.execution_options.preserve_order = True
        dataset.context.enable_progress_bars = False
        return (unpacked(row["scored"], self.labels) for row in dataset.iter_rows())

    def judge(self, stage: Stage, config: StageConfig) -> RemoteJudge:
        """A stage's judge, in workers."""
        import ray

        with_model = isinstance(stage.judge, LocalJudge)
        actor = ray.remote(JudgingWorker).options(
            num_cpus=0,
            num_gpus=self.gpus if with_model else 0,
            max_restarts=-1,
            max_task_retries=0,  # Ray itself never asks again: it costs money
            scheduling_strategy="SPREAD",
        )
        return RemoteJudge(
            stage.judge,
            self.workers if with_model else self.machines,
            begin=lambda: cast(Worker, actor.remote(config.judge, config.options, self.place)),
            end=lambda worker: ray.kill(cast("ActorHandle[JudgingWorker]", worker)),
        )


@dataclass(kw_only=True, eq=False)
class _Arrived(Prepared):
    """An image that a worker scored; read here, should a judge be asked about it.

    Attributes:
        chunk: `(n, C)` the scores of the images that were scored together.
        row: the row of this image.
    """

    chunk: Scores
    row: int


class _ScoredElsewhere(WrapperScorer):
    """Has the scores that came with the images, and loads nothing."""

    def load(self) -> None:
        pass

    def score_prepared(self, prepared: Sequence[Prepared], labels: LabelSet) -> Scores:
        arrived = [each for each in prepared if isinstance(each, _Arrived)]
        return arrived[0].chunk.rows(np.array([each.row for each in arrived]))


class Arriving:
    """Gives every batch of images as it comes back from the workers; to be called for one after another, in order.

    Warns:
        RuntimeWarning: if the workers give nothing for long: Ray waits for lost machines without a word.
    """

    def __init__(self, batches: Iterator[ScoredBatch | CascadeError]) -> None:
        self.batches = batches
        self.thread = ThreadPoolExecutor(1, "arriving")

    def close(self) -> None:
        """Wait for no batch any more."""
        self.thread.shutdown(wait=False, cancel_futures=True)

    async def __call__(self, sources: Sequence[ImageSource]) -> list[Read]:
        from ray.exceptions import RayError

        try:
            coming = asyncio.get_running_loop().run_in_executor(self.thread, next, self.batches, None)
            if not (await asyncio.wait({coming}, timeout=SILENT_SECONDS))[0]:
                told = (
                    f"The cluster has given nothing for {SILENT_SECONDS:.0f} s. 'ray status' tells whether its workers are there."
                )
                warnings.warn(told, RuntimeWarning, stacklevel=2)
            batch = await coming
        except RayError as exc:
            hint = "What was done is kept: the same command goes on."
            raise RunError(f"The cluster failed: {str(exc).strip().splitlines()[-1]}.", hint=hint) from exc
        if isinstance(batch, CascadeError):
            raise batch
        paths = [path_of(source) for source in sources]
        if batch is None or batch.paths != paths:
            raise DataError("The workers find other images than this machine does.", hint=SAME_FILES)
        return list(zip(paths, _arrived(batch, sources), strict=True))


def _arrived(batch: ScoredBatch, sources: Sequence[ImageSource]) -> list[Prepared | ImageError]:
    """The images of a batch, or why they have no scores."""
    images: list[_Arrived] = []
    if batch.scores is not None:
        scored = [source for source, error in zip(sources, batch.errors, strict=True) if error is None]
        images = [
            _Arrived(source=source, file_digest=digest, size=size, chunk=batch.scores, row=row)
            for row, (source, digest, size) in enumerate(zip(scored, batch.digests, batch.sizes, strict=True))
        ]
    left = iter(images)
    return [error or next(left) for error in batch.errors]

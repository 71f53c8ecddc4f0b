"""``cascadevlm run --engine ray``: images are read, scored and judged by the machines of a Ray cluster.

Ray Data lists the images, one batch per row, and gives the batches to scoring workers. Their scores come back in input order.
With the same ``OMP_NUM_THREADS``, the scores are exactly equal to the scores of one process. With another number of threads,
numerical libraries add in another order. Scores then differ by a few units in the last place of a float32.

Judges answer in workers, too. Everything that has an order or costs money stays in the process that runs the command:
decisions, ledger, rate limits, retries, stored answers and the folder of the run. The worst case of a question is reserved in
this process before the question is sent to a worker. So the spending limit holds even if the worker fails.
"""

import asyncio
import logging
import os
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from cascadevlm.base.errors import BackendError, CascadeError, DataError, ImageError, RunError
from cascadevlm.base.images import ImageSource, path_of
from cascadevlm.base.labels import LabelSet
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.cascade.engine import Read
from cascadevlm.cascade.stage import Stage
from cascadevlm.config.config import Config, StageConfig
from cascadevlm.judges.base import LocalJudge
from cascadevlm.judges.hosted.sdk import SdkJudge
from cascadevlm.runs.inputs import Named
from cascadevlm.runs.ray.judging import SILENT_SECONDS, RemoteJudge, Worker
from cascadevlm.runs.ray.workers import SAME_FILES, JudgingWorker, ScoredBatch, ScoringWorker, Workplace, list_images, unpacked
from cascadevlm.runs.scored_first import Arrived, ScoredElsewhere
from cascadevlm.scorers.base import Prepared

if TYPE_CHECKING:
    from ray.actor import ActorHandle

CPU_SHARE = 0.5
"""Maximum share of one core that a scoring worker requests. It is also the maximum share of all cores that all scoring workers
request. If the workers used all cores, no core would be left to list the images, and Ray would wait forever.
"""

LISTING_CPUS = 0.01

CALLS_AT_ONCE = 2
"""Number of batches that a scoring worker works on: one is read while another is scored."""

CALLS_AHEAD = 4
"""Number of batches that a scoring worker has received and not finished."""


@contextmanager
def on_ray(
    cascade: Cascade, config: Config, inputs: Iterable[Named], *, workers: int | None = None, batch: bool = False
) -> Iterator[Cascade]:
    """A copy of the cascade. A cluster runs it over these inputs.

    ``$RAY_ADDRESS`` names the cluster. If it is not set, the cluster of this machine is used. If there is no cluster, a cluster
    of this machine alone is started. It ends with the context.

    Args:
        cascade: the cascade that was built from the configuration.
        config: the configuration. The workers build the scorer and the judges from it.
        inputs: the images of the run.
        workers: number of scoring workers, and number of workers of each judge with a model. Default: one per GPU; without GPUs,
            one per machine.
        batch: true if hosted judges are asked through batch APIs. Their questions are then put by this process.

    Raises:
        BackendError: if Ray is not installed or does not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0"
    )  # under "uv run", Ray would send the working directory to all workers
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
            except Exception as exc:  # Ray raises Exception itself if its processes do not start in time
                hint = "On a busy machine, try again. For a cluster on other machines, set $RAY_ADDRESS."
                raise BackendError(f"Ray does not start: {str(exc).strip().partition(chr(10))[0]}", hint=hint) from exc
        cluster = _Cluster.of(cascade, config, inputs, workers)
        judges = [
            stage.judge if batch and isinstance(stage.judge, SdkJudge) else cluster.judge(stage, of_config)
            for stage, of_config in zip(cascade.stages, config.stage, strict=True)
        ]
        yield cascade.altered(
            scorer=ScoredElsewhere(cascade.scorer),
            stages=[replace(stage, judge=judge) for stage, judge in zip(cascade.stages, judges, strict=True)],
            reading=lambda first: stack.enter_context(closing(Arriving(cluster.scored(first)))),
        )


@dataclass(frozen=True, kw_only=True)
class _Cluster:
    """The workers of a cluster, and their settings.

    Attributes:
        workers: number of scoring workers, and number of workers of each judge with a model. Other judges have one worker per
            machine.
        gpus: number of GPUs that each worker with a model requests; all models of a cascade share one GPU.
        cpus: number of cores that each scoring worker requests.
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

    def scored(self, first: int) -> Generator[ScoredBatch | CascadeError, None, None]:
        """The scored batches from image ``first``, in order."""
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
        dataset.context.target_max_block_size = 1  # one row per block, so that batches are passed on one by one
        dataset.context.execution_options.preserve_order = True
        dataset.context.enable_progress_bars = False
        return (unpacked(row["scored"], self.labels) for row in dataset.iter_rows())

    def judge(self, stage: Stage, config: StageConfig) -> RemoteJudge:
        """The judge of a stage. It answers in workers."""
        import ray

        with_model = isinstance(stage.judge, LocalJudge)
        actor = ray.remote(JudgingWorker).options(
            num_cpus=0,
            num_gpus=self.gpus if with_model else 0,
            max_restarts=-1,
            max_task_retries=0,  # Ray itself must not repeat a question, because that costs money
            scheduling_strategy="SPREAD",
        )
        return RemoteJudge(
            stage.judge,
            self.workers if with_model else self.machines,
            begin=lambda: cast(Worker, actor.remote(config.judge, config.options, self.place)),
            end=lambda worker: ray.kill(cast("ActorHandle[JudgingWorker]", worker)),
        )


class Arriving:
    """Returns the batches of images that come back from the workers. It is called once per batch, in order.

    Warns:
        RuntimeWarning: if the workers return nothing for a long time: Ray waits for lost machines without a message.
    """

    def __init__(self, batches: Generator[ScoredBatch | CascadeError, None, None]) -> None:
        self.batches = batches
        self.thread = ThreadPoolExecutor(1, "arriving")

    def close(self) -> None:
        """Stop waiting for batches, and end Ray's iterator: it fails if it ends after Ray."""
        self.thread.shutdown(wait=False, cancel_futures=True)
        with suppress(ValueError):  # the thread still waits for a batch
            self.batches.close()

    async def __call__(self, sources: Sequence[ImageSource]) -> list[Read]:
        from ray.exceptions import RayError

        try:
            coming = asyncio.get_running_loop().run_in_executor(self.thread, next, self.batches, None)
            if not (await asyncio.wait({coming}, timeout=SILENT_SECONDS))[0]:
                silent = f"The cluster has returned nothing for {SILENT_SECONDS:.0f} s."
                told = f"{silent} 'ray status' shows whether its workers are there."
                warnings.warn(told, RuntimeWarning, stacklevel=2)
            batch = await coming
        except RayError as exc:
            hint = "The results so far are kept. Repeat the same command to continue."
            raise RunError(f"The cluster failed: {str(exc).strip().splitlines()[-1]}.", hint=hint) from exc
        if isinstance(batch, CascadeError):
            raise batch
        paths = [path_of(source) for source in sources]
        if batch is None or batch.paths != paths:
            raise DataError("The workers find other images than this machine does.", hint=SAME_FILES)
        return list(zip(paths, _arrived(batch, sources), strict=True))


def _arrived(batch: ScoredBatch, sources: Sequence[ImageSource]) -> list[Prepared | ImageError]:
    """The images of a batch. An error stands in place of an image that has no scores."""
    images: list[Arrived] = []
    if batch.scores is not None:
        scored = [source for source, error in zip(sources, batch.errors, strict=True) if error is None]
        images = [
            Arrived(source=source, digest=digest, size=size, chunk=batch.scores, row=row)
            for row, (source, digest, size) in enumerate(zip(scored, batch.digests, batch.sizes, strict=True))
        ]
    left = iter(images)
    return [error or next(left) for error in batch.errors]

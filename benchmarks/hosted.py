"""Measures the CPU time that cascadevlm adds to the calls of a hosted judge: ``python -m benchmarks.hosted``.

A simple loop over the SDK and a cascade judge the same images, with the same number of concurrent requests. The server is a
separate process on this machine, which needs 50 ms per answer. Both programs read the file, encode the image and send the same
request. The CPU time of the process per image is measured in several rounds, in turns. The result is the ratio of the medians.
Then questions are answered from the cache on disk, on one core.
"""

import asyncio
import base64
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import openai
import typer
from PIL import Image

from cascadevlm import Cascade, LabelSet, Scorer, Scores, Stage, load_judge, load_prompt
from cascadevlm.base.encoding import JPEG_QUALITY
from cascadevlm.base.images import load_image
from cascadevlm.judges.cache import Cached, DiskStore
from cascadevlm.testing import FakeJudge, noise, question
from tests.server import JudgeServer

NAMES = [f"species {number}" for number in range(5)]
SIDE = 330  # an image of noise with this side is a JPEG file of about 100 KB
SERVER = """
import time
from tests.server import JudgeServer
with JudgeServer(latency=0.05, check_images=False, keep_requests=False) as server:
    print(server.openai_url, flush=True)
    time.sleep(3600)
"""


class Uniform(Scorer):
    """A scorer that takes no time, so that only judging is measured."""

    def score(self, images: Sequence[Image.Image], labels: LabelSet) -> Scores:
        return Scores.from_logits(np.zeros((len(images), len(labels))), labels, fingerprint="uniform")


async def bare(url: str, paths: list[Path], in_flight: int, body: dict[str, object]) -> None:
    """The simple loop that a user would write. It sends the same request with each image."""
    places = asyncio.Semaphore(in_flight)

    def encoded(path: Path) -> str:
        buffer = io.BytesIO()
        with Image.open(path) as image:
            image.convert("RGB").save(buffer, "JPEG", quality=JPEG_QUALITY)
        return base64.b64encode(buffer.getvalue()).decode()

    async with openai.AsyncOpenAI(
        api_key="none", base_url=url, max_retries=0, http_client=openai.DefaultAioHttpClient()
    ) as client:

        async def ask(path: Path) -> None:
            async with places:
                data = await asyncio.to_thread(encoded, path)
                messages = json.loads(json.dumps(body["messages"]))
                for part in messages[0]["content"]:
                    if part["type"] == "image_url":
                        part["image_url"]["url"] = f"data:image/jpeg;base64,{data}"
                completion = await client.chat.completions.create(**{**body, "messages": messages})
                assert completion.choices[0].message.content

        await asyncio.gather(*(ask(path) for path in paths))


async def cascaded(url: str, paths: list[Path], in_flight: int) -> None:
    judge = load_judge("openai:bench", base_url=url, structured=False, concurrency=in_flight)
    cascade = Cascade(Uniform(), [Stage(judge=judge, prompt=load_prompt("select"))], labels=NAMES)
    async for prediction in cascade.astream(paths):
        assert prediction.decided_by == "judge", prediction


async def request_body(path: Path) -> dict[str, object]:
    """The request that a cascade sends for one image. The simple loop sends the same request."""
    async with JudgeServer() as server:
        await cascaded(server.openai_url, [path], 1)
        return dict(server.requests[0].body)


def cpu_per_image(paths: list[Path], run: Coroutine[None, None, None]) -> float:
    began = time.process_time()
    asyncio.run(run)
    return (time.process_time() - began) / len(paths)


async def replay(folder: Path, count: int) -> float:
    """The number of questions per second that are answered from the cache. Their images are already encoded and hashed."""
    judge = Cached(FakeJudge(), DiskStore(folder))
    questions = [question(NAMES, image=noise(number)) for number in range(count)]
    for asked in questions:
        await judge.judge(asked)
    began = time.perf_counter()
    for asked in questions:
        assert (await judge.judge(asked)).usage.cached
    return count / (time.perf_counter() - began)


def main(
    images: Annotated[int, typer.Option(help="Number of images per round.")] = 600,
    rounds: Annotated[int, typer.Option(help="Number of rounds of each program.")] = 5,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.jpg" for number in range(images)]
        for number, path in enumerate(paths):
            noise(number, (SIDE, SIDE)).save(path, quality=JPEG_QUALITY)
        load_image(paths[0])
        body = asyncio.run(request_body(paths[0]))
        server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
        assert server.stdout
        url = server.stdout.readline().strip()
        figures: dict[str, object] = {"bytes_per_image": paths[0].stat().st_size}
        try:
            for in_flight in (32, 256):
                bare_cpu, ours_cpu = [], []
                for _ in range(rounds):
                    bare_cpu.append(cpu_per_image(paths, bare(url, paths, in_flight, body)))
                    ours_cpu.append(cpu_per_image(paths, cascaded(url, paths, in_flight)))
                figures[f"in_flight_{in_flight}"] = {
                    "bare_ms": round(statistics.median(bare_cpu) * 1000, 2),
                    "cascade_ms": round(statistics.median(ours_cpu) * 1000, 2),
                    "ratio": round(statistics.median(ours_cpu) / statistics.median(bare_cpu), 3),
                }
        finally:
            server.terminate()
        figures["replayed_per_second"] = round(asyncio.run(replay(Path(folder) / "cache", 5000)))
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    typer.run(main)

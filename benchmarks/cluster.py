"""Measures the images per second of one and of two scoring workers: ``python -m benchmarks.cluster``.

It runs ``cascadevlm run --engine ray`` without a judge, on a Ray cluster of this machine. The model is ViT-B/32 of open_clip with
random weights, there are 200 labels, and the images are JPEG files of 500 x 400 pixels. Each worker has one thread for the model.
The time for starting Ray and loading models is not counted. Runs with one and with two workers take turns, and their medians are
compared.
"""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.throughput import make_model
from cascadevlm.config.config import Config
from cascadevlm.runs import bulk
from cascadevlm.runs.inputs import Inputs
from cascadevlm.runs.ray import on_ray
from cascadevlm.testing import noise


def images_per_second(config: Config, images: Inputs, workers: int) -> float:
    """Images per second of a run, without the first batch of each worker, which includes the time for the start."""
    cascade, told = config.build(bulk=True), []
    with tempfile.TemporaryDirectory() as output, on_ray(cascade, config, images, workers=workers) as running:
        bulk.run(running, images, Path(output), config={}, progress=lambda _: told.append(time.perf_counter()))
    rest = told[workers * config.batch_size - 1 :]
    return (len(rest) - 1) / (rest[-1] - rest[0])


def main(images: Annotated[int, typer.Option()] = 512, rounds: Annotated[int, typer.Option()] = 3) -> None:
    """Print the figures as one line of JSON."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        files, model = Path(folder, "images"), make_model("ViT-B-32", Path(folder, "model"))
        files.mkdir()
        for number in range(images):
            noise(number, (125, 100)).resize((500, 400)).save(files / f"{number:05}.jpg", quality=90)
        config = Config.parse(
            {
                "scorer": {"use": f"open_clip:{model}"},
                "labels": [f"species {number}" for number in range(200)],
                "batch_size": 16,
                "cache": {"embeddings": False},
            }
        )
        speeds: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(rounds):
            for workers, speed in speeds.items():
                speed.append(images_per_second(config, Inputs(files), workers))
    one, two = (statistics.median(speed) for speed in speeds.values())
    rounded = {f"images_per_second_{workers}": [round(each, 1) for each in speed] for workers, speed in speeds.items()}
    typer.echo(json.dumps({**rounded, "ratio": round(two / one, 2), "images": images, "cores": os.cpu_count()}))


if __name__ == "__main__":
    typer.run(main)

"""Measures how well a bulk run uses a GPU: ``python -m benchmarks.gpu``.

For each model (with random weights), two speeds in images per second are compared: a bulk run from JPEG files to predictions,
and the model alone on images that are already preprocessed and on the device. With enough cores for decoding and preprocessing,
both speeds should be almost equal. The text tower is not measured, because labels are embedded only once.
"""

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.throughput import NAMES, make_images, make_model, ours, seconds
from cascadevlm_backends._torch import choose_device, choose_dtype
from cascadevlm_backends.open_clip import OpenClipScorer

MODELS = ["ViT-B-32", "ViT-L-14", "ViT-SO400M-14-SigLIP-384"]


class WithoutText(OpenClipScorer):
    """A scorer whose label embeddings are random."""

    width = 0

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        rows = np.random.default_rng(0).normal(size=(len(texts), self.width)).astype(np.float32)
        unit: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return unit


def alone(name: str, device: str, batch: int, batches: int) -> float:
    """The speed of the image tower alone, in images per second."""
    import open_clip
    import torch

    dtype = choose_dtype(device, "auto")
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    model = open_clip.create_model(name, precision=precision, device=device).eval()
    size = model.visual.image_size
    pixels = torch.randn(batch, 3, *(size if isinstance(size, tuple | list) else (size, size)), device=device, dtype=dtype)
    with torch.inference_mode():
        model.encode_image(pixels, normalize=True).cpu()
        began = time.perf_counter()
        for _ in range(batches):
            features = model.encode_image(pixels, normalize=True)
        features.cpu()
    return batch * batches / (time.perf_counter() - began)


def main(
    models: Annotated[list[str] | None, typer.Option("--model", help="Model of open_clip; can be repeated.")] = None,
    images: Annotated[int, typer.Option(help="Number of JPEG files.")] = 8192,
    batch: Annotated[int, typer.Option(help="Number of images that are scored together.")] = 256,
    device: Annotated[str | None, typer.Option(help="Device of torch. Default: the best available device.")] = None,
) -> None:
    """Print the table."""
    import open_clip

    chosen = choose_device(device)
    print(f"{len(NAMES)} labels, {images} images, batches of {batch}, {os.cpu_count()} cores, {chosen}")
    print(f"{'model':<28}{'model alone':>14}{'end to end':>14}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "images"
        made = make_images(folder, min(images, 512))
        for number in range(len(made), images):  # the same images again, with other names
            os.link(made[number % len(made)], folder / f"{number:05}.jpg")
        for number, name in enumerate(models or MODELS):
            scorer = WithoutText(make_model(name, Path(scratch) / f"model {number}"), device=chosen)
            scorer.width = open_clip.get_model_config(name)["embed_dim"]
            scorer.load()
            run = ours(scorer, folder, batch=batch)
            run()
            end_to_end, forward = images / seconds(run), alone(name, chosen, batch, max(1, images // batch))
            print(f"{name:<28}{forward:>12.1f}/s{end_to_end:>12.1f}/s{end_to_end / forward:>8.2f}", flush=True)


if __name__ == "__main__":
    typer.run(main)

"""What is not on by default, and what many labels take: ``python -m benchmarks.options``.

Contestants take turns over the same images, and each figure is the median of the ratios of its rounds.
"""

import io
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image

from benchmarks.throughput import BATCH, make_images, make_model, ours, seconds, show
from cascadevlm import Cascade, LabelSet, load_scorer
from cascadevlm.runs import bulk
from cascadevlm.testing import noise


def faster(usual: Callable[[], object], other: Callable[[], object], rounds: int) -> float:
    """How many times as fast the other is; both once before, so that what is made at first use is there."""
    usual()
    other()
    return statistics.median(seconds(usual) / seconds(other) for _ in range(rounds))


def towers(name: str) -> dict[str, Callable[[], None]]:
    """The image tower over one batch, by what is done to it."""
    import open_clip

    def tower(*, channels_last: bool = False, compiled: bool = False, parts: int = 1) -> Callable[[], None]:
        visual = open_clip.create_model(name).eval().visual
        layout = torch.channels_last if channels_last else torch.contiguous_format
        pixels = torch.zeros(BATCH, 3, 224, 224).to(memory_format=layout)
        visual = visual.to(memory_format=layout)
        embed = torch.compile(visual) if compiled else visual

        @torch.inference_mode()
        def run() -> None:
            for part in pixels.chunk(parts):
                embed(part)

        return run

    return {
        "as it is": tower(),
        "channels-last": tower(channels_last=True),
        "torch.compile": tower(compiled=True),
        "two halves of a batch, one after another": tower(parts=2),
    }


def decoders(files: Sequence[Path]) -> tuple[Callable[[], object], Callable[[], object]]:
    """Pillow and simplejpeg, which has to be installed, over the same files; their pixels have to be the same."""
    import simplejpeg  # type: ignore[import-not-found,import-untyped,unused-ignore]

    contents = [file.read_bytes() for file in files]

    def pillow(content: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))

    for content in contents:
        np.testing.assert_array_equal(pillow(content), simplejpeg.decode_jpeg(content))
    return lambda: list(map(pillow, contents)), lambda: list(map(simplejpeg.decode_jpeg, contents))


def peak_mb(images: int, labels: int) -> float:
    """Of a bulk run with the bundled scorer, in this process."""
    names = LabelSet.of(f"species {number}" for number in range(labels))
    inputs = [(str(number), noise(number, (64, 64))) for number in range(images)]
    with tempfile.TemporaryDirectory() as folder:
        bulk.run(Cascade(load_scorer("open_clip:aviary"), [], labels=names), inputs, Path(folder), config={})
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak_mb_alone(images: int, labels: int) -> float:
    """`peak_mb`, in a process of its own."""
    code = f"from benchmarks.options import peak_mb; print(peak_mb({images}, {labels}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def main(
    images: Annotated[int, typer.Option(help="JPEG files.")] = 160,
    rounds: Annotated[int, typer.Option(help="Of turns.")] = 3,
) -> None:
    """Print the table."""
    for number in (512, 2048):
        more = peak_mb_alone(number, 20_000) - peak_mb_alone(number, 48)
        show(f"peak memory over {number} images, 20,000 labels less 48", f"{more:.0f} MB")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files, name = make_images(folder / "images", images), make_model("ViT-B-32", folder / "model")
        exact, rounded = (
            ours(load_scorer(f"open_clip:{name}", dtype=dtype), folder / "images") for dtype in ("float32", "bfloat16")
        )
        show("images/s of a bulk run, bfloat16", f"{faster(exact, rounded, rounds):.2f} x")
        usual, *others = towers(name).items()
        for what, run in others:
            show(f"image tower, {what}", f"{faster(usual[1], run, 3 * rounds):.2f} x")
        show("decoding, simplejpeg against Pillow", f"{faster(*decoders(files), rounds):.2f} x")


if __name__ == "__main__":
    typer.run(main)

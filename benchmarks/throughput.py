"""Compares the speed of bulk runs with other programs: ``python -m benchmarks.throughput``.

The model is open_clip's ViT-B/32 with random weights. The images are JPEG files of 500 x 400 pixels, and there are 200 labels.
The programs take turns, and each figure is the median of the ratios of the rounds. The hand-written loop and our run each have
their own process, because the threads of one would slow down the other. Both are measured after a short run over a few images.
CPU time per image and memory are measured with a scorer that takes no time, on generated images, with one process per run.
"""

import asyncio
import hashlib
import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image, ImageFilter

from benchmarks.sweep import made_up
from cascadevlm import Cascade, Judge, LabelSet, Scorer, Scores, Stage, load_judge, load_prompt, load_scorer, parse_policy
from cascadevlm.base.types import Question
from cascadevlm.evaluation.data import Data
from cascadevlm.evaluation.sweep import under
from cascadevlm.runs import bulk
from cascadevlm.runs.inputs import Inputs, Named
from cascadevlm.scorers.base import EmbeddingScorer
from cascadevlm.scorers.kept import CachedEmbeddings
from cascadevlm.testing import FakeJudge

NAMES = [f"species {number}" for number in range(200)]
ROUND = count()
BATCH = 64
"""Number of images that are scored together, for the scorer that takes no time."""
IMAGES_AT_ONCE = 32
"""Number of images that the model scores together, in our run and in the hand-written loop. It is our default. Here it is 1.1 x
as fast as 64."""
PIPELINE_IMAGES = 48
"""Number of images for the pipeline of transformers. The pipeline embeds all labels for every image, so it is slow."""


def make_images(folder: Path, images: int) -> list[Path]:
    """Make image files whose decoding takes as long as that of photographs of the same size."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    ramp = np.linspace(60, 200, 500)[np.newaxis, :, np.newaxis]
    for number in range(images):
        noise = Image.fromarray(draw.integers(0, 256, (400, 500, 3), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(2))
        pixels = (np.asarray(noise, dtype=np.float64) - 128) * 3 + ramp
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:05}.jpg", quality=90)
    return sorted(folder.glob("*.jpg"))


def make_model(name: str, folder: Path) -> str:
    """Save a model of open_clip with random weights to a folder. Return the name under which open_clip loads the model."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    folder.mkdir()
    model, config = open_clip.create_model(name), open_clip.get_model_config(name)
    for key in ("hf_tokenizer_name", "tokenizer_kwargs"):  # open_clip would download the tokenizer
        config["text_cfg"].pop(key, None)
    preprocessing = open_clip.get_model_preprocess_cfg(model)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocessing}))
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def by_hand(name: str, workers: int) -> Callable[[Path], None]:
    """The loop over a folder that an experienced user of open_clip would write. Its model is already loaded."""
    import open_clip
    import torch

    class Files(torch.utils.data.Dataset[torch.Tensor]):
        def __init__(self, files: Sequence[Path]) -> None:
            self.files = files

        def __len__(self) -> int:
            return len(self.files)

        def __getitem__(self, row: int) -> torch.Tensor:
            pixels: torch.Tensor = preprocess(Image.open(self.files[row]).convert("RGB"))
            return pixels

    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenize = open_clip.get_tokenizer(name)
    model.eval()

    def loop(folder: Path) -> None:
        files = Files(sorted(folder.iterdir()))
        with torch.inference_mode():
            texts = model.encode_text(tokenize([f"a photo of a {label}." for label in NAMES]), normalize=True)
            for pixels in torch.utils.data.DataLoader(files, batch_size=IMAGES_AT_ONCE, num_workers=workers):
                logits = model.logit_scale.exp() * model.encode_image(pixels, normalize=True) @ texts.T
                logits.softmax(dim=-1).max(dim=-1).indices.tolist()

    return loop


def pipeline(files: Sequence[Path]) -> Callable[[], None]:
    """The zero-shot pipeline of transformers, with the same architecture and random weights."""
    import torch
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPTokenizer,
        CLIPVisionConfig,
        ZeroShotImageClassificationPipeline,
    )

    config = CLIPConfig(vision_config=CLIPVisionConfig(patch_size=32).to_dict())
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1} | {
        f"{letter}</w>": 2 + n for n, letter in enumerate("abcdefghijklmnopqrstuvwxyz0123456789.")
    }
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    model = CLIPModel(config).eval()
    classify = ZeroShotImageClassificationPipeline(model=model, tokenizer=tokenizer, image_processor=CLIPImageProcessor())

    def loop() -> None:
        with torch.inference_mode():
            classify([str(file) for file in files], candidate_labels=NAMES, hypothesis_template="a photo of a {}.", batch_size=1)

    return loop


def ours(scorer: Scorer, files: Path, *, batch: int = IMAGES_AT_ONCE) -> Callable[[], None]:
    """A bulk run from files to predictions. Each call has other labels, so that labels are embedded again."""

    def run() -> None:
        labels = LabelSet.of(f"{name}, round {next(ROUND)}" for name in NAMES)
        with tempfile.TemporaryDirectory() as folder:
            bulk.run(Cascade(scorer, [], labels=labels, batch_size=batch), Inputs(files), Path(folder), config={})

    return run


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class Made(Scorer):
    """A scorer with scores that were made in advance, so that it takes no time."""

    def __init__(self, classes: int) -> None:
        self.logits = np.random.default_rng(0).normal(0, 3, (4096, classes)).astype(np.float32)
        self.scored = 0

    def score(self, images: Sequence[Image.Image], labels: LabelSet) -> Scores:
        rows = np.arange(self.scored, self.scored + len(images)) % len(self.logits)
        self.scored += len(images)
        return Scores.from_logits(self.logits[rows], labels, fingerprint="made")


class OnTheFly:
    """A number of generated images, which take no time."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Named]:
        pixels = np.zeros((8, 8, 3), dtype=np.uint8)
        for number in range(self.count):
            yield f"{number:08}.jpg", pixels


class Noise(OnTheFly):
    """Generated images that are all different."""

    def __iter__(self) -> Iterator[Named]:
        for name, _ in super().__iter__():
            yield name, np.frombuffer(hashlib.sha256(name.encode()).digest() * 6, dtype=np.uint8).reshape(8, 8, 3)


def of_ten(scorer: Scorer, judge: Judge | None = None, policy: str = "never") -> Cascade:
    """A cascade with ten labels."""
    stage = Stage(judge=judge or FakeJudge(), prompt=load_prompt("select"), policy=parse_policy(policy))
    return Cascade(scorer, [stage], labels=[f"species {number}" for number in range(10)], batch_size=BATCH)


def measured(cascade: Cascade, inputs: Iterable[Named], folder: Path, warm: type[OnTheFly] = OnTheFly) -> dict[str, float]:
    """Measure a run after a short first run: CPU ms per image, images per second, escalated share, and peak memory in MB."""
    with tempfile.TemporaryDirectory() as scratch:
        bulk.run(cascade, warm(BATCH), Path(scratch), config={})
    cpu, began = time.process_time(), time.perf_counter()
    tally = bulk.run(cascade, inputs, folder, config={})
    return {
        "cpu_ms": 1000 * (time.process_time() - cpu) / tally.images,
        "images_per_second": tally.images / (time.perf_counter() - began),
        "asked": tally.asked / tally.images,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def orchestrate(images: int, policy: str) -> dict[str, float]:
    """The figures of a run over generated images. The judge answers at once, and its own CPU time is subtracted."""
    judge = FakeJudge()
    with tempfile.TemporaryDirectory() as folder:
        figures = measured(of_ten(Made(10), judge, policy), OnTheFly(images), Path(folder))
    return figures | {"cpu_ms": figures["cpu_ms"] - figures["asked"] * judge_ms(judge, judge.questions[-1000:])}


def judge_ms(judge: Judge, questions: Sequence[Question]) -> float:
    """The judge's CPU time per question, in milliseconds."""

    async def ask() -> float:
        began = time.process_time()
        for question in questions:
            await judge.judge(question)
        return 1000 * (time.process_time() - began) / len(questions)

    return asyncio.run(ask()) if questions else 0.0


def replay(images: int) -> dict[str, float]:
    """The figures of a run with recorded scores and verdicts, with all images escalated."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, record = Path(scratch), Path(scratch) / "record"
        names, pictures = zip(*Noise(images), strict=True)
        labelled = Data(images=pictures, names=names, truths=("species 0",) * images, splits=("",) * images)
        bulk.run(of_ten(Made(10), FakeJudge(), "always"), labelled, record, config={})
        scorer, judge = load_scorer(f"recorded:{record}"), load_judge(f"recorded:{record}")
        return measured(of_ten(scorer, judge, "always"), Noise(images), folder / "run", Noise)


def into(folder: str, images: int) -> dict[str, float]:
    """The figures of a run over generated images. A run that is already in the folder is continued."""
    return measured(of_ten(Made(10)), OnTheFly(images), Path(folder))


def of_files(images: str) -> dict[str, float]:
    """The figures of a run over a folder of files."""
    with tempfile.TemporaryDirectory() as folder:
        return measured(of_ten(Made(10)), Inputs(images), Path(folder))


def seconds_ours(model: str, images: str, few: str) -> dict[str, float]:
    """The seconds of our run over a folder, after a run over a few images."""
    scorer = load_scorer(f"open_clip:{model}")
    ours(scorer, Path(few))()
    return {"seconds": seconds(ours(scorer, Path(images)))}


def seconds_by_hand(model: str, images: str, few: str, workers: int) -> dict[str, float]:
    """The seconds of the hand-written loop over a folder, after a run over a few images."""
    loop = by_hand(model, workers)
    loop(Path(few))
    return {"seconds": seconds(lambda: loop(Path(images)))}


def small_files(folder: Path, images: int) -> Path:
    """Make this number of JPEG files of 64 x 64 pixels."""
    folder.mkdir()
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(content, "JPEG")
    for number in range(images):
        (folder / f"{number:08}.jpg").write_bytes(content.getvalue())
    return folder


def alone(call: str) -> dict[str, float]:
    """Run one of the functions above in its own process. ``call`` is the call as Python code."""
    code = f"import json; from benchmarks import throughput; print(json.dumps(throughput.{call}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def show(what: str, figure: str) -> None:
    print(f"{what:<72} {figure}", flush=True)


def compare_speed(images: int, rounds: int) -> None:
    """Compare our run with the hand-written loop and the pipeline, and a run with kept embeddings with a run without."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        few = folder / "few"
        make_images(folder / "images", images)
        some = make_images(few, min(PIPELINE_IMAGES, images))
        name = make_model("ViT-B-32", folder / "model")
        given = f"{name!r}, {str(folder / 'images')!r}, {str(few)!r}"
        times: dict[str, list[float]] = {}
        for _ in range(rounds):
            times.setdefault("ours", []).append(alone(f"seconds_ours({given})")["seconds"])
            for workers in (0, 2):
                taken = alone(f"seconds_by_hand({given}, {workers})")["seconds"]
                times.setdefault(f"by hand, {workers} workers", []).append(taken)
        best = min((key for key in times if key != "ours"), key=lambda key: statistics.median(times[key]))
        ratios = [theirs / own for theirs, own in zip(times[best], times["ours"], strict=True)]
        show(f"speed, files to predictions, compared with open_clip {best}", f"{statistics.median(ratios):.2f} x")

        scorer = load_scorer(f"open_clip:{name}")
        scorer.load()
        theirs, own = seconds(pipeline(some)), seconds(ours(scorer, few))
        show(f"speed compared with transformers' pipeline, 200 labels, {len(some)} images", f"{theirs / own:.1f} x")

        labels = LabelSet.of(NAMES)
        assert isinstance(scorer, EmbeddingScorer)
        scorer.label_embeddings(labels)
        cached = []
        for number in range(rounds):
            cascade = Cascade(CachedEmbeddings(scorer, folder / f"kept {number}"), [], labels=labels, batch_size=IMAGES_AT_ONCE)

            def run(part: str, cascade: Cascade = cascade, number: int = number) -> None:
                bulk.run(cascade, Inputs(folder / "images"), folder / f"{part} {number}", config={})

            cold, warm = seconds(partial(run, "cold")), seconds(partial(run, "warm"))
            cached.append(cold / warm)
        show("speed with kept embeddings, compared with new embeddings", f"{statistics.median(cached):.0f} x")


def compare_sizes(many: int) -> None:
    """Compare speed and memory for many images with a tenth of them: generated images, a continued run, and files."""
    few = many // 10
    with tempfile.TemporaryDirectory() as scratch:
        folder = f"{scratch}/run"
        short, long = alone(f"into('{scratch}/short', {few})"), alone(f"into({folder!r}, {many})")
        again = alone(f"into({folder!r}, {many + few})")
        files, more = small_files(Path(scratch, "few"), few // 10), small_files(Path(scratch, "many"), few)
        of_few, of_many = alone(f"of_files({str(files)!r})"), alone(f"of_files({str(more)!r})")
    show(f"speed, {many:,} images compared with {few:,}", f"{long['images_per_second'] / short['images_per_second']:.2f} x")
    show(f"peak memory, {many:,} images minus {few:,}", f"{long['peak_mb'] - short['peak_mb']:.0f} MB")
    show(f"the same, a run of {many:,} continued with {few:,}", f"{again['peak_mb'] - short['peak_mb']:.0f} MB")
    show(f"peak memory, {few:,} JPEG files minus {few // 10:,}", f"{of_many['peak_mb'] - of_few['peak_mb']:.0f} MB")


def main(
    images: Annotated[int, typer.Option(help="Number of JPEG files.")] = 512,
    rounds: Annotated[int, typer.Option(help="Number of rounds.")] = 3,
    many: Annotated[int, typer.Option(help="Number of images in the long run.")] = 200_000,
) -> None:
    """Print the table."""
    for policy in ("never", "entropy > 0.45", "always"):
        figures = alone(f"orchestrate(20_000, {policy!r})")
        show(f"CPU ms per image, {figures['asked']:.0%} escalated", f"{figures['cpu_ms']:.2f}")
    show("images/s, all escalated, recorded scores and verdicts", f"{alone('replay(5_000)')['images_per_second']:,.0f}")
    record, other = made_up(100_000, 10), parse_policy("entropy > 0.45")
    taken = seconds(lambda: under(record, other))
    show("images/s, another policy applied to a record (sweep)", f"{len(record) / taken:,.0f}")
    compare_sizes(many)
    compare_speed(images, rounds)


if __name__ == "__main__":
    typer.run(main)

"""What a run loses and pays twice when it is killed: ``python -m benchmarks.kills``; with ``--labelled``, a run that is a record.

A run with a judge that is paid for (the real openai SDK against a server on this machine that counts what it is asked) is
killed with SIGKILL at random moments, from the start of its process on, and taken up again, run after run, until there were as
many kills as asked for. Embeddings are kept in every run, the judge's answers in the folder of the run or, every other time, in a
cache beside it. After every kill it is noted which answers were stored and which questions were under way; after every run, its
predictions are held against those of a run that nobody disturbed.
"""

import hashlib
import json
import multiprocessing
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import diskcache
import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image

from cascadevlm import Cascade, Stage, load_judge, load_prompt, parse_policy
from cascadevlm.evaluation.data import Data
from cascadevlm.evaluation.record import read_record
from cascadevlm.judges.cache import DiskStore
from cascadevlm.runs import bulk
from cascadevlm.runs.inputs import Named
from cascadevlm.runs.run_folder import Tally
from cascadevlm.scorers.base import EmbeddingScorer
from cascadevlm.scorers.kept import CachedEmbeddings
from tests.server import JudgeServer
from tests.server.conversation import Conversation

NAMES = ("finch", "owl", "wren", "stork")
CONCURRENCY = 8
LATENCY = 0.05
MODEL = "gpt-4o"
WIDTH = 8
"""Of embeddings."""

SPANS = (0.02, 0.1, 1.0)
"""Shares of a run within which it is killed: most kills are to hit its beginning, where the folder is made."""


class Pictures:
    """Small pictures, all different, the same every time."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Named]:
        for number in range(self.count):
            yield f"{number:06}", np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)


class Towers(EmbeddingScorer):
    """Embeds an image as its first pixels, and a text at random but always as the same."""

    def embed_images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        pixels = np.stack([np.asarray(image, dtype=np.float32).ravel()[:WIDTH] for image in images])
        return _unit(pixels - 127.5)

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return _unit(np.stack([np.random.default_rng(list(text.encode())).normal(size=WIDTH) for text in texts]))

    def logits(self, similarities: NDArray[np.float32]) -> NDArray[np.float32]:
        return 4 * similarities

    def model_fingerprint(self) -> str:
        return "towers"


def _unit(rows: NDArray[np.floating]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return unit


def run(folder: Path, cache: Path, answers: Path | None, url: str, images: int, labelled: bool) -> Tally:
    """The run that is killed; its embeddings are kept in a cache and, if wanted, the answers too."""
    judge = load_judge(f"openai:{MODEL}", base_url=url, concurrency=CONCURRENCY)
    stage = Stage(judge=judge, prompt=load_prompt("select"), policy=parse_policy("entropy > 0.6 & calls <= 100000"))
    store = None if answers is None else DiskStore(answers)
    cascade = Cascade(CachedEmbeddings(Towers(), cache), [stage], labels=NAMES, batch_size=8, store=store)
    names, pictures = zip(*Pictures(images), strict=True)
    data = Data(images=pictures, names=names, truths=NAMES[:1] * images, splits=("",) * images)
    return bulk.run(cascade, data if labelled else Pictures(images), folder, config={"images": images})


@dataclass
class Server:
    """What was served, by the digest of the image."""

    served: Counter[str] = field(default_factory=Counter)

    def answer(self, asked: Conversation) -> str:
        digest = hashlib.sha256(asked.images[0]).hexdigest()
        self.served[digest] += 1
        return asked.say(asked.choices[int(digest, 16) % len(asked.choices)])


@dataclass
class Proof:
    """What came of the kills.

    Attributes:
        kills: that hit a run at work.
        early: of them, before the run had a manifest.
        runs: that were brought to their end.
        questions: different ones, over all runs.
        asked_again: questions whose answer had been stored before a kill and that were asked after it.
        paid_twice: answers served beyond one for each question.
        under_way: questions that had been served, their answers not yet stored, at the kills: the most that may be paid twice.
        different: predictions missing, there twice, out of order or unlike those of the undisturbed run, and records with other
            bytes of scores.
    """

    kills: int = 0
    early: int = 0
    runs: int = 0
    questions: int = 0
    asked_again: int = 0
    paid_twice: int = 0
    under_way: int = 0
    different: int = 0


def stored(answers: Path) -> set[str]:
    """The digests of the images whose answers are kept."""
    if not answers.exists():
        return set()
    with diskcache.Cache(str(answers), disk=diskcache.JSONDisk) as cache:
        return {cache[key]["payload"]["image"] for key in cache.iterkeys()}


def predictions(folder: Path) -> list[Mapping[str, object]]:
    """All that a prediction says, but for what asking took: an answer from the store took nothing."""
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    for line in lines:
        del line["cost"], line["crc32"]
        if line["verdict"]:
            del line["verdict"]["usage"]
    return lines


def prove(kills: int, *, images: int, seed: int = 0, labelled: bool = False) -> Proof:
    """Kill runs over so many images until there were so many kills."""
    os.environ |= {"OPENAI_API_KEY": "of no use", "PYTHONWARNINGS": "ignore::RuntimeWarning:runpy"}
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["benchmarks.kills", "cascadevlm_backends.openai", "pyarrow.parquet"])
    draw, proof, server = random.Random(seed), Proof(), Server()
    with (
        tempfile.TemporaryDirectory() as scratch,
        JudgeServer(answer=server.answer, latency=LATENCY, keep_requests=False) as judge,
    ):

        def began(name: str, answers: Path | None) -> multiprocessing.process.BaseProcess:
            folder, cache = Path(scratch) / name, Path(scratch) / f"{name}, embeddings"
            process = processes.Process(target=run, args=(folder, cache, answers, judge.openai_url, images, labelled))
            process.start()
            return process

        began("warming up", None).join()
        start = time.monotonic()
        began("undisturbed", None).join()
        seconds = time.monotonic() - start
        expected = predictions(Path(scratch) / "undisturbed")
        while proof.kills < kills:
            name = f"run {proof.runs}"
            folder = Path(scratch) / name
            beside = Path(scratch) / f"{name}, answers" if proof.runs % 2 else None
            answers = beside or folder / "verdicts"
            server.served.clear()
            while not (folder / ("predictions.parquet" if labelled else "summary.json")).exists():
                before, known = server.served.copy(), stored(answers)
                process = began(name, beside)
                process.join(draw.uniform(0, seconds * draw.choice(SPANS)) if proof.kills < kills else None)
                if process.exitcode is None:
                    process.kill()
                    process.join()
                    proof.kills += 1
                    proof.early += not (folder / "manifest.json").exists()
                    time.sleep(3 * LATENCY)  # what the server has received, it serves
                    proof.under_way += len((server.served - before).keys() - stored(answers))
                else:
                    assert process.exitcode == 0
                proof.asked_again += sum((server.served - before)[digest] for digest in known)
            found = predictions(folder)
            proof.runs += 1
            proof.questions += len(server.served)
            proof.paid_twice += server.served.total() - len(server.served)
            proof.different += abs(len(found) - len(expected)) + sum(a != b for a, b in zip(found, expected, strict=False))
            if labelled:
                files = [Path(scratch) / of_run / "scores.npy" for of_run in (name, "undisturbed")]
                proof.different += files[0].read_bytes() != files[1].read_bytes()
                assert len(read_record(folder)) == images
    return proof


def main(
    kills: Annotated[int, typer.Option(help="How many.")] = 100,
    images: Annotated[int, typer.Option(help="In every run.")] = 600,
    seed: int = 0,
    labelled: Annotated[bool, typer.Option(help="Kill runs over labelled images.")] = False,
) -> None:
    """Kill runs and tell what it cost."""
    for name, value in vars(prove(kills, images=images, seed=seed, labelled=labelled)).items():
        print(f"{name.replace('_', ' '):>12}  {value}")


if __name__ == "__main__":
    typer.run(main)

"""Counts the predictions that killed runs lose, and the answers that they pay twice: ``python -m benchmarks.kills``.

With ``--labelled``, the runs are records. With ``--learn``, they learn.

A run with a paid judge is killed with SIGKILL at random moments, including the start of its process, and is then continued. The
judge is the real openai SDK with a server on this machine, which counts the questions. New runs are started until the given
number of kills is reached. Every run keeps embeddings. It keeps the judge's answers in the folder of the run or, in every second
run, in a separate cache. After each kill, the stored answers and the questions without a stored answer are counted. After each
run, its predictions are compared with those of an uninterrupted run.
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

from cascadevlm import Cascade, LabelSet, Stage, load_judge, load_prompt, parse_policy
from cascadevlm.decision.calibration import Calibration
from cascadevlm.decision.judge_model import JudgeModel
from cascadevlm.decision.shares import Shares
from cascadevlm.decision.teaching import Labelled
from cascadevlm.evaluation.data import Data
from cascadevlm.evaluation.record import read_record
from cascadevlm.judges.cache import DiskStore
from cascadevlm.runs import bulk
from cascadevlm.runs.inputs import Named
from cascadevlm.runs.tally import Tally
from cascadevlm.scorers.base import EmbeddingScorer
from cascadevlm.scorers.kept import CachedEmbeddings
from tests.server import JudgeServer
from tests.server.conversation import Conversation

NAMES = ("finch", "owl", "wren", "stork")
CONCURRENCY = 8
LATENCY = 0.05
MODEL = "gpt-4o"
WIDTH = 8
"""Number of values per embedding."""

SPANS = (0.02, 0.1, 1.0)
"""Each kill happens within one of these shares of a run's time. Most kills hit the beginning, where the folder is made."""


class Pictures:
    """Small images, which are all different, and are the same in every run."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Named]:
        for number in range(self.count):
            yield f"{number:06}", np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)


class Towers(EmbeddingScorer):
    """Embeds an image as its first pixels. A text gets a random embedding that depends only on the text."""

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


def run(folder: Path, cache: Path, answers: Path | None, url: str, images: int, labelled: bool, learn: bool) -> Tally:
    """The run that is killed. Its embeddings are kept in ``cache``; its answers are kept in ``answers`` if this is not None."""
    judge = load_judge(f"openai:{MODEL}", base_url=url, concurrency=CONCURRENCY)
    model = JudgeModel.prior(len(NAMES))
    policy = parse_policy("entropy > 0.6 & calls <= 100000")
    stage = Stage(judge=judge, prompt=load_prompt("select"), policy=policy, fusion="bayes" if learn else "judge", model=model)
    cascade = Cascade(
        CachedEmbeddings(Towers(), cache),
        [stage],
        labels=NAMES,
        batch_size=8,
        store=None if answers is None else DiskStore(answers),
        calibration=_calibration(model) if learn else None,
        learn=learn,
    )
    names, pictures = zip(*Pictures(images), strict=True)
    data = Data(images=pictures, names=names, truths=NAMES[:1] * images, splits=("",) * images)
    return bulk.run(cascade, data if labelled else Pictures(images), folder, config={"images": images})


def _calibration(model: JudgeModel) -> Calibration:
    """Of images whose labels are random, as the embeddings of all images are."""
    labels, rng = LabelSet.of(NAMES), np.random.default_rng(0)
    scores = Towers().score_embeddings(_unit(rng.normal(size=(40, WIDTH))), labels)
    assert scores.embeddings is not None
    support = Labelled.of(scores.log_probs, scores.embeddings, rng.integers(0, len(NAMES), 40))
    return Calibration(
        labels=NAMES,
        fingerprint=scores.fingerprint,
        scorer=support.fit.calibration,
        judges=(),
        images=40,
        labelled=True,
        fitted_on=(),
        shares=Shares.of(np.exp(support.fit.held_out)),
        support=support,
    )


@dataclass
class Server:
    """Counts the answers of the server, per digest of the image."""

    served: Counter[str] = field(default_factory=Counter)

    def answer(self, asked: Conversation) -> str:
        digest = hashlib.sha256(asked.images[0]).hexdigest()
        self.served[digest] += 1
        return asked.say(asked.choices[int(digest, 16) % len(asked.choices)])


@dataclass
class Proof:
    """The counts over all kills.

    Attributes:
        kills: number of kills that hit a working run.
        early: number of these kills that came before the run had a manifest.
        runs: number of completed runs.
        questions: number of different questions, over all runs.
        asked_again: number of questions that were asked again although their answer was stored.
        paid_twice: number of answers that were served beyond one per question.
        under_way: number of questions that were served, but not stored, at the time of a kill. Only these can be paid twice.
        different: number of predictions that are missing, duplicate, in a wrong order, or different from the uninterrupted run,
            and of records with other bytes of scores.
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
    """The digests of the images whose answers are stored."""
    if not answers.exists():
        return set()
    with diskcache.Cache(str(answers), disk=diskcache.JSONDisk) as cache:
        return {cache[key]["payload"]["image"] for key in cache.iterkeys()}


def predictions(folder: Path) -> list[Mapping[str, object]]:
    """The predictions without usage, because an answer from the store has no cost."""
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    for line in lines:
        del line["cost"], line["crc32"]
        if line["verdict"]:
            del line["verdict"]["usage"]
    return lines


def prove(kills: int, *, images: int, seed: int = 0, labelled: bool = False, learn: bool = False) -> Proof:
    """Kill runs over ``images`` images until the number of kills is reached."""
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
            process = processes.Process(target=run, args=(folder, cache, answers, judge.openai_url, images, labelled, learn))
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
                    time.sleep(3 * LATENCY)  # the server answers the requests that it has received
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
    kills: Annotated[int, typer.Option(help="Number of kills.")] = 100,
    images: Annotated[int, typer.Option(help="Number of images per run.")] = 600,
    seed: int = 0,
    labelled: Annotated[bool, typer.Option(help="Kill runs over labelled images.")] = False,
    learn: Annotated[bool, typer.Option(help="Kill runs that learn.")] = False,
) -> None:
    """Kill runs, and print the counts."""
    for name, value in vars(prove(kills, images=images, seed=seed, labelled=labelled, learn=learn)).items():
        print(f"{name.replace('_', ' '):>12}  {value}")


if __name__ == "__main__":
    typer.run(main)

"""The engine through `Cascade`: order, concurrency, stages, failures, bounds."""

import asyncio
import gc
import io
import os
import queue
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from cascadevlm import Cascade, CumulativeMass, Prediction, Stage, TopK, load_prompt, parse_policy
from cascadevlm.base.errors import (
    FatalError,
    ImageError,
    InputError,
    JudgeError,
    LabelError,
    PermanentError,
    PolicyError,
    PromptError,
)
from cascadevlm.base.images import ImageSource
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Question, Scores, Usage, Verdict
from cascadevlm.cascade.engine import READ_AHEAD
from cascadevlm.judges.base import Judge, Quote, verdict_from_text
from cascadevlm.judges.budget import Ledger
from cascadevlm.judges.cache import MemoryStore
from cascadevlm.judges.support import SupportSet
from cascadevlm.scorers.base import Prepared, WrapperScorer
from cascadevlm.testing import FakeJudge, FakeScorer, noise, picture
from cascadevlm.testing.fakes import Reply

RED, BLUE, GREY = (200, 0, 0), (0, 0, 200), (90, 90, 90)
LABELS = ["red bird", "blue bird", "grey bird"]
SCORER = FakeScorer(table={RED: [9, 0, 0], BLUE: [0, 9, 0], GREY: [1, 0.5, 0]})
"""Certain of red and blue, unsure of grey."""

SELECT = load_prompt("select")


def stage(judge: Judge, policy: str = "entropy > 0.5", **options: object) -> Stage:
    return replace(Stage(judge=judge, prompt=SELECT, policy=parse_policy(policy)), **options)  # type: ignore[arg-type]


def cascade(*stages: Stage, **options: object) -> Cascade:
    return Cascade(SCORER, stages, labels=LABELS, **options)  # type: ignore[arg-type]


def names(predictions: list[Prediction]) -> list[str | None]:
    return [prediction.label for prediction in predictions]


def test_sure_images_are_kept_and_unsure_ones_judged() -> None:
    judge = FakeJudge(reply="Grey all over.\nANSWER: C", dollars=0.01)
    kept, asked = cascade(stage(judge)).classify([picture(RED), picture(GREY)])
    assert (kept.label, kept.decided_by, kept.verdicts) == ("red bird", "scorer", ())
    assert kept.probability == pytest.approx(1, abs=1e-3)
    assert (asked.label, asked.decided_by, asked.probability) == ("grey bird", "judge", None)
    assert asked.verdict is not None
    assert asked.verdict.rationale == "Grey all over."
    assert asked.cost.dollars == 0.01
    assert [c.rank for c in asked.candidates] == [1, 2, 3]
    assert asked.reasons[0].startswith("entropy 0.")


def test_one_image_gives_one_prediction_and_keeps_its_path(tmp_path: Path) -> None:
    picture(RED).save(tmp_path / "red.png")
    prediction = cascade().classify(tmp_path / "red.png")
    assert (prediction.label, prediction.path) == ("red bird", str(tmp_path / "red.png"))
    assert cascade().classify(np.asarray(picture(BLUE))).label == "blue bird"
    assert cascade().classify([]) == []


def test_without_stages_the_scorer_is_alone() -> None:
    assert Cascade(SCORER, labels=LABELS).classify(picture(RED)).label == "red bird"
    assert names(cascade().classify([picture(RED), picture(GREY)])) == ["red bird", "red bird"]


def test_an_unreadable_image_is_a_row_among_many_and_an_error_alone() -> None:
    judge = FakeJudge()
    rows = cascade(stage(judge)).classify([b"junk", picture(RED), "nowhere.png"])
    assert names(rows) == [None, "red bird", None]
    assert "is not an image" in rows[0].error
    assert "nowhere.png" in rows[2].error
    assert rows[2].path == "nowhere.png"
    with pytest.raises(ImageError):
        cascade().classify("nowhere.png")
    assert names(cascade().classify([b"junk", b"junk"])) == [None, None]


FIRST_CALLS = """
import asyncio, threading, time
from concurrent.futures import ThreadPoolExecutor
from cascadevlm import Cascade
from cascadevlm.testing import FakeScorer, noise

new_event_loop = asyncio.new_event_loop

def slowly():
    time.sleep(0.05)
    return new_event_loop()

asyncio.new_event_loop = slowly
images, cascade, together = [noise(1)] * 3, Cascade(FakeScorer(), labels=["red", "blue"], batch_size=1), threading.Barrier(4)

def classify(_):
    together.wait()
    return [prediction.label for prediction in cascade.stream(images)]

with ThreadPoolExecutor(4) as threads:
    assert len({tuple(labels) for labels in threads.map(classify, range(4))}) == 1
assert [thread.name for thread in threading.enumerate()].count("cascadevlm") == 1
"""


def test_the_first_calls_of_all_may_come_at_once_from_several_threads() -> None:
    """In a separate process, because only a new process has no event loop yet."""
    subprocess.run([sys.executable, "-c", FIRST_CALLS], check=True)


async def test_a_running_event_loop_is_no_error() -> None:
    assert cascade(stage(FakeJudge())).classify(picture(GREY)).label == "red bird"
    assert (await cascade(stage(FakeJudge())).aclassify(picture(GREY))).label == "red bird"
    assert [p.label async for p in cascade(stage(FakeJudge())).astream([picture(BLUE)])] == ["blue bird"]


class Jittery(Judge):
    """Answers by the first pixel of the image, after a random time."""

    spec = "jittery:test"
    concurrency = 5

    def __init__(self, seed: int, seconds: float) -> None:
        self.random, self.seconds = random.Random(seed), seconds
        self.asked = self.now = self.most = 0

    async def judge(self, question: Question) -> Verdict:
        self.asked += 1
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(self.random.random() * self.seconds)
        self.now -= 1
        colour = question.image.getpixel((1, 1))
        assert isinstance(colour, tuple)
        return verdict_from_text(f"ANSWER: {LABELS[colour[0] % 3]}", question, judge=self.spec, usage=Usage(requests=1))


def numbered(count: int) -> list[Image.Image]:
    images = [picture(GREY, (4, 4)) for _ in range(count)]
    for number, image in enumerate(images):
        image.putpixel((1, 1), (number % 256, number // 256, 7))
    return images


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 99), st.integers(0, 40), st.integers(1, 9))
def test_results_come_in_input_order_whatever_the_latencies(seed: int, count: int, batch_size: int) -> None:
    judge = Jittery(seed, 0.004)
    predictions = list(cascade(stage(judge), batch_size=batch_size).stream(numbered(count)))
    assert names(predictions) == [LABELS[number % 3] for number in range(count)]
    assert judge.most <= judge.concurrency


def test_judges_work_concurrently() -> None:
    judge = FakeJudge(seconds=0.05)
    cascade(stage(judge), batch_size=8).classify(numbered(32))
    assert judge.most_at_once == judge.concurrency == 8


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 99), st.integers(1, 7))
def test_a_budget_of_calls_falls_on_the_same_images_whatever_the_latencies(seed: int, batch_size: int) -> None:
    def asked(latency_seed: int) -> list[int]:
        judges = Jittery(latency_seed, 0.003), Jittery(latency_seed + 1, 0.003)
        stages = stage(judges[0], "always & calls <= 7"), stage(judges[1], "calls <= 3 & always")
        predictions = cascade(*stages, batch_size=batch_size).classify(numbered(20))
        assert [judge.asked for judge in judges] == [7, 3]
        return [len(p.verdicts) for p in predictions]

    first = asked(seed)
    assert first == asked(seed + 1)
    assert sorted(first) == [0] * 13 + [1] * 4 + [2] * 3


def test_a_budget_is_spread_over_a_run_of_known_length_and_over_what_reaches_each_stage() -> None:
    stages = stage(FakeJudge(), "random(0.5)"), stage(FakeJudge(), "calls <= 10")
    images = [noise(number) for number in range(200)]

    def asked_twice(images: Iterable[Image.Image]) -> NDArray[np.intp]:
        predictions = Cascade(FakeScorer(), stages, labels=LABELS, batch_size=8).classify(images)
        return np.flatnonzero([len(prediction.verdicts) == 2 for prediction in predictions])

    known = asked_twice(images)
    unknown = asked_twice(iter(images))
    assert len(known) == len(unknown) == 10
    assert unknown.max() < 50
    assert known.max() > 100


def test_votes_are_questions_of_their_own() -> None:
    store, images = MemoryStore(), [noise(number) for number in range(40)]
    judges = FakeJudge(dollars=0.01, seconds=0.001), FakeJudge(dollars=0.01)
    told = []
    for judge in judges:
        voting = cascade_of_noise(stage(judge, "always", votes=3), store=store)
        predictions = voting.classify(images)
        told.append([(each.label, each.verdicts[0].probabilities) for each in predictions])
    assert told[0] == told[1]
    assert len(judges[0].questions) == 120
    assert judges[0].most_at_once <= judges[0].concurrency + 1
    assert judges[1].questions == []
    assert sum(prediction.cost.saved_dollars for prediction in predictions) == pytest.approx(1.2)


def cascade_of_noise(*stages: Stage, **options: object) -> Cascade:
    return Cascade(FakeScorer(), stages, labels=LABELS, **options)  # type: ignore[arg-type]


def test_a_model_is_loaded_once_and_before_any_image_is_prepared() -> None:
    class Loading(FakeScorer):
        def __init__(self) -> None:
            super().__init__()
            self.done: list[str] = []

        def load(self) -> None:
            self.done.append("load")

        def prepare(self, source: ImageSource) -> Prepared:
            self.done.append("prepare")
            return super().prepare(source)

    scorer = Loading()
    Cascade(scorer, [], labels=LABELS, batch_size=2).classify([noise(number) for number in range(7)])
    assert scorer.done == ["load"] + ["prepare"] * 7
    Cascade(Loading(), [], labels=LABELS).classify([])


def test_runs_that_share_a_model_load_it_once_and_call_it_by_turns() -> None:
    """In one event loop, in threads, and in separate event loops; also through wrappers of one model."""

    class Busy(FakeScorer):
        loaded = calls = at_once = most_at_once = 0

        def load(self) -> None:
            time.sleep(0.02)
            self.loaded += 1

        def score(self, images: Sequence[Image.Image], labels: LabelSet) -> Scores:
            self.calls += 1
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            time.sleep(0.005)
            self.at_once -= 1
            return super().score(images, labels)

    scorer = Busy()
    cascades = [Cascade(each, [], labels=LABELS, batch_size=2) for each in (scorer, WrapperScorer(scorer))]
    pictures = [noise(number) for number in range(6)]

    async def four() -> None:
        await asyncio.gather(*(cascade.aclassify(pictures) for cascade in cascades * 2))

    with ThreadPoolExecutor(4) as pool:
        own_loop = pool.submit(asyncio.run, four())
        list(pool.map(lambda cascade: cascade.classify(pictures), cascades))
        own_loop.result()
    assert (scorer.loaded, scorer.calls, scorer.most_at_once) == (1, 6 * 3, 1)


def test_inputs_are_not_read_far_ahead_of_the_judges() -> None:
    read, furthest, judge = 0, 0, FakeJudge(seconds=0.005)

    def source() -> Iterator[Image.Image]:
        nonlocal read, furthest
        for image in numbered(400):
            read += 1
            furthest = max(furthest, read - len(judge.questions))
            yield image

    assert len(cascade(stage(judge), batch_size=4).classify(source())) == len(judge.questions) == read == 400
    assert furthest <= 2 * judge.concurrency + (READ_AHEAD + 3) * 4


def test_leaving_a_stream_early_leaves_nothing_running() -> None:
    judge = FakeJudge(seconds=0.01)
    stream = cascade(stage(judge), batch_size=2).stream(numbered(100))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    asked = len(judge.questions)
    threading.Event().wait(0.05)
    assert len(judge.questions) == asked < 100


def test_a_policy_that_waits_for_a_cascade_is_told() -> None:
    other = cascade()

    def asking(scores: Scores) -> NDArray[np.bool_]:
        other.classify([picture(RED)])
        return np.ones(len(scores), dtype=bool)

    with pytest.raises(InputError, match="cannot wait for a cascade"):
        cascade(Stage(judge=FakeJudge(), prompt=SELECT, policy=asking)).classify([picture(GREY)])


def test_a_stream_may_be_forgotten_and_collected_anywhere(caplog: pytest.LogCaptureFixture) -> None:
    def collecting(_: Question) -> str:
        gc.collect()  # here: in the thread of the event loop
        return "ANSWER: A"

    forgotten = FakeJudge(seconds=0.01)
    gc.disable()
    try:
        stream = cascade(stage(forgotten), batch_size=2).stream(numbered(100))
        next(stream)
        cycle: list[object] = [stream]
        cycle.append(cycle)
        del stream, cycle
        assert cascade(stage(FakeJudge(reply=collecting))).classify(picture(GREY)).label == "red bird"
    finally:
        gc.enable()
    threading.Event().wait(0.1)
    asked = len(forgotten.questions)
    threading.Event().wait(0.1)
    assert len(forgotten.questions) == asked < 100
    assert caplog.records == []  # of event loops that close twice


def test_sources_that_wait_hold_nobody_else_up() -> None:
    """More tasks than the default executor has threads."""
    opened: queue.Queue[None] = queue.Queue()

    def waiting() -> Iterator[Image.Image]:
        yield picture(RED)
        opened.get()
        yield picture(RED)

    streams = [cascade(stage(FakeJudge()), batch_size=1).stream(waiting()) for _ in range((os.cpu_count() or 1) + 5)]
    for stream in streams:
        assert next(stream).label == "red bird"
    assert cascade(stage(FakeJudge())).classify(picture(GREY)).label == "red bird"
    for _ in streams:
        opened.put(None)
    assert [len(list(stream)) for stream in streams] == [1] * len(streams)


def test_an_endless_source_can_be_streamed() -> None:
    def forever() -> Iterator[Image.Image]:
        while True:
            yield picture(RED)

    stream = cascade().stream(forever())
    assert [next(stream).label for _ in range(50)] == ["red bird"] * 50


@pytest.mark.parametrize("reply", ["What a bird!", "", PermanentError("broken")])
@pytest.mark.parametrize("on_failure", ["scorer", "abstain", "raise"])
def test_what_happens_without_an_answer_is_a_choice_and_is_said(reply: Reply, on_failure: str) -> None:
    classifier = cascade(stage(FakeJudge(reply=reply)), on_failure=on_failure)
    if on_failure == "raise":
        with pytest.raises(JudgeError, match="fake:fake"):
            classifier.classify([picture(GREY)])
        return
    (prediction,) = classifier.classify([picture(GREY)])
    assert prediction.verdict is not None
    assert prediction.verdict.outcome == ("failed" if isinstance(reply, Exception) else "unparsed")
    if on_failure == "scorer":
        assert (prediction.label, prediction.decided_by) == ("red bird", "scorer")
    else:
        assert (prediction.label, prediction.decided_by, prediction.probability) == (None, None, None)
        assert prediction.error


@pytest.mark.parametrize(("on_failure", "label"), [("scorer", "red bird"), ("raise", "red bird"), ("abstain", None)])
def test_none_of_these_is_no_failure(on_failure: str, label: str | None) -> None:
    judge = FakeJudge(reply="ANSWER: none of these")
    (prediction,) = cascade(stage(judge, offer_none=True), on_failure=on_failure).classify([picture(GREY)])
    assert prediction.verdict is not None
    assert (prediction.verdict.outcome, prediction.label) == ("none", label)


def test_a_policy_may_be_given_as_text() -> None:
    judge = FakeJudge(reply="ANSWER: B")
    given = Stage(judge=judge, prompt=SELECT, policy="entropy > 0.17 & calls <= 1")
    predictions = cascade(given).classify([picture(RED), picture(GREY), noise(1)][:2])
    assert names(predictions) == ["red bird", "blue bird"]
    assert predictions[1].reasons[0].endswith("calls <= 1")
    with pytest.raises(PolicyError, match="column 1"):
        replace(given, policy="entrpy > 0.17")
    with pytest.raises(PolicyError, match=r"0\.17 is not a policy"):
        replace(given, policy=0.17)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"judge": "openai:gpt-4o"}, "judge must be a Judge, not 'openai:gpt-4o'"),
        ({"prompt": "select"}, "prompt must be a Prompt, not 'select'"),
        ({"candidates": 5}, "candidates must be a CandidateRule, not 5"),
        ({"support": "photos"}, "support must be a SupportSet, not 'photos'"),
        ({"votes": 0}, r"votes: Input should be greater than or equal to 1 \(given: 0\)"),
        ({"votes": 1.5}, r"votes: Input should be a valid integer.* \(given: 1\.5\)"),
        ({"widen": -1}, r"widen: Input should be greater than or equal to 0 \(given: -1\)"),
    ],
)
def test_specs_in_the_place_of_objects_are_refused(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        replace(Stage(judge=FakeJudge(), prompt=SELECT), **arguments)  # type: ignore[arg-type]


def test_lists_of_candidates_have_bounds() -> None:
    for rule, sentence in (
        (lambda: TopK(k=2.5), r"k: Input should be a valid integer.* \(given: 2\.5\)"),  # type: ignore[arg-type]
        (lambda: TopK(k=0), r"k: Input should be greater than or equal to 1 \(given: 0\)"),
        (lambda: CumulativeMass(mass=0), r"mass: Input should be greater than 0 \(given: 0\)"),
        (lambda: CumulativeMass(minimum=0), "minimum: Input should be greater than or equal to 1"),
        (lambda: CumulativeMass(minimum=4, maximum=3), "minimum is 4 and maximum is 3"),
    ):
        with pytest.raises(InputError, match=sentence):
            rule()
    assert TopK(k=np.arange(5)[3]).k == 3


def test_a_cascade_is_made_of_a_scorer_and_a_list_of_stages() -> None:
    with pytest.raises(InputError, match="scorer must be a Scorer, not 'open_clip:aviary'"):
        Cascade("open_clip:aviary", labels=LABELS)  # type: ignore[arg-type]
    assert len(Cascade(SCORER, (stage(FakeJudge()) for _ in range(2)), labels=LABELS).stages) == 2  # type: ignore[arg-type]


WRONG: dict[str, tuple[dict[str, object], str]] = {
    "one stage": ({"stages": stage(FakeJudge())}, "stages must be a list of stages, not Stage"),
    "one spec": ({"stages": "openai:gpt-4o"}, "stages must be a list of stages, not 'openai:gpt-4o'"),
    "no stages": ({"stages": None}, "stages must be a list of stages, not None"),
    "specs": ({"stages": ["openai:gpt-4o"]}, r"stages\[0\] must be a Stage, not 'openai:gpt-4o'"),
    "judges": ({"stages": [stage(FakeJudge()), FakeJudge()]}, r"stages\[1\] must be a Stage, not <"),
    "calibration": ({"calibration": "calibration.json"}, "calibration must be a Calibration, not 'calibration.json'"),
    "store": ({"store": Path("cache")}, "store must be a VerdictStore"),
    "ledger": ({"ledger": 5.0}, r"ledger must be a Ledger, not 5\.0"),
    "on_failure": ({"on_failure": "skip"}, "no on_failure 'skip'.*scorer, raise, abstain"),
    "batch_size": ({"batch_size": 0}, r"batch_size: Input should be greater than or equal to 1 \(given: 0\)"),
    "accept": ({"accept": 2}, r"accept: Input should be less than or equal to 1 \(given: 2\)"),
    "no accept": ({"accept": None}, r"accept: Input should be a valid number \(given: None\)"),
    "labels of a table": ({"labels": pandas.DataFrame({"name": LABELS})}, "labels has the type 'DataFrame'"),
    "labels of a file": ({"labels": Path("labels.txt")}, "labels has the type '.*Path'; it must be a list.*LabelSet.read"),
    "no labels": ({"labels": None}, "labels has the type 'NoneType'"),
    "labels of numbers": ({"labels": [1, 2]}, "a name or a Label, not 1"),
    "labels of pyarrow": ({"labels": pyarrow.array(LABELS)}, "a name or a Label, not <"),
}


@pytest.mark.parametrize(("arguments", "sentence"), WRONG.values(), ids=WRONG)
def test_what_makes_no_cascade_is_refused_by_name(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises((InputError, LabelError), match=sentence):
        Cascade(SCORER, **{"labels": LABELS} | arguments)  # type: ignore[arg-type]


def pixels(*colours: tuple[int, int, int]) -> NDArray[np.uint8]:
    return np.array([np.asarray(picture(colour)) for colour in colours])


SEVERAL: dict[str, object] = {
    "N x H x W x 3": pixels(RED, BLUE),
    "arrays": [*pixels(RED, BLUE)],
    "an array and an image": (pixels(RED)[0], picture(BLUE)),
    "an iterator": iter(pixels(RED, BLUE)),
}


@pytest.mark.parametrize("images", SEVERAL.values(), ids=SEVERAL)
def test_arrays_of_pixels_are_images(images: Iterable[ImageSource]) -> None:
    assert names(cascade().classify(images)) == ["red bird", "blue bird"]


def test_an_array_of_another_shape_is_no_image() -> None:
    with pytest.raises(ImageError, match=r"its shape is \(3, 8, 8\), not \(H, W\), \(H, W, 3\) or \(H, W, 4\)"):
        cascade().classify(np.zeros((3, 8, 8), dtype=np.uint8))


def test_an_array_is_one_image_and_an_empty_one_none() -> None:
    assert cascade().classify(pixels(BLUE)[0]).label == "blue bird"
    assert cascade().classify(pixels(BLUE)[:0]) == []  # type: ignore[comparison-overlap]


FRAME = pandas.DataFrame({"path": ["a.png"], "label": ["red bird"]})
REFUSED: dict[str, tuple[object, str]] = {
    "DataFrame": (FRAME, r"is a table \(DataFrame\)"),
    "pyarrow": (pyarrow.table({"path": ["a.png"], "sku": [7]}), r"is a table \(Table\)"),
    "dict": ({"path": ["a.png"]}, r"is a table \(dict\)"),
    "texts": (np.array(["a.png", "b.png"]), r"an array of dtype <U5; an array of images has the dtype uint8\. .*tolist"),
    "objects": (np.array([Path("a.png"), Path("b.png")]), "an array of dtype object"),
    "bytes": (np.array([b"a.png"]), "an array of dtype"),
    "0 dimensions": (np.array("a.png"), "an array of dtype <U5"),
    "dates": (np.array(["2020-01-01"], dtype="datetime64[D]"), "an array of dtype datetime64"),
    "channels first": (
        np.zeros((2, 3, 8, 8), dtype=np.uint8),
        r"an array of dtype uint8 and shape \(2, 3, 8, 8\); it must be .*\(N, H, W, 3\)\. .*transpose",
    ),
    "fractions": (np.zeros((2, 8, 8, 3)), r"an array of dtype float64 and shape \(2, 8, 8, 3\); .*astype\('uint8'\)"),
    "tensor": (torch.zeros((2, 8, 8, 3), dtype=torch.uint8), "of type 'Tensor'"),
    "tensor of one image": (torch.zeros((3, 8, 8)), "of type 'Tensor'"),
    "column of pyarrow": (pyarrow.array(["a.png"]), "of type 'StringArray'"),
    "bytearray": (bytearray(b"abc"), "of type 'bytearray'"),
    "memoryview": (memoryview(b"abc"), "of type 'memoryview'"),
    "file": (io.BytesIO(b"abc"), "of type 'BytesIO'"),
    "None": (None, "of type 'NoneType'"),
    "number": (3, "of type 'int'"),
}


@pytest.mark.parametrize(("images", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_holds_no_images_is_refused_by_name(images: Iterable[ImageSource], sentence: str) -> None:
    for classify in (cascade().classify, lambda given: list(cascade().stream(given))):
        with pytest.raises(InputError, match=sentence):
            classify(images)


@pytest.mark.parametrize("image", ["a.png", Path("a.png"), b"", picture(RED), pixels(RED)[0]])
def test_one_image_is_no_stream(image: Iterable[ImageSource]) -> None:
    with pytest.raises(InputError, match="is a single image"):
        next(cascade().stream(image))


def test_a_column_of_paths_is_a_list_of_images(tmp_path: Path) -> None:
    picture(BLUE).save(tmp_path / "blue.png")
    frame = pandas.DataFrame({"path": [str(tmp_path / "blue.png")] * 2})
    for paths in (frame["path"], frame["path"].to_numpy().tolist()):
        assert names(cascade().classify(paths)) == ["blue bird"] * 2


def test_a_fatal_error_stops_the_run_at_once() -> None:
    replies: list[str | Exception] = ["ANSWER: A", FatalError("wrong key"), *[FatalError("again")] * 500]
    judge = FakeJudge(reply=replies, seconds=0.001)
    stream = cascade(stage(judge), batch_size=4).stream(numbered(400))
    assert next(stream).label == "red bird"
    with pytest.raises(FatalError, match=r"wrong key|again"):
        next(stream)
    assert len(judge.questions) < 20


def test_a_bug_in_a_judge_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        cascade(stage(FakeJudge(reply=ZeroDivisionError()))).classify(numbered(10))


def test_after_a_bug_nothing_more_is_asked_and_paid() -> None:
    replies: list[Reply] = [ZeroDivisionError(), *["ANSWER: A"] * 99]
    judge, ledger = FakeJudge(reply=replies, seconds=0.01, dollars=0.01), Ledger()
    judge.concurrency = 2
    with pytest.raises(ZeroDivisionError):
        cascade(stage(judge), ledger=ledger).classify(numbered(32))
    threading.Event().wait(0.1)
    assert len(judge.questions) <= 4
    assert ledger.spent_dollars <= 0.04


def test_a_bug_in_a_policy_or_scorer_is_not_swallowed() -> None:
    with pytest.raises(KeyError):
        cascade().classify([noise(1)])
    broken = Stage(judge=FakeJudge(), prompt=SELECT, policy=lambda scores: np.ones(99, dtype=bool))
    with pytest.raises(InputError, match="Return an array of 1 booleans"):
        cascade(broken).classify([picture(RED)])


def with_probabilities(opinion: dict[str, float]) -> Callable[[Question], Verdict]:
    best = max(opinion, key=lambda name: opinion[name])
    return lambda question: Verdict(outcome="answered", label=best, probabilities=opinion, judge="sure:test")


class Opinionated(Judge):
    spec = "opinionated:test"

    def __init__(self, opinion: dict[str, float]) -> None:
        self.answer = with_probabilities(opinion)

    async def judge(self, question: Question) -> Verdict:
        return self.answer(question)


def test_a_second_stage_sees_the_scores_as_the_first_left_them() -> None:
    last = FakeJudge("last", reply="ANSWER: C")
    unsure = Opinionated({"red bird": 0.4, "blue bird": 0.35, "grey bird": 0.25})
    sure = Opinionated({"red bird": 0.01, "blue bird": 0.98, "grey bird": 0.01})
    for first, expected, asked in (
        (unsure, "grey bird", 1),  # still unsure: asked again
        (sure, "blue bird", 0),  # settled
        (FakeJudge("word", reply="ANSWER: B"), "blue bird", 0),  # a word without probabilities settles it
        (FakeJudge("mute", reply=""), "grey bird", 1),  # no answer: the scorer's doubt still stands
    ):
        last.questions.clear()
        (prediction,) = cascade(stage(first), stage(last)).classify([picture(GREY)])
        assert (prediction.label, len(last.questions)) == (expected, asked)
        assert len(prediction.verdicts) == 1 + asked
    assert cascade(stage(sure), stage(last)).classify([picture(RED)])[0].verdicts == ()


def test_a_judges_probability_is_the_predictions() -> None:
    (prediction,) = cascade(stage(Opinionated({"red bird": 0.2, "blue bird": 0.8}))).classify([picture(GREY)])
    assert (prediction.label, prediction.probability) == ("blue bird", 0.8)


def test_the_last_valid_verdict_counts() -> None:
    first, second = FakeJudge(reply="ANSWER: B"), FakeJudge(reply=PermanentError("down"))
    (prediction,) = cascade(stage(first), stage(second, "always"), on_failure="abstain").classify([picture(GREY)])
    assert (prediction.label, prediction.decided_by) == ("blue bird", "judge")
    assert [verdict.outcome for verdict in prediction.verdicts] == ["answered", "failed"]


def test_candidates_are_shown_as_the_stage_says() -> None:
    judge = FakeJudge(reply="ANSWER: A")
    (prediction,) = cascade(stage(judge, candidates=TopK(k=2, order="reversed"))).classify([picture(GREY)])
    assert [label.name for label in judge.questions[0].labels] == ["blue bird", "red bird"]
    assert prediction.label == "blue bird"


def test_reference_images_come_from_the_support_set(tmp_path: Path) -> None:
    for name in ("red bird", "blue bird", "stray"):
        (tmp_path / name).mkdir()
        for number in range(2):
            noise(number).save(tmp_path / name / f"{number}.png")
    support = SupportSet.read(tmp_path, LabelSet.of(LABELS), shots=1)
    judge = FakeJudge()
    cascade(stage(judge, support=support, prompt=load_prompt("select_fewshot"))).classify([picture(GREY)])
    assert [exemplar.label.name for exemplar in judge.questions[0].exemplars] == ["red bird", "blue bird"]
    with pytest.raises(PromptError, match=r"'select' has no place for the support images\. Use a prompt with \$references"):
        stage(judge, support=support)
    with pytest.raises(InputError, match="no image of any label"):
        SupportSet.read(tmp_path, LabelSet.of(["owl"]))


def test_equal_questions_are_asked_once_and_never_again_with_a_store() -> None:
    judge, store = FakeJudge(dollars=0.5), MemoryStore()
    first = cascade(stage(judge), store=store).classify([picture(GREY)] * 5)
    again = cascade(stage(judge), store=store).classify([picture(GREY)] * 5)
    assert len(judge.questions) == 1
    assert sum(p.cost.dollars for p in first + again) == 0.5
    assert sum(p.cost.saved_dollars for p in first + again) == 4.5
    assert names(first) == names(again)


class Priced(FakeJudge):
    def quote(self, question: Question) -> Quote:
        return Quote(worst_case=100_000_000)


def test_when_the_money_is_gone_the_scorer_answers_and_it_is_said() -> None:
    judge = Priced(reply="ANSWER: B", dollars=0.1)
    ledger = Ledger(0.35)
    predictions = cascade(stage(judge), ledger=ledger, on_failure="abstain").classify(numbered(10))
    outcomes = [p.verdict.outcome for p in predictions if p.verdict]
    assert sorted(outcomes) == ["answered"] * 3 + ["skipped"] * 7
    assert ledger.spent_dollars == pytest.approx(0.3)
    assert ledger.reserved_dollars == 0
    assert {p.label for p in predictions if p.verdict and p.verdict.outcome == "skipped"} == {"red bird"}


def test_predictions_are_one_json_line() -> None:
    (prediction,) = cascade(stage(FakeJudge())).classify([picture(GREY)])
    row = prediction.to_dict()
    assert {"path", "label", "probability", "decided_by", "candidates", "verdict", "cost"} <= set(row)


def test_lists_widen_only_after_an_answer_that_is_offered() -> None:
    with pytest.raises(InputError, match=r"widen = 2 needs the answer 'none of these'\. Offer it: offer_none = true\."):
        stage(FakeJudge(), widen=2)
    assert stage(FakeJudge(), widen=2, offer_none=True).widen == 2

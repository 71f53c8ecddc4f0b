"""The calls that an observer gets during a run."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from cascadevlm import Cascade, Judge, Observer, Prediction, Question, Scores, Stage, TopK, Verdict, load_prompt
from cascadevlm.base.errors import ImageError, PermanentError
from cascadevlm.base.images import ImageSource
from cascadevlm.scorers.base import Prepared
from cascadevlm.testing import FakeJudge, FakeScorer, noise

LABELS = ["ant", "bee", "cicada", "dragonfly"]


class Everything(Observer):
    """Records all calls."""

    def __init__(self) -> None:
        self.judges: list[tuple[int, Judge]] = []
        self.sources: list[object] = []
        self.scores: dict[int, list[float]] = {}
        self.asked: list[tuple[int, int, list[str], str]] = []
        self.predictions: list[tuple[int, Prediction]] = []

    def ready(self, stage: int, judge: Judge) -> None:
        self.judges.append((stage, judge))

    def prepared(self, image: Prepared) -> None:
        self.sources.append(image.source)

    def scored(self, numbers: Sequence[int], images: Sequence[Prepared], scores: Scores) -> None:
        assert len(numbers) == len(images) == len(scores)
        self.scores |= dict(zip(numbers, scores.log_probs.tolist(), strict=True))

    def judged(self, number: int, stage: int, question: Question, verdict: Verdict) -> None:
        self.asked.append((number, stage, [label.name for label in question.labels], verdict.outcome))

    def predicted(self, number: int, prediction: Prediction) -> None:
        self.predictions.append((number, prediction))


def test_an_observer_sees_what_passes(tmp_path: Path) -> None:
    images: list[ImageSource] = [noise(0), tmp_path / "gone.png", noise(1), noise(2), noise(3)]
    judge, seen = FakeJudge(), Everything()
    stage = Stage(judge=judge, prompt=load_prompt("select"), candidates=TopK(k=2))
    cascade = Cascade(FakeScorer(), [stage], labels=LABELS, batch_size=2, observers=[seen])
    predictions = cascade.classify(images)
    assert seen.judges == [(0, judge)]
    assert sorted(map(id, seen.sources)) == sorted(id(image) for image in images if image is not images[1])
    assert [*seen.scores] == [0, 2, 3, 4]
    for number, row in seen.scores.items():
        assert row == FakeScorer().score([images[number]], cascade.labels).log_probs[0].tolist()  # type: ignore[list-item]
    shown = {number: [each.label.name for each in predictions[number].candidates] for number in seen.scores}
    assert sorted(seen.asked) == [(number, 0, names, "answered") for number, names in shown.items()]
    assert seen.predictions == list(enumerate(predictions))


def test_every_list_that_is_shown_is_told() -> None:
    """Every widened list is reported, also the last list, which gets no answer."""
    judge, seen = FakeJudge(reply=["ANSWER: none of these", PermanentError("down")]), Everything()
    stage = Stage(judge=judge, prompt=load_prompt("select"), candidates=TopK(k=2), offer_none=True, widen=1)
    (prediction,) = Cascade(FakeScorer(), [stage], labels=LABELS, observers=[seen]).classify([noise(0)])
    (first, second) = seen.asked
    assert (first[3], second[3]) == ("none", "failed")
    assert first[2] == [candidate.label.name for candidate in prediction.candidates]
    assert {*first[2], *second[2]} == {*LABELS}


def test_what_an_observer_cannot_use_is_the_error_of_its_image() -> None:
    class Refusing(Observer):
        def prepared(self, image: Prepared) -> None:
            if image.image == noise(1):
                raise ImageError("Too noisy.")

    predictions = Cascade(FakeScorer(), [], labels=LABELS, observers=[Refusing()]).classify([noise(0), noise(1)])
    assert [prediction.error for prediction in predictions] == ["", "Too noisy."]


@pytest.mark.parametrize("method", ["ready", "scored", "judged", "predicted"])
def test_an_error_of_an_observer_ends_the_run(method: str) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError(method)

    observer = Observer()
    setattr(observer, method, fail)
    stage = Stage(judge=FakeJudge(), prompt=load_prompt("select"))
    with pytest.raises(ZeroDivisionError, match=method):
        Cascade(FakeScorer(), [stage], labels=LABELS, observers=[observer]).classify([noise(0)])

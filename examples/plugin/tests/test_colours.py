"""The contract tests for the scorer and the judge, and further tests for the plug-in."""

from cascadevlm_colours import ColourJudge, ColourScorer, TiesAbove
from PIL import Image

from cascadevlm import Cascade, Judge, Scorer, Stage, load_prompt
from cascadevlm.testing import JudgeContract, ScorerContract


class TestColourScorer(ScorerContract):
    def make(self) -> Scorer:
        return ColourScorer("mean")


class TestColourJudge(JudgeContract):
    def make(self) -> Judge:
        judge = ColourJudge("middle")
        judge.spec = "colours:middle"
        return judge


def test_a_red_image_is_red() -> None:
    judge = Stage(judge=TestColourJudge().make(), prompt=load_prompt("select"), policy=TiesAbove(0))
    cascade = Cascade(ColourScorer("mean"), [judge], labels=["a red finch", "a blue finch", "a black owl"])
    assert cascade.classify(Image.new("RGB", (8, 8), (210, 20, 40))).label == "a red finch"


def test_ties_are_counted() -> None:
    scores = ColourScorer("mean").score(
        [Image.new("RGB", (8, 8), (210, 20, 40))],
        Cascade(ColourScorer("mean"), [], labels=["a red finch", "a red owl", "a blue owl"]).labels,
    )
    assert TiesAbove(0).select(scores).all()
    assert not TiesAbove(1).select(scores).any()

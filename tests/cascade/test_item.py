"""The prediction of an image, without a run."""

import pytest

from cascadevlm.base.errors import JudgeError
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Verdict
from cascadevlm.cascade.candidates import TopK
from cascadevlm.cascade.item import Item, OnFailure, rank
from cascadevlm.scorers.base import Prepared
from cascadevlm.testing import FakeScorer, picture

GREY = (90, 90, 90)
LABELS = LabelSet.of(["red bird", "blue bird", "grey bird"])
SCORES = FakeScorer(table={GREY: [2, 1, 0]}).score([picture(GREY)], LABELS)
"""0.67, 0.24, 0.09."""

BLUE = Verdict(outcome="answered", label="blue bird", judge="fake:one")
SURE = Verdict(outcome="answered", label="grey bird", probabilities={"grey bird": 0.9, "red bird": 0.1})
NONE = Verdict(outcome="none")
FAILED = Verdict(outcome="failed", error="down", judge="fake:two")
SKIPPED = Verdict(outcome="skipped", error="spent")


def item(*verdicts: Verdict) -> Item:
    made = Item(number=0, path="grey.png", prepared=Prepared(source="grey.png"), chunk=SCORES, row=0, verdicts=list(verdicts))
    rank(TopK(k=2), [made])
    return made


@pytest.mark.parametrize(
    ("verdicts", "on_failure", "label", "decided_by"),
    [
        ([], "abstain", "red bird", "scorer"),
        ([SKIPPED], "abstain", "red bird", "scorer"),
        ([BLUE], "scorer", "blue bird", "judge"),
        ([BLUE, SURE], "scorer", "grey bird", "judge"),
        ([BLUE, FAILED], "raise", "blue bird", "judge"),
        ([FAILED], "scorer", "red bird", "scorer"),
        ([FAILED], "abstain", None, None),
        ([NONE], "abstain", None, None),
        ([NONE], "raise", "red bird", "scorer"),
        ([NONE, FAILED], "raise", "red bird", "scorer"),
    ],
)
def test_the_last_answer_counts(
    verdicts: list[Verdict], on_failure: OnFailure, label: str | None, decided_by: str | None
) -> None:
    concluded = item(*verdicts).concluded(on_failure, accept=0)
    assert (concluded.label, concluded.decided_by, concluded.verdicts) == (label, decided_by, tuple(verdicts))
    assert bool(concluded.error) == (label is None)
    assert [candidate.label.name for candidate in concluded.candidates] == ["red bird", "blue bird"]


def test_no_answer_may_be_an_error() -> None:
    with pytest.raises(JudgeError, match=r"^fake:two on grey\.png: down$"):
        item(SKIPPED, FAILED).concluded("raise", accept=0)


@pytest.mark.parametrize(("verdicts", "accepted"), [([], False), ([BLUE], True), ([SURE], True)])
def test_labels_too_improbable_are_not_given_and_those_without_a_probability_are(verdicts: list[Verdict], accepted: bool) -> None:
    concluded = item(*verdicts).concluded("scorer", accept=0.8)
    assert (concluded.label is not None) == accepted

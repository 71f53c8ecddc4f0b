"""What objects look like in a notebook, and their short forms in text."""

from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadevlm import Candidate, Cascade, Label, LabelSet, Prediction, Stage, Verdict, evaluate, load_prompt
from cascadevlm.base.html import LONGEST, MOST_LISTED, THUMBNAIL, card
from cascadevlm.testing import FakeJudge, FakeScorer, noise
from tests.evaluation.test_study import record

HOSTILE = '<script>alert("x")</script>\'"><img src=x onerror=alert(1)>&amp;{0}\x1b[2J\u202e'
TAGS = {"div", "b", "table", "tr", "th", "td", "br", "img"}


class Reader(HTMLParser):
    """Collects the tags, the attributes and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def is_safe(page: str) -> Reader:
    read = Reader(page)
    assert set(read.tags) <= TAGS
    assert {name for name, _ in read.attributes} <= {"style", "src", "alt"}
    assert all(value and value.startswith("data:image/webp;base64,") for name, value in read.attributes if name == "src")
    return read


def hostile_prediction(path: str = HOSTILE) -> Prediction:
    verdict = Verdict(outcome="answered", label=HOSTILE, rationale=HOSTILE, judge=HOSTILE)
    candidate = Candidate(label=Label(name=HOSTILE), probability=0.5, rank=1)
    return Prediction(path=path, label=HOSTILE, candidates=(candidate,), reasons=(HOSTILE,), verdicts=(verdict,), error=HOSTILE)


def test_nothing_in_a_prediction_becomes_markup(tmp_path: Path) -> None:
    read = is_safe(hostile_prediction()._repr_html_())
    assert "img" not in read.tags
    assert read.text.count('<script>alert("x")</script>') == 7
    assert "\x1b" not in read.text
    assert "\u202e" not in read.text
    file = tmp_path / "\"><b onload='x'>&.png"
    noise(1).save(file)
    assert is_safe(hostile_prediction(str(file))._repr_html_()).tags.count("img") == 1


def test_nothing_in_labels_cascades_records_and_evaluations_becomes_markup() -> None:
    labels = LabelSet.of([HOSTILE, "bee"])
    judge = FakeJudge(HOSTILE)
    cascade = Cascade(FakeScorer(), [Stage(judge=judge, prompt=load_prompt("select"))], labels=labels)
    pages = [labels._repr_html_(), cascade._repr_html_(), record(1)._repr_html_(), evaluate(record(1))._repr_html_()]
    assert all(is_safe(page).text for page in pages)
    assert "<script>" in is_safe(pages[1]).text


@given(st.text(), st.text(), st.lists(st.text()))
def test_no_text_becomes_markup(title: str, name: str, values: list[str]) -> None:
    is_safe(card(title, {name: values}, path=title))


def test_what_is_shown_is_bounded(tmp_path: Path) -> None:
    noise(2, size=(2000, 900)).save(tmp_path / "large.png")
    prediction = hostile_prediction(str(tmp_path / "large.png"))
    assert len(prediction._repr_html_()) < 40_000
    assert THUMBNAIL == 128
    read = is_safe(card("x" * 10 * LONGEST, {"names": (str(number) for number in range(10**6))}))
    assert read.text.startswith("x" * LONGEST + "…names")
    assert read.text.endswith(f"{MOST_LISTED - 1}…")
    assert len(LabelSet.of(map(str, range(8000)))._repr_html_()) < 1000


@pytest.mark.parametrize("path", ["gone.jpg", "https://example.org/a.jpg", "a\0b", ".", ""])
def test_an_image_that_has_gone_is_no_error(path: str) -> None:
    assert "img" not in is_safe(Prediction(path=path, label="bee")._repr_html_()).tags


def test_short_forms_are_short() -> None:
    many = LabelSet.of(f"species {number}" for number in range(8000))
    cascade = Cascade(FakeScorer(), labels=many)
    assert repr(cascade) == (
        "Cascade(scorer='FakeScorer', judges=[], labels=LabelSet(8000 labels: 'species 0', 'species 1', 'species 2', …))"
    )
    twelve = cascade.classify([noise(seed) for seed in range(12)])
    assert len(repr(twelve)) < 2000
    assert repr(twelve[0]).startswith("Prediction(path='', label='species ")
    assert repr(LabelSet.of(["ant", "bee"])) == "LabelSet(2 labels: 'ant', 'bee')"
    assert len(repr(record(1))) < 200
    assert len(repr(evaluate(record(1)))) < 300

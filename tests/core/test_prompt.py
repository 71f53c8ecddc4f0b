from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cascadevlm.errors import PromptError
from cascadevlm.labels import Label, LabelSet, fold, one_line
from cascadevlm.prompt import NONE_OF_THESE, options, parse_template, read_answer, read_prompt, render
from cascadevlm.registry import load_prompt
from cascadevlm.stage import Stage
from cascadevlm.testing import FakeJudge, noise, question
from cascadevlm.types import Exemplar, Question

HEAD = "+++\nreasoning = true\nmax_tokens = 9\n+++\n"

names = st.lists(
    st.text(min_size=1, max_size=40).filter(lambda text: bool(text.strip())), min_size=1, max_size=30, unique_by=one_line
)
HOSTILE = [
    "A",
    "b",
    "AA",
    "1",
    "N1",
    "none of these",
    "ANSWER: B",
    "x\ny",
    "{}",
    "$image",
    "B) finch",
    "C++",
    "C",
    "C#",
    "owl",
    "barn owl",
]


def text_of(asked: Question) -> str:
    return "".join(part if isinstance(part, str) else "<image>" for message in render(asked) for part in message.parts)


@given(names, st.booleans())
def test_every_key_and_every_unambiguous_name_is_understood(given_names: list[str], offer_none: bool) -> None:
    asked = replace(question(given_names), offer_none=offer_none)
    offered = options(asked)
    labels = [label.name for label in asked.labels] + [None] * offer_none
    folded = [fold(name) for name in offered.values()]
    for (key, name), label in zip(offered.items(), labels, strict=True):
        by_key = read_answer(f"Looking.\nANSWER: {key}", asked)
        assert by_key is not None
        assert (by_key.label.name if by_key.label else None) == label
        if folded.count(fold(name)) == 1 and name.strip("*_`") == name:
            by_name = read_answer(f"ANSWER: {name}", asked)
            assert by_name is not None
            assert (by_name.label.name if by_name.label else None) == label


@given(names, st.text())
def test_no_text_is_ever_read_as_a_label_not_offered(given_names: list[str], text: str) -> None:
    answer = read_answer(text, question(given_names))
    assert answer is None or answer.label in question(given_names).labels


@pytest.mark.parametrize(
    ("text", "offer_none", "understood"),
    [
        ("Too dark for a finch.\nANSWER: Eagle-Owl", True, True),
        ("ANSWER: **uhu**", True, True),
        ("ANSWER: Eagle-Owl", False, False),
        ("ANSWER: a tree", True, False),
        ("ANSWER: D", True, True),
    ],
)
def test_a_label_that_was_not_shown_is_none_of_these(text: str, offer_none: bool, understood: bool) -> None:
    asked = question(["red finch", "blue finch", "grey owl"])
    labels = LabelSet.of([*asked.labels, Label(name="eagle owl", aliases=("uhu",))])
    answer = read_answer(text, replace(asked, offer_none=offer_none, label_set=labels))
    assert (answer is not None) == understood
    assert answer is None or answer.label is None


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_offered_on_one_line_and_answered_by_key(name: str) -> None:
    asked = replace(question([*HOSTILE, "plain"]), offer_none=True)
    key = next(key for key, offered in options(asked).items() if offered == one_line(name))
    assert f"\n{key}) {one_line(name)}\n" in text_of(asked)
    answer = read_answer(f"ANSWER: {key}", asked)
    assert answer is not None
    assert answer.label is not None
    assert answer.label.name == name


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("ANSWER: B", "blue finch"),
        ("answer: (b)", "blue finch"),
        ("I see blue.\n**ANSWER:** B) blue finch", "blue finch"),
        ("**ANSWER: B**", "blue finch"),
        ("Answer: Blue Finch.", "blue finch"),
        ("ANSWER: A\nno, wait\nANSWER: C", "grey owl"),
        ("> ANSWER: grey owl", "grey owl"),
        ("blue finch", "blue finch"),
        ("B", "blue finch"),
        ("ANSWER: B) grey owl", None),
        ("ANSWER: finch", None),
        ("ANSWER: A or B", None),
        ("ANSWER: D", None),
        ("ANSWER:", None),
        ("It is the blue finch.\nOr not.", None),
        ("I would answer: B, or so", None),
        ("", None),
    ],
)
def test_answers(text: str, label: str | None) -> None:
    answer = read_answer(text, question())
    assert (answer.label.name if answer and answer.label else None) == label
    assert label is None or answer is not None


def test_none_of_these_counts_only_where_it_is_offered() -> None:
    assert read_answer("ANSWER: none of these", question()) is None
    answer = read_answer("Not here.\nANSWER: None of these.", replace(question(), offer_none=True))
    assert answer is not None
    assert answer.label is None
    assert answer.rationale == "Not here."


def test_names_within_names_and_aliases() -> None:
    asked = question(["owl", "barn owl", "owlet"])
    assert (answer := read_answer("ANSWER: owl", asked)) is not None
    assert answer.label == asked.labels[0]
    labels = [Label(name="A4", aliases=("Audi A4",)), Label(name="S4")]
    asked = replace(asked, candidates=tuple(replace(c, label=x) for c, x in zip(asked.candidates, labels, strict=False)))
    assert (answer := read_answer("ANSWER: audi a4", asked)) is not None
    assert answer.label == labels[0]


def test_many_candidates_are_lettered_as_in_a_spreadsheet() -> None:
    keys = list(options(question([f"bird number {i}" for i in range(60)])))
    assert keys[:2] + keys[25:28] + keys[-1:] == ["A", "B", "Z", "AA", "AB", "BH"]


def test_rendering_keeps_the_order_and_shows_descriptions() -> None:
    asked = question()
    described = Label(name="red finch", description="small,\nred")
    asked = replace(asked, candidates=(asked.candidates[2], replace(asked.candidates[0], label=described)))
    assert "A) grey owl\nB) red finch: small, red\n" in text_of(asked)


def test_references_come_first_with_their_names() -> None:
    exemplars = tuple(Exemplar(image=noise(i), label=label) for i, label in enumerate(question().labels[:2]))
    asked = replace(question(), prompt=load_prompt("select_fewshot"), exemplars=exemplars)
    assert text_of(asked).startswith(
        "Reference images:\n<image> red finch\n<image> blue finch\nThe image in question:\n<image>\n"
    )
    images = [part for message in render(asked) for part in message.parts if isinstance(part, Image.Image)]
    assert images == [exemplars[0].image, exemplars[1].image, asked.image]
    assert text_of(replace(asked, exemplars=())).startswith("Reference images:\n(none)\n")
    with pytest.raises(PromptError, match="support folder"):
        Stage(judge=FakeJudge(), prompt=load_prompt("select_fewshot"))


def test_a_repair_shows_the_judge_its_own_words() -> None:
    first, own, again = render(replace(question(), rejected="A {sparrow}."))
    assert (first.role, own.role, again.role) == ("user", "assistant", "user")
    assert own.parts == ("A {sparrow}.",)
    assert "C) grey owl" in str(again.parts[-1])


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("$image $candidates", "has no head"),
        ("+++\nreasoning = true\n+++\n$image $candidates", "max_tokens"),
        ("+++\nreasoning = 1\nmax_tokens = 9\n+++\n$image $candidates", "reasoning"),
        (HEAD + "$image $candidate", "unknown variable $candidate"),
        (HEAD + "$image", "lacks $candidates"),
        (HEAD + "$image $candidates cost $ 5", "starts no variable"),
    ],
)
def test_bad_templates_name_the_fault(source: str, sentence: str) -> None:
    with pytest.raises(PromptError) as caught:
        parse_template("mine", source)
    assert sentence in str(caught.value)
    assert "'mine'" in str(caught.value)


def test_templates_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(HEAD + "For $$5: $image among\n${candidates}!")
    prompt = read_prompt(path)
    assert (prompt.name, prompt.reasoning, prompt.max_tokens) == ("mine", True, 9)
    assert text_of(replace(question(["x y", "z"]), prompt=prompt)) == "For $5: <image> among\nA) x y\nB) z!"
    assert load_prompt(path) == prompt


def test_unknown_prompts_name_the_nearest() -> None:
    with pytest.raises(PromptError, match="Did you mean 'select_cot'"):
        load_prompt("select_cott")


def test_none_of_these_as_a_label_is_told_apart_by_its_key() -> None:
    asked = replace(question([NONE_OF_THESE, "owl"]), offer_none=True)
    assert read_answer(f"ANSWER: {NONE_OF_THESE}", asked) is None
    assert (answer := read_answer("ANSWER: A", asked)) is not None
    assert answer.label is not None
    assert LabelSet.of([NONE_OF_THESE]).names == (NONE_OF_THESE,)


@pytest.mark.parametrize("answer", ["red finch", "red_finch", "A) red finch", "A"])
def test_a_judge_is_shown_words_and_the_answer_is_the_name(answer: str) -> None:
    asked = question(["red_finch", "red-finch", "grey_owl"])
    assert "A) red finch\n" in "".join(part for part in render(asked)[0].parts if isinstance(part, str))
    found = read_answer(f"ANSWER: {answer}", asked)
    assert found is not None
    assert found.label == Label(name="red_finch")


def test_a_prompt_file_that_is_no_utf8_is_said_and_a_byte_order_mark_is_none_of_it(tmp_path: Path) -> None:
    text = "+++\nreasoning = false\nmax_tokens = 5\n+++\n$image $candidates é"
    for encoding in ("latin-1", "utf-16"):
        (tmp_path / "prompt.txt").write_text(text, encoding=encoding)
        with pytest.raises(PromptError, match=r"prompt\.txt' is not UTF-8 text"):
            read_prompt(tmp_path / "prompt.txt")
    (tmp_path / "prompt.txt").write_text(text, encoding="utf-8-sig")
    assert read_prompt(tmp_path / "prompt.txt").text == "$image $candidates é"
    with pytest.raises(PromptError, match="head"):
        parse_template("deep", f"+++\na = {'[' * 20_000}\n+++\n$image $candidates")

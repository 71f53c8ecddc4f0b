import json
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadevlm.base.labels import Label, LabelSet, fold, one_line
from cascadevlm.base.types import Question, Usage
from cascadevlm.judges.answers import read_answer
from cascadevlm.judges.base import verdict_from_text
from cascadevlm.judges.prompt import NONE_OF_THESE, options, render
from cascadevlm.testing import question

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
        ("ANSWER:\xa0B", "blue finch"),
        ("ANSWER\xa0\uff1a\u3000B", "blue finch"),
        ("**Answer**\uff1a\uff08B\uff09", "blue finch"),
        ("Seen: blue.\n\n**ANSWER:**\nB) blue finch", "blue finch"),
        ("### ANSWER\nB", "blue finch"),
        ("ANSWER:\nB\nC", None),
        ("Final answer: B", "blue finch"),
        ("The final answer is **B**.", "blue finch"),
        ("The answer is not B.", None),
        ("ANSWER: B\nThe answer is clear.", "blue finch"),
        ("```\nB\n```", "blue finch"),
        ("<|begin_of_box|>B<|end_of_box|>", "blue finch"),
        ("It is blue.\n<|begin_of_box|>ANSWER: B<|end_of_box|>", "blue finch"),
        ("It is blue.\n<answer>\nB\n</answer>", "blue finch"),
        ("So it is $\\boxed{\\text{blue finch}}$.", "blue finch"),
        ("ANSWER: B<|im_end|>", "blue finch"),
        ("ANSWER: B<｜end▁of▁sentence｜>", "blue finch"),
        ("ANSWER: blue finch<end_of_utterance>", "blue finch"),
        ("<SUMMARY>Which?</SUMMARY>\n<REASONING>A or B</REASONING>\n<CONCLUSION>B</CONCLUSION>", "blue finch"),
        ("| ANSWER: B |", "blue finch"),
        ("ANSWER: ✅ B 🐦", "blue finch"),
        ("ANSWER: A/B", None),
        ("ANSWER: B\n<reasoning>Not A: it is blue.</reasoning>", "blue finch"),
        ("perhaps\nANSWER: A\n<think>no</think> or A</think>", None),
        ('```json\n{"reasoning": "x", "answer": "blue finch"}\n```', "blue finch"),
        ('Sure:\n```json\n{"answer": "B"}\n```\nAnything else?', "blue finch"),
        ('{"note": {"answer": "B"}}', "blue finch"),
        ('{"final_answer": "B"}', "blue finch"),
        ('{"reasoning": "<think> it is", "answer": "B"}', "blue finch"),
        ('{"answer": "A"} or {"answer": "B"}', None),
        ('{"answer": "A"}\nANSWER: B', None),
        ('{"answer": ["A", "B"]}', None),
        ('{"answer": null}', None),
        ('{"answer": null}\nANSWER: B', None),
        ("ANSWER: Option B", "blue finch"),
        ("ANSWER: B - blue finch", "blue finch"),
        ("ANSWER: blue finch (B)", "blue finch"),
        ("ANSWER: grey owl (B)", None),
        ("ANSWER: blue-finch", "blue finch"),
        ("ANSWER: Bluefinch", "blue finch"),
        ("ANSWER: C) gray owl", "grey owl"),
        ("ANSWER: gray owl", None),
        ("ANSWER: B) not blue finch", None),
        ("ANSWER: B or C", None),
        ("A finch", None),
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


def test_none_of_these_as_a_label_is_told_apart_by_its_key() -> None:
    asked = replace(question([NONE_OF_THESE, "owl"]), offer_none=True)
    assert read_answer(f"ANSWER: {NONE_OF_THESE}", asked) is None
    assert (answer := read_answer("ANSWER: A", asked)) is not None
    assert answer.label is not None
    assert LabelSet.of([NONE_OF_THESE]).names == (NONE_OF_THESE,)


THOUGHTS = [
    "<think>{}</think>",
    "{}</think>",
    "<thinking mode='deep'>{}</thinking>",
    "<Thought>{}</Thought>",
    "<reasoning>{}</reasoning>",
    "<seed:think>{}</seed:think>",
    "<think>{}</think><think>{}</think>",
    "[THINK]{}[/THINK]",
    "\u25c1think\u25b7{}\u25c1/think\u25b7",
    "<|begin_of_thought|>{}<|end_of_thought|>",
    "<|START_THINKING|>{}<|END_THINKING|>",
    "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>",
    "<|channel>thought\n{}<channel|>",
    "<|think_start|>{}<|think_end|>",
    "<antThinking>{}</antThinking>",
    "<cot>{}</cot>",
    "<rationale>{}</rationale>",
]


@pytest.mark.parametrize("tags", THOUGHTS)
@pytest.mark.parametrize("said", ["blue finch", "ANSWER: B", '{"answer": "B"}', "It is blue.\n**ANSWER:** B", "", "Who knows?"])
def test_thoughts_are_no_answer(tags: str, said: str) -> None:
    thought = '\nperhaps\nANSWER: A\nor {"answer": "A"}, no\n'
    answer = read_answer(tags.replace("{}", thought) + "\n" + said, question())
    assert (answer.label.name if answer and answer.label else None) == ("blue finch" if "B" in said or "blue" in said else None)
    assert answer is None or "perhaps" in answer.rationale


@pytest.mark.parametrize("tags", [tags for tags in THOUGHTS if not tags.startswith("{}")])
def test_thoughts_that_do_not_end_hold_no_answer(tags: str) -> None:
    text = tags.partition("{}")[0] + "\nANSWER: A"
    assert read_answer(text, question()) is None
    verdict = verdict_from_text(text, question(), judge="j", usage=Usage())
    assert (verdict.outcome, verdict.error) == ("unparsed", "The answer ends within the model's thoughts.")


def test_tags_in_names_are_ordinary_text() -> None:
    asked = question(["[think]", "<|im_end|> sign", "owl"])
    for label in asked.labels:
        assert (answer := read_answer(f"ANSWER: {label.name}", asked)) is not None
        assert answer.label == label


@pytest.mark.parametrize(
    ("name", "said", "other"),
    [
        ("Brewer Blackbird", "Brewer's Blackbird", "Rusty Blackbird"),
        ("Brewer's Blackbird", "Brewer Blackbird", "Rusty Blackbird"),
        ("Forsters Tern", "Forster\u2019s Tern", "Common Tern"),
        ("dentists office", "dentist's office", "office"),
        ("Red-winged Blackbird", "Redwinged Black-Bird", "Rusty Blackbird"),
        ("grey_owl", "GreyOwl", "barn_owl"),
    ],
)
def test_apostrophes_hyphens_and_spaces_do_not_tell_names_apart(name: str, said: str, other: str) -> None:
    asked = question([other, name])
    for text in (said, f"ANSWER: {said}", f"ANSWER: B) {said}", f"ANSWER: {said} (B)"):
        assert (answer := read_answer(text, asked)) is not None
        assert answer.label == asked.labels[1]
    assert read_answer(f"ANSWER: A) {said}", asked) is None


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["ringneck", "ring neck"], "ring-necks"),
        (["ring's neck", "rings neck"], "ringsneck"),
        (["12 years", "7 years"], "1-2 years"),
        (["model 11", "model 2"], "model 1.1"),
        (["737-300", "737-400"], "A) 737-500"),
        (["model 1100", "owl"], "A) model 1000"),
        (["male finch", "owl"], "A) female finch"),
    ],
)
def test_a_name_that_may_be_another_is_not_guessed(names: list[str], said: str) -> None:
    assert read_answer(f"ANSWER: {said}", question(names)) is None


def test_names_that_differ_in_punctuation_alone_are_told_apart() -> None:
    asked = question(["C++ book", "C# book", "C book"])
    for label in asked.labels:
        assert (answer := read_answer(f"ANSWER: {label.name}", asked)) is not None
        assert answer.label == label


def test_no_key_is_a_name_in_another_spelling() -> None:
    assert list(options(question(["owl", "A's"]))) == ["1", "2"]


def test_a_label_that_was_not_shown_is_not_taken_for_one_with_nearly_its_name() -> None:
    asked = question(["redwing", "owl"])
    labels = LabelSet.of([*asked.labels, "red wing", "redwink"])
    for said in ("red wing", "A) red wing", "A) redwink"):
        assert read_answer(f"ANSWER: {said}", replace(asked, label_set=labels)) is None
    assert read_answer("ANSWER: A) redwinh", replace(asked, label_set=labels)) is not None


@pytest.mark.parametrize("said", ["none", "None of the above.", "neither", "Neither of these", "none of the options", "D) none"])
def test_words_for_none_of_these(said: str) -> None:
    for text in (said, f"ANSWER: {said}", f'{{"answer": "{said}"}}'):
        assert read_answer(text, question()) is None
        assert (answer := read_answer(text, replace(question(), offer_none=True))) is not None
        assert answer.label is None
    assert (answer := read_answer("none", replace(question(["none", "owl"]), offer_none=True))) is not None
    assert answer.label == Label(name="none")


def test_a_line_as_it_was_shown_is_an_answer() -> None:
    asked = question()
    label = Label(name="red finch", description="small; red")
    asked = replace(asked, candidates=(replace(asked.candidates[0], label=label), *asked.candidates[1:]))
    assert (answer := read_answer("ANSWER: A) red finch: small; red", asked)) is not None
    assert answer.label == label


plain_names = st.lists(
    st.from_regex(r"[a-z]{3,8}( [a-z]{3,8}){0,2}", fullmatch=True), min_size=2, max_size=8, unique=True
).filter(lambda names: not {"none", "neither", "answer"} & {word for name in names for word in name.split()})
CONTENTS = [
    "{key}",
    "({key})",
    "{key}.",
    "**{key}**",
    "{key}) {name}",
    "{key}: {name}",
    "{name}",
    "{name}.",
    '"{name}"',
    "{name} ({key})",
]
FRAMES = [
    "{}",
    "ANSWER: {}",
    "Seen.\n**Answer:** {}",
    "Seen.\n\n### Final answer\n\n{}\n\nThat is all.",
    "<think>\nANSWER: {other}\n</think>\n{}",
    "[THINK]{other}[/THINK]\nANSWER\uff1a {}",
    "ANSWER: {other}\nNo, wait.\nANSWER: {}",
    "It is so.\n<answer>{}</answer>",
    "<|begin_of_box|>{}<|end_of_box|>",
    "The answer is {}",
]
JSON_FRAMES = [
    "{}",
    "```json\n{}\n```",
    "Sure:\n{}\nAnything else?",
    '<think>{{"answer": "{other}"}}</think>{}',
    "<answer>{}</answer>",
]


@given(plain_names, st.data())
def test_an_answer_in_any_dress_is_the_candidate_it_was_made_of(given_names: list[str], data: st.DataObject) -> None:
    asked = question(given_names)
    (key, name), (_, other) = data.draw(st.permutations(list(options(asked).items())))[:2]
    content = data.draw(st.sampled_from(CONTENTS)).format(key=key, name=name)
    if data.draw(st.booleans()):
        frame = data.draw(st.sampled_from(JSON_FRAMES))
        content = json.dumps({"reasoning": f"not {other}", "answer": content}, indent=data.draw(st.sampled_from([None, 2])))
    else:
        frame = data.draw(st.sampled_from(FRAMES))
    text = frame.format(content, other=other)
    answer = read_answer(text, asked)
    assert answer is not None, text
    assert answer.label is not None
    assert answer.label.name == name


@given(plain_names, st.data())
def test_an_answer_made_of_two_candidates_is_never_a_guess(given_names: list[str], data: st.DataObject) -> None:
    asked = question(given_names)
    (key, name), (other_key, other) = data.draw(st.permutations(list(options(asked).items())))[:2]
    content = data.draw(
        st.sampled_from(
            [
                "{key}) {other}",
                "{name} ({other_key})",
                "{key} or {other_key}",
                "{name} or {other}",
                "not {key}",
                "{name}, {other}",
            ]
        )
    ).format(key=key, name=name, other_key=other_key, other=other)
    frames = ["{}", "ANSWER: {}", "**ANSWER:**\n{}", '{{"answer": "{}"}}', "<think>{}", "<answer>{}</answer>"]
    text = data.draw(
        st.sampled_from(
            [*(frame.format(content) for frame in frames), f'{{"answer": "{key}"}} {{"answer": "{other}"}}', f"{name}\n{other}"]
        )
    )
    assert read_answer(text, asked) is None, text


@pytest.mark.parametrize(
    "text", ['{"' * 300_000, "<|" * 300_000, '{"a":' * 100_000, "." * 300_000, "<a_" + "a_" * 100_000, "$" * 300_000]
)
def test_a_flood_is_read_in_no_time(text: str) -> None:
    began = time.monotonic()
    assert read_answer(f"{text}\nANSWER: B", question()) is not None
    assert read_answer(text, question()) is None
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("answer", ["red finch", "red_finch", "A) red finch", "A"])
def test_a_judge_is_shown_words_and_the_answer_is_the_name(answer: str) -> None:
    asked = question(["red_finch", "red-finch", "grey_owl"])
    assert "A) red finch\n" in "".join(part for part in render(asked)[0].parts if isinstance(part, str))
    found = read_answer(f"ANSWER: {answer}", asked)
    assert found is not None
    assert found.label == Label(name="red_finch")

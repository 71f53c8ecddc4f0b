from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from cascadevlm.base.errors import PromptError
from cascadevlm.base.labels import Label
from cascadevlm.base.types import Exemplar, Question
from cascadevlm.cascade.stage import Stage
from cascadevlm.config.loading import load_prompt
from cascadevlm.judges.prompt import options, parse_template, read_prompt, render
from cascadevlm.testing import FakeJudge, noise, question

HEAD = "+++\nreasoning = true\nmax_tokens = 9\n+++\n"


def text_of(asked: Question) -> str:
    return "".join(part if isinstance(part, str) else "<image>" for message in render(asked) for part in message.parts)


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
        (HEAD + "$image $candidates cost $ 5", "without a variable"),
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

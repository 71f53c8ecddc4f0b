"""Scores and answers that were recorded elsewhere become a record that all commands read."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from cascadevlm.base.arrays import NOBODY
from cascadevlm.base.errors import DataError, InputError
from cascadevlm.cli import app
from cascadevlm.evaluation.calibrating.calibrate import calibrate
from cascadevlm.evaluation.calibrating.recipe import Recipe
from cascadevlm.evaluation.compare import compare
from cascadevlm.evaluation.metrics import evaluate
from cascadevlm.evaluation.record import Record, read_record
from cascadevlm.evaluation.sweep import sweep
from cascadevlm.evaluation.write_record import write_record

LABELS = ["ant", "bee", "cicada", "dragonfly"]


def made(size: int = 200) -> dict[str, np.ndarray]:
    """A scorer that is right in about half of the images, and a judge that is right in 9 of 10."""
    rng = np.random.default_rng(0)
    truths = rng.integers(0, 4, size)
    scores = rng.normal(0, 1, (size, 4))
    scores[np.arange(size), truths] += 1
    answers = np.where(rng.random(size) < 0.9, truths, rng.integers(0, 4, size))
    return {"scores": scores, "truths": truths, "answers": answers}


def test_a_record_of_arrays_is_swept_calibrated_and_compared(tmp_path: Path) -> None:
    arrays = made()
    record = Record.from_arrays(arrays["scores"], LABELS, arrays["truths"], answers=arrays["answers"], dollars=0.01)
    write_record(record, tmp_path / "record")
    read = read_record(tmp_path / "record")
    for each in (record, read):
        assert evaluate(each).cascade_accuracy == np.mean(arrays["answers"] == arrays["truths"])
        assert each.asked_everything
    np.testing.assert_array_equal(read.scores.log_probs, record.scores.log_probs)
    np.testing.assert_array_equal(read.judged.candidates, record.judged.candidates)
    np.testing.assert_array_equal(read.probabilities, record.probabilities)
    assert (read.judged.outcomes, read.names, read.decided_by) == (record.judged.outcomes, record.names, record.decided_by)
    assert read.judged.dollars.sum() == pytest.approx(2.0)
    assert sweep(read).judge_accuracy == np.mean(arrays["answers"] == arrays["truths"])
    assert calibrate(read, Recipe(size=100)).calibration.judges[0] is not None
    assert compare({"one": read, "other": read}).images == 200
    with pytest.raises(InputError, match="exists already"):
        write_record(record, tmp_path / "record")


def test_numbers_that_are_neither_logits_nor_probabilities_are_refused() -> None:
    arrays = made(200)
    probabilities = Record.from_arrays(arrays["scores"], LABELS, arrays["truths"]).scores.probabilities
    rounded = probabilities.round(1)
    assert (np.abs(rounded.sum(axis=1) - 1) > 0.05).any()
    for scores, told in (
        (rounded, r"only values from 0 to 1, but its rows are not probabilities: row \d+ sums to"),
        (100 * probabilities, "contains percentages"),
    ):
        with pytest.raises(DataError, match=told):
            Record.from_arrays(scores, LABELS, arrays["truths"])


@pytest.mark.parametrize("candidates", [0, -1, True, np.array([[0, 0]] * 200)])
def test_candidates_are_at_least_one_and_different(candidates: int) -> None:
    arrays = made()
    with pytest.raises(DataError, match=r"candidates is .*, not a number from 1 on|candidates names a label twice for image 0"):
        Record.from_arrays(arrays["scores"], LABELS, arrays["truths"], candidates=candidates)
    assert Record.from_arrays(arrays["scores"], LABELS, arrays["truths"], candidates=np.int64(2))  # type: ignore[arg-type]


def test_labels_are_names_or_columns_and_scores_logits_or_probabilities() -> None:
    arrays = made(20)
    by_column = Record.from_arrays(arrays["scores"], LABELS, arrays["truths"], answers=arrays["answers"])
    probabilities = by_column.scores.probabilities
    for scores in (arrays["scores"] + 7, by_column.scores.log_probs, probabilities):
        by_name = Record.from_arrays(
            scores, LABELS, [LABELS[each] for each in arrays["truths"]], answers=np.array(LABELS)[arrays["answers"]]
        )
        np.testing.assert_allclose(by_name.scores.log_probs, by_column.scores.log_probs, atol=1e-5)
        np.testing.assert_array_equal(by_name.truths, by_column.truths)
        np.testing.assert_array_equal(by_name.predicted, by_column.predicted)


def test_images_without_a_question_and_without_a_choice() -> None:
    scores = np.log([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [0.2, 0.7, 0.1]])
    answers = ["", "none of these", "ant"]
    record = Record.from_arrays(
        scores, LABELS[:3], ["ant", "bee", "ant"], answers=answers, candidates=2, dollars=np.array([1.0, 2.0, 3.0])
    )
    assert record.judged.outcomes == ("", "none", "answered")
    assert record.judged.asked.tolist() == [False, True, True]
    assert record.judged.answers.tolist() == [NOBODY, NOBODY, 0]
    assert record.judged.candidates.tolist() == [[NOBODY, NOBODY], [2, 1], [1, 0]]
    assert record.judged.dollars.tolist() == [0, 2, 3]
    assert record.predicted.tolist() == [0, 2, 0]
    assert record.decided_by == ("scorer", "scorer", "judge")
    assert record.judged.none_offered
    assert not Record.from_arrays(scores, LABELS[:3], [0, 1, 0]).stages


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"scores": np.zeros((3, 2))}, r"scores has the shape \(3, 2\), not \(N, 3\)"),
        ({"scores": np.full((3, 3), np.nan)}, "scores contains NaN or infinity"),
        ({"scores": np.array([["a"] * 3] * 3)}, "scores has the type <U1; scores are numbers"),
        ({"truths": [0, 1]}, r"truths has the shape \(2,\), and there are 3 images"),
        ({"truths": ["ant", "bee", "bees"]}, r"truths contains 'bees', which is not in the label set .* Did you mean 'bee'\?"),
        ({"truths": ["ant", "bee", ""]}, "truths contains '', which is not in the label set"),
        ({"truths": [0, 1, 3]}, "truths contains a number that is not from 0 to 2"),
        ({"answers": [0, 1, -3]}, "answers contains a number that is not from -2 to 2"),
        (
            {"answers": ["ant", "ant", "ant"], "candidates": 1},
            r"The answer 'ant' about image 1 is not one of its candidates \(2 such",
        ),
        ({"candidates": np.zeros((2, 2), int)}, r"candidates has the shape \(2, 2\), not \(3, K\)"),
        ({"dollars": [1.0]}, "dollars must be one cost, or 3 costs"),
        ({"names": ["a", "a", "b"]}, "2 different names were given for 3 images"),
    ],
)
def test_arrays_that_contradict_each_other_are_refused(changes: dict[str, object], told: str) -> None:
    given: dict[str, object] = {"scores": np.eye(3), "labels": LABELS[:3], "truths": [0, 1, 2], "answers": [0, 1, 2], **changes}
    with pytest.raises(DataError, match=told) as caught:
        Record.from_arrays(**given)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_the_command_reads_arrays_texts_and_columns(tmp_path: Path) -> None:
    arrays = made(40)
    np.save(tmp_path / "scores.npy", arrays["scores"])
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    (tmp_path / "answers.txt").write_text("".join(f"{LABELS[each]}\n" for each in arrays["answers"]))
    rows = "".join(f"{number}.png;{LABELS[each]}\n" for number, each in enumerate(arrays["truths"]))
    (tmp_path / "data.csv").write_text(f"file;kind\n{rows}")
    command = ["import", "--scores", tmp_path / "scores.npy", "--labels", tmp_path / "labels.txt", "--json"]
    command += ["--answers", tmp_path / "answers.txt", "--truths", f"{tmp_path}/data.csv:kind", "-o", tmp_path / "record"]
    command += ["--names", f"{tmp_path}/data.csv:file", "--candidates", "4", "--dollars", "0.5", "--judge", "mine"]
    done = CliRunner().invoke(app, [*map(str, command)])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output) == {"output": str(tmp_path / "record"), "images": 40, "labels": 4, "asked": 40}
    record = read_record(tmp_path / "record")
    assert (record.names[3], record.judged.judge, record.judged.dollars.sum()) == ("3.png", "mine", 20.0)
    for argv in (["sweep", "record"], ["report", "record", "-o", "page.html"], ["calibrate", "record", "-o", "calibration.json"]):
        done = CliRunner().invoke(app, [str(tmp_path / each) if "record" in each or "." in each else each for each in argv])
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize("form", ["txt", "csv", "parquet"])
def test_numbers_in_texts_are_columns_unless_they_are_labels(tmp_path: Path, form: str) -> None:
    np.save(tmp_path / "scores.npy", np.eye(3))
    answers: list[str] | list[float] = {"txt": ["2", "-1", ""], "csv": ["2", "-1", ""]}.get(form) or [2.0, -1.0, float("nan")]
    file = tmp_path / f"answers.{form}"
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"said": answers}), file)
    else:
        header = ["n,said"] if form == "csv" else []
        file.write_text("\n".join([*header, *(f"x,{each}" if header else str(each) for each in answers)]) + "\n")
    (tmp_path / "truths.txt").write_text("0\n1\n2\n")

    def record(*names: str) -> Record:
        (tmp_path / "labels.txt").write_text("\n".join(names))
        given = ("--scores", tmp_path / "scores.npy", "--labels", tmp_path / "labels.txt", "--truths", tmp_path / "truths.txt")
        column = "" if form == "txt" else ":said"
        made = ("--answers", f"{file}{column}", "-o", tmp_path / names[0])
        done = CliRunner().invoke(app, ["import", *map(str, (*given, *made))])
        assert done.exit_code == 0, done.output
        return read_record(tmp_path / names[0])

    told = record("ant", "bee", "cicada")
    assert told.truths.tolist() == [0, 1, 2]
    assert told.judged.asked.tolist() == [True, False, False]
    if form != "parquet":
        (tmp_path / "truths.txt").write_text("2\n1\n0\n")
        file.write_text(file.read_text().replace("-1", ""))
        assert record("2", "1", "0").truths.tolist() == [0, 1, 2]

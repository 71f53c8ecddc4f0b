"""A finished run is decided again."""

import io
import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from cascadevlm.base.errors import DataError
from cascadevlm.cascade import engine
from cascadevlm.cascade.learner import Learner
from cascadevlm.config.config import Config
from cascadevlm.evaluation.adapting_to_runs import read_said
from cascadevlm.runs import bulk
from cascadevlm.runs.again import decide_again
from cascadevlm.runs.corrections import CORRECTIONS, Correction, add_corrections, read_corrections
from cascadevlm.runs.export import export
from cascadevlm.runs.inputs import Inputs
from cascadevlm.runs.scored_first import ScoredImages
from tests.learning import LABELS, NAMES, Naturalist, cascade, insects, truth_of
from tests.runs.test_scored_first import Stream, files, lines, named


def test_a_run_is_decided_again_with_all_that_it_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the images, and without a question. Over 3 sets of images, at least as many predictions are right."""
    kept: list[Learner] = []

    class Kept(Learner):
        def __init__(self, *given: object) -> None:
            super().__init__(*given)  # type: ignore[arg-type]
            kept.append(self)

    monkeypatch.setattr(engine, "Learner", Kept)
    changed, rights = 0, []
    for seed in range(3):
        images, run, again = insects(400, seed, noise=70), tmp_path / f"run {seed}", tmp_path / f"again {seed}"
        running = cascade(judge := Naturalist(), policy="deferral <= 0.3")
        bulk.run(running, named(images), run, config={})
        questions = len(judge.questions)
        found = decide_again(run, again, running)
        assert len(judge.questions) == questions
        before, after = lines(run), lines(again)
        assert found.images == len(after) == 400
        for same in ("path", "verdict", "error", "reasons"):
            assert [line[same] for line in after] == [line[same] for line in before]
        assert found.changed == sum(one["label"] != other["label"] for one, other in zip(before, after, strict=True))
        changed += found.changed

        scores = ScoredImages.read(run, LABELS).rows(0, 400)
        assert scores.embeddings is not None
        best = kept[-1].learning.again()(scores.log_probs, scores.embeddings).argmax(axis=1)
        readable = [line for line in after if line["candidates"]]
        assert [(line["label"]) for line in readable if line["verdict"] is None] == [
            NAMES[column] for column, line in zip(best, readable, strict=True) if line["verdict"] is None
        ]

        truths = [NAMES[truth_of(image)] for image in images]
        rights.append([sum(line["label"] == truth for line, truth in zip(each, truths, strict=True)) for each in (before, after)])
        summary = json.loads((again / "summary.json").read_text())
        assert (summary["images"], summary["counts"]["unreadable"], summary["spent_dollars"]) == (400, 8, 0)
    assert changed > 0
    assert np.mean(rights, axis=0)[1] >= np.mean(rights, axis=0)[0]
    assert export(again, "csv", tmp_path / "table.csv").images == 400


def test_its_table_has_the_order_of_the_folder_and_the_folder_belongs_to_no_run(tmp_path: Path) -> None:
    inputs = files(tmp_path / "images", 150)
    bulk.run(cascade(), inputs, tmp_path / "run", config={})
    with pytest.raises(DataError, match="images' is not an empty folder"):
        decide_again(tmp_path / "run", tmp_path / "images", cascade())
    decide_again(tmp_path / "run", tmp_path / "again", cascade())
    table = pyarrow.parquet.read_table(tmp_path / "again" / "predictions.parquet").to_pylist()
    assert [row["path"] for row in table] == [name for name, _ in Inputs(inputs.path)]
    labels = {line["path"]: line["label"] for line in lines(tmp_path / "again")}
    assert {row["path"]: row["label"] for row in table} == labels
    with pytest.raises(DataError, match="again' is not an empty folder"):
        decide_again(tmp_path / "run", tmp_path / "again", cascade())
    with pytest.raises(DataError, match="it was made from another run by adapt --again"):
        bulk.run(cascade(), inputs, tmp_path / "again", config={})


def table(path: Path, count: int) -> Inputs:
    """A table that contains images, and after them the first image once more."""
    rows = []
    for image in insects(count):
        image.save(file := io.BytesIO(), "PNG")
        rows.append({"image": {"bytes": file.getvalue(), "path": None}})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*rows, rows[0]]), path)
    return Inputs(path)


def test_images_in_a_table_keep_their_digests_and_teach_an_adapter(tmp_path: Path) -> None:
    inputs = table(tmp_path / "images.parquet", 60)
    config = Config.parse({"scorer": {"use": "fake:fake"}, "stage": [{"judge": "fake:fake"}]}).model_dump(mode="json")
    bulk.run(cascade(), inputs, tmp_path / "run", config=config)
    decide_again(tmp_path / "run", tmp_path / "again", cascade())
    for key in ("digest", "content"):
        assert [line.get(key) for line in lines(tmp_path / "again")] == [line.get(key) for line in lines(tmp_path / "run")]
    assert len({line["content"] for line in lines(tmp_path / "again")}) == 60

    without = read_said(tmp_path / "again")  # this folder contains no scores
    assert without.scores is None
    assert (len(without.images), {type(image) for image in without.images}) == (60, {bytes})
    Path(inputs.path).rename(tmp_path / "gone")  # the scores make the images unnecessary
    scored = read_said(tmp_path / "run")
    assert scored.scores is not None
    assert len(scored.scores) == len(scored.images) == 60
    assert (scored.scores.log_probs == ScoredImages.read(tmp_path / "run", LABELS).log_probs[:60]).all()


def test_labels_of_people_teach_and_are_in_the_new_folder(tmp_path: Path) -> None:
    """They replace the answers of a judge that is always wrong. "None of the labels" only removes these answers."""
    images, run = insects(400, noise=70), tmp_path / "run"
    running = cascade(Naturalist(right=0.0), policy="always")
    bulk.run(running, named(images), run, config={})
    decide_again(run, tmp_path / "without", running)
    assert not (tmp_path / "without" / CORRECTIONS).exists()
    at = datetime.now(UTC)
    truths = [NAMES[truth_of(image)] for image in images]
    said = [Correction(image=str(number), label=truths[number], at=at, source="") for number in range(0, 400, 2)]
    add_corrections(run, said)
    decide_again(run, tmp_path / "with", running)
    assert read_corrections(tmp_path / "with").all == tuple(said)

    def right(folder: Path) -> float:
        """Of the readable images that people did not label."""
        rest = [*zip(lines(folder), truths, strict=True)][1::2]
        return float(np.mean([line["label"] == truth for line, truth in rest if line["candidates"]]))

    assert right(tmp_path / "with") > right(tmp_path / "without") + 0.02
    outside = [Correction(image=str(line["path"]), label=None, at=at, source="") for line in lines(run) if line["verdict"]]
    (run / CORRECTIONS).unlink()
    add_corrections(run, outside)
    decide_again(run, tmp_path / "outside", running)
    assert right(tmp_path / "outside") > right(tmp_path / "without") + 0.02


def test_a_run_that_cannot_be_decided_again_is_refused(tmp_path: Path) -> None:
    images, stops = named(insects(60)), iter([False] * 6)
    bulk.run(cascade(), images, tmp_path / "begun", config={}, stopping=lambda: next(stops, True))
    bulk.run(cascade(), Stream(images), tmp_path / "stream", config={})
    bulk.run(cascade(learn=False), images, tmp_path / "fixed", config={})
    for name, running, message in (
        ("begun", cascade(), "is not finished"),
        ("stream", cascade(), "did not score all its images before it decided"),
        ("fixed", cascade(learn=False), "did not learn"),
    ):
        with pytest.raises(DataError, match=message):
            decide_again(tmp_path / name, tmp_path / "again", running)
    bulk.run(cascade(follow_shares=True), images, tmp_path / "shares", config={})
    with pytest.raises(DataError, match="A run with follow_shares = true cannot be decided again"):
        decide_again(tmp_path / "shares", tmp_path / "again", cascade(follow_shares=True))

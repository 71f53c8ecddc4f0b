"""A finished run is decided again."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from cascadevlm.base.errors import DataError
from cascadevlm.cascade import engine
from cascadevlm.cascade.learner import Learner
from cascadevlm.runs import bulk
from cascadevlm.runs.again import decide_again
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
    with pytest.raises(DataError, match="contains other things than a run"):
        decide_again(tmp_path / "run", tmp_path / "images", cascade())
    decide_again(tmp_path / "run", tmp_path / "again", cascade())
    table = pyarrow.parquet.read_table(tmp_path / "again" / "predictions.parquet").to_pylist()
    assert [row["path"] for row in table] == [name for name, _ in Inputs(inputs.path)]
    labels = {line["path"]: line["label"] for line in lines(tmp_path / "again")}
    assert {row["path"]: row["label"] for row in table} == labels
    with pytest.raises(DataError, match="it was made from another run by adapt --again"):
        bulk.run(cascade(), inputs, tmp_path / "again", config={})


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

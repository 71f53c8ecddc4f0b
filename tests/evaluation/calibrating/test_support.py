"""The labelled images of a calibration as a support set."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from pydantic import JsonValue

from benchmarks.decision import made_up
from cascadevlm.base.errors import ConfigError
from cascadevlm.decision.calibration import Calibration, read_calibration
from cascadevlm.decision.scorer_calibration import FOLDS
from cascadevlm.evaluation.calibrating.fitting import fit_calibration
from cascadevlm.evaluation.calibrating.recipe import Recipe
from cascadevlm.evaluation.record import Record

CLASSES, DIMENSIONS = 6, 24


def embedded(record: Record, *, noise: float = 0.3, seed: int = 0) -> Record:
    """The record with embeddings: normally distributed around one centre per class; noise around 1 hides the classes."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(len(record.labels), DIMENSIONS)) / np.sqrt(DIMENSIONS)
    embeddings = centres[record.truths] + noise * rng.normal(size=(len(record), DIMENSIONS))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return replace(record, scores=replace(record.scores, embeddings=embeddings.astype(np.float16)))


@cache
def record() -> Record:
    return embedded(made_up(1, 300, CLASSES, 4))


@cache
def learned() -> Calibration:
    return fit_calibration(record().take(np.arange(100)), Recipe())


def test_a_calibration_keeps_its_labelled_images(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    learned().write(path)
    support, again = learned().support, read_calibration(path).support
    assert support is not None
    assert again is not None
    assert again.embeddings.dtype == np.float16
    for one, other in (
        (again.embeddings, support.embeddings),
        (again.truths, support.truths),
        (again.fit.held_out, support.fit.held_out),
        *((a.bias, b.bias) for a, b in zip(again.calibrations, support.calibrations, strict=True)),
    ):
        np.testing.assert_array_equal(one, other, strict=True)
    assert len(again.calibrations) == FOLDS + 1
    assert read_calibration(path).support_digest == learned().support_digest


def test_the_labelled_images_change_scores_only_if_they_teach() -> None:
    without = replace(learned(), teaches=False)
    assert without.calibrated_fingerprint == replace(without, support=None).calibrated_fingerprint
    teaching = replace(learned(), teaches=True)
    assert teaching.calibrated_fingerprint.endswith(f"|support={teaching.support_digest}")
    support = teaching.support
    assert support is not None
    other = replace(teaching, support=replace(support, truths=support.truths[::-1].copy()))
    assert other.calibrated_fingerprint != teaching.calibrated_fingerprint
    scores = teaching.calibrated(record().scores)
    expected = support.taught(support.nothing())(record().scores.log_probs, record().scores.embeddings)  # type: ignore[arg-type]
    np.testing.assert_allclose(scores.log_probs, expected, atol=1e-5)
    assert teaching.calibrated(scores) is scores


def test_scores_without_embeddings_are_refused_if_the_labelled_images_teach() -> None:
    bare = replace(record().scores, embeddings=None)
    with pytest.raises(ConfigError, match="uses its labelled images as a support set, which needs embeddings"):
        replace(learned(), teaches=True).calibrated(bare)
    assert replace(learned(), teaches=False).calibrated(bare).embeddings is None


def test_neither_scores_without_embeddings_nor_images_without_labels_are_a_support_set() -> None:
    bare = replace(record(), scores=replace(record().scores, embeddings=None))
    assert fit_calibration(bare, Recipe()).support is None
    assert fit_calibration(record(), Recipe(labelled=False)).support is None


def _cut(support: dict[str, JsonValue]) -> None:
    support["embeddings"] = {"shape": [2, 3], "base64": "AAAAAAAAAAAAAAAA"}


def _broken(support: dict[str, JsonValue]) -> None:
    support["embeddings"] = {"shape": [200, 3], "base64": "AAAA"}


def _infinite(support: dict[str, JsonValue]) -> None:
    support["embeddings"] = {"shape": [1, 1], "base64": "AHw="}


def _unknown(support: dict[str, JsonValue]) -> None:
    support["truths"] = {"shape": [1], "base64": "////fw=="}


@pytest.mark.parametrize("damage", [_cut, _broken, _infinite, _unknown])
def test_damaged_labelled_images_are_one_sentence(tmp_path: Path, damage: Callable[[dict[str, JsonValue]], None]) -> None:
    path = tmp_path / "calibration.json"
    learned().write(path)
    content = json.loads(path.read_text())
    damage(content["support"])
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="is not a calibration: support"):
        read_calibration(path)


def test_a_calibration_that_teaches_needs_its_images(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    learned().write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"teaches": True, "support": None}))
    with pytest.raises(ConfigError, match="there are no labelled images that teach"):
        read_calibration(path)

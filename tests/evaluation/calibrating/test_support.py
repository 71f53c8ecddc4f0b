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
from cascadevlm.base.errors import ConfigError, DataError
from cascadevlm.decision.calibration import Calibration, read_calibration
from cascadevlm.decision.conformal import Conformal
from cascadevlm.decision.scorer_calibration import FOLDS, CrossFit, ScorerCalibration
from cascadevlm.evaluation.calibrating.calibrate import calibrate
from cascadevlm.evaluation.calibrating.fitting import fit_calibration
from cascadevlm.evaluation.calibrating.recipe import Recipe
from cascadevlm.evaluation.calibrating.support_set import SupportSet
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


# whether the labelled images teach


def test_labelled_images_that_teach_are_the_default() -> None:
    bare = replace(record(), scores=replace(record().scores, embeddings=None))
    plain, taught = (calibrate(each, Recipe(size=100)) for each in (bare, record()))
    assert taught.calibration.teaches
    for result in (plain, taught):
        assert result.before == plain.before
    assert taught.after is not None
    assert plain.after is not None
    assert taught.after["accuracy"] > plain.after["accuracy"] + 0.05
    assert taught.after["log_likelihood"] > plain.after["log_likelihood"] + 0.1
    assert taught.areas is not None
    assert plain.areas is not None
    assert taught.areas[1] > plain.areas[1] + 0.02
    assert taught.supported is not None
    assert taught.calibrated is not None
    assert taught.supported["log_likelihood"] > taught.calibrated["log_likelihood"]
    assert taught.calibration.figures["teaches"] is True


def test_embeddings_that_say_nothing_change_nothing() -> None:
    hidden = embedded(record(), noise=100)
    bare = replace(record(), scores=replace(record().scores, embeddings=None))
    plain, taught = (calibrate(each, Recipe(size=100)) for each in (bare, hidden))
    assert not taught.calibration.teaches
    assert taught.calibration.support is not None
    assert taught.calibration.fitted_on == plain.calibration.fitted_on
    assert taught.calibration.conformal == plain.calibration.conformal
    assert taught.after == plain.after
    assert taught.calibration.calibrated_fingerprint == plain.calibration.calibrated_fingerprint


def test_lists_keep_their_coverage_if_the_labelled_images_teach() -> None:
    """The thresholds are those of held-out beliefs. With in-sample beliefs, which know labels by heart, the coverage is 87 %."""
    covered = []
    for seed in range(200):
        some = embedded(made_up(seed, 180, 8, 3), seed=seed, noise=0.6)
        unsure = np.log(0.15 * some.scores.probabilities + 0.85 / 8)  # so that most is learned from the embeddings
        some = replace(some, scores=replace(some.scores, log_probs=unsure))
        own, rest = some.take(np.arange(80)), some.take(np.arange(80, 180))
        support = SupportSet.of(own, identity(own), None)
        assert support is not None
        lists = Conformal.fit(np.exp(support.held_out), own.truths, coverage=0.9)
        taught = support.labelled.taught(support.labelled.nothing())
        assert rest.scores.embeddings is not None
        probabilities = np.exp(taught(rest.scores.log_probs, rest.scores.embeddings))
        covered.append(float(lists.sets(probabilities)[np.arange(100), rest.truths].mean()))
    assert 0.89 < np.mean(covered) < 0.93


def identity(record: Record) -> CrossFit:
    """The fit of a calibration that changes nothing."""
    calibration = ScorerCalibration.identity(len(record.labels))
    return CrossFit(calibration=calibration, held_out=calibration(record.scores.log_probs), without=(calibration,) * FOLDS)


# near-duplicates


def twice(record: Record) -> Record:
    """Every image, and after all of them a near-duplicate of each."""
    double = record.take(np.tile(np.arange(len(record)), 2))
    return replace(double, names=(*record.names, *(f"{name} again" for name in record.names)))


def test_near_duplicates_are_no_evidence_for_each_other() -> None:
    own = record().take(np.arange(100))
    once, double = (SupportSet.of(each, identity(each), None) for each in (own, twice(own)))
    assert once is not None
    assert double is not None
    np.testing.assert_array_equal(double.labelled.embeddings, once.labelled.embeddings)
    np.testing.assert_array_equal(double.held_out[:100], double.held_out[100:])
    truths = own.truths
    gap = double.held_out[np.arange(100), truths].mean() - once.held_out[np.arange(100), truths].mean()
    assert abs(gap) < 0.15  # the fit of the scorer's calibration differs


def test_near_duplicates_of_labelled_images_measure_nothing() -> None:
    result = calibrate(twice(record()), Recipe(size=150))
    assert result.calibration.teaches
    alike = {name.removesuffix(" again") for name in result.calibration.fitted_on}
    assert len(result.calibration.fitted_on) == 2 * len(alike)
    assert result.calibration.support is not None
    assert len(result.calibration.support.truths) == len(alike)
    with pytest.raises(DataError, match="are near-duplicates of images that were calibrated on"):
        calibrate(twice(record()), Recipe(size=595))


def test_images_that_are_all_alike_are_no_support_set() -> None:
    alike = np.ones((300, DIMENSIONS), dtype=np.float16) / np.float16(np.sqrt(DIMENSIONS))
    calibration = fit_calibration(replace(record(), scores=replace(record().scores, embeddings=alike)), Recipe())
    assert calibration.support is None
    assert not calibration.teaches

"""A recipe that exists is valid."""

import math
from typing import Any, get_args

import numpy as np
import pytest

from cascadevlm import InputError, LabelSet, Recipe, Target
from cascadevlm.evaluation.calibrating.targets import TargetKind

TARGET = Target(kind="accuracy", value=0.8)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"size": 0}, "at least 1 image, not 0"),
        ({"fusion": "median"}, "no fusion 'median'. Known: judge, bayes"),
        ({"measure": "doubt"}, "no measure 'doubt'. Known: gain, entropy, margin, top_probability"),
        ({"coverage": 1.0}, "coverage must be between 0 and 1, not 1.0"),
        ({"confidence": math.nan}, "confidence must be between 0 and 1"),
        ({"target_error": 0}, "target_error must be between 0 and 1"),
        ({"target_error": 0.1, "fusion": "judge"}, "the judge's answer has none"),
        ({"labelled": False, "target_error": 0.1}, "Targets and guarantees need labels"),
        ({"labelled": False, "class_conditional": True}, "Conformal lists need labels"),
        ({"labelled": False, "shares": {"owl": 1}}, "Only a calibration with labels is matched"),
        *[({"shares": shares}, "must not be negative") for shares in ({}, {"owl": 0}, {"a": -1, "b": 2}, {"owl": math.inf})],
        ({"shares": {"owl": math.nan}}, "must not be negative"),
    ],
)
def test_what_contradicts_itself_is_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        Recipe(**values)


@pytest.mark.parametrize("kind", get_args(TargetKind))
def test_a_target_needs_labels(kind: TargetKind) -> None:
    with pytest.raises(InputError, match="Targets and guarantees need labels"):
        Recipe(labelled=False, target=Target(kind=kind, value=0.5))


@pytest.mark.parametrize(
    ("kind", "value", "told"),
    [
        ("accuracy", 85, "between 0 and 1, not 85"),
        ("deferral_rate", -0.1, "between 0 and 1"),
        ("dollars_per_thousand", -1, "at least 0"),
        ("judge_share", math.nan, "at least 0"),
        ("speed", 1, "no target 'speed'. Known: deferral_rate"),
    ],
)
def test_a_target_out_of_range_is_refused(kind: TargetKind, value: float, told: str) -> None:
    with pytest.raises(InputError, match=told):
        Target(kind=kind, value=value)


def test_a_target_may_exceed_what_is_no_share_of_images() -> None:
    assert Target(kind="judge_share", value=1.02).value == 1.02
    assert Target(kind="dollars_per_thousand", value=40).value == 40


@pytest.mark.parametrize(("values", "parts"), [({}, 1), ({"target": TARGET}, 2), ({"target": TARGET, "target_error": 0.1}, 3)])
def test_each_promise_takes_a_part_of_the_images(values: dict[str, Any], parts: int) -> None:
    assert Recipe(**values).parts == parts


def test_the_prior_is_in_the_order_of_the_labels() -> None:
    labels = LabelSet.of(["owl", "wren"])
    prior = Recipe(shares={"wren": 3, "owl": 1}).prior(labels)
    assert prior is not None
    np.testing.assert_allclose(prior, [0.25, 0.75])
    assert Recipe().prior(labels) is None
    for shares, told in (({"owl": 1}, "'wren' has no share"), ({"owl": 1, "wren": 1, "emu": 1}, "'emu' is not a label")):
        with pytest.raises(InputError, match=told):
            Recipe(shares=shares).prior(labels)

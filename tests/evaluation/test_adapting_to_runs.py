"""Adapters from what the judge of a run said."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from scipy.special import log_softmax

from benchmarks.decision import made_up
from cascadevlm.base.arrays import NOBODY
from cascadevlm.base.errors import ConfigError
from cascadevlm.config.config import Config
from cascadevlm.decision.calibration import Calibration
from cascadevlm.evaluation.adapting_to_runs import Said, adapt_to_run
from cascadevlm.evaluation.calibrating.fitting import fit_calibration
from cascadevlm.evaluation.calibrating.recipe import Recipe
from cascadevlm.evaluation.deciding import answers_of, heard
from cascadevlm.evaluation.record import Record
from cascadevlm.scorers.adapters import Adapter
from tests.evaluation.calibrating.test_support import embedded

OWN, RUN = np.arange(80), np.arange(80, 600)


@cache
def images() -> Record:
    """The first images are labelled, the next ones are the run, the others measure."""
    made = embedded(made_up(3, 1000, 8, 4), noise=0.45)
    logits = made.scores.log_probs + np.random.default_rng(0).normal(0, 4, made.scores.log_probs.shape)  # a weak scorer
    return replace(made, scores=replace(made.scores, log_probs=log_softmax(logits, axis=1).astype(np.float32)))


@cache
def calibration() -> Calibration:
    return fit_calibration(images().take(OWN), Recipe())


def said(run: Record, calibration: Calibration | None, *, asked: float = 0.5) -> Said:
    """What the judge said about the run, if it was asked about some of its images."""
    judged = heard(run.judged) & (np.random.default_rng(0).random(len(run)) < asked)
    answers = answers_of(run.judged)
    return Said(
        images=[*run.names],
        answers=replace(answers, answers=np.where(judged, answers.answers, NOBODY)),
        heard=judged,
        truths=np.full(len(run), NOBODY),
        labels=run.labels,
        config=Config.parse({"scorer": {"use": "fake:fake"}}),
        calibration=calibration,
    )


def right(adapter: Adapter | None) -> float:
    """How often the scorer is right about images that nobody was asked about."""
    rest = images().take(np.arange(600, 1000))
    assert rest.scores.embeddings is not None
    logits = rest.scores.log_probs
    if adapter is not None:
        logits = adapter.logits(rest.scores.embeddings.astype(np.float32), logits)
    return float((logits.argmax(axis=1) == rest.truths).mean())


def test_what_a_judge_said_teaches_and_labelled_images_measure_it() -> None:
    run = images().take(RUN)
    result = adapt_to_run(run.scores, said(run, calibration()))
    nothing = adapt_to_run(run.scores.rows(slice(0, 1)), said(run.take(np.arange(1)), calibration(), asked=0))
    assert right(result.adapter) > right(nothing.adapter) > right(None) + 0.05
    assert result.measured == len(OWN)
    assert result.adapter.made.labelled == len(OWN)
    assert result.adapter.made.images == len(OWN) + len(RUN)
    assert result.after == pytest.approx(right(result.adapter), abs=0.1)  # 80 images
    support = calibration().support
    assert support is not None
    alone = support.taught(support.nothing()).held_out.argmax(axis=1) == support.truths
    assert result.before == pytest.approx(alone.mean())  # what the cascade has without the run
    without = replace(calibration(), teaches=False)
    plain = adapt_to_run(run.scores, said(run, without))
    assert plain.before == pytest.approx((support.fit.held_out.argmax(axis=1) == support.truths).mean())


def test_without_a_calibration_answers_are_truths_and_nothing_is_measured() -> None:
    run = images().take(RUN)
    result = adapt_to_run(run.scores, said(run, None))
    assert right(result.adapter) > right(None) + 0.03
    assert (result.measured, result.gain) == (0, None)
    assert result.adapter.made.labelled == 0


def test_labelled_images_in_the_run_do_not_measure_themselves() -> None:
    """What the judge said about a labelled image is no evidence for this image when the gain is measured."""
    run = images().take(RUN)
    both = images().take(np.concatenate([OWN, RUN]))
    one, other = (
        adapt_to_run(run.scores, said(run, calibration(), asked=1)),
        adapt_to_run(both.scores, said(both, calibration(), asked=1)),
    )
    assert one.after == other.after
    assert one.adapter.digest == other.adapter.digest


def test_other_scorers_and_calibrations_without_images_are_refused() -> None:
    run = images().take(RUN)
    with pytest.raises(ConfigError, match="holds no labelled images with embeddings"):
        adapt_to_run(run.scores, said(run, replace(calibration(), support=None, teaches=False)))
    with pytest.raises(ConfigError, match="was made for the scorer"):
        adapt_to_run(replace(run.scores, fingerprint="another"), said(run, calibration()))

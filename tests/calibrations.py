"""Calibrations that were not fitted."""

from collections.abc import Sequence

import numpy as np

from cascadevlm.decision.calibration import CalibratedJudge, Calibration, Reference
from cascadevlm.decision.judge_model import JudgeModel
from cascadevlm.decision.scorer_calibration import ScorerCalibration
from cascadevlm.decision.shares import Shares


def some_calibration(names: Sequence[str], model: JudgeModel, *, judge: str = "fake:fake") -> Calibration:
    """A calibration for the fake scorer, which leaves the scores unchanged, and for one judge with a well-known model."""
    classes = len(names)
    known = CalibratedJudge(
        judge=judge,
        settings={},
        model=model,
        best_size=3,
        reference=Reference(images=20_000, mean=0.0, deviation=0.4),
    )
    return Calibration(
        labels=tuple(names),
        fingerprint="fake:fake",
        scorer=ScorerCalibration.identity(classes),
        judges=(known,),
        images=20,
        labelled=True,
        fitted_on=(),
        shares=Shares(images=20, shares=np.full(classes, 1 / classes)),
    )

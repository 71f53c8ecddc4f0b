"""Observers of the tests."""

from cascadevlm.base.types import Prediction
from cascadevlm.cascade.observer import Observer


class Seen(Observer):
    """Keeps the predictions of one run."""

    def __init__(self) -> None:
        self.predictions: list[Prediction] = []

    def predicted(self, number: int, prediction: Prediction) -> None:
        self.predictions.append(prediction)

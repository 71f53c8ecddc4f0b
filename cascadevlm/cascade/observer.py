"""Observers of a run, such as the folder of a run and the watch for drift."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cascadevlm.base.types import Prediction, Question, Scores, Verdict
from cascadevlm.judges.base import Judge
from cascadevlm.scorers.base import Prepared


class Observer:
    """Sees the images, scores, verdicts and predictions of a run, and changes nothing. Subclasses override the methods that
    they need; all other methods do nothing.

    Images are numbered by their position in the input, from 0. The methods are called in the thread of the event loop, except
    `prepared`. An error that an observer raises ends the run.
    """

    def ready(self, stage: int, judge: Judge) -> None:
        """The judge of a stage was prepared; ``stage`` is the position of the stage, from 0."""

    def prepared(self, image: Prepared) -> None:
        """An image was read and will be scored. Called from many threads, in any order; not called for an image that another
        machine read.

        Raises:
            ImageError: if the image cannot be used; the error becomes the prediction of this image.
        """

    def scored(self, numbers: Sequence[int], images: Sequence[Prepared], scores: Scores) -> None:
        """N images were scored together.

        Args:
            numbers: N numbers of images, in ascending order.
            images: the N images.
            scores: ``(N, C) float32``, log-probabilities as the scorer gave them.
        """

    def judged(self, number: int, stage: int, question: Question, verdict: Verdict) -> None:
        """The judge of a stage was asked about an image. If the judge chose none of the candidates and is asked about the next
        candidates, this method is called again. All votes on one question are one verdict."""

    def believed(self, number: int, probabilities: NDArray[np.float32]) -> None:
        """All judges that are asked about an image were asked. Called in any order; not called for an image that cannot be read.

        Args:
            number: number of the image.
            probabilities: ``(C,) float32``, the probabilities of the labels after the answers. They sum to 1.
        """

    def predicted(self, number: int, prediction: Prediction) -> None:
        """The prediction of an image is known. Called in the order of the input."""

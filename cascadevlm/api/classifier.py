"""A cascade as a scikit-learn estimator."""

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d

from cascadevlm.api.cascade import Cascade
from cascadevlm.base.errors import ConfigError, DataError, ImageError, InputError
from cascadevlm.base.frames import ImageFrame, is_table
from cascadevlm.base.images import ImageSource
from cascadevlm.base.labels import LabelSet, words
from cascadevlm.base.types import Prediction, Scores
from cascadevlm.cascade.candidates import TopK
from cascadevlm.cascade.fusing import CalibratedScorer
from cascadevlm.cascade.observer import Observer
from cascadevlm.cascade.stage import require_kind
from cascadevlm.decision.calibration import Calibration
from cascadevlm.evaluation.adapting import adapt, embedded
from cascadevlm.evaluation.calibrating.fitting import fit_calibration
from cascadevlm.evaluation.calibrating.recipe import Recipe
from cascadevlm.evaluation.data import Data
from cascadevlm.evaluation.evaluate import asking_everything, record_run
from cascadevlm.policies.base import PolicyLike
from cascadevlm.scorers.adapters import Adapter
from cascadevlm.scorers.base import Scorer, WrapperScorer


class CascadeClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """A cascade as a scikit-learn estimator.

    ``X`` is N images: paths, PIL images or arrays in a list, an array ``(N,)`` or ``(N, 1)`` of paths, ``(N, H, W, 3) uint8``, or
    a table with a column of images. ``y`` is N names of labels, or N whole numbers from 0, which are positions in the label set.

    Clones share the cascade: its models are loaded once, an answer in its store is not asked for again, and its ledger limits the
    money of all clones together. So one spending limit covers a whole grid search in one process. Processes (``n_jobs``) load
    their own models, and each has what was left of the limit when it started.

    The classes are the whole label set, also if ``y`` lacks labels. ``scoring="neg_log_loss"`` then fails. Instead, give the
    names of all labels to the scoring: ``make_scorer(log_loss, response_method="predict_proba", greater_is_better=False,
    labels=sorted(names))``. ``cross_val_predict(method="predict_proba")``, ``VotingClassifier`` and ``StackingClassifier`` number
    the classes in ``y`` before they call `fit`, names in alphabetical order. This is right only if ``y`` contains all labels, and
    if it contains numbers or the label set is in alphabetical order.

    Args:
        cascade: the cascade, without a calibration. It is not changed.
        policy: the policy of the first stage. Default: the policy of the cascade.
        candidates: number of candidates that the judge of the first stage sees. Default: the candidates of the cascade.
        calibrate: true if `fit` learns from the images. False: `fit` only notes the classes, and asks nothing. Default: true.
        image: the column of images, if ``X`` is a table. Default: the only column of the table.

    Attributes:
        classes_: ``(C,)`` all labels of the cascade: their names in alphabetical order, or the numbers from 0 to C - 1.
        cascade_: the cascade that predicts.
        calibration_: the calibration; None if there is no judge or ``calibrate`` is false.
        adapter_: the adapter of a scorer without a judge; None if nothing was learned.
    """

    def __init__(
        self,
        cascade: Cascade,
        *,
        policy: PolicyLike | None = None,
        candidates: int | None = None,
        calibrate: bool = True,
        image: str | None = None,
    ) -> None:
        self.cascade = cascade
        self.policy = policy
        self.candidates = candidates
        self.calibrate = calibrate
        self.image = image

    def __sklearn_clone__(self) -> Self:
        return type(self)(**self.get_params(deep=False))

    def fit(self, X: object, y: ArrayLike) -> Self:  # scikit-learn's name
        """Calibrate on labelled images: ask the judges about every image, and learn how reliable scorer and judges are.

        If the scorer embeds images, it also learns from these images. Without a judge, the scorer alone learns, and what
        it learned is used only if it surely gains on images that were left out.

        Raises:
            ConfigError: if the cascade has a calibration, or if there is a policy or a number of candidates and no judge.
            DataError: if the images are too few to learn from, or if a label is not in the label set in this spelling.
            InputError: if ``cascade`` is not a cascade, if ``X`` is not several images, if it is a table with several columns and
                ``image`` is not set, or if ``y`` contains neither names nor whole numbers.
            ImageError: if an image cannot be read.
            ValueError: if ``X`` and ``y`` have different lengths, or if ``y`` contains no classes (from scikit-learn).
        """
        require_kind("cascade", self.cascade, Cascade, 'Cascade.from_config("cascade.toml")')
        images = self._images(X)
        check_consistent_length(images, y)
        truths, self.classes_, self._columns = _classes(y, self.cascade.labels)
        if self.calibrate and self.cascade.calibration is not None:
            raise ConfigError(
                "The cascade has a calibration already.", hint="Set calibrate=False, or use a cascade without a calibration."
            )
        cascade = self._with_candidates()
        self.calibration_: Calibration | None = None
        self.adapter_: Adapter | None = None
        if self.calibrate and cascade.stages:
            self.calibration_ = _calibration(cascade, images, truths)
            cascade = _calibrated(cascade, self.calibration_)
        elif self.calibrate:
            self.adapter_ = _adapter(cascade, images, truths)
            if self.adapter_ is not None:
                cascade = cascade.altered(scorer=_Adapted(cascade.scorer, self.adapter_))
        if self.policy is not None:
            cascade = cascade.altered(stages=(replace(cascade.stages[0], policy=self.policy), *cascade.stages[1:]))
        self.cascade_ = cascade
        return self

    def predict(self, X: object) -> NDArray[np.generic]:
        """``(N,)`` predicted classes. If the cascade abstains, this is the most probable class.

        Raises:
            InputError: if ``X`` is not several images.
            ImageError: if an image cannot be read.
            JudgeError: if a judge cannot work at all.
        """
        predictions, probabilities = self._classified(X)
        place = {self.cascade_.labels.names[column]: place for place, column in enumerate(self._columns)}
        likeliest = probabilities.argmax(axis=1).tolist()
        places = [best if each.label is None else place[each.label] for each, best in zip(predictions, likeliest, strict=True)]
        predicted: NDArray[np.generic] = self.classes_[places]
        return predicted

    def predict_proba(self, X: object) -> NDArray[np.float64]:
        """``(N, C)`` probabilities of the classes after the judges' answers, in the order of ``classes_``. They sum to 1.

        Raises: as `predict`.
        """
        return self._classified(X)[1]

    def _classified(self, given: object) -> tuple[list[Prediction], NDArray[np.float64]]:
        check_is_fitted(self, "cascade_")
        images, beliefs = self._images(given), _Beliefs()
        cascade = self.cascade_.altered(observers=[*self.cascade_.observers, beliefs])
        predictions = cascade.classify(images)
        if unread := next((prediction.error for prediction in predictions if not prediction.candidates), ""):
            raise ImageError(unread)
        rows = np.array([beliefs.rows[number] for number in range(len(images))], dtype=np.float64)
        ordered: NDArray[np.float64] = rows.reshape(len(images), -1)[:, self._columns]
        return predictions, ordered / ordered.sum(axis=1, keepdims=True)

    def _with_candidates(self) -> Cascade:
        """The cascade, with the number of candidates of this estimator."""
        if not self.cascade.stages and not (self.policy is None and self.candidates is None):
            raise ConfigError("A policy and candidates need a judge, and the cascade has none.", hint="Give the cascade a stage.")
        if self.candidates is None:
            return self.cascade
        first, *others = self.cascade.stages
        return self.cascade.altered(stages=(replace(first, candidates=TopK(k=self.candidates)), *others))

    def _images(self, given: object) -> list[ImageSource]:
        """The images of ``X``."""
        images = ImageFrame(given, self.image).images if is_table(given) else _listed(given)
        if not images:
            raise InputError("X contains no images.", hint="Give at least one image.")
        return images


def _listed(given: object) -> list[ImageSource]:
    """The images of a list or of an array.

    Raises:
        InputError: if the argument is a single image, or no list.
    """
    if isinstance(given, np.ndarray) and given.dtype.kind in "OU" and given.shape[1:] == (1,):
        given = given[:, 0]
    if isinstance(given, np.ndarray) and given.ndim not in (1, 4):
        told = f"X is an array of shape {given.shape}, not (N, H, W, 3)."
    elif isinstance(given, str | bytes) or not isinstance(given, Iterable):
        told = f"X is of type {type(given).__name__!r}, not a list of images."
    else:
        return list(cast(Iterable[ImageSource], given))
    raise InputError(told, hint="Give a list of images: [image].")


class _Beliefs(Observer):
    """Keeps the probabilities of all labels, by the number of the image."""

    def __init__(self) -> None:
        self.rows: dict[int, NDArray[np.float32]] = {}

    def believed(self, number: int, probabilities: NDArray[np.float32]) -> None:
        self.rows[number] = probabilities


class _Adapted(WrapperScorer):
    """A scorer whose scores are adapted. The scorer itself, which clones share, is not changed."""

    def __init__(self, wrapped: Scorer, adapter: Adapter) -> None:
        super().__init__(wrapped)
        self.adapter = adapter

    def altered(self, scores: Scores) -> Scores:
        assert scores.embeddings is not None
        logits = self.adapter.logits(scores.embeddings.astype(np.float32), scores.log_probs)
        fingerprint = f"{scores.fingerprint}|adapter={self.adapter.digest[:12]}"
        return Scores.from_logits(logits, scores.labels, fingerprint, embeddings=scores.embeddings)


def _classes(y: ArrayLike, labels: LabelSet) -> tuple[list[str], NDArray[np.generic], NDArray[np.intp]]:
    """The names of N true labels; the C classes; and the column of each class in the label set.

    Raises:
        DataError: if a label is not in the label set in this spelling.
        InputError: if ``y`` contains neither names nor whole numbers.
    """
    given, columns = column_or_1d(np.asarray(y), warn=True), np.arange(len(labels))
    truths = given.tolist()
    if given.dtype.kind in "iuf" or all(type(value) in (int, np.int64) for value in truths):
        check_classification_targets(given.astype(np.float64))  # refuses what is not whole
        numbers = [int(value) for value in truths]
        if outside := [value for value in numbers if not 0 <= value < len(labels)]:
            raise DataError(f"y contains {outside[0]}; the {len(labels)} labels are numbered from 0.", hint="Give names instead.")
        return [labels.names[value] for value in numbers], columns, columns
    if not all(isinstance(value, str) for value in truths):
        told = f"y contains values of these types: {', '.join(sorted({type(value).__name__ for value in truths}))}."
        raise InputError(told, hint="Give only names of labels, or only whole numbers, which are positions in the label set.")
    if unknown := sorted(set(truths) - labels.columns.keys()):
        known = labels.by_words.get(words(unknown[0]))
        hint = f"Write {known!r}: scikit-learn compares y with the predictions." if known else "Use the names of the label set."
        raise DataError(f"y contains {unknown[0]!r}, which is not in the label set.", hint=hint)
    names = np.array(labels.names)
    columns = np.argsort(names, kind="stable")
    return truths, names[columns], columns


def _calibration(cascade: Cascade, images: Sequence[ImageSource], truths: Sequence[str]) -> Calibration:
    """What the images and the answers of the judges about all of them teach."""
    names = tuple(f"#{number}" for number in range(len(images)))
    data = Data(images=images, names=names, truths=tuple(truths), splits=("",) * len(images))
    with tempfile.TemporaryDirectory() as folder, cascade.paying(Path(folder)) as running:
        record = record_run(asking_everything(running), data, Path(folder), config=cascade.described())
    _require_readable(record.readable)
    return fit_calibration(record, Recipe())


def _calibrated(cascade: Cascade, calibration: Calibration) -> Cascade:
    stages = tuple(
        replace(stage, model=judge.model, fusion=calibration.fusion)
        for stage, judge in zip(cascade.stages, calibration.judges, strict=True)
    )
    scorer = CalibratedScorer(cascade.scorer, calibration)
    return cascade.altered(scorer=scorer, stages=stages, calibration=calibration)


def _adapter(cascade: Cascade, images: Sequence[ImageSource], truths: Sequence[str]) -> Adapter | None:
    """What the images teach the scorer; None if it makes no embeddings, or gains nothing on images that were left out."""
    scores, readable = embedded(cascade, images, lambda prediction: None)
    _require_readable(readable)
    if scores.embeddings is None:
        return None
    adapted = adapt(scores, truths)
    return adapted.adapter if adapted.gains else None


def _require_readable(readable: NDArray[np.bool_]) -> None:
    """Raises ImageError if an image could not be read."""
    if not readable.all():
        number = int(np.flatnonzero(~readable)[0])
        raise ImageError(f"Image {number} of X cannot be read.", hint="Remove it from X and y, or replace it.")

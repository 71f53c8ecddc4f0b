"""The cascade: a scorer ranks all labels, policies decide which images to escalate, and judges choose among few candidates."""

from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence, Sized
from contextlib import aclosing
from copy import copy
from functools import cached_property
from io import IOBase
from pathlib import Path
from typing import Self, TypedDict, TypeGuard, Unpack, cast, get_args, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cascadevlm.base import loop
from cascadevlm.base.bounds import Count, Probability, require_number
from cascadevlm.base.errors import ConfigError, ImageError, InputError
from cascadevlm.base.frames import FrameT, ImageFrame, is_table
from cascadevlm.base.html import MOST_LISTED, card
from cascadevlm.base.images import CHANNELS, ImageSource
from cascadevlm.base.labels import Label, LabelSet
from cascadevlm.base.portable import Portable
from cascadevlm.base.progress import progress_bar
from cascadevlm.base.types import Prediction
from cascadevlm.cascade.candidates import ConformalSet
from cascadevlm.cascade.drift import Drift
from cascadevlm.cascade.engine import BEGINNING, Checkpoint, ReadBatch, Run, Settings
from cascadevlm.cascade.fusing import CalibratedScorer
from cascadevlm.cascade.item import OnFailure
from cascadevlm.cascade.learner import require_support
from cascadevlm.cascade.observer import Observer
from cascadevlm.cascade.stage import Stage, require_cascade, require_kind
from cascadevlm.decision.calibration import Calibration
from cascadevlm.decision.teaching import Transduced
from cascadevlm.judges.budget import Ledger
from cascadevlm.judges.cache import VerdictStore
from cascadevlm.judges.dependable import DependableJudges
from cascadevlm.policies.base import as_policy
from cascadevlm.scorers.base import Scorer


class Changes(TypedDict, total=False):
    """Attributes of a cascade that may be different in a copy.

    Attributes:
        reading: function that gets the number of the first image, and returns an object that reads the images in place of the
            scorer.
        observers: observers of every run (`Observer`).
        calibration: the calibration that runs are compared with to detect drift. It does not change the scorer.
        learns_from: the calibration from which runs learn; None if they do not learn.
        unlabelled: what all images of a run taught before the run (`transduced`).
    """

    scorer: Scorer
    stages: Sequence[Stage]
    on_failure: OnFailure
    routing: bool
    store: VerdictStore | None
    ledger: Ledger
    calibration: Calibration | None
    follow_shares: bool
    observers: Sequence[Observer]
    reading: Callable[[int], ReadBatch] | None
    learns_from: Calibration | None
    unlabelled: Transduced | None


class Cascade(Portable):
    """Classifies images with a scorer and one or more stages of judges.

    Args:
        scorer: the scorer, which ranks all labels for every image.
        stages: the stages, in the order in which their judges are asked. Default: no stage; the scorer decides alone.
        labels: the label set, or names.
        on_failure: how an image without an answer is predicted, see `OnFailure`. With "raise", the answer "none of these" still
            gives the scorer's label.
        accept: minimum probability of a predicted label, from 0 to 1. If the label is less probable, the prediction has no
            label. A judge's answer without a probability is always accepted. Default: 0.
        routing: true if an image may skip a judge and go to a later judge with a larger surplus. The surplus is the expected
            gain minus the gain that the policy requires. Default: false; a later stage sees the images that the judge before it
            was asked about.
        store: the store of valid verdicts. Default: no store; every question is asked.
        ledger: the budget of all calls of this cascade. Default: no cap.
        batch_size: number of images that are scored together.
        calibration: calibration of the scorer and the judges. The scorer's probabilities become calibrated. A run warns if its
            images differ from the images of the calibration (`Drift`), unless a stage has an audit.
        follow_shares: true if the scorer's probabilities follow the shares of the classes in a run (`Following`). Default:
            false.
        learn: true if the answers of the judges and the images themselves teach the scorer during a run (`Learning`). The
            calibration needs labelled images with their embeddings. Every run starts from these images. Default: false.
        observers: observers of every run (`Observer`).

    Raises:
        ConfigError: if ``follow_shares`` or ``learn`` is true and there is no calibration; if a run cannot learn from the
            calibration (`require_support`).
        InputError: if an argument has a wrong type, for example a spec in place of an object; if an argument is out of its
            bounds; if the stages do not fit together.
        PolicyError: if ``routing`` is true and a policy cannot choose between judges.
    """

    def __init__(
        self,
        scorer: Scorer,
        stages: Sequence[Stage] = (),
        *,
        labels: LabelSet | Iterable[str | Label],
        on_failure: OnFailure = "scorer",
        accept: float = 0.0,
        routing: bool = False,
        store: VerdictStore | None = None,
        ledger: Ledger | None = None,
        batch_size: int = 32,
        calibration: Calibration | None = None,
        follow_shares: bool = False,
        learn: bool = False,
        observers: Sequence[Observer] = (),
    ) -> None:
        for name, wanted in (("follow_shares", follow_shares), ("learn", learn)):
            if wanted and calibration is None:
                raise ConfigError(f"{name} needs a calibration.", hint="Make one: cascadevlm calibrate.")
        require_kind("scorer", scorer, Scorer, 'load_scorer("open_clip:aviary")')
        if isinstance(stages, str) or not isinstance(stages, Iterable):
            raise InputError(f"stages must be a list of stages, not {stages!r}.", hint="Write [Stage(…)].")
        self.stages: Sequence[Stage] = tuple(stages)
        for number, stage in enumerate(self.stages):
            require_kind(f"stages[{number}]", stage, Stage, 'Stage(judge=load_judge(…), prompt=load_prompt("select"))')
        if calibration is not None:
            require_kind("calibration", calibration, Calibration, 'read_calibration(Path("calibration.json"))')
        if store is not None:
            require_kind("store", store, VerdictStore, 'DiskStore(Path("cache"))')
        if ledger is not None:
            require_kind("ledger", ledger, Ledger, "Ledger(5.0)")
        if on_failure not in get_args(OnFailure):
            raise InputError(f"There is no on_failure {on_failure!r}.", hint=f"Known: {', '.join(get_args(OnFailure))}.")
        require_number("batch_size", batch_size, Count)
        require_number("accept", accept, Probability)
        require_cascade(self.stages, routing=routing)
        if learn and calibration is not None:
            require_support(calibration)
            _require_one_threshold(self.stages)
        self.scorer = CalibratedScorer(scorer, calibration) if calibration and not learn else scorer
        self.labels = LabelSet.of(labels)
        self.on_failure: OnFailure = on_failure
        self.accept = accept
        self.routing = routing
        self.store = store
        self.ledger = ledger or Ledger()
        self.batch_size = batch_size
        self.calibration = calibration
        self.follow_shares = follow_shares
        self.learns_from = calibration if learn else None
        self.observers = observers
        self.reading: Callable[[int], ReadBatch] | None = None
        self.unlabelled: Transduced | None = None

    def __copy__(self) -> Self:
        """A copy shares the judges and their limits with the original. A deep copy does not."""
        same = object.__new__(type(self))
        vars(same).update(vars(self), _judges=self._judges)
        return same

    def __repr__(self) -> str:
        judges = [stage.judge.spec for stage in self.stages]
        return f"{type(self).__name__}(scorer={_named(self.scorer)!r}, judges={judges!r}, labels={self.labels!r})"

    def _repr_html_(self) -> str:
        stages = [
            f"{stage.judge.spec}, policy {as_policy(stage.policy)}, at most {stage.candidates.most()} candidates, "
            f"prompt {stage.prompt.name}, decided by {stage.fusion}"
            for stage in self.stages
        ]
        cap, spent = self.ledger.cap_dollars, f"${self.ledger.spent_dollars:.4f} spent"
        rows = {
            "scorer": _named(self.scorer),
            "stages": stages,
            "labels": f"{len(self.labels)}: {', '.join(self.labels.names[:MOST_LISTED])}",
            "calibration": "" if self.calibration is None else f"fitted on {self.calibration.images} images",
            "budget": f"{spent}, no limit" if cap is None else f"{spent} of ${cap:.4f}",
        }
        return card("Cascade", rows)

    @cached_property
    def _judges(self) -> DependableJudges:
        return DependableJudges(self.store, self.ledger)

    def altered(self, **changes: Unpack[Changes]) -> Self:
        """A copy of the cascade with other values of some attributes. It shares the judges and their limits with the original."""
        altered = copy(self)
        vars(altered).update(changes)
        return altered

    @overload
    def classify(self, images: ImageSource, *, progress: bool = False) -> Prediction: ...  # type: ignore[overload-overlap]  # a str is one path
    @overload
    def classify(self, images: Iterable[ImageSource], *, progress: bool = False) -> list[Prediction]: ...
    @overload
    def classify(self, images: FrameT, *, image: str, progress: bool = False) -> FrameT: ...
    def classify(
        self, images: ImageSource | Iterable[ImageSource] | FrameT, *, image: str | None = None, progress: bool = False
    ) -> Prediction | list[Prediction] | FrameT:
        """Classify one image, or many.

        Args:
            images: one image, an iterable of images, or a table. `(N, H, W, 3)` uint8 is an array of N images. A table is a
                pandas or Polars data frame or an Arrow table; the result is then a table of the same kind, with the columns
                ``label``, ``probability``, ``decided_by``, ``escalated``, ``outcome``, ``dollars`` and ``error`` after its own
                columns. If one of many images cannot be read, its prediction has an error.
            image: the column of paths, addresses or encoded images of a table.
            progress: true to show a progress bar. Default: false.

        Raises:
            InputError: if ``images`` is an array of another shape or dtype, or a table without the column.
            ImageError: if a single image cannot be read.
            JudgeError: if a judge cannot work at all, or if a judge failed and ``on_failure`` is "raise".
        """
        return loop.run(self._classify(images, image, progress=progress))

    @overload
    async def aclassify(self, images: ImageSource) -> Prediction: ...  # type: ignore[overload-overlap]
    @overload
    async def aclassify(self, images: Iterable[ImageSource]) -> list[Prediction]: ...
    @overload
    async def aclassify(self, images: FrameT, *, image: str) -> FrameT: ...
    async def aclassify(
        self, images: ImageSource | Iterable[ImageSource] | FrameT, *, image: str | None = None
    ) -> Prediction | list[Prediction] | FrameT:
        """`classify` for asynchronous callers."""
        return await self._classify(images, image)

    async def _classify(
        self, images: ImageSource | Iterable[ImageSource] | FrameT, image: str | None, *, progress: bool = False
    ) -> Prediction | list[Prediction] | FrameT:
        if is_table(images):
            frame = ImageFrame(images, image)
            return cast(FrameT, frame.with_predictions(await self._classify_many(frame.images, progress=progress)))
        if image is not None:
            raise InputError(f"image={image!r} names a column, and images is not a table.", hint="Leave image out.")
        if not _is_one(images):
            return await self._classify_many(cast(Iterable[ImageSource], images), progress=progress)
        (prediction,) = [prediction async for prediction in self.astream([images])]
        if prediction.error and not prediction.candidates:
            raise ImageError(prediction.error)
        return prediction

    async def _classify_many(self, images: Iterable[ImageSource], *, progress: bool) -> list[Prediction]:
        _require_many(images)
        predictions, dollars = [], 0.0
        with progress_bar(len(images) if isinstance(images, Sized) else None, shown=progress) as show:
            async for prediction in self.astream(images):
                predictions.append(prediction)
                dollars += prediction.cost.dollars
                show(len(predictions), dollars)
        return predictions

    def stream(self, images: Iterable[ImageSource]) -> Iterator[Prediction]:
        """Yield predictions in input order. A prediction is yielded as soon as it and all predictions before it are known.

        Raises:
            InputError: if ``images`` is a single image, a table, or an array of another shape or dtype.
        """
        return loop.iterate(self.astream(images))

    async def astream(self, images: Iterable[ImageSource]) -> AsyncGenerator[Prediction, None]:
        """`stream` for asynchronous callers."""
        _require_many(images)
        total = len(images) if isinstance(images, Sized) else None
        async with aclosing(self.begin().predictions(images, total)) as predictions:
            async for prediction in predictions:
                yield prediction

    def begin(self, start: Checkpoint = BEGINNING, stopping: Callable[[], bool] = lambda: False) -> Run:
        """A new run, which is not started yet.

        Args:
            start: the checkpoint at which an earlier run stopped. Default: the run starts at the first image.
            stopping: function that is called before each batch. After it returns true, no further batch is started.
        """
        if self._judges.store is not self.store or self._judges.ledger is not self.ledger:
            self._judges = DependableJudges(self.store, self.ledger)
        audited = any(stage.audit is not None for stage in self.stages)
        settings = Settings(
            scorer=self.scorer,
            stages=self.stages,
            labels=self.labels,
            on_failure=self.on_failure,
            accept=self.accept,
            routing=self.routing,
            batch_size=self.batch_size,
            judges=self._judges,
            read=self.reading(start.images) if self.reading else None,
            observers=self.observers,
            drift=Drift(self.calibration, self.stages) if self.calibration and not audited else None,
            shares=self.calibration.shares if self.calibration and self.follow_shares else None,
            learns_from=self.learns_from,
            unlabelled=self.unlabelled,
        )
        return Run(settings, start, stopping)


def _named(scorer: Scorer) -> str:
    """The spec of a scorer without its wrappers, or the name of its class."""
    while isinstance(wrapped := getattr(scorer, "wrapped", None), Scorer):
        scorer = wrapped
    return scorer.spec or type(scorer).__name__


def _require_one_threshold(stages: Sequence[Stage]) -> None:
    """Raises ConfigError if lists of candidates have a threshold per class: a class has too few labelled images to fit its
    threshold again and again."""
    for stage in stages:
        if isinstance(stage.candidates, ConformalSet) and stage.candidates.rule.class_thresholds is not None:
            hint = "Calibrate without --class-conditional, or set learn = false."
            raise ConfigError("With learn = true, candidates cannot have a coverage per class.", hint=hint)


def _is_one(images: object) -> TypeGuard[ImageSource]:
    """Returns True for a single image. An array of four dimensions is several images."""
    if isinstance(images, np.ndarray):
        return images.dtype.kind in "biuf" and images.ndim != 4
    return isinstance(images, str | Path | bytes | Image.Image)


def _require_many(images: ImageSource | Iterable[ImageSource]) -> None:
    """Refuse an argument that is not a list of images.

    Raises:
        InputError: if the argument is refused. The hint names a right argument.
    """
    kind = type(images).__name__
    if _is_one(images):
        raise InputError(f"images is a single image ({kind}), not a list of images.", hint="Give a list, or use classify().")
    if isinstance(images, np.ndarray):
        _require_pixels(images)
    if is_table(images):
        raise InputError(
            f"images is a table ({kind}), not a list of images.",
            hint="Give its column of paths or images, for example table['path'], or use classify(table, image='path').",
        )
    is_tensor = hasattr(images, "__dlpack__") and not isinstance(images, np.ndarray)
    if is_tensor or isinstance(images, bytearray | memoryview | IOBase) or not isinstance(images, Iterable):
        raise InputError(f"images is of type {kind!r}, not a list of images.", hint="Give paths, bytes, PIL images or arrays.")


def _require_pixels(images: NDArray[np.generic]) -> None:
    """Refuse an array that is not `(N, H, W, 3)` or `(N, H, W, 4)` uint8.

    Raises:
        InputError: if the argument is refused. The hint names a right argument.
    """
    if images.ndim != 4:
        raise InputError(
            f"images is an array of dtype {images.dtype}; an array of images has the dtype uint8.",
            hint="Give a list: images.tolist().",
        )
    found = f"images is an array of dtype {images.dtype} and shape {images.shape}; it must be uint8 of shape (N, H, W, 3)."
    if images.shape[3] not in CHANNELS:
        raise InputError(found, hint="Move the channels to the end: images.transpose(0, 2, 3, 1).")
    if images.dtype != np.uint8:
        raise InputError(found, hint="Convert numbers from 0 to 1 first: (images * 255).round().astype('uint8').")

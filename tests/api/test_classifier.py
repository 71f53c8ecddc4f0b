"""A cascade as a scikit-learn estimator."""

import pickle
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pandas
import polars
import pyarrow
import pytest
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import log_loss, make_scorer
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import check_estimator
from sklearn.utils.validation import validate_data

from cascadevlm import Cascade, CascadeClassifier, ConfigError, DataError, ImageError, InputError, Quote, Stage, load_prompt
from cascadevlm.base.images import ImageSource
from cascadevlm.base.types import NANODOLLARS, Question
from cascadevlm.judges.budget import Ledger
from cascadevlm.judges.cache import MemoryStore, VerdictStore
from cascadevlm.scorers.base import Scorer
from cascadevlm.testing import FakeJudge, FakeScorer, noise
from tests.learning import NAMES, Naturalist, Pixels, insects, truth_of

IMAGES = insects(48)
TRUTHS = [truth_of(image) for image in IMAGES]
LATER = insects(24, seed=1)


def cascade(
    judge: FakeJudge | None = None,
    *,
    scorer: Scorer | None = None,
    ledger: Ledger | None = None,
    store: VerdictStore | None = None,
) -> Cascade:
    stages = [] if judge is None else [Stage(judge=judge, prompt=load_prompt("select"), policy="entropy > 0.5")]
    labels = list(reversed(NAMES))  # not in alphabetical order
    return Cascade(scorer or Pixels(), stages, labels=labels, ledger=ledger, store=store)


NUMBERS = [len(NAMES) - 1 - truth for truth in TRUTHS]
"""The truths as positions in the label set of `cascade`."""

WORDS = [NAMES[truth] for truth in TRUTHS]


def test_names_and_numbers_are_the_same_classes() -> None:
    by_name = CascadeClassifier(cascade(Naturalist())).fit(IMAGES, WORDS)
    by_number = CascadeClassifier(cascade(Naturalist())).fit(IMAGES, np.array(NUMBERS))
    assert by_name.classes_.tolist() == sorted(NAMES)
    assert by_number.classes_.tolist() == list(range(len(NAMES)))
    assert by_name.predict(LATER).tolist() == [NAMES[len(NAMES) - 1 - number] for number in by_number.predict(LATER)]
    assert np.allclose(by_name.predict_proba(LATER), by_number.predict_proba(LATER)[:, ::-1])
    assert by_name.score(LATER, [NAMES[truth_of(image)] for image in LATER]) > 0.8


def test_probabilities_are_those_after_asking() -> None:
    judge = Naturalist(right=0.9)
    classifier = CascadeClassifier(cascade(judge), policy="margin < 0.99").fit(IMAGES, WORDS)
    assert classifier.calibration_ is not None
    assert len(judge.questions) == len(IMAGES)
    probabilities = classifier.predict_proba(LATER)
    predictions = classifier.cascade_.classify(LATER)
    assert {prediction.decided_by for prediction in predictions} == {"fusion", "scorer"}
    assert np.allclose(probabilities.sum(axis=1), 1)
    assert np.allclose(probabilities.max(axis=1), [prediction.probability or 0 for prediction in predictions], atol=1e-5)
    assert classifier.classes_[probabilities.argmax(axis=1)].tolist() == [prediction.label for prediction in predictions]
    assert classifier.predict(LATER).tolist() == [prediction.label for prediction in predictions]


def test_a_cascade_that_abstains_still_has_a_most_probable_class() -> None:
    strict = cascade(Naturalist())
    strict.accept = 1.0
    classifier = CascadeClassifier(strict).fit(IMAGES, WORDS)
    predicted = classifier.predict(LATER)
    assert any(prediction.label is None for prediction in classifier.cascade_.classify(LATER))
    assert (predicted == classifier.classes_[classifier.predict_proba(LATER).argmax(axis=1)]).all()


def test_a_scorer_without_a_judge_learns_only_if_it_gains() -> None:
    truths = [NAMES[truth_of(image)] for image in LATER]
    bare = CascadeClassifier(cascade(), calibrate=False).fit(IMAGES, WORDS)
    adapted = CascadeClassifier(cascade()).fit(IMAGES, WORDS)
    assert adapted.adapter_ is not None
    assert adapted.score(LATER, truths) > bare.score(LATER, truths) + 0.1
    at_random = np.random.default_rng(0).permutation(WORDS)
    assert CascadeClassifier(cascade()).fit(IMAGES, at_random).adapter_ is None
    assert CascadeClassifier(cascade(scorer=FakeScorer())).fit(IMAGES, WORDS).adapter_ is None


def test_without_calibration_nothing_is_asked_in_fit() -> None:
    judge = Naturalist()
    classifier = CascadeClassifier(cascade(judge), calibrate=False).fit(IMAGES[:1], WORDS[:1])
    assert (judge.questions, classifier.calibration_) == ([], None)
    assert classifier.predict(LATER).tolist() == [prediction.label for prediction in cascade(Naturalist()).classify(LATER)]


def test_images_come_as_paths_arrays_and_columns(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{number}.png") for number in range(len(IMAGES))]
    for path, image in zip(paths, IMAGES, strict=True):
        image.save(path)
    classifier = CascadeClassifier(cascade(Naturalist())).fit(IMAGES, WORDS)
    expected = classifier.predict_proba(IMAGES)
    table = pandas.DataFrame({"path": paths, "price": 1.0})
    pixels = np.stack([np.asarray(image) for image in IMAGES])
    given = (paths, np.array(paths), np.array(paths)[:, None], list(map(Path, paths)), pixels, table["path"], table[["path"]])
    for images in given:
        assert (classifier.predict_proba(images) == expected).all()
    assert (classifier.set_params(image="path").predict_proba(table) == expected).all()
    arrow = pyarrow.Table.from_pandas(table)
    for frame in (arrow, polars.from_arrow(arrow), table.assign(path=[*map(Path, paths)])):
        assert (classifier.predict_proba(frame) == expected).all()
    with pytest.raises(ImageError, match="There is no image: the row of the table is empty"):
        classifier.predict(pandas.DataFrame({"path": [*paths, None]}))
    with pytest.raises(InputError, match="The table has no column 'photo'"):
        classifier.set_params(image="photo").predict(table)
    with pytest.raises(InputError, match=r"its column of images is not named.*'path', 'price'"):
        classifier.set_params(image=None).predict(table)


def test_a_clone_shares_the_cascade_and_nothing_that_was_learned() -> None:
    classifier = CascadeClassifier(cascade(Naturalist()), policy="margin < 0.2", candidates=3).fit(IMAGES, WORDS)
    copy = clone(classifier)
    assert copy.get_params(deep=False) == classifier.get_params(deep=False)
    assert copy.cascade is classifier.cascade
    with pytest.raises(NotFittedError):
        copy.predict(LATER)
    assert "policy='margin < 0.2'" in repr(copy)


def test_a_fitted_classifier_is_pickled_with_what_it_learned() -> None:
    fitted = CascadeClassifier(cascade()).fit(IMAGES, WORDS)
    assert (pickle.loads(pickle.dumps(fitted)).predict_proba(LATER) == fitted.predict_proba(LATER)).all()


class Priced(Naturalist):
    """Costs 100 nanodollars."""

    def __init__(self) -> None:
        super().__init__()
        self.dollars = 100 / NANODOLLARS

    def quote(self, question: Question) -> Quote:
        return Quote(worst_case=100)


GRID: dict[str, list[object]] = {"policy": ["never", "margin < 0.1", "margin < 0.3", "always"], "candidates": [2, 4]}


def asked(judge: FakeJudge) -> Counter[tuple[str, tuple[str, ...]]]:
    return Counter((question.image_digest, tuple(label.name for label in question.labels)) for question in judge.questions)


def test_a_grid_search_asks_every_question_once() -> None:
    judge = Priced()
    search = GridSearchCV(
        CascadeClassifier(cascade(judge, store=MemoryStore()), calibrate=False), GRID, cv=3, error_score="raise"
    )
    search.fit(IMAGES, WORDS)
    assert search.best_params_["policy"] != "never"
    assert len(judge.questions) == 2 * len(IMAGES)  # one per image and number of candidates
    assert max(asked(judge).values()) == 1
    judge = Priced()
    calibrated = CascadeClassifier(cascade(judge, store=MemoryStore()))
    GridSearchCV(calibrated, GRID | {"policy": ["margin < 0.3", "gain > 0.02"]}, cv=2, error_score="raise").fit(IMAGES, WORDS)
    assert max(asked(judge).values()) == 1
    assert calibrated.cascade.ledger.spent_dollars == pytest.approx(len(judge.questions) * 100 / NANODOLLARS)


@pytest.mark.parametrize("limit", [0, 30, 60, 100])
def test_one_spending_limit_covers_fit_predict_and_all_clones(limit: int) -> None:
    judge, ledger = Priced(), Ledger(limit * 100 / NANODOLLARS)
    classifier = CascadeClassifier(cascade(judge, ledger=ledger), policy="always")
    if limit == 0:
        with pytest.raises(DataError, match="answered only 0 "):
            classifier.fit(IMAGES, WORDS)
    else:
        classifier.fit(IMAGES, WORDS).predict(LATER)
        classifier.predict(insects(24, seed=2))
    assert len(judge.questions) == min(limit, 96)
    assert ledger.spent_dollars == pytest.approx(len(judge.questions) * 100 / NANODOLLARS)


def test_a_pipeline_ends_in_a_cascade() -> None:
    turned = FunctionTransformer(lambda images: [image.convert("RGB") for image in images])
    pipeline = Pipeline([("convert", turned), ("classify", CascadeClassifier(cascade(Naturalist())))])
    assert pipeline.fit(IMAGES, WORDS).predict_proba(LATER).shape == (24, 6)
    assert (
        pipeline.set_params(classify__policy="never").fit(IMAGES, WORDS).named_steps["classify"].cascade_.stages[0].policy
        == "never"
    )


def test_what_is_wrong_is_named() -> None:
    classifier = CascadeClassifier(cascade(Naturalist()))
    with pytest.raises(DataError, match="y contains 'wasp', which is not in the label set"):
        classifier.fit(IMAGES[:2], ["ant", "wasp"])
    with pytest.raises(DataError, match="y contains 6; the 6 labels are numbered from 0"):
        classifier.fit(IMAGES[:2], [0, 6])
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        classifier.fit(IMAGES[:2], WORDS[:3])
    with pytest.raises(ImageError, match=r"Image 1 of X cannot be read"):
        classifier.fit([IMAGES[0], "gone.png", *IMAGES[1:]], [WORDS[0], *WORDS])
    with pytest.raises(ImageError, match=r"'gone\.png' does not exist"):
        classifier.fit(IMAGES, WORDS).predict(["gone.png"])
    with pytest.raises(ConfigError, match="has a calibration already"):
        CascadeClassifier(classifier.cascade_).fit(IMAGES, WORDS)
    with pytest.raises(ConfigError, match="need a judge"):
        CascadeClassifier(cascade(), policy="always").fit(IMAGES, WORDS)


def test_a_single_image_is_not_several(tmp_path: Path) -> None:
    judge = Naturalist()
    fitted = CascadeClassifier(cascade(judge), calibrate=False).fit(IMAGES, WORDS)
    pixels = np.asarray(IMAGES[0])
    for single in ("a.png", tmp_path, b"image", IMAGES[0], None, pixels):
        with pytest.raises(InputError, match=r"X is .* Give a list of images: \[image\]\."):
            fitted.predict(single)
    nothing: list[object] = [[], np.array([]), pandas.DataFrame({"path": []})]
    for empty in nothing:
        with pytest.raises(InputError, match="X contains no images"):
            fitted.predict_proba(empty)
    with pytest.raises(InputError, match="X is an array of shape"):
        CascadeClassifier(cascade(judge)).fit(pixels, WORDS[: len(pixels)])
    assert judge.questions == []


def test_a_path_is_no_cascade() -> None:
    with pytest.raises(InputError, match=r"cascade must be a Cascade, not 'cascade\.toml'.*Cascade\.from_config"):
        CascadeClassifier("cascade.toml").fit(IMAGES, WORDS)  # type: ignore[arg-type]


def test_objects_are_classes_if_all_are_names_or_all_are_whole_numbers() -> None:
    classifier = CascadeClassifier(cascade(), calibrate=False)
    for numbers in (np.array(NUMBERS, dtype=object), pandas.Series(NUMBERS, dtype="Int64")):
        assert classifier.fit(IMAGES, numbers).classes_.tolist() == list(range(len(NAMES)))
    for wrong in (None, float("nan"), pandas.NA, True, 1.0):
        with pytest.raises(InputError, match=r"y contains values of these types: .*\. Give only names"):
            classifier.fit(IMAGES[:2], pandas.Series(["ant", wrong], dtype=object))


def test_y_spells_labels_as_predictions_do() -> None:
    classifier = CascadeClassifier(Cascade(FakeScorer(), [], labels=["001.Red_finch", "owl"]))
    with pytest.raises(DataError, match=r"'Red finch', which is not in .* Write '001\.Red_finch': scikit-learn compares"):
        classifier.fit(IMAGES[:2], ["Red finch", "owl"])


def test_scoring_knows_the_labels_that_y_lacks() -> None:
    some = [number for number, word in enumerate(WORDS) if word != NAMES[0]]
    scoring = make_scorer(log_loss, response_method="predict_proba", greater_is_better=False, labels=sorted(NAMES))
    images, words = [IMAGES[number] for number in some], [WORDS[number] for number in some]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of the class without images
        scores = cross_val_score(CascadeClassifier(cascade(), calibrate=False), images, words, cv=2, scoring=scoring)
    assert (scores < 0).all()


def test_cross_validated_probabilities_have_the_columns_of_numbered_classes() -> None:
    classifier = CascadeClassifier(cascade(), calibrate=False)
    crossed = cross_val_predict(classifier, IMAGES, NUMBERS, cv=2, method="predict_proba")
    assert np.allclose(crossed, classifier.fit(IMAGES, NUMBERS).predict_proba(IMAGES))


class OfRows(CascadeClassifier):
    """Draws an image from each row of numbers: scikit-learn's checks have no images."""

    def _images(self, given: object) -> list[ImageSource]:
        rows: NDArray[np.float64] = validate_data(self, given, reset=not hasattr(self, "cascade_"))
        return [noise(zlib.crc32(row.astype(np.float32).tobytes())) for row in rows]


SET = "The classes are the label set of the cascade, also those without an image in y."
BLIND = "The scorer knows the names of its labels, and cannot learn the classes of random numbers."

RULED_OUT = {
    "check_classifiers_one_label": SET,
    "check_classifiers_classes": SET,
    "check_classifiers_train": BLIND,
}
"""The checks that images rule out, each with its reason."""


def test_scikit_learn_checks_the_estimator() -> None:
    labels = [*map(str, range(10)), "one", "two", "three"]
    stage = Stage(judge=FakeJudge(), prompt=load_prompt("select"))
    classifier = OfRows(Cascade(FakeScorer(), [stage], labels=labels), calibrate=False)  # most checks have few images
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(classifier, on_fail=None, on_skip=None, expected_failed_checks=RULED_OUT)
    assert not [(each["check_name"], each["exception"]) for each in results if each["status"] == "failed"]
    assert {each["check_name"] for each in results if each["status"] == "xfail"} == RULED_OUT.keys()
    assert sum(each["status"] == "passed" for each in results) > 35

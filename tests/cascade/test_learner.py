"""A cascade that learns while it runs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from numpy.typing import NDArray
from pydantic import JsonValue

from cascadevlm import Candidate, Cascade, Observer, Prediction, Recipe, Scores, calibrate
from cascadevlm.base.errors import ConfigError, DataError, InputError
from cascadevlm.base.images import ImageSource
from cascadevlm.cascade import learner
from cascadevlm.cascade.candidates import ConformalSet
from cascadevlm.cascade.drift import Drift
from cascadevlm.cascade.fusing import CalibratedScorer
from cascadevlm.cascade.learner import Learner
from cascadevlm.config.config import Config
from cascadevlm.decision import shares
from cascadevlm.decision.conformal import Conformal
from cascadevlm.decision.distinct import keys_of
from cascadevlm.decision.learning import PERIOD
from cascadevlm.evaluation.data import Data
from cascadevlm.evaluation.record import read_record
from cascadevlm.evaluation.sharing import sharing
from cascadevlm.runs import bulk
from cascadevlm.runs.estimate import estimate
from cascadevlm.runs.inputs import Inputs, Named
from cascadevlm.runs.learned_file import read_learned
from cascadevlm.runs.run_folder import LEARNED
from cascadevlm.scorers.base import Prepared
from cascadevlm.testing import FakeJudge, FakeScorer
from tests.learning import LABELS, NAMES, OWN, Naturalist, Pixels, cascade, insects, made_calibration, truth_of


def told(predictions: Sequence[Prediction]) -> list[object]:
    return [(each.label, each.probability, each.escalated, each.reasons) for each in predictions]


def asked(predictions: Sequence[Prediction]) -> NDArray[np.bool_]:
    return np.array([each.asked for each in predictions])


def right(predictions: Sequence[Prediction], images: Sequence[ImageSource]) -> float:
    return float(np.mean([each.label == NAMES[truth_of(image)] for each, image in zip(predictions, images, strict=True)]))  # type: ignore[arg-type]


def test_with_a_judge_that_is_right_questions_become_few() -> None:
    images = insects(6 * PERIOD)
    fixed, learning = (cascade(learn=learn).classify(images) for learn in (False, True))
    first, last = asked(learning)[:PERIOD].mean(), asked(learning)[4 * PERIOD :].mean()
    assert last < first / 3
    assert abs(asked(fixed)[:PERIOD].mean() - asked(fixed)[4 * PERIOD :].mean()) < 0.1
    assert right(learning, images) > right(fixed, images)


def test_with_a_judge_that_answers_at_random_learning_costs_at_most_a_point() -> None:
    """Against the labelled images of the calibration as a support set, and nothing learned."""
    support, losses = replace(made_calibration(right=0.0), teaches=True), []
    for seed in range(20):
        images = insects(300, seed, noise=35)
        fixed, learning = (
            cascade(Naturalist(right=0.0), policy="deferral <= 0.2", learn=learn, calibration=support).classify(images)
            for learn in (False, True)
        )
        losses.append(right(fixed, images) - right(learning, images))
    assert np.mean(losses) < 0.01


@pytest.mark.parametrize("batch_size", [7, 200])
@pytest.mark.parametrize("follow_shares", [False, True])
def test_predictions_are_the_same_whatever_the_latencies(
    monkeypatch: pytest.MonkeyPatch, batch_size: int, follow_shares: bool
) -> None:
    monkeypatch.setattr(shares, "PERIOD", 64)
    images: list[ImageSource] = [b"no image" if number % 50 == 3 else image for number, image in enumerate(insects(700))]
    first, second = (
        cascade(Naturalist(seed, jitter=0.02), batch_size=batch_size, follow_shares=follow_shares).classify(images)
        for seed in (1, 2)
    )
    assert told(first) == told(second)
    assert told(first) != told(cascade(learn=False, batch_size=batch_size, follow_shares=follow_shares).classify(images))


@pytest.mark.parametrize("policy", ["gain > 0.1", "deferral <= 0.2", "accuracy >= 0.97"])
@pytest.mark.parametrize("follow_shares", [False, True])
def test_a_run_that_is_stopped_goes_on_with_what_it_learned(tmp_path: Path, policy: str, follow_shares: bool) -> None:
    images: list[Named] = [(str(number), b"no image" if number % 50 == 3 else image) for number, image in enumerate(insects(600))]

    def run(name: str, judge: FakeJudge, batches: int = 1000) -> None:
        stop = (number >= batches for number in range(1000))
        running = cascade(judge, policy=policy, follow_shares=follow_shares)
        bulk.run(running, images, tmp_path / name, config={}, stopping=partial(next, stop))

    run("whole", whole := Naturalist())
    judges = [Naturalist(seed, jitter=0.01) for seed in range(6)]
    for judge, batches in zip(judges, (3, 35, 9, 16, 0, 1000), strict=True):
        run("parts", judge, batches)
    names = ["predictions.jsonl", LEARNED]
    assert [(tmp_path / "whole" / name).read_bytes() for name in names] == [
        (tmp_path / "parts" / name).read_bytes() for name in names
    ]
    assert sum(len(judge.questions) for judge in judges) == len(whole.questions)


def test_an_image_that_comes_again_teaches_nothing_more(tmp_path: Path) -> None:
    """Whether it comes as a file, as the bytes of a file or as pixels, and whether the run is left in between."""
    different = insects(200)
    paths = [tmp_path / f"{number}.png" for number in range(200)]
    for image, path in zip(different, paths, strict=True):
        image.save(path)
    sources: list[list[ImageSource]] = [[*different], [*paths], [path.read_bytes() for path in paths]]
    predicted = []
    for kind, images in enumerate(sources):
        again = [*images, *insects(184, seed=1)] + images
        named = [(str(number), source) for number, source in enumerate(again)]
        for name, batches in ((f"whole {kind}", [1000]), (f"parts {kind}", [9, 17, 4, 1000])):
            for each in batches:
                stop = (number >= each for number in range(1000))
                bulk.run(cascade(), named, tmp_path / name, config={}, stopping=partial(next, stop))
        whole, parts = (tmp_path / f"{name} {kind}" for name in ("whole", "parts"))
        for name in ("predictions.jsonl", LEARNED):
            assert (whole / name).read_bytes() == (parts / name).read_bytes()
        learned = read_learned(whole / LEARNED).learned
        assert learned is not None
        assert learned.images == 512
        assert learned.sums.weight == learned.before.weight, "the latest period has no new image"
        lines = (whole / "predictions.jsonl").read_text().splitlines()
        predicted.append([json.loads(line)["probability"] for line in lines])
    np.testing.assert_allclose(predicted[1:], predicted[:1] * 2)


@pytest.mark.parametrize("damage", [b"", b"{}", bytes(3000)])
def test_what_was_learned_is_learned_again_if_the_file_is_damaged(tmp_path: Path, damage: bytes) -> None:
    images: list[Named] = [(str(number), image) for number, image in enumerate(insects(400))]
    for name, batches in (("whole", 1000), ("parts", 45)):
        stop = (number >= batches for number in range(1000))
        bulk.run(cascade(), images, tmp_path / name, config={}, stopping=partial(next, stop))
    learned = tmp_path / "parts" / LEARNED
    content = learned.read_bytes()
    learned.write_bytes(damage or content[:-1] + bytes([content[-1] ^ 1]))
    bulk.run(cascade(judge := Naturalist()), images, tmp_path / "parts", config={})
    lines = [(tmp_path / name / "predictions.jsonl").read_bytes() for name in ("whole", "parts")]
    assert lines[0] == lines[1]
    assert len(judge.questions) < len(images)


def test_a_record_made_while_learning_is_refused_by_calibrate(tmp_path: Path) -> None:
    images = insects(300)
    truths = tuple(NAMES[truth_of(image)] for image in images)
    data = Data(images=images, names=tuple(map(str, range(300))), truths=truths, splits=("",) * 300)
    seen = Told()
    predictions = cascade(observers=[seen]).classify(images)
    bulk.run(cascade(), data, tmp_path, config={})
    record = read_record(tmp_path)
    assert record.scores.fingerprint.endswith("|learning")
    np.testing.assert_array_equal(record.scores.log_probs, np.concatenate(seen.log_probs))
    assert [record.labels.names[column] for column in record.predicted] == [each.label for each in predictions]
    with pytest.raises(DataError, match="The scores of this record changed while the cascade learned"):
        calibrate(record, Recipe(size=100))


def test_a_run_that_learns_does_not_go_on_as_one_that_does_not(tmp_path: Path) -> None:
    images: list[Named] = [(str(number), image) for number, image in enumerate(insects(60))]
    bulk.run(cascade(), images[:40], tmp_path, config={})
    with pytest.raises(DataError, match=r"\|learning'"):
        bulk.run(cascade(learn=False), images, tmp_path, config={})


def test_a_run_goes_on_with_batches_of_the_size_it_began_with(tmp_path: Path) -> None:
    images: list[Named] = [(str(number), image) for number, image in enumerate(insects(400))]
    stop = (number >= 45 for number in range(1000))
    bulk.run(cascade(), images, tmp_path, config={}, stopping=partial(next, stop))
    with pytest.raises(InputError, match="in batches of 16 images so far, not of 8"):
        bulk.run(cascade(batch_size=8), images, tmp_path, config={})


def test_a_sorted_folder_is_decided_in_random_order_and_its_table_is_in_its_own(tmp_path: Path) -> None:
    for number, image in enumerate(insects(300)):
        path = tmp_path / "images" / NAMES[truth_of(image)] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    inputs = Inputs(tmp_path / "images", shuffled=True)
    for batches in (7, 1000):
        stop = (number >= batches for number in range(1000))
        bulk.run(cascade(), inputs, tmp_path / "run", config={}, stopping=partial(next, stop))
    lines = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    table = pyarrow.parquet.read_table(tmp_path / "run" / "predictions.parquet").to_pylist()
    assert [row["path"] for row in table] == [name for name, _ in Inputs(tmp_path / "images")]
    assert [line["path"] for line in lines] == [name for name, _ in inputs]
    assert {row["path"]: row["label"] for row in table} == {line["path"]: line["label"] for line in lines}


class Told(Observer):
    """Keeps the fingerprints and log-probabilities that it sees."""

    def __init__(self) -> None:
        self.fingerprints: set[str] = set()
        self.log_probs: list[NDArray[np.float32]] = []
        self.thresholds: list[float] = []

    def scored(self, numbers: Sequence[int], images: Sequence[Prepared], scores: Scores) -> None:
        self.fingerprints.add(scores.fingerprint)
        self.log_probs.append(scores.log_probs)
        self.thresholds.extend(scores.thresholds.values())


def test_observers_see_what_was_learned_and_drift_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    drift, seen = Told(), Told()
    monkeypatch.setattr(Drift, "scored", lambda self, *told: drift.scored(*told))
    images = insects(500)
    predictions = cascade(observers=[seen]).classify(images)
    raw = Pixels().score(images, LABELS)
    assert seen.fingerprints == {f"{raw.fingerprint}|learning"}
    assert drift.fingerprints == {made_calibration().calibrated_fingerprint}
    np.testing.assert_allclose(np.concatenate(drift.log_probs), made_calibration().calibrated(raw).log_probs, atol=1e-4)
    kept = ~asked(predictions)
    best = np.concatenate(seen.log_probs).argmax(axis=1)
    assert [NAMES[column] for column in best[kept]] == [each.label for each, keep in zip(predictions, kept, strict=True) if keep]


def test_an_estimate_is_for_the_first_images_of_a_run() -> None:
    images = insects(400)
    (first,) = estimate(cascade(), images)
    predictions = cascade().classify(images)
    assert first.deferral_rate == pytest.approx(asked(predictions)[: 2 * PERIOD].mean(), abs=0.05)


async def test_what_is_learned_does_not_contain_the_shift_to_other_shares() -> None:
    scores, said = Pixels().score(insects(16), LABELS), np.random.default_rng(0).normal(0, 1, (16, len(NAMES)))
    shift = np.array([2.0, -1.0, 0.0, 0.5, -3.0, 1.0])
    sums = []
    for each in (np.zeros(len(NAMES)), shift):
        learning = Learner(made_calibration(), 16)
        adapted = await learning.adapted(scores, 0, keys_of([""] * 16))
        decided = Scores.from_logits(adapted.log_probs + each, LABELS, "shifted")
        beliefs = Scores.from_logits(decided.log_probs + said, LABELS, "judged").probabilities
        await learning.take(decided, list(beliefs), [True] * 16, 0)
        sums.append(learning.learning.again().held_out)
    np.testing.assert_allclose(sums[0], sums[1], atol=1e-5)


async def test_a_batch_without_a_readable_image_is_passed_over() -> None:
    learning = Learner(made_calibration(), PERIOD)
    for begin in range(0, 4 * PERIOD, PERIOD):
        await learning.take(None, [], [], begin)
    assert learning.learned.images == 3 * PERIOD
    assert not learning.learned.sums.counts.any()


def test_images_that_come_class_by_class_cause_a_warning() -> None:
    images = sorted(insects(900), key=truth_of)
    with pytest.warns(RuntimeWarning, match="seem to come class by class: 'ant' has more than a third"):
        cascade().classify(images)


def test_what_a_run_learns_is_not_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2 * (6 * len(NAMES) * 16 + 16**2) * 8
    monkeypatch.setattr(learner, "MOST_BYTES", size)
    cascade()
    monkeypatch.setattr(learner, "MOST_BYTES", size - 1)
    with pytest.raises(ConfigError, match="about 6 labels and 16 dimensions has 0 MB, more than 0"):
        cascade()


def test_learning_starts_from_the_labelled_images_of_a_made_calibration() -> None:
    with pytest.raises(ConfigError, match="learn needs a calibration"):
        Cascade(Pixels(), [], labels=LABELS, learn=True)
    with pytest.raises(ConfigError, match="needs a calibration that has labelled images with embeddings"):
        cascade(calibration=replace(made_calibration(), support=None))


def test_scores_are_those_of_the_calibration_with_embeddings_and_not_yet_calibrated() -> None:
    images, options = insects(4), {"labels": LABELS, "calibration": made_calibration(), "learn": True}
    with pytest.raises(ConfigError, match="and this scorer is 'fake:fake'"):
        Cascade(FakeScorer(), [], **options).classify(images)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="these scores are calibrated already"):
        Cascade(CalibratedScorer(Pixels(), made_calibration()), [], **options).classify(images)  # type: ignore[arg-type]

    class Bare(Pixels):
        def score_embeddings(self, embeddings: NDArray[np.float32], labels: object) -> Scores:
            return replace(super().score_embeddings(embeddings, LABELS), embeddings=None)

    with pytest.raises(ConfigError, match=r"'pixels\|.*' makes no embeddings"):
        Cascade(Bare(), [], **options).classify(images)  # type: ignore[arg-type]


def covering(coverage: float, thresholds: NDArray[np.float64] | None = None, **options: object) -> Cascade:
    """A cascade that learns, whose candidates have a coverage. The threshold of its rule would take all labels."""
    (stage,) = cascade().stages
    rule = Conformal(coverage=coverage, threshold=1.0, class_thresholds=thresholds)
    stage = replace(stage, candidates=ConformalSet(rule=rule, minimum=1))
    given = {"labels": LABELS, "calibration": made_calibration(), "learn": True, "batch_size": 16} | options
    return Cascade(Pixels(), [stage], **given)  # type: ignore[arg-type]


def test_lists_with_a_coverage_have_a_threshold_that_is_fitted_again_in_each_period() -> None:
    images, seen = insects(5 * PERIOD), Told()
    predictions = covering(0.9, observers=[seen]).classify(images)
    probabilities, truths = np.exp(np.concatenate(seen.log_probs)), np.array([truth_of(image) for image in images])
    assert len({*seen.thresholds}) == 4, "the first two periods are scored by what was learned before the run"
    for begin, threshold in zip(range(0, len(images), 16), seen.thresholds, strict=True):
        rows = slice(begin, begin + 16)
        inside = Conformal(coverage=0.9, threshold=threshold).sets(probabilities[rows])
        assert [len(each.candidates) for each in predictions[rows]] == inside.sum(axis=1).tolist()
    sets = [{each.label.name for each in prediction.candidates} for prediction in predictions]
    covered = np.array([NAMES[truth] in names for truth, names in zip(truths, sets, strict=True)])
    assert covered.mean() > 0.85
    sizes = np.array([len(names) for names in sets])
    assert sizes[4 * PERIOD :].mean() < sizes[:PERIOD].mean() < len(NAMES) - 1


def test_an_estimate_has_the_threshold_of_the_first_images() -> None:
    images, seen = insects(64), Told()
    predictions = covering(0.9, observers=[seen]).classify(images)
    lists: list[int] = []
    learning = covering(0.9)
    (stage,) = learning.stages
    monitored = replace(stage, candidates=Counted(rule=stage.candidates.rule, minimum=1, lists=lists))  # type: ignore[attr-defined]
    estimate(learning.altered(stages=[monitored]), images)
    assert lists[: len(images)] == [len(each.candidates) for each in predictions]


@dataclass(frozen=True, kw_only=True)
class Counted(ConformalSet):
    """Notes the lengths of the lists that it makes."""

    lists: list[int]

    def choose(self, scores: Scores) -> list[tuple[Candidate, ...]]:
        chosen = super().choose(scores)
        self.lists.extend(map(len, chosen))
        return chosen


def test_a_coverage_per_class_is_refused() -> None:
    with pytest.raises(ConfigError, match="candidates cannot have a coverage per class"):
        covering(0.9, np.full(len(NAMES), 0.9))


def test_a_coverage_for_which_the_labelled_images_are_too_few_is_refused() -> None:
    with pytest.raises(InputError, match=f"{OWN} labelled images support a coverage of at most 0.962, not 0.99"):
        covering(0.99).classify(insects(4))


def test_a_cascade_that_learns_shares_its_scorer_with_none_that_does_not() -> None:
    """The one gives its scores without a calibration, the other with it."""
    cascades = {"learning": cascade(), "fixed": cascade(learn=False)}
    settings: dict[str, JsonValue] = {
        "scorer": {"use": "pixels"},
        "calibration": "calibration.json",
        "stage": [{"judge": "naturalist"}],
    }
    configs = {name: Config.parse(settings | {"learn": name == "learning"}) for name in cascades}
    shared = sharing(cascades, configs)
    assert isinstance(shared["fixed"].scorer, CalibratedScorer)
    assert isinstance(shared["learning"].scorer, Pixels)

"""A run that learns from what is believed of its images."""

import asyncio
from collections.abc import Callable
from dataclasses import astuple, dataclass

import numpy as np
import pytest
from scipy.special import log_softmax

from cascadevlm.base.arrays import Columns
from cascadevlm.base.errors import InputError
from cascadevlm.decision import learning as learning_module
from cascadevlm.decision.conformal import Conformal
from cascadevlm.decision.judge_fit import fit_judge
from cascadevlm.decision.judge_model import Answers, Bools, JudgeModel
from cascadevlm.decision.learning import LONGEST, Learned, Learning
from cascadevlm.decision.means import Sums
from cascadevlm.decision.scorer_calibration import FOLDS, CrossFit, Floats, ScorerCalibration
from cascadevlm.decision.teaching import UNJUDGED, Labelled, Scored, Transduced, transduced

CLASSES, DIMENSIONS, OWN, BATCH = 6, 16, 60, 16


@dataclass(frozen=True, kw_only=True)
class Made:
    """Images of normal classes, and a scorer whose prototypes are the centres with noise."""

    log_probs: Floats
    embeddings: Floats
    truths: Columns

    @classmethod
    def up(
        cls,
        seed: int,
        images: int = 1200,
        noise: float = 0.35,
        error: float = 0.3,
        classes: int = CLASSES,
        dimensions: int = DIMENSIONS,
    ) -> "Made":
        rng = np.random.default_rng(seed)
        centres = rng.normal(size=(classes, dimensions)) / np.sqrt(dimensions)
        truths = rng.integers(0, classes, images)
        embeddings = centres[truths] + noise * rng.normal(size=(images, dimensions))
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        prototypes = centres + error * rng.normal(size=centres.shape)
        prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
        return cls(log_probs=log_softmax(6 * embeddings @ prototypes.T, axis=1), embeddings=embeddings, truths=truths)

    def labelled(self, *, matrix: bool = True) -> Labelled:
        return Labelled.of(self.log_probs[:OWN], self.embeddings[:OWN], self.truths[:OWN], matrix=matrix)

    def uncalibrated(self, images: int = OWN) -> Labelled:
        """Labelled images for a scorer whose log-probabilities are not calibrated, as quickly as many draws need it."""
        identity = ScorerCalibration.identity(self.log_probs.shape[1])
        fit = CrossFit(calibration=identity, held_out=self.log_probs[:images], without=(identity,) * FOLDS)
        return Labelled(embeddings=self.embeddings[:images], truths=self.truths[:images], fit=fit)

    def rows(self, begin: int, end: int) -> Scored:
        """Of the stream, which begins after the labelled images."""
        rows = slice(OWN + begin, OWN + min(end, len(self.truths)))
        return self.log_probs[rows], self.embeddings[rows]

    def chunks(self) -> list[Scored]:
        return [self.rows(begin, begin + 100) for begin in range(0, len(self.truths) - OWN, 100)]


Decide = Callable[[int, Floats], tuple[Floats, Bools]]
"""From the number of the first image of a batch and the log-probabilities before: beliefs after, and who was asked about."""


def nobody(begin: int, before: Floats) -> tuple[Floats, Bools]:
    return np.exp(before), np.zeros(len(before), dtype=bool)


def run(
    made: Made,
    labelled: Labelled,
    decide: Decide,
    *,
    start: Learned | None = None,
    unlabelled: Transduced | None = None,
    until: int | None = None,
) -> tuple[Floats, list[Learned], Learning]:
    """The log-probabilities before any verdict, and what was learned at the beginning of each period."""

    async def runs() -> tuple[Floats, list[Learned], Learning]:
        learning, found, kept = Learning(labelled, BATCH, start=start, unlabelled=unlabelled), [], []
        for begin in range(learning.learned.images, until or len(made.truths) - OWN, BATCH):
            scored = made.rows(begin, begin + BATCH)
            before = (await learning.taught(begin))(*scored)
            await learning.take(*scored, *decide(begin, before), begin)
            found.append(before)
            kept.append(learning.learned)
        return np.concatenate(found), kept, learning

    return asyncio.run(runs())


def same(one: Sums, other: Sums) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(astuple(one), astuple(other), strict=True))


def test_without_evidence_scores_are_the_calibrated_ones() -> None:
    made = Made.up(0)
    calibration = ScorerCalibration.identity(CLASSES)
    taught = Labelled.none(calibration, DIMENSIONS).taught(Sums.zero(1, CLASSES, DIMENSIONS))
    np.testing.assert_allclose(taught(made.log_probs, made.embeddings), made.log_probs, atol=1e-12)


def test_what_was_learned_is_one_linear_rule() -> None:
    made = Made.up(0)
    labelled = made.labelled(matrix=False)
    taught = labelled.taught(transduced(labelled, made.chunks).sums)
    linear = taught.linear()
    assert linear.weights.dtype == np.float32
    assert (linear.weights.shape, linear.bias.shape) == ((CLASSES, DIMENSIONS), (CLASSES,))
    expected = taught(made.log_probs, made.embeddings)
    np.testing.assert_allclose(linear(made.log_probs, made.embeddings), expected, atol=1e-4)
    assert abs(expected - labelled.fit.calibration(made.log_probs)).max() > 0.5


def test_a_calibration_with_a_matrix_is_no_linear_rule() -> None:
    mixing = ScorerCalibration(method="matrix", scale=1.0, bias=np.zeros(CLASSES), mixing=np.zeros((CLASSES, CLASSES)))
    taught = Labelled.none(mixing, DIMENSIONS).taught(Sums.zero(1, CLASSES, DIMENSIONS))
    with pytest.raises(InputError, match="no linear rule"):
        taught.linear()


def test_each_period_is_scored_with_what_was_learned_before_its_predecessor() -> None:
    made = Made.up(1)
    labelled = made.labelled()
    found, kept, _ = run(made, labelled, nobody)
    periods = sorted({learned.images for learned in kept})
    assert periods[:3] == [0, 128, 256]
    assert periods[-1] == 1024
    sums, taught = labelled.nothing(), [labelled.taught(labelled.nothing())]
    for number, (begin, end) in enumerate(zip(periods, [*periods[1:], len(found)], strict=True)):
        scored = made.rows(begin, end)
        with_these = taught[max(number - 1, 0)]
        np.testing.assert_allclose(found[begin:end], with_these(*scored), atol=1e-9)
        sums = sums + Sums.of(scored[1], np.exp(with_these.opinions(*scored)), np.full(end - begin, UNJUDGED))
        taught.append(labelled.taught(sums))


def test_a_period_waits_for_what_it_is_scored_with_and_no_longer() -> None:
    made = Made.up(1)

    async def waits() -> None:
        learning = Learning(made.labelled(), BATCH)
        first, second, third = (asyncio.create_task(learning.taught(begin)) for begin in (0, 128, 256))
        await asyncio.sleep(0)
        for begin in range(0, 256, BATCH):
            scored = made.rows(begin, begin + BATCH)
            assert third.done() == (begin > 128)
            await learning.take(*scored, np.full((BATCH, CLASSES), 1 / CLASSES), np.zeros(BATCH, dtype=bool), begin)
            await asyncio.sleep(0)
        assert await first is await second
        assert await third is not await second

    asyncio.run(waits())


def test_periods_are_whole_batches_and_grow_with_the_run_up_to_a_length() -> None:
    for batch in (1, 7, 64, 300, 5000):
        learning = Learning(Labelled.none(ScorerCalibration.identity(2), 2), batch)
        begins = np.arange(0, 60_000, batch)[:: max(1, 100 // batch)]
        periods = np.unique([learning.period_of(int(begin)) for begin in begins])
        assert not (periods % batch).any()
        lengths = np.diff(periods)
        assert (np.diff(lengths) >= 0).all()
        assert lengths[0] == -(-128 // batch) * batch
        assert lengths[-1] == -(-LONGEST // batch) * batch


@pytest.mark.parametrize("unlabelled", [False, True])
def test_a_run_that_was_left_goes_on_with_the_same_bits(unlabelled: bool) -> None:
    made = Made.up(2)
    labelled = made.labelled()
    before = transduced(labelled, made.chunks) if unlabelled else None

    def every_third_is_known(begin: int, scores: Floats) -> tuple[Floats, Bools]:
        truths = made.truths[OWN + begin : OWN + begin + len(scores)]
        judged = np.arange(begin, begin + len(scores)) % 3 == 0
        return np.where(judged[:, None], 0.9 * np.eye(CLASSES)[truths] + 0.1 / CLASSES, np.exp(scores)), judged

    whole, kept, learning = run(made, labelled, every_third_is_known, unlabelled=before)
    for begin in {learned.images for learned in kept}:
        start = next(learned for learned in kept if learned.images == begin)
        rest, again, after = run(made, labelled, every_third_is_known, start=start, unlabelled=before)
        np.testing.assert_array_equal(rest, whole[begin:])
        assert same(again[-1].sums, kept[-1].sums)
        np.testing.assert_array_equal(after.again().held_out, learning.again().held_out)


def test_a_run_goes_on_with_batches_of_the_size_it_began_with() -> None:
    labelled = Made.up(0).labelled()
    start = Learned(batch_size=8, before=labelled.nothing(), sums=labelled.nothing())
    with pytest.raises(InputError, match="in batches of 8 images so far, not of 16"):
        Learning(labelled, 16, start=start)


def test_a_label_of_a_person_is_believed_by_all_and_replaces_what_was_guessed_before() -> None:
    made = Made.up(3, images=OWN + 256)
    labelled = made.labelled()

    def people(begin: int, before: Floats) -> tuple[Floats, Bools]:
        return np.eye(CLASSES)[made.truths[OWN + begin : OWN + begin + len(before)]], np.ones(len(before), dtype=bool)

    before = transduced(labelled, made.chunks)
    assert before.sums.weight == pytest.approx(UNJUDGED * 256)
    *_, learning = run(made, labelled, people, unlabelled=before)
    truths = np.stack([np.eye(CLASSES)[made.truths[OWN:]]] * len(labelled.calibrations))
    expected = labelled.taught(Sums.of(made.embeddings[OWN:], truths, np.ones(256)), before.fold)
    np.testing.assert_allclose(learning.again().held_out, expected.held_out, atol=1e-6)


def test_unlabelled_images_teach_whatever_chunks_they_come_in() -> None:
    made = Made.up(4)
    labelled = made.labelled()
    once, twice = (transduced(labelled, made.chunks) for _ in range(2))
    assert same(once.sums, twice.sums)
    whole = transduced(labelled, lambda: [made.rows(0, len(made.truths))])
    np.testing.assert_allclose(whole.sums.firsts, once.sums.firsts, atol=1e-6)


def right(log_probs: Floats, truths: Columns) -> float:
    return float((log_probs.argmax(axis=1) == truths).mean())


def test_what_labelled_images_teach_is_believed_as_much_as_it_is_right() -> None:
    """Also with few images per class in many dimensions, where each fold without its images teaches clearly less."""
    gaps = []
    for own, classes, noise, error in ((120, 30, 0.25, 0.3), (120, 30, 0.2, 0.3), (60, 20, 0.2, 0.4)):
        for seed in range(20):
            made = Made.up(seed, own + 600, noise, error, classes, dimensions=128)
            labelled = made.uncalibrated(own)
            found = labelled.taught(labelled.nothing())(made.log_probs[own:], made.embeddings[own:])
            gaps.append(np.exp(found.max(axis=1)).mean() - right(found, made.truths[own:]))
    assert abs(np.mean(gaps)) < 0.02


def test_unlabelled_images_and_a_support_set_make_a_scorer_better() -> None:
    gains = []
    for seed in range(5):
        made = Made.up(seed, noise=0.25)
        labelled, rest = made.labelled(), made.rows(0, 10_000)
        few = labelled.taught(labelled.nothing())(*rest)
        all_images = labelled.taught(transduced(labelled, made.chunks).sums)(*rest)
        truths = made.truths[OWN:]
        gains.append([right(each, truths) - right(labelled.fit.calibration(rest[0]), truths) for each in (few, all_images)])
    assert np.mean(gains, axis=0)[1] > np.mean(gains, axis=0)[0] > 0.03


def test_no_label_reaches_its_own_image_so_that_learned_beliefs_are_honest() -> None:
    """Over 20 sets of images, what was learned believes at most 1 point more of images to come than is right."""
    gaps = []
    for seed in range(20):
        made = Made.up(seed, images=OWN + 1700)
        *_, learning = run(made, made.labelled(), nobody, until=400)
        after = learning.again()(*made.rows(400, 1700))
        gaps.append(np.exp(after.max(axis=1)).mean() - right(after, made.truths[OWN + 400 :]))
    assert np.mean(gaps) < 0.01 + 2 * np.std(gaps) / np.sqrt(len(gaps))


def test_unlabelled_images_that_confirm_themselves_are_believed_no_more_for_it() -> None:
    """Over 8 sets of images, what is believed of the unlabelled images themselves is nearer to what is right than otherwise."""
    gaps: list[float] = []
    without: list[float] = []
    for seed in range(8):
        made = Made.up(seed, images=OWN + 400)
        labelled, scored, truths = made.labelled(), made.rows(0, 400), made.truths[OWN:]
        unlabelled = transduced(labelled, made.chunks)
        for taught, found in (
            (labelled.taught(unlabelled.sums, unlabelled.fold), gaps),
            (labelled.taught(unlabelled.sums), without),
        ):
            after = taught(*scored)
            found.append(float(np.exp(after.max(axis=1)).mean()) - right(after, truths))
    assert 0 < np.mean(gaps) < np.mean(without) - 0.003


def judge(seed: int, made: Made, accuracy: float) -> Answers:
    """Right so often, and anything else as often."""
    rng, classes = np.random.default_rng(seed), made.log_probs.shape[1]
    wrong = (made.truths + rng.integers(1, classes, len(made.truths))) % classes
    answers = np.where(rng.random(len(made.truths)) < accuracy, made.truths, wrong)
    return Answers(candidates=np.tile(np.arange(classes), (len(answers), 1)), answers=answers, none_offered=False)


def asking(made: Made, answers: Answers, model: JudgeModel, asked: list[bool], rights: list[bool]) -> Decide:
    """Asks where the gain is above 0.05."""

    def decide(begin: int, before: Floats) -> tuple[Floats, Bools]:
        rows = np.arange(OWN + begin, OWN + begin + len(before))
        judged = model.gain(before, answers.candidates[rows]) > 0.05
        after = np.where(judged[:, None], model.posterior(before, answers.rows(rows)), before)
        asked.extend(judged.tolist())
        rights.extend((after.argmax(axis=1) == made.truths[rows]).tolist())
        return np.exp(after), judged

    return decide


def both_ways(made: Made, answers: Answers) -> tuple[list[bool], float, float]:
    """Who was asked about in a run that learns; the share of right predictions in it, and in one that does not."""
    labelled = made.labelled()
    model, _ = fit_judge(labelled.fit.held_out, labelled.responsibilities, answers.rows(np.arange(OWN)))
    asked: list[bool] = []
    rights: list[bool] = []
    fixed: list[bool] = []
    run(made, labelled, asking(made, answers, model, asked, rights))
    asking(made, answers, model, [], fixed)(0, labelled.taught(labelled.nothing())(*made.rows(0, 10_000)))
    return asked, float(np.mean(rights)), float(np.mean(fixed))


def test_a_judge_that_is_always_right_is_asked_less_and_less() -> None:
    made = Made.up(0, noise=0.15, error=0.5, classes=30)
    asked, right, fixed = both_ways(made, judge(0, made, accuracy=1.0))
    assert np.mean(asked[4 * 128 :]) < np.mean(asked[:128]) / 3
    assert right > fixed - 0.01


def test_a_judge_that_answers_at_random_does_no_harm() -> None:
    """Over 20 sets of images, at most a point less is right than if nothing had been learned."""
    losses = []
    for seed in range(20):
        made = Made.up(seed, images=700, error=0.5)
        _, right, fixed = both_ways(made, judge(seed, made, accuracy=1 / CLASSES))
        losses.append(fixed - right)
    assert np.mean(losses) < 0.01


def test_lists_keep_their_coverage_while_a_run_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 200 draws of the labelled images and of the run. A judge right on 85 % is asked about the least sure images."""
    monkeypatch.setattr(learning_module, "PERIOD", 48)
    coverage, images = 0.9, 192
    covered, better = [], []

    async def draw(seed: int) -> None:
        made, rng = Made.up(seed, OWN + images), np.random.default_rng(seed)
        labelled = made.uncalibrated()
        learning, row = Learning(labelled, BATCH), np.arange(BATCH)
        for begin in range(0, images, BATCH):
            truths, scored = made.truths[OWN + begin : OWN + begin + BATCH], made.rows(begin, begin + BATCH)
            taught = await learning.taught(begin)
            before = taught(*scored)
            rule = Conformal.fit(np.exp(taught.held_out), labelled.truths, coverage=coverage)
            if begin >= images // 2:
                covered.append(rule.sets(np.exp(before))[row, truths].mean())
                better.append((before.argmax(axis=1) == truths).mean() - (scored[0].argmax(axis=1) == truths).mean())
            judged = before.max(axis=1) <= np.sort(before.max(axis=1))[3]
            said = np.where(rng.random(BATCH) < 0.85, truths, rng.integers(0, CLASSES, BATCH))
            after = log_softmax(before + 3 * np.eye(CLASSES)[said], axis=1)
            await learning.take(*scored, np.exp(after), judged, begin)

    for seed in range(200):
        asyncio.run(draw(seed))
    assert np.mean(better) > 0.05
    assert np.mean(covered) == pytest.approx(coverage, abs=0.015)

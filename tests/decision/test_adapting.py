"""Fitting adapters: what each method learns, what it does not learn, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import softmax

from cascadevlm.base.arrays import NOBODY
from cascadevlm.base.errors import DataError, InputError
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Scores
from cascadevlm.decision import adapting
from cascadevlm.decision.adapting import distinct, fit_adapter, probe
from cascadevlm.decision.means import fit_strength
from cascadevlm.scorers.adapters import METHODS, Adapter, CacheAdapter, LinearAdapter, Method

C, D = 4, 12
LABELS = LabelSet.of([f"kind {number}" for number in range(C)])


def unit(rows: NDArray[np.floating]) -> NDArray[np.float16]:
    found: NDArray[np.float16] = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    return found


def toy(images: int, *, seed: int = 0, spread: float = 0.3, sure: float = 0.5) -> tuple[Scores, NDArray[np.intp]]:
    """Scores and truths of images whose classes are far apart; the scorer is right somewhat more often than by chance."""
    rng = np.random.default_rng(seed)
    truths = np.arange(images) % C
    x = unit(np.eye(C, D)[truths] + rng.normal(scale=spread, size=(images, D)))
    logits = rng.normal(size=(images, C)) + sure * np.eye(C)[truths]
    return Scores.from_logits(logits, LABELS, "toy", embeddings=x), truths


def names(truths: NDArray[np.intp]) -> list[str]:
    return [LABELS.names[truth] for truth in truths]


def accuracy(adapter: Adapter | None, scores: Scores, truths: NDArray[np.intp]) -> float:
    assert scores.embeddings is not None
    logits = scores.log_probs if adapter is None else adapter.logits(scores.embeddings.astype(np.float32), scores.log_probs)
    return float((logits.argmax(axis=1) == truths).mean())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_what_the_embeddings_show(method: Method) -> None:
    scores, truths = toy(80)
    test, test_truths = toy(400, seed=1)
    adapter = fit_adapter(scores, names(truths), method=method)
    assert accuracy(None, test, test_truths) < 0.5
    assert accuracy(adapter, test, test_truths) > 0.9
    assert isinstance(adapter, CacheAdapter if method == "cache" else LinearAdapter)
    assert (adapter.made.method, adapter.made.images, adapter.made.labelled) == (method, 80, 80)
    assert (adapter.labels, adapter.fingerprint) == (LABELS.names, "toy")


@pytest.mark.parametrize("method", METHODS)
def test_the_same_images_give_the_same_adapter(method: Method) -> None:
    scores, truths = toy(40)
    assert len({fit_adapter(scores, names(truths), method=method).digest for _ in range(2)}) == 1


def test_a_scorer_that_knows_nothing_teaches_nothing_without_labels() -> None:
    scores, _ = toy(40)
    adapter = fit_adapter(Scores.from_logits(np.zeros((40, C)), LABELS, "toy", embeddings=scores.embeddings))
    assert isinstance(adapter, LinearAdapter)
    np.testing.assert_allclose(adapter.weights, 0, atol=1e-6)
    np.testing.assert_allclose(adapter.bias, 0, atol=1e-6)


def test_embeddings_that_show_nothing_teach_next_to_nothing() -> None:
    """The scorer is as sure as it is right, so the best choice is to leave its answers as they are."""
    rng = np.random.default_rng(3)
    logits = rng.normal(scale=2, size=(1200, C))
    truths = np.array([rng.choice(C, p=softmax(row)) for row in logits])
    scores = Scores.from_logits(logits, LABELS, "toy", embeddings=unit(rng.normal(size=(1200, D))))
    kept = {}
    for method in METHODS.values():
        adapter = fit_adapter(scores.rows(slice(0, 400)), names(truths[:400]), method=method)
        kept[method] = accuracy(adapter, scores.rows(slice(400, None)), truths[400:])
    before = accuracy(None, scores.rows(slice(400, None)), truths[400:])
    assert all(after > before - 0.02 for after in kept.values()), (before, kept)


def test_images_alone_teach_where_the_scorer_knows_a_little() -> None:
    scores, truths = toy(400, sure=1.5)
    before, after = accuracy(None, scores, truths), accuracy(fit_adapter(scores), scores, truths)
    assert after > before + 0.05
    assert fit_adapter(scores).made.labelled == 0


def test_images_without_labels_add_to_few_with_labels() -> None:
    scores, truths = toy(400, spread=0.45, sure=1.0)
    few = fit_adapter(scores.rows(slice(0, 16)), names(truths[:16]))
    both = fit_adapter(scores, [*names(truths[:16]), *[""] * 384])
    rest = scores.rows(slice(16, None))
    assert accuracy(both, rest, truths[16:]) > accuracy(few, rest, truths[16:]) + 0.05
    assert (both.made.images, both.made.labelled) == (400, 16)
    assert fit_adapter(scores, [""] * 400).digest == fit_adapter(scores).digest


def test_the_probe_is_at_its_optimum() -> None:
    """There, the gradient of the likelihood is that of the prior: Σ (p - r) x' + λ W = 0."""
    scores, truths = toy(60)
    assert scores.embeddings is not None
    x, own, beliefs = scores.embeddings.astype(np.float32), scores.log_probs.astype(np.float64), np.eye(C)[truths]
    weights, bias = probe(x, own, beliefs)
    scale, _ = fit_strength(own, np.zeros_like(own), beliefs)
    errors = softmax(scale * own + x @ weights.T + bias, axis=1) - beliefs
    gradient = errors.T @ (x - x.mean(axis=0)) + adapting.PRECISION * weights
    assert np.abs(gradient).max() < 0.02
    assert np.abs(weights).max() > 1


def test_of_near_duplicates_the_first_stands_for_all() -> None:
    scores, truths = toy(50)
    assert scores.embeddings is not None
    x = np.repeat(scores.embeddings.astype(np.float32), 2, axis=0)
    columns = np.repeat(truths, 2).astype(np.int64)
    assert distinct(x, columns).tolist() == list(range(0, 100, 2))
    columns[1] = (columns[0] + 1) % C
    columns[2:4] = NOBODY
    assert distinct(x, columns).tolist() == [0, 1, *range(4, 100, 2)]
    chain = np.array([[np.cos(angle), np.sin(angle)] for angle in (0, 0.15, 0.3, 1.0)], dtype=np.float32)
    assert distinct(chain, np.zeros(4, dtype=np.int64)).tolist() == [0, 3]


@pytest.mark.parametrize("method", METHODS)
def test_near_duplicates_do_not_feign_what_was_learned(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels at random, every image twice: an image seems to tell the label of its double."""
    rng = np.random.default_rng(0)
    truths = rng.integers(C, size=100).repeat(2)
    x = unit(rng.normal(size=(100, 40))).repeat(2, axis=0)
    logits = rng.normal(size=(200, C)) + 2 * np.eye(C)[truths]
    scores = Scores.from_logits(logits, LABELS, "toy", embeddings=x)
    test = replace(scores, log_probs=rng.permutation(scores.log_probs), embeddings=unit(rng.normal(size=(200, 40))))

    def moved() -> float:
        adapter = fit_adapter(scores, names(truths), method=method)
        assert test.embeddings is not None
        logits = adapter.logits(test.embeddings.astype(np.float32), test.log_probs) / adapter.own
        return float(np.abs(logits - test.log_probs).std())

    honest = moved()
    monkeypatch.setattr(adapting, "NEAR_DUPLICATE", 1.5)
    assert moved() > 2 * honest


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, truths = toy(40)
    given = names(truths)
    with pytest.raises(InputError, match="have no embeddings"):
        fit_adapter(replace(scores, embeddings=None), given)
    with pytest.raises(InputError, match=r"made with an adapter\. Score the images without it"):
        fit_adapter(replace(scores, fingerprint="toy|adapter=abc"), given)
    assert scores.embeddings is not None
    with pytest.raises(InputError, match=r"do not have length 1\. Make the scores with scorer\.score_embeddings"):
        fit_adapter(replace(scores, embeddings=2 * scores.embeddings), given)
    with pytest.raises(InputError, match=r"There is no method 'liner'\. Known: means, cache, linear\."):
        fit_adapter(scores, given, method="liner")  # type: ignore[arg-type]
    for method in ("cache", "linear"):
        for some in (None, ["", *given[1:]]):
            with pytest.raises(InputError, match=f"The method '{method}' needs the labels of all images"):
                fit_adapter(scores, some, method=METHODS[method])
    with pytest.raises(DataError, match="'robin' is no label"):
        fit_adapter(scores, ["robin", *given[1:]])
    with pytest.raises(DataError, match=r"^0 is no label of the label set"):  # not "the label is not known"
        fit_adapter(scores, [0] * 40)  # type: ignore[list-item]
    with pytest.raises(DataError, match="There are 39 truths for 40 images"):
        fit_adapter(scores, given[1:])
    with pytest.raises(DataError, match="9 images are too few"):
        fit_adapter(scores.rows(slice(0, 9)), given[:9])
    with pytest.raises(DataError, match="9 different images with labels are too few"):
        fit_adapter(scores, [*given[:9], *[""] * 31])
    monkeypatch.setattr(adapting, "MOST_NUMBERS", C * D - 1)
    with pytest.raises(DataError, match=r"4 labels times 12 dimensions are more than 47\. Learn for fewer labels"):
        fit_adapter(scores, given)

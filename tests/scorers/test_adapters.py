"""Adapters: their files, what they do to scores, and what they are refused for."""

import json
import pickle
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy.special import log_softmax

from cascadevlm import Cascade
from cascadevlm.base.errors import ConfigError, DataError
from cascadevlm.base.labels import Label, LabelSet
from cascadevlm.base.types import Scores
from cascadevlm.scorers import adapters
from cascadevlm.scorers.adapters import HEADER, Adapter, CacheAdapter, LinearAdapter, Made, read_adapter
from cascadevlm.scorers.base import DEFAULT_TEMPLATES, score_together
from cascadevlm.scorers.kept import CachedEmbeddings
from cascadevlm.testing import noise
from tests.evaluation.calibrating.test_calibration import learned
from tests.scorers.test_embeddings import LABELS, TinyTowers, Unsteady

IMAGES = [noise(number) for number in range(5)]
D = 48
MADE = Made(method="means", images=9, labelled=9, figures={"gain": 0.25})


def linear(seed: int = 0, labels: LabelSet = LABELS, scorer: TinyTowers | None = None) -> LinearAdapter:
    rng = np.random.default_rng(seed)
    return LinearAdapter(
        labels=labels.names,
        fingerprint=(scorer or TinyTowers()).bare_fingerprint(labels),
        own=0.7,
        made=MADE,
        weights=rng.normal(size=(len(labels), D)).astype(np.float32),
        bias=rng.normal(size=len(labels)).astype(np.float32),
    )


def cache(seed: int = 0, labels: LabelSet = LABELS, *, likeness: bool = True, images: int = 4) -> CacheAdapter:
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(images, D))
    return CacheAdapter(
        labels=labels.names,
        fingerprint=TinyTowers().bare_fingerprint(labels),
        own=1.0,
        made=replace(MADE, method="cache"),
        keys=(keys / np.linalg.norm(keys, axis=1, keepdims=True)).astype(np.float16),
        values=np.eye(len(labels), dtype=np.float16)[rng.integers(len(labels), size=images)],
        strength=1.5,
        sharpness=5.5,
        signatures=log_softmax(rng.normal(size=(images, len(labels))), axis=1).astype(np.float16) if likeness else None,
        temperature=0.1 if likeness else 0.0,
        intercept=0.5 if likeness else 0.0,
        slope=0.3 if likeness else 0.0,
    )


def changed(adapter: Adapter, **values: object) -> Adapter:
    """`dataclasses.replace`, by names that are not literal."""
    given = {each.name: getattr(adapter, each.name) for each in fields(adapter)}
    return type(adapter)(**given | values)


def adapted(adapter: Adapter | None, templates: Sequence[str] = ("{label}",)) -> TinyTowers:
    scorer = TinyTowers(templates=templates)
    scorer.adapter = adapter
    return scorer


def identity() -> LinearAdapter:
    nothing = np.zeros((len(LABELS), D), np.float32)
    return replace(linear(), own=1.0, weights=nothing, bias=nothing[:, 0])


def test_scores_carry_embeddings_through_rows_joins_and_halves() -> None:
    scores = TinyTowers().score(IMAGES, LABELS)
    exact = TinyTowers().embed_images(IMAGES)
    assert scores.embeddings is not None
    assert scores.embeddings.dtype == np.float16
    np.testing.assert_array_equal(scores.embeddings, exact.astype(np.float16))
    index = np.array([3, 0])
    some = scores.rows(index)
    assert some.embeddings is not None
    np.testing.assert_array_equal(some.embeddings, scores.embeddings[index])
    joined = Scores.joined([some, scores.rows(slice(1, 2))])
    assert joined.embeddings is not None
    np.testing.assert_array_equal(joined.embeddings, scores.embeddings[[3, 0, 1]])
    np.testing.assert_array_equal(joined.log_probs, scores.log_probs[[3, 0, 1]])
    assert Scores.joined([some, replace(some, embeddings=None)]).embeddings is None
    with pytest.raises(ValueError, match="embeddings has shape"):
        replace(scores, log_probs=scores.log_probs[:2])


def test_images_scored_in_halves_keep_their_own_embeddings() -> None:
    scorer = Unsteady()
    images = [*IMAGES[:3], IMAGES[0].point(lambda _: 0), *IMAGES[3:]]
    scored = score_together(scorer, [scorer.prepare(image) for image in images], LABELS)
    scores = scored.scores
    assert [error is not None for error in scored.errors] == [False, False, False, True, False, False]
    assert scores is not None
    assert scores.embeddings is not None
    np.testing.assert_array_equal(scores.embeddings, TinyTowers().embed_images(IMAGES).astype(np.float16))


def test_an_adapter_without_effect_changes_no_bit() -> None:
    """Also at the scale of CLIP, where the float32 logits are large."""

    class Sharp(TinyTowers):
        def logits(self, similarities: NDArray[np.float32]) -> NDArray[np.float32]:
            return similarities * np.float32(100)

    images = [noise(number) for number in range(40)]
    bare, scorer = Sharp(), Sharp()
    scorer.adapter = identity()
    np.testing.assert_array_equal(scorer.score(images, LABELS).log_probs, bare.score(images, LABELS).log_probs)
    scorer.adapter = replace(cache(), strength=0.0, slope=0.0, intercept=0.0)
    np.testing.assert_array_equal(scorer.score(images, LABELS).log_probs, bare.score(images, LABELS).log_probs)


def test_a_linear_adapter_adds_a_linear_term() -> None:
    adapter = linear()
    x = TinyTowers().embed_images(IMAGES).astype(np.float64)
    own = TinyTowers().score(IMAGES, LABELS).log_probs.astype(np.float64)
    expected = log_softmax(adapter.own * own + x @ adapter.weights.T.astype(np.float64) + adapter.bias, axis=1)
    np.testing.assert_allclose(adapted(adapter).score(IMAGES, LABELS).log_probs, expected, atol=2e-5)


def test_a_cache_of_the_image_itself_adds_its_strength_to_its_label() -> None:
    """exp(-β (1 - x·x)) is 1, so the term is α r (Tip-Adapter, equation 6)."""
    x = TinyTowers().embed_images(IMAGES[:1])
    values = np.array([[0, 1, 0]], dtype=np.float16)
    adapter = replace(cache(likeness=False), keys=x.astype(np.float16), values=values, strength=2.5)
    own = np.zeros((1, 3), dtype=np.float32)
    np.testing.assert_allclose(adapter.logits(x, own), [[0, 2.5, 0]], atol=2e-2)
    unlike = np.roll(x, 1, axis=1)
    expected = 2.5 * np.exp(-5.5 * (1 - float(unlike[0] @ x[0])))
    np.testing.assert_allclose(adapter.logits(unlike, own), [[0, expected, 0]], atol=2e-2)


def test_what_the_scorer_says_alike_is_most_alike() -> None:
    own = np.array([[3.0, 0, -1], [0, 3, -1], [-1, 0, 3]], dtype=np.float32)
    keys = np.zeros((3, D), dtype=np.float16)
    adapter = replace(
        cache(images=3),
        keys=keys,
        strength=0.0,
        values=np.eye(3, dtype=np.float16),
        signatures=log_softmax(own, axis=1).astype(np.float16),
        temperature=1.0,
        intercept=0.9,
        slope=0.2,
    )
    added = adapter.added(np.zeros((3, D), dtype=np.float32), own)
    assert added.argmax(axis=1).tolist() == [0, 1, 2]
    np.testing.assert_allclose(np.diag(added), 0.9, atol=1e-3)
    p, q = (np.exp(log_softmax(row)) for row in own[:2].astype(np.float64))
    np.testing.assert_allclose(added[0, 1], 0.9 - 0.2 * (p * np.log(p / q)).sum(), atol=1e-3)


numbers = st.floats(-100, 100, width=32)


@st.composite
def adapters_of_any_kind(draw: st.DrawFn) -> Adapter:
    names = tuple(draw(st.lists(st.text(min_size=1), min_size=1, max_size=5, unique=True)))
    dimensions, images = draw(st.integers(1, 6)), draw(st.integers(0, 4))
    made = Made(
        method=draw(st.sampled_from(["means", "cache", "linear"])),
        images=draw(st.integers(0, 10**9)),
        labelled=draw(st.integers(0, 10**9)),
        figures=draw(st.dictionaries(st.text(), st.one_of(st.none(), st.floats(-1, 1), st.text(), st.lists(st.integers())))),
    )
    fingerprint, own = draw(st.text()), draw(st.floats(0, 1e4))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    if draw(st.booleans()):
        weights = rng.normal(size=(len(names), dimensions)).astype(np.float32)
        return LinearAdapter(labels=names, fingerprint=fingerprint, own=own, made=made, weights=weights, bias=weights[:, 0])
    return CacheAdapter(
        labels=names,
        fingerprint=fingerprint,
        own=own,
        made=made,
        keys=rng.normal(size=(images, dimensions)).astype(np.float16),
        values=rng.random((images, len(names))).astype(np.float16),
        strength=draw(st.floats(0, 100)),
        sharpness=draw(st.floats(0, 100)),
        signatures=draw(st.sampled_from([None, rng.normal(size=(images, len(names))).astype(np.float16)])),
    )


@settings(max_examples=40)
@given(adapter=adapters_of_any_kind())
def test_a_file_gives_back_what_was_written(adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.adapter"
    adapter.write(path)
    again = read_adapter(path)
    assert type(again) is type(adapter)
    assert again.digest == adapter.digest
    for name, value in vars(adapter).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(again, name), value)
            assert getattr(again, name).dtype == value.dtype
        else:
            assert getattr(again, name) == value


@pytest.mark.parametrize("adapter", [linear(), cache()])
def test_the_digest_changes_with_all_that_changes_scores_and_with_nothing_else(adapter: Adapter) -> None:
    digests = {adapter.digest, replace(adapter, fingerprint="other").digest, replace(adapter, labels=("a", "b", "c")).digest}
    for name, value in vars(adapter).items():
        if isinstance(value, float | np.ndarray):
            digests.add(changed(adapter, **{name: value / 2}).digest)
    assert len(digests) == 3 + sum(isinstance(value, float | np.ndarray) for value in vars(adapter).values())
    assert replace(adapter, made=replace(MADE, images=1)).digest == adapter.digest


def test_the_fingerprint_names_the_adapter() -> None:
    plain, one, other = (adapted(each).score(IMAGES, LABELS).fingerprint for each in (None, linear(), linear(seed=1)))
    assert len({plain, one, other}) == 3
    assert one == f"{plain}|adapter={linear().digest[:12]}"


def test_kept_embeddings_are_those_of_the_bare_scorer_and_adapted_when_read(tmp_path: Path) -> None:
    exact = adapted(linear()).score(IMAGES, LABELS)
    CachedEmbeddings(TinyTowers(), tmp_path).score(IMAGES, LABELS)
    scorer = adapted(linear())
    kept = CachedEmbeddings(scorer, tmp_path).score(IMAGES, LABELS)
    assert scorer.embedded == 0
    np.testing.assert_array_equal(kept.log_probs, exact.log_probs)
    assert kept.fingerprint == exact.fingerprint


def test_labels_in_another_order_get_their_own_columns() -> None:
    backwards = LabelSet(LABELS.labels[::-1])
    for adapter in (linear(), cache()):
        forth, back = (adapted(adapter).score(IMAGES, labels).log_probs for labels in (LABELS, backwards))
        np.testing.assert_allclose(back[:, ::-1], forth, atol=1e-5)


@pytest.mark.parametrize("adapter", [linear(), cache()])
def test_new_labels_get_the_mean_term_and_a_warning(adapter: Adapter) -> None:
    more = LabelSet.of(["stork", *LABELS, "auk"])
    with pytest.warns(RuntimeWarning, match=r"does not know 2 of the labels, such as 'auk'"):
        scores = adapted(adapter).score(IMAGES, more)
    bare = TinyTowers()
    x = bare.embed_images(IMAGES)
    own = bare.logits(x @ bare.label_embeddings(more).T)
    added = adapter.added(x, own[:, 1:4])
    mean = added.mean(axis=1, keepdims=True)
    expected = log_softmax(adapter.own * own + np.concatenate([mean, added, mean], axis=1), axis=1)
    np.testing.assert_allclose(scores.log_probs, expected, atol=2e-5)
    if isinstance(adapter, LinearAdapter):
        row, bias = adapter.weights.mean(axis=0), adapter.bias.mean()
        np.testing.assert_allclose(mean[:, 0], x @ row + bias, atol=1e-5)


def test_it_is_warned_of_new_labels_once_per_scorer() -> None:
    scorer = adapted(linear())
    more = LabelSet.of([*LABELS, "auk"])
    with pytest.warns(RuntimeWarning):
        scorer.score(IMAGES, more)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scorer.score(IMAGES, more)


@pytest.mark.parametrize(
    ("labels", "templates", "told"),
    [
        (["finch", "owl"], ("{label}",), r"lacks 1 of the adapter's 3 labels, such as 'wren'"),
        (["finch", "owl", Label(name="wren", text="a drawn wren")], ("{label}",), "made with other texts for the labels"),
        (["finch", "owl", "wren"], DEFAULT_TEMPLATES, "made with other templates"),
        (["finch", "owl", Label(name="wren", text="a")], DEFAULT_TEMPLATES, "other templates and texts|other texts"),
    ],
)
def test_other_words_are_refused_by_name(labels: list[str | Label], templates: Sequence[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        adapted(linear(), templates).score(IMAGES, LabelSet.of(labels))


def test_another_scorer_is_refused_by_name() -> None:
    scorer = adapted(replace(linear(), fingerprint="hf:another|templates=1|texts=2"))
    with pytest.raises(ConfigError, match=r"The adapter is of the scorer 'hf:another\|.*', not of 'tiny\|"):
        scorer.score(IMAGES, LABELS)


def test_embeddings_of_another_length_are_refused() -> None:
    adapter = replace(linear(), weights=np.zeros((3, 7), dtype=np.float32))
    with pytest.raises(ConfigError, match="with 7 dimensions, not 48"):
        adapted(adapter).score(IMAGES, LABELS)


@pytest.mark.parametrize("value", [2e4, np.float32(3e38)])
def test_logits_beyond_all_measure_are_refused(value: float) -> None:
    adapter = replace(linear(), weights=np.full((3, D), value, dtype=np.float32))
    with np.errstate(over="ignore", invalid="ignore"), pytest.raises(ConfigError, match="beyond 10000"):
        adapted(adapter).score(IMAGES, LABELS)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    for adapter, name in [
        (linear(), "weights"),
        (linear(), "bias"),
        *((cache(), each) for each in ("keys", "values", "signatures")),
    ]:
        array = getattr(adapter, name).copy()
        array.flat[0] = bad
        with pytest.raises(DataError, match=f"{name} of the adapter has numbers that are not finite"):
            changed(adapter, **{name: array})
    for adapter, name in ((linear(), "own"), (cache(), "strength"), (cache(), "sharpness"), (cache(), "slope")):
        with pytest.raises(DataError, match=f"{name} of the adapter is a number"):
            changed(adapter, **{name: bad})


def test_shapes_types_and_sizes_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for change in ({"bias": np.zeros(2, np.float32)}, {"weights": np.zeros((3, D))}, {"weights": np.zeros(3, np.float32)}):
        with pytest.raises(DataError, match="of the adapter is"):
            changed(linear(), **change)
    for wrong in (np.float16(1), np.zeros(4, np.float16), np.zeros((3, D, 2), np.float16)):
        with pytest.raises(DataError, match="keys of the adapter is"):
            replace(cache(), keys=np.asarray(wrong))
    monkeypatch.setattr(adapters, "MOST_NUMBERS", 3 * D - 1)
    with pytest.raises(DataError, match=r"has 144 numbers, more than 143\. Learn for fewer labels"):
        linear()


def header_of(path: Path) -> dict[str, object]:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        found: dict[str, object] = json.loads(file.metadata()[HEADER])
    return found


def test_damaged_and_foreign_files_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "birds.adapter"
    linear().write(path)
    sound, header, tensors = path.read_bytes(), header_of(path), load_file(path)
    flipped = sound[:-1] + bytes([sound[-1] ^ 1])
    for content in (sound[:-1], sound[:100], b"", b"\x80\x04K\x01.", b"{}" * 50, b"\xff" * 200, flipped):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"birds.adapter' is no adapter: the file is damaged"):
            read_adapter(path)
    for metadata in (None, {HEADER: "[]"}, {HEADER: json.dumps(header | {"kind": "Path"})}, {"other": "1"}):
        save_file(tensors, path, metadata)
        with pytest.raises(ConfigError, match="not written by cascadevlm"):
            read_adapter(path)
    for changed, told in (
        (header | {"labels": "finch"}, "labels"),
        (header | {"own": None}, "own"),
        (header | {"more": 1}, "more"),
        (header | {"made": {}}, "made"),
        (header | {"labels": ["finch"]}, "weights of the adapter is"),
        (header | {"own": -1}, "own of the adapter is a number"),
        (header | {"kind": "CacheAdapter"}, "keys"),
    ):
        save_file(tensors, path, {HEADER: json.dumps(changed)})
        with pytest.raises(ConfigError, match=f"is no adapter: .*{told}"):
            read_adapter(path)
    save_file({"bias": tensors["bias"]}, path, {HEADER: json.dumps(header)})
    with pytest.raises(ConfigError, match="is no adapter: weights"):
        read_adapter(path)
    with pytest.raises(ConfigError, match=r"Adapter '.*none' cannot be read: No such file"):
        read_adapter(tmp_path / "none")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_adapter(tmp_path)
    with pytest.raises(DataError, match=r"cannot be written: No such file"):
        linear().write(tmp_path / "none" / "birds.adapter")


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "birds.adapter"
    linear().write(path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match="No space left"):
        linear(seed=1).write(path)
    assert read_adapter(path).digest == linear().digest


def test_copies_score_alike_also_from_threads() -> None:
    scorer = adapted(linear())
    expected = scorer.score(IMAGES, LABELS)
    for copy in (pickle.loads(pickle.dumps(scorer)), deepcopy(scorer)):
        scores = copy.score(IMAGES, LABELS)
        np.testing.assert_array_equal(scores.log_probs, expected.log_probs)
        assert scores.fingerprint == expected.fingerprint
    cascade = Cascade(scorer, [], labels=LABELS, batch_size=2)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: cascade.classify(IMAGES), range(8)))
    assert all(result == results[0] for result in results)
    assert [each.probability for each in results[0]] == pytest.approx(expected.probabilities.max(axis=1).tolist())


def test_a_calibration_of_the_bare_scorer_is_refused_for_the_adapted_one() -> None:
    known = learned()
    labels = LabelSet.of(known.labels)
    bare = TinyTowers().bare_fingerprint(labels)
    scores = Scores.from_logits(np.zeros((1, len(labels))), labels, f"{bare}|adapter=0123456789ab")
    with pytest.raises(ConfigError, match="The calibration was made with other settings of the adapter"):
        replace(known, fingerprint=bare).calibrated(scores)
    with pytest.raises(ConfigError, match="settings of the adapter"):
        replace(known, fingerprint=f"{bare}|adapter=ab0123456789").calibrated(scores)

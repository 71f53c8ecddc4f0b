"""Embeddings on disk: stored and read values, values that are not computed twice, and damaged files."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cascadevlm import Cascade
from cascadevlm.base.errors import BackendError, ImageError, InputError
from cascadevlm.base.labels import Label, LabelSet
from cascadevlm.base.types import Prediction
from cascadevlm.scorers import base as scorer
from cascadevlm.scorers import kept as embeddings
from cascadevlm.scorers.base import EmbeddingScorer, Prepared
from cascadevlm.scorers.kept import CachedEmbeddings, EmbeddingStore, kept_labels
from cascadevlm.testing import noise

LABELS = LabelSet.of(["finch", "owl", "wren"])


class TinyTowers(EmbeddingScorer):
    """Two towers of fixed random projections, which count the images embedded."""

    def __init__(self, *, templates: Sequence[str] = ("{label}",)) -> None:
        super().__init__(templates=templates)
        self.embedded = 0
        self.texts: list[str] = []

    def embed_images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        self.embedded += len(images)
        pixels = np.array([np.asarray(image.resize((4, 4))).ravel() for image in images], dtype=np.float32)
        return self._unit(pixels - 128)

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.texts += texts
        return self._unit(np.array([np.random.default_rng(len(text)).normal(size=48) for text in texts], dtype=np.float32))

    def logits(self, similarities: NDArray[np.float32]) -> NDArray[np.float32]:
        return similarities * 10

    def model_fingerprint(self) -> str:
        return "tiny"

    def _unit(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        unit: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return unit


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    (tmp_path / "images").mkdir()
    paths = [tmp_path / "images" / f"{number}.png" for number in range(10)]
    for number, path in enumerate(paths):
        noise(number).save(path)
    return paths


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EmbeddingStore]:
    store = EmbeddingStore(tmp_path / "store")
    yield store
    store.close()


def rows(count: int, *, start: int = 0) -> dict[bytes, NDArray[np.float32]]:
    numbers = range(start, start + count)
    return {number.to_bytes(32): np.random.default_rng(number).normal(size=6).astype(np.float32) for number in numbers}


def test_no_image_is_embedded_twice_and_scores_are_the_same(files: list[Path], tmp_path: Path) -> None:
    model = TinyTowers()
    cold = Cascade(CachedEmbeddings(model, tmp_path / "kept"), [], labels=LABELS, batch_size=4).classify(files)
    assert model.embedded == len(files)
    anew = TinyTowers(templates=("{label}", "the {label}"))
    warm = Cascade(CachedEmbeddings(TinyTowers(), tmp_path / "kept"), [], labels=LABELS, batch_size=3).classify(files)
    assert [each.label for each in warm] == [each.label for each in cold]
    assert [each.probability for each in warm] == pytest.approx([each.probability for each in cold], rel=1e-6)
    Cascade(CachedEmbeddings(anew, tmp_path / "kept"), [], labels=["stork", "eagle owl"]).classify(files)
    assert anew.embedded == 0


def test_other_texts_are_another_scorer_with_the_same_image_embeddings(files: list[Path], tmp_path: Path) -> None:
    model = TinyTowers()
    scorer = CachedEmbeddings(model, tmp_path / "kept")

    def fingerprint(*labels: str | Label) -> str:
        return scorer.score_prepared([scorer.prepare(files[0])], LabelSet.of(labels)).fingerprint

    plain = fingerprint("finch", "owl")
    assert fingerprint(Label(name="finch", text="finch"), Label(name="owl", aliases=("night bird",))) == plain
    assert fingerprint("finch", Label(name="owl", text=" owl\n")) == plain  # embedded as "owl"
    swapped = fingerprint(Label(name="finch", text="owl"), Label(name="owl", text="finch"))
    drawn = fingerprint("finch", Label(name="owl", text="a drawing of an owl"))
    assert len({plain, swapped, drawn}) == 3
    assert model.embedded == 1


def test_scores_are_the_same_whether_embeddings_are_kept_or_not(files: list[Path], tmp_path: Path) -> None:
    """Stored and new embeddings have the same fingerprint, so a calibration is valid for both."""
    images = [Image.open(file).convert("RGB") for file in files]
    exact = TinyTowers().score(images, LABELS)
    for _ in ("embedded", "read"):
        kept = CachedEmbeddings(TinyTowers(), tmp_path / "kept").score(images, LABELS)
        np.testing.assert_array_equal(kept.log_probs, exact.log_probs)
        assert kept.fingerprint == exact.fingerprint


def test_a_changed_file_is_embedded_anew_and_a_broken_one_names_itself(files: list[Path], tmp_path: Path) -> None:
    model = TinyTowers()
    cascade = Cascade(CachedEmbeddings(model, tmp_path / "kept"), [], labels=LABELS)
    before = cascade.classify(files[:2])
    noise(99).save(files[0])
    files[1].write_bytes(b"no image")
    after = cascade.classify([*files[:2], tmp_path / "gone.png"])
    assert model.embedded == 3
    assert after[0].probability != before[0].probability
    assert str(files[1]) in after[1].error
    assert "gone.png' does not exist" in after[2].error


def test_rows_come_back_from_every_shard(store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "SHARD_ROWS", 4)
    given = rows(23)
    for start in range(0, 23, 5):
        store.put(dict(list(given.items())[start : start + 5]))
    assert len(store) == 23
    for digest, embedding in given.items():
        found = store.get(digest)
        assert found is not None
        np.testing.assert_array_equal(found, embedding)
    assert store.get(b"another") is None


def test_writers_do_not_overwrite_each_other(tmp_path: Path) -> None:
    stores = [EmbeddingStore(tmp_path / "store") for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: stores[number % 4].put(rows(5, start=5 * number)), range(20)))
    for digest, embedding in rows(100).items():
        np.testing.assert_array_equal(stores[0].get(digest), embedding)
    for store in stores:
        store.close()


def test_a_write_that_broke_off_leaves_nothing_behind(store: EmbeddingStore) -> None:
    store.put(rows(2))

    def broken(*_: object) -> None:
        raise OSError("No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_write", broken)
        with pytest.raises(OSError, match="space"):
            store.put(rows(2, start=2))
    assert len(store) == 2
    store.put(rows(1, start=7))
    np.testing.assert_array_equal(store.get((7).to_bytes(32)), rows(1, start=7)[(7).to_bytes(32)])


def test_a_damaged_row_is_no_embedding(store: EmbeddingStore) -> None:
    store.put(rows(3))
    shard = store.folder / "000000.f32"
    with shard.open("r+b") as file:
        file.seek(24)
        file.write(b"\0" * 24)
    assert store.get((1).to_bytes(32)) is None
    assert store.get((2).to_bytes(32)) is not None


def _emptied(file: Path) -> None:
    file.write_bytes(b"")


def _scrawled_over(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(4096)
        opened.write(b"\xff" * 4096)


@pytest.mark.parametrize(
    ("name", "harm"), [("000000.f32", Path.unlink), ("000000.f32", _emptied), ("index.sqlite", _scrawled_over)]
)
def test_damage_is_told_once_and_images_are_embedded_anew(
    files: list[Path], tmp_path: Path, name: str, harm: Callable[[Path], None]
) -> None:
    def classify(model: TinyTowers) -> list[Prediction]:
        scorer = CachedEmbeddings(model, tmp_path / "kept")
        try:
            return Cascade(scorer, [], labels=LABELS, batch_size=4).classify(files)
        finally:
            scorer.store.close()

    sound = classify(TinyTowers())
    (store,) = (tmp_path / "kept").iterdir()
    harm(store / name)
    model = TinyTowers()
    with pytest.warns(RuntimeWarning) as told:
        assert classify(model) == sound
    assert [str(each.message).partition(" are damaged")[0] for each in told] == [f"The embeddings in {str(store)!r}"]
    assert model.embedded == len(files)


def test_a_full_disk_is_told_once(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(EmbeddingStore, "_write", full)
    with pytest.warns(RuntimeWarning, match="No more embeddings can be stored in .* No space left") as told:
        Cascade(CachedEmbeddings(TinyTowers(), tmp_path / "kept"), [], labels=LABELS, batch_size=4).classify(files)
    assert len(told) == 1


def test_processes_may_make_a_store_at_the_same_time(tmp_path: Path) -> None:
    """Without a lock, one of a few hundred processes finds the database locked. Another process may lock it for the same time."""
    with filelock.FileLock(tmp_path / "lock"):
        waiting = ThreadPoolExecutor(1).submit(EmbeddingStore, tmp_path)
        time.sleep(0.2)
        assert not (tmp_path / "index.sqlite").exists()
    waiting.result(timeout=60).close()


def test_what_is_prepared_tells_whether_it_is_in_memory(files: list[Path], tmp_path: Path) -> None:
    known = CachedEmbeddings(TinyTowers(), tmp_path / "kept").prepare(files[0])
    assert known.decoded
    assert known.image is known.pixels
    unread = Prepared(source=files[0])
    assert (unread.decoded, unread.unread.size, unread.decoded) == (False, known.image.size, False)
    files[0].rename(tmp_path / "away.png")
    assert unread.unread.size == known.image.size
    (tmp_path / "away.png").rename(files[0])
    assert unread.image.tobytes() == known.image.tobytes()
    assert unread.decoded


def test_a_folder_that_cannot_be_used_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match=r"cannot keep embeddings.*cache\.folder"):
        EmbeddingStore(tmp_path / "file")
    (tmp_path / "index.sqlite").write_text("no database, but long enough to look like one" * 10)
    with pytest.raises(BackendError, match="not a database"):
        EmbeddingStore(tmp_path)


def test_no_label_is_embedded_twice_and_scores_are_the_same(tmp_path: Path) -> None:
    first = CachedEmbeddings(TinyTowers(), tmp_path / "kept").score([noise(1)], LABELS)
    more = TinyTowers()
    assert CachedEmbeddings(more, tmp_path / "kept").score([noise(1)], LABELS).log_probs.tolist() == first.log_probs.tolist()
    assert not more.texts
    CachedEmbeddings(more, tmp_path / "kept").score([noise(1)], LabelSet.of(["owl", "stork", "finch"]))
    assert more.texts == ["stork"]
    worded = TinyTowers(templates=["the {label}"])
    CachedEmbeddings(worded, tmp_path / "kept").score([noise(1)], LabelSet.of(["owl"]))
    assert worded.texts == ["the owl"]


def test_labels_are_kept_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer, "LABELS_AT_ONCE", 2)
    names = [f"kind {'x' * number}" for number in range(5)]

    class Killed(TinyTowers):
        def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
            if len(self.texts) == 4:
                raise KeyboardInterrupt
            return super().embed_texts(texts)

    with pytest.raises(KeyboardInterrupt):
        CachedEmbeddings(Killed(), tmp_path / "kept").score([noise(1)], LabelSet.of(names))
    again = TinyTowers()
    kept = CachedEmbeddings(again, tmp_path / "kept").score([noise(1)], LabelSet.of(names))
    assert again.texts == names[4:]
    assert kept.log_probs.tolist() == TinyTowers().score_embeddings(embedded(noise(1)), LabelSet.of(names)).log_probs.tolist()


def embedded(image: Image.Image) -> NDArray[np.float32]:
    """The embedding in its stored form."""
    return TinyTowers().embed_images([image])


def test_that_labels_take_long_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(scorer, "SECONDS_UNTOLD", -1.0)
    TinyTowers().label_embeddings(LABELS)
    assert "Embedded 3 of 3 labels." in capsys.readouterr().err


def test_damaged_or_unwritable_labels_are_embedded_at_every_start(tmp_path: Path) -> None:
    sound = CachedEmbeddings(TinyTowers(), tmp_path / "kept").score([noise(1)], LABELS).log_probs.tolist()
    (labels,) = (tmp_path / "kept").glob("*/labels")
    for harm, name in ((_emptied, "000000.f32"), (_scrawled_over, "index.sqlite")):
        harm(labels / name)
        assert CachedEmbeddings(TinyTowers(), tmp_path / "kept").score([noise(1)], LABELS).log_probs.tolist() == sound
    (tmp_path / "file").write_text("")
    assert kept_labels(TinyTowers(), ["owl"], folder=tmp_path / "file").shape == (1, 48)


class Unsteady(TinyTowers):
    """Has no finite embedding of dark images."""

    def embed_images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        rows = super().embed_images(images)
        rows[[image.getpixel((0, 0)) == (0, 0, 0) for image in images]] = np.nan
        return rows


@pytest.mark.parametrize("kept", [True, False])
def test_an_embedding_that_is_not_finite_fails_its_image_alone(files: list[Path], tmp_path: Path, kept: bool) -> None:
    for path in (files[2], files[7]):
        Image.new("RGB", (8, 8)).save(path)
    model = Unsteady()
    scorer = CachedEmbeddings(model, tmp_path / "kept") if kept else model
    predictions = Cascade(scorer, [], labels=LABELS, batch_size=4).classify(files)
    assert [number for number, each in enumerate(predictions) if each.label is None] == [2, 7]
    assert "not finite" in predictions[2].error
    assert len(Cascade(TinyTowers(), [], labels=LABELS).classify(files[:2] + files[3:7])) == 6
    if kept:
        assert len(CachedEmbeddings(model, tmp_path / "kept").store) == 8


def test_embeddings_of_any_length_give_the_scores_of_length_1() -> None:
    scorer = TinyTowers()
    unit = scorer.embed_images([noise(1), noise(2)])
    expected = scorer.score_embeddings(unit, LABELS)
    mixed = scorer.score_embeddings(unit * np.array([[5], [1]], dtype=np.float32), LABELS)
    np.testing.assert_allclose(mixed.log_probs, expected.log_probs, rtol=1e-5)
    assert mixed.log_probs[1].tolist() == expected.log_probs[1].tolist()  # a row of length 1 is not changed at all
    assert mixed.embeddings is not None
    assert np.linalg.norm(mixed.embeddings, axis=1) == pytest.approx(1, abs=1e-3)
    with pytest.raises(ImageError, match="is zero or not finite"):
        scorer.score_embeddings(unit * np.array([[0], [1]], dtype=np.float32), LABELS)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (np.ones((2, 47)), r"float64 \(2, 47\)"),
        (np.ones(48), r"float64 \(48,\)"),
        (np.ones((2, 48), dtype=object), r"object \(2, 48\)"),
        (np.full((2, 48), "1"), r"<U1 \(2, 48\)"),
        ([[1.0] * 48], "list"),
    ],
)
def test_what_is_no_array_of_embeddings_is_refused(given: NDArray[np.float32], told: str) -> None:
    with pytest.raises(InputError, match=f"The embeddings are {told}, not a NumPy array of numbers with 48 columns"):
        TinyTowers().score_embeddings(given, LABELS)


def test_labels_without_a_finite_embedding_are_said() -> None:
    class Broken(TinyTowers):
        def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
            return super().embed_texts(texts) * np.float32(np.nan)

    with pytest.raises(BackendError, match="labels are not finite"):
        Broken().score([noise(1)], LABELS)

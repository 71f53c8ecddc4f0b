"""Several scorers as one."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.special import softmax

from cascadevlm import Cascade
from cascadevlm.base.errors import ImageError, InputError
from cascadevlm.base.labels import Label, LabelSet
from cascadevlm.scorers.base import Scorer
from cascadevlm.scorers.kept import CachedEmbeddings, EmbeddingStore, folder_of
from cascadevlm.scorers.several import SeveralScorers
from cascadevlm.testing import FakeScorer, ScorerContract, noise
from tests.scorers.test_embeddings import LABELS, TinyTowers


class Dim(TinyTowers):
    """Other towers, of 16 dimensions, which cannot embed images of one colour."""

    def embed_images(self, images: list[Image.Image]) -> NDArray[np.float32]:  # type: ignore[override]
        self.embedded += len(images)
        pixels = np.array([np.asarray(image.convert("L").resize((4, 4))).ravel() for image in images], dtype=np.float32)
        centred = pixels - pixels.mean(axis=1, keepdims=True)
        with np.errstate(invalid="ignore"):
            return self._unit(centred)

    def embed_texts(self, texts: list[str]) -> NDArray[np.float32]:  # type: ignore[override]
        return super().embed_texts(texts)[:, :16]

    def model_fingerprint(self) -> str:
        return "dim"


class TestContract(ScorerContract):
    def make(self) -> Scorer:
        return SeveralScorers([TinyTowers(), FakeScorer()])


def test_log_probabilities_are_averaged_and_embeddings_stand_side_by_side() -> None:
    images = [noise(seed) for seed in range(4)]
    parts = [scorer.score(images, LABELS) for scorer in (TinyTowers(), Dim(), FakeScorer())]
    both = SeveralScorers([TinyTowers(), Dim(), FakeScorer()]).score(images, LABELS)
    np.testing.assert_allclose(
        both.probabilities, softmax(np.mean([part.log_probs for part in parts], axis=0), axis=1), rtol=1e-5
    )
    assert both.embeddings is not None
    assert both.embeddings.shape == (4, 48 + 16)
    np.testing.assert_allclose(np.linalg.norm(both.embeddings.astype(np.float64), axis=1), 1, atol=1e-3)
    own = parts[1].embeddings
    assert own is not None
    np.testing.assert_allclose(both.embeddings[:, 48:].astype(np.float64) * np.sqrt(2), own.astype(np.float64), atol=1e-3)
    assert SeveralScorers([FakeScorer(), FakeScorer()]).score(images, LABELS).embeddings is None


def test_the_fingerprint_names_every_scorer_in_order() -> None:
    def fingerprint(*scorers: Scorer, labels: LabelSet = LABELS) -> str:
        return SeveralScorers(scorers).score([noise(1)], labels).fingerprint

    plain = fingerprint(TinyTowers(), Dim())
    assert "tiny;" in plain
    assert "dim;" in plain
    assert fingerprint(Dim(), TinyTowers()) != plain
    assert fingerprint(TinyTowers(templates=["a {label}"]), Dim()) != plain
    drawn = LabelSet.of([Label(name="finch", text="a drawn finch"), "owl", "wren"])
    assert drawn.texts_part in fingerprint(TinyTowers(), Dim(), labels=drawn).split("|")


def test_kept_embeddings_of_each_scorer_are_used_and_kept(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.png" for number in range(6)]
    for number, path in enumerate(files):
        noise(number).save(path)
    alone = CachedEmbeddings(TinyTowers(), tmp_path / "kept")
    Cascade(alone, [], labels=LABELS).classify(files[:4])
    tiny, dim = TinyTowers(), Dim()
    several = SeveralScorers([CachedEmbeddings(each, tmp_path / "kept") for each in (tiny, dim)])
    cold = Cascade(several, [], labels=LABELS, batch_size=4).classify(files)
    assert (tiny.embedded, dim.embedded) == (2, 6)
    assert len(EmbeddingStore(folder_of(dim, tmp_path / "kept"))) == 6
    warm = Cascade(several, [], labels=LABELS, batch_size=3).classify(files)
    assert (tiny.embedded, dim.embedded) == (2, 6)
    assert [each.probability for each in warm] == pytest.approx([each.probability for each in cold], rel=1e-5)


def test_an_image_that_one_scorer_cannot_embed_fails_alone(tmp_path: Path) -> None:
    noise(1).save(tmp_path / "good.png")
    Image.new("RGB", (20, 20), (9, 9, 9)).save(tmp_path / "plain.png")
    (tmp_path / "none.png").write_bytes(b"no image")
    several = SeveralScorers([TinyTowers(), Dim()])
    names = ("good.png", "plain.png", "none.png", "good.png")
    found = Cascade(several, [], labels=LABELS).classify([tmp_path / name for name in names])
    assert [bool(each.label) for each in found] == [True, False, False, True]
    assert "not finite" in found[1].error
    assert "none.png" in found[2].error
    with pytest.raises(ImageError):
        several.prepare(tmp_path / "none.png")


def test_one_decoded_image_is_in_memory_once(tmp_path: Path) -> None:
    noise(1).save(tmp_path / "good.png")
    prepared = SeveralScorers([TinyTowers(), FakeScorer()]).prepare(tmp_path / "good.png")
    parts = getattr(prepared, "parts", [])
    assert len({id(part.pixels) for part in [prepared, *parts]}) == 1
    assert prepared.size == (48, 32)


def test_one_scorer_is_not_several() -> None:
    with pytest.raises(InputError, match="at least 2, not 1"):
        SeveralScorers([FakeScorer()])

"""The open_clip backend compared with open_clip, on tiny models of both kinds and on the bundled model."""

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cascadevlm.base.errors import BackendError, InputError
from cascadevlm.base.labels import LabelSet
from cascadevlm.config.loading import load_scorer
from cascadevlm.scorers.base import Scorer
from cascadevlm.testing import ScorerContract, noise
from cascadevlm_backends.open_clip import OpenClipScorer

WORDS = [
    "a",
    "photo",
    "of",
    "red",
    "blue",
    "grey",
    "crowned",
    "white",
    "breasted",
    "plain",
    "barred",
    "finch",
    "owl",
    "brace",
    "quote",
]
LABELS = LabelSet.of(["red finch", "blue owl", "grey finch"])


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A softmax model and a sigmoid model with random weights, in the form that ``local-dir:`` needs."""
    folder = tmp_path_factory.mktemp("open_clip")
    for kind in ("softmax", "sigmoid"):
        here = folder / kind
        vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", *WORDS])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(here)
        text = {"context_length": 16, "vocab_size": 64, "hf_tokenizer_name": "tiny", "width": 32, "heads": 2, "layers": 1}
        config: dict[str, object] = {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 24, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1},
            "text_cfg": {**text, "pool_type": "last", "pad_id": 0},
        }
        if kind == "sigmoid":
            config |= {"init_logit_bias": -7.5, "init_logit_scale": float(np.log(12)), "custom_text": True}
        (here / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}})
        )
        torch.manual_seed(0)
        model = open_clip.create_model(f"local-dir:{here}", load_weights=False)
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, here / "open_clip_model.safetensors")
    return folder


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_probabilities_are_the_models_own(models_folder: Path, kind: str) -> None:
    spec = f"local-dir:{models_folder / kind}"
    images = [noise(1, (60, 40)), noise(2, (24, 24))]
    model, _, preprocess = open_clip.create_model_and_transforms(spec)
    model.eval()
    tokens = open_clip.get_tokenizer(spec)([f"a photo of a {name}." for name in LABELS.names])
    with torch.no_grad():
        logits = model.get_logits(torch.stack([preprocess(image) for image in images]), tokens)[0]
    expected = logits.softmax(dim=1).numpy()
    scores = load_scorer(f"open_clip:{spec}", device="cpu").score(images, LABELS)
    np.testing.assert_allclose(scores.probabilities, expected, atol=1e-5)


def test_templates_are_averaged_in_embedding_space(models_folder: Path) -> None:
    spec = f"local-dir:{models_folder / 'softmax'}"
    both = OpenClipScorer(spec, templates=["a {label}", "photo of {label}"])
    alone = [OpenClipScorer(spec, templates=[template]).label_embeddings(LABELS) for template in both.templates]
    mean = np.mean(alone, axis=0)
    np.testing.assert_allclose(both.label_embeddings(LABELS), mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-6)


def test_texts_of_a_label_set_are_embedded_once(models_folder: Path) -> None:
    class Counting(OpenClipScorer):
        calls = 0

        def embed_texts(self, texts: object) -> "np.typing.NDArray[np.float32]":
            self.calls += 1
            return super().embed_texts(texts)  # type: ignore[arg-type]

    scorer = Counting(f"local-dir:{models_folder / 'softmax'}")
    for seed in range(3):
        scorer.score([noise(seed)], LABELS)
    assert scorer.calls == 1
    scorer.score([noise(0)], LabelSet.of(["other", "labels"]))
    assert scorer.calls == 2


def test_fingerprints_tell_weights_and_templates_apart(models_folder: Path) -> None:
    softmax, sigmoid = (f"local-dir:{models_folder / kind}" for kind in ("softmax", "sigmoid"))
    scorers = [
        OpenClipScorer(softmax),
        OpenClipScorer(sigmoid),
        OpenClipScorer(softmax, templates=["{label}"]),
        OpenClipScorer(softmax, dtype="bfloat16"),
    ]
    assert len({scorer.fingerprint(LABELS) for scorer in scorers}) == len(scorers)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("ViT-B-33/openai", "does not know the model 'ViT-B-33'. Did you mean 'ViT-B-32'"),
        ("ViT-B-32", "Write ViT-B-32/TAG with one of the tags openai"),
        ("ViT-B-32/opennai", "has no weights 'opennai'"),
        ("local-dir:/nowhere", "The folder '/nowhere' of the model does not exist"),
    ],
)
def test_models_that_cannot_be_had(model: str, sentence: str) -> None:
    with pytest.raises(BackendError) as caught:
        OpenClipScorer(model).score([noise(0)], LABELS)
    assert sentence in str(caught.value)


def test_a_template_without_its_variable_is_refused() -> None:
    with pytest.raises(InputError, match=r"lacks '\{label\}'"):
        OpenClipScorer("aviary", templates=["a photo of a bird"])


class TestBundledScorer(ScorerContract):
    def make(self) -> Scorer:
        return load_scorer("open_clip:aviary", device="cpu")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("open_clip_model.safetensors", b"no weights"),
        ("open_clip_model.safetensors", b""),
        ("open_clip_config.json", b"[" * 100_000),
        ("tokenizer.json", b"{}"),
        ("tokenizer_config.json", b"[1]"),
    ],
)
def test_a_damaged_folder_is_one_sentence(models_folder: Path, tmp_path: Path, name: str, content: bytes) -> None:
    folder = shutil.copytree(models_folder / "softmax", tmp_path / "model")
    (folder / name).write_bytes(content)
    with pytest.raises(BackendError, match="open_clip cannot load"):
        OpenClipScorer(f"local-dir:{folder}").load()

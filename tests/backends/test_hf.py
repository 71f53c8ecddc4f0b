import shutil
import string
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    AlignConfig,
    AutoModel,
    AutoProcessor,
    BaseImageProcessor,
    BertConfig,
    BertTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTokenizer,
    EfficientNetImageProcessor,
    GemmaTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessor,
)

from cascadevlm.base.errors import BackendError
from cascadevlm.base.labels import LabelSet
from cascadevlm.config.loading import load_scorer
from cascadevlm.scorers.base import Scorer
from cascadevlm.testing import ScorerContract, noise
from cascadevlm_backends._torch import DtypeName, choose_device, choose_dtype, directory_digest
from cascadevlm_backends.hf import HfScorer

CHARACTERS = [*string.ascii_lowercase, *string.digits, *"-.,'{}\""]
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
PICTURE = {"image_size": 32, "patch_size": 8}
SQUARE = {"height": 32, "width": 32}
SHORTEST = {"shortest_edge": 32}
SCALE = 50.0
PADDING: dict[str, dict[str, object]] = {
    "clip": {"padding": True},
    "chinese_clip": {"padding": True},
    "siglip": {"padding": "max_length", "max_length": 64},
    "siglip2": {"padding": "max_length", "max_length": 64},
}
"""The arguments for a processor in the documentation of transformers. Other processors pad by default."""
IMAGES = [noise(seed, size) for seed, size in enumerate([(48, 32), (20, 90), (64, 64)])]
LABELS = LabelSet.of(["red finch", "blue finch", "grey owl", "small brown bird"])
TEXTS = [f"a photo of a {name}." for name in LABELS.names]

Built = tuple[PreTrainedConfig, BaseImageProcessor, PreTrainedTokenizerBase]


def vocabulary(*others: str) -> dict[str, int]:
    return {token: number for number, token in enumerate([*others, *CHARACTERS])}


def clip() -> Built:
    vocab = vocabulary("<|startoftext|>", "<|endoftext|>", *(f"{character}</w>" for character in CHARACTERS))
    text = TOWER | {"vocab_size": len(vocab), "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 77}
    config = CLIPConfig(text_config=text, vision_config=TOWER | PICTURE, projection_dim=16)
    return config, CLIPImageProcessor(size=SHORTEST, crop_size=SQUARE), CLIPTokenizer(vocab, [])


def siglip_text(tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    return TOWER | {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 64}


def siglip() -> Built:
    backend = Tokenizer(WordLevel(vocabulary("<unk>", "</s>", " "), unk_token="<unk>"))
    backend.pre_tokenizer = Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="</s>", model_input_names=["input_ids"]
    )
    config = SiglipConfig(text_config=siglip_text(tokenizer), vision_config=TOWER | PICTURE)
    return config, SiglipImageProcessor(size=SQUARE), tokenizer


def gemma(kind: type[GemmaTokenizer | Siglip2Tokenizer]) -> GemmaTokenizer | Siglip2Tokenizer:
    vocab = vocabulary("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.ascii_uppercase)
    names = ["input_ids"]
    return kind(vocab, [], add_bos_token=False, add_eos_token=True, padding_side="right", model_input_names=names)


def siglip2() -> Built:
    # As published: the architecture of SigLIP with the tokenizer of Gemma, which keeps capitals.
    tokenizer = gemma(GemmaTokenizer)
    config = SiglipConfig(text_config=siglip_text(tokenizer), vision_config=TOWER | PICTURE)
    return config, SiglipImageProcessor(size=SQUARE), tokenizer


def siglip2_naflex() -> Built:
    tokenizer = gemma(Siglip2Tokenizer)
    config = Siglip2Config(text_config=siglip_text(tokenizer), vision_config=TOWER | {"patch_size": 16, "num_patches": 256})
    return config, Siglip2ImageProcessor(), tokenizer


def bert_tokenizer() -> BertTokenizer:
    pieces = (f"##{character}" for character in CHARACTERS)
    return BertTokenizer(vocabulary("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces))


def align() -> Built:
    tokenizer = bert_tokenizer()
    vision = {
        "image_size": 32,
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
        "kernel_sizes": [3, 3],
        "in_channels": [32, 16],
        "out_channels": [16, 24],
        "strides": [2, 2],
        "num_block_repeats": [1, 1],
        "expand_ratios": [1, 2],
    }
    config = AlignConfig(text_config=TOWER | {"vocab_size": len(tokenizer)}, vision_config=vision, projection_dim=24)
    return config, EfficientNetImageProcessor(size=SQUARE), tokenizer


def chinese_clip() -> Built:
    tokenizer = bert_tokenizer()
    text = TOWER | {"vocab_size": len(tokenizer)}
    config = ChineseCLIPConfig(text_config=text, vision_config=TOWER | PICTURE, projection_dim=16)
    return config, ChineseCLIPImageProcessor(size=SHORTEST, crop_size=SQUARE), tokenizer


FAMILIES: Mapping[str, Callable[[], Built]] = {
    build.__name__: build for build in (clip, siglip, siglip2, siglip2_naflex, align, chinese_clip)
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random model of every family, in the same files as on the hub."""
    root = tmp_path_factory.mktemp("hf")
    for family, build in FAMILIES.items():
        config, *preprocessing = build()
        torch.manual_seed(0)
        model = AutoModel.from_config(config)
        with torch.no_grad():
            if family == "align":
                model.temperature.fill_(1 / SCALE)
            else:
                model.logit_scale.fill_(np.log(SCALE))
            if family.startswith("siglip"):
                model.logit_bias.fill_(-10)
        for part in (model, *preprocessing):
            part.save_pretrained(root / family)
    return {family: root / family for family in FAMILIES}


def probabilities_of_transformers(folder: Path, **padding: object) -> NDArray[np.float32]:
    model = AutoModel.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    with torch.inference_mode():
        inputs = processor(images=IMAGES, text=TEXTS, return_tensors="pt", **padding)
        probabilities: NDArray[np.float32] = model(**inputs).logits_per_image.softmax(dim=1).numpy()
    return probabilities


def scorer_of(folder: Path) -> HfScorer:
    return HfScorer(str(folder), device="cpu")


class TestHfScorer(ScorerContract):
    @pytest.fixture(autouse=True, params=FAMILIES)
    def family(self, request: pytest.FixtureRequest, folders: dict[str, Path]) -> str:
        family: str = request.param
        self.folder = folders[family]
        return family

    def make(self) -> Scorer:
        return scorer_of(self.folder)

    def test_probabilities_are_those_of_transformers(self, family: str) -> None:
        theirs = probabilities_of_transformers(self.folder, **PADDING.get(family, {}))
        assert np.ptp(theirs) > 0.1
        np.testing.assert_allclose(self.make().score(IMAGES, LABELS).probabilities, theirs, atol=1e-5)

    def test_embeddings_have_unit_length(self) -> None:
        scorer = scorer_of(self.folder)
        for rows in (scorer.embed_images(IMAGES), scorer.embed_texts(LABELS.names)):
            assert rows.dtype == np.float32
            np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)

    def test_long_names_are_cut(self) -> None:
        assert np.isfinite(self.make().score(IMAGES, LabelSet.of(["a" * 900, "b"])).log_probs).all()

    def test_texts_may_be_many(self) -> None:
        texts = [f"bird {number}" for number in range(300)]
        scorer = scorer_of(self.folder)
        np.testing.assert_allclose(scorer.embed_texts(texts)[-1:], scorer.embed_texts(texts[-1:]), atol=1e-4)

    def test_scale_does_not_suffer_from_low_precision(self) -> None:
        scorer = HfScorer(str(self.folder), device="cpu", dtype="bfloat16")
        low, high = scorer.logits(np.array([[0, 1]], dtype=np.float32))[0]
        np.testing.assert_allclose(high - low, SCALE, rtol=1e-5)
        probabilities = scorer.score(IMAGES, LABELS).probabilities
        np.testing.assert_allclose(probabilities, self.make().score(IMAGES, LABELS).probabilities, atol=0.3)


@pytest.mark.parametrize("family", ["siglip", "siglip2", "siglip2_naflex"])
class TestSiglipTexts:
    def test_padding_matters(self, folders: dict[str, Path], family: str) -> None:
        unpadded = probabilities_of_transformers(folders[family], padding="longest")
        assert np.abs(scorer_of(folders[family]).score(IMAGES, LABELS).probabilities - unpadded).max() > 0.01

    def test_capitals_do_not_matter(self, folders: dict[str, Path], family: str) -> None:
        small, capital = scorer_of(folders[family]).embed_texts(["red finch", "Red FINCH"])
        np.testing.assert_allclose(small, capital, atol=1e-6)


def test_logits_have_scale_and_bias(folders: dict[str, Path]) -> None:
    cosines = np.array([[0.5]], dtype=np.float32)
    np.testing.assert_allclose(scorer_of(folders["siglip"]).logits(cosines), SCALE / 2 - 10, rtol=1e-5)
    np.testing.assert_allclose(scorer_of(folders["align"]).logits(cosines), SCALE / 2, rtol=1e-5)


def test_spec_names_it(folders: dict[str, Path]) -> None:
    scorer = load_scorer(f"hf:{folders['clip']}", device="cpu", dtype="float32", templates=["{label}"])
    assert isinstance(scorer, HfScorer)
    assert len(scorer.score(IMAGES, LABELS)) == len(IMAGES)


def test_fingerprint_follows_weights_precision_and_preprocessing(folders: dict[str, Path], tmp_path: Path) -> None:
    def fingerprint_after(change: Callable[[Path], object], dtype: DtypeName = "float32") -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir()))) / "clip"
        shutil.copytree(folders["clip"], folder)
        change(folder)
        return HfScorer(str(folder), device="cpu", dtype=dtype).fingerprint(LABELS)

    def other_weights(folder: Path) -> None:
        model = AutoModel.from_pretrained(folder)
        with torch.no_grad():
            model.logit_scale.add_(1)
        model.save_pretrained(folder)

    def nothing(folder: Path) -> None: ...

    def other_size(folder: Path) -> None:
        file = folder / "preprocessor_config.json"
        file.write_text(file.read_text().replace('"shortest_edge": 32', '"shortest_edge": 40'))

    same = fingerprint_after(nothing)
    assert same == scorer_of(folders["clip"]).fingerprint(LABELS)
    others = [fingerprint_after(other_weights), fingerprint_after(other_size), fingerprint_after(nothing, "bfloat16")]
    assert len({same, *others}) == 4


def test_hub_model_is_named_by_its_commit(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--bird--clip"
    shutil.copytree(folders["clip"], cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert f"bird/clip@{commit}" in HfScorer("bird/clip", device="cpu").fingerprint(LABELS)


def test_missing_model_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for model in ("openai/clip-vit-base-patch32", "/no/such/folder", "not an id"):
        with pytest.raises(
            BackendError, match=rf"^transformers cannot load '{model}': .*or use a complete model folder\.$"
        ) as caught:
            HfScorer(model, device="cpu").score(IMAGES, LABELS)
        assert "\n" not in str(caught.value)


def test_folder_without_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(folders["clip"] / "config.json", tmp_path)
    with pytest.raises(BackendError, match="no file named model"):
        scorer_of(tmp_path).embed_texts(["a"])


def test_truncated_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(folders["clip"], folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(BackendError, match="cannot load"):
        scorer_of(folder).embed_texts(["a"])


def test_other_kinds_of_model_are_refused(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(BackendError, match=r"has the model type 'bert'.*Supported: align, chinese_clip, clip, siglip, siglip2\."):
        scorer_of(tmp_path).embed_texts(["a"])


def test_missing_tokenizer_package_is_named(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def needs_sentencepiece(*args: object, **options: object) -> None:
        raise ImportError("SiglipTokenizer requires the SentencePiece library")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", needs_sentencepiece)
    with pytest.raises(BackendError, match="pip install sentencepiece protobuf"):
        scorer_of(folders["siglip"]).embed_texts(["a"])


def test_device_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device(None) == choose_device("cpu") == "cpu"
    with pytest.raises(BackendError, match="no device 'cuda:1'"):
        choose_device("cuda:1")
    with pytest.raises(BackendError, match="device 'gpu' is unknown"):
        choose_device("gpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device(None) == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device(None) == "cuda"


@pytest.mark.parametrize(
    ("device", "bfloat16", "chosen"),
    [
        ("cpu", True, torch.float32),
        ("mps", True, torch.float16),
        ("cuda:0", True, torch.bfloat16),
        ("cuda", False, torch.float16),
    ],
)
def test_precision_suits_the_device(device: str, bfloat16: bool, chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)
    assert choose_dtype(device, "auto") == chosen
    assert choose_dtype(device, "float32") == torch.float32
    with pytest.raises(BackendError, match="The dtype 'int8' is unknown"):
        choose_dtype(device, "int8")


def test_digest_is_of_what_makes_the_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = directory_digest(tmp_path)
    (tmp_path / "README.md").write_text("words")
    assert directory_digest(tmp_path) == before
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    assert directory_digest(tmp_path) != before

"""``hf:``: scorers that use two-tower models of transformers: CLIP, Chinese-CLIP, ALIGN, SigLIP, SigLIP 2 (also NaFlex).

The model is an id on the Hugging Face hub, or a folder. Preprocessing, tokenizer, logit scale and bias come from the model.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cascadevlm.base.errors import BackendError
from cascadevlm.scorers.base import DEFAULT_TEMPLATES, EmbeddingScorer, Prepared
from cascadevlm_backends._torch import (
    DtypeName,
    check_download,
    choose_device,
    choose_dtype,
    directory_digest,
    first_line,
    hide_progress_in_logs,
    text_blocks,
)

if TYPE_CHECKING:
    import torch
    from transformers import BatchFeature, PreTrainedConfig
    from transformers.modeling_outputs import BaseModelOutputWithPooling

SIGMOID_TYPES = frozenset({"siglip", "siglip2"})
MODEL_TYPES = SIGMOID_TYPES | {"align", "chinese_clip", "clip"}


class _TwoTowers(Protocol):
    """The attributes that all these model classes of transformers have."""

    config: "PreTrainedConfig"

    def get_image_features(self, **inputs: "torch.Tensor") -> "BaseModelOutputWithPooling": ...

    def get_text_features(self, **inputs: "torch.Tensor") -> "BaseModelOutputWithPooling": ...


class _ImageProcessor(Protocol):
    model_input_names: list[str]

    def to_json_string(self) -> str: ...


class _Processor(Protocol):
    image_processor: _ImageProcessor

    def __call__(self, **options: object) -> "BatchFeature": ...


@dataclass(frozen=True)
class _Loaded:
    model: _TwoTowers
    processor: _Processor
    device: str
    dtype: "torch.dtype"
    scale: float
    bias: float
    fingerprint: str


class HfScorer(EmbeddingScorer):
    """A scorer that uses a two-tower model of transformers.

    Args:
        model: an id on the Hugging Face hub, or a folder.
        templates: texts in which ``{label}`` stands for a class.
        device: ``"cuda"``, ``"mps"``, ``"cpu"`` or another device of torch. Default: the best available device.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``. Default: the best precision for the device.
        revision: a commit, branch or tag on the hub. Default: the main branch.

    Raises:
        BackendError: at first use, if the type of the model is not supported, or if the model cannot be loaded.
    """

    def __init__(
        self,
        model: str,
        *,
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        device: str | None = None,
        dtype: DtypeName = "auto",
        revision: str | None = None,
    ) -> None:
        super().__init__(templates=templates)
        self.model = model
        self.device = device
        self.dtype: DtypeName = dtype
        self.revision = revision

    def check(self) -> str:
        return "" if Path(self.model).is_dir() else check_download(self.model, self.model)

    def load(self) -> None:
        self._loaded  # noqa: B018  # loads it

    def preprocess(self, image: Image.Image) -> NDArray[np.float32] | None:
        """``(3, H, W) float32``, the pixels of one image. None for NaFlex, which must process the images of a batch together."""
        if "pixel_attention_mask" in self._loaded.processor.image_processor.model_input_names:
            return None
        pixels: NDArray[np.float32] = self._inputs([image])["pixel_values"][0].numpy()
        return pixels

    def embed_images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        return self._embed(self._inputs(images))

    def embed_prepared(self, prepared: Sequence[Prepared]) -> NDArray[np.float32]:
        import torch
        from transformers import BatchFeature

        pixels = [each.features for each in prepared if each.features is not None]
        if len(pixels) < len(prepared):
            return super().embed_prepared(prepared)
        return self._embed(BatchFeature({"pixel_values": torch.from_numpy(np.stack(pixels))}))

    def _inputs(self, images: Sequence[Image.Image]) -> "BatchFeature":
        return self._loaded.processor(images=list(images), return_tensors="pt")

    def _embed(self, inputs: "BatchFeature") -> NDArray[np.float32]:
        import torch

        loaded = self._loaded
        with torch.inference_mode():
            return _unit_rows(loaded.model.get_image_features(**inputs.to(loaded.device, loaded.dtype)))

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.concatenate([self._embed_texts(block) for block in text_blocks(texts, self._loaded.device)])

    def _embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        import torch

        loaded = self._loaded
        config = loaded.model.config
        sigmoid = config.model_type in SIGMOID_TYPES
        with torch.inference_mode():
            inputs = loaded.processor(
                # SigLIP was trained on lower-case texts. The tokenizer of SigLIP 2 (Gemma's) does not convert to lower case.
                text=[text.lower() if sigmoid else text for text in texts],
                # SigLIP's embedding is the output at the last position, so texts are padded to the same length as in training.
                padding="max_length" if sigmoid else "longest",
                truncation=True,
                max_length=config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(loaded.device)
            return _unit_rows(loaded.model.get_text_features(**inputs))

    def logits(self, similarities: NDArray[np.float32]) -> NDArray[np.float32]:
        return similarities * np.float32(self._loaded.scale) + np.float32(self._loaded.bias)

    def model_fingerprint(self) -> str:
        return self._loaded.fingerprint

    @cached_property
    def _loaded(self) -> _Loaded:
        device = choose_device(self.device)
        dtype = choose_dtype(device, self.dtype)
        try:
            return self._load(device, dtype)
        except ImportError as exc:
            raise BackendError(
                f"The tokenizer of {self.model!r} needs a package that is not installed.",
                hint="Install it: pip install sentencepiece protobuf",
            ) from exc
        except BackendError:
            raise
        except Exception as exc:  # transformers raises errors of many types for wrong files
            reason = first_line(exc).partition(". ")[0].removesuffix(".")
            raise BackendError(
                f"transformers cannot load {self.model!r}: {reason}.",
                hint="Check the id of the model and the connection to the hub, or use a complete model folder.",
            ) from exc

    def _load(self, device: str, dtype: "torch.dtype") -> _Loaded:
        import torch
        from transformers import AutoConfig, AutoModel, AutoProcessor
        from transformers.utils.hub import cached_file, extract_commit_hash

        hide_progress_in_logs()
        folder = Path(self.model)
        commit = extract_commit_hash(cached_file(self.model, "config.json", revision=self.revision), None)
        config = AutoConfig.from_pretrained(self.model, revision=commit, trust_remote_code=False)
        if config.model_type not in MODEL_TYPES:
            raise BackendError(
                f"{self.model!r} has the model type {config.model_type!r}, which is not supported.",
                hint=f"Supported: {', '.join(sorted(MODEL_TYPES))}.",
            )
        # The model is first loaded in full precision for its logit scale: in bfloat16, CLIP's 100 would become 98.9.
        model = AutoModel.from_pretrained(self.model, config=config, revision=commit, dtype=torch.float32)
        processor = AutoProcessor.from_pretrained(self.model, revision=commit)
        scale = 1 / model.temperature if config.model_type == "align" else model.logit_scale.exp()
        preprocessing = hashlib.sha256(processor.image_processor.to_json_string().encode()).hexdigest()[:12]
        identity = f"{folder.name}@{directory_digest(folder)[:16]}" if folder.is_dir() else f"{self.model}@{commit}"
        return _Loaded(
            model=model.to(device, dtype).eval(),
            processor=processor,
            device=device,
            dtype=dtype,
            scale=scale.item(),
            bias=model.logit_bias.item() if config.model_type in SIGMOID_TYPES else 0.0,
            fingerprint=f"hf:{identity}|{str(dtype).removeprefix('torch.')}|preprocessing={preprocessing}",
        )


def _unit_rows(features: "BaseModelOutputWithPooling") -> NDArray[np.float32]:
    import torch

    assert features.pooler_output is not None
    array: NDArray[np.float32] = torch.nn.functional.normalize(features.pooler_output.float(), dim=-1).cpu().numpy()
    return array

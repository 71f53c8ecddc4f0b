"""``open_clip:``: scorers that use a model of open_clip.

The model is ``NAME/PRETRAINED`` (``ViT-B-16-SigLIP2/webli``), ``hf-hub:ORG/NAME``, ``local-dir:FOLDER``, or ``aviary`` for the
bundled model. Preprocessing, tokenizer, logit scale and bias come from the model.
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

from cascadevlm.base.entry_points import nearest
from cascadevlm.base.errors import BackendError
from cascadevlm.scorers.base import DEFAULT_TEMPLATES, EmbeddingScorer, Prepared
from cascadevlm_backends._torch import (
    DtypeName,
    check_download,
    choose_device,
    choose_dtype,
    first_line,
    not_downloaded,
    on_this_machine,
    text_blocks,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

AVIARY = Path(__file__).parent / "aviary" / "scorer"


class _TwoTowers(Protocol):
    """The parts of open_clip's models that are used here."""

    logit_scale: "torch.Tensor"

    def encode_image(self, image: "torch.Tensor", normalize: bool) -> "torch.Tensor": ...
    def encode_text(self, text: "torch.Tensor", normalize: bool) -> "torch.Tensor": ...
    def state_dict(self) -> "dict[str, torch.Tensor]": ...


@dataclass(frozen=True)
class _Loaded:
    """A loaded model, with its preprocessing and its tokenizer.

    Attributes:
        fit: resizes an image to the input size of the model.
        normalize: the last step of the preprocessing, applied to pixels from 0 to 1.
    """

    model: _TwoTowers
    fit: "Callable[[Image.Image], Image.Image]"
    normalize: "Callable[[torch.Tensor], torch.Tensor]"
    tokenize: "Callable[[list[str]], torch.Tensor]"
    device: str
    dtype: "torch.dtype"
    scale: float
    bias: float
    digest: str


class OpenClipScorer(EmbeddingScorer):
    """A scorer that uses a model of open_clip.

    Args:
        model: ``NAME/PRETRAINED``, ``hf-hub:ORG/NAME``, ``local-dir:FOLDER`` or ``aviary``.
        templates: texts in which ``{label}`` stands for a class.
        device: ``"cuda"``, ``"mps"``, ``"cpu"`` or another device of torch. Default: the best available device.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``. Default: the best precision for the device.

    Raises:
        BackendError: at first use, if open_clip does not know the model or cannot load it.
    """

    def __init__(
        self,
        model: str,
        *,
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        device: str | None = None,
        dtype: DtypeName = "auto",
    ) -> None:
        super().__init__(templates=templates)
        self.model = model
        self.device = device
        self.dtype: DtypeName = dtype

    def check(self) -> str:
        name, _ = self._name_and_pretrained()
        folder = Path(name.removeprefix("local-dir:"))
        if name.startswith("local-dir:") and not folder.is_dir():
            raise BackendError(f"The folder {str(folder)!r} of the model does not exist.", hint="Check the path.")
        return check_download(self.model, self._repository) if self._repository else ""

    @property
    def _repository(self) -> str:
        """The only repository on the hub that has the model. "" if the model also comes from elsewhere."""
        import open_clip

        name, pretrained = self._name_and_pretrained()
        if pretrained is None:
            return name.removeprefix("hf-hub:") if name.startswith("hf-hub:") else ""
        source = open_clip.get_pretrained_cfg(name, pretrained)
        return "" if source.get("url") else "/".join(source["hf_hub"].split("/")[:2])

    def load(self) -> None:
        self._loaded  # noqa: B018  # loads it

    def preprocess(self, image: Image.Image) -> NDArray[np.uint8]:
        """``(H, W, 3) uint8``, the resized image. Pixels are normalised later, so that reader threads start no torch threads."""
        return np.asarray(self._loaded.fit(image))

    def embed_images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        return self._embed([self.preprocess(image) for image in images])

    def embed_prepared(self, prepared: Sequence[Prepared]) -> NDArray[np.float32]:
        return self._embed([each.features for each in prepared if each.features is not None])

    def _embed(self, pixels: Sequence[NDArray[np.uint8 | np.float32]]) -> NDArray[np.float32]:
        import torch

        loaded = self._loaded
        with torch.inference_mode():
            batch = torch.from_numpy(np.stack(pixels)).to(loaded.device).permute(0, 3, 1, 2)
            batch = loaded.normalize(batch.to(torch.float32, memory_format=torch.contiguous_format) / 255)
            return _array(loaded.model.encode_image(batch.to(loaded.dtype), normalize=True))

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        import torch

        loaded = self._loaded
        with torch.inference_mode():
            tokens = (loaded.tokenize(list(block)).to(loaded.device) for block in text_blocks(texts, loaded.device))
            return np.concatenate([_array(loaded.model.encode_text(block, normalize=True)) for block in tokens])

    def logits(self, similarities: NDArray[np.float32]) -> NDArray[np.float32]:
        return similarities * np.float32(self._loaded.scale) + np.float32(self._loaded.bias)

    def model_fingerprint(self) -> str:
        loaded = self._loaded
        precision = str(loaded.dtype).removeprefix("torch.")
        return f"open_clip:{self.model}|weights={loaded.digest}|{precision}"

    @cached_property
    def _loaded(self) -> _Loaded:
        import open_clip
        import torch
        from torchvision.transforms import Compose

        device = choose_device(self.device)
        dtype = choose_dtype(device, self.dtype)
        name, pretrained = self._name_and_pretrained()
        self.check()
        precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
        try:
            model, _, preprocess = open_clip.create_model_and_transforms(
                name, pretrained=pretrained, precision=precision, device=device
            )
            tokenize = open_clip.get_tokenizer(name)
        except Exception as exc:  # open_clip raises errors of many types for wrong files
            reason = first_line(exc).removesuffix(".")
            if self._repository and not on_this_machine(self._repository):
                raise not_downloaded(self.model, reason) from exc
            raise BackendError(
                f"open_clip cannot load {self.model!r}: {reason}.",
                hint="Check the name of the model, and the folder or the connection to the hub.",
            ) from exc
        model.eval()
        bias = getattr(model, "logit_bias", None)
        *fit, _, normalize = preprocess.transforms  # the step in between converts the image to a tensor
        return _Loaded(
            model=model,
            fit=Compose(fit),
            normalize=normalize,
            tokenize=tokenize,
            device=device,
            dtype=dtype,
            scale=model.logit_scale.detach().exp().item(),
            bias=0.0 if bias is None else bias.item(),
            digest=_digest(model, preprocess),
        )

    def _name_and_pretrained(self) -> tuple[str, str | None]:
        import open_clip

        if self.model == "aviary":
            return f"local-dir:{AVIARY}", None
        if self.model.startswith(("hf-hub:", "local-dir:")):
            return self.model, None
        name, _, pretrained = self.model.partition("/")
        known = open_clip.list_models()
        if name not in known:
            raise BackendError(f"open_clip does not know the model {name!r}.", hint=nearest(name, known))
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained not in tags:
            hint = f"Write {name}/TAG with one of the tags {', '.join(tags)}." if tags else "Use a model with pretrained weights."
            raise BackendError(f"open_clip has no weights {pretrained!r} for the model {name!r}.", hint=hint)
        return name, pretrained


def _array(features: "torch.Tensor") -> NDArray[np.float32]:
    array: NDArray[np.float32] = features.float().cpu().numpy()
    return array


def _digest(model: _TwoTowers, preprocess: object) -> str:
    """A digest of the preprocessing and of the weights, in the precision in which the model runs."""
    import torch

    digest = hashlib.sha256(repr(preprocess).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]

"""What every local model has to settle: the device, the precision, and which files it is made of."""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from cascadevlm.base.errors import BackendError

if TYPE_CHECKING:
    import torch

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

TEXTS_AT_ONCE, TEXTS_AT_ONCE_ON_CPU = 256, 32

MODEL_FILES = frozenset({".json", ".safetensors", ".bin", ".pt", ".pth", ".txt", ".model", ".jinja", ".py"})


def hide_progress_in_logs() -> None:
    """Keep transformers' progress bars to terminals."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def first_line(error: Exception) -> str:
    """What an error of a library says, or of what kind it is where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def choose_device(device: str | None) -> str:
    """The device asked for, or the best there is: cuda, then mps, then cpu.

    Raises:
        BackendError: if the device asked for is not there.
    """
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device is None:
        return next(name for name, there in available.items() if there)
    try:
        kind = torch.device(device).type
    except RuntimeError as exc:
        raise BackendError(f"There is no device {device!r}.", hint="Write 'cuda', 'cuda:1', 'mps' or 'cpu'.") from exc
    if not available.get(kind, True):
        raise BackendError(f"This machine has no device {device!r}.", hint="Leave the device out to take the best there is.")
    return device


def choose_dtype(device: str, dtype: str) -> "torch.dtype":
    """The precision asked for, or what suits the device: bfloat16 or float16 on accelerators, float32 on the CPU.

    Raises:
        BackendError: if there is no such precision.
    """
    import torch

    if dtype not in get_args(DtypeName):
        raise BackendError(f"There is no dtype {dtype!r}.", hint=f"Write one of: {', '.join(get_args(DtypeName))}.")
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    kind = torch.device(device).type
    # Emulated bfloat16 is slower than the float16 such cards have in hardware.
    if kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16 if kind in ("cuda", "mps") else torch.float32


def text_blocks(texts: Sequence[str], device: str) -> Iterator[Sequence[str]]:
    """As many texts at once as a device is fast with: a CPU embeds 32 at once in .8 of the time it takes for 64."""
    size = TEXTS_AT_ONCE_ON_CPU if device.startswith("cpu") else TEXTS_AT_ONCE
    return (texts[start : start + size] for start in range(0, len(texts), size))


def directory_digest(path: Path) -> str:
    """The sha256 of names and contents of the configuration, weight and tokenizer files directly in a model's folder."""
    digest = hashlib.sha256()
    for file in sorted(file for file in path.iterdir() if file.suffix in MODEL_FILES and file.is_file()):
        with file.open("rb") as content:
            digest.update(f"{file.name}\0{hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()

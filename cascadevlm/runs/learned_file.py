"""``learned.safetensors``: what a run had learned at the beginning of a period, and where its decisions stood there."""

import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from cascadevlm.base.files import write_whole
from cascadevlm.cascade.engine import BEGINNING, Checkpoint
from cascadevlm.decision.learning import Learned
from cascadevlm.decision.means import Sums
from cascadevlm.decision.scorer_calibration import Floats

_CHECKPOINT = TypeAdapter(Checkpoint)
_HEADER = "cascadevlm.learned"
_SUMS = ("before", "sums")


def write_learned(path: Path, checkpoint: Checkpoint, learned: Learned) -> None:
    """Write a checkpoint and what was learned before it, as a whole or not at all.

    Raises:
        OSError: if the file cannot be written.
    """
    from safetensors.numpy import save

    arrays = {
        f"{name}.{part}": np.array(value, order="C")
        for name, sums in zip(_SUMS, (learned.before, learned.sums), strict=True)
        for part, value in vars(sums).items()
    }
    header = {
        "checkpoint": _CHECKPOINT.dump_python(checkpoint, mode="json"),
        "batch_size": learned.batch_size,
        "crc32": _checksum(arrays),
    }
    write_whole(path, save(arrays, {_HEADER: json.dumps(header)}))  # one key: the order of several changes


def read_learned(path: Path) -> Checkpoint:
    """The checkpoint in a file, or the beginning if the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            arrays: dict[str, Floats] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        if header["crc32"] != _checksum(arrays):
            return BEGINNING
        checkpoint = _CHECKPOINT.validate_json(json.dumps(header["checkpoint"]))
        before, sums = (
            Sums(
                counts=arrays[f"{name}.counts"],
                firsts=arrays[f"{name}.firsts"],
                seconds=arrays[f"{name}.seconds"],
                weight=float(arrays[f"{name}.weight"]),
            )
            for name in _SUMS
        )
        batch_size = int(header["batch_size"])
    except (OSError, SafetensorError, ValidationError, ValueError, TypeError, KeyError):
        return BEGINNING
    learned = Learned(images=checkpoint.images, batch_size=batch_size, before=before, sums=sums)
    return replace(checkpoint, learned=learned)


def _checksum(arrays: dict[str, Floats]) -> int:
    """CRC-32 of the arrays, in the order of their names."""
    found = 0
    for name in sorted(arrays):
        found = zlib.crc32(arrays[name].tobytes(), zlib.crc32(name.encode(), found))
    return found

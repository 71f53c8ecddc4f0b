"""Arrays of columns, and arrays in JSON. A column is the position of a label in a score matrix."""

import base64
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Base64Bytes, BaseModel, GetCoreSchemaHandler, NonNegativeInt
from pydantic_core import CoreSchema, core_schema

NOBODY = -1
"""The value for "no label" in an array of columns."""


Columns = NDArray[np.int64]
"""`int64` array. Each value is a column of the score matrix, or `NOBODY`."""


class _Written(BaseModel):
    """An array in JSON: its shape, and its numbers row by row in base64."""

    shape: tuple[NonNegativeInt, ...]
    base64: Base64Bytes


@dataclass(frozen=True)
class Packed:
    """Annotation of an array that pydantic reads and writes as its shape and its numbers in base64.

    Attributes:
        stored: type of the numbers in JSON, little-endian, for example ``"<f2"``.
        used: type of the numbers in memory.
    """

    stored: str
    used: type[np.generic]

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        writing = core_schema.plain_serializer_function_ser_schema(self._write)
        return core_schema.no_info_plain_validator_function(self._read, serialization=writing)

    def _write(self, array: NDArray[np.generic]) -> dict[str, object]:
        numbers = np.ascontiguousarray(array, dtype=self.stored)
        return {"shape": list(array.shape), "base64": base64.b64encode(numbers.tobytes()).decode()}

    def _read(self, value: object) -> NDArray[np.generic]:
        written = _Written.model_validate(value)
        array = np.frombuffer(written.base64, dtype=self.stored).reshape(written.shape).astype(self.used)
        if not np.isfinite(array).all():
            raise ValueError("an array contains NaN or infinity")
        return array


StoredColumns = Annotated[Columns, Packed("<i4", np.int64)]
"""Columns in JSON."""
StoredRows = Annotated[NDArray[np.float64], Packed("<f4", np.float64)]
"""`(N, C) float64` in JSON, with the precision of float32."""
StoredEmbeddings = Annotated[NDArray[np.floating], Packed("<f2", np.float16)]
"""`(N, D)` embeddings in JSON, with the precision of float16."""

"""Numbers with bounds, each declared once: the configuration is validated with it, and so are arguments in Python."""

from functools import cache
from typing import Annotated, TypeAlias

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from cascadevlm.base.errors import InputError

Count: TypeAlias = Annotated[int, Field(ge=1)]
Natural: TypeAlias = Annotated[int, Field(ge=0)]
Probability: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Mass: TypeAlias = Annotated[float, Field(gt=0, le=1)]


@cache
def _adapter(kind: object) -> TypeAdapter[float]:
    return TypeAdapter(kind)  # type: ignore[arg-type]  # an annotation


def require_number(name: str, value: object, kind: object) -> None:
    """Refuse an argument that is not a number of a kind: `Count`, `Natural`, `Probability` or `Mass`.

    Raises:
        InputError: naming the argument, what it should be, and its value.
    """
    plain = value.item() if isinstance(value, np.generic) else value
    try:
        _adapter(kind).validate_python(plain, strict=True)
    except ValidationError as exc:
        raise InputError(f"{name}: {exc.errors()[0]['msg']} (given: {value!r}).") from None

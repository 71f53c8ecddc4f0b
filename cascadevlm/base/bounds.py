"""Numbers with bounds. Each is declared once, and validates keys of the configuration and arguments in Python."""

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
    """Refuse an argument that is not a number of the given kind: `Count`, `Natural`, `Probability` or `Mass`.

    Raises:
        InputError: if the argument is refused. The message names the argument, its bounds and its value.
    """
    plain = value.item() if isinstance(value, np.generic) else value
    try:
        _adapter(kind).validate_python(plain, strict=True)
    except ValidationError as exc:
        raise InputError(f"{name}: {exc.errors()[0]['msg']} (given: {value!r}).") from None

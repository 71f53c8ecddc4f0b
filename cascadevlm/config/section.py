"""What all sections of the configuration have in common."""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, JsonValue
from pydantic_core import to_jsonable_python

from cascadevlm.base.entry_points import Option

Options = dict[str, Option]
"""Options of a backend."""


@dataclass(frozen=True)
class MayChange:
    """Marks a key whose value may change when a bulk run is continued.

    Attributes:
        because: the reason why the change is safe.
    """

    because: str


class Section(BaseModel):
    """A section. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def deciding(self) -> dict[str, JsonValue]:
        """The values of all keys that are not marked with `MayChange`."""
        marked = {name for name, key in type(self).model_fields.items() if any(isinstance(m, MayChange) for m in key.metadata)}
        return {name: _deciding(value) for name, value in self if name not in marked}


def _deciding(value: object) -> JsonValue:
    if isinstance(value, Section):
        return value.deciding()
    if isinstance(value, tuple):
        return [_deciding(each) for each in value]
    plain: JsonValue = to_jsonable_python(value)
    return plain

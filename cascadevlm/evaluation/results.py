"""The result of a study: its rows, its table for a terminal or a page, and its file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from cascadevlm.base.errors import DataError
from cascadevlm.evaluation.metrics import Interval


class Row(BaseModel):
    """One variant of a study.

    Further figures are extra fields. A figure is None if there are no images to compute it from.

    Attributes:
        variant: name of the variant.
        accuracy: share of right predictions among the images that could be read.
        interval: 95 % bootstrap interval of the accuracy.
        calls: number of questions that the policy asks.
        dollars: US dollars for these questions. An answer from the cache has its original cost.
        seconds: sum of the judge's seconds for these questions. An answer from the cache counts as the mean time of the other
            answers. None if all answers came from the cache.
    """

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)
    __pydantic_extra__: dict[str, float | None] = Field(init=False)

    variant: str
    accuracy: float
    interval: Interval | None
    calls: int
    dollars: float
    seconds: float | None

    @property
    def figures(self) -> Mapping[str, float | None]:
        """The further figures by name."""
        return self.__pydantic_extra__

    def with_figures(self, **figures: float | None) -> "Row":
        """The row with further figures."""
        return Row.model_validate(self.model_dump() | figures)


class Study(BaseModel):
    """``study-NAME.json``: the name of a study, the question it answers, one row per variant, and remarks."""

    model_config = ConfigDict(frozen=True)

    study: str
    question: str
    rows: Annotated[tuple[Row, ...], Field(min_length=1)]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, JsonValue]:
        """The study as JSON-serialisable data."""
        return self.model_dump(mode="json")

    @property
    def table(self) -> list[list[str]]:
        """Lines of cells. The first line and the first cell of each line are headings.

        Variants are lines or columns, so that the table has more lines than columns.
        """
        known = ("accuracy", "interval", "calls", "dollars", "seconds")
        further = dict.fromkeys(name for row in self.rows for name in row.figures)
        columns = [
            ["", *(row.variant for row in self.rows)],
            *([_heading(name), *(_cell(name, getattr(row, name)) for row in self.rows)] for name in known),
            *([_heading(name), *(_cell(name, row.figures.get(name)) for row in self.rows)] for name in further),
        ]
        return columns if len(columns) > len(self.rows) else [list(line) for line in zip(*columns, strict=True)]


def read_studies(folder: Path) -> tuple[Study, ...]:
    """The studies in a folder, from its files ``study-NAME.json``.

    Raises:
        DataError: if a result cannot be read.
    """
    studies = []
    for file in sorted(folder.glob("study-*.json")):
        try:
            studies.append(Study.model_validate_json(file.read_bytes()))
        except (OSError, ValidationError) as exc:
            why = exc.errors()[0]["msg"] if isinstance(exc, ValidationError) else exc.strerror
            raise DataError(
                f"{str(file)!r} is not the result of a study: {why}.", hint="Repeat the study: cascadevlm study."
            ) from exc
    return tuple(studies)


def _heading(name: str) -> str:
    return "95% interval" if name == "interval" else name.replace("_", " ")


def _cell(name: str, value: float | Interval | None) -> str:
    """A figure of a study as text. The last word of its name decides the format; the default is percent. None gives ""."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        return f"{100 * value[0]:.1f} to {value[1]:.1%}"
    match name.rpartition("_")[2]:
        case "dollars":
            return f"${value:,.4f}"
        case "seconds":
            return f"{value:,.1f}"
        case "calls" | "tokens" | "errors":
            return f"{value:,.0f}"
        case "value" | "threshold":
            return f"{value:.3g}"
    return f"{value:.1%}"

"""Results of studies, as they lie beside a record, and their tables."""

from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cascadevlm.base.errors import DataError
from cascadevlm.evaluation.texts import study_figure

_figure = partial(study_figure, grouping=",")


class StudyRow(BaseModel):
    """One variant; further numeric columns are welcome."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, float | None]

    variant: str
    accuracy: float
    interval: tuple[float, float] | None
    calls: int
    dollars: float
    seconds: float | None


class StudyResult(BaseModel):
    """``study-*.json``."""

    study: str
    question: str
    rows: Annotated[list[StudyRow], Field(min_length=1)]
    notes: list[str] = []

    @property
    def table(self) -> list[list[str]]:
        """Lines of cells; the first of each, and all of the first, are headings. The longer side goes down."""
        further = dict.fromkeys(name for row in self.rows for name in row.__pydantic_extra__)
        columns = [
            ["", *(row.variant for row in self.rows)],
            ["accuracy", *(_figure("accuracy", row.accuracy) for row in self.rows)],
            ["95% interval", *(_ends(row.interval) for row in self.rows)],
            ["calls", *(_figure("calls", row.calls) for row in self.rows)],
            ["dollars", *(_figure("dollars", row.dollars) for row in self.rows)],
            ["seconds", *(_figure("seconds", row.seconds) for row in self.rows)],
            *(
                [name.replace("_", " "), *(_figure(name, row.__pydantic_extra__.get(name)) for row in self.rows)]
                for name in further
            ),
        ]
        return columns if len(columns) > len(self.rows) else [list(line) for line in zip(*columns, strict=True)]


def _ends(interval: tuple[float, float] | None) -> str:
    return f"{100 * interval[0]:.1f} to {interval[1]:.1%}" if interval else ""


def read_studies(folder: Path) -> tuple[StudyResult, ...]:
    """The studies whose results lie in a folder.

    Raises:
        DataError: if one cannot be read.
    """
    studies = []
    for file in sorted(folder.glob("study-*.json")):
        try:
            studies.append(StudyResult.model_validate_json(file.read_bytes()))
        except (OSError, ValidationError) as exc:
            why = exc.errors()[0]["msg"] if isinstance(exc, ValidationError) else exc.strerror
            raise DataError(f"{str(file)!r} is no result of a study: {why}.", hint="Make it again: cascadevlm study.") from exc
    return tuple(studies)

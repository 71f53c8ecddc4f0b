"""The predictions in a folder or a file, with the images that they are of."""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cascadevlm.base.errors import DataError
from cascadevlm.base.remote import Place, is_address, name_of, place_of
from cascadevlm.base.tables import ColumnNames
from cascadevlm.runs.inputs import Inputs
from cascadevlm.runs.lines import Line, read_lines
from cascadevlm.runs.run_folder import PREDICTIONS


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The predictions of a file with one JSON object per line. Each iteration reads the file again.

    Attributes:
        file: the file. It may grow during the export.
        end: number of bytes to read.
        table: the table that contains the images, one row per line; None if the images are files.
    """

    file: Path
    end: int
    table: Inputs | None

    def __iter__(self) -> Iterator[tuple[int, Line]]:
        """The lines with their numbers in the file, from 1.

        Raises:
            DataError: if a line is not a prediction.
        """
        return read_lines(self.file, Line, self.end)

    def with_images(self) -> Iterator[tuple[int, Line, Place | bytes]]:
        """The lines with their numbers, and the path, the address or the bytes of the image.

        Raises:
            DataError: if the table contains other images than during the run.
        """
        if self.table is None:
            yield from ((number, line, place_of(line.path)) for number, line in self)
            return
        rows = iter(self.table)
        for number, line in self:
            name, image = next(rows, ("", b""))
            require_same_row(self.table, number - 1, line.path, name)
            yield number, line, image if isinstance(image, bytes) else place_of(line.path)


def require_same_row(table: Inputs, row: int, was: str, now: str) -> None:
    """Raise DataError if the image in a row of a run's table has another name than in the run. "" means that the row is gone."""
    if was != now:
        told = f"Row {row} of {name_of(table.path)!r} was {was!r} in the run and is now {now or 'gone'!r}."
        raise DataError(told, hint="Restore the table as it was in the run.")


def predictions_of(run: Path, table: Inputs | None) -> Predictions:
    """The predictions in a file or a folder.

    Raises:
        DataError: if there are no predictions.
    """
    if not run.exists():
        raise DataError(f"{str(run)!r} does not exist.", hint="Check the path.")
    file = run / PREDICTIONS if run.is_dir() else run
    if not file.exists():
        raise DataError(f"{str(run)!r} contains no predictions.", hint=f"Give the folder of a run, which contains {PREDICTIONS}.")
    return Predictions(file=file, end=_whole_lines(file) if run.is_dir() else file.stat().st_size, table=table)


def _whole_lines(file: Path) -> int:
    """Number of bytes of all complete lines. The last line may be incomplete."""
    if not file.stat().st_size:
        return 0
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.rfind(b"\n") + 1


def table_of(inputs: str, columns: ColumnNames) -> Inputs | None:
    """The table that contains the images of a run; None if the images are files or the table does not exist any more.

    Args:
        inputs: the inputs in the manifest of the run.
        columns: the columns in the manifest.
    """
    if not (is_address(inputs) or Path(inputs).is_absolute()):
        return None
    try:
        table = Inputs(inputs, columns)
    except DataError:
        return None
    return table if table.holds_images else None

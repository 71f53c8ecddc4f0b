"""Measures the memory of ``run`` and ``export`` over a large table: ``python -m benchmarks.tables``.

The table is a Parquet file with encoded images of 8 x 8 pixels, an id, and three kept columns. The scorer takes no time. Every
step has its own process, and its peak memory is compared with the peak memory over a table of a few rows.
"""

import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import pyarrow
import pyarrow.parquet
import typer

from benchmarks.throughput import BATCH, NAMES, Made
from cascadevlm import Cascade
from cascadevlm.base.tables import ColumnNames
from cascadevlm.runs import bulk
from cascadevlm.runs.export import export
from cascadevlm.runs.inputs import Inputs
from cascadevlm.testing import noise

COLUMNS = ColumnNames(image="photo", id="sku", keep=("price", "title", "in_stock"))
GROUP = 10_000
"""Number of rows per group of the Parquet file."""
STEPS = ("run", "csv", "parquet")


def images() -> list[bytes]:
    """A thousand different images."""
    encoded = []
    for number in range(1000):
        file = io.BytesIO()
        noise(number, (8, 8)).save(file, "BMP")
        encoded.append(file.getvalue())
    return encoded


def write(path: Path, rows: int) -> None:
    """Write the table."""
    photos = images()

    def groups() -> Iterator[pyarrow.Table]:
        for first in range(0, rows, GROUP):
            numbers = range(first, min(rows, first + GROUP))
            yield pyarrow.table(
                {
                    "photo": [photos[number % 1000] for number in numbers],
                    "sku": [f"SKU-{number:09}" for number in numbers],
                    "price": [number / 100 for number in numbers],
                    "title": [f"A product with a title of usual length, number {number}" for number in numbers],
                    "in_stock": [number % 3 == 0 for number in numbers],
                }
            )

    schema = next(groups()).schema
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for group in groups():
            writer.write_table(group)


def work(step: str, folder: Path) -> None:
    """Do one step, and print its seconds and the peak memory of the process in MB."""
    began = time.perf_counter()
    if step == "run":
        cascade = Cascade(Made(len(NAMES)), [], labels=NAMES, batch_size=BATCH)
        bulk.run(cascade, Inputs(folder / "table.parquet", COLUMNS), folder / "run", config={})
    else:
        export(folder / "run", step, folder / f"out.{step}")
    print(time.perf_counter() - began, peak())


def peak() -> float:
    """Peak memory of this process in MB. (``ru_maxrss`` would contain the memory of the process that started this one.)"""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def measured(rows: int) -> dict[str, tuple[float, float]]:
    """Seconds and peak memory in MB of each step."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "table.parquet", rows)
        found = {}
        for step in STEPS:
            command = [sys.executable, "-m", "benchmarks.tables", "--step", step, "--folder", str(folder)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds, most = map(float, done.stdout.split())
            found[step] = seconds, most
        read = pyarrow.parquet.read_metadata(folder / "out.parquet")
        assert read.num_rows == rows
        return found


def main(
    rows: Annotated[int, typer.Option(help="Number of rows of the large table.")] = 1_000_000,
    few: Annotated[int, typer.Option(help="Number of rows of the small table.")] = 20_000,
    step: Annotated[str, typer.Option(hidden=True)] = "",
    folder: Annotated[Path, typer.Option(hidden=True)] = Path(),
) -> None:
    """Measure all steps over both tables."""
    if step:
        work(step, folder)
        return
    small, large = measured(few), measured(rows)
    for name in STEPS:
        (_, before), (seconds, after) = small[name], large[name]
        print(f"{name}: {seconds:.0f} s, {1e6 * seconds / rows:.0f} us per row; peak {after:.0f} MB, {after - before:+.0f} MB")


if __name__ == "__main__":
    typer.run(main)

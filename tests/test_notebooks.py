"""The notebooks run from the first cell to the last cell, with the bundled models."""

from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"
SHOWN = "ten_thousand_photographs"
"""The notebook whose pictures and progress bars are looked at. It needs a kernel, which loads torch again."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's client
def test_a_notebook_shows_progress_and_pictures() -> None:
    notebook = nbformat.read(EXAMPLES / f"{SHOWN}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    shown = "".join(output.data.get("text/html", "") for output in outputs if "data" in output)
    assert "48/48" in shown  # the progress of the run
    assert shown.count('<img src="data:image/webp') == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", [path for path in sorted(EXAMPLES.glob("*.ipynb")) if path.stem != SHOWN], ids=lambda p: p.stem)
def test_a_notebook_runs(path: Path) -> None:
    shell = InteractiveShell()
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert cells
    for source in cells:
        shell.run_cell(source, store_history=True).raise_error()

"""What several users do from beginning to end. Commands and Python code are read from the pages of the documentation."""

import csv
import json
import re
import shlex
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import nbformat
import pandas
import pyarrow.parquet
import pytest
from nbclient import NotebookClient
from sklearn.base import clone

from cascadevlm import CascadeClassifier, read_record
from cascadevlm.base.environment import LOCAL_ONLY
from cascadevlm.config import DEFAULT_SCORER
from cascadevlm.runs.corrections import read_corrections
from cascadevlm.testing import noise
from tests.cli.test_cli import run
from tests.test_documentation import BLOCK, ROOT, lines_of, typed

PART = re.compile(rf"{BLOCK.pattern}|^#+ ([^\n]+)$", re.MULTILINE | re.DOTALL)
AVIARY = Path(str(resources.files("cascadevlm_backends") / "aviary"))
BIRDS = sorted(path.stem for path in (AVIARY / "images").glob("*.jpg"))


def blocks_below(page: str, heading: str, *languages: str) -> list[str]:
    """The code blocks between a heading and the next heading."""
    found, here = [], False
    for language, text, title in PART.findall((ROOT / "docs" / page).read_text(encoding="utf-8")):
        if title:
            here = title == heading
        elif here and language in languages:
            found.append(text)
    assert found
    return found


def commands(page: str, heading: str) -> list[str]:
    """The commands between a heading and the next heading."""
    return [line for text in blocks_below(page, heading, "sh", "console") for line in lines_of(text)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the bundled birds and their names. The name of an image does not tell its class."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for number, bird in enumerate(BIRDS):
        shutil.copy(AVIARY / "images" / f"{bird}.jpg", tmp_path / "images" / f"{number:02}.jpg")
    shutil.copy(AVIARY / "labels.txt", tmp_path)
    return tmp_path


def truth_of(image: str) -> str:
    """The label that a person gives to an image."""
    return BIRDS[int(Path(image).stem)]


@pytest.fixture
def products(here: Path) -> pandas.DataFrame:
    """A table of twelve products, as Parquet and as CSV."""
    table = pandas.DataFrame(
        {
            "sku": [f"SKU-{number}" for number in range(12)],
            "photo": [f"images/{number:02}.jpg" for number in range(12)],
            "price": [number / 4 for number in range(12)],
            "category": BIRDS[:12],
        }
    )
    table.to_parquet(here / "products.parquet")
    table.to_csv(here / "products.csv", sep=";", index=False)
    return table


def test_a_data_engineer_runs_over_a_table_and_exports_a_table(products: pandas.DataFrame) -> None:
    _, *documented = commands("data.md", "Columns")
    for command in documented:
        typed(command.replace("products.csv", "products.parquet"))
    exported = pyarrow.parquet.read_table("predictions.parquet").to_pandas()
    assert exported["id"].tolist() == products["sku"].tolist()
    assert exported[["price", "category"]].equals(products[["price", "category"]])
    assert [Path(path).name for path in exported["path"]] == [Path(photo).name for photo in products["photo"]]
    assert (exported["label"] == products["category"]).mean() > 0.3  # about half of them
    record = read_record("record")
    assert [each["id"] for each in record.about] == products["sku"].tolist()
    assert [record.labels.names[truth] for truth in record.truths] == products["category"].tolist()


def test_a_notebook_user_classifies_a_frame_and_sees_short_texts(products: pandas.DataFrame, here: Path) -> None:
    typed(commands("data.md", "Columns")[-1])  # the record that the first cell reads
    for number in range(12, len(BIRDS)):
        (here / "images" / f"{number:02}.jpg").unlink()
    cells = [*blocks_below("data.md", "Data frames", "python"), *blocks_below("python.md", "Notebooks", "python")]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    frame, predictions = (cell.outputs for cell in notebook.cells)
    printed = "".join(output.get("text", "") for output in frame)
    assert all(sku in printed for sku in products["sku"]), frame
    (shown,) = (output.data["text/plain"] for output in predictions if output.output_type == "execute_result")
    assert shown.count("Prediction(") == 12
    assert len(shown) < 12 * 200
    assert any("12/12" in str(output.get("data")) for output in predictions)  # the progress


@pytest.mark.filterwarnings("ignore:The number of unique classes is greater")  # one image per class
def test_a_scikit_learn_user_fits_predicts_and_searches(here: Path) -> None:
    (text,) = blocks_below("python.md", "scikit-learn", "python")
    made: dict[str, object] = {}
    exec(text, made)
    classifier, images, names, search = made["classifier"], made["images"], made["names"], made["search"]
    assert isinstance(classifier, CascadeClassifier)
    assert classifier.score(images, names) > 0.6
    assert clone(classifier).get_params() == classifier.get_params()
    assert set(search.best_params_) == {"policy", "candidates"}  # type: ignore[attr-defined]


def write_project(person: Callable[[str], str]) -> None:
    """What Label Studio exports after people have chosen a label for every task."""
    tasks = json.loads(Path("tasks/tasks.json").read_text())
    for number, task in enumerate(tasks):
        chosen = person(task["data"]["path"])
        shown = [choice["value"] for choice in task["data"]["choices"]]
        names = {"from_name": "choice", "to_name": "image", "type": "choices"}
        other = {"from_name": "other", "to_name": "image", "type": "taxonomy", "value": {"taxonomy": [[chosen]]}}
        choice = {**names, "value": {"choices": [chosen if chosen in shown else "another label"]}}
        result = [choice] if chosen in shown else [choice, other]
        task["annotations"] = [{"id": number, "completed_by": {"id": 2, "email": "bob@example.org"}, "result": result}]
    Path("project.json").write_text(json.dumps(tasks))


def test_a_team_corrects_a_run_which_counts_everywhere(here: Path) -> None:
    classify, review, read_review, evaluate, adapt, export, report = commands("corrections.md", "Corrections")
    to_label_studio, read_project = commands("corrections.md", "Label Studio")
    calibrate, run_calibrated = commands("corrections.md", "What counts")

    typed(classify)
    typed(to_label_studio)
    write_project(truth_of)
    assert "30 corrections added" in typed(read_project)
    typed(review)
    with Path("review.csv").open(newline="") as file:
        rows = [row | {"label": truth_of(row["path"])} for row in csv.DictReader(file)]
    with Path("review.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, [*rows[0]])
        table.writeheader()
        table.writerows(rows)
    assert f"{len(rows)} corrections added" in typed(read_review)
    assert {each.by for each in read_corrections(Path("birds")).counting.values()} == {"ann", "bob@example.org"}

    typed(evaluate)
    typed(adapt)
    typed(export)
    with Path("birds.csv").open(newline="") as file:
        exported = [*csv.DictReader(file)]
    by_people = [row for row in exported if row["decided_by"] == "person"]
    assert len(by_people) == 30 + len(rows)
    assert all(row["label"] == truth_of(row["path"]) for row in by_people)
    typed(report)
    typed(calibrate)
    typed(run_calibrated)
    assert Path("birds.html").exists()
    assert Path("calibrated/summary.json").exists()


def test_a_person_with_photographs_learns_what_is_missing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LOCAL_ONLY)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    shutil.rmtree("images")
    Path("images").mkdir()
    noise(0).save("images/cat.jpg")
    Path("labels.txt").write_text("cat\ndog\n")
    init, *following = commands("quickstart.md", "Start with your own images")
    told = typed(init)
    assert all(command in told for command in following)
    doctor, _, classify = (run(*shlex.split(command)[1:], check=False) for command in following)
    missing = f"{DEFAULT_SCORER.partition(':')[2]}' is not on this machine, and it cannot be downloaded: HF_HUB_OFFLINE is set."
    assert (doctor.returncode, classify.returncode) == (1, 2)
    assert missing in " ".join(doctor.stdout.split())
    assert missing in " ".join(classify.stderr.split())
    assert "sk-secret" not in doctor.stdout + doctor.stderr + classify.stderr

"""Corrections in tables with other columns, and corrections of images that are named by ids alone."""

import io
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from cascadevlm import Cascade
from cascadevlm.base.errors import DataError
from cascadevlm.base.tables import ColumnNames
from cascadevlm.evaluation.corrected import read_corrected
from cascadevlm.runs import bulk
from cascadevlm.runs.correction_files import Imported, import_corrections
from cascadevlm.runs.corrections import CORRECTIONS
from cascadevlm.runs.export import export
from cascadevlm.runs.inputs import Inputs
from cascadevlm.testing import FakeScorer, noise
from tests.cli.test_cli import run as cascadevlm
from tests.runs.test_corrections import HERON, WREN, write_rows
from tests.runs.test_corrections import images as images  # a fixture
from tests.runs.test_export import NAMES, table
from tests.runs.test_export import run as run  # a fixture


def counting(done: Imported) -> dict[str, str | None]:
    return {each.image: each.label for each in done.corrections.counting.values()}


@pytest.fixture
def with_ids(tmp_path: Path) -> Path:
    """A run over three images of a table, with their ids."""
    for number in range(3):
        noise(number, (8, 8)).save(tmp_path / f"{number}.png")
    (tmp_path / "products.csv").write_text("photo,sku\n0.png,7\n1.png,=8\n2.png,9\n")
    inputs = Inputs(tmp_path / "products.csv", ColumnNames(image="photo", id="sku"))
    bulk.run(Cascade(FakeScorer(), [], labels=NAMES), inputs, tmp_path / "products", config={})
    return tmp_path / "products"


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_table_may_name_images_by_ids_and_have_other_columns(with_ids: Path, tmp_path: Path, suffix: str) -> None:
    rows = [{"sku": "7", "kind": WREN, "by": "ann"}, {"sku": "=8", "kind": "none", "by": "ann"}]
    file, columns = write_rows(tmp_path / f"said{suffix}", rows), ColumnNames(id="sku", label="kind")
    done = import_corrections(file, with_ids, columns=columns)
    assert counting(done) == {str(tmp_path / "0.png"): WREN, str(tmp_path / "1.png"): None}
    assert import_corrections(file, with_ids, columns=columns).added == 0


def test_ids_may_be_numbers(with_ids: Path, tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"sku": [7, 9], "label": [WREN, "none"]}), tmp_path / "said.parquet")
    done = import_corrections(tmp_path / "said.parquet", with_ids, columns=ColumnNames(id="sku"))
    assert counting(done) == {str(tmp_path / "0.png"): WREN, str(tmp_path / "2.png"): None}


def test_a_review_comes_back_by_its_ids_alone(with_ids: Path, tmp_path: Path) -> None:
    export(with_ids, "csv", tmp_path / "review.csv", review=["3"])
    rows = [{"id": row["id"], "answer": HERON} for row in table(tmp_path / "review.csv")]
    assert "'=8" in [row["id"] for row in rows]  # protected from spreadsheets
    file = write_rows(tmp_path / "said.csv", rows)
    assert import_corrections(file, with_ids, columns=ColumnNames(id="id", label="answer")).added == 3


def test_a_correction_by_id_is_of_one_row_although_images_have_one_name(tmp_path: Path) -> None:
    """As in data sets of `datasets`, which keep only the last part of a path."""
    contents = [io.BytesIO() for _ in range(3)]
    for number, content in enumerate(contents):
        noise(number, (8, 8)).save(content, "PNG")
    stored = [{"bytes": each.getvalue(), "path": name} for each, name in zip(contents, ("0.png", "0.png", "1.png"), strict=True)]
    pyarrow.parquet.write_table(pyarrow.table({"image": stored, "sku": ["a", "b", "c"]}), tmp_path / "birds.parquet")
    run = tmp_path / "run"
    inputs = Inputs(tmp_path / "birds.parquet", ColumnNames(id="sku"))
    bulk.run(Cascade(FakeScorer(), [], labels=NAMES), inputs, run, config={})
    said = write_rows(tmp_path / "said.csv", [{"id": "a", "label": WREN}, {"id": "b", "label": HERON}])
    import_corrections(said, run, columns=ColumnNames(id="id"))
    export(run, "csv", tmp_path / "out.csv")
    rows = table(tmp_path / "out.csv")
    assert [row["label"] for row in rows[:2]] == [WREN, HERON]
    assert [row["decided_by"] for row in rows] == ["person", "person", "scorer"]
    assert len(read_corrected(run).record) == 2
    by_name = write_rows(tmp_path / "by name.csv", [{"image": row["path"], "label": WREN} for row in rows[1:]])
    with pytest.raises(
        DataError, match=r"errors: 1 names belong to several images of the run, which only ids can tell apart .*line 2'"
    ):
        import_corrections(by_name, run)
    without_ids = Inputs(tmp_path / "birds.parquet")
    bulk.run(Cascade(FakeScorer(), [], labels=NAMES), without_ids, tmp_path / "without", config={})
    with pytest.raises(DataError, match="1 names belong to several images"):
        import_corrections(by_name, tmp_path / "without")


def test_an_export_with_columns_of_those_who_made_the_images_comes_back(tmp_path: Path) -> None:
    noise(0, (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "products.csv").write_text("photo,image,by,when,label,input.label\n0.png,x.png,maker,2020-01-01,X,Y\n")
    columns = ColumnNames(image="photo", keep=("image", "by", "when", "label", "input.label"))
    bulk.run(Cascade(FakeScorer(), [], labels=NAMES), Inputs(tmp_path / "products.csv", columns), tmp_path / "run", config={})
    export(tmp_path / "run", "csv", tmp_path / "out.csv")
    (row,) = table(tmp_path / "out.csv")
    assert (row["input.image"], row["input.by"], row["input.when"]) == ("x.png", "maker", "2020-01-01")
    assert (row["input.input.label"], row["input.label"]) == ("X", "Y")
    (said,) = import_corrections(tmp_path / "out.csv", tmp_path / "run", by="ann").corrections.all
    assert (said.image, said.by, said.at.year > 2020) == (str(tmp_path / "0.png"), "ann", True)
    assert pyarrow.parquet.read_table(tmp_path / "run" / "predictions.parquet")["input.input.label"].to_pylist() == ["X"]


def test_other_columns_of_images(images: list[str], run: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "said.csv", [{"image": "no image", "file": images[0], "label": "no label", "kind": WREN}])
    done = import_corrections(file, run, columns=ColumnNames(image="file", label="kind"))
    assert counting(done) == {images[0]: WREN}


@pytest.mark.parametrize(
    ("text", "columns", "told"),
    [
        ("sku,kind\n6,wren\n", {"id": "sku"}, r"1 ids are not in the run \('6, line 2'\)\. .* by their ids in the run\."),
        ("sku,kind\n,wren\n", {"id": "sku"}, r"line 2 has no id; the columns are 'sku', 'kind'"),
        ("sku,kind\n7,wren\n", {"id": "skus"}, r"has no column 'skus'\. Did you mean 'sku'\?"),
        ("sku,kind\n7,wren\n", {"id": "sku", "label": "kin"}, r"has no column 'kin'\. Did you mean 'kind'\?"),
        ("file,kind\n,wren\n", {"image": "file"}, r"line 2 has no image"),
        ("sku,kind\n7,wren\n7,robin\n", {"id": "sku"}, r"1 images occur more than once"),
    ],
)
def test_wrong_ids_and_columns_are_told(with_ids: Path, tmp_path: Path, text: str, columns: dict[str, object], told: str) -> None:
    (tmp_path / "said.csv").write_text(text)
    with pytest.raises(DataError, match=told):
        import_corrections(tmp_path / "said.csv", with_ids, columns=ColumnNames.model_validate({"label": "kind", **columns}))
    assert not (with_ids / CORRECTIONS).exists()


def test_ids_need_a_run_with_ids_and_columns_need_a_table(images: list[str], run: Path, tmp_path: Path) -> None:
    (tmp_path / "said.csv").write_text("sku,label\n7,wren\n")
    with pytest.raises(DataError, match=r"have no ids\. Name the column of images: --image COLUMN\."):
        import_corrections(tmp_path / "said.csv", run, columns=ColumnNames(id="sku"))
    (tmp_path / "said.json").write_text("[]")
    with pytest.raises(DataError, match=r"said\.json' is not a table, so it has no columns\. Leave out: --label kind\."):
        import_corrections(tmp_path / "said.json", run, columns=ColumnNames(label="kind"))


def test_the_command_names_columns(with_ids: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "said.csv", [{"sku": "7", "kind": WREN, "photo": str(tmp_path / "1.png")}])
    common = ("import", file, "--into", with_ids, "--label", "kind")
    assert "1 corrections added" in cascadevlm(*common, "--id", "sku").stdout
    assert "1 corrections added" in cascadevlm(*common, "--image", "photo").stdout
    for arguments, told in (
        ((*common, "--id", "sku", "--image", "photo"), "Two columns name the images: --image and --id. Remove one of them."),
        (("import", "--scores", "x.npy", "--label", "kind"), "A record is made from arrays, without FILE, --into, --image, --id"),
    ):
        done = cascadevlm(*arguments, check=False)
        assert (done.returncode, told in " ".join(done.stderr.split())) == (2, True)

"""Tables with columns on the command line."""

import csv
import json
from pathlib import Path

import pyarrow.parquet
import pytest

from cascadevlm.testing import noise
from tests.cli.test_cli import run

COMMON = ("--scorer", "open_clip:aviary", "--id", "sku", "--keep", "price, shop")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "labels.txt").write_text("ant\nbee")
    with (tmp_path / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["sku", "photo", "kind", "price", "shop"])
        for number in range(3):
            noise(number).save(tmp_path / "images" / f"{number}.png")
            writer.writerow([f"S{number}", f"images/{number}.png", ("ant", "bee")[number % 2], number / 2, "here"])
    return tmp_path / "table.csv"


def command(name: str, table: Path, *more: str) -> list[str | Path]:
    return [name, table, "--image", "photo", "--labels", table.parent / "labels.txt", *COMMON, *more]


def test_every_command_that_reads_images_takes_columns(table: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in run(*command("classify", table, "--json")).stdout.splitlines()]
    assert [(line["id"], line["kept"]) for line in lines] == [(f"S{n}", {"price": str(n / 2), "shop": "here"}) for n in range(3)]
    assert lines[0]["path"] == str(tmp_path / "images" / "0.png")
    assert "1/3 S0" in run(*command("classify", table)).stdout
    run(*command("run", table, "-o", str(tmp_path / "run")))
    read = pyarrow.parquet.read_table(tmp_path / "run" / "predictions.parquet")
    assert read["id"].to_pylist() == ["S0", "S1", "S2"]
    assert read["price"].to_pylist() == ["0.0", "0.5", "1.0"]
    assert run(*command("estimate", table, "--json")).stdout == "[]\n"
    evaluated = json.loads(run(*command("evaluate", table, "--label", "kind", "--json", "-o", str(tmp_path / "record"))).stdout)
    assert evaluated["images"] == 3
    assert "S2" in (tmp_path / "record" / "predictions.jsonl").read_text()
    run("export", tmp_path / "record", "--to", "csv", "-o", tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text().splitlines()[0].endswith("error,price,shop")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--keep", "prize"],
            "has no column 'prize'. Did you mean 'price'? Its columns: 'sku', 'photo', 'kind', 'price', 'shop'.",
        ),
        (["--id", "shop"], "1 ids in the column 'shop' of"),
    ],
)
def test_a_wrong_column_is_one_sentence(table: Path, tmp_path: Path, arguments: list[str], told: str) -> None:
    for name, more in (("classify", []), ("run", ["-o", str(tmp_path / "run")]), ("evaluate", ["--label", "kind"])):
        done = run(*command(name, table, *more, *arguments), check=False)
        assert done.returncode == 2
        assert told in " ".join(done.stderr.split())
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_images_and_folders_have_no_columns(table: Path) -> None:
    image = table.parent / "images" / "0.png"

    def told_of(*paths: Path) -> str:
        labels = ("--labels", table.parent / "labels.txt")
        return " ".join(run("classify", *paths, "--image", "photo", *labels, *COMMON, check=False).stderr.split())

    assert "Image files have no columns. Give a table, or leave out: --image photo --id sku" in told_of(image)
    assert "which has no columns. Leave out: --image photo --id sku --keep price,shop." in told_of(image.parent)
    assert "is a list of images, but other paths are given, too. Give only the list." in told_of(table, image)

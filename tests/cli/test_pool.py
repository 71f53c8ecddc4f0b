"""Pools of several scorers on the command line, with the bundled scorer under two templates."""

import json
import shutil
from importlib import resources
from pathlib import Path

import pytest

from cascadevlm.decision.pooling import read_pool
from tests.cli.test_cli import run

IMAGES = Path(str(resources.files("cascadevlm_backends") / "aviary" / "images"))


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled images in folders by family, a configuration of two scorers, and their pool."""
    folder = tmp_path_factory.mktemp("pool")
    for bird in sorted(IMAGES.glob("*.jpg")):
        family = folder / "families" / bird.stem.rpartition(" ")[2]
        family.mkdir(parents=True, exist_ok=True)
        shutil.copy(bird, family)
    labels = [family.name for family in sorted((folder / "families").iterdir())]
    use = '["open_clip:aviary", { use = "open_clip:aviary", templates = ["a drawing of a {label}"] }]'
    (folder / "birds.toml").write_text(f"labels = {json.dumps(labels)}\n[scorer]\nuse = {use}\n")
    (folder / "families" / "owl" / "broken.png").write_bytes(b"no image")
    told = run("adapt", folder / "families", "--config", folder / "birds.toml", "-o", folder / "birds.pool", *METHOD, "--json")
    (folder / "told.json").write_text(told.stdout)
    return folder


METHOD = ("--method", "pool")


def test_a_pool_is_written_and_its_gain_is_shown(birds: Path) -> None:
    figures, pool = json.loads((birds / "told.json").read_text()), read_pool(birds / "birds.pool")
    assert figures["images"] == pool.images == 48
    assert [each["scorer"] for each in figures["scorers"]] == ["open_clip:aviary"] * 2
    assert [each["weight"] for each in figures["scorers"]] == pool.weights.tolist()
    assert figures["gain"] == pytest.approx(figures["right"] - max(each["right"] for each in figures["scorers"]))
    shown = run("adapt", birds / "families", "--config", birds / "birds.toml", "-o", birds / "again.pool", *METHOD).stdout
    assert f"{figures['right']:.1%}" in shown
    assert ("The pool gains." in shown) == (figures["gain_interval"][0] > 0)


def test_a_record_and_a_run_are_scored_with_the_pool(birds: Path) -> None:
    config = ("--config", birds / "birds.toml", "--set")
    run("evaluate", birds / "families", *config, f"scorer.pool={birds / 'birds.pool'}", "-o", birds / "record", "--json")
    record = json.loads((birds / "record" / "manifest.json").read_text())
    assert f"|pool={read_pool(birds / 'birds.pool').digest}|" in record["fingerprint"]
    assert json.loads((birds / "record" / "summary.json").read_text())["scorer_accuracy"] > 0.3
    run("run", IMAGES, *config, f"scorer.pool={birds / 'birds.pool'}", "-o", birds / "run")
    run("run", IMAGES, *config, f"scorer.pool={birds / 'birds.pool'}", "-o", birds / "run")
    lines = [json.loads(line) for line in (birds / "run" / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 48
    assert all(line["digest"] for line in lines)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["DATA", "--scorer", "open_clip:aviary", *METHOD], "The method 'pool' needs several scorers."),
        (["--unlabelled", "DATA", *METHOD], "The method 'pool' needs labels."),
        (["DATA"], "An adapter is for one scorer, and scorer.use names 2."),
        (["DATA", *METHOD, "--limit", "12"], "A pool needs at least 20 labelled images"),
    ],
)
def test_wrong_calls_are_one_sentence(birds: Path, arguments: list[str], sentence: str) -> None:
    given = [birds / "families" if each == "DATA" else each for each in arguments]
    done = run("adapt", *given, "--config", birds / "birds.toml", "-o", birds / "x.pool", check=False)
    assert done.returncode == 2
    assert sentence in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


def test_a_pool_of_other_scorers_is_refused(birds: Path) -> None:
    changed = ("--set", f"scorer.pool={birds / 'birds.pool'}", "--set", 'scorer.use.1.templates=["{label}"]')
    done = run("classify", next(IMAGES.glob("*.jpg")), "--config", birds / "birds.toml", *changed, check=False)
    assert done.returncode == 2
    assert "The pool was made for 'open_clip:aviary" in done.stderr.replace("\n", " ")

"""Adapting on the command line, with the bundled scorer and images."""

import json
import shutil
from importlib import resources
from pathlib import Path

import pytest

from cascadevlm.scorers.adapters import LinearAdapter, read_adapter
from tests.cli.test_cli import run

IMAGES = Path(str(resources.files("cascadevlm_backends") / "aviary" / "images"))


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled images in folders by family, which the scorer knows badly by name; an adapter made from them."""
    folder = tmp_path_factory.mktemp("adapt")
    for bird in sorted(IMAGES.glob("*.jpg")):
        family = folder / "families" / bird.stem.rpartition(" ")[2]
        family.mkdir(parents=True, exist_ok=True)
        shutil.copy(bird, family)
    shutil.copytree(IMAGES, folder / "images")
    labels = [family.name for family in sorted((folder / "families").iterdir())]
    (folder / "birds.toml").write_text(f'labels = {json.dumps(labels)}\n[scorer]\nuse = "open_clip:aviary"\n')
    told = run("adapt", folder / "families", "--config", folder / "birds.toml", "-o", folder / "birds.adapter", "--json").stdout
    (folder / "told.json").write_text(told)
    text = (folder / "birds.toml").read_text()
    (folder / "adapted.toml").write_text(f'{text}adapter = "{folder / "birds.adapter"}"\n')
    return folder


def test_what_was_learned_is_written_and_its_gain_is_shown(birds: Path) -> None:
    figures = json.loads((birds / "told.json").read_text())
    adapter = read_adapter(birds / "birds.adapter")
    assert isinstance(adapter, LinearAdapter)
    assert figures["digest"] == adapter.digest
    assert (figures["images"], figures["labelled"], figures["measured"]) == (48, 48, 48)
    assert figures["gain"] == pytest.approx(figures["after"] - figures["before"])
    assert adapter.made.figures == {name: figures[name] for name in ("measured", "before", "after")}
    shown = run("adapt", birds / "families", "--config", birds / "adapted.toml", "-o", birds / "again.adapter").stdout
    assert f"{figures['gain'] * 100:+.1f} points" in shown
    assert ("The adapter gains." in shown) == (figures["gain_interval"][0] > 0)
    assert read_adapter(birds / "again.adapter").digest == adapter.digest  # an adapter that is configured is not built upon


def test_a_run_scores_with_the_adapter_and_its_record_names_it(birds: Path) -> None:
    for name in ("birds", "adapted"):
        run("evaluate", birds / "families", "--config", birds / f"{name}.toml", "-o", birds / name, "--json")
    bare, adapted = (json.loads((birds / name / "manifest.json").read_text())["fingerprint"] for name in ("birds", "adapted"))
    assert adapted == f"{bare}|adapter={read_adapter(birds / 'birds.adapter').digest[:12]}"
    right = [json.loads((birds / name / "summary.json").read_text())["scorer_accuracy"] for name in ("birds", "adapted")]
    assert right[1] > right[0] + 0.1  # of images that the adapter was made from


def test_a_run_goes_on_with_the_same_adapter_only(birds: Path) -> None:
    shutil.copy(birds / "birds.adapter", birds / "moved.adapter")
    command = ("run", birds / "images", "-o", birds / "out", "--config", birds / "birds.toml", "--set")
    run(*command, f"scorer.adapter={birds / 'birds.adapter'}")
    run(*command, f"scorer.adapter={birds / 'moved.adapter'}")
    shutil.copy(IMAGES / "blue-crowned white-breasted barred duck.jpg", birds / "images" / "zzz.jpg")
    done = run(*command, "batch_size=32", check=False)
    assert done.returncode == 2
    assert "belongs to a run with the scorer" in done.stderr.replace("\n", " ")


def test_a_record_teaches_as_its_images_do(birds: Path) -> None:
    run("evaluate", birds / "families", "--config", birds / "birds.toml", "-o", birds / "record", "--json")
    shutil.rmtree(birds / "record" / "verdicts", ignore_errors=True)
    figures = json.loads(run("adapt", birds / "record", "-o", birds / "of record.adapter", "--json").stdout)
    expected = json.loads((birds / "told.json").read_text())
    assert figures == expected
    (birds / "record" / "embeddings.npy").unlink()
    again = run("adapt", birds / "record", "-o", birds / "of record.adapter", "--json")
    assert json.loads(again.stdout) == expected


def test_a_run_teaches_and_without_a_calibration_nothing_is_measured(birds: Path) -> None:
    run("run", IMAGES, "-o", birds / "of no judge", "--config", birds / "birds.toml")
    done = run("adapt", birds / "of no judge", "-o", birds / "of run.adapter")
    assert "the gain is unknown" in done.stdout
    assert read_adapter(birds / "of run.adapter").made.images == len(list(IMAGES.glob("*.jpg")))
    for wrong, sentence in (
        (["--method", "cache"], "The method 'cache' needs labels, and a run has none."),
        (["--unlabelled", IMAGES], "--unlabelled has no effect with a record or a run."),
    ):
        refused = run("adapt", birds / "of no judge", "-o", birds / "x.adapter", *wrong, check=False)
        assert refused.returncode == 2
        assert sentence in refused.stderr.replace("\n", " ")


def test_images_without_labels_teach_too(birds: Path) -> None:
    config = ("--config", birds / "birds.toml", "-o", birds / "more.adapter", "--unlabelled", IMAGES)
    assert "the gain is unknown" in run("adapt", *config).stdout
    assert read_adapter(birds / "more.adapter").made.labelled == 0
    figures = json.loads(run("adapt", birds / "families", *config, "--json").stdout)
    assert (figures["images"], figures["labelled"]) == (96, 48)


def test_labels_without_an_image_are_told(birds: Path) -> None:
    labels = json.dumps([*(family.name for family in (birds / "families").iterdir()), "penguin"])
    command = ("adapt", birds / "families", "--config", birds / "birds.toml", "--set", f"labels={labels}")
    shown = run(*command, "-o", birds / "x.adapter").stdout
    assert "1 of 7 labels have no labelled image" in shown
    assert "The adapter gains" not in shown
    assert json.loads(run(*command, "-o", birds / "x.adapter", "--json").stdout)["labels_without_images"] == 1


def test_images_that_cannot_be_read_are_left_out(birds: Path, tmp_path: Path) -> None:
    shutil.copytree(birds / "families", tmp_path / "families")
    (tmp_path / "families" / "owl" / "broken.png").write_bytes(b"no image")
    command = ("--config", birds / "birds.toml", "-o", tmp_path / "birds.adapter", "--method", "cache", "--json")
    done = run("adapt", tmp_path / "families", *command)
    assert "1 images cannot be read and are left out." in done.stderr
    assert json.loads(done.stdout)["images"] == 48


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--method", "magic"], "There is no method 'magic'. Known: means, cache, linear, pool."),
        (["--method", "cache", "--unlabelled", "IMAGES"], "The method 'cache' needs labels."),
        (["--scorer", "recorded:none"], "'recorded:none' has no embeddings, which an adapter needs."),
        (["--limit", "12"], "images with labels are too few to measure a gain"),
        (["-o", "NOWHERE"], "cannot be written"),
    ],
)
def test_wrong_calls_are_one_sentence(birds: Path, arguments: list[str], sentence: str) -> None:
    known = {"IMAGES": str(IMAGES), "NOWHERE": str(birds / "none" / "x.adapter")}
    given = [known.get(each, each) for each in arguments]
    command = ("adapt", birds / "families", "--config", birds / "birds.toml", "-o", birds / "x.adapter")
    done = run(*command, *given, check=False)
    assert done.returncode == 2
    assert sentence in done.stderr.replace("\n", " ")


def test_without_images_there_is_nothing_to_learn_from(birds: Path) -> None:
    done = run("adapt", "--config", birds / "birds.toml", "-o", birds / "x.adapter", check=False)
    assert "There are no images to learn from." in done.stderr


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["scorer.use=recorded:none"], "'recorded:none' has no embeddings, which an adapter needs."),
        (["scorer.adapter=none"], "Adapter 'none' cannot be read: No such file or directory."),
        (['scorer.templates=["a drawing of a {label}."]'], "The adapter was made with other templates."),
        (["scorer.options.dtype=bfloat16"], "The adapter is of the scorer"),
        (['labels=["owl", "wren"]'], "The label set lacks 4 of the adapter's 6 labels, such as 'duck'."),
    ],
)
def test_what_an_adapter_does_not_fit_is_refused(birds: Path, settings: list[str], sentence: str) -> None:
    given = [part for setting in settings for part in ("--set", setting)]
    image = next(IMAGES.glob("*.jpg"))
    done = run("classify", image, "--config", birds / "adapted.toml", *given, check=False)
    assert done.returncode == 2
    assert sentence in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr

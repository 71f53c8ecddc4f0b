"""Calibration on the command line, with the bundled models and images."""

import json
import re
import shutil
from importlib import resources
from pathlib import Path

import pytest

from cascadevlm.cli.calibrate import RecipeOptions
from cascadevlm.evaluation.calibrating.recipe import Recipe
from cascadevlm.runs.lines import with_checksum
from tests.cli.test_cli import run

CONFIG = Path(str(resources.files("cascadevlm_backends") / "aviary" / "cascade.toml"))
BIRDS = 24


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record with answers about 24 bundled images, a calibration made from it, and a configuration with the calibration."""
    folder = tmp_path_factory.mktemp("calibrate")
    for bird in sorted((CONFIG.parent / "images").glob("*.jpg"))[:BIRDS]:
        (folder / "data" / bird.stem).mkdir(parents=True)
        shutil.copy(bird, folder / "data" / bird.stem / "0.jpg")
    run("evaluate", folder / "data", "--config", CONFIG, "--judge-all", "-o", folder / "run", "--json")
    run("calibrate", folder / "run", "-o", folder / "learned.json", "--size", "20")
    text = CONFIG.read_text().replace('policy = "entropy > 0.17"', 'policy = "gain > 0.01"')
    (folder / "learned.toml").write_text(f'calibration = "{folder / "learned.json"}"\n{text}')
    return folder


def test_what_was_learned_is_written_and_shown(birds: Path) -> None:
    target = ("--size", "22")
    shown = run("calibrate", birds / "run", "-o", birds / "shown.json", *target).stdout
    for words in ("calibration error", "gain and fusion"):
        assert words in shown
    printed = json.loads(run("calibrate", birds / "run", "-o", birds / "printed.json", *target, "--json").stdout)
    first, second = (json.loads((birds / name).read_text()) for name in ("shown.json", "printed.json"))
    assert first["figures"] | {"policy": first["policy"]} == printed
    assert first | {"made": None} == second | {"made": None}
    (judge,) = first["judges"]
    assert re.search(rf"best number of candidates, hf_chat:aviary +{judge['best_size']}\s", shown)
    assert printed["area_gain_fused"] > 0
    assert first["labelled"]
    assert first["judges"][0]["settings"]["prompt"] == "select_cot"


def test_without_labels_is_marked(birds: Path) -> None:
    shown = run("calibrate", birds / "run", "-o", birds / "unlabelled.json", "--without-labels", "--size", "20").stdout
    assert "if the judge is weak, probabilities and gains are too high" in shown.replace("\n", " ")
    written = json.loads((birds / "unlabelled.json").read_text())
    assert not written["labelled"]
    assert written["images"] == 20


@pytest.mark.parametrize("more", [[], ["--json"], ["--fusion", "judge"]])
def test_without_labels_other_labels_change_no_byte(birds: Path, tmp_path: Path, more: list[str]) -> None:
    shutil.copytree(birds / "run", tmp_path / "shuffled")
    file = tmp_path / "shuffled" / "predictions.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        del line["crc32"]
    for line, truth in zip(lines, [line["truth"] for line in reversed(lines)], strict=True):
        line["truth"] = truth
    file.write_bytes(b"".join(with_checksum(json.dumps(line).encode()) for line in lines))
    given = []
    for folder in (birds / "run", tmp_path / "shuffled"):
        told = run("calibrate", folder, "-o", tmp_path / "made.json", "--without-labels", "--size", "20", *more)
        written = re.sub(r'"made": "[^"]+"', "", (tmp_path / "made.json").read_text())
        given.append((written, told.stdout, told.stderr))
    assert given[0] == given[1]


def test_shares_of_the_classes_are_matched(birds: Path) -> None:
    """If all images should belong to one class, no other label is probable after the matching. Most images belong to other
    classes.
    """
    names = [folder.name for folder in sorted((birds / "data").iterdir())]
    given = {"even": dict.fromkeys(names, 1), "one": dict.fromkeys(names, 0) | {names[0]: 3}}
    reached = {}
    for name, shares in given.items():
        (birds / "shares.json").write_text(json.dumps(shares))
        run("calibrate", birds / "run", "-o", birds / f"{name}.json", "--size", "20", "--shares", birds / "shares.json")
        reached[name] = json.loads((birds / f"{name}.json").read_text())["scorer"]["log_likelihoods"]
    run("calibrate", birds / "run", "-o", birds / "plain.json", "--size", "20")
    assert json.loads((birds / "plain.json").read_text())["scorer"]["log_likelihoods"] == reached["even"]
    assert reached["one"]["matched prior"] < reached["even"]["matched prior"]


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        ('{"owl": 1}', "has no share"),
        ("[1, 2]", "does not contain shares of classes"),
        ('{"owl": -1}', "does not contain shares of classes"),
        (None, "cannot be read"),
        ("zeros", "their sum must be positive"),
        ("more", "'zebra' is not a label of the record"),
    ],
)
def test_shares_that_do_not_fit_are_refused(birds: Path, shares: str | None, told: str) -> None:
    names = [folder.name for folder in sorted((birds / "data").iterdir())]
    made = {"zeros": json.dumps(dict.fromkeys(names, 0)), "more": json.dumps(dict.fromkeys([*names, "zebra"], 1))}
    path = birds / "odd.json"
    path.unlink(missing_ok=True)
    if shares is not None:
        path.write_text(made.get(shares, shares))
    failed = run("calibrate", birds / "run", "-o", birds / "x.json", "--size", "20", "--shares", path, check=False)
    assert failed.returncode == 2
    assert told in " ".join(failed.stderr.split())


def test_a_run_decides_by_what_was_learned(birds: Path) -> None:
    images = sorted((birds / "data").glob("*/0.jpg"))[:4]
    command: list[str | Path] = ["classify", *images, "--labels", birds / "data", "--json"]
    lines = [json.loads(line) for line in run(*command, "--config", birds / "learned.toml").stdout.splitlines()]
    assert len(lines) == 4
    assert all(line["reasons"][0].endswith("(rule: gain > 0.01)") for line in lines)
    assert [line["decided_by"] for line in lines] == ["fusion" if line["verdict"] else "scorer" for line in lines]
    assert all(0 < line["probability"] <= 1 for line in lines)


def test_an_evaluation_by_what_was_learned_warns_of_nothing(birds: Path) -> None:
    """No candidates are recorded for images without a question."""
    for policy, low, high in (("entropy > 0.1", 0.01, 0.99), ("never", 0, 0)):
        done = run("evaluate", birds / "data", "--config", birds / "learned.toml", "--policy", policy, "--json")
        assert low <= json.loads(done.stdout)["deferral_rate"] <= high
        assert "Warning" not in done.stderr


def test_a_calibration_is_set_on_the_command_line(birds: Path) -> None:
    image = sorted((birds / "data").glob("*/0.jpg"))[0]
    command = ("classify", image, "--labels", birds / "data", "--json")
    learned = ("--set", f"calibration={birds / 'learned.json'}", "--policy", "gain > 0.01")
    results = [run(*command, "--config", CONFIG, *learned), run(*command, "--config", birds / "learned.toml")]
    first, second = (json.loads(result.stdout) for result in results)
    assert (first["label"], first["probability"], first["reasons"]) == (second["label"], second["probability"], second["reasons"])


def test_lists_are_as_long_as_was_found_best(birds: Path) -> None:
    image = sorted((birds / "data").glob("*/0.jpg"))[0]
    command = ("classify", image, "--labels", birds / "data", "--config", birds / "learned.toml", "--json")
    line = json.loads(run(*command, "--set", "stage.0.candidates=best").stdout)
    (judge,) = json.loads((birds / "learned.json").read_text())["judges"]
    assert len(line["candidates"]) == judge["best_size"]


def test_lists_by_class_share_a_threshold_where_images_are_few(birds: Path) -> None:
    """The classes have one image each."""
    by_class = ("--size", "20", "--coverage", "0.9", "--class-conditional")
    shown = run("calibrate", birds / "run", "-o", birds / "by-class.json", *by_class).stdout
    assert re.search(r"own conformal threshold +0 of 24\s", shown)
    run("calibrate", birds / "run", "-o", birds / "plain.json", *by_class[:-1])
    image = sorted((birds / "data").glob("*/0.jpg"))[0]
    command = ("classify", image, "--labels", birds / "data", "--config", CONFIG, "--json")
    settings = ("--set", "stage.0.candidates={ coverage = 0.9 }", "--policy", "never")
    one, other = (
        json.loads(run(*command, "--set", f"calibration={birds / name}", *settings).stdout)
        for name in ("by-class.json", "plain.json")
    )
    assert one["candidates"] == other["candidates"]


def test_a_sweep_shows_what_is_gained(birds: Path) -> None:
    swept = json.loads(run("sweep", birds / "run", "--calibration", birds / "learned.json", "--json").stdout)
    assert any(curve["name"].startswith("gain") for curve in swept["curves"])


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("scorer.templates=['a drawing of a {label}.']", "The calibration was made with other templates."),
        ("stage.0.prompt=select", "The calibration was made with prompt = 'select_cot', and the configuration has 'select'"),
        ("stage.0.offer_none=true", "The calibration was made with offer_none"),
    ],
)
def test_other_models_are_refused(birds: Path, setting: str, sentence: str) -> None:
    image = next((birds / "data").glob("*/0.jpg"))
    done = run("classify", image, "--config", birds / "learned.toml", "--labels", birds / "data", "--set", setting, check=False)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--fusion", "median"], "'median' is not one of 'bayes', 'judge'"),
        (["--class-conditional", "--without-labels"], "Conformal lists need labels. Remove class_conditional."),
        (["--accuracy", "0.5", "--without-labels"], "Targets and guarantees need labels"),
        (["--target-error", "0.1", "--without-labels"], "Targets and guarantees need labels"),
        (["--measure", "doubt"], "'doubt' is not one of 'gain', 'entropy', 'margin'"),
        (["--accuracy", "0.5", "--deferral-rate", "0.5"], "one target, not for --deferral-rate and --accuracy"),
        (["--accuracy", "0.5"], "answered only 11 images; a calibration needs at least 20"),
        (["--size", "24"], "leaves none of the 24 readable images for measuring"),
        (["--size", "10"], "answered only 10 images"),
    ],
)
def test_wrong_calls_are_one_sentence(birds: Path, arguments: list[str], sentence: str) -> None:
    size = [] if "--size" in arguments else ["--size", "22"]
    done = run("calibrate", birds / "run", "-o", birds / "none.json", *size, *arguments, check=False)
    assert done.returncode == 2
    assert sentence in " ".join(re.sub("[│\n]", " ", done.stderr).split())
    assert not (birds / "none.json").exists()


def test_the_options_have_the_defaults_of_the_recipe() -> None:
    assert RecipeOptions().parse() == Recipe()


def test_other_labels_are_refused(birds: Path) -> None:
    (birds / "labels.txt").write_text("robin\nwren\n")
    image = next((birds / "data").glob("*/0.jpg"))
    done = run("classify", image, "--config", birds / "learned.toml", "--labels", birds / "labels.txt", check=False)
    assert done.returncode == 2
    assert "The calibration was made for 24 labels that differ" in done.stderr


def test_a_folder_without_a_record_is_refused(birds: Path) -> None:
    done = run("calibrate", birds / "data", "-o", birds / "none.json", check=False)
    assert done.returncode == 2
    assert "does not contain a complete record" in done.stderr


def test_what_a_judge_said_about_images_without_labels_is_used_beside_the_labels(birds: Path) -> None:
    shutil.copytree(CONFIG.parent / "images", birds / "more")
    for image in sorted((birds / "more").glob("*.jpg"))[6:]:
        image.unlink()
    settings = ("--labels", birds / "data", "--config", CONFIG, "--policy", "always")
    run("run", birds / "more", "-o", birds / "others", *settings)
    beside = ("--size", "20", "--unlabelled", birds / "others")
    shown = run("calibrate", birds / "run", "-o", birds / "beside.json", *beside).stdout
    assert "gain if every image is asked about, foretold" in shown
    alone, both = (json.loads((birds / name).read_text()) for name in ("learned.json", "beside.json"))
    assert both["judges"][0]["model"] != alone["judges"][0]["model"]
    assert both["fitted_on"] == alone["fitted_on"]
    adapted = run("adapt", birds / "others", "-o", birds / "others.adapter", "--json")
    assert json.loads(adapted.stdout)["labelled"] == 0

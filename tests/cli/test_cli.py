"""The command line as a user types it, with the bundled models."""

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib import resources
from pathlib import Path
from unittest.mock import patch

import pytest
from PIL import Image

from cascadevlm.base.labels import LabelSet
from cascadevlm.cli import main
from cascadevlm.cli.demo_learning import learning_figures
from cascadevlm.config.config import Config, read_toml

Done = subprocess.CompletedProcess[str]


def run_alone(*arguments: str) -> Done:
    """Run a command in a separate process, as a user does."""
    command = [str(Path(sys.executable).with_name("cascadevlm")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def run(*arguments: str | Path, check: bool = True, stdin: str = "") -> Done:
    """Run a command in this process, which has already loaded torch."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = ["cascadevlm", *map(str, arguments)]
    with redirect_stdout(out), redirect_stderr(err), patch("sys.argv", argv), patch("sys.stdin", io.StringIO(stdin)):
        try:
            main()
        except SystemExit as exc:
            code = int(exc.code or 0)
    assert not check or code == 0, err.getvalue()
    return Done(argv, code, out.getvalue(), err.getvalue())


def classify(images: Path) -> list[str | Path]:
    return ["classify", images, "--labels", images.parent / "labels.txt", "--scorer", "open_clip:aviary", "--json"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three bundled birds, and a file with their names and two more names."""
    folder = tmp_path / "images"
    folder.mkdir()
    with resources.as_file(resources.files("cascadevlm_backends") / "aviary" / "images") as bundled:
        birds = sorted(bundled.glob("*.jpg"))
        for number, bird in enumerate(birds[:3]):
            shutil.copy(bird, folder / f"{number}.jpg")
        (tmp_path / "labels.txt").write_text("".join(f"{bird.stem}\n" for bird in birds[:5]))
    return folder


def test_demo_runs_the_real_cascade() -> None:
    figures = json.loads(run("demo", "--json").stdout)
    assert set(figures) == {"n", "scorer_top1", "scorer_top5", "cascade_accuracy", "escalated", "judge_calls", "seconds"}
    assert figures["n"] == 48
    assert figures["cascade_accuracy"] > figures["scorer_top1"] + 0.1
    assert 0 < figures["escalated"] < 0.7
    assert figures["judge_calls"] >= figures["escalated"] * 48


def test_demo_compares_a_cascade_that_learns_with_cascades_that_do_not() -> None:
    with resources.as_file(resources.files("cascadevlm_backends") / "aviary") as folder:
        config = Config.parse(read_toml(folder / "cascade.toml"))
        labels = LabelSet.of(path.stem for path in sorted((folder / "images").glob("*.jpg")))
    compared = learning_figures(config, labels, 40, labelled=60)
    figures, ways = compared.to_dict(), compared.ways
    assert {*ways} == {"fixed", "support", "learning"}
    assert {way.asked for way in ways.values()} == {0.2}
    assert figures["learning_gain"] == pytest.approx(
        compared.ways["learning"].right.mean() - compared.ways["support"].right.mean()
    )
    assert compared.interval[0] <= compared.gain <= compared.interval[1]
    assert "at least 2 images" in run("demo", "--learn", "--images", "1", check=False).stderr


def test_demo_shows_every_image_and_a_summary() -> None:
    shown = run("demo", "--images", "6").stdout
    assert "6/6" in shown
    assert "hf_chat:aviary: I see" in shown
    assert "cascade, right" in shown


def test_classify_gives_json_lines(images: Path) -> None:
    arguments: list[str | Path] = [
        "classify",
        images,
        "--labels",
        images.parent / "labels.txt",
        "--scorer",
        "open_clip:aviary",
        "--json",
    ]
    rows = [json.loads(line) for line in run(*arguments).stdout.splitlines()]
    assert [Path(row["path"]).name for row in rows] == ["0.jpg", "1.jpg", "2.jpg"]
    for row in rows:
        assert {"path", "label", "probability", "decided_by", "candidates", "verdict", "cost"} <= set(row)
        assert row["decided_by"] == "scorer"
        assert row["candidates"][0]["probability"] == row["probability"]


def test_classify_asks_the_judge_as_told(images: Path) -> None:
    row = json.loads(
        run(
            *("classify", images / "0.jpg", "--labels", images.parent / "labels.txt", "--scorer", "open_clip:aviary"),
            *("--judge", "hf_chat:aviary", "--policy", "always", "--candidates", "2", "--prompt", "select_cot"),
            *("--set", "cache.enabled=false", "--json"),
        ).stdout
    )
    assert row["verdict"]["judge"] == "hf_chat:aviary"
    assert row["verdict"]["text"].startswith("I see")


def test_an_unreadable_file_is_one_failed_row(images: Path) -> None:
    (images / "1.jpg").write_bytes(b"no image")
    arguments: list[str | Path] = [
        "classify",
        images,
        "--labels",
        images.parent / "labels.txt",
        "--scorer",
        "open_clip:aviary",
        "--json",
    ]
    done = run(*arguments, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1
    assert [row["label"] is None for row in rows] == [False, True, False]
    assert "1.jpg" in rows[1]["error"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["classify", "nowhere.png", "--scorer", "open_clip:aviary", "--labels", "LABELS"], "'nowhere.png' does not exist"),
        (["classify", "IMAGES", "--scorer", "open_clip:aviary"], "No labels are given"),
        (["classify", "IMAGES", "--scorer", "aviary", "--labels", "LABELS"], "'aviary' is not the spec of a scorer"),
        (["classify", "IMAGES", "--scorer", "open_clop:x", "--labels", "LABELS"], "Did you mean 'open_clip'?"),
        (["classify", "IMAGES", "--config", "none.toml"], "'none.toml' cannot be read"),
    ],
)
def test_wrong_calls_are_one_sentence(images: Path, arguments: list[str], sentence: str) -> None:
    known = {"IMAGES": str(images), "LABELS": str(images.parent / "labels.txt")}
    done = run(*(known.get(argument, argument) for argument in arguments), check=False)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback() -> None:
    assert "Traceback" in run_alone("--debug", "classify", "nowhere.png", "--scorer", "open_clip:aviary").stderr


def test_cache_is_filled_used_verified_and_cleared(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    classify: list[str | Path] = [
        *("classify", images, "--labels", images.parent / "labels.txt", "--scorer", "open_clip:aviary"),
        *("--judge", "hf_chat:aviary", "--policy", "always", "--set", f"cache.folder={folder}", "--json"),
    ]
    first = [json.loads(line) for line in run(*classify).stdout.splitlines()]
    kept = json.loads(run("cache", "info", "--folder", folder, "--json").stdout)["verdicts"]
    assert kept == sum(row["verdict"]["outcome"] in ("answered", "none") for row in first) > 0
    second = [json.loads(line) for line in run(*classify).stdout.splitlines()]
    assert sum(row["cost"]["cached"] for row in second) == kept
    assert [row["label"] for row in second] == [row["label"] for row in first]
    assert json.loads(run("cache", "verify", "--folder", folder, "--json").stdout) == {"verdicts": kept, "damaged": []}
    assert run("cache", "clear", "--folder", folder, stdin="n\n", check=False).returncode == 1
    assert json.loads(run("cache", "clear", "--folder", folder, "--yes", "--json").stdout) == {"removed": kept}
    assert json.loads(run("cache", "info", "--folder", folder, "--json").stdout)["verdicts"] == 0


@pytest.mark.parametrize("command", ["info", "clear", "verify"])
def test_looking_at_a_cache_makes_none(tmp_path: Path, command: str) -> None:
    done = run("cache", command, "--folder", tmp_path, check=False)
    assert done.returncode == 2
    assert "does not contain a cache of verdicts" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_backends_are_listed() -> None:
    rows = {(row["kind"], row["name"]): row for row in json.loads(run("backends", "--json").stdout)}
    assert {("scorer", "open_clip"), ("scorer", "hf"), ("judge", "hf_chat"), ("policy", "entropy")} <= set(rows)
    assert all(row["package"].startswith("cascadevlm ") and row["needs"] == "nothing more" for row in rows.values())


def test_a_photo_turned_by_its_camera_is_seen_upright(images: Path) -> None:
    upright = Image.open(images / "0.jpg").convert("RGB")
    exif = upright.getexif()
    exif[0x0112] = 6
    upright.rotate(90, expand=True).save(images / "turned.png", exif=exif)
    arguments: list[str | Path] = ["--labels", images.parent / "labels.txt", "--scorer", "open_clip:aviary", "--json"]
    rows = [json.loads(line) for line in run("classify", images / "0.jpg", images / "turned.png", *arguments).stdout.splitlines()]
    assert rows[0]["probability"] == rows[1]["probability"]


def test_folders_named_with_underscores_are_told_once(images: Path, tmp_path: Path) -> None:
    names = sorted((tmp_path / "labels.txt").read_text().splitlines())
    (tmp_path / "labels.txt").write_text("\n".join(names))
    for name in names:
        (tmp_path / "classes" / name.replace(" ", "_")).mkdir(parents=True)
    shutil.copy(images / "0.jpg", tmp_path / "classes" / names[0].replace(" ", "_"))
    with_spaces = run(*classify(images))
    done = run("classify", images, "--labels", tmp_path / "classes", "--scorer", "open_clip:aviary", "--json")
    assert (with_spaces.stderr.count("underscores"), done.stderr.count("underscores")) == (0, 1)
    predictions, expected = ([json.loads(line) for line in each.stdout.splitlines()] for each in (done, with_spaces))
    assert [each["probability"] for each in predictions] == [each["probability"] for each in expected]
    assert [each["label"] for each in predictions] == [each["label"].replace(" ", "_") for each in expected]
    assert run("evaluate", tmp_path / "classes", "--scorer", "open_clip:aviary").stderr.count("underscores") == 1


def test_what_looks_like_an_image_and_is_left_out_is_counted_in_one_line(images: Path, tmp_path: Path) -> None:
    first = next(iter(images.iterdir()))
    for suffix, kind in ((".jfif", "JPEG"), (".avif", "AVIF"), (".jp2", "JPEG2000"), (".ppm", "PPM"), (".tga", "TGA")):
        Image.open(first).save(images / f"more{suffix}", kind)
    for name in ("a.heic", "b.HEIC", "c.svg"):
        (images / name).write_bytes(b"x")
    os.mkfifo(images / "pipe.png")
    (images / "gone.png").symlink_to("nothing.png")  # is an image that cannot be read
    (images / "notes.txt").write_text("x")
    done = run(*classify(images), check=False)
    told = "4 files that look like images are not read (2 .heic, 1 .png, 1 .svg)."
    assert "gone.png' does not exist" in done.stdout
    assert (len(done.stdout.splitlines()), done.stderr.count(told)) == (9, 1)
    done = run("run", images, "-o", tmp_path / "out", *classify(images)[2:])
    assert (json.loads(done.stdout)["images"], done.stderr.count(told)) == (9, 1)


def test_nothing_from_a_name_or_a_model_controls_the_terminal(images: Path) -> None:
    (images.parent / "labels.txt").write_text("red\x1b[31m finch\nblue\u202e finch\n", encoding="utf-8")
    next(iter(images.iterdir())).rename(images / "a\x1b]0;title\x07.jpg")
    (images / "b\x1b[2J.jpg").write_bytes(b"no image")
    done = run(*classify(images)[:-1], check=False)
    wrong = run("classify", images / "c\x1b[2J.jpg", *classify(images)[2:], check=False)
    for shown in (done.stdout, done.stderr, wrong.stderr):
        assert not {"\x1b", "\x07", "\u202e"} & {*shown}
    assert "red\\x1b[31m finch" in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        ["run", "LONG", "-o", "run", "--labels", "labels.txt", "--scorer", "open_clip:aviary"],
        ["run", ".", "-o", "LONG", "--labels", "labels.txt", "--scorer", "open_clip:aviary"],
        ["evaluate", "LONG"],
        ["calibrate", "LONG", "-o", "calibration.json"],
        ["init", "--images", "LONG", "--labels", "a,b", "--machine", "laptop", "--judge", "none"],
    ],
)
def test_a_name_that_is_too_long_for_a_file_is_one_sentence(
    images: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images.parent)
    done = run(*(argument.replace("LONG", "a" * 300) for argument in command), check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: 'aaa")
    assert done.stderr.endswith("' is too long for the name of a file. Check the path.\n")

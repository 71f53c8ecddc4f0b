"""Runs that score all their images before they decide on the first one."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cascadevlm import Cascade, Stage, load_prompt
from cascadevlm.base.errors import ConfigError, DataError
from cascadevlm.config.agreement import AgreementConfig
from cascadevlm.decision.teaching import transduced
from cascadevlm.judges.budget import Ledger
from cascadevlm.runs import bulk
from cascadevlm.runs.inputs import Inputs, Named
from cascadevlm.runs.scored_first import SCORED, ScoredImages
from cascadevlm.runs.tally import Tally
from cascadevlm.scorers.kept import CachedEmbeddings
from tests.learning import LABELS, NAMES, Naturalist, Pixels, cascade, insects, made_calibration, truth_of
from tests.runs.test_certified import PaidJudge

FILES = ("predictions.jsonl", "scores.npy", "embeddings.npy", SCORED)


def named(images: list[Image.Image]) -> list[Named]:
    return [(str(number), b"no image" if number % 50 == 3 else image) for number, image in enumerate(images)]


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def right(folder: Path, images: list[Image.Image]) -> float:
    return float(np.mean([NAMES[truth_of(images[int(str(line["path"]))])] == line["label"] for line in lines(folder)]))


def files(folder: Path, count: int) -> Inputs:
    for number, image in enumerate(insects(count)):
        path = folder / NAMES[truth_of(image)] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return Inputs(folder, shuffled=True)


def test_the_folder_holds_the_scores_of_all_images_and_the_run_starts_from_what_they_teach(tmp_path: Path) -> None:
    images = insects(300)
    bulk.run(cascade(), named(images), tmp_path, config={})
    read = [number for number in range(300) if number % 50 != 3]
    scores = Pixels().score([images[number] for number in read], LABELS)
    found = ScoredImages(folder=tmp_path, labels=LABELS, fingerprint=scores.fingerprint)
    assert found.embeddings is not None
    assert scores.embeddings is not None
    np.testing.assert_allclose(found.log_probs[read], scores.log_probs, atol=1e-5)
    np.testing.assert_allclose(found.embeddings[read], scores.embeddings, atol=1e-3)
    assert np.isnan(found.log_probs[3::50]).all()
    assert not found.embeddings[3::50].any()

    support, scored = made_calibration().support, (scores.log_probs, scores.embeddings)
    assert support is not None
    unlabelled = transduced(support, lambda: [scored])
    expected = cascade().altered(unlabelled=unlabelled).classify([source for _, source in named(images)])
    assert [line["label"] for line in lines(tmp_path)] == [each.label for each in expected]
    found_probabilities = [float(str(line["probability"] or 0)) for line in lines(tmp_path)]
    np.testing.assert_allclose(found_probabilities, [each.probability or 0.0 for each in expected], atol=1e-4)
    assert [line["label"] for line in lines(tmp_path)] != [
        each.label for each in cascade().classify([source for _, source in named(images)])
    ]


def test_an_image_is_decoded_once_and_again_only_if_a_judge_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, opened, really = files(tmp_path / "images", 200), list[str](), Image.open

    def counted(file: object, *args: object, **options: object) -> Image.Image:
        opened.append(str(file))
        return really(file, *args, **options)  # type: ignore[arg-type]

    (tmp_path / "images" / "torn.png").write_bytes(b"no image")
    monkeypatch.setattr(Image, "open", counted)
    bulk.run(cascade(Naturalist(), policy="never"), inputs, tmp_path / "kept", config={})
    each = len(opened)
    opened.clear()
    tally = bulk.run(cascade(judge := Naturalist()), Inputs(inputs.path, shuffled=True), tmp_path / "run", config={})
    assert 0 < tally.asked == len(judge.questions) < 200
    assert tally.counts["unreadable"] == 1
    assert each == 201
    assert len(opened) == each + tally.asked
    opened.clear()
    bulk.run(cascade(), Inputs(inputs.path, shuffled=True), tmp_path / "run", config={})
    assert len(opened) < 100  # those asked about since the last checkpoint


@pytest.mark.parametrize("stored", [False, True])
def test_scores_of_another_scorer_are_refused_although_all_images_are_scored(tmp_path: Path, stored: bool) -> None:
    class Other(Pixels):
        def model_fingerprint(self) -> str:
            return "other pixels"

    def go_on(scorer: Pixels, dollars: float) -> Tally:
        kept = CachedEmbeddings(scorer, tmp_path / "cache") if stored else scorer
        stage = Stage(judge=PaidJudge(), prompt=load_prompt("select"))
        running = Cascade(kept, [stage], labels=LABELS, ledger=Ledger(dollars))
        return bulk.run(running, named(insects(100)), tmp_path / "run", config={}, promised=AgreementConfig(agree=0.8))

    assert go_on(Pixels(), 0.0).counts["skipped"] == 98
    with pytest.raises(DataError, match="the scorer is now 'other pixels"):
        go_on(Other(), 1.0)
    assert go_on(Pixels(), 1.0).certificate is not None


def test_a_run_in_which_no_image_can_be_read_ends(tmp_path: Path) -> None:
    tally = bulk.run(cascade(), [(str(number), b"no image") for number in range(5)], tmp_path, config={})
    assert tally.counts == {"unreadable": 5}


def test_a_finished_run_loads_no_scorer(tmp_path: Path) -> None:
    class Gone(Pixels):
        def load(self) -> None:
            pytest.fail("the scorer is loaded")

    bulk.run(cascade(), named(insects(100)), tmp_path, config={})
    before = lines(tmp_path)
    bulk.run(cascade().altered(scorer=Gone()), named(insects(100)), tmp_path, config={})
    assert lines(tmp_path) == before


DYING = """
import os, signal, sys
from pathlib import Path
from cascadevlm.runs import bulk
from tests.learning import Naturalist, Pixels, cascade, insects
from tests.runs.test_scored_first import named

class Dying(Pixels):
    left = int(sys.argv[2])
    def embed_images(self, images):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().embed_images(images)

running = cascade(Naturalist()).altered(scorer=Dying())
bulk.run(running, named(insects(300)), Path(sys.argv[1]), config={})
"""


def test_killed_while_the_images_are_scored_and_gone_on_with_the_run_has_the_same_bytes(tmp_path: Path) -> None:
    for batches in (4, 9):
        script = [sys.executable, "-c", DYING, str(tmp_path / "killed"), str(batches)]
        assert subprocess.run(script, check=False, cwd=Path(__file__).parents[2]).returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "predictions.jsonl").read_text()
    assert 100 < (tmp_path / "killed" / SCORED).read_text().count("\n") < 200
    bulk.run(cascade(), named(insects(300)), tmp_path / "killed", config={})
    bulk.run(cascade(), named(insects(300)), tmp_path / "whole", config={})
    for name in FILES:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("name", ["scores.npy", "embeddings.npy", SCORED])
def test_damaged_rows_are_scored_again(tmp_path: Path, name: str) -> None:
    images, stops = named(insects(100)), iter([False] * 5 + [True])
    bulk.run(cascade(), images, tmp_path / "run", config={}, stopping=lambda: next(stops, True))
    content = bytearray((tmp_path / "run" / name).read_bytes())
    content[600] ^= 1
    (tmp_path / "run" / name).write_bytes(content)
    bulk.run(cascade(), images, tmp_path / "run", config={})
    bulk.run(cascade(), images, tmp_path / "whole", config={})
    for each in FILES:
        assert (tmp_path / "run" / each).read_bytes() == (tmp_path / "whole" / each).read_bytes(), each


@pytest.mark.filterwarnings("ignore:The images seem to come class by class")
def test_in_sorted_order_a_run_is_as_right_as_in_random_order(tmp_path: Path) -> None:
    """Within 1.5 points; without looking at all images first, sorted order loses more."""
    rights = []
    for seed in range(3):
        images = insects(500, seed, noise=45)
        ordered = sorted(named(images), key=lambda each: truth_of(images[int(each[0])]))
        for name, each in (("random", named(images)), ("sorted", ordered), ("stream", Stream(ordered))):
            bulk.run(cascade(policy="deferral <= 0.1"), each, tmp_path / f"{name} {seed}", config={})
        rights.append([right(tmp_path / f"{name} {seed}", images) for name in ("random", "sorted", "stream")])
    random, in_order, stream = np.mean(rights, axis=0)
    assert in_order > random - 0.015
    assert stream < in_order


class Stream:
    """Images whose number is not known."""

    def __init__(self, images: list[Named]) -> None:
        self.images = images

    def __iter__(self) -> Iterator[Named]:
        return iter(self.images)


@pytest.mark.filterwarnings("ignore:The images seem to come class by class")
def test_images_of_unknown_number_are_not_scored_first(tmp_path: Path) -> None:
    bulk.run(cascade(), Stream(named(insects(50))), tmp_path, config={})
    assert not (tmp_path / SCORED).exists()


def test_images_cannot_be_added_removed_or_exchanged(tmp_path: Path) -> None:
    images, stops = named(insects(60)), iter([False] * 2 + [True])
    bulk.run(cascade(), images, tmp_path, config={}, stopping=lambda: next(stops, True))
    for others, message in (
        (images[:-1], "was started with 60 images; there are now 59"),
        ([*images, ("60", b"")], "was started with 60 images; there are now 61"),
        ([("other", b""), *images[1:]], "Image 0 of .* was '0' and is now 'other'"),
    ):
        with pytest.raises(DataError, match=message):
            bulk.run(cascade(), others, tmp_path, config={})


def test_a_file_that_was_changed_is_scored_again(tmp_path: Path) -> None:
    inputs, stops = files(tmp_path / "images", 60), iter([False] * 2 + [True])
    bulk.run(cascade(), inputs, tmp_path / "run", config={}, stopping=lambda: next(stops, True))
    first = Path(next(iter(inputs))[0])
    insects(61)[60].save(first)
    with pytest.warns(RuntimeWarning, match="was changed after it was scored; it and all later images are scored again"):
        bulk.run(cascade(), inputs, tmp_path / "run", config={})
    bulk.run(cascade(), Inputs(inputs.path, shuffled=True), tmp_path / "whole", config={})
    for name in FILES:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_failed_images_are_read_again_if_this_is_wanted(tmp_path: Path) -> None:
    inputs = files(tmp_path / "images", 60)
    first = Path(next(iter(inputs))[0])
    content = first.read_bytes()
    first.write_bytes(b"torn")
    assert bulk.run(cascade(), inputs, tmp_path / "run", config={}).counts["unreadable"] == 1
    first.write_bytes(content)
    assert bulk.run(cascade(), inputs, tmp_path / "run", config={}, retry_failed=True).counts["unreadable"] == 0
    bulk.run(cascade(), Inputs(inputs.path, shuffled=True), tmp_path / "whole", config={})
    for name in FILES[1:]:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert [line["label"] for line in lines(tmp_path / "run")] == [line["label"] for line in lines(tmp_path / "whole")]


def test_another_scorer_is_refused_and_so_are_scores_from_which_nothing_can_be_learned(tmp_path: Path) -> None:
    class Other(Pixels):
        def model_fingerprint(self) -> str:
            return "other"

    with pytest.raises(ConfigError, match="this scorer is 'other"):
        bulk.run(cascade().altered(scorer=Other()), named(insects(20)), tmp_path, config={})
    assert not (tmp_path / SCORED).read_text()

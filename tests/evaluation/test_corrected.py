"""The images of a run that people labelled, in metrics, calibrations, adapters and reports."""

import io
import json
import shutil
from collections.abc import Callable
from contextlib import chdir
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from pydantic import JsonValue

from cascadevlm import Cascade, Stage, load_prompt, parse_policy
from cascadevlm.base.arrays import NOBODY
from cascadevlm.base.errors import DataError, InputError
from cascadevlm.base.images import ImageSource, pixel_digest
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Scores
from cascadevlm.config.agreement import AgreementConfig
from cascadevlm.config.config import Config
from cascadevlm.evaluation.adapting import embedded
from cascadevlm.evaluation.adapting_to_runs import adapt_to_run, read_said
from cascadevlm.evaluation.calibrating.fitting import fit_calibration
from cascadevlm.evaluation.calibrating.recipe import Recipe
from cascadevlm.evaluation.corrected import FEWEST, random_sample, read_corrected
from cascadevlm.evaluation.data import read_data
from cascadevlm.evaluation.record import read_record
from cascadevlm.evaluation.report import read_bulk_run, render_bulk
from cascadevlm.runs import bulk
from cascadevlm.runs.corrections import Correction, add_corrections, random_order
from cascadevlm.runs.inputs import Inputs
from cascadevlm.runs.lines import Line, read_lines
from tests.cli.test_cli import run as command
from tests.evaluation.test_adapting_to_runs import RUN, calibration, right, said
from tests.evaluation.test_adapting_to_runs import images as made_up_images
from tests.learning import LABELS, NAMES, Naturalist, Pixels, insects, truth_of

IMAGES = 120
CONFIG: dict[str, JsonValue] = {"scorer": {"use": "fake:fake"}, "stage": [{"judge": "fake:fake", "policy": "entropy > 0.3"}]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a cascade over images whose last pixel is the truth."""
    folder = tmp_path_factory.mktemp("corrected")
    (folder / "images").mkdir()
    for number, image in enumerate(insects(IMAGES, noise=90)):
        image.save(folder / "images" / f"{number:03}.png")
    stage = Stage(judge=Naturalist(right=0.9), prompt=load_prompt("select"), policy=parse_policy("entropy > 0.3"))
    cascade = Cascade(Pixels(), [stage], labels=LABELS)
    with chdir(folder):  # random samples depend on the names of the images, which are the same in every session
        bulk.run(cascade, Inputs("images"), folder / "run", config=Config.parse(CONFIG).model_dump(mode="json"))
    return folder / "run"


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, over the same images."""
    monkeypatch.chdir(made.parent)
    return shutil.copytree(made, tmp_path / "run")


def lines(run: Path) -> list[Line]:
    return [line for _, line in read_lines(run / "predictions.jsonl", Line)]


def truth(path: str) -> str:
    with Image.open(path) as image:
        return NAMES[truth_of(image)]


def correct(
    run: Path, chosen: Callable[[Line], bool], label: Callable[[str], str | None] = truth, *, skipped: bool = False
) -> int:
    """A person labels some images. The number of these images."""
    paths = [line.path for line in lines(run) if chosen(line)]
    at = datetime.now(UTC)
    add_corrections(run, [Correction(image=path, label=label(path), skipped=skipped, at=at, source="") for path in paths])
    return len(paths)


def first(run: Path, size: int) -> Callable[[Line], bool]:
    """The images of a random sample."""
    keys = sorted(random_order(line.path) for line in lines(run))[:size]
    return lambda line: random_order(line.path) in keys


def embed(
    config: Config, labels: LabelSet, images: list[ImageSource]
) -> tuple[Scores, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    return embedded(Cascade(Pixels(), [], labels=labels), images, lambda _: None)


def test_metrics_of_a_random_sample_are_those_of_its_images(run: Path) -> None:
    sample = first(run, 60)
    correct(run, sample)
    correct(run, lambda line: not sample(line) and line.confidence < 0.5)
    found = read_corrected(run)
    figures = found.evaluate()
    own = [line for line in lines(run) if sample(line)]
    assert figures.images == int(found.random.sum()) >= 60
    rows = [line for line in lines(run) if line.path in np.array([*found.paths.values()])[found.random]]
    assert {line.path for line in own} <= {line.path for line in rows}
    assert figures.cascade_accuracy == np.mean([line.label == truth(line.path) for line in rows])
    assert figures.scorer_accuracy == np.mean([line.ranked[0].label == truth(line.path) for line in rows])
    assert figures.deferral_rate == np.mean([line.escalated for line in rows])
    asked = [line for line in rows if line.escalated]
    assert figures.judge_accuracy == np.mean(
        [line.verdict is not None and line.verdict.label == truth(line.path) for line in asked]
    )
    assert set(figures.top_k_recall) == {1, 2, 3, 5}
    assert set(replace(found, candidates=2).evaluate().top_k_recall) == {1, 2}
    hits = [truth(line.path) in [each.label for each in line.ranked[:3]] for line in rows]
    assert figures.top_k_recall[3] == np.mean(hits)
    assert "hold for the whole run" in found.describe()


def test_a_selection_by_confidence_is_no_random_sample_and_is_told(run: Path) -> None:
    count = correct(run, lambda line: line.confidence < 0.3)
    assert FEWEST <= count < IMAGES
    found = read_corrected(run)
    assert not found.random.any()
    assert found.evaluate().images == count
    assert found.confidence < found.confidences.mean()
    assert f"People labelled {count} images. Their mean confidence is {found.confidence:.0%}" in found.describe()
    assert "are not a random sample, so the figures hold only for these images" in found.describe()


def test_a_random_sample_shows_how_many_of_the_surest_labels_are_right(run: Path) -> None:
    correct(run, first(run, IMAGES // 2))
    found = read_corrected(run)
    surest = found.surest(0.6, 0.95)
    ranked = sorted((line for line in lines(run) if line.label is not None), key=lambda line: -line.confidence)
    assert 0 < surest.images <= surest.labelled == len(ranked)
    assert surest.down_to == ranked[surest.images - 1].confidence
    assert np.mean([line.label == truth(line.path) for line in ranked[: surest.images]]) >= 0.6
    assert f"at least 60 % of the {surest.images:,} surest of {surest.labelled:,} labels are right" in surest.sentence
    assert "does not show that at least 60 %" in replace(surest, images=0).sentence


def test_a_skipped_image_of_the_sample_counts_as_wrong(run: Path) -> None:
    sample = first(run, IMAGES // 2)
    correct(run, sample)
    before = read_corrected(run).surest(0.6, 0.95).images
    correct(run, lambda line: sample(line) and line.confidence > 0.3, skipped=True)
    assert read_corrected(run).surest(0.6, 0.95).images < before


def test_without_a_random_sample_nothing_is_promised(run: Path) -> None:
    correct(run, lambda line: line.confidence < 0.3)
    with pytest.raises(DataError, match="are not a random sample, so they do not show"):
        read_corrected(run).surest(0.8, 0.95)
    correct(run, lambda _: True)
    with pytest.raises(InputError, match=r"^accuracy must be between 0 and 1"):
        read_corrected(run).surest(1.0, 0.95)


def test_a_small_beginning_of_the_random_order_is_no_sample(run: Path) -> None:
    correct(run, first(run, FEWEST - 1))
    found = read_corrected(run)
    assert not found.random.any()
    assert "They are a random sample of fewer than 30 images, so the figures hold only" in found.describe()
    with pytest.raises(DataError, match="are a random sample of fewer than 30 images, so they do not show"):
        found.surest(0.8, 0.95)
    correct(run, first(run, FEWEST))
    assert read_corrected(run).random.all()


def test_the_figures_of_a_random_sample_hold_and_a_selection_is_recognised() -> None:
    """A run of 1,000 images: the more confident, the more often right. People look at a random sample, or at the doubtful images,
    or at both.
    """
    rng = np.random.default_rng(0)
    confidences = rng.random(1000)
    right = rng.random(1000) < confidences
    errors, claimed = [], 0
    for _ in range(400):
        keys = rng.integers(0, 2**63, 1000, dtype=np.uint64)
        drawn, doubtful = np.argsort(np.argsort(keys)) < 100, confidences < 0.7
        for seen in (drawn, drawn | doubtful):
            sample = random_sample(keys, seen)
            assert not (sample & ~seen).any()
            errors.append(right[sample].mean() - right.mean())
        claimed += bool(random_sample(keys, doubtful).any())
    assert abs(np.mean(errors)) < 4 * np.std(errors) / np.sqrt(400)
    assert claimed == 0


def test_images_that_show_none_of_the_labels_are_counted_apart(run: Path) -> None:
    sample = first(run, 40)
    correct(run, sample)
    outside = correct(run, lambda line: sample(line) and line.path.endswith("0.png"), lambda _: None)
    correct(run, lambda line: sample(line) and line.path.endswith("1.png"), lambda _: None, skipped=True)
    assert outside > 0
    found = read_corrected(run)
    assert found.outside == found.outside_labelled == outside
    assert found.skipped > 0
    assert found.evaluate().images == 40 - outside - found.skipped
    assert f"{outside} others show none of the labels" in found.describe()


def test_without_corrections_there_is_nothing_to_measure(run: Path) -> None:
    with pytest.raises(DataError, match=r"Nobody labelled an image of the run.* cascadevlm import FILE --into RUN"):
        read_corrected(run)


def test_a_calibration_is_fitted_to_the_labels_of_people(run: Path) -> None:
    correct(run, first(run, 100))
    record = read_corrected(run).scored(embed)
    assert len(record) == 100
    assert record.scores.embeddings is not None
    assert [record.labels.names[column] for column in record.truths] == [truth(name) for name in record.names]
    expected = Cascade(Pixels(), [], labels=LABELS).scorer.score([Image.open(record.names[0])], LABELS)
    assert record.scores.log_probs[0] == pytest.approx(expected.log_probs[0])
    assert record.digests[0] == pixel_digest(Image.open(record.names[0]))
    fitted = fit_calibration(record, Recipe())
    assert (fitted.images, fitted.labelled) == (100, True)


def test_images_that_are_gone_are_left_out_of_a_calibration(run: Path) -> None:
    correct(run, first(run, 50))
    gone = Path(read_corrected(run).record.names[3])
    gone.rename(gone.with_suffix(".gone"))
    record = read_corrected(run).scored(embed)
    gone.with_suffix(".gone").rename(gone)
    assert len(record) == len(record.scores) == len(record.digests) == 49
    assert str(gone) not in record.names


def test_another_table_than_in_the_run_is_refused(tmp_path: Path) -> None:
    rows = []
    for image in insects(40):
        image.save(file := io.BytesIO(), "PNG")
        rows.append({"image": {"bytes": file.getvalue(), "path": None}})
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "images.parquet")
    config = Config.parse(CONFIG).model_dump(mode="json")
    bulk.run(Cascade(Pixels(), [], labels=LABELS), Inputs(tmp_path / "images.parquet"), tmp_path / "run", config=config)
    correct(tmp_path / "run", lambda _: True, lambda _: "ant")
    assert len(read_corrected(tmp_path / "run").scored(embed)) == 40
    pyarrow.parquet.write_table(table.slice(0, 39), tmp_path / "images.parquet")
    with pytest.raises(DataError, match=r"Row 39 of .* was .*39' in the run and is now 'gone'\."):
        read_corrected(tmp_path / "run").scored(embed)


def test_labels_of_people_teach_and_are_certain(run: Path) -> None:
    sample = first(run, 40)
    correct(run, sample)
    outside = correct(run, lambda line: sample(line) and line.path.endswith("0.png"), lambda _: None)
    found = read_said(run)
    assert len(found.images) == IMAGES - outside
    assert {int(column) for column in found.truths} >= {NOBODY, 0}
    known = [(str(image), NAMES[column]) for image, column in zip(found.images, found.truths, strict=True) if column != NOBODY]
    assert len(known) == 40 - outside
    assert all(name == truth(image) for image, name in known)

    images = made_up_images().take(RUN)
    labelled = replace(said(images, calibration(), asked=0), truths=images.truths)
    taught = adapt_to_run(images.scores, labelled)
    alone = adapt_to_run(images.scores, said(images, calibration(), asked=0))
    wrong = adapt_to_run(images.scores, replace(labelled, truths=(images.truths + 1) % 8))
    assert right(taught.adapter) > right(alone.adapter) > right(wrong.adapter)
    assert taught.adapter.made.labelled == alone.adapter.made.labelled + len(RUN)


def test_labels_of_people_replace_the_truths_of_a_record(run: Path, tmp_path: Path) -> None:
    rows = "".join(json.dumps({"path": str(Path(line.path).absolute()), "label": "ant"}) + "\n" for line in lines(run))
    (tmp_path / "data.jsonl").write_text(rows)
    data = read_data(tmp_path / "data.jsonl", LABELS)
    bulk.run(Cascade(Pixels(), [], labels=LABELS), data, tmp_path / "record", config={})
    before = read_record(tmp_path / "record")
    assert (before.truths == 0).all()
    paths = [line.path for line in lines(tmp_path / "record")]
    at = datetime.now(UTC)
    given = [(paths[0], "bee"), (paths[1], None), (paths[2], "cicada")]
    add_corrections(tmp_path / "record", [Correction(image=path, label=name, at=at, source="") for path, name in given])
    record = read_record(tmp_path / "record")
    assert record.truths[:3].tolist() == [1, 2, 0]
    assert record.names == (before.names[0], *before.names[2:])
    assert record.digests[1] == before.digests[2]
    shown = command("evaluate", tmp_path / "record").stdout
    assert "People said that 1 other images show none of the labels. The figures are without these." in shown


def test_the_report_shows_labels_of_people_and_who_disagrees(run: Path) -> None:
    path, other = (line.path for line in lines(run)[:2])
    noon = datetime(2026, 5, 1, 12, tzinfo=UTC)
    wrong = next(name for name in NAMES if name != lines(run)[0].label)
    add_corrections(
        run,
        [
            Correction(image=path, label=lines(run)[0].label, by="ann", at=noon, source=""),
            Correction(image=path, label=wrong, by="bob", at=noon.replace(hour=13), source=""),
            Correction(image=other, label=lines(run)[1].label, by="bob", at=noon, source=""),
        ],
    )
    read = read_bulk_run(run)
    assert (read.kinds["reviewed"], read.kinds["corrected"]) == (2, 1)
    page = render_bulk({"run": read})
    assert "People labelled 2 of them, 1 with another label than the cascade." in page
    assert f"bob said &#39;{wrong}&#39;, which counts." in page
    (case,) = [
        each
        for each in json.loads(page.split('id="data">')[1].split("</script>")[0])["runs"][0]["cases"]
        if "corrected" in each["kinds"]
    ]
    assert case["name"] == Path(path).name


def certify(made: Path, folder: Path) -> None:
    """A run with a certificate over the same images. Its folder contains the scores."""
    promised, config = AgreementConfig(agree=0.7), Config.parse(CONFIG).model_dump(mode="json")
    config["agreement"] = promised.model_dump(mode="json")
    stage = Stage(judge=Naturalist(right=0.8), prompt=load_prompt("select"))
    cascade = Cascade(Pixels(), [stage], labels=LABELS)
    bulk.run(cascade, Inputs(made.parent / "images"), folder, config=config, promised=promised)


def test_kept_scores_of_several_scorers_make_no_adapter(made: Path, tmp_path: Path) -> None:
    certify(made, tmp_path / "run")
    assert read_said(tmp_path / "run").scores is not None
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    manifest["config"]["scorer"]["use"] = [{"use": "open_clip:aviary"}, {"use": "open_clip:aviary"}]
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    done = command("adapt", tmp_path / "run", "-o", tmp_path / "x.adapter", check=False)
    assert done.returncode == 2
    assert "An adapter is for one scorer, and scorer.use names 2." in done.stderr.replace("\n", " ")


def test_a_certificate_stands_beside_the_accuracy_of_its_labels(made: Path, tmp_path: Path) -> None:
    certify(made, tmp_path / "run")
    correct(tmp_path / "run", lambda line: True)
    found = read_corrected(tmp_path / "run").of_certificate()
    told = lines(tmp_path / "run")
    asked = [line for line in told if line.verdict]
    assert 0 < len(asked) < IMAGES == found.labelled
    assert found.certified == pytest.approx(np.mean([line.label == truth(line.path) for line in told]))
    assert found.judge == pytest.approx(np.mean([line.verdict and line.verdict.label == truth(line.path) for line in asked]))
    printed = command("evaluate", tmp_path / "run").stdout
    assert f"the labels are right on {found.certified:.1%}, the judge on {found.judge:.1%}" in printed
    certificate = json.loads(command("evaluate", tmp_path / "run", "--json").stdout)["certificate"]
    assert certificate == {"agree": 0.7, **asdict(found)}

"""The cascade of Python callers does what the command line does, within one budget."""

import json
import shutil
from importlib import resources
from pathlib import Path

import fsspec
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascadevlm import (
    Cascade,
    ColumnNames,
    ConfigError,
    DataError,
    Quote,
    Stage,
    calibrate,
    load_prompt,
    load_scorer,
    parse_policy,
    read_data,
    read_record,
    sweep,
)
from cascadevlm.base.types import NANODOLLARS, Question
from cascadevlm.evaluation.calibrating.recipe import Recipe
from cascadevlm.evaluation.data import Data
from cascadevlm.judges.budget import Ledger
from cascadevlm.judges.cache import MemoryStore
from cascadevlm.runs.manifest import Manifest
from cascadevlm.testing import FakeJudge, FakeScorer, noise
from tests.cli.test_cli import run as cascadevlm

AVIARY = Path(str(resources.files("cascadevlm_backends") / "aviary"))
NAMES = ["ant", "bee", "cicada", "dragonfly"]


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight bundled images, in one folder per class."""
    folder = tmp_path_factory.mktemp("api")
    for bird in sorted((AVIARY / "images").glob("*.jpg"))[:8]:
        (folder / "data" / bird.stem).mkdir(parents=True)
        shutil.copy(bird, folder / "data" / bird.stem)
    return folder


def test_a_file_a_mapping_and_the_command_line_give_the_same_figures(birds: Path, tmp_path: Path) -> None:
    file, labels = AVIARY / "cascade.toml", [folder.name for folder in sorted((birds / "data").iterdir())]
    content: dict[str, object] = {
        "scorer": {"use": "open_clip:aviary"},
        "stage": [{"judge": "hf_chat:aviary", "policy": "entropy > 0.17", "candidates": 5, "prompt": "select_cot"}],
        "cache": {"enabled": False},
    }
    timeless = {"latency_p50": None, "latency_p95": None}
    arguments = ("evaluate", birds / "data", "--config", file, "--judge-all", "--json", "-o", tmp_path / "cli")
    figures = json.loads(cascadevlm(*arguments).stdout) | timeless
    sources: tuple[Path | str | dict[str, object], ...] = file, str(file), content
    for number, source in enumerate(sources):
        cascade = Cascade.from_config(source, labels=labels)
        evaluation = cascade.evaluate(birds / "data", tmp_path / str(number), judge_all=True)
        assert json.loads(json.dumps(evaluation.to_dict())) | timeless == figures
        assert Manifest.read(tmp_path / str(number)).config == Manifest.read(tmp_path / "cli").config
    assert sweep(read_record(tmp_path / "0")).judge_accuracy == figures["judge_accuracy"]


def test_a_wrong_key_is_named_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('[scorer]\nuse = "open_clip:aviary"\ntemplate = "x"\n')
    with pytest.raises(ConfigError, match=r"mine\.toml: The key 'scorer\.template' is unknown"):
        Cascade.from_config(tmp_path / "mine.toml", labels=NAMES)
    with pytest.raises(ConfigError, match=r"config: The key 'scorer\.template' is unknown"):
        Cascade.from_config({"scorer": {"use": "open_clip:aviary", "template": "x"}}, labels=NAMES)
    with pytest.raises(ConfigError, match=r"config must be the path of a TOML file or a mapping, not None\. For example"):
        Cascade.from_config(None)  # type: ignore[arg-type]


def test_a_run_that_was_interrupted_continues_with_the_same_call(birds: Path, tmp_path: Path) -> None:
    content = {"labels": NAMES, "scorer": {"use": "open_clip:aviary"}}
    whole = Cascade.from_config(content).run(birds / "data", tmp_path / "run")
    lines = (tmp_path / "run" / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "run" / "predictions.jsonl").write_bytes(b"".join(lines[:3]))
    again = Cascade.from_config(content).run(sorted(map(str, (birds / "data").rglob("*.jpg"))), tmp_path / "run")
    assert again.images == whole.images == 8
    assert (tmp_path / "run" / "predictions.jsonl").read_bytes() == b"".join(lines)
    with pytest.raises(DataError, match="belongs to another run"):
        Cascade.from_config(content | {"accept": 0.5}).run(birds / "data", tmp_path / "run")
    with pytest.raises(DataError, match=r"\[\] contains no images"):
        Cascade.from_config(content).run([], tmp_path / "empty")


class Priced(FakeJudge):
    """Costs 100 nanodollars."""

    def quote(self, question: Question) -> Quote:
        return Quote(worst_case=100)


def by_hand(judge: FakeJudge, ledger: Ledger | None = None, policy: object = "always") -> Cascade:
    stage = Stage(judge=judge, prompt=load_prompt("select"), policy=policy)  # type: ignore[arg-type]
    return Cascade(FakeScorer(), [stage], labels=NAMES, ledger=ledger, store=MemoryStore())


def pictures(count: int, first: int = 0) -> Data:
    return Data(
        images=[noise(first + number) for number in range(count)],
        names=tuple(f"#{number}" for number in range(count)),
        truths=tuple(NAMES[number % 4] for number in range(count)),
        splits=("",) * count,
    )


@settings(max_examples=15)
@given(st.integers(0, 12), st.lists(st.sampled_from(["classify", "evaluate", "again"]), min_size=1, max_size=4))
def test_all_methods_together_keep_one_spending_limit(
    tmp_path_factory: pytest.TempPathFactory, questions: int, calls: list[str]
) -> None:
    judge, folder = Priced(dollars=100 / NANODOLLARS), tmp_path_factory.mktemp("budget")
    cascade = by_hand(judge, Ledger(questions * 100 / NANODOLLARS))
    for number, call in enumerate(calls):
        data = pictures(5, first=5 * number)
        if call == "classify":
            cascade.classify(data.images)
        elif call == "evaluate":
            cascade.evaluate(data)
        else:
            cascade.evaluate(pictures(5), folder)
    spent = round(cascade.ledger.spent_dollars * NANODOLLARS)
    assert spent == 100 * len(judge.questions) <= 100 * questions
    assert cascade.ledger.reserved_dollars == 0


def test_what_an_earlier_cascade_paid_in_a_folder_counts(tmp_path: Path) -> None:
    judge = Priced(dollars=100 / NANODOLLARS)
    limit = 7 * 100 / NANODOLLARS
    first = by_hand(judge, Ledger(5 * 100 / NANODOLLARS))
    first.evaluate(pictures(10), tmp_path / "record")
    second = by_hand(judge, Ledger(limit))
    second.evaluate(pictures(10), tmp_path / "record")
    assert len(judge.questions) == 7
    assert second.ledger.spent_dollars == pytest.approx(2 * 100 / NANODOLLARS)


def look_at_nothing(scores: object) -> object:
    raise NotImplementedError


def test_a_record_of_a_cascade_built_from_objects_can_be_swept_and_calibrated(tmp_path: Path) -> None:
    cascade = by_hand(FakeJudge(reply=lambda question: f"ANSWER: {question.labels[0].name}"), policy="margin < 0.2")
    cascade.evaluate(pictures(60), tmp_path / "record", judge_all=True)
    record = read_record(tmp_path / "record")
    assert record.stated.stage[0].policy == str(parse_policy("margin < 0.2"))
    assert len(repr(sweep(record))) < 1500
    assert calibrate(record, Recipe(size=40)).calibration.images == 40
    assert by_hand(FakeJudge(), policy=look_at_nothing).described()["stage"] == [
        {
            "judge": "fake:fake",
            "policy": None,
            "candidates": "TopK(order='ranked', seed=0, k=5)",
            "prompt": "select",
            "offer_none": False,
            "votes": 1,
            "widen": 0,
        }
    ]


def test_labelled_folders_are_read_for_the_labels_of_the_cascade(birds: Path) -> None:
    cascade = Cascade(load_scorer("open_clip:aviary"), labels=NAMES)
    with pytest.raises(DataError, match="8 labels are not in the label set"):
        cascade.evaluate(birds / "data")
    with pytest.raises(DataError, match="8 labels are not in the label set"):
        read_data(birds / "data", cascade.labels)


def test_addresses_are_read_and_named_without_credentials(tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    with system.open("/pictures/a.png", "wb") as file:
        noise(0).save(file, "PNG")
    noise(1).save(tmp_path / "b.png")
    addresses: list[str | Path] = ["memory://pictures/a.png?key=s3cret", "memory://pictures/a.png", tmp_path / "b.png"]
    tally = by_hand(FakeJudge(), policy="never").run(addresses, tmp_path / "run")
    names = [json.loads(line)["path"] for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert names == ["memory://pictures/a.png?key=***", "memory://pictures/a.png", str(tmp_path / "b.png")]
    assert tally.counts["unreadable"] == 1  # no file has the name with the key


def test_the_columns_of_a_table_are_named(tmp_path: Path) -> None:
    noise(0).save(tmp_path / "a.png")
    (tmp_path / "list.csv").write_text(f"sku,photo,kind\nA7,{tmp_path / 'a.png'},{by_hand(FakeJudge()).labels.names[0]}\n")
    columns = ColumnNames(image="photo", label="kind", id="sku")
    by_hand(FakeJudge()).run(tmp_path / "list.csv", tmp_path / "run", columns=columns)
    assert json.loads((tmp_path / "run" / "predictions.jsonl").read_text())["id"] == "A7"
    assert by_hand(FakeJudge()).evaluate(tmp_path / "list.csv", columns=columns).images == 1
    with pytest.raises(DataError, match="Columns can only be named for a table"):
        by_hand(FakeJudge()).run([tmp_path / "a.png"], tmp_path / "other", columns=columns)


def test_a_frame_with_truths_is_evaluated_and_its_ids_are_in_the_record(tmp_path: Path) -> None:
    for number in range(4):
        noise(number).save(tmp_path / f"{number}.png")
    photos = [str(tmp_path / f"{number}.png") for number in range(4)]
    frame = pandas.DataFrame({"photo": photos, "kind": NAMES, "sku": ["A", "B", "C", "D"]})
    columns, cascade = ColumnNames(image="photo", label="kind", id="sku"), by_hand(FakeJudge())
    evaluation = cascade.evaluate(frame, tmp_path / "record", columns=columns)
    record = read_record(tmp_path / "record")
    assert [told["id"] for told in record.about] == ["A", "B", "C", "D"]
    right = [each.label == truth for each, truth in zip(cascade.classify(photos), NAMES, strict=True)]
    assert evaluation.cascade_accuracy == sum(right) / 4
    assert cascade.evaluate(frame, tmp_path / "record", columns=columns).images == 4  # it is the same record
    with pytest.raises(
        DataError, match=r"inputs is a table \(DataFrame\), from which a run cannot continue\. Write it to a Parquet"
    ):
        cascade.run(frame, tmp_path / "run")

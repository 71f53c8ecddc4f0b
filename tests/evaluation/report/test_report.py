"""Reports: the texts of the page compared with the metrics, and the behaviour of the page in a real browser."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import ImageFilter
from playwright.sync_api import Browser, Page, sync_playwright

from cascadevlm import Cascade, ColumnNames, Stage, load_prompt, parse_policy, read_data, read_record
from cascadevlm.base.arrays import NOBODY
from cascadevlm.base.errors import DataError
from cascadevlm.base.html import thumbnail
from cascadevlm.base.images import load_image, pixel_digest
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.types import Question, Scores
from cascadevlm.cascade.item import OnFailure
from cascadevlm.evaluation.evaluate import evaluate_replayed
from cascadevlm.evaluation.metrics import evaluate
from cascadevlm.evaluation.record import Judged, Record
from cascadevlm.evaluation.report import Run, read_bulk_run, render, render_bulk
from cascadevlm.evaluation.report.cases import MOST_CASES, MOST_IN_ALL, UNASKED, cases, kinds_of, sample
from cascadevlm.evaluation.report.unlabelled import SURE
from cascadevlm.evaluation.results import read_studies
from cascadevlm.evaluation.sweep import under
from cascadevlm.judges.base import Quote
from cascadevlm.judges.budget import Ledger
from cascadevlm.policies.rules import EntropyAbove
from cascadevlm.runs import bulk
from cascadevlm.runs.inputs import Inputs
from cascadevlm.testing import FakeJudge, FakeScorer, noise
from tests.evaluation.test_plots import of_classes, with_policy
from tests.evaluation.test_sweep import record as small_record

CHROMIUM = shutil.which("chromium")
QUIET = [
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
]
EVIL = "</script><img src=x onerror=\"document.title='pwned'\"><!-- $x^{ \u2028 & '"
KINDS = ("rescued", "harmed", "abstained", "wrong", "escalated")


def record(
    size: int = 80, *, names: tuple[str, ...] | None = None, labels: LabelSet | None = None, abstains: bool = True, seed: int = 0
) -> Record:
    """A record with a judge asked about all images, the policy entropy > 0.6, cases of all kinds, long reasoning and hostile
    names.
    """
    rng = np.random.default_rng(seed)
    labels = labels or LabelSet.of([EVIL, "bee", "cicada <b>bold</b>", "dragonfly", "earwig", "firefly", "gnat"])
    classes = len(labels)
    truths = rng.integers(0, classes, size)
    logits = rng.normal(size=(size, classes))
    logits[np.arange(size), truths] += rng.exponential(2.0, size)
    scores = Scores.from_logits(logits, labels, fingerprint="x")
    candidates = np.argsort(-scores.log_probs, axis=1)[:, : min(4, classes)]
    answers = np.where(rng.random(size) < 0.8, truths, candidates[:, 1 % classes])
    answers = np.where((candidates == answers[:, None]).any(axis=1), answers, NOBODY)
    answers[rng.random(size) < 0.1] = NOBODY
    readable = np.arange(size) != 3
    answers = np.where(readable, answers, NOBODY)
    judged = Judged(
        judge="fake:judge",
        asked=readable,
        outcomes=tuple(
            "" if not read else "answered" if answer != NOBODY else "none" for read, answer in zip(readable, answers, strict=True)
        ),
        answers=answers,
        candidates=np.where(readable[:, None], candidates, NOBODY),
        rationales=tuple(f"{EVIL} {'I see wings. ' * (row % 5 * 20)}" for row in range(size)),
        dollars=rng.uniform(0.001, 0.01, size) * readable,
        seconds=rng.exponential(1.0, size) * readable,
        input_tokens=100 * readable.astype(np.int64),
        output_tokens=10 * readable.astype(np.int64),
        paid=np.zeros(size),
    )
    made = with_policy(
        Record(
            scores=scores,
            readable=readable,
            names=names or tuple(f"/data/{row}.jpg" for row in range(size)),
            truths=truths,
            stages=(judged,),
            predicted=answers,
            probabilities=np.full(size, np.nan),
            decided_by=tuple("judge" if answer != NOBODY else "" for answer in answers),
        ),
        "entropy > 0.6",
    )
    assert made.info is not None
    config = {**made.info.config, "on_failure": "abstain" if abstains else "scorer"}
    return replace(made, info=made.info.model_copy(update={"config": config}))


def unconfigured(given_record: Record) -> Record:
    assert given_record.info is not None
    return replace(given_record, info=given_record.info.model_copy(update={"config": {}}))


def write(folder: Path, runs: Mapping[str, Run]) -> Path:
    file = folder / "report.html"
    file.write_text(render(runs), encoding="utf-8")
    return file


# What the cases are.


@given(st.integers(0, 10_000), st.integers(1, 80), st.integers(0, 5))
def test_kinds_are_those_that_the_metrics_count(seed: int, size: int, unreadable: int) -> None:
    given_record = small_record(seed, size, unreadable=min(unreadable, size))
    kinds, found = kinds_of(given_record), evaluate(given_record)
    assert {kind: int(kinds[kind].sum()) for kind in ("rescued", "harmed", "abstained")} == {
        "rescued": found.rescued,
        "harmed": found.harmed,
        "abstained": found.abstained,
    }
    read = given_record.readable
    if read.any():
        assert found.cascade_accuracy == pytest.approx(1 - kinds["wrong"][read].mean())
        assert found.deferral_rate == pytest.approx(kinds["escalated"][read].mean())


@given(st.integers(0, 10_000), st.integers(1, 300), st.integers(1, 60))
def test_a_sample_is_as_large_as_it_may_be_and_has_the_rare_kinds_whole(seed: int, size: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    kinds = {kind: rng.random(size) < share for kind, share in zip(KINDS, (0.02, 0.01, 0.05, 0.3, 0.5), strict=True)}
    rows = sample(kinds, most)
    assert len(rows) == len(set(rows.tolist())) == min(most, size)
    assert rows.tolist() == sorted(rows.tolist())
    np.testing.assert_array_equal(rows, sample(kinds, most))
    rarest = min(kinds, key=lambda kind: int(kinds[kind].sum()))
    assert kinds[rarest][rows].sum() >= min(kinds[rarest].sum(), most // (len(kinds) + 1))


def test_a_page_holds_so_many_cases_of_a_run_and_of_all() -> None:
    large = of_classes(LabelSet.of(["ant", "bee"]), right=False, size=MOST_CASES + 1)
    for count in (1, 4):
        told = json.loads(json.dumps(cases({f"run {n}": (large, large) for n in range(count)})))["runs"]
        assert len(told[0]["cases"]) == min(MOST_CASES, MOST_IN_ALL // count)
        assert told[0]["totals"]["all"] == MOST_CASES + 1


def test_cases_without_a_judge_show_the_scorers_best() -> None:
    alone = of_classes(LabelSet.of(f"class {n}" for n in range(9)), right=False)
    (run,) = json.loads(json.dumps(cases({"run": (alone, alone)})))["runs"]
    probabilities = alone.scores.probabilities
    for row, case in enumerate(run["cases"]):
        expected = sorted(range(9), key=lambda column: -probabilities[row, column])[:UNASKED]
        assert [column for column, _ in case["candidates"]] == expected
        assert [shown for _, shown in case["candidates"]] == pytest.approx(probabilities[row, expected], abs=1e-4)


def test_thumbnails_are_of_the_very_image(tmp_path: Path) -> None:
    noise(1, (400, 200)).save(tmp_path / "right.png")
    noise(2).save(tmp_path / "other.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    names = [str(tmp_path / name) for name in ("right.png", "other.png", "broken.png", "missing.png", "right.png")] + ["#7\0"]
    alone = of_classes(LabelSet.of(["ant", "bee"]), right=True, size=len(names))
    digests = tuple(pixel_digest(noise(1, (400, 200))) for _ in names)
    told = cases({"run": (known := replace(alone, names=tuple(names), digests=digests), known)})
    thumbnails = json.loads(json.dumps(told))["thumbnails"]
    assert [thumbnail.partition(";")[0] for thumbnail in thumbnails] == ["data:image/webp", "", "", "", ""]
    assert len(json.loads(json.dumps(told))["runs"][0]["cases"]) == 6  # the first and the fifth share theirs


def test_a_run_judged_on_everything_is_told_under_its_policy() -> None:
    given_record = record()
    run = Run.of(given_record)
    assert run.evaluation == evaluate_replayed(given_record, EntropyAbove(0.6))
    gated = under(given_record, EntropyAbove(0.6))
    assert Run.of(gated).final is gated


# What the page is.


class Reader(HTMLParser):
    """Collects ids, references and texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given_attributes = {name: value or "" for name, value in attrs}
        self.ids += [value for name, value in given_attributes.items() if name == "id"]
        self.references += [value for name, value in given_attributes.items() if name in ("src", "href", "xlink:href")]
        self.references += re.findall(r"url\(([^)]*)\)", " ".join(given_attributes.values()))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is None:  # neither style nor script
            self.text += data


def test_ids_are_there_once_and_references_stay_on_the_page() -> None:
    reader = Reader(render({"one": Run.of(record()), "<b>other": Run.of(record(seed=1))}))
    assert len(reader.ids) == len(set(reader.ids))
    assert {reference for reference in reader.references if not reference.startswith("#")} == {"data:,"}
    assert {reference[1:] for reference in reader.references if reference.startswith("#")} <= set(reader.ids)
    assert "entropy (area" in reader.text  # text of plots stays text


def test_pages_are_the_same_every_time() -> None:
    assert render({"run": Run.of(record())}) == render({"run": Run.of(record())})


@pytest.mark.parametrize(
    "given_record",
    [
        of_classes(LabelSet.of(["ant"]), right=True),
        of_classes(LabelSet.of(["ant", "bee"]), right=False, size=1),
        small_record(0, 5, unreadable=5),
        with_policy(under(small_record(0), EntropyAbove(1.0)), "entropy > 1"),
        replace(record(), stages=(*record().stages, *record().stages)),
        unconfigured(record()),
    ],
    ids=["one class", "one image", "nothing readable", "nothing escalated", "two stages", "nothing configured"],
)
def test_there_is_a_page_of_every_record(given_record: Record) -> None:
    text = Reader(render({"run": Run.of(given_record)})).text
    assert not re.search(r"\bnan\b|\bNone\b(?! of the)", text)
    assert ("images could be read." in text) == (not given_record.readable.any())


STUDY = {
    "study": "candidates",
    "question": "How many <candidates> \\1?",
    "rows": [
        {
            "variant": "k=1 $x^{",
            "accuracy": 0.5,
            "interval": [0.4, 0.6],
            "calls": 1200,
            "dollars": 1.5,
            "seconds": None,
            "new_rate": 0.25,
        },
        {"variant": "k=5", "accuracy": 0.75, "interval": None, "calls": 3, "dollars": 0, "seconds": 2.25, "new_rate": None},
    ],
    "notes": ["A <note>."],
}


def test_studies_beside_a_record_are_tables_and_plots(tmp_path: Path) -> None:
    (tmp_path / "study-candidates.json").write_text(json.dumps(STUDY))
    studies = read_studies(tmp_path)
    assert studies[0].table == [
        ["", "k=1 $x^{", "k=5"],
        ["accuracy", "50.0%", "75.0%"],
        ["95% interval", "40.0 to 60.0%", ""],
        ["calls", "1,200", "3"],
        ["dollars", "$1.5000", "$0.0000"],
        ["seconds", "", "2.2"],
        ["new rate", "25.0%", ""],
    ]
    page = render({"run": Run.of(record(), studies)})
    assert "How many &lt;candidates&gt; \\1?" in page
    assert "A &lt;note&gt;." in page
    assert page.count('<svg class="plot"') == 6


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "Invalid JSON"),
        (json.dumps({**STUDY, "rows": []}), "Tuple should have at least 1"),
        (json.dumps({**STUDY, "rows": [{"variant": "k=1"}]}), "Field required"),
    ],
)
def test_a_study_that_cannot_be_read_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "study-candidates.json").write_text(text)
    with pytest.raises(DataError, match=f"study-candidates.json' is not the result of a study: {sentence}"):
        read_studies(tmp_path)


# What the page does.


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *(f"--{each}" for each in QUIET)])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The names of 80 images."""
    folder = tmp_path_factory.mktemp("images")
    for row in range(80):
        noise(row, (160, 120)).save(folder / f"{row}.png")
    return tuple(str(folder / f"{row}.png") for row in range(80))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, images: tuple[str, ...]) -> tuple[Path, Run]:
    """A page of one run, and that run."""
    run = Run.of(record(names=images))
    return write(tmp_path_factory.mktemp("report"), {"a <run>": run}), run


class Visit:
    """An open page, with its console messages and its requests."""

    def __init__(self, page: Page, file: Path) -> None:
        self.page, self.file = page, file
        self.said: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(file.as_uri())

    def shown(self) -> list[str]:
        """The file names of all cases of the filter."""
        while self.page.locator(".more button").is_visible():
            self.page.locator(".more button").click()
        return self.page.locator(".case > div > .facts:last-child").all_inner_texts()

    def press(self, name: str) -> None:
        self.page.locator(".filters button", has_text=name).click()


@pytest.fixture
def visit(browser: Browser, report: tuple[Path, Run]) -> Iterator[Visit]:
    """The page of one run. At the end, its console is empty, and only the file was requested."""
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    opened = Visit(page, report[0])
    yield opened
    assert opened.said == []
    assert {unquote(url) for url in opened.requests if not url.startswith("data:")} == {unquote(opened.file.as_uri())}
    page.close()


def names_of(run: Run, rows: NDArray[np.bool_]) -> list[str]:
    return [Path(run.record.names[row]).name for row in np.flatnonzero(rows)]


def test_the_headline_figures_are_those_of_the_metrics(visit: Visit, report: tuple[Path, Run]) -> None:
    found = report[1].evaluation
    tiles = dict(
        zip(visit.page.locator(".tile dt").all_inner_texts(), visit.page.locator(".tile strong").all_inner_texts(), strict=True)
    )
    assert tiles["Cascade, accuracy"] == f"{found.cascade_accuracy:.1%}"
    assert tiles["Scorer alone, accuracy"] == f"{found.scorer_accuracy:.1%}"
    assert tiles["Escalated to the judge"] == f"{found.deferral_rate:.1%}"
    assert tiles["Rescued, harmed"] == f"{found.rescued}, {found.harmed}"
    assert tiles["Per 1,000 images"] == f"${found.dollars_per_thousand:.2f}"
    assert found.cascade_accuracy_interval is not None
    low, high = found.cascade_accuracy_interval
    assert visit.page.locator(".tile").first.locator("span").inner_text() == f"{100 * low:.1f} to {high:.1%}"
    assert visit.page.locator("svg.plot").count() == 5


def test_filters_show_exactly_their_cases(visit: Visit, report: tuple[Path, Run]) -> None:
    run = report[1]
    final, read = run.final, run.record.readable
    right, scorer_right = final.predicted == final.truths, run.record.scored == run.record.truths
    expected = {
        "All": np.ones(80, dtype=bool),
        "Rescued": read & right & ~scorer_right,
        "Harmed": read & scorer_right & ~right,
        "Abstained": read & (final.predicted == NOBODY),
        "Wrong": read & ~right,
        "Escalated": final.judged.asked,
    }
    for name, rows in expected.items():
        assert rows.any()
        visit.press(name)
        assert visit.shown() == names_of(run, rows)
        assert visit.page.locator(".status").inner_text().split()[0] == str(rows.sum())
        pressed = visit.page.locator(".filters [aria-pressed=true]")
        assert pressed.all_inner_texts() == [f"{name}{rows.sum()}"]


def test_search_finds_labels_within_the_filter(visit: Visit, report: tuple[Path, Run]) -> None:
    run = report[1]
    visit.press("Wrong")
    visit.page.locator("input").fill("  BEE ")
    bee = run.record.labels.names.index("bee")
    rows = kinds_of(run.final)["wrong"] & ((run.record.truths == bee) | (run.final.predicted == bee))
    assert rows.any()
    assert visit.shown() == names_of(run, rows)
    visit.page.locator("input").fill("no such label")
    assert visit.shown() == []
    assert visit.page.locator(".status").inner_text() == "0 cases."


def test_the_keyboard_goes_from_case_to_case(visit: Visit) -> None:
    def focused() -> int:
        script = "() => [...document.querySelectorAll('.case')].indexOf(document.activeElement)"
        return int(visit.page.evaluate(script))

    steps = {"j": 0, "ArrowDown": 1, "ArrowRight": 2, "k": 1, "ArrowUp": 0, "ArrowLeft": 0}
    for key, expected in steps.items():
        visit.page.keyboard.press(key)
        assert focused() == expected
    for _ in range(30):
        visit.page.keyboard.press("j")
    assert focused() == 30  # beyond the first page
    visit.page.locator("input").focus()
    visit.page.keyboard.type("jk")
    assert visit.page.locator("input").input_value() == "jk"


def test_all_is_in_reach_of_the_tab_key_with_visible_focus(visit: Visit) -> None:
    reached = set()
    for _ in range(30):
        visit.page.keyboard.press("Tab")
        script = (
            "() => { const e = document.activeElement; return [e.tagName + ' ' + e.className, getComputedStyle(e).outlineStyle] }"
        )
        name, outline = visit.page.evaluate(script)
        reached.add(name)
        assert outline == "solid" or name == "BODY "
    assert {"A ", "SUMMARY ", "BUTTON ", "INPUT ", "ARTICLE case"} <= reached


def test_a_case_shows_what_was_said(visit: Visit, report: tuple[Path, Run]) -> None:
    run = report[1]
    row = int(np.flatnonzero(kinds_of(run.final)["rescued"])[0])
    visit.press("Rescued")
    card = visit.page.locator(".case").first
    labels = run.record.labels.names
    judged = run.record.judged
    assert card.locator(".candidates .name").all_text_contents() == [labels[column] for column in judged.candidates[row]]
    assert card.locator("h3").text_content() == labels[run.record.truths[row]]
    assert card.locator("blockquote").text_content() == judged.rationales[row]
    widths = card.locator(".candidates li").evaluate_all(
        "items => items.map(item => item.querySelector('i').offsetWidth / item.offsetWidth)"
    )
    assert widths == pytest.approx(run.record.scores.probabilities[row, judged.candidates[row]], abs=0.01)
    assert card.locator("img").evaluate("image => image.decode().then(() => image.naturalWidth)") == 128


def test_long_reasoning_is_folded_and_whole_on_request(visit: Visit) -> None:
    card = visit.page.locator(".case", has=visit.page.locator(".verdict button")).first
    quote, button = card.locator("blockquote"), card.locator(".verdict button")
    folded = quote.evaluate("element => element.clientHeight < element.scrollHeight")
    assert folded
    assert button.get_attribute("aria-expanded") == "false"
    button.click()
    assert quote.evaluate("element => element.clientHeight === element.scrollHeight")
    assert button.get_attribute("aria-expanded") == "true"


def test_hostile_names_and_reasoning_stay_text(visit: Visit) -> None:
    visit.shown()
    assert EVIL in (visit.page.locator("blockquote").first.text_content() or "")
    assert visit.page.locator(".case h3", has_text="</script>").count()
    assert visit.page.locator("img:not(.picture), .case b, svg b").count() == 0
    assert visit.page.title() == "a <run> – cascadevlm report"


def luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)`` (WCAG 2)."""
    channels = np.array([float(part) for part in re.findall(r"[\d.]+", colour)[:3]]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_is_legible_in_light_and_dark(visit: Visit, scheme: str) -> None:
    visit.page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    colour = "selector => getComputedStyle(document.querySelector(selector))"
    ground = luminance(visit.page.evaluate(f"({colour})('body').backgroundColor"))
    assert (ground < 0.1) == (scheme == "dark")
    coloured = ("body", ".lead strong", ".tile dt", "nav a", ".facts", ".candidates .tag", ".candidates .tag.truth")
    texts = {**dict.fromkeys(coloured, "color"), "svg.plot text": "fill"}
    for selector, property_name in texts.items():
        other = luminance(visit.page.evaluate(f"({colour})('{selector}').{property_name}"))
        lighter, darker = max(ground, other), min(ground, other)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, selector


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_nothing_is_wider_than_the_window(visit: Visit, width: int) -> None:
    visit.page.set_viewport_size({"width": width, "height": 844})
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = "boxes => boxes.map(box => box.getBoundingClientRect().right)"
    assert max(visit.page.locator(".case, svg.plot, .tile, button").evaluate_all(boxes)) <= width


def test_print_has_no_controls_and_whole_cases(visit: Visit) -> None:
    visit.page.emulate_media(media="print", color_scheme="dark")
    for hidden in (".filters", "input", ".more", "nav"):
        assert not visit.page.locator(hidden).first.is_visible()
    assert visit.page.locator(".case").count() == 24
    assert visit.page.locator(".case").first.evaluate("element => getComputedStyle(element).breakInside") == "avoid"
    assert luminance(visit.page.evaluate("getComputedStyle(document.body).backgroundColor")) == 1
    clamped = visit.page.locator("blockquote.clamped").first
    assert clamped.evaluate("element => element.clientHeight >= element.scrollHeight")


def test_nothing_moves_while_the_page_loads(visit: Visit) -> None:
    observe = """() => new Promise(done => {
        let sum = 0;
        new PerformanceObserver(list => list.getEntries().forEach(entry => { sum += entry.value; }))
            .observe({ type: 'layout-shift', buffered: true });
        setTimeout(() => done(sum), 200);
    })"""
    assert visit.page.evaluate(observe) < 0.01


def test_without_scripts_there_are_figures_and_plots(browser: Browser, report: tuple[Path, Run]) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report[0].as_uri())
    assert page.locator(".tile").count() == 8
    assert page.locator("svg.plot").count() == 5
    assert "no curves" not in page.locator(".plots").inner_text()
    assert page.locator("noscript p").is_visible()
    assert not page.locator(".browser").is_visible()
    context.close()


def test_several_runs_have_a_table_and_cases_of_their_own(browser: Browser, tmp_path: Path, images: tuple[str, ...]) -> None:
    runs = {"first": Run.of(record(names=images)), "second": Run.of(record(names=images, seed=5, abstains=False))}
    page = browser.new_page()
    visit = Visit(page, write(tmp_path, runs))
    assert page.locator(".all thead th").all_inner_texts() == ["first", "second"]
    cells = page.locator(".all tbody tr").nth(1).locator("td").all_inner_texts()
    assert [cell.partition(" ")[0] for cell in cells] == [f"{run.evaluation.cascade_accuracy:.1%}" for run in runs.values()]
    visit.press("Wrong")
    for name, run in runs.items():
        page.locator("select").select_option(label=name)
        assert visit.shown() == names_of(run, kinds_of(run.final)["wrong"])
    assert visit.said == []
    page.close()


def test_ten_thousand_images_are_a_page_under_20_mb(browser: Browser, tmp_path: Path) -> None:
    size = 10_000
    pictures = [noise(seed, (320, 240)).filter(ImageFilter.GaussianBlur(1)) for seed in range(20)]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.jpg")
    names = []
    for row in range(size):
        name = tmp_path / f"image {row}.jpg"
        name.hardlink_to(tmp_path / f"{row % len(pictures)}.jpg")
        names.append(str(name))
    given_record = record(size, names=tuple(names), labels=LabelSet.of(f"class {number}" for number in range(200)))
    file = write(tmp_path, {"large": Run.of(given_record)})
    assert file.stat().st_size < 20_000_000
    page = browser.new_page()
    visit = Visit(page, file)
    ready = page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
    print(f"{file.stat().st_size / 1e6:.1f} MB, ready after {ready:.0f} ms")
    assert f"This page contains 1,000 of {size:,}" in page.locator(".status").inner_text()
    visit.press("Harmed")
    assert visit.page.locator(".case").count() == 24
    assert visit.said == []
    page.close()


# Runs without labels.


def reply(asked: Question) -> str:
    """For every five images: another label twice, "none of these", an unreadable answer, and the scorer's best label."""
    return ["ANSWER: B", "ANSWER: none of these", "Hm?", f"{EVIL}\nANSWER: A", "ANSWER: B"][int(asked.image_digest, 16) % 5]


class Paid(FakeJudge):
    """Costs a quarter of a dollar."""

    def __init__(self) -> None:
        super().__init__(reply=reply, dollars=0.25)

    def quote(self, question: Question) -> Quote:
        return Quote(worst_case=250_000_000)


def run_bulk(folder: Path, inputs: Inputs, *, count: int = 99, on_failure: OnFailure = "abstain") -> list[dict[str, Any]]:
    """A run that asks about every image until its money for 30 questions is used up, and its lines."""
    stage = Stage(judge=Paid(), prompt=load_prompt("select"), policy=parse_policy("entropy > 0.4"), offer_none=True)
    labels = [EVIL, "bee", "cicada <b>bold</b>", "never given"]
    cascade = Cascade(FakeScorer(), [stage], labels=labels, ledger=Ledger(7.5), on_failure=on_failure, batch_size=4)
    stop = iter([False] * count + [True] * 99)
    bulk.run(cascade, inputs, folder, config={}, stopping=stop.__next__)
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_bytes().splitlines()]


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory, images: tuple[str, ...]) -> tuple[Path, list[dict[str, Any]]]:
    """A page of a bulk run with one unreadable image, and the lines of the run."""
    folder = tmp_path_factory.mktemp("unlabelled")
    (folder / "none.png").write_text("no image")
    (folder / "list.txt").write_text("\n".join([*images[:60], "none.png"]))
    lines = run_bulk(folder / "run", Inputs(folder / "list.txt"))
    (folder / "report.html").write_text(render_bulk({"a <run>": read_bulk_run(folder / "run")}), encoding="utf-8")
    return folder / "report.html", lines


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def certainty(line: Mapping[str, Any]) -> float:
    """The order of the images on the page."""
    if not line["candidates"]:
        return 2
    if line["label"] is None:
        return -1
    probabilities = {each["label"]: each["probability"] for each in line["candidates"]}
    return float(probabilities[line["label"]] if line["probability"] is None else line["probability"])


def test_a_run_without_labels_shows_what_there_is(unlabelled: tuple[Path, list[dict[str, Any]]]) -> None:
    file, lines = unlabelled
    run, page = read_bulk_run(file.parent / "run"), file.read_text(encoding="utf-8")
    labels = Counter(line["label"] for line in lines if line["label"])
    by_whom = Counter(line["decided_by"] for line in lines if line["label"])
    outcomes = Counter(line["verdict"]["outcome"] if line["verdict"] else "" for line in lines)
    assert set(outcomes) == {"answered", "none", "unparsed", "skipped", ""}
    assert {label: those.images for label, those in run.by_label} == labels
    assert [those.images for _, those in run.by_label] == sorted(labels.values(), reverse=True)
    assert run.decided == by_whom
    for label, those in run.by_label:
        mine = [line for line in lines if line["label"] == label]
        assert those.decided == Counter(line["decided_by"] for line in mine)
        assert those.probability == pytest.approx(sum(map(certainty, mine)))
    best = [
        max(line["candidates"], key=lambda each: each["probability"])["label"] if line["candidates"] else None for line in lines
    ]
    assert run.kinds == {
        "abstained": sum(line["label"] is None and bool(line["candidates"]) for line in lines),
        "unanswered": outcomes["unparsed"],
        "skipped": outcomes["skipped"],
        "overruled": sum(line["label"] not in (None, first) for line, first in zip(lines, best, strict=True)),
        "escalated": sum(line["verdict"] is not None for line in lines),
        "kept": outcomes[""] - 1,
        "unreadable": 1,
    }
    assert all(run.kinds.values())
    assert run.sure == sum(line["label"] is not None and certainty(line) >= SURE for line in lines)
    assert (run.finished, run.tally.spent_dollars) == (True, 7.5)
    assert run.never_given == [label for label in [EVIL, "bee", "cicada <b>bold</b>", "never given"] if label not in labels]
    assert "$7.50" in page
    assert "interrupted" not in page
    assert "<b>bold" not in page


def test_the_doubtful_come_first_with_their_pictures(unlabelled: tuple[Path, list[dict[str, Any]]]) -> None:
    file, lines = unlabelled
    data = data_of(file.read_text(encoding="utf-8"))
    (run,) = data["runs"]
    assert [case["name"] for case in run["cases"]] == [Path(line["path"]).name for line in sorted(lines, key=certainty)]
    assert [bool(data["thumbnails"][case["thumbnail"]]) for case in run["cases"]] == [True] * 60 + [False]
    for case, line in zip(run["cases"], sorted(lines, key=certainty), strict=True):
        assert (case["reasons"], case["error"]) == (line["reasons"], line["error"])
        assert [run["labels"][number] for number, _ in case["candidates"]] == [each["label"] for each in line["candidates"]]
        assert [verdict["outcome"] for verdict in case["verdicts"]] == ([line["verdict"]["outcome"]] if line["verdict"] else [])


def test_a_page_without_labels_works_in_a_browser(browser: Browser, unlabelled: tuple[Path, list[dict[str, Any]]]) -> None:
    file, lines = unlabelled
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    opened = Visit(page, file)
    assert opened.shown() == [Path(line["path"]).name for line in sorted(lines, key=certainty)]
    run = read_bulk_run(file.parent / "run")
    for kind, count in run.kinds.items():
        opened.press(kind.capitalize())
        assert len(opened.shown()) == count
    opened.press("Overruled")
    first = page.locator(".case").first
    assert first.locator(".badge").inner_text() == "Overruled"
    assert "Escalated: entropy" in first.inner_text()
    assert "truth" not in first.inner_text()
    assert page.locator("svg.plot").count() == 1
    assert page.title() == "a <run> – cascadevlm report"
    assert opened.said == []
    page.close()


def test_images_of_a_table_are_shown_and_others_in_their_place_are_not(tmp_path: Path, images: tuple[str, ...]) -> None:
    stored = {"image": [{"bytes": Path(name).read_bytes(), "path": Path(name).name} for name in images[:12]]}
    pyarrow.parquet.write_table(pyarrow.table(stored), tmp_path / "table.parquet", row_group_size=3)
    run_bulk(tmp_path / "run", Inputs(tmp_path / "table.parquet"))
    page = data_of(render_bulk({"run": read_bulk_run(tmp_path / "run")}))
    shown = {case["name"]: page["thumbnails"][case["thumbnail"]] for case in page["runs"][0]["cases"]}
    assert shown == {Path(name).name: thumbnail(load_image(Path(name))) for name in images[:12]}
    stored["image"][0], stored["image"][1] = stored["image"][1], stored["image"][0]
    pyarrow.parquet.write_table(pyarrow.table(stored), tmp_path / "table.parquet", row_group_size=3)
    text = render_bulk({"run": read_bulk_run(tmp_path / "run")})
    assert data_of(text)["thumbnails"].count("") == 2
    assert "2 of these images were not found" in text


def test_a_run_that_is_not_finished_or_has_nothing_says_so(tmp_path: Path, images: tuple[str, ...]) -> None:
    (tmp_path / "list.txt").write_text("\n".join(images[:60]))
    lines = run_bulk(tmp_path / "run", Inputs(tmp_path / "list.txt"), count=3)
    page = render_bulk({"run": read_bulk_run(tmp_path / "run")})
    assert f"The run is not finished. So far it contains {len(lines)} images" in page
    run_bulk(tmp_path / "nothing", Inputs(tmp_path / "list.txt"), count=0)
    assert "So far it contains 0 images" in render_bulk({"nothing": read_bulk_run(tmp_path / "nothing")})


def test_of_many_images_the_page_holds_the_most_doubtful(
    tmp_path: Path, images: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cascadevlm.evaluation.report.unlabelled.MOST_CASES", 5)
    (tmp_path / "list.txt").write_text("\n".join(images[:20]))
    lines = run_bulk(tmp_path / "run", Inputs(tmp_path / "list.txt"), on_failure="scorer")
    page = data_of(render_bulk({"run": read_bulk_run(tmp_path / "run")}))
    expected = [Path(line["path"]).name for line in sorted(lines, key=certainty)[:5]]
    assert [case["name"] for case in page["runs"][0]["cases"]] == expected
    assert (page["runs"][0]["totals"]["all"], page["chosen"]) == (20, "with the lowest probability")


@pytest.mark.parametrize("labelled", [True, False])
def test_ids_are_shown_and_found(browser: Browser, tmp_path: Path, images: tuple[str, ...], labelled: bool) -> None:
    (tmp_path / "table.csv").write_text(
        "image,sku,label\n" + "".join(f"{name},SKU-{n},bee\n" for n, name in enumerate(images[:9]))
    )
    columns, file = ColumnNames(id="sku"), tmp_path / "report.html"
    if labelled:
        cascade = Cascade(FakeScorer(), labels=["ant", "bee"])
        cascade.evaluate(read_data(tmp_path / "table.csv", cascade.labels, columns), tmp_path / "run")
        write(tmp_path, {"run": Run.of(read_record(tmp_path / "run"))})
    else:
        run_bulk(tmp_path / "run", Inputs(tmp_path / "table.csv", columns))
        file.write_text(render_bulk({"run": read_bulk_run(tmp_path / "run")}))
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    opened = Visit(page, file)
    assert len(opened.shown()) == 9
    page.get_by_placeholder("Search labels and ids").fill("sku-7")
    assert opened.shown() == [Path(images[7]).name]
    assert "id: SKU-7" in page.locator(".case").inner_text()
    assert opened.said == []
    page.close()

import asyncio
import contextlib
import gc
import hashlib
import json
import pickle
import sqlite3
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import diskcache
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadevlm.base.errors import BackendError, TransientError
from cascadevlm.base.labels import Label, LabelSet
from cascadevlm.base.types import Exemplar, Question, Usage, Verdict
from cascadevlm.config.loading import load_prompt
from cascadevlm.judges.base import Judge
from cascadevlm.judges.cache import Cached, DiskStore, MemoryStore, Payload, SingleFlight, key_of, question_payload
from cascadevlm.testing import FakeJudge, noise, picture, question

JUDGE = FakeJudge()


def key(asked: Question, judge: Judge = JUDGE) -> str:
    return key_of(question_payload(judge, asked))


def variants() -> list[Question]:
    base = question()
    one_pixel = picture()
    one_pixel.putpixel((5, 5), (0, 0, 0))
    aliased = tuple(
        replace(c, label=Label(name=c.label.name, aliases=("bird",) * (i == 0))) for i, c in enumerate(base.candidates)
    )
    return [
        base,
        replace(base, image=one_pixel, encoded={}),
        replace(base, candidates=base.candidates[::-1]),
        replace(base, candidates=base.candidates[:2]),
        replace(base, candidates=aliased),
        replace(base, prompt=load_prompt("select_cot")),
        replace(base, prompt=replace(base.prompt, max_tokens=9)),
        replace(base, offer_none=True),
        replace(base, rejected="a sparrow"),
        replace(base, sample=1),
        replace(base, prompt=load_prompt("select_fewshot"), exemplars=(Exemplar(image=noise(1), label=base.labels[0]),)),
        replace(base, prompt=load_prompt("select_fewshot"), exemplars=(Exemplar(image=noise(2), label=base.labels[0]),)),
    ]


def of_labels(*others: str, offer_none: bool = True) -> Question:
    asked = question()
    return replace(asked, offer_none=offer_none, label_set=LabelSet.of([*asked.labels, *others]))


def test_other_labels_change_the_answer_where_naming_one_is_none_of_these() -> None:
    assert key(of_labels("wren", "crow")) == key(of_labels("crow", "wren"))
    assert len({key(of_labels(*others)) for others in ([], ["wren"], ["wren", "crow"])}) == 3
    assert key(of_labels("wren", offer_none=False)) == key(question())


def test_whatever_changes_the_answer_changes_the_key() -> None:
    keys = [key(asked) for asked in variants()] + [key(question(), FakeJudge("other"))]
    assert len(set(keys)) == len(keys)


def test_what_does_not_change_the_answer_does_not_change_the_key() -> None:
    base = question()
    surer = replace(base, candidates=tuple(replace(c, probability=0.9, rank=c.rank + 1) for c in base.candidates))
    renamed = replace(base, prompt=replace(base.prompt, name="mine"))
    assert key(base) == key(question()) == key(surer) == key(renamed)


def test_keys_are_the_same_in_another_process() -> None:
    code = "from tests.judges.test_cache import *; print(*map(key, variants()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.split() == [key(asked) for asked in variants()]


@given(
    st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=5, unique_by=lambda name: " ".join(name.split())),
    st.data(),
)
def test_any_other_order_is_another_key(names: list[str], data: st.DataObject) -> None:
    order = data.draw(st.permutations(names))
    assert (key(question(names)) == key(question(order))) == (list(order) == names)


async def test_an_answer_is_bought_once_and_says_what_it_saves(tmp_path: Path) -> None:
    judge = FakeJudge(reply="Red.\nANSWER: A", dollars=0.02)
    first = await Cached(judge, DiskStore(tmp_path)).judge(question())
    again = await Cached(judge, DiskStore(tmp_path)).judge(question())
    assert len(judge.questions) == 1
    assert first.usage.dollars == 0.02
    assert again.usage == Usage(cached=True, saved_dollars=0.02)
    assert replace(again, usage=first.usage) == first


@pytest.mark.parametrize("reply", ["what?\nno", "", TransientError("down")])
async def test_only_answers_are_kept(reply: str | Exception) -> None:
    store = MemoryStore()
    judge = FakeJudge(reply=[reply, "ANSWER: B"])
    with contextlib.suppress(TransientError):
        await Cached(judge, store).judge(question())
    assert not store.verdicts
    assert (await Cached(judge, store).judge(question())).label == "blue finch"
    for refusing in (DiskStore(Path("unused")), store):
        with pytest.raises(ValueError, match="not kept"):
            refusing.put("key", {}, Verdict(outcome="refused"))


async def test_none_of_these_is_an_answer(tmp_path: Path) -> None:
    asked = replace(question(), offer_none=True)
    judge = Cached(FakeJudge(reply="ANSWER: none of these"), DiskStore(tmp_path))
    assert [(await judge.judge(asked)).outcome for _ in range(2)] == ["none", "none"]
    assert len(judge.wrapped.questions) == 1  # type: ignore[attr-defined]


async def test_identical_concurrent_questions_are_asked_once() -> None:
    judge = FakeJudge(seconds=0.01, dollars=0.5)
    asked_once = SingleFlight(judge)
    verdicts = await asyncio.gather(
        *(asked_once.judge(question()) for _ in range(10)), asked_once.judge(question(["x y", "z z"]))
    )
    assert len(judge.questions) == 2
    assert sum(verdict.usage.dollars for verdict in verdicts) == 1.0
    await asked_once.judge(question())
    assert len(judge.questions) == 3


async def test_who_stops_waiting_does_not_lose_the_answer() -> None:
    store, judge = MemoryStore(), FakeJudge(seconds=0.02)
    waiting = asyncio.create_task(Cached(judge, store).judge(question()))
    await asyncio.sleep(0.005)
    waiting.cancel()
    await asyncio.sleep(0.05)
    assert len(store.verdicts) == 1


@pytest.mark.parametrize("gives_up", [0, 1])
async def test_who_shares_an_answer_and_stops_waiting_does_not_end_it_for_the_other(gives_up: int) -> None:
    judge = FakeJudge(seconds=0.02)
    asked_once = SingleFlight(judge)
    tasks = [asyncio.create_task(asked_once.judge(question())) for _ in range(2)]
    await asyncio.sleep(0.005)
    tasks[gives_up].cancel()
    assert (await asyncio.wait_for(tasks[1 - gives_up], 1)).label == "red finch"
    assert tasks[gives_up].cancelled()
    assert len(judge.questions) == 1


async def test_what_nobody_waits_for_any_more_ends_with_the_run() -> None:
    store, judge = MemoryStore(), FakeJudge(seconds=0.05)
    cached = Cached(judge, store)
    waiting = asyncio.create_task(cached.judge(question()))
    await asyncio.sleep(0.005)
    waiting.cancel()
    await cached.aclose()
    assert (judge._at_once, cached._in_flight) == (0, {})
    await asyncio.sleep(0.07)
    assert not store.verdicts


async def test_a_kept_answer_that_is_shared_says_what_it_saved_to_all() -> None:
    store = MemoryStore()
    await Cached(FakeJudge(dollars=0.02), store).judge(question())
    cached = Cached(FakeJudge(), store)
    verdicts = await asyncio.gather(*(cached.judge(question()) for _ in range(3)))
    assert [verdict.usage for verdict in verdicts] == [Usage(cached=True, saved_dollars=0.02)] * 3


async def test_nothing_but_json_is_stored_and_nothing_evicted(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    await Cached(FakeJudge(), store).judge(question())
    with sqlite3.connect(tmp_path / "cache.db") as database:
        (value,) = database.execute("select value from Cache").fetchone()
        (policy,) = database.execute("select value from Settings where key = 'eviction_policy'").fetchone()
    assert json.loads(zlib.decompress(value))["verdict"]["label"] == "red finch"
    assert policy == "none"


async def test_damage_is_found_and_asked_again(tmp_path: Path) -> None:
    store, judge = DiskStore(tmp_path), FakeJudge()
    for asked in variants()[:4]:
        await Cached(judge, store).judge(asked)
    assert list(store.damaged()) == []
    with diskcache.Cache(str(tmp_path), disk=diskcache.JSONDisk) as raw:
        swapped, sound, wrong = sorted(set(raw.iterkeys()) - {key(variants()[0])})
        raw[swapped] = raw[sound]
        raw[wrong] = {"payload": raw[wrong]["payload"], "verdict": {"outcome": "answered"}}
    with sqlite3.connect(tmp_path / "cache.db") as database:
        database.execute("update Cache set value = x'00' where rowid = 1")  # the first question's
    assert len(list(store.damaged())) == 3
    with pytest.warns(RuntimeWarning, match="is damaged") as told:
        await asyncio.gather(*(Cached(judge, store).judge(asked) for asked in variants()[:4]))
    assert len(told) == 1
    assert len(judge.questions) == 4 + 3
    assert list(store.damaged()) == []
    assert (store.clear(), len(store)) == (4, 0)


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.trace,)


def change(folder: Path, sql: str, *values: object) -> None:
    with contextlib.closing(sqlite3.connect(folder / "cache.db")) as database, database:
        database.execute(sql, values)


@pytest.mark.filterwarnings("ignore:The cache:RuntimeWarning")
@pytest.mark.parametrize("hidden", ["value", "file", "key", "text file", "binary file"])
async def test_nothing_that_is_kept_is_unpickled_or_names_a_file(tmp_path: Path, hidden: str) -> None:
    folder, trace, mine = tmp_path / "cache", tmp_path / "trace", tmp_path / "mine"
    harm = pickle.dumps(Harmful(trace))
    mine.write_bytes(harm if hidden == "file" else zlib.compress(json.dumps("secret").encode()))
    first, judge = DiskStore(folder), FakeJudge()
    await Cached(judge, first).judge(question())
    match hidden:
        case "value":
            change(folder, "update Cache set mode = 4, value = ?", harm)
        case "key":
            change(folder, "update Cache set raw = 0, key = ?", harm)
        case _:
            mode = {"file": 4, "text file": 3, "binary file": 2}[hidden]
            change(folder, "update Cache set mode = ?, value = null, filename = ?", mode, str(mine))
    store = DiskStore(folder)
    assert list(store.damaged()) == ["row 1" if hidden == "key" else key(question())]
    assert store.get(key(question())) is None
    assert (await Cached(judge, store).judge(question())).label == "red finch"
    assert len(judge.questions) == 2
    assert store.get(key(question())) is not None
    store.clear()
    assert not trace.exists()
    assert mine.exists()


def test_a_large_entry_is_a_row_too(tmp_path: Path) -> None:
    payload: Payload = {"messages": [str(hashlib.sha256(str(number).encode()).hexdigest()) for number in range(3000)]}
    DiskStore(tmp_path).put(key_of(payload), payload, Verdict(outcome="none"))
    assert DiskStore(tmp_path).get(key_of(payload)) == Verdict(outcome="none")
    assert not [path for path in tmp_path.rglob("*") if path.is_dir()]
    assert (tmp_path / "cache.db").stat().st_size + (tmp_path / "cache.db-wal").stat().st_size > 100_000


def test_a_verdict_that_is_no_answer_is_damage(tmp_path: Path) -> None:
    entry = {"payload": {}, "verdict": Verdict(outcome="refused", error="no").to_dict()}
    with diskcache.Cache(str(tmp_path), disk=diskcache.JSONDisk) as raw:
        raw[key_of({})] = entry
    with pytest.warns(RuntimeWarning, match="is damaged"):
        assert DiskStore(tmp_path).get(key_of({})) is None
    assert list(DiskStore(tmp_path).damaged()) == [key_of({})]


@pytest.mark.filterwarnings("ignore:An answer could not be stored:RuntimeWarning")
@pytest.mark.parametrize("pages", [range(5, 6), range(6, 7), range(8, 100)], ids=["table", "index", "leaves"])
async def test_damaged_pages_are_misses_told_once(tmp_path: Path, pages: range) -> None:
    judge = FakeJudge()
    asked = [replace(question(), sample=sample) for sample in range(60)]
    for each in asked:
        await Cached(judge, DiskStore(tmp_path)).judge(each)
    with contextlib.closing(sqlite3.connect(tmp_path / "cache.db")) as database:
        database.execute("pragma wal_checkpoint(truncate)")
        (size,) = database.execute("pragma page_size").fetchone()
    content = bytearray((tmp_path / "cache.db").read_bytes())
    for page in range(pages.start, min(pages.stop, len(content) // size + 1)):
        content[(page - 1) * size] = 0xFF  # the kind of the page
    (tmp_path / "cache.db").write_bytes(content)
    assert list(DiskStore(tmp_path).damaged())
    judge, store = FakeJudge(), DiskStore(tmp_path)
    with pytest.warns(RuntimeWarning, match="is damaged") as told:
        assert {(await Cached(judge, store).judge(each)).label for each in asked} == {"red finch"}
    assert sum("is damaged" in str(each.message) for each in told) == 1
    assert judge.questions


def test_settings_of_a_strangers_cache_are_one_sentence(tmp_path: Path) -> None:
    for number, name in enumerate(("disk_evil", "directory", "disk_directory")):
        folder = tmp_path / str(number)
        assert len(DiskStore(folder)) == 0
        change(folder, "insert into Settings values (?, 'os.system')", name)
        with pytest.raises(BackendError, match="cannot be used"):
            DiskStore(folder).get("key")


@pytest.mark.filterwarnings("ignore:The cache:RuntimeWarning")
async def test_an_answer_that_cannot_be_kept_counts(tmp_path: Path) -> None:
    assert len(DiskStore(tmp_path)) == 0
    change(tmp_path, "insert or replace into Settings values ('disk_compress_level', 99)")
    with pytest.warns(RuntimeWarning, match="could not be stored"):
        assert (await Cached(FakeJudge(), DiskStore(tmp_path)).judge(question())).label == "red finch"
    assert not (tmp_path / "asking.lock").stat().st_mode & 0o111


@pytest.mark.parametrize("one_store", [True, False])
async def test_event_loops_that_share_a_folder_buy_an_answer_once(one_store: bool, tmp_path: Path) -> None:
    store, judge = DiskStore(tmp_path), FakeJudge(seconds=0.1, dollars=0.02)

    def ask() -> Verdict:
        return asyncio.run(Cached(judge, store if one_store else DiskStore(tmp_path)).judge(question()))

    verdicts = await asyncio.gather(*(asyncio.to_thread(ask) for _ in range(3)))
    assert len(judge.questions) == 1
    assert sorted(verdict.usage.dollars for verdict in verdicts) == [0, 0, 0.02]
    assert all(verdict.usage.dollars + verdict.usage.saved_dollars == 0.02 for verdict in verdicts)


async def test_a_question_that_failed_is_free_to_be_asked_by_others(tmp_path: Path) -> None:
    store, judge = DiskStore(tmp_path), FakeJudge(reply=[TransientError("down"), "ANSWER: B"])
    with pytest.raises(TransientError):
        await Cached(judge, store).judge(question())
    assert (await asyncio.wait_for(Cached(judge, store).judge(question()), 5)).label == "blue finch"


ASKING = """
import asyncio, sys
from pathlib import Path
from cascadevlm.judges.cache import Cached, DiskStore
from cascadevlm.testing import FakeJudge, question

store, judge = DiskStore(Path(sys.argv[1])), FakeJudge(seconds=0.5, dollars=0.02)
print("ready", flush=True)
input()
print(asyncio.run(Cached(judge, store).judge(question())).usage.dollars)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no locks on parts of files")
def test_two_processes_that_share_a_cache_buy_an_answer_once(tmp_path: Path) -> None:
    asking = [
        subprocess.Popen([sys.executable, "-c", ASKING, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in asking:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in asking:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert sorted(float(process.communicate(timeout=20)[0]) for process in asking) == [0, 0.02]


@pytest.mark.skipif(sys.platform == "win32", reason="no locks on parts of files")
async def test_a_store_that_is_gone_gives_back_no_turn_of_another(tmp_path: Path) -> None:
    """A process that closes a file loses all its locks on it."""
    store = DiskStore(tmp_path)
    store.clear()
    async with store.asking("a" * 64):
        async with DiskStore(tmp_path).asking("b" * 64):
            pass
        gc.collect()
        code = f"from cascadevlm.judges.cache import Path, turns_in; print(turns_in(Path({str(tmp_path)!r})).take('a' * 64))"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout == "False\n"

"""Copies of cascades, stages, scorers and judges, before and after use: their content, the shared objects, and the objects that
are not copied.
"""

import asyncio
import pickle
import threading
from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
from openai import AsyncOpenAI
from sklearn.base import clone

from cascadevlm import Cascade, Stage, TopK, load_judge, load_prompt, load_scorer
from cascadevlm.base.errors import BackendError, BudgetExhausted
from cascadevlm.base.types import Prediction, Question, Verdict
from cascadevlm.decision.judge_model import JudgeModel
from cascadevlm.judges.base import Judge, LocalJudge
from cascadevlm.judges.budget import DurableLedger, Ledger
from cascadevlm.judges.cache import DiskStore, MemoryStore
from cascadevlm.policies.base import as_policy
from cascadevlm.scorers.base import EmbeddingScorer, Scorer
from cascadevlm.scorers.kept import CachedEmbeddings
from cascadevlm.testing import FakeJudge, FakeScorer, noise, question
from cascadevlm_backends.openai import OpenAIJudge
from tests.backends.hosted_judges import EVERY, Make, messages
from tests.calibrations import some_calibration
from tests.scorers.test_embeddings import TinyTowers
from tests.server import JudgeServer

Copy = Callable[[object], object]
LABELS = ["red finch", "blue finch", "grey owl"]
IMAGES = [noise(seed) for seed in range(3)]
COPIES: dict[str, Copy] = {"pickle": lambda given: pickle.loads(pickle.dumps(given)), "deepcopy": deepcopy, "clone": clone}
BY_ALL = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)


class Bystander(LocalJudge):
    """Chooses the second candidate; its model cannot be copied."""

    spec = "local:bystander"

    def judge_batch(self, questions: list[Question]) -> list[Verdict]:  # type: ignore[override]
        self.model = threading.Lock()
        del self.model
        return [Verdict(outcome="answered", label=asked.labels[1].name, judge=self.spec) for asked in questions]


def told(predictions: list[Prediction]) -> list[tuple[object, ...]]:
    return [(each.label, each.probability, each.candidates, each.decided_by) for each in predictions]


def cascade(judge: Judge, scorer: Scorer | None = None, **options: object) -> Cascade:
    stage = Stage(judge=judge, prompt=load_prompt("select"), policy="entropy > 0.01", candidates=TopK(k=3))
    return Cascade(scorer or FakeScorer(), [stage], labels=LABELS, **options)  # type: ignore[arg-type]


@BY_ALL
@pytest.mark.parametrize("used", [False, True])
@EVERY
def test_hosted_judges_are_copied_without_their_clients(make: Make, copied: Copy, used: bool) -> None:
    with JudgeServer() as server:
        original = cascade(make(server, timeout=7))
        if used:
            original.classify(IMAGES)
        again = copied(original)
        assert isinstance(again, Cascade)
        (judge,) = (stage.judge for stage in again.stages)
        assert dict(judge.identity()) == dict(original.stages[0].judge.identity())
        assert (judge.spec, judge.concurrency) == (original.stages[0].judge.spec, original.stages[0].judge.concurrency)
        asked = len(server.requests)
        assert told(again.classify(IMAGES)) == told(original.classify(IMAGES))
        assert len(server.requests) == asked + 2 * len(IMAGES)


@EVERY
async def test_hosted_judges_are_copied_while_they_are_asked(make: Make) -> None:
    """Two questions at the same time. If the first finds out what an endpoint can do, the second waits for it."""
    with JudgeServer() as server:
        judge = make(server) if make is messages else make(server, structured=None)
        await judge.prepare()
        asking = [asyncio.create_task(judge.judge(question())) for _ in range(2)]
        await asyncio.sleep(0.01)
        again = pickle.loads(pickle.dumps(judge))
        verdicts = await asyncio.gather(*asking)
        await judge.aclose()
        await again.prepare()
        assert (await again.judge(question())).label == verdicts[0].label
        await again.aclose()


def test_a_client_of_the_users_own_is_told_of() -> None:
    judge = OpenAIJudge("gpt-4o", client=AsyncOpenAI(api_key="x", base_url="http://localhost:1/v1"))
    with pytest.raises(BackendError, match="has a client that cannot be copied"):
        pickle.dumps(judge)


@BY_ALL
@pytest.mark.parametrize("used", [False, True])
def test_bundled_models_are_copied_as_what_they_were_made_of(copied: Copy, used: bool) -> None:
    scorer, judge = load_scorer("open_clip:aviary", device="cpu"), load_judge("hf_chat:aviary", device="cpu", mode="likelihood")
    original = cascade(judge, scorer)
    if used:
        original.classify(IMAGES)
    again = copied(original)
    assert isinstance(again, Cascade)
    for part in (again.scorer, again.stages[0].judge):
        assert not {"_loaded", "_thread"} & vars(part).keys()
    assert again.scorer.score(IMAGES, again.labels).fingerprint == scorer.score(IMAGES, again.labels).fingerprint
    assert len(pickle.dumps(original)) < 100_000


@BY_ALL
@pytest.mark.parametrize("used", [False, True])
def test_a_local_judge_is_copied_between_and_within_runs(copied: Copy, used: bool) -> None:
    judge = Bystander(batch_size=2)
    if used:
        cascade(judge).classify(IMAGES)
    again = copied(judge)
    assert isinstance(again, Bystander)
    assert (again.batch_size, again.concurrency) == (2, 4)
    assert told(cascade(again).classify(IMAGES)) == told(cascade(judge).classify(IMAGES))

    async def within() -> object:
        asking = asyncio.create_task(judge.judge(question()))
        await asyncio.sleep(0)
        inside = copied(judge)
        await asking
        return inside

    inside = asyncio.run(within())
    assert isinstance(inside, Bystander)
    assert told(cascade(inside).classify(IMAGES)) == told(cascade(judge).classify(IMAGES))


class Counting(Bystander):
    """A subclass with more attributes that belong to runs than its base class."""

    live = (("calls", list),)


@BY_ALL
def test_what_is_live_in_a_base_class_stays_behind_too(copied: Copy) -> None:
    judge = Counting(batch_size=2)
    vars(judge)["calls"] = [1]
    judge._workers.add(object())  # type: ignore[arg-type]
    again = copied(judge)
    assert isinstance(again, Counting)
    assert (vars(again)["calls"], again._workers, again.batch_size) == ([], set(), 2)


@BY_ALL
def test_calibrated_cascades_with_a_store_and_kept_embeddings_are_copied(copied: Copy, tmp_path: Path) -> None:
    model: EmbeddingScorer = TinyTowers()
    calibration = some_calibration(LABELS, JudgeModel.prior(3))
    for store in (DiskStore(tmp_path / "cache"), MemoryStore()):
        labels = Cascade(model, labels=LABELS).labels
        known = replace(calibration, fingerprint=model.fingerprint(labels))
        scorer = CachedEmbeddings(model, tmp_path / "kept")
        original = cascade(FakeJudge(reply="ANSWER: B"), scorer, store=store, calibration=known)
        before = original.classify(IMAGES)
        again = copied(original)
        assert isinstance(again, Cascade)
        after = again.classify(IMAGES)
        assert told(after) == told(before)
        assert all(each.cost.cached for each in after)


class Growing:
    """While this verdict is copied, another verdict is stored. Another thread may do that."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        self.store.verdicts["another question"] = Verdict(outcome="none")
        return str, ("the verdict",)


@BY_ALL
def test_a_store_is_copied_while_it_grows(copied: Copy) -> None:
    store = MemoryStore()
    store.verdicts["question"] = Growing(store)  # type: ignore[assignment]
    again = copied(store)
    assert isinstance(again, MemoryStore)
    assert dict[str, object](again.verdicts) == {"question": "the verdict"}
    assert len(store.verdicts) == 2


def test_copies_here_spend_the_same_money_and_pickled_ones_what_was_left() -> None:
    original = cascade(FakeJudge(dollars=0.25), ledger=Ledger(1))
    ledger = original.ledger
    ledger.settle(0, 250_000_000)
    here = [copy(original), deepcopy(original), clone(original), original.altered()]
    assert all(each.ledger is ledger for each in here)
    away = pickle.loads(pickle.dumps(original)).ledger
    assert (away.cap_dollars, away.spent_dollars) == (1, 0.25)
    ledger.reserve_now(700_000_000)
    assert pickle.loads(pickle.dumps(ledger)).reserved_dollars == 0
    with pytest.raises(BudgetExhausted, match=r"has \$0\.7500 left"):
        away.reserve_now(800_000_000)


def test_a_ledger_on_disk_is_not_pickled(tmp_path: Path) -> None:
    ledger = DurableLedger(1, tmp_path / "ledger.jsonl")
    with pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(ledger)
    ledger.close()


def test_a_shallow_copy_asks_the_same_judges() -> None:
    original = cascade(FakeJudge())
    assert copy(original)._judges is original.altered(calibration=None)._judges is original._judges
    assert deepcopy(original)._judges is not original._judges


@BY_ALL
def test_stages_are_copied_whatever_they_hold(copied: Copy) -> None:
    stage = Stage(
        judge=FakeJudge(reply="ANSWER: B"),
        prompt=load_prompt("select"),
        policy="gain > 0.1 & calls <= 3",
        model=JudgeModel.prior(3),
    )
    again = copied(stage)
    assert isinstance(again, Stage)
    assert again.judge is not stage.judge
    assert (again.policy, again.prompt, again.candidates, again.votes) == (stage.policy, stage.prompt, stage.candidates, 1)
    assert str(as_policy(again.policy)) == "gain > 0.1 & calls <= 3"

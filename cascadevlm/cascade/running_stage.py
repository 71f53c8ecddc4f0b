"""A stage during one run: whom its policy escalates, what its judge says of them, and where its spending stands."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from cascadevlm.base.errors import BudgetExhausted, FatalError, ImageError, JudgeError
from cascadevlm.base.images import is_large
from cascadevlm.base.labels import Label, LabelSet
from cascadevlm.base.types import NANODOLLARS, Candidate, Scores, Verdict
from cascadevlm.cascade.item import Item, believed_candidates, rank
from cascadevlm.cascade.stage import Stage
from cascadevlm.judges.base import Judge
from cascadevlm.policies.base import Selection, Spending, as_budgeted
from cascadevlm.policies.rules import GainAbove


class RunningStage:
    """A stage during one run.

    Args:
        number: its position.
        judge: its judge, made dependable and ready.
        labels: of the cascade.
        readers: read images beside the event loop.
        spending: where it stands.
    """

    def __init__(self, number: int, stage: Stage, judge: Judge, labels: LabelSet, readers: Executor, spending: Spending) -> None:
        self.number = number
        self.stage = stage
        self.policy = as_budgeted(stage.policy)
        self.judge = stage.by_votes(judge)
        self.labels = labels
        self.readers = readers
        self.spending = spending
        self._places = asyncio.Semaphore(self.judge.concurrency)
        self._fatal: FatalError | None = None

    async def prices(self, items: Sequence[Item]) -> tuple[float, ...]:
        """Dollars that asking about each image is expected to cost; none, if the policy does not ask for prices."""
        if not self.policy.by_price:
            return ()

        def told() -> tuple[float, ...]:
            return tuple(map(self._price, items, believed_candidates(self.stage.candidates, items)))

        return await asyncio.get_running_loop().run_in_executor(self.readers, told)  # it opens files

    def _price(self, item: Item, candidates: tuple[Candidate, ...]) -> float:
        """Nothing, if the image has gone since it was scored."""
        try:
            question = Stage.question(self.stage, item.prepared.unread, candidates)  # not one to be kept as if it had been put
        except ImageError:
            return 0.0
        return self.stage.by_votes(self.stage.judge).usual_case(question) / NANODOLLARS

    def surplus(self, scores: Scores, prices: tuple[float, ...]) -> NDArray[np.floating]:
        """(N,) how far the expected gain is above what the policy wants; for stages between which images are routed."""
        assert isinstance(self.policy.policy, GainAbove)
        return self.policy.policy.surplus(Spending(prices=prices, gain=self.stage.gain(scores)))

    def decide(
        self, items: Sequence[Item], scores: Scores, prices: tuple[float, ...], *, left: Selection, remaining: float | None
    ) -> list[Item]:
        """Those of the next images that the policy escalates; all get its reasons, those of the first stage its candidates too.

        Args:
            scores: N x C, of the images as they stand.
            prices: of asking about each.
            left: N, those that are left to a later stage.
            remaining: how many images are expected after these; None if the number is not known.
        """
        spending = replace(self.spending, remaining=remaining, prices=prices, gain=self.stage.gain(scores))
        selected = self.policy.select(scores, spending) & ~left
        for item, reason, elsewhere in zip(items, self.policy.reasons(scores, spending), left, strict=True):
            item.reasons.append(f"{reason}; a later judge is worth more" if elsewhere else reason)
        shown = [item for item, chosen in zip(items, selected, strict=True) if chosen or not item.candidates]
        rank(self.stage.candidates, shown)
        self.spending = replace(
            self.spending,
            images=spending.images + len(items),
            calls=spending.calls + int(selected.sum()),
            dollars=spending.dollars + sum(compress(prices, selected)),
            dollars_for_all=spending.dollars_for_all + sum(prices),
            recent=self.policy.remembered(scores, spending),
        )
        return list(compress(items, selected))

    async def ask(self, item: Item) -> None:
        """Ask the judge about an image and, where it chose none of the candidates, about the next ones."""
        verdict = await self._verdict(item)
        item.hear(self.stage, verdict)
        seen: set[Label] = set()
        for _ in range(self.stage.widen):
            shown = item.candidates
            seen.update(candidate.label for candidate in shown)
            if verdict.outcome != "none" or not item.widen(self.stage.candidates, seen):
                break
            wider = await self._verdict(item)
            usage = verdict.usage + wider.usage
            if not wider.valid:
                item.candidates, verdict = shown, replace(verdict, usage=usage)
                break
            item.hear(self.stage, wider)
            verdict = replace(wider, usage=usage)
        item.verdicts.append(verdict if verdict.stage == self.number else replace(verdict, stage=self.number))

    async def _verdict(self, item: Item) -> Verdict:
        """What the judge says of an image, among its candidates; after a fatal error, that is all it says."""
        loop = asyncio.get_running_loop()
        async with self._places:
            try:
                if self._fatal is not None:
                    raise self._fatal
                if not item.prepared.decoded:
                    await loop.run_in_executor(self.readers, lambda: item.prepared.image)
                image = item.prepared.image
                item.candidates = self.stage.candidates.arrange(item.candidates, image)
                question = self.stage.question(image, item.candidates, self.labels)
                if is_large(image):  # encode and hash it beside the event loop, once for all
                    await loop.run_in_executor(self.readers, self.judge.image_digest, question)
                return await self.judge.judge(question)
            except FatalError as exc:
                self._fatal = exc
                raise
            except BudgetExhausted as exc:
                return Verdict(outcome="skipped", error=str(exc), judge=self.judge.spec)
            except (JudgeError, ImageError) as exc:  # the image may have gone since it was scored
                return Verdict(outcome="failed", error=str(exc), judge=self.judge.spec)

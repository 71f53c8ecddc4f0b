"""A stage during one run: its policy escalates images, its judge answers, and its spending is counted."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from cascadevlm.base.errors import BudgetExhausted, FatalError, ImageError, JudgeError, PermanentError
from cascadevlm.base.images import is_large
from cascadevlm.base.labels import Label, LabelSet
from cascadevlm.base.types import AUDITED, NANODOLLARS, PROMISE_BROKEN, Candidate, Scores, Verdict
from cascadevlm.cascade.item import Item, believed, rank
from cascadevlm.cascade.observer import Observer
from cascadevlm.cascade.stage import Stage
from cascadevlm.judges.base import Judge
from cascadevlm.policies.base import Selection, Spending, as_budgeted
from cascadevlm.policies.rules import GainAbove


class RunningStage:
    """A stage during one run.

    Args:
        number: position of the stage, from 0.
        stage: the stage of the cascade.
        judge: the stage's judge, dependable and prepared.
        labels: the label set of the cascade.
        readers: threads that read images outside the event loop.
        spending: the state of the stage's spending at the start of the run.
        observers: observers of the run.
    """

    def __init__(
        self,
        number: int,
        stage: Stage,
        judge: Judge,
        labels: LabelSet,
        readers: Executor,
        spending: Spending,
        *,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.number = number
        self.stage = stage
        self.policy = as_budgeted(stage.policy)
        self.judge = stage.by_votes(judge)
        self.labels = labels
        self.readers = readers
        self.spending = spending
        self.observers = observers
        self._places = asyncio.Semaphore(self.judge.concurrency)
        self._fatal: FatalError | None = None

    async def prices(self, items: Sequence[Item]) -> tuple[float, ...]:
        """``(n,)`` expected costs of a question about each image, in US dollars; empty if the policy does not need prices."""
        if not self.policy.by_price:
            return ()

        def told() -> tuple[float, ...]:
            return tuple(map(self._price, items, self.stage.candidates.choose(believed(items))))

        return await asyncio.get_running_loop().run_in_executor(self.readers, told)  # it may open files

    def _price(self, item: Item, candidates: tuple[Candidate, ...]) -> float:
        """Expected cost of a question in US dollars. It is 0 if the question fails before it is sent: because the image has
        disappeared, or because there is no price for its length.
        """
        try:
            question = self.stage.question(item.prepared.unread, candidates)
            return self.stage.by_votes(self.stage.judge).quote(question).usual_case / NANODOLLARS
        except (ImageError, PermanentError):
            return 0.0

    def surplus(self, scores: Scores, prices: tuple[float, ...]) -> NDArray[np.floating]:
        """``(n,)`` expected gains minus the gain that the policy requires. Only for cascades with routing."""
        assert isinstance(self.policy.policy, GainAbove)
        return self.policy.policy.surplus(Spending(prices=prices, gain=self.stage.gain(scores)))

    def decide(
        self,
        items: Sequence[Item],
        scores: Scores,
        prices: tuple[float, ...],
        *,
        left: Selection,
        remaining: float | None,
        distrusted: Selection,
        accept: float,
    ) -> list[Item]:
        """The images that the policy escalates, and the images that the audit draws or distrusts. The audit draws only
        images that would get a label without a question. The limits of the policy do not count its questions. All images get the
        policy's reasons. In the first stage, all images get candidates.

        Args:
            items: the next n images.
            scores: `(n, C)` current scores of the images.
            prices: ``(n,)`` expected costs of a question about each image, in US dollars; or empty.
            left: ``(n,)`` booleans: the image is left to a later stage.
            remaining: expected number of images after these; None if the number is unknown.
            distrusted: ``(n,)`` booleans: the image must not be kept, because the audit shows a broken promise.
            accept: minimum probability of a label.
        """
        spending = replace(self.spending, remaining=remaining, prices=prices, gain=self.stage.gain(scores))
        selected = self.policy.select(scores, spending) & ~left
        distrusted = distrusted & ~selected
        labelled = scores.probabilities.max(axis=1) >= accept
        audited = self._drawn(spending.images, len(items)) & labelled & ~selected & ~distrusted
        for item, reason, elsewhere in zip(items, self.policy.reasons(scores, spending), left, strict=True):
            item.reasons.append(f"{reason}; a later judge is worth more" if elsewhere else reason)
        for item in compress(items, audited):
            item.reasons.append(AUDITED)
        for item in compress(items, distrusted):
            item.reasons.append(PROMISE_BROKEN)
        escalated = selected | audited | distrusted
        shown = [item for item, chosen in zip(items, escalated, strict=True) if chosen or not item.candidates]
        rank(self.stage.candidates, shown)
        self.spending = replace(
            self.spending,
            images=spending.images + len(items),
            calls=spending.calls + int(selected.sum()),
            dollars=spending.dollars + sum(compress(prices, selected)),
            dollars_for_all=spending.dollars_for_all + sum(prices),
            recent=self.policy.remembered(scores, spending),
        )
        return list(compress(items, escalated))

    def _drawn(self, first: int, count: int) -> Selection:
        """``(count,)`` booleans: the audit draws the image. ``first`` images came before."""
        audit = self.stage.audit
        return np.zeros(count, dtype=bool) if audit is None else audit.drawn(first, first + count)

    async def ask(self, item: Item) -> None:
        """Ask the judge about an image. If it chooses none of the candidates, ask about the next candidates."""
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
        """The judge's verdict on an image and its candidates. After a fatal error, every further question raises that error."""
        loop = asyncio.get_running_loop()
        question = None
        async with self._places:
            try:
                if self._fatal is not None:
                    raise self._fatal
                if not item.prepared.decoded:
                    await loop.run_in_executor(self.readers, lambda: item.prepared.image)
                image = item.prepared.image
                item.candidates = self.stage.candidates.arrange(item.candidates, image)
                question = self.stage.question(image, item.candidates, self.labels)
                if is_large(image):  # encode and hash the image once, outside the event loop
                    await loop.run_in_executor(self.readers, self.judge.image_digest, question)
                verdict = await self.judge.judge(question)
            except FatalError as exc:
                self._fatal = exc
                raise
            except BudgetExhausted as exc:
                verdict = Verdict(outcome="skipped", error=str(exc), judge=self.judge.spec)
            except (JudgeError, ImageError) as exc:  # the image may have disappeared since it was scored
                verdict = Verdict(outcome="failed", error=str(exc), judge=self.judge.spec)
        if question is not None:
            for observer in self.observers:
                observer.judged(item.number, self.number, question, verdict)
        return verdict

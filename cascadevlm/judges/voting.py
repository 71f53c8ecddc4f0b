"""Judges that ask more than once: a repair question after an unreadable answer, and votes over orders of the candidates."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from cascadevlm.base.errors import BudgetExhausted, FatalError, JudgeError
from cascadevlm.base.types import Question, Usage, Verdict
from cascadevlm.judges.base import Judge, Quote, WrapperJudge

MOST_REJECTED_TEXT = 4_000
"""How much of a rejected answer, from its end, a judge is shown again, in characters."""


class Repairing(WrapperJudge):
    """Asks once more where an answer named no candidate, showing the judge its own words."""

    async def judge(self, question: Question) -> Verdict:
        first = await self.wrapped.judge(question)
        if first.outcome != "unparsed" or not first.text.strip():
            return first
        try:
            second = await self.wrapped.judge(replace(question, rejected=first.text[-MOST_REJECTED_TEXT:]))
        except FatalError:
            raise
        except JudgeError:
            return first
        usage = first.usage + second.usage
        return replace(second, rationale=second.rationale or first.text.strip(), usage=usage)


class Voting(WrapperJudge):
    """Asks several times, the candidates in another order each time, and takes the mean of what was said.

    The orders are rotations, evenly spread, so that with as many votes as candidates each is shown at every place once: what a
    judge has for a place averages out. The judge's own probabilities are averaged, or the shares of its answers; of equal
    candidates the first shown wins. Votes that fail do not count, unless all do; where one is not asked for want of money, the
    question is not answered: fewer orders than meant would say what a judge has for a place. What an image costs and how many can
    be had at once is counted with all its votes.

    Args:
        votes: how often; at most once for every candidate.
    """

    def __init__(self, wrapped: Judge, votes: int) -> None:
        super().__init__(wrapped)
        self.votes = votes
        self.concurrency = -(-wrapped.concurrency // votes)
        self.requests_per_minute = wrapped.requests_per_minute and wrapped.requests_per_minute / votes

    def quote(self, question: Question) -> Quote:
        return sum(map(self.wrapped.quote, self._orders(question)), Quote())

    def _orders(self, question: Question) -> list[Question]:
        shown = question.candidates
        votes = min(self.votes, len(shown))
        starts = [vote * len(shown) // votes for vote in range(votes)]
        return [replace(question, candidates=shown[start:] + shown[:start]) for start in starts]

    async def judge(self, question: Question) -> Verdict:
        shown = question.candidates
        said = await asyncio.gather(*map(self.wrapped.judge, self._orders(question)), return_exceptions=True)
        verdicts = [each for each in said if isinstance(each, Verdict)]
        failures = [each for each in said if isinstance(each, BaseException)]
        serious = [each for each in failures if isinstance(each, FatalError) or not isinstance(each, JudgeError)]
        unpaid = [each for each in failures if isinstance(each, BudgetExhausted)]
        if serious or unpaid or not verdicts:
            raise (serious or unpaid or failures)[0]
        return _mean_verdict([candidate.label.name for candidate in shown], verdicts)


def _mean_verdict(names: Sequence[str], verdicts: Sequence[Verdict]) -> Verdict:
    """The mean of several verdicts about the same candidates: "none of these" if more votes chose it than chose a candidate; else
    the candidate with the highest mean probability; a verdict without an answer only if no vote holds one."""
    usage = sum((verdict.usage for verdict in verdicts), Usage())
    answered = [verdict for verdict in verdicts if verdict.outcome == "answered"]
    none = [verdict for verdict in verdicts if verdict.outcome == "none"]
    if len(answered) < len(none) or not answered:
        return replace((none or verdicts)[0], usage=usage)
    opinions = [verdict.probabilities or {verdict.label or "": 1.0} for verdict in answered]
    mean = {name: sum(opinion.get(name, 0.0) for opinion in opinions) / len(opinions) for name in names}
    best = max(names, key=mean.__getitem__)
    agreeing = next((verdict for verdict in answered if verdict.label == best), answered[0])
    return replace(agreeing, label=best, probabilities=mean, usage=usage)

"""Judges that ask more than once: repair questions after unreadable answers, and votes over orders of the candidates."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from cascadevlm.base.errors import BudgetExhausted, FatalError, JudgeError, Waiting
from cascadevlm.base.types import Question, Usage, Verdict
from cascadevlm.judges.base import Judge, Quote, WrapperJudge

MOST_REJECTED_TEXT = 4_000
"""Maximum number of characters of a rejected answer that a repair question shows. They are taken from the end of the answer."""


class Repairing(WrapperJudge):
    """Asks a repair question if an answer names no candidate. The repair question shows the judge its own answer."""

    async def judge(self, question: Question) -> Verdict:
        first = await self.wrapped.judge(question)
        if first.outcome != "unparsed" or not first.text.strip():
            return first
        try:
            second = await self.wrapped.judge(replace(question, rejected=first.text[-MOST_REJECTED_TEXT:]))
        except (FatalError, Waiting):
            raise
        except JudgeError:
            return first
        usage = first.usage + second.usage
        return replace(second, rationale=second.rationale or first.text.strip(), usage=usage)


class Voting(WrapperJudge):
    """Asks several times, each time with another order of the candidates, and takes the mean of the answers.

    The orders are evenly spaced rotations. With as many votes as candidates, each candidate is shown once at each position, so
    that the judge's preference for a list position cancels out. The mean is computed from the judge's probabilities or, if
    there are no probabilities, from its answers. If two candidates are equal, the candidate that is shown first wins. A vote
    that fails does not count, unless all votes fail. If the budget does not cover all votes, the question is not answered,
    because the preference for a position would not cancel out. The quote, the concurrency and the rates cover all votes
    together.

    Args:
        wrapped: the judge.
        votes: the number of votes; at most the number of candidates.
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
        unpaid = [each for each in failures if isinstance(each, BudgetExhausted | Waiting)]
        if serious or unpaid or not verdicts:
            raise (serious or unpaid or failures)[0]
        return _mean_verdict([candidate.label.name for candidate in shown], verdicts)


def _mean_verdict(names: Sequence[str], verdicts: Sequence[Verdict]) -> Verdict:
    """The mean of several verdicts on the same candidates.

    The verdict is the candidate with the highest mean probability. It is "none of these" if more votes chose that than chose a
    candidate. It is the first verdict if no vote has an answer.
    """
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

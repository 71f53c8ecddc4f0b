"""For your own tests: a scorer and a judge that do as they are told, and the contracts every scorer and judge keeps.

The fakes are real subclasses and go through the same code as any backend. The contracts are test classes: inherit, say how to
build yours, and pytest runs them (pytest-asyncio in auto mode for judges)::

    class TestMyScorer(ScorerContract):
        def make(self) -> Scorer:
            return MyScorer("tiny")
"""

from cascadevlm.testing.contracts import JudgeContract, ScorerContract
from cascadevlm.testing.fakes import FakeJudge, FakeScorer, Reply, noise, picture, question

__all__ = ["FakeJudge", "FakeScorer", "JudgeContract", "Reply", "ScorerContract", "noise", "picture", "question"]

"""Helpers for your own tests: a fake scorer, a fake judge, and contract tests for every scorer and judge.

The fakes are real subclasses, and run through the same code as every backend. The contracts are test classes. Inherit from a
contract and implement ``make``; pytest then runs its tests. Tests of judges need pytest-asyncio in auto mode. For example::

    class TestMyScorer(ScorerContract):
        def make(self) -> Scorer:
            return MyScorer("tiny")
"""

from cascadevlm.testing.contracts import JudgeContract, ScorerContract
from cascadevlm.testing.fakes import FakeJudge, FakeScorer, Reply, noise, picture, question

__all__ = ["FakeJudge", "FakeScorer", "JudgeContract", "Reply", "ScorerContract", "noise", "picture", "question"]

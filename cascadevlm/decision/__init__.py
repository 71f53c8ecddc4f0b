"""The decision layer: how far to trust the scorer, how far the judge, what asking is worth, how long the list must be.

Plain mathematics over recorded scores and verdicts; `docs/decisions.md` explains it in words.
"""

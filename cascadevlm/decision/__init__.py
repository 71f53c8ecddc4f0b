"""The decision layer: how far to trust the scorer and the judge, what a question is worth, and how many candidates to show.

All of it is mathematics on arrays of recorded scores and verdicts. `docs/deciding/understand.md` explains it in words.
"""

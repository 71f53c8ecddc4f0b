"""The decision layer: the reliability of the scorer and the judge, the expected gain from a question, and the number of
candidates.

All of it is mathematics on arrays of recorded scores and verdicts. `docs/deciding/understand.md` explains it in words.
"""

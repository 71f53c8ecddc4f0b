"""Policies decide which images are worth a question."""

"""Policies decide which images are escalated to a judge."""

"""Scorers rank all labels for every image."""

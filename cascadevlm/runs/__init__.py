"""Runs over unlabelled images, by the million."""

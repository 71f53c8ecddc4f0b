"""Labelled images, and all that is read from records."""

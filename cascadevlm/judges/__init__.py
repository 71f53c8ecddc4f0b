"""Judges answer questions about an image, dependably and within a budget."""

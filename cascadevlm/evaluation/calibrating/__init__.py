"""Fits calibrations to recorded runs."""

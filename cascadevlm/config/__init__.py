"""Builds a cascade from a TOML file."""

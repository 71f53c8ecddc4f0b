"""Builds a cascade from a TOML file."""

DEFAULT_SCORER = "open_clip:ViT-B-16-SigLIP2/webli"
"""The scorer that is used if the user names none. It knows photographs of many kinds, and many languages."""

"""The built-in prompt templates: one ``<name>.txt`` each, found by cascadevlm through this package's entry points."""

"""The built-in prompt templates, one file ``NAME.txt`` per template. cascadevlm finds them through entry points."""

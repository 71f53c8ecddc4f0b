"""The bundled demonstration: two tiny models trained by ``training/``, 48 images of species they never saw, and a config."""

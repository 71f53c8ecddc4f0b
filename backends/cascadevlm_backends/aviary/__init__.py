"""The bundled demonstration: two tiny models made by ``training/``, 48 images of species not used in training, and a config."""

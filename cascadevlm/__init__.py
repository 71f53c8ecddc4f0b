"""cascadevlm: a local CLIP scorer ranks, a policy decides what is worth asking, a vision-language model judges."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

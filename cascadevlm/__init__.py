"""cascadevlm: a local CLIP scorer ranks the classes, a policy selects images, and a vision-language model judges these images."""

import lazy_loader

_public, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version(__name__)
    return _public(name)

"""What can be copied, pickled and cloned though it holds models, clients, threads and locks: these stay behind."""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import cached_property
from typing import ClassVar, Self, TypeAlias

Live: TypeAlias = tuple[tuple[str, Callable[[], object]], ...]
"""Names, each with what makes a new value."""


class Portable:
    """A copy, pickled or deep or scikit-learn's clone, has what the constructor was given, and makes the rest anew.

    What a `cached_property` made at first use (a model, a client, a thread) is left behind, and what is ``live``.

    Attributes:
        live: names of attributes that belong to runs, threads and event loops, each with what makes a new one; those of the bases
            count too.
    """

    live: ClassVar[Live] = ()

    def __getstate__(self) -> dict[str, object]:
        left = {name for kind in type(self).__mro__ for name, value in vars(kind).items() if isinstance(value, cached_property)}
        left.update(name for name, _ in self._live())
        return {name: value for name, value in vars(self).items() if name not in left}

    def __setstate__(self, state: Mapping[str, object]) -> None:
        vars(self).update(state)
        vars(self).update((name, make()) for name, make in self._live())

    def __sklearn_clone__(self) -> Self:
        return deepcopy(self)

    def _live(self) -> Iterator[tuple[str, Callable[[], object]]]:
        return (each for kind in type(self).__mro__ for each in vars(kind).get("live", ()))

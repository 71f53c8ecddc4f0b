"""Objects that can be copied, pickled and cloned. Their models, clients, threads and locks are not copied."""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import cached_property
from typing import ClassVar, Self, TypeAlias

Live: TypeAlias = tuple[tuple[str, Callable[[], object]], ...]
"""Pairs of an attribute name and a function that makes a new value."""


class Portable:
    """An object that can be pickled, deep-copied and cloned by scikit-learn, even while it is in use.

    The copy has the attributes of the original, except the values of each `cached_property` (a model, a client, a thread) and the
    attributes in ``live``. The copy makes new values for these.

    Attributes:
        live: names of attributes that belong to runs, threads or event loops. Each comes with a function that makes a new value.
            The names in base classes are included.
    """

    live: ClassVar[Live] = ()

    def __getstate__(self) -> dict[str, object]:
        left = {name for kind in type(self).__mro__ for name, value in vars(kind).items() if isinstance(value, cached_property)}
        left.update(name for name, _ in self._live())
        here = vars(self).copy()  # another thread may add attributes, or entries to a dict, during the loop
        return {name: value.copy() if isinstance(value, dict) else value for name, value in here.items() if name not in left}

    def __setstate__(self, state: Mapping[str, object]) -> None:
        vars(self).update(state)
        vars(self).update((name, make()) for name, make in self._live())

    def __sklearn_clone__(self) -> Self:
        return deepcopy(self)

    def _live(self) -> Iterator[tuple[str, Callable[[], object]]]:
        return (each for kind in type(self).__mro__ for each in vars(kind).get("live", ()))

"""Adapters: what was learned about the embeddings of one scorer for one label set.

An adapter adds a term to the logits of the scorer that it was made for: ``own * l + added(x)``, where l are the scorer's own
logits and x is the embedding of an image. An adapter is one safetensors file. Nothing in the file is unpickled.
"""

import hashlib
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, JsonValue, PlainValidator, TypeAdapter, ValidationError
from scipy.special import log_softmax

from cascadevlm.base.arrays import Columns
from cascadevlm.base.errors import CascadeError, ConfigError, DataError
from cascadevlm.base.files import write_whole
from cascadevlm.base.labels import LabelSet

Method = Literal["means", "cache", "linear"]
"""How an adapter is learned: class means with a shared covariance, a cache of labelled embeddings, or a linear probe."""

METHODS: dict[str, Method] = {method: method for method in get_args(Method)}
"""By name."""

LARGEST_LOGIT = 1e4
"""The largest term that an adapter may add. A larger one comes from a failed fit and leaves nothing of the scorer's opinion."""

MOST_NUMBERS = 50_000_000
"""The most numbers in one array of an adapter: 200 MB of float32."""

MAKE_ANOTHER = "Make one for this scorer and these labels: cascadevlm adapt."

DAMAGED = "the file is damaged or of another kind."

HEADER = "cascadevlm.adapter"
"""Key in the metadata of the file. Its value is JSON with all attributes that are no arrays."""


def _array(value: object) -> NDArray[np.floating]:
    if not isinstance(value, np.ndarray):
        raise ValueError("is no array")
    return value


Float32s = Annotated[NDArray[np.float32], PlainValidator(_array)]
Float16s = Annotated[NDArray[np.float16], PlainValidator(_array)]


@dataclass(frozen=True, kw_only=True)
class Made:
    """How an adapter was made.

    Attributes:
        method: how it was learned.
        images: number of images that it was learned from.
        labelled: number of these images whose label was known.
        figures: what was measured on held-out images.
    """

    method: Method
    images: int
    labelled: int
    figures: dict[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter(ABC):
    """Changes the logits of one scorer by what was learned about its embeddings.

    Attributes:
        labels: names of the C labels, in the order of the adapter's columns.
        fingerprint: of the scorer without an adapter, for these labels.
        own: factor of the scorer's own logits, from 0 to 1e4.
        made: how the adapter was made. It does not change the scores.

    Raises:
        DataError: if an array has the wrong shape or type, too many numbers, or numbers that are not finite.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    labels: tuple[str, ...]
    fingerprint: str
    own: float
    made: Made

    @property
    @abstractmethod
    def dimensions(self) -> int:
        """D: length of the embeddings."""

    @abstractmethod
    def added(self, embeddings: NDArray[np.float32], own: NDArray[np.float32]) -> NDArray[np.float32]:
        """`(N, C) float32`, the term for the C labels of the adapter.

        Args:
            embeddings: `(N, D)`, rows of length 1.
            own: `(N, C)`, the scorer's logits for these labels, up to a constant per row.
        """

    def logits(
        self, embeddings: NDArray[np.float32], own: NDArray[np.float32], columns: Columns | None = None
    ) -> NDArray[np.float32]:
        """`(N, L) float32`, adapted logits for L labels. A label that the adapter does not know gets the mean term of the others.

        Args:
            embeddings: `(N, D)`, rows of length 1.
            own: `(N, L)`, the scorer's logits, up to a constant per row.
            columns: `(C,)`, the column in ``own`` of each label of the adapter. Default: these are the labels of the adapter.

        Raises:
            ConfigError: if the embeddings have another length than those that the adapter was made of, or if a term is larger
                than 1e4.
        """
        if embeddings.shape[1] != self.dimensions:
            raise ConfigError(
                f"The adapter is of embeddings with {self.dimensions} dimensions, not {embeddings.shape[1]}.", hint=MAKE_ANOTHER
            )
        added = self.added(embeddings, own if columns is None else own[:, columns])
        if not (np.abs(added) <= LARGEST_LOGIT).all():  # NaN, too
            raise ConfigError(f"The adapter adds logits beyond {LARGEST_LOGIT:g} to those of the scorer.", hint=MAKE_ANOTHER)
        if columns is not None:
            known, added = added, np.repeat(added.mean(axis=1, keepdims=True), own.shape[1], axis=1)
            added[:, columns] = known
        return np.float32(self.own) * own + added

    def columns_in(self, labels: LabelSet, fingerprint: Callable[[LabelSet], str]) -> Columns | None:
        """`(C,)`, the column in a label set of each label of the adapter; None if these are all labels in the same order.

        Args:
            labels: the label set that images are scored with.
            fingerprint: gives the fingerprint that the scorer has for a label set without an adapter.

        Raises:
            ConfigError: if a label is missing, or the adapter was made for another scorer, other templates or other texts.

        Warns:
            RuntimeWarning: if the adapter does not know some of the labels.
        """
        if missing := [name for name in self.labels if name not in labels.columns]:
            raise ConfigError(
                f"The label set lacks {len(missing)} of the adapter's {len(self.labels)} labels, such as {missing[0]!r}.",
                hint="Give all labels that the adapter was made for. Further labels may be added.",
            )
        columns = np.array([labels.columns[name] for name in self.labels])
        given = fingerprint(LabelSet(tuple(labels[column] for column in columns)))
        if given != self.fingerprint:
            raise _of_another_scorer(self.fingerprint, given)
        if new := sorted(set(labels.names) - set(self.labels)):
            warnings.warn(
                f"The adapter does not know {len(new)} of the labels, such as {new[0]!r}: these get the mean of what it adds.",
                RuntimeWarning,
                stacklevel=2,
            )
        return None if labels.names == self.labels else columns

    @cached_property
    def digest(self) -> str:
        """sha256 of all that changes the scores, in hexadecimal."""
        header, arrays = self._parts()
        digest = hashlib.sha256(json.dumps(header | {"made": None}).encode())
        for name, array in arrays.items():
            digest.update(f"{name} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def write(self, path: str | Path) -> None:
        """Write the file as a whole.

        Raises:
            DataError: if the file cannot be written.
        """
        from safetensors.numpy import save

        header, arrays = self._parts()
        tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        try:
            write_whole(Path(path), save(tensors, {HEADER: json.dumps(header | {"digest": self.digest})}))
        except OSError as exc:
            raise DataError(f"{str(path)!r} cannot be written: {exc.strerror}.") from exc

    def _parts(self) -> tuple[dict[str, JsonValue], dict[str, NDArray[np.floating]]]:
        """The kind and all attributes that are no arrays, as JSON-serialisable data; and the arrays by name."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        rest = {name: value for name, value in values.items() if name not in arrays}
        header = TypeAdapter(dict[str, object]).dump_python(rest | {"kind": type(self).__name__}, mode="json")
        return cast(dict[str, JsonValue], header), arrays

    def _require(self, name: str, shape: tuple[int, ...], dtype: type[np.floating]) -> None:
        array: NDArray[np.floating] = getattr(self, name)
        if array.size > MOST_NUMBERS:
            hint = "Learn for fewer labels, from fewer images, or with a scorer of fewer dimensions."
            raise DataError(f"{name} of the adapter has {array.size:,} numbers, more than {MOST_NUMBERS:,}.", hint=hint)
        if array.shape != shape or array.dtype != dtype:
            raise DataError(f"{name} of the adapter is {array.dtype} {array.shape}, not {dtype.__name__} {shape}.")
        if not np.isfinite(array).all():
            raise DataError(f"{name} of the adapter has numbers that are not finite.", hint=MAKE_ANOTHER)

    def _require_numbers(self, **numbers: float) -> None:
        for name, number in numbers.items():
            if not 0 <= number <= LARGEST_LOGIT:  # NaN, too
                raise DataError(f"{name} of the adapter is a number from 0 to {LARGEST_LOGIT:g}, not {number!r}.")


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearAdapter(Adapter):
    """Adds ``weights @ x + bias``.

    Attributes:
        weights: `(C, D) float32`.
        bias: `(C,) float32`.
    """

    weights: Float32s
    bias: Float32s

    def __post_init__(self) -> None:
        self._require_numbers(own=self.own)
        self._require("weights", (len(self.labels), self.dimensions), np.float32)
        self._require("bias", (len(self.labels),), np.float32)

    @property
    def dimensions(self) -> int:
        return _width(self.weights)

    def added(self, embeddings: NDArray[np.float32], own: NDArray[np.float32]) -> NDArray[np.float32]:
        return embeddings @ self.weights.T + self.bias


@dataclass(frozen=True, kw_only=True, eq=False)
class CacheAdapter(Adapter):
    """Adds a weighted sum over labelled images i: ``Σ_i (strength · exp(-sharpness (1 - x·key_i)) + likeness_i) · value_i``.

    The likeness compares what the scorer itself says of the two images: with p = softmax(temperature · own logits), it is
    ``intercept - slope · KL(p ‖ p_i)``.

    Sources: Zhang et al., "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification", ECCV 2022; for the likeness,
    TIP-X in Udandarao, Gupta and Albanie, "SuS-X: Training-Free Name-Only Transfer of Vision-Language Models", ICCV 2023.

    Attributes:
        keys: `(n, D) float16`, embeddings of the labelled images.
        values: `(n, C) float16`, how likely each label is for each of these images; rows sum to 1.
        strength: α of Tip-Adapter, from 0 to 1e4.
        sharpness: β of Tip-Adapter, from 0 to 1e4.
        signatures: `(n, C) float16`, log p_i. None without the likeness.
        temperature: factor of the scorer's own logits in p, from 0 to 1e4.
        intercept: largest likeness.
        slope: loss of likeness per nat of divergence, from 0 to 1e4.
    """

    keys: Float16s
    values: Float16s
    strength: float
    sharpness: float
    signatures: Float16s | None = None
    temperature: float = 0.0
    intercept: float = 0.0
    slope: float = 0.0

    def __post_init__(self) -> None:
        numbers = ("own", "strength", "sharpness", "temperature", "intercept", "slope")
        self._require_numbers(**{name: getattr(self, name) for name in numbers})
        images, classes = self.values.shape[0] if self.values.ndim else 0, len(self.labels)
        self._require("keys", (images, self.dimensions), np.float16)
        self._require("values", (images, classes), np.float16)
        if self.signatures is not None:
            self._require("signatures", (images, classes), np.float16)

    @property
    def dimensions(self) -> int:
        return _width(self.keys)

    def added(self, embeddings: NDArray[np.float32], own: NDArray[np.float32]) -> NDArray[np.float32]:
        weights = self.strength * affinities(embeddings @ self._keys.T, self.sharpness)
        if self._signatures is not None:
            weights += self.intercept - self.slope * divergences(signatures(own, self.temperature), self._signatures)
        return weights.astype(np.float32) @ self._values

    @cached_property
    def _keys(self) -> NDArray[np.float32]:
        return self.keys.astype(np.float32)

    @cached_property
    def _values(self) -> NDArray[np.float32]:
        return self.values.astype(np.float32)

    @cached_property
    def _signatures(self) -> NDArray[np.float32] | None:
        return None if self.signatures is None else self.signatures.astype(np.float32)


def _width(array: NDArray[np.floating]) -> int:
    """Number of columns; 0 for an array that has none."""
    return int(array.shape[1]) if array.ndim > 1 else 0


def affinities(cosines: NDArray[np.float32], sharpness: float) -> NDArray[np.float32]:
    """`(N, n)` numbers from 0 to 1: how near N images are to n others, by the cosines of their embeddings."""
    found: NDArray[np.float32] = np.exp(np.float32(sharpness) * (cosines - np.float32(1)))
    return found


def signatures(own: NDArray[np.floating], temperature: float) -> NDArray[np.float32]:
    """`(N, C)`, log softmax of N images' logits times a temperature."""
    found: NDArray[np.float32] = log_softmax(np.float32(temperature) * own.astype(np.float32), axis=1)
    return found


def divergences(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    """`(N, n)`, the Kullback-Leibler divergence in nats of each of N distributions from each of n; both as log-probabilities."""
    probabilities = np.exp(first)
    found: NDArray[np.float32] = (probabilities * first).sum(axis=1, keepdims=True) - probabilities @ second.T
    return found


KINDS: Mapping[str, type[Adapter]] = {kind.__name__: kind for kind in (LinearAdapter, CacheAdapter)}


def read_adapter(path: str | Path) -> Adapter:
    """Read the file of an adapter.

    Raises:
        ConfigError: if the file cannot be read, is damaged, or is no adapter.
    """
    from safetensors import SafetensorError, safe_open

    try:
        Path(path).open("rb").close()  # says in one form why a file cannot be read
        with safe_open(path, framework="np") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "null"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except OSError as exc:
        raise ConfigError(f"Adapter {str(path)!r} cannot be read: {exc.strerror}.") from exc
    except (SafetensorError, ValueError, TypeError, RecursionError) as exc:
        raise ConfigError(f"{str(path)!r} is no adapter: {DAMAGED}", hint=MAKE_ANOTHER) from exc
    kind = KINDS.get(str(header.pop("kind", ""))) if isinstance(header, dict) else None
    if kind is None:
        raise ConfigError(f"{str(path)!r} is no adapter: it was not written by cascadevlm.", hint=MAKE_ANOTHER)
    digest = header.pop("digest", None)
    try:
        adapter = TypeAdapter(kind).validate_python(header | arrays)
    except ValidationError as exc:
        first = exc.errors()[0]
        raise ConfigError(f"{str(path)!r} is no adapter: {first['loc'][0]}: {first['msg']}.", hint=MAKE_ANOTHER) from exc
    except CascadeError as exc:
        raise ConfigError(f"{str(path)!r} is no adapter: {exc}") from exc
    if adapter.digest != digest:
        raise ConfigError(f"{str(path)!r} is no adapter: {DAMAGED}", hint=MAKE_ANOTHER)
    return adapter


def _of_another_scorer(known: str, given: str) -> ConfigError:
    """The error for fingerprints that differ; a difference in the wording alone is named."""
    parts = {part.partition("=")[0] for part in {*known.split("|")} ^ {*given.split("|")}}
    wording = {"templates": "templates", "texts": "texts for the labels"}
    if parts <= wording.keys():
        other = " and ".join(words for part, words in wording.items() if part in parts)
        return ConfigError(f"The adapter was made with other {other}.", hint=MAKE_ANOTHER)
    return ConfigError(f"The adapter is of the scorer {known!r}, not of {given!r}.", hint=MAKE_ANOTHER)

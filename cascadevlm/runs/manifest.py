"""What a bulk run is: ``manifest.json``, by which the same run is known again."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, JsonValue, TypeAdapter, ValidationError

from cascadevlm.base.environment import machine, versions
from cascadevlm.base.errors import DataError
from cascadevlm.base.files import valid_text, write_whole
from cascadevlm.base.labels import Label
from cascadevlm.base.secrets import without_secrets
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.config.config import Config
from cascadevlm.decision.calibration import Calibration
from cascadevlm.judges.cache import key_of
from cascadevlm.runs.inputs import Inputs, Named

NAME = "manifest.json"


class Manifest(BaseModel):
    """``manifest.json``.

    Attributes:
        contents: digests of what the configuration names: the calibration and, of every stage, prompt and support set.
        fingerprint: of the scorer, once something was scored.
        judges: the identity of each stage's judge, once it was made ready.
        dollars: the cap of the latest session; None for no cap.
    """

    format: Literal[1] = 1
    config: dict[str, JsonValue]
    labels: list[Label]
    inputs: str
    began: datetime
    versions: dict[str, str]
    machine: str
    contents: dict[str, str]
    fingerprint: str | None = None
    judges: dict[int, dict[str, JsonValue]] = {}
    dollars: float | None = None

    @classmethod
    def of(cls, cascade: Cascade, inputs: Iterable[Named], config: Mapping[str, JsonValue]) -> Self:
        """Of a run that begins now."""
        return cls(
            config=without_secrets(config),
            labels=list(cascade.labels),
            inputs=valid_text(str(inputs.path.absolute())) if isinstance(inputs, Inputs) else type(inputs).__name__,
            began=datetime.now(UTC),
            versions=versions(),
            machine=machine(),
            contents=_contents(cascade),
            dollars=cascade.ledger.cap_dollars,
        )

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The one in a folder.

        Raises:
            DataError: if it is none.
        """
        try:
            return cls.model_validate_json((folder / NAME).read_bytes())
        except (OSError, ValidationError) as exc:
            raise DataError(f"{str(folder / NAME)!r} is no manifest of a run.", hint="Give another folder.") from exc

    def write(self, folder: Path) -> None:
        write_whole(folder / NAME, self.model_dump_json(indent=2) + "\n")

    def agreed(self, folder: Path) -> "Manifest":
        """The manifest of a folder: the one that is in it, or this one, which is then written.

        Raises:
            DataError: if the folder is of another run.
        """
        if not (folder / NAME).exists():
            self.write(folder)
            return self
        begun = Manifest.read(folder)
        require_same(folder, begun.differences(self))
        return begun

    def differences(self, other: "Manifest") -> list[str]:
        """What another run does otherwise, one sentence each."""
        found = _changes(_deciding(self.config), _deciding(other.config))
        names = {**self.contents, **other.contents}
        found += [f"the content of {name} is another" for name in names if self.contents.get(name) != other.contents.get(name)]
        return found + ["the labels are others"] * (self.labels != other.labels)

    def with_judge(self, stage: int, identity: Mapping[str, JsonValue], folder: Path) -> "Manifest":
        """The manifest with the identity of a stage's judge, written where it is new.

        Raises:
            DataError: if the run was begun with another.
        """
        if stage in self.judges:
            require_same(folder, _changes(self.judges[stage], dict(identity), path=f"stage.{stage}.judge."))
            return self
        return self._with(folder, judges={**self.judges, stage: dict(identity)})

    def with_fingerprint(self, fingerprint: str, folder: Path) -> "Manifest":
        """The manifest with the fingerprint of the scorer, written where it is new.

        Raises:
            DataError: if the run was begun with another.
        """
        if self.fingerprint not in (None, fingerprint):
            raise DataError(
                f"{str(folder)!r} was begun with the scorer {self.fingerprint!r}, this one is {fingerprint!r}.",
                hint="Give another folder.",
            )
        return self if self.fingerprint else self._with(folder, fingerprint=fingerprint)

    def is_raised_by(self, dollars: float | None) -> bool:
        """Whether a cap is higher than that of the latest session."""
        return self.dollars is not None and (dollars is None or dollars > self.dollars)

    def with_cap(self, dollars: float | None, folder: Path) -> "Manifest":
        """The manifest with the cap of this session, written where it is new."""
        return self if self.dollars == dollars else self._with(folder, dollars=dollars)

    def _with(self, folder: Path, **learned: object) -> "Manifest":
        manifest = self.model_copy(update=learned)
        manifest.write(folder)
        return manifest


def require_same(folder: Path, differences: list[str]) -> None:
    """Raises DataError, if a run in a folder was begun otherwise."""
    if differences:
        hint = "Give another folder, or what it was begun with."
        raise DataError(f"{str(folder)!r} is of another run: {'; '.join(differences)}.", hint=hint)


def _contents(cascade: Cascade) -> dict[str, str]:
    contents = {}
    if cascade.calibration is not None:
        deciding = TypeAdapter(Calibration).dump_json(cascade.calibration, exclude={"made", "figures"})
        contents["calibration"] = hashlib.sha256(deciding).hexdigest()
    for number, stage in enumerate(cascade.stages):
        contents[f"stage.{number}.prompt"] = key_of(asdict(stage.prompt))
        if stage.support is not None:
            contents[f"stage.{number}.support"] = key_of(
                {name: [each.digest for each in exemplars] for name, exemplars in stage.support.exemplars.items()}
            )
    return contents


def _deciding(config: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Every key that may not change, with its default if it is not given; a configuration that is not ours, as it is."""
    try:
        return Config.model_validate(config).deciding()
    except ValidationError:
        return config


def _changes(before: Mapping[str, JsonValue], now: Mapping[str, JsonValue], path: str = "") -> list[str]:
    """What differs between two configurations or identities and may decide an answer, one sentence each."""
    mine, theirs = _flat(dict(before), path), _flat(dict(now), path)
    return [
        f"{key} was {mine.get(key)!r} and is {theirs.get(key)!r}"
        for key in {**mine, **theirs}
        if mine.get(key) != theirs.get(key)
    ]


def _flat(value: JsonValue, path: str) -> dict[str, JsonValue]:
    """Every value by the path to it, as ``stage.0.judge``."""
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, part in parts for key, leaf in _flat(part, f"{path}{name}.").items()}
    return {path.removesuffix("."): value}

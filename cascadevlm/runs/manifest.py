"""``manifest.json``: the description of a run. With it, a command recognises whether a folder belongs to its run."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, JsonValue, TypeAdapter, ValidationError

from cascadevlm.base.environment import machine, versions
from cascadevlm.base.errors import DataError
from cascadevlm.base.files import valid_text, write_whole
from cascadevlm.base.labels import Label
from cascadevlm.base.remote import name_of
from cascadevlm.base.secrets import without_secrets
from cascadevlm.base.tables import USUAL, ColumnNames
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.config.config import Config
from cascadevlm.decision.calibration import Calibration
from cascadevlm.judges.cache import key_of
from cascadevlm.policies.base import as_policy
from cascadevlm.policies.rules import Always
from cascadevlm.runs.inputs import Inputs, Labelled, Named, columns_of

NAME = "manifest.json"


class Manifest(BaseModel):
    """``manifest.json``.

    Attributes:
        inputs: path or address of the images, or the kind of their source.
        columns: the columns of the table that the images were read from.
        labelled: true if the images have true labels; the folder is then a record.
        decided_again: true if the predictions were made from those of another run (`cascadevlm.runs.again`).
        stages: the spec of the judge of each stage.
        asks_all: true if every judge is asked about every image, even if the policies of the configuration do not escalate it.
        contents: digests of the files that the configuration names: the calibration and, for every stage, its prompt and
            support set.
        fingerprint: the fingerprint of the scorer; None until the first image is scored.
        judges: the identity of each prepared judge, by the number of its stage.
        dollars: the spending limit of the latest session, in US dollars; None if there is no limit.
    """

    model_config = ConfigDict(title=NAME)

    format: Literal[1] = 1
    config: dict[str, JsonValue]
    labels: list[Label]
    inputs: str
    columns: ColumnNames = USUAL
    labelled: bool = False
    decided_again: bool = False
    stages: list[str] = []
    asks_all: bool = False
    began: datetime
    versions: dict[str, str]
    machine: str
    contents: dict[str, str]
    fingerprint: str | None = None
    judges: dict[int, dict[str, JsonValue]] = {}
    dollars: float | None = None

    @classmethod
    def of(cls, cascade: Cascade, inputs: Iterable[Named] | Labelled, config: Mapping[str, JsonValue]) -> Self:
        """The manifest of a run that starts now."""
        return cls(
            config=without_secrets(config),
            labels=list(cascade.labels),
            inputs=_place(inputs) if isinstance(inputs, Inputs) else type(inputs).__name__,
            columns=columns_of(inputs),
            labelled=isinstance(inputs, Labelled),
            stages=[stage.judge.spec for stage in cascade.stages],
            asks_all=all(isinstance(as_policy(stage.policy), Always) for stage in cascade.stages),
            began=datetime.now(UTC),
            versions=versions(),
            machine=machine(),
            contents=_contents(cascade),
            dollars=cascade.ledger.cap_dollars,
        )

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The manifest in a folder.

        Raises:
            DataError: if the folder does not exist, or the manifest is missing or damaged.
        """
        if not folder.exists():
            raise DataError(f"The folder {str(folder)!r} does not exist.", hint="Check the path.")
        try:
            return cls.model_validate_json((folder / NAME).read_bytes())
        except (OSError, ValidationError) as exc:
            raise DataError(f"{str(folder / NAME)!r} is not the manifest of a run.", hint="Give another folder.") from exc

    def write(self, folder: Path) -> None:
        """Write the manifest into a folder."""
        write_whole(folder / NAME, self.model_dump_json(indent=2) + "\n")

    def agreed(self, folder: Path) -> "Manifest":
        """The manifest in a folder. If there is none, this manifest is written there.

        Raises:
            DataError: if the folder belongs to another run.
        """
        if not (folder / NAME).exists():
            self.write(folder)
            return self
        begun = Manifest.read(folder)
        require_same(folder, begun.differences(self))
        return begun

    def differences(self, other: "Manifest") -> list[str]:
        """The differences from another run, one clause per difference."""
        found = _changes(_deciding(self.config), _deciding(other.config))
        names = {**self.contents, **other.contents}
        found += [f"the content of {name} differs" for name in names if self.contents.get(name) != other.contents.get(name)]
        found += ["the labels differ"] * (self.labels != other.labels)
        if self.columns != other.columns:
            found.append(f"its images were read with {self.columns} and are now read with {other.columns}")
        if self.labelled != other.labelled:
            found.append(f"its images {'have true' if self.labelled else 'have no true'} labels")
        if self.decided_again != other.decided_again:
            found.append(f"it was {'' if self.decided_again else 'not '}made from another run by adapt --again")
        if self.asks_all != other.asks_all:
            found.append(f"its judges were {'' if self.asks_all else 'not '}asked about every image")
        return found

    @property
    def scorer(self) -> str:
        """The spec of the scorer. If the configuration names no scorer, this is the scorer's fingerprint."""
        scorer = self.config.get("scorer")
        return str(scorer["use"]) if isinstance(scorer, dict) and "use" in scorer else self.fingerprint or ""

    def with_judge(self, stage: int, identity: Mapping[str, JsonValue], folder: Path) -> "Manifest":
        """The manifest with the identity of a stage's judge. If the identity is new, the manifest is written.

        Raises:
            DataError: if the run was started with another judge.
        """
        if stage in self.judges:
            require_same(folder, _changes(self.judges[stage], dict(identity), path=f"stage.{stage}.judge."))
            return self
        return self._with(folder, judges={**self.judges, stage: dict(identity)})

    def with_fingerprint(self, fingerprint: str, folder: Path) -> "Manifest":
        """The manifest with the fingerprint of the scorer. If the fingerprint is new, the manifest is written.

        Raises:
            DataError: if the run was started with another scorer.
        """
        if self.fingerprint not in (None, fingerprint):
            raise DataError(
                f"{str(folder)!r} belongs to a run with the scorer {self.fingerprint!r}; the scorer is now {fingerprint!r}.",
                hint="Give another folder.",
            )
        return self if self.fingerprint else self._with(folder, fingerprint=fingerprint)

    def is_raised_by(self, dollars: float | None) -> bool:
        """True if ``dollars`` is a higher limit than the limit of the latest session. None means no limit."""
        return self.dollars is not None and (dollars is None or dollars > self.dollars)

    def with_cap(self, dollars: float | None, folder: Path) -> "Manifest":
        """The manifest with the spending limit of this session. If the limit is new, the manifest is written."""
        return self if self.dollars == dollars else self._with(folder, dollars=dollars)

    def _with(self, folder: Path, **learned: object) -> "Manifest":
        manifest = self.model_copy(update=learned)
        manifest.write(folder)
        return manifest


def _place(inputs: Inputs) -> str:
    place = inputs.path
    return valid_text(str(place.absolute())) if isinstance(place, Path) else name_of(place)


def require_same(folder: Path, differences: list[str]) -> None:
    """Raise DataError if there are differences from the run in a folder."""
    if differences:
        hint = "Give another folder, or the settings of that run."
        raise DataError(f"{str(folder)!r} belongs to another run: {'; '.join(differences)}.", hint=hint)


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
    """Every key that may not change; a missing key has its default. Data that is not a configuration is returned unchanged."""
    try:
        return Config.model_validate(config).deciding()
    except ValidationError:
        return config


def _changes(before: Mapping[str, JsonValue], now: Mapping[str, JsonValue], path: str = "") -> list[str]:
    """The differences between two configurations or identities that may change an answer, one clause per difference."""
    mine, theirs = _flat(dict(before), path), _flat(dict(now), path)
    return [
        f"{key} was {mine.get(key)!r} and is {theirs.get(key)!r}"
        for key in {**mine, **theirs}
        if mine.get(key) != theirs.get(key)
    ]


def _flat(value: JsonValue, path: str) -> dict[str, JsonValue]:
    """Every value by its path, such as ``stage.0.judge``."""
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, part in parts for key, leaf in _flat(part, f"{path}{name}.").items()}
    return {path.removesuffix("."): value}

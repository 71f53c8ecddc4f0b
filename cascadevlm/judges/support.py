"""Support sets: a few labelled images a class, shown to a judge as exemplars."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cascadevlm.base.errors import InputError
from cascadevlm.base.images import image_files, load_image
from cascadevlm.base.labels import LabelSet, words
from cascadevlm.base.types import Candidate, Exemplar


@dataclass(frozen=True)
class SupportSet:
    """Exemplars by the name of their label."""

    exemplars: Mapping[str, tuple[Exemplar, ...]]

    @classmethod
    def read(cls, folder: str | Path, labels: LabelSet, *, shots: int = 1) -> "SupportSet":
        """The first ``shots`` images of every label that has a sub-folder of its name.

        Raises:
            InputError: if no label has any.
            ImageError: if one of the images cannot be read.
        """
        folder = Path(folder)
        named = {words(entry.name): entry for entry in folder.glob("*/")}
        files = {label: image_files(named[label.words])[:shots] for label in labels if label.words in named}
        exemplars = {
            label.name: tuple(Exemplar(image=load_image(path), label=label) for path in paths)
            for label, paths in files.items()
            if paths
        }
        if not exemplars:
            raise InputError(
                f"Support folder {str(folder)!r} has no image of any label.",
                hint="Give it a sub-folder of images for each class, named as the class.",
            )
        return cls(exemplars)

    def of(self, candidates: Iterable[Candidate]) -> tuple[Exemplar, ...]:
        """The exemplars of the candidates, in their order; a class without images has none."""
        return tuple(exemplar for candidate in candidates for exemplar in self.exemplars.get(candidate.label.name, ()))

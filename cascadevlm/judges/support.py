"""Support sets: a few labelled images per class that a judge sees as exemplars."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cascadevlm.base.errors import InputError
from cascadevlm.base.images import image_files, load_image
from cascadevlm.base.labels import LabelSet, words
from cascadevlm.base.types import Candidate, Exemplar


@dataclass(frozen=True)
class SupportSet:
    """The exemplars of each label, by the label's name."""

    exemplars: Mapping[str, tuple[Exemplar, ...]]

    @classmethod
    def read(cls, folder: str | Path, labels: LabelSet, *, shots: int = 1) -> "SupportSet":
        """A support set from a folder that has one sub-folder of images per label. The sub-folder has the name of the label.

        Args:
            folder: the folder.
            labels: the label set. A label without a sub-folder has no exemplar.
            shots: maximum number of exemplars per label. The first images in the order of their names are used.

        Raises:
            InputError: if no label has an image.
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
                f"The support folder {str(folder)!r} has no image of any label.",
                hint="Put the images of each class into a sub-folder with the name of the class.",
            )
        return cls(exemplars)

    def of(self, candidates: Iterable[Candidate]) -> tuple[Exemplar, ...]:
        """The exemplars of the candidates, in the order of the candidates."""
        return tuple(exemplar for candidate in candidates for exemplar in self.exemplars.get(candidate.label.name, ()))

"""Renders images of the held-out species, one folder per species: ``python -m training.render FOLDER --each 20 --seed 2``."""

from pathlib import Path
from typing import Annotated

import typer

from cascadevlm_backends.aviary.birds import individuals, species

TEST_SEED = 2
SAMPLE_SEED = 3


def render_files(folder: Path, *, each: int, seed: int) -> list[tuple[Path, str]]:
    """Write ``each`` PNG files of every held-out species. Return the path and the species' name of each file."""
    kinds = species()[1]
    written = []
    for number, (index, image) in enumerate(individuals(kinds, each, seed)):
        path = folder / kinds[index].name / f"{number // len(kinds):04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        written.append((path, kinds[index].name))
    return written


def main(folder: Path, each: Annotated[int, typer.Option()] = 20, seed: Annotated[int, typer.Option()] = TEST_SEED) -> None:
    """Render images of the held-out species. Seed 1 was used for the training set, and seed 3 for the bundled images."""
    print(f"{len(render_files(folder, each=each, seed=seed))} images in {folder}")


if __name__ == "__main__":
    typer.run(main)

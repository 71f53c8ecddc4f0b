"""Make everything that is bundled: ``python -m training.make``, about two hours on two cores. What is done is not repeated."""

from pathlib import Path

import torch

import cascadevlm_backends.aviary
from training import data, language, scorer, vision
from training.birds import individuals, species
from training.render import SAMPLE_SEED

BUILD = Path(__file__).parent / "build"
AVIARY = Path(next(iter(cascadevlm_backends.aviary.__path__)))
LANGUAGE_STEPS = 2500


def sample_images(folder: Path) -> None:
    """One JPEG of every species held out, named after it."""
    folder.mkdir(exist_ok=True)
    kinds = species()[1]
    for index, image in individuals(kinds, 1, SAMPLE_SEED):
        image.save(folder / f"{kinds[index].name}.jpg", quality=92)


def main() -> None:
    images, labels = data.load(BUILD)
    if not (AVIARY / "scorer" / "open_clip_model.safetensors").exists():
        scorer.train(data.for_scorer(images), labels, AVIARY / "scorer")
    tower = vision.train(images, labels, BUILD / "vision.pt")
    if not (AVIARY / "judge" / "model.safetensors").exists():
        language.train(tower, images, labels, AVIARY / "judge", BUILD, LANGUAGE_STEPS)
    sample_images(AVIARY / "images")
    (AVIARY / "labels.txt").write_text("".join(f"{kind.name}\n" for kind in species()[1]))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()

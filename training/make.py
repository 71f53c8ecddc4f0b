"""Make everything that is bundled: ``python -m training.make``, about two hours on two cores. What is done is not repeated."""

from pathlib import Path

import torch
from safetensors import safe_open

import cascadevlm_backends.aviary
from training import cards, data, language, scorer, vision
from training.birds import individuals, practice_species, species
from training.render import SAMPLE_SEED

BUILD = Path(__file__).parent / "build"
AVIARY = Path(next(iter(cascadevlm_backends.aviary.__path__)))
LANGUAGE_STEPS = 800


def sample_images(folder: Path) -> None:
    """One JPEG of every species held out, named after it."""
    folder.mkdir(exist_ok=True)
    kinds = species()[1]
    for index, image in individuals(kinds, 1, SAMPLE_SEED):
        image.save(folder / f"{kinds[index].name}.jpg", quality=92)


def parameters(weights: Path) -> int:
    with safe_open(weights, framework="pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118  # it is no mapping


def model_cards() -> None:
    """What each model is and is not, beside its weights."""
    scorer_card = cards.SCORER.format(
        parameters=parameters(AVIARY / "scorer" / "open_clip_model.safetensors"), epochs=scorer.EPOCHS
    )
    judge_card = cards.JUDGE.format(
        parameters=parameters(AVIARY / "judge" / "model.safetensors"),
        steps=LANGUAGE_STEPS,
        batch=language.BATCH,
    )
    (AVIARY / "scorer" / "README.md").write_text(scorer_card)
    (AVIARY / "judge" / "README.md").write_text(judge_card)


def main() -> None:
    kinds, practice = species()[0], practice_species()
    images, labels = data.load(BUILD / "species.npy", kinds, each=200, seed=1)
    practice_images, practice_labels = data.load(BUILD / "practice.npy", practice, each=36, seed=5)
    if not (AVIARY / "scorer" / "open_clip_model.safetensors").exists():
        scorer.train(data.for_scorer(images), labels, AVIARY / "scorer")
    if not (AVIARY / "judge" / "model.safetensors").exists():
        tower, heads = vision.new()
        vision.train(tower, heads, images, vision.attributes(kinds)[labels], epochs=6, learning_rate=1e-3)
        vision.train(tower, heads, practice_images, vision.attributes(practice)[practice_labels], epochs=2, learning_rate=6e-4)
        language.train(tower, practice_images, practice_labels, AVIARY / "judge", LANGUAGE_STEPS)
    model_cards()
    sample_images(AVIARY / "images")
    (AVIARY / "labels.txt").write_text("".join(f"{kind.name}\n" for kind in species()[1]))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()

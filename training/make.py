"""Makes all bundled files: ``python -m training.make``. This takes one to two hours on two cores. Finished parts are kept."""

from pathlib import Path

import torch
from safetensors import safe_open

import cascadevlm_backends.aviary
from cascadevlm_backends.aviary.birds import individuals, practice_species, species
from training import cards, data, language, scorer, vision
from training.render import SAMPLE_SEED

BUILD = Path(__file__).parent / "build"
AVIARY = Path(next(iter(cascadevlm_backends.aviary.__path__)))
LANGUAGE_STEPS = 900


def sample_images(folder: Path) -> None:
    """Write one JPEG file of each held-out species, named after the species."""
    folder.mkdir(exist_ok=True)
    kinds = species()[1]
    for index, image in individuals(kinds, 1, SAMPLE_SEED):
        image.save(folder / f"{kinds[index].name}.jpg", quality=92)


def parameters(weights: Path) -> int:
    with safe_open(weights, framework="pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118  # the file is not a mapping


def model_cards() -> None:
    """Write the model card of each model into the folder of its weights."""
    scorer_card = cards.SCORER.format(
        parameters=parameters(AVIARY / "scorer" / "open_clip_model.safetensors"), epochs=scorer.EPOCHS
    )
    judge_card = cards.JUDGE.format(
        parameters=parameters(AVIARY / "judge" / "model.safetensors"),
        epochs=vision.EPOCHS,
        steps=LANGUAGE_STEPS,
        batch=language.BATCH,
    )
    (AVIARY / "scorer" / "README.md").write_text(scorer_card)
    (AVIARY / "judge" / "README.md").write_text(judge_card)


def make_scorer(folder: Path) -> None:
    images, labels = data.load(BUILD / "species.npy", species()[0], each=200, seed=1)
    scorer.train(data.for_scorer(images), labels, folder)


def make_judge(folder: Path) -> None:
    kinds, weights = practice_species(), BUILD / "vision.pt"
    images, labels = data.load(BUILD / "practice.npy", kinds, each=36, seed=5)
    if not weights.exists():
        torch.save(vision.train(images, vision.attributes(kinds)[labels]).state_dict(), weights)
    tower = vision.new()
    tower.load_state_dict(torch.load(weights))
    language.train(tower, images, labels, folder, LANGUAGE_STEPS)


def main() -> None:
    if not (AVIARY / "scorer" / "open_clip_model.safetensors").exists():
        make_scorer(AVIARY / "scorer")
    if not (AVIARY / "judge" / "model.safetensors").exists():
        make_judge(AVIARY / "judge")
    model_cards()
    sample_images(AVIARY / "images")
    (AVIARY / "labels.txt").write_text("".join(f"{kind.name}\n" for kind in species()[1]))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()

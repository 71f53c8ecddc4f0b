"""The model cards of the bundled models."""

SCORER = """# aviary scorer

An open_clip model with {parameters:,} parameters, loaded as `open_clip:aviary`. It has a vision transformer with 4 layers
(28 x 28 pixels, patches of 7 x 7 pixels), a text transformer with 3 layers, a byte-level BPE tokenizer with about 400 tokens,
and embeddings with 96 dimensions.

**Purpose.** It shows and tests cascades without a download. Its resolution is low on purpose: at 28 x 28 pixels, the wing
pattern that distinguishes look-alikes is often not visible, so the scorer is uncertain for such images.

**Limits.** It knows only birds drawn by `aviary/birds.py` and their systematic names. On photographs, and for other names,
its scores have no meaning.

**Data.** 38,400 images of 192 species, drawn by `aviary/birds.py` (seed 1). 48 other species, which form complete families
of look-alikes, were not used in training: the model saw neither their images nor their names. The bundled images and all
figures in the README show these 48 species.

**Training.** `python -m training.make`: {epochs} epochs with CLIP's contrastive loss and AdamW. Each batch has one image of
each species. The weights are stored in half precision. Licence: Apache-2.0, the licence of the project.
"""

JUDGE = """# aviary judge

A `LlavaForConditionalGeneration` with {parameters:,} parameters, loaded as `hf_chat:aviary`. It has a CLIP vision tower with
5 layers (96 x 96 pixels, patches of 12 x 12 pixels), a Llama model with 3 layers, a byte-level BPE tokenizer with about 500
tokens, and a chat template.

**Purpose.** It shows and tests cascades without a download. It is used with the same prompts and the same code as a LLaVA
model with seven billion parameters.

**Limits.** It answers only cascadevlm's own prompts, about birds drawn by `aviary/birds.py`. For any other question or
image, its answer has no meaning. It was trained with 2 to 10 candidates.

**Data.** 28,800 images of 800 species, drawn by `aviary/birds.py` (seed 5): all combinations of attributes, except the
held-out families of look-alikes (same crown, breast and genus). The 48 species of the bundled images and of all figures in
the README belong to the held-out families, so neither their images nor their names were used in training. With fewer training
species, the judge learned to guess the genus from the colours. The images are used in questions made from the project's
prompt templates. Candidates are in random order, and most are look-alikes. "None of these" is offered in two of five
questions and is correct in one of seven. Some questions have reference images, and some ask again after a wrong answer.

**Training.** `python -m training.make`. First, only the vision tower is trained on the four attributes ({epochs} epochs).
Then the tower is frozen, and the language model is trained for {steps:,} steps with {batch} questions each. The weights are
stored in half precision. Licence: Apache-2.0, the licence of the project.
"""

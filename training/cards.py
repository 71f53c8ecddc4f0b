"""The model cards of the bundled pair."""

SCORER = """# aviary scorer

An open_clip model of {parameters:,} parameters, loaded as `open_clip:aviary`: vision transformer of 4 layers on 28 x 28 pixels in
patches of 7, text transformer of 3 layers, a byte-level BPE tokenizer of some 400 tokens, embeddings of 96 dimensions.

**What it is for.** Showing and testing cascades without a download. It is deliberately short-sighted: at 28 pixels the wing
pattern that tells look-alikes apart is often lost, so that its entropy means something.

**What it is not.** A model of the world. It knows birds drawn by `training/birds.py` and their systematic names; on photographs,
and on any other name, its scores mean nothing.

**Data.** 38,400 images of 192 species drawn by that script (seed 1). 48 further species, whole look-alike families of them,
were neither drawn nor named in training; the bundled images and all figures in the README are of those.

**Training.** `python -m training.make`: {epochs} epochs of CLIP's contrastive loss, every batch one image of each species, AdamW.
Stored in half precision. Licence: Apache-2.0, as the project.
"""

JUDGE = """# aviary judge

A `LlavaForConditionalGeneration` of {parameters:,} parameters, loaded as `hf_chat:aviary`: a CLIP vision tower of 5 layers on
96 x 96 pixels in patches of 12 and a Llama of 3 layers, with a byte-level BPE tokenizer of some 500 tokens and a chat template.

**What it is for.** Showing and testing cascades without a download: it is asked through the same prompts and the same code as
a LLaVA of seven billion parameters.

**What it is not.** A model of the world. It answers cascadevlm's own prompts about birds drawn by `training/birds.py`; to any
other question, and about any other picture, it says something about birds. It was trained with 2 to 10 candidates.

**Data.** 28,800 images of 800 species drawn by that script (seed 5): every combination of attributes but the families of
look-alikes (crown, breast and genus) held out. The 48 species of the bundled images and of all figures in the README are in those
families: they were neither drawn nor named in training. Of fewer species the judge learned to guess the genus from the colours
instead of looking. The images are put into questions made of the project's prompt templates: candidates in any order, mostly
look-alikes, "none of these" offered in two questions of five and true in one of seven, some with reference images, some
repairing a wrong answer.

**Training.** `python -m training.make`: first the vision tower alone on the four attributes ({epochs} epochs), then the language
model, the tower frozen, for {steps:,} steps of {batch} questions. Stored in half precision. Licence: Apache-2.0, as the project.
"""

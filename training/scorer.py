"""Trains the aviary scorer: a real open_clip model with 1.5 million parameters, which sees 28 x 28 pixels."""

import json
import random
from pathlib import Path

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch.nn import functional as F

from cascadevlm_backends.aviary.birds import species
from training import tokenizer as tokenizers
from training.data import SCORER_SIZE, Pixels

CONTEXT_LENGTH = 24
TEMPLATES = ("a photo of a {}.", "a {}.", "{}", "a picture of a {}, a kind of bird.", "a close-up photo of a {}.")
EPOCHS = 8
LEARNING_RATE = 1.5e-3
MEAN = STD = (0.5, 0.5, 0.5)


def config(vocabulary: int) -> dict[str, object]:
    return {
        "model_cfg": {
            "embed_dim": 96,
            "vision_cfg": {"image_size": SCORER_SIZE, "patch_size": 7, "width": 128, "head_width": 32, "layers": 4},
            "text_cfg": {
                "context_length": CONTEXT_LENGTH,
                "vocab_size": vocabulary,
                "hf_tokenizer_name": "aviary",
                "width": 128,
                "heads": 4,
                "layers": 3,
                "pool_type": "eos",
                "eos_id": 2,
            },
        },
        "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"},
    }


def _names_for_tokenizer() -> list[str]:
    texts = [template.format(kind.name) for kind in species()[0] for template in TEMPLATES]
    random.Random(0).shuffle(texts)
    return texts


def train(images: Pixels, labels: NDArray[np.int64], folder: Path) -> None:
    """Train with CLIP's contrastive loss. Each batch contains one image of each training species, with a random template."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    tokenizer = tokenizers.train(_names_for_tokenizer(), vocabulary=420, add_eos=True)
    tokenizers.save(tokenizer, folder)
    settings = config(len(tokenizer))
    (folder / "open_clip_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}", load_weights=False)
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    names = [kind.name for kind in species()[0]]
    texts = torch.stack([tokenize([template.format(name) for name in names]) for template in TEMPLATES])

    rows_of = labels.argsort(kind="stable").reshape(len(names), -1)
    each = rows_of.shape[1]
    steps = EPOCHS * each
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    model.train()
    target = torch.arange(len(names))
    for step in range(steps):
        if step % each == 0:
            order = np.stack([rng.permutation(row) for row in rows_of])
        pixels = torch.from_numpy(images[order[:, step % each]]).permute(0, 3, 1, 2).float() / 127.5 - 1
        if rng.random() < 0.5:
            pixels = pixels.flip(3)
        template = torch.from_numpy(rng.integers(len(TEMPLATES), size=len(names)))
        image_features, text_features, scale = model(pixels, texts[template, target])
        logits = scale * image_features @ text_features.T
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
        if step % 100 == 0 or step == steps - 1:
            print(f"scorer step {step}/{steps} loss {loss.item():.3f} scale {scale.item():.1f}", flush=True)
        if step % 400 == 399:
            save(model, folder)
    save(model, folder)


def save(model: torch.nn.Module, folder: Path) -> None:
    """Save the model in half precision, to keep the package small."""
    weights = {name: value.to(torch.float16).contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")

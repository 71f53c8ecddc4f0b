"""First training stage of the judge: its vision tower learns to recognise the four attributes, without language."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from cascadevlm_backends.aviary.birds import BREASTS, CROWNS, GENERA, WINGS, Species
from training.data import JUDGE_SIZE, Pixels

BATCH = 128
EPOCHS = 7
LEARNING_RATE = 1e-3
ATTRIBUTES = {"crown": tuple(CROWNS), "breast": tuple(BREASTS), "wing": WINGS, "genus": tuple(GENERA)}


def config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        image_size=JUDGE_SIZE,
        patch_size=12,
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=5,
    )


def attributes(kinds: Sequence[Species]) -> NDArray[np.int64]:
    """``(S, 4) int64``: one row per species, one column per attribute."""
    rows = [[values.index(getattr(kind, name)) for name, values in ATTRIBUTES.items()] for kind in kinds]
    return np.array(rows)


def to_tensor(images: Pixels) -> torch.Tensor:
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def patches(tower: CLIPVisionModel, pixels: torch.Tensor) -> torch.Tensor:
    """The part of the tower's output that LLaVA uses: the patch tokens of the last layer, without the class token."""
    return tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]


def new() -> CLIPVisionModel:
    torch.manual_seed(0)
    return CLIPVisionModel(config())


def train(images: Pixels, traits: NDArray[np.int64]) -> CLIPVisionModel:
    """Train a vision tower on N images and their ``(N, 4)`` attributes. Linear heads read the attributes from the mean patch."""
    tower = new()
    rng = np.random.default_rng(0)
    sizes = [len(values) for values in ATTRIBUTES.values()]
    heads = nn.Linear(tower.config.hidden_size, sum(sizes))
    targets = torch.from_numpy(traits)
    parameters = [*tower.parameters(), *heads.parameters()]
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    tower.train()
    step = 0
    for _ in range(EPOCHS):
        order = rng.permutation(len(images))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            rows = np.sort(order[start : start + BATCH])
            pixels = to_tensor(images[rows])
            if rng.random() < 0.5:
                pixels = pixels.flip(3)
            logits = heads(patches(tower, pixels).mean(1)).split(sizes, 1)
            loss = torch.stack([F.cross_entropy(x, targets[rows, i]) for i, x in enumerate(logits)]).sum()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            if step % 50 == 0:
                accuracy = [f"{(x.argmax(1) == targets[rows, i]).float().mean():.2f}" for i, x in enumerate(logits)]
                print(f"vision step {step}/{steps} loss {loss.item():.3f} {' '.join(accuracy)}", flush=True)
            step += 1
    return tower

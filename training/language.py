"""Second training stage of the judge: the language model learns to describe the output of the frozen vision tower, and to answer
the prompts."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessor,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

import cascadevlm_prompts
from cascadevlm.base.labels import Label
from cascadevlm.base.types import Candidate, Exemplar, Question
from cascadevlm.judges.prompt import NONE_OF_THESE, packaged_prompt, render
from cascadevlm_backends.aviary.birds import BREASTS, CROWNS, GENERA, WINGS, Species, practice_species
from training import tokenizer as tokenizers
from training import vision
from training.data import JUDGE_SIZE, Pixels

IMAGE_TOKEN = "<image>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<image>{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
PATCHES = (JUDGE_SIZE // 12) ** 2
PROMPTS = {name: packaged_prompt(cascadevlm_prompts, name) for name in ("select", "select_cot", "select_fewshot")}
BATCH = 32
LEARNING_RATE = 2e-3
WORDS = {"colour": sorted({*CROWNS, *BREASTS}), "wing": WINGS, "genus": tuple(GENERA)}
BLANK = Image.new("RGB", (8, 8))


MISREAD = 0.5
"""Probability that an attribute in the model's own text is replaced by another. The model must then look and cannot guess."""


@dataclass(frozen=True)
class Example:
    """A conversation for training.

    Attributes:
        rows: rows of the images of the conversation.
        given: the text before the answer; it is not learned.
        learned: the answer that the model learns.
    """

    rows: list[int]
    given: str
    learned: str


class Curriculum:
    """Makes questions about the practice species, with 2 to 10 candidates in random order. Most candidates are look-alikes.

    No held-out species is named.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, labels: NDArray[np.int64], seed: int) -> None:
        self.tokenizer = tokenizer
        self.labels = labels
        self.random = random.Random(seed)
        self.kinds = practice_species()
        self.rows = {kind: np.flatnonzero(labels == index) for index, kind in enumerate(self.kinds)}
        self.traits = vision.attributes(self.kinds)

    def look_alikes(self, truth: Species, number: int) -> list[Species]:
        """Random other species. A species is more likely if it shares more attributes with the true species."""
        index = self.kinds.index(truth)
        weights = np.exp(self.random.choice((0.0, 1.0, 2.0)) * (self.traits == self.traits[index]).sum(axis=1))
        weights[index] = 0
        rng = np.random.default_rng(self.random.getrandbits(32))
        return [self.kinds[i] for i in rng.choice(len(self.kinds), number, replace=False, p=weights / weights.sum())]

    def draw(self, *, few_shot: bool, repair: bool) -> Example:
        name = "select_fewshot" if few_shot else self.random.choice(("select", "select_cot", "select_cot"))
        truth = self.random.choice(self.kinds)
        offer_none = self.random.random() < 0.4
        absent = offer_none and self.random.random() < 0.35
        number = self.random.randint(2, 4) if few_shot else self.random.choice((2, 3, 4, 5, 5, 5, 6, 7, 8, 10))
        offered = self.look_alikes(truth, number if absent else number - 1) + ([] if absent else [truth])
        self.random.shuffle(offered)
        labels = [Label(name=kind.name) for kind in offered]
        question = Question(
            image=BLANK,
            candidates=tuple(Candidate(label=x, probability=1 / number, rank=rank) for rank, x in enumerate(labels, start=1)),
            prompt=PROMPTS[name],
            exemplars=tuple(Exemplar(image=BLANK, label=label) for label in labels if few_shot),
            offer_none=offer_none,
            rejected=self.rejected(truth) if repair else None,
        )
        reasoning = f"{truth.description}\n" * (PROMPTS[name].reasoning and not repair)
        shown = [*(offered if few_shot else []), truth]
        return Example(
            rows=[int(self.random.choice(self.rows[kind])) for kind in shown],
            given=self.conversation(question),
            learned=f"{reasoning}ANSWER: {NONE_OF_THESE if absent else truth.name}",
        )

    def misread(self, learned: list[int], *, reasoning_only: bool) -> list[int]:
        """The model's own text as it is read in training, with some attributes replaced."""
        words = {self.tokenizer.convert_tokens_to_ids(f"Ġ{word}"): name for name, words in WORDS.items() for word in words}
        by_kind = {name: [i for i, kind in words.items() if kind == name] for name in WORDS}
        end = learned.index(self.tokenizer.convert_tokens_to_ids("ANSWER")) if reasoning_only else len(learned)
        return [
            self.random.choice(by_kind[words[token]]) if i < end and token in words and self.random.random() < MISREAD else token
            for i, token in enumerate(learned)
        ]

    def rejected(self, truth: Species) -> str:
        """A wrong answer, with or without correct reasoning."""
        (wrong,) = self.look_alikes(truth, 1)
        return f"{truth.description}\n" * (self.random.random() < 0.7) + f"ANSWER: {wrong.name}"

    def conversation(self, question: Question) -> str:
        messages = [
            {
                "role": message.role,
                "content": [
                    {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in message.parts
                ],
            }
            for message in render(question)
        ]
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=CHAT_TEMPLATE, add_generation_prompt=True, tokenize=False
        )
        assert isinstance(text, str)
        return text


def train_tokenizer() -> PreTrainedTokenizerFast:
    rng = random.Random(0)
    kinds = practice_species()
    texts = [f"ANSWER: {kind.name}\n{kind.description}\nANSWER: {NONE_OF_THESE}" for kind in kinds]
    texts += [f"{letter}) {kind.name}\n" for kind in kinds for letter in "ABCDEFGHIJK"]
    texts += [f"USER: ASSISTANT: {prompt.text}\n" for prompt in PROMPTS.values()] * 200
    rng.shuffle(texts)
    return tokenizers.train(texts, vocabulary=700, extra=(IMAGE_TOKEN,), add_eos=False)


def build(tower: CLIPVisionModel, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    return model


def processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    size = {"height": JUDGE_SIZE, "width": JUDGE_SIZE}
    images = CLIPImageProcessor(size={"shortest_edge": JUDGE_SIZE}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=12,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )


@torch.inference_mode()
def see(tower: CLIPVisionModel, images: Pixels) -> NDArray[np.float16]:
    """``(N, P, W) float16``: the tower's P patch tokens for each image. They are computed once, because the tower is frozen."""
    tower.eval()
    return np.concatenate(
        [vision.patches(tower, vision.to_tensor(images[i : i + 256])).half().numpy() for i in range(0, len(images), 256)]
    )


def collate(
    model: LlavaForConditionalGeneration, curriculum: Curriculum, seen: NDArray[np.float16], examples: list[Example]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The input embeddings with the image tokens inserted, and the targets. Padding is on the right: no token attends to it."""
    tokenizer, image_token = curriculum.tokenizer, model.config.image_token_id
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    sequences, targets, rows = [], [], []
    for example in examples:
        given = tokenizer(example.given.replace(IMAGE_TOKEN, IMAGE_TOKEN * PATCHES), add_special_tokens=False).input_ids
        learned = tokenizer(example.learned, add_special_tokens=False).input_ids
        read = curriculum.misread(learned, reasoning_only=not example.learned.startswith("ANSWER"))
        sequences.append(torch.tensor([*given, *read, eos]))
        targets.append(torch.tensor([-100] * len(given) + [*learned, eos]))
        rows += example.rows
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad)
    expected = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)
    embedded = model.get_input_embeddings()(ids)
    images = model.model.multi_modal_projector(torch.from_numpy(seen[rows]).float())
    mask = (ids == image_token).unsqueeze(-1).expand_as(embedded)
    return embedded.masked_scatter(mask, images), expected


def train(tower: CLIPVisionModel, images: Pixels, labels: NDArray[np.int64], folder: Path, steps: int) -> None:
    torch.manual_seed(0)
    seen = see(tower, images)
    tokenizer = train_tokenizer()
    model = build(tower, tokenizer)
    curriculum = Curriculum(tokenizer, labels, seed=0)
    language = [p for n, p in model.named_parameters() if "vision_tower" not in n]
    optimizer = torch.optim.AdamW(language, lr=LEARNING_RATE, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    model.train()
    for step in range(steps):
        few_shot = step % 12 == 11
        examples = [curriculum.draw(few_shot=few_shot, repair=step % 20 == 10) for _ in range(BATCH // (3 if few_shot else 1))]
        embedded, targets = collate(model, curriculum, seen, examples)
        hidden = model.model.language_model(inputs_embeds=embedded).last_hidden_state[:, :-1]
        wanted = targets[:, 1:]
        logits = model.lm_head(hidden[wanted != -100])
        loss = F.cross_entropy(logits, wanted[wanted != -100])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(language, 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == steps - 1:
            right = (logits.argmax(1) == wanted[wanted != -100]).float().mean()
            print(f"language step {step}/{steps} loss {loss.item():.3f} tokens right {right:.3f}", flush=True)
        if step % 300 == 299:
            save(model, tokenizer, folder)
    save(model, tokenizer, folder)


def save(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save the model in half precision, to keep the package small."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(folder, state_dict=weights)
    processor(tokenizer).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}, indent=2) + "\n")

"""Second stage of the judge: the language model learns to say what the frozen tower sees and to answer the prompts."""

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
from cascadevlm.labels import Label
from cascadevlm.prompt import NONE_OF_THESE, packaged_prompt, render
from cascadevlm.types import Candidate, Exemplar, Question
from training import tokenizer as tokenizers
from training import vision
from training.birds import Species, species
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
LEARNING_RATE = 1e-3
BLANK = Image.new("RGB", (8, 8))


@dataclass(frozen=True)
class Example:
    """A conversation to learn from: rows of its images, the text up to the answer, and the answer."""

    rows: list[int]
    prompt: str
    answer: str


def answer(kind: Species, chosen: str, *, reasoning: bool) -> str:
    return (f"{kind.description}\n" if reasoning else "") + f"ANSWER: {chosen}"


class Curriculum:
    """Questions about the training species: 2 to 10 candidates, mostly look-alikes, in any order."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, labels: NDArray[np.int64], seed: int) -> None:
        self.tokenizer = tokenizer
        self.labels = labels
        self.kinds = species()[0]
        self.random = random.Random(seed)
        self.rows = [np.flatnonzero(labels == index) for index in range(len(self.kinds))]
        attributes = vision.attributes()
        self.shared = (attributes[:, None] == attributes[None]).sum(-1)

    def negatives(self, truth: int, number: int) -> list[int]:
        """Other species, the more likely the more attributes they share with the truth."""
        weights = np.exp(self.random.choice((0.0, 1.0, 2.0)) * self.shared[truth])
        weights[truth] = 0
        rng = np.random.default_rng(self.random.getrandbits(32))
        return [int(i) for i in rng.choice(len(self.kinds), number, replace=False, p=weights / weights.sum())]

    def draw(self, *, few_shot: bool, repair: bool) -> Example:
        row = self.random.randrange(len(self.labels))
        truth = int(self.labels[row])
        offer_none = self.random.random() < 0.4
        absent = offer_none and self.random.random() < 0.35
        number = self.random.randint(2, 4 if few_shot else 10)
        indices = self.negatives(truth, number if absent else number - 1) + ([] if absent else [truth])
        self.random.shuffle(indices)
        candidates = tuple(
            Candidate(label=Label(name=self.kinds[i].name), probability=1 / number, rank=rank)
            for rank, i in enumerate(indices, start=1)
        )
        references = indices if few_shot else []
        name = "select_fewshot" if few_shot else self.random.choice(("select", "select_cot", "select_cot"))
        question = Question(
            image=BLANK,
            candidates=candidates,
            prompt=PROMPTS[name],
            exemplars=tuple(Exemplar(image=BLANK, label=Label(name=self.kinds[i].name)) for i in references),
            offer_none=offer_none,
            rejected=self.rejected(truth) if repair else None,
        )
        kind = self.kinds[truth]
        chosen = NONE_OF_THESE if absent else kind.name
        reasoning = question.prompt.reasoning and not repair
        text = answer(kind, chosen, reasoning=reasoning)
        rows = [int(self.random.choice(self.rows[i])) for i in references] + [row]
        return Example(rows, self.conversation(question), text)

    def rejected(self, truth: int) -> str:
        wrong = self.kinds[self.negatives(truth, 1)[0]]
        return answer(self.kinds[truth], wrong.name, reasoning=self.random.random() < 0.7)

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
    kinds = species()[0]
    texts = [f"ANSWER: {kind.name}\n{kind.description}\nANSWER: {NONE_OF_THESE}" for kind in kinds]
    texts += [f"{letter}) {kind.name}\n" for kind in kinds for letter in "ABCDEFGHIJK"]
    texts += [f"USER: ASSISTANT: {prompt.text}\n" for prompt in PROMPTS.values()] * 200
    rng.shuffle(texts)
    return tokenizers.train(texts, vocabulary=700, extra=(IMAGE_TOKEN,), add_eos=False)


def build(tower: CLIPVisionModel, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
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
    """The tower's patch tokens of every image, N x patches x width: frozen, so computed once."""
    tower.eval()
    return np.concatenate(
        [vision.patches(tower, vision.to_tensor(images[i : i + 256])).half().numpy() for i in range(0, len(images), 256)]
    )


def collate(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, seen: NDArray[np.float16], examples: list[Example]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings with the images put in, attention mask and targets, right-padded."""
    image_token, pad, eos = model.config.image_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id
    sequences, targets, rows = [], [], []
    for example in examples:
        prompt = tokenizer(example.prompt.replace(IMAGE_TOKEN, IMAGE_TOKEN * PATCHES), add_special_tokens=False).input_ids
        reply = tokenizer(example.answer, add_special_tokens=False).input_ids + [eos]
        sequences.append(torch.tensor(prompt + reply))
        targets.append(torch.tensor([-100] * len(prompt) + reply))
        rows += example.rows
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad)
    expected = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)
    embedded = model.get_input_embeddings()(ids)
    images = model.model.multi_modal_projector(torch.from_numpy(seen[rows]).float())
    mask = (ids == image_token).unsqueeze(-1).expand_as(embedded)
    return embedded.masked_scatter(mask, images), (ids != pad), expected


def train(
    tower: CLIPVisionModel, images: Pixels, labels: NDArray[np.int64], folder: Path, build_folder: Path, steps: int
) -> None:
    torch.manual_seed(0)
    cache = build_folder / "seen.npy"
    if not cache.exists():
        np.save(cache, see(tower, images))
    seen = np.load(cache, mmap_mode="r")
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
        embedded, mask, targets = collate(model, tokenizer, seen, examples)
        hidden = model.model.language_model(inputs_embeds=embedded, attention_mask=mask).last_hidden_state[:, :-1]
        wanted = targets[:, 1:]
        logits = model.lm_head(hidden[wanted != -100])
        loss = F.cross_entropy(logits, wanted[wanted != -100])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(language, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            right = (logits.argmax(1) == wanted[wanted != -100]).float().mean()
            print(f"language step {step}/{steps} loss {loss.item():.3f} tokens right {right:.3f}", flush=True)
        if step % 500 == 499:
            save(model, tokenizer, folder)
    save(model, tokenizer, folder)


def save(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Half precision on disk: the weights are for shipping."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(folder, state_dict=weights)
    processor(tokenizer).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}, indent=2) + "\n")

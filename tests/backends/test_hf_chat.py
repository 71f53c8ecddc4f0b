import asyncio
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from scipy.special import softmax
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    BaseVideoProcessor,
    CLIPImageProcessor,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from cascadevlm.base.errors import BackendError, PermanentError
from cascadevlm.base.labels import Label
from cascadevlm.base.types import Exemplar, Question, Usage, Verdict
from cascadevlm.config.loading import load_judge, load_prompt
from cascadevlm.judges.base import Judge, verdict_from_text
from cascadevlm.judges.prompt import NONE_OF_THESE, options, render
from cascadevlm.testing import JudgeContract, noise, question
from cascadevlm_backends import hf_chat
from cascadevlm_backends.hf_chat import HfChatJudge, _Loaded

TURNS = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{% for part in turn['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,  # large, that the random model answers every question differently
    "max_position_embeddings": 4096,
}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
ROTATION = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
EDGE, CROP = {"shortest_edge": 24}, {"height": 24, "width": 24}
SQUARE = {"height": 32, "width": 32}

Built = tuple[PreTrainedConfig, ProcessorMixin]


def tokenizer(*specials: str, bos: str | None = None, **named: str) -> PreTrainedTokenizerFast:
    """One token for every byte, and the special tokens."""
    tokens = ["<pad>", *TURNS, *specials, *named.values(), *([bos] if bos else [])]
    vocabulary = {token: number for number, token in enumerate([*tokens, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    if bos:
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        bos_token=bos,
        extra_special_tokens=named or [*specials],
    )


def text(tokens: PreTrainedTokenizerFast) -> dict[str, object]:
    ids = {"pad_token_id": tokens.pad_token_id, "eos_token_id": tokens.eos_token_id, "bos_token_id": tokens.bos_token_id}
    return TEXT | {"vocab_size": len(tokens)} | ids


def template(image: str) -> str:
    return CHATML.replace("IMAGE", image)


def llava() -> Built:
    tokens = tokenizer("<image>")
    config = AutoConfig.for_model(
        "llava",
        vision_config=TOWER | {"model_type": "clip_vision_model", "image_size": 24, "patch_size": 12},
        text_config=text(tokens) | {"model_type": "llama"},
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    return config, LlavaProcessor(
        CLIPImageProcessor(size=EDGE, crop_size=CROP),
        tokens,
        patch_size=12,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )


def llava_next() -> Built:
    tokens = tokenizer("<image>")
    grids = [[24, 48], [48, 24], [48, 48]]
    config = AutoConfig.for_model(
        "llava_next",
        vision_config=TOWER | {"model_type": "clip_vision_model", "image_size": 24, "patch_size": 12},
        text_config=text(tokens) | {"model_type": "llama"},
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grids,
        vision_feature_layer=-1,
    )
    return config, LlavaNextProcessor(
        LlavaNextImageProcessor(size=EDGE, crop_size=CROP, image_grid_pinpoints=grids),
        tokens,
        patch_size=12,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )


QWEN_IDS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
QWEN_TEMPLATE = template("<|vision_start|><|image_pad|><|vision_end|>")
QWEN_TOWER = {"depth": 2, "num_heads": 4, "patch_size": 14, "initializer_range": 0.3}


def qwen_config(tokens: PreTrainedTokenizerFast) -> dict[str, object]:
    config: dict[str, object] = {name: tokens.convert_tokens_to_ids(token) for name, token in QWEN_IDS.items()}
    return config | {"text_config": text(tokens) | {"rope_parameters": ROTATION}}


def qwen_processor(kind: type[ProcessorMixin], tokens: PreTrainedTokenizerFast, videos: BaseVideoProcessor) -> ProcessorMixin:
    images = Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56}, patch_size=14)
    return kind(images, tokens, videos, chat_template=QWEN_TEMPLATE)


def qwen2_5_vl() -> Built:
    tokens = tokenizer(*QWEN_IDS.values())
    tower = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "fullatt_block_indexes": [1], "window_size": 56}
    config = AutoConfig.for_model("qwen2_5_vl", vision_config=QWEN_TOWER | tower, **qwen_config(tokens))
    return config, qwen_processor(Qwen2_5_VLProcessor, tokens, Qwen2VLVideoProcessor())


def qwen3_vl() -> Built:
    tokens = tokenizer(*QWEN_IDS.values())
    tower = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "deepstack_visual_indexes": [0]}
    tower |= {"num_position_embeddings": 16}
    config = AutoConfig.for_model("qwen3_vl", vision_config=QWEN_TOWER | tower, **qwen_config(tokens))
    return config, qwen_processor(Qwen3VLProcessor, tokens, Qwen3VLVideoProcessor())


def idefics3() -> Built:
    grid = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokens = tokenizer("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *grid)
    config = AutoConfig.for_model(
        "idefics3",
        vision_config=TOWER | {"image_size": 32, "patch_size": 8},
        text_config=text(tokens) | {"model_type": "llama"},
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        pad_token_id=tokens.pad_token_id,
        scale_factor=2,
    )
    images = Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    return config, Idefics3Processor(images, tokens, image_seq_len=4, chat_template=template("<image>"))


def internvl() -> Built:
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokens = tokenizer(**names, video_token="<video>")
    config = AutoConfig.for_model(
        "internvl",
        vision_config=TOWER | {"image_size": [32, 32], "patch_size": [8, 8]},
        text_config=text(tokens) | {"model_type": "qwen2"},
        image_token_id=tokens.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    images = GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=3)
    return config, InternVLProcessor(
        images, tokens, InternVLVideoProcessor(), image_seq_length=4, chat_template=template("<IMG_CONTEXT>")
    )


def gemma3() -> Built:
    """A model with sliding windows, and a template that writes the first token."""
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokens = tokenizer(**names, bos="<bos>")
    windows = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    config = AutoConfig.for_model(
        "gemma3",
        text_config=text(tokens) | windows,
        vision_config=TOWER | {"image_size": 32, "patch_size": 8},
        mm_tokens_per_image=4,
        boi_token_index=tokens.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokens.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tokens.convert_tokens_to_ids("<image_soft_token>"),
    )
    chat_template = "{{ bos_token }}" + template("<start_of_image>")
    return config, Gemma3Processor(Gemma3ImageProcessor(size=SQUARE), tokens, image_seq_length=4, chat_template=chat_template)


FAMILIES: Mapping[str, Callable[[], Built]] = {
    build.__name__: build for build in (llava, llava_next, qwen2_5_vl, qwen3_vl, idefics3, internvl, gemma3)
}
every_family = pytest.mark.parametrize("family", FAMILIES)
Folders = Callable[[str], str]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The folder of a random model of a family. It is built at first use."""

    @cache
    def built(family: str) -> str:
        folder = tmp_path_factory.mktemp(family)
        config, processor = FAMILIES[family]()
        torch.manual_seed(0)
        AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
        processor.save_pretrained(folder)
        return str(folder)

    return built


@pytest.fixture
def tiny(folders: Folders) -> str:
    return folders("llava")


def exemplars(names: Sequence[str]) -> tuple[Exemplar, ...]:
    return tuple(Exemplar(image=noise(len(name), (len(name) * 9, 40)), label=Label(name=name)) for name in names)


def mixed() -> list[Question]:
    """Questions that differ in the size and number of images, the turns, the length and the limit."""
    short = question(["wren", "owl"], image=noise(1, (24, 90)))
    shown = replace(question(), prompt=load_prompt("select_fewshot"), exemplars=exemplars(["red finch", "blue finch"]))
    again = replace(question(image=noise(3, (70, 70))), rejected="A sparrow, I think.")
    brief = replace(question([f"finch number {i}" for i in range(9)]), prompt=replace(load_prompt("select"), max_tokens=3))
    return [short, shown, again, brief]


def said(verdicts: Sequence[Verdict]) -> list[tuple[str, str | None, str, int, int]]:
    return [(v.outcome, v.label, v.text, v.usage.input_tokens, v.usage.output_tokens) for v in verdicts]


def speaking(judge: HfChatJudge, answer: str, monkeypatch: pytest.MonkeyPatch) -> HfChatJudge:
    """The judge. Its model gives the same answer to every question, followed by padding."""
    loaded = judge._loaded
    tail = torch.tensor([*loaded.tokens(answer), loaded.tokenizer.eos_token_id, *[loaded.tokenizer.pad_token_id] * 3])

    def generate(*, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(sequences=torch.cat([input_ids, tail.expand(len(input_ids), -1)], dim=1))

    monkeypatch.setattr(loaded.model, "generate", generate)
    return judge


class TestGenerateContract(JudgeContract):
    @pytest.fixture(autouse=True, params=FAMILIES)
    def _folder(self, request: pytest.FixtureRequest, folders: Folders) -> None:
        self.folder = folders(request.param)

    def make(self) -> Judge:
        return HfChatJudge(self.folder, device="cpu", max_tokens=6)


class TestLikelihoodContract(JudgeContract):
    @pytest.fixture(autouse=True, params=["llava", "qwen2_5_vl"])
    def _folder(self, request: pytest.FixtureRequest, folders: Folders) -> None:
        self.folder = folders(request.param)

    def make(self) -> Judge:
        return HfChatJudge(self.folder, mode="likelihood", device="cpu")


@every_family
def test_batch_answers_as_one_by_one(family: str, folders: Folders) -> None:
    judge = HfChatJudge(folders(family), device="cpu")
    questions = [replace(q, prompt=replace(q.prompt, max_tokens=min(q.prompt.max_tokens, 16))) for q in mixed()]
    apart = [judge.judge_batch([q])[0] for q in questions]
    assert said(judge.judge_batch(questions)) == said(apart)
    assert len({verdict.text for verdict in apart}) > 1
    assert apart[3].usage.output_tokens <= 3


def likelihoods(folder: str, asked: Question) -> list[float]:
    """The simple way: every answer is written after the prompt, and the whole text is read again, with the images."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    parts = [part for message in render(asked) for part in message.parts]
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [[part for part in parts if not isinstance(part, str)]]
    means = []
    for name in options(asked).values():
        bos = {"add_special_tokens": False} if prompt.startswith("<bos>") else {}
        inputs = processor(text=[f"{prompt}ANSWER: {name}"], images=images, return_tensors="pt", **bos)
        with torch.inference_mode():
            log_probs = model(**inputs).logits[0].double().log_softmax(-1)
        length = len(f" {name}".encode())  # a token a byte
        last = range(inputs["input_ids"].shape[1] - length, inputs["input_ids"].shape[1])
        means.append(float(np.mean([log_probs[at - 1, inputs["input_ids"][0, at]].item() for at in last])))
    return means


@every_family
def test_likelihoods_are_those_of_reading_every_answer_in_full(family: str, folders: Folders) -> None:
    names = ["red finch", "blue-crowned finch", "grey owl", "wren"]
    asked = replace(
        question(names, image=noise(7, (50, 70))),
        prompt=load_prompt("select_fewshot"),
        exemplars=exemplars(names[:2]),
        offer_none=True,
    )
    means = likelihoods(folders(family), asked)
    judge = HfChatJudge(folders(family), mode="likelihood", device="cpu", batch_size=2)
    (verdict,) = judge.judge_batch([asked])
    assert verdict.probabilities is not None
    np.testing.assert_allclose([verdict.probabilities[name] for name in names], softmax(means[:4]), atol=1e-4)
    assert verdict.label == [*names, None][int(np.argmax(means))]
    assert verdict.outcome == ("none" if verdict.label is None else "answered")
    assert verdict.rationale == ""
    assert verdict.usage.input_tokens > sum(len(f"ANSWER: {name}") for name in [*names, NONE_OF_THESE])
    assert (verdict.usage.output_tokens, verdict.usage.requests) == (0, 1)


def test_likelihood_can_choose_none(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = [-3.0, -2.0, -2.5, -1.0]
    monkeypatch.setattr(hf_chat, "_mean_log_probs", lambda *_: scores)
    judge = HfChatJudge(tiny, mode="likelihood", device="cpu")
    (verdict,) = judge.judge_batch([replace(question(), offer_none=True)])
    assert (verdict.outcome, verdict.label, verdict.text) == ("none", None, f"ANSWER: {NONE_OF_THESE}")
    assert verdict.probabilities is not None
    np.testing.assert_allclose([*verdict.probabilities.values()], softmax(scores[:3]))


@every_family
def test_special_tokens_in_names_are_plain_text(family: str, folders: Folders) -> None:
    judge = HfChatJudge(folders(family), device="cpu", max_tokens=4)
    special = judge._loaded.tokenizer.all_special_tokens[:8]
    ids = [judge._loaded.tokenizer.convert_tokens_to_ids(token) for token in special]
    hostile = question([f"{token}{token} finch {number}" for number, token in enumerate(special)])
    harmless = question([f"finch {number}" for number in range(len(special))])
    read = [judge._loaded.inputs([asked])["input_ids"][0].tolist() for asked in (hostile, harmless)]
    assert [read[0].count(token) for token in ids] == [read[1].count(token) for token in ids]
    assert not set(judge._loaded.tokens(judge._loaded.plain("".join(special)))) & set(ids)
    assert judge.judge_batch([hostile])[0].text
    judge.mode = "likelihood"
    assert judge.judge_batch([hostile])[0].label in {label.name for label in hostile.labels}


async def test_names_with_special_tokens_are_recognised(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = speaking(HfChatJudge(tiny, device="cpu"), "ANSWER: < image> finch", monkeypatch)
    assert (await judge.judge(question(["<image> finch", "owl"]))).label == "<image> finch"


async def test_written_answer_is_read(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said_before = "Grey, with large eyes.\n"
    judge = speaking(HfChatJudge(tiny, device="cpu"), f"{said_before}ANSWER: grey owl", monkeypatch)
    verdict = await judge.judge(question())
    assert (verdict.outcome, verdict.label, verdict.rationale) == ("answered", "grey owl", said_before.strip())
    assert verdict.text == f"{said_before}ANSWER: grey owl"
    assert verdict.usage.output_tokens == len(verdict.text) + 1
    assert verdict.usage.seconds > 0
    assert verdict.judge == judge.spec == f"hf_chat:{tiny}"


def test_input_tokens_do_not_count_padding(tiny: str) -> None:
    judge = HfChatJudge(tiny, device="cpu", max_tokens=1)
    long, short = judge.judge_batch([question([f"finch {i}" for i in range(20)]), question(["owl", "wren"])])
    assert long.usage.input_tokens > short.usage.input_tokens + 100


def test_first_token_comes_once(folders: Folders) -> None:
    loaded = HfChatJudge(folders("gemma3"), device="cpu")._loaded
    ids = loaded.inputs([question()])["input_ids"][0].tolist()
    assert ids.count(loaded.tokenizer.bos_token_id) == 1


async def test_sampling_draws_answers(tiny: str) -> None:
    judge = HfChatJudge(tiny, device="cpu", temperature=2.0, max_tokens=12)
    torch.manual_seed(0)
    assert len({(await judge.judge(question())).text for _ in range(3)}) > 1


async def test_half_precision_checkpoint_runs_in_full_precision_on_the_cpu(tiny: str, tmp_path: Path) -> None:
    AutoModelForImageTextToText.from_pretrained(tiny, dtype=torch.float16).save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(tiny).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"
    half, full = (HfChatJudge(model, mode="likelihood", device="cpu") for model in (str(tmp_path), tiny))
    assert half.identity()["dtype"] == "float32"
    assert isinstance(half._loaded.model, torch.nn.Module)
    assert {weight.dtype for weight in half._loaded.model.parameters()} == {torch.float32}
    (verdict,), (expected,) = (judge.judge_batch([question()]) for judge in (half, full))
    assert verdict.probabilities == pytest.approx(expected.probabilities, abs=0.01)


async def test_question_that_cannot_be_processed_fails_alone(folders: Folders) -> None:
    judge = HfChatJudge(folders("qwen2_5_vl"), device="cpu", max_tokens=4)
    endless = question(image=noise(1, (1000, 2)))
    answers = await asyncio.gather(*map(judge.judge, [question(), endless, question()]), return_exceptions=True)
    assert isinstance(answers[1], PermanentError)
    assert "aspect ratio" in str(answers[1])
    assert all(isinstance(answers[position], Verdict) for position in (0, 2))


async def test_batch_too_large_for_the_memory_is_asked_one_by_one(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = HfChatJudge(tiny, device="cpu", max_tokens=4)
    generate = judge._loaded.model.generate

    def small(*, input_ids: torch.Tensor, **inputs: object) -> object:
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(input_ids=input_ids, **inputs)

    monkeypatch.setattr(judge._loaded.model, "generate", small)
    assert all(verdict.text for verdict in await asyncio.gather(*map(judge.judge, mixed()[:2])))
    with pytest.raises(PermanentError, match="batch_size") as caught:
        judge.judge_batch(mixed())
    assert caught.value.__context__ is None


def test_identity_holds_what_changes_an_answer(tiny: str, folders: Folders) -> None:
    def identity(judge: HfChatJudge) -> str:
        judge.spec = "the same"
        return json.dumps(dict(judge.identity()))

    judges = [
        HfChatJudge(tiny, device="cpu"),
        HfChatJudge(tiny, device="cpu", mode="likelihood"),
        HfChatJudge(tiny, device="cpu", temperature=0.5),
        HfChatJudge(tiny, device="cpu", max_tokens=7),
        HfChatJudge(tiny, device="cpu", dtype="bfloat16"),
        HfChatJudge(folders("llava_next"), device="cpu"),
    ]
    assert len({identity(judge) for judge in judges}) == len(judges)
    assert identity(HfChatJudge(tiny, device="cpu", batch_size=2)) == identity(judges[0])


async def test_registry_builds_it(tiny: str) -> None:
    judge = load_judge(f"hf_chat:{tiny}", mode="likelihood", batch_size=4, device="cpu")
    await judge.prepare()
    assert (await judge.judge(question())).judge == f"hf_chat:{tiny}"


async def test_aviary_is_the_bundled_model(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_chat, "AVIARY", Path(tiny))
    judge = HfChatJudge("aviary", device="cpu", max_tokens=2)
    await judge.prepare()
    assert judge.spec == "hf_chat:aviary"


@pytest.mark.parametrize("model", ["no/such-model", "/no/such/folder"])
async def test_unknown_model_fails_early(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BackendError, match=f"'{model}'.* Check the id"):
        await HfChatJudge(model, device="cpu").prepare()


async def test_model_without_images_is_refused(tiny: str, tmp_path: Path) -> None:
    tokens = tokenizer()
    tokens.chat_template = CHATML
    config = AutoConfig.for_model("llama", **text(tokens))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokens.save_pretrained(tmp_path)
    with pytest.raises(BackendError, match="Unrecognized configuration class"):
        await HfChatJudge(str(tmp_path), device="cpu").prepare()


async def test_missing_chat_template_is_named(tiny: str, tmp_path: Path) -> None:
    AutoProcessor.from_pretrained(tiny).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "config.json").write_bytes((Path(tiny) / "config.json").read_bytes())
    with pytest.raises(BackendError, match="has no chat template"):
        await HfChatJudge(str(tmp_path), device="cpu").prepare()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "mllama", "is_encoder_decoder": False}, "mode 'likelihood'"),
        ({"model_type": "t5gemma2", "is_encoder_decoder": True}, "encoder-decoder"),
    ],
)
async def test_models_that_work_otherwise_are_refused(
    config: dict[str, object], reason: str, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SimpleNamespace(config=SimpleNamespace(**config))
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: model)
    with pytest.raises(BackendError, match=reason):
        await HfChatJudge(tiny, mode="likelihood", device="cpu").prepare()


async def test_missing_package_is_named(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(*_: object, **__: object) -> None:
        raise ImportError("Package `num2words` is required to run SmolVLM processor. Install it.")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", from_pretrained)
    with pytest.raises(BackendError, match=r"num2words.*with pip"):
        await HfChatJudge(tiny, device="cpu").prepare()


@pytest.mark.parametrize("wrong", [{"mode": "guess"}, {"dtype": "int8"}, {"device": "abacus"}])
async def test_wrong_options_are_named(wrong: dict[str, str], tiny: str) -> None:
    with pytest.raises(BackendError, match=next(iter(wrong.values()))):
        await load_judge(f"hf_chat:{tiny}", **wrong).prepare()


@pytest.mark.parametrize(
    ("asked", "written", "text", "label"),
    [
        ("<|im_start|>assistant\n", "ANSWER: B<|im_end|>", "ANSWER: B", "blue finch"),
        ("<|im_start|>assistant\n", "[THINK]ANSWER: A[/THINK]B<|im_end|>", "[THINK]ANSWER: A[/THINK]B<|im_end|>", "blue finch"),
        ("<|im_start|>assistant\n[THINK]\n", "ANSWER: A", "[THINK]ANSWER: A", None),
        ("<|im_start|>assistant\n<think>\n", "ANSWER: A\n</think>\nB", "<think>ANSWER: A\n</think>\nB", "blue finch"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n", "ANSWER: B", "ANSWER: B", "blue finch"),
    ],
)
def test_thoughts_of_a_model_are_no_answer(asked: str, written: str, text: str, label: str | None) -> None:
    """The tags of thoughts may be special tokens, and the chat template may have written the opening tag."""
    processor = SimpleNamespace(tokenizer=tokenizer("[THINK]", "[/THINK]"))
    loaded = _Loaded(model=None, processor=processor, control_tokens=re.compile("$"), device="cpu", dtype=torch.float32)  # type: ignore[arg-type]
    read = loaded.text(loaded.tokens(written), question(), asked=loaded.tokens(asked))
    assert read == text
    assert verdict_from_text(read, question(), judge="j", usage=Usage()).label == label

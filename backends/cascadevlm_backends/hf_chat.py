"""``hf_chat:``: vision-language chat models of transformers as judges: LLaVA, Qwen-VL, SmolVLM, InternVL, Gemma and others.

The model is an id on the Hugging Face hub, a folder, or ``aviary`` for the bundled model. The chat template and the image
processing come from the model.
"""

import asyncio
import copy
import inspect
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import numpy as np
from pydantic import JsonValue, NonNegativeFloat, PositiveInt
from scipy.special import softmax

from cascadevlm.base.errors import BackendError, CascadeError, PermanentError
from cascadevlm.base.types import Question, Usage, Verdict
from cascadevlm.judges.answers import after_thoughts
from cascadevlm.judges.base import LocalJudge, verdict_from_text
from cascadevlm.judges.prompt import Message, answer_format, options, render
from cascadevlm_backends._torch import (
    DtypeName,
    check_download,
    choose_device,
    choose_dtype,
    directory_digest,
    hide_progress_in_logs,
)

if TYPE_CHECKING:
    import torch
    from transformers import BatchFeature, Cache, GenerationConfig, PreTrainedTokenizerBase

Mode = Literal["generate", "likelihood"]

LAST_TOKENS = 16
"""Number of tokens at the end of a prompt that are searched for an opening tag of thoughts."""

AVIARY = Path(__file__).parent / "aviary" / "judge"


class _Written(Protocol):
    sequences: "torch.Tensor"
    past_key_values: "Cache"


class _Read(Protocol):
    logits: "torch.Tensor"


class _ChatModel(Protocol):
    """The common interface of the image-text-to-text classes of transformers."""

    generation_config: "GenerationConfig"

    def generate(self, **options: object) -> _Written: ...

    def forward(self, **inputs: object) -> _Read: ...

    def __call__(self, **inputs: object) -> _Read: ...


class _Processor(Protocol):
    tokenizer: "PreTrainedTokenizerBase"
    chat_template: str | dict[str, str]

    def apply_chat_template(self, conversation: list[dict[str, JsonValue]], *, add_generation_prompt: bool) -> str: ...

    def __call__(self, **options: object) -> "BatchFeature": ...


@dataclass(frozen=True)
class _Loaded:
    model: _ChatModel
    processor: _Processor
    control_tokens: re.Pattern[str]
    device: str
    dtype: "torch.dtype"

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return self.processor.tokenizer

    def plain(self, text: str) -> str:
        """The text with a space inside each control token, so that it is only data. The comparison of names ignores spaces."""
        return self.control_tokens.sub(r"\1 ", text)

    def inputs(self, questions: Sequence[Question]) -> "BatchFeature":
        """The model's inputs: one left-padded row per question."""
        conversations = [render(question) for question in questions]
        texts = [
            self.processor.apply_chat_template([self._turn(message) for message in conversation], add_generation_prompt=True)
            for conversation in conversations
        ]
        images = [
            [part for message in conversation for part in message.parts if not isinstance(part, str)]
            for conversation in conversations
        ]
        # If the template writes the BOS token, the processor must not add a second one.
        bos = self.tokenizer.bos_token
        begun = {"add_special_tokens": False} if bos and texts[0].startswith(bos) else {}
        inputs = self.processor(text=texts, images=images, padding=True, return_tensors="pt", **begun)
        return inputs.to(self.device, self.dtype)

    def _turn(self, message: Message) -> dict[str, JsonValue]:
        content: list[JsonValue] = [
            {"type": "text", "text": self.plain(part)} if isinstance(part, str) else {"type": "image"} for part in message.parts
        ]
        return {"role": message.role, "content": content}

    def text(self, tokens: Sequence[int], question: Question, *, asked: Sequence[int]) -> str:
        """The text of an answer without special tokens. If tags of thoughts are among the special tokens, all of them are kept.

        If the chat template opens the thoughts at the end of the prompt, this opening tag is put before the answer.
        """
        last_line = self._decoded(asked[-LAST_TOKENS:], skip_special_tokens=False).strip().rpartition("\n")[2]
        begun = last_line if after_thoughts(last_line, question) is None else ""
        whole = begun + self._decoded(tokens, skip_special_tokens=False)
        has_thoughts = after_thoughts(whole, question) != whole
        return whole if has_thoughts else self._decoded(tokens, skip_special_tokens=True)

    def _decoded(self, tokens: Sequence[int], *, skip_special_tokens: bool) -> str:
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        assert isinstance(text, str)
        return text

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text inside a conversation, without special tokens."""
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return tokens


class HfChatJudge(LocalJudge):
    """A chat model of transformers.

    In mode ``"generate"``, the model writes its answer. In mode ``"likelihood"``, the model writes nothing. The score of an
    option is the mean log-probability of the tokens of its name after "ANSWER:". The softmax of the scores over the candidates
    gives their probabilities. Such a verdict has no rationale, even if the prompt asks for reasoning.

    With greedy decoding, an answer does not depend on the other questions of its batch, except for rounding errors. With a
    ``temperature`` above 0, answers are sampled with torch's global generator.

    Usage counts all tokens that the model reads or writes. Image tokens count, padding does not. The seconds of a batch are
    divided evenly among its questions.

    Args:
        model: an id on the hub, a folder, or ``"aviary"``.
        mode: ``"generate"`` or ``"likelihood"``, see above.
        device: ``"cuda"``, ``"mps"``, ``"cpu"`` or another device of torch. Default: the best available device.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``. Default: the best precision for the device.
        revision: a commit, branch or tag on the hub. Default: the main branch.
        batch_size: maximum number of rows in one call of the model. A row is a question or, in mode ``"likelihood"``, an
            option.
        temperature: sampling temperature. 0 is greedy decoding. Top-k and top-p come from the model's configuration.
        max_tokens: maximum number of tokens of an answer. Default: the limit of the prompt.

    Raises:
        BackendError: at first use, if the model cannot be loaded, has no chat template, or does not support the mode.
    """

    def __init__(
        self,
        model: str,
        *,
        mode: Mode = "generate",
        device: str | None = None,
        dtype: DtypeName = "auto",
        revision: str | None = None,
        batch_size: PositiveInt = 8,
        temperature: NonNegativeFloat = 0.0,
        max_tokens: PositiveInt | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size)
        self.spec = f"hf_chat:{model}"
        self.model = model
        self.mode: Mode = mode
        self.device = device
        self.dtype: DtypeName = dtype
        self.revision = revision
        self.temperature = temperature
        self.max_tokens = max_tokens

    def check(self) -> str:
        return "" if Path(self._source).is_dir() else check_download(self.model, self.model)

    async def prepare(self) -> None:
        await asyncio.to_thread(lambda: (self._loaded, self._identity))

    def identity(self) -> Mapping[str, JsonValue]:
        return self._identity

    def judge_batch(self, questions: Sequence[Question]) -> list[Verdict]:
        import torch

        loaded = self._loaded
        try:
            with torch.inference_mode():
                if self.mode == "likelihood":
                    return [self._weigh(question, loaded) for question in questions]
                return self._write(questions, loaded)
        except CascadeError:
            raise
        except torch.cuda.OutOfMemoryError:
            pass  # raised below without the traceback, which would keep the batch's tensors in memory
        except Exception as exc:  # processors and models raise exceptions of many types
            raise PermanentError(f"{self.model!r} cannot process the question: {_reason(exc)}") from exc
        raise PermanentError(
            f"{self.model!r} ran out of memory.", hint="Use a smaller batch_size, a smaller model, or another dtype."
        )

    def _write(self, questions: Sequence[Question], loaded: _Loaded) -> list[Verdict]:
        started = time.perf_counter()
        limits = [self.max_tokens or answer_format(question).max_tokens for question in questions]
        inputs = loaded.inputs(questions)
        written = loaded.model.generate(
            **inputs,
            **({"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}),
            max_new_tokens=max(limits),
            # The model's own penalty would lower the probability of names in the prompt, and would count the padding.
            repetition_penalty=1.0,
            pad_token_id=loaded.tokenizer.pad_token_id,
            return_dict_in_generate=True,
        ).sequences[:, inputs["input_ids"].shape[1] :]
        seconds = (time.perf_counter() - started) / len(questions)
        verdicts = []
        prompts = inputs["input_ids"].tolist()
        for question, limit, mask, asked, row in zip(
            questions, limits, inputs["attention_mask"], prompts, written.tolist(), strict=True
        ):
            tokens = _until(loaded.model.generation_config.eos_token_id, row[:limit])
            usage = Usage(input_tokens=int(mask.sum()), output_tokens=len(tokens), seconds=seconds, requests=1)
            text = loaded.text(tokens, question, asked=asked)
            verdicts.append(verdict_from_text(text, question, judge=self.spec, usage=usage))
        return verdicts

    def _weigh(self, question: Question, loaded: _Loaded) -> Verdict:
        started = time.perf_counter()
        names = list(options(question).values())
        inputs = loaded.inputs([question])
        prompt = loaded.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=1,
            use_cache=True,
            pad_token_id=loaded.tokenizer.pad_token_id,
            return_dict_in_generate=True,
        ).past_key_values
        # The answer is tokenized separately, so that the prompt has the same tokens as before a written answer. The tokens of
        # the name are the tokens that differ from the tokens of "ANSWER:". A space or punctuation may be merged into them.
        lead = loaded.tokens("ANSWER:")
        answers = [loaded.tokens(f"ANSWER: {loaded.plain(name)}") for name in names]
        scores: list[float] = []
        for start in range(0, len(answers), self.batch_size):
            scores += _mean_log_probs(loaded, copy.deepcopy(prompt), lead, answers[start : start + self.batch_size])
        best = int(np.argmax(scores))
        chosen = question.labels[best].name if best < len(question.labels) else None
        probabilities = softmax(scores[: len(question.labels)]).tolist()
        return Verdict(
            outcome="none" if chosen is None else "answered",
            label=chosen,
            probabilities={label.name: share for label, share in zip(question.labels, probabilities, strict=True)},
            text=f"ANSWER: {names[best]}",
            judge=self.spec,
            usage=Usage(
                input_tokens=inputs["input_ids"].shape[1] + sum(map(len, answers)),
                seconds=time.perf_counter() - started,
                requests=1,
            ),
        )

    @cached_property
    def _identity(self) -> Mapping[str, JsonValue]:
        with _explained(self.model):
            return {
                "judge": self.spec,
                "mode": self.mode,
                "model": self._commit or directory_digest(Path(self._source)),
                "dtype": str(choose_dtype(choose_device(self.device), self.dtype)).removeprefix("torch."),
                "temperature": self.temperature,
                "max_tokens": self.max_tokens,
            }

    @property
    def _source(self) -> str:
        return str(AVIARY) if self.model == "aviary" else self.model

    @cached_property
    def _commit(self) -> str | None:
        """The commit of the revision. None for a folder."""
        from transformers.utils.hub import cached_file, extract_commit_hash

        return extract_commit_hash(cached_file(self._source, "config.json", revision=self.revision), None)

    @cached_property
    def _loaded(self) -> _Loaded:
        if self.mode not in get_args(Mode):
            raise BackendError(f"There is no mode {self.mode!r}.", hint=f"Use one of: {', '.join(get_args(Mode))}.")
        device = choose_device(self.device)
        dtype = choose_dtype(device, self.dtype)
        with _explained(self.model):
            return self._load(device, dtype)

    def _load(self, device: str, dtype: "torch.dtype") -> _Loaded:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        hide_progress_in_logs()
        where = {"revision": self._commit, "trust_remote_code": False}
        processor = AutoProcessor.from_pretrained(self._source, **where)
        if getattr(processor, "chat_template", None) is None:
            raise BackendError(
                f"{self.model!r} has no chat template.",
                hint="Use the chat version of the model. Its name often ends with '-Instruct' or '-it'.",
            )
        model = AutoModelForImageTextToText.from_pretrained(self._source, dtype=dtype, **where)
        if model.config.is_encoder_decoder:
            raise BackendError(f"{self.model!r} is an encoder-decoder model.", hint="Use a decoder-only model.")
        if self.mode == "likelihood" and model.config.model_type == "mllama":  # it needs an image mask for every token
            raise BackendError(f"{self.model!r} does not support mode 'likelihood'.", hint="Use mode 'generate'.")
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return _Loaded(
            model=model.to(device),  # type: ignore[arg-type]  # the decorator of `to` loses `self`
            processor=processor,
            control_tokens=_control_tokens(processor),
            device=device,
            dtype=dtype,
        )


@contextmanager
def _explained(model: str) -> Iterator[None]:
    """Turn every exception during the loading of a model into a BackendError."""
    try:
        yield
    except CascadeError:
        raise
    except ImportError as exc:
        raise BackendError(f"{model!r} needs a package: {_reason(exc)}", hint="Install the package with pip.") from exc
    except Exception as exc:  # the code that reads checkpoints raises exceptions of many types
        raise BackendError(
            f"transformers cannot load {model!r}: {_reason(exc)}",
            hint="Check the id of the model and the connection to the hub, or use a complete model folder.",
        ) from exc


def _reason(exc: Exception) -> str:
    """The first sentence of an error."""
    lines = str(exc).strip().splitlines() or [type(exc).__name__]
    return lines[0].partition(". ")[0].rstrip(".") + "."


def _control_tokens(processor: _Processor) -> re.Pattern[str]:
    """Matches the first character of every text that chat template, processor or tokenizer read as a control token."""
    added = processor.tokenizer.added_tokens_decoder.values()
    tokens = {token.content for token in added if token.special or token.content in str(processor.chat_template)}
    tokens |= {getattr(processor, f"{kind}_token", None) or "" for kind in ("image", "video", "audio")}
    return re.compile(f"(?={'|'.join(re.escape(token) for token in tokens if token.strip())})(.)")


def _until(ends: int | list[int] | None, tokens: list[int]) -> list[int]:
    """The tokens up to the first end token, which is included. Padding may follow it."""
    stops = {ends} if isinstance(ends, int) else set(ends or ())
    return tokens[: next((length for length, token in enumerate(tokens, start=1) if token in stops), len(tokens))]


def _mean_log_probs(loaded: _Loaded, prompt: "Cache", lead: list[int], answers: Sequence[list[int]]) -> list[float]:
    """The score of each answer after the prompt: the mean log-probability of the tokens in which it differs from the lead."""
    import torch

    prompt.reorder_cache(torch.LongTensor([0] * len(answers)))  # one copy of its row per answer
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(answer) for answer in answers], batch_first=True).to(loaded.device)
    # No attention mask is needed: the padding is at the end, and attention is causal.
    named = "cache" if "cache" in inspect.signature(loaded.model.forward).parameters else "past_key_values"  # before 5.24
    logits = loaded.model(input_ids=rows, **{named: prompt}).logits
    log_probs = logits[:, :-1].float().log_softmax(-1).gather(2, rows[:, 1:, None]).squeeze(2)
    means = []
    for row, answer in zip(log_probs, answers, strict=True):
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(lead, answer, strict=False)))
        means.append(row[shared - 1 : len(answer) - 1].mean().item())
    return means

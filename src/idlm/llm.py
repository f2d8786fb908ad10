"""The offline API: prompts in, texts out."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import torch

from idlm.decoding.cycle import Method
from idlm.decoding.layout import LAYOUTS, Layout
from idlm.decoding.metrics import DecodeStats
from idlm.decoding.params import SamplingParams
from idlm.decoding.policy import Policy, plans
from idlm.decoding.verify import check_rule
from idlm.engine.engine import Engine
from idlm.engine.kv_cache import BLOCK_TOKENS, KVCache
from idlm.engine.request import FinishReason, Logprob, Request, Source
from idlm.errors import InvalidRequestError, ResourceError
from idlm.model import checkpoint
from idlm.model.adapter import Adapter
from idlm.model.config import ModelConfig
from idlm.model.cpu import kernels as cpu_kernels
from idlm.model.cuda import stack as cuda_stack
from idlm.model.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int]
Message = dict[str, str]

# Masks in a block of a fully converted model, which does not say what it was trained with.
MOST_MASKS = 3
DEFAULT_ADAPTER = "smollm2-135m-instruct"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class RequestOutput:
    """The result of one prompt.

    Attributes:
        finish_reason: ``stop`` (end token or stop string), ``length``, or ``error``: its forward
            failed, and what there is of it is not all.
        logprobs: per token a dict of token id to `Logprob`; None if not asked for.
        prompt_logprobs: the same for the tokens of the prompt, of which the first has None.
        sources: per token how it came to be: sampled, draft or correction.
        error: what failed, with the finish reason ``error``.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[dict[int, Logprob]] | None
    sources: list[Source]
    stats: DecodeStats
    error: Exception | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


@dataclass(frozen=True)
class Delta:
    """New text and tokens of a stream; ``output`` is set on the last one."""

    text: str
    token_ids: list[int]
    sources: list[Source]
    output: RequestOutput | None = None


class LLM:
    """A model and how it is decoded.

    Args:
        model: folder in Hugging Face form, GGUF file or hub id; None: SmolLM2-135M-Instruct.
        adapter: folder or hub id of an adapter; None: ours for the default model, else none;
            "none": the bare base model, decoded autoregressively.
        stride: tokens that one forward may commit, 1 to 16; ``auto``: the one of every forward is
            chosen by what it costs here and what it brings (`idlm.decoding.policy`).
        layout: ``quadratic``, ``linear`` or ``ar`` (see `idlm.decoding.layout`); ``auto``: chosen
            with the stride, or quadratic if that is given.
        verification: ``rejection`` or ``coupled`` (see `idlm.decoding.verify`); ``auto``: coupled
            where strides are chosen, as only that gives a seed's text again then, else rejection.
        device: ``auto`` (CUDA if there is one), ``cpu``, ``cuda`` or ``cuda:1`` ...
        dtype: ``auto``, ``bfloat16``, ``float16`` or ``float32``.
        max_batch: requests that run at once; more wait.
        kv_cache_tokens: tokens whose keys and values are kept; None: as many as ``max_batch``
            requests of the model's context have, but no more than a share of the free memory.
    Raises:
        IdlmError: an argument or file is not usable; the message says which and what to do.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        adapter: str | Path | None = None,
        *,
        stride: int | str = "auto",
        layout: str = "auto",
        verification: str = "auto",
        device: str = "auto",
        dtype: str = "auto",
        max_batch: int = 32,
        kv_cache_tokens: int | None = None,
    ) -> None:
        rows = _rows(layout, stride)
        if verification != "auto":
            check_rule(verification)
        self.device = _device(device)
        self.dtype = _dtype(dtype, self.device)
        folder = checkpoint.resolve(model)
        config = checkpoint.load_config(folder)
        adapter_folder = _adapter_folder(model, adapter)
        loaded = (
            None
            if adapter_folder is None
            else Adapter.load(adapter_folder, config, device=self.device, dtype=self.dtype)
        )
        if loaded is None and config.mask_token_id is None and rows.num_masks > 0:
            if adapter is None:
                logger.warning(
                    "%s has no adapter: decoding one token per forward. Give adapter=..., or "
                    "convert the model with `idlm convert`.",
                    model,
                )
            rows = Layout.named("ar", 1)
        decoder = checkpoint.load_decoder(folder, device=self.device, dtype=self.dtype)
        if loaded is not None:
            loaded.share_embedding(decoder.embed.weight)
            cuda_stack.prepare(decoder, loaded)
        self.tokenizer = Tokenizer.load(folder)
        self._max_batch = max_batch
        self._plans = plans(MOST_MASKS if loaded is None else loaded.config.block_size)
        self._policies: dict[str, Policy] = {}  # by layout; those over the same weights share them
        self._verification = verification
        # The layout whose strides are chosen; None: nothing is.
        self._chosen = layout if stride == "auto" and rows.num_masks > 0 else None
        longest = max(self._policy.plans if self._policy else [rows], key=lambda x: x.num_rows)
        self._method = Method(decoder, loaded, rows, self._rule(self._chosen))
        self._cache = KVCache(
            config,
            self.device,
            self.dtype,
            kv_cache_tokens,
            wanted=max_batch
            * (config.max_position_embeddings + longest.num_rows + longest.stride + BLOCK_TOKENS),
        )

    @property
    def config(self) -> ModelConfig:
        """Architecture of the base model."""
        return self._method.decoder.config

    @property
    def layout(self) -> Layout:
        """The rows of one forward."""
        return self._method.layout

    @property
    def auto(self) -> bool:
        """Whether the stride, at least, is chosen for every forward."""
        return self._chosen is not None

    @property
    def layouts(self) -> str:
        """The name of `layout`, or of all that is chosen from; ``auto``: any layout is."""
        return self._chosen or self.layout.name

    @property
    def verification(self) -> str:
        """The rule by which drafts are tested."""
        return self._method.rule

    @property
    def max_batch(self) -> int:
        """Requests that run at once."""
        return self._max_batch

    @property
    def adapter(self) -> Adapter | None:
        """What conversion added, None for a bare or fully converted model."""
        return self._method.adapter

    def autoregressive(self) -> LLM:
        """The bare base model over the same weights, one token per forward."""
        return self._with(None, Layout.named("ar", 1), self.verification)

    def with_layout(self, layout: str, stride: int | str, verification: str | None = None) -> LLM:
        """The same model over the same weights in another layout, as in `LLM`.

        Args:
            stride: with ``auto`` it shares what others of the same layout know of their cost.
            verification: None: what was asked for when the model was loaded.
        Raises:
            InvalidRequestError: an argument is wrong, or the model has no adapter for masks.
        """
        chosen = layout if stride == "auto" and layout != "ar" else None
        rule = self._rule(chosen) if verification is None else check_rule(verification)
        return self._with(self._method.adapter, _rows(layout, stride), rule, chosen)

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raise `InvalidRequestError` for a request that cannot be run."""
        self._engine.check(prompt_token_ids, params)

    def new_engine(self) -> Engine:
        """An engine over the same weights and cache, for a caller that steps it by itself."""
        return Engine(
            self._method,
            self.tokenizer,
            cache=self._cache,
            device=self.device,
            max_batch=self._max_batch,
            policy=self._policy,
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continue one or many prompts, each a string or a list of token ids.

        Args:
            sampling_params: one for all prompts, or one each; None: `SamplingParams()`.
        Returns:
            One output per prompt, in their order.
        Raises:
            InvalidRequestError: before any work is done.
        """
        many = _as_prompts(prompts)
        texts = [p if isinstance(p, str) else None for p in many]
        ids = [self.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in many]
        return self._run(texts, ids, sampling_params)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them; see `generate`.

        Raises:
            InvalidRequestError: also if the model has no chat template.
        """
        many = _as_conversations(messages)
        ids = [self.tokenizer.apply_chat_template(m) for m in many]
        return self._run([None] * len(ids), ids, sampling_params)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[Delta]:
        """Continue one prompt, as an iterator of what is new after each forward."""
        text = prompt if isinstance(prompt, str) else None
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        return self._stream(text, ids, sampling_params)

    def stream_chat(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> Iterator[Delta]:
        """Answer one conversation; see `stream`."""
        return self._stream(
            None, self.tokenizer.apply_chat_template(list(messages)), sampling_params
        )

    @cached_property
    def _engine(self) -> Engine:
        """What `generate` and `stream` run on; made when it is first needed."""
        return self.new_engine()

    def _rule(self, chosen: str | None) -> str:
        """How drafts are tested where strides of the layout ``chosen`` are chosen, or none are."""
        if self._verification != "auto":
            return self._verification
        return "rejection" if chosen is None else "coupled"

    @property
    def _policy(self) -> Policy | None:
        """What chooses."""
        if self._chosen is None:
            return None
        if self._chosen not in self._policies:
            names = LAYOUTS if self._chosen == "auto" else ("ar", self._chosen)
            self._policies[self._chosen] = Policy([x for x in self._plans if x.name in names])
        return self._policies[self._chosen]

    def _with(
        self, adapter: Adapter | None, layout: Layout, rule: str, chosen: str | None = None
    ) -> LLM:
        other = object.__new__(LLM)
        other.__dict__.update(self.__dict__)
        other.__dict__.pop("_engine", None)
        if adapter is None and self.config.mask_token_id is None and layout.num_masks > 0:
            raise InvalidRequestError("This model has no adapter; only layout 'ar' can be decoded.")
        other._chosen = chosen
        other._method = Method(self._method.decoder, adapter, layout, rule)
        return other

    def _run(
        self,
        texts: Sequence[str | None],
        ids: Sequence[list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[RequestOutput]:
        params = _each(sampling_params, len(ids))
        for prompt, p in zip(ids, params, strict=True):
            self._engine.check(prompt, p)
        requests = [self._engine.add(prompt, p) for prompt, p in zip(ids, params, strict=True)]
        left = deque(requests)
        try:
            while left:
                if left[0].finished:  # to look at all of them takes long where there are many
                    left.popleft()
                else:
                    self._step()
        finally:
            for request in requests:
                self._engine.abort(request)
        return [_output(text, r) for text, r in zip(texts, requests, strict=True)]

    def _step(self) -> None:
        if not self._engine.step():
            raise ResourceError(
                "Streams of the same model in another layout hold all of the KV cache; end or "
                "close them, or raise kv_cache_tokens."
            )

    def _stream(
        self, text: str | None, ids: list[int], sampling_params: SamplingParams | None
    ) -> Iterator[Delta]:
        params = sampling_params or SamplingParams()
        self._engine.check(ids, params)  # now, not when the first delta is asked for
        return self._deltas(text, ids, params)

    def _deltas(
        self, prompt: str | None, ids: list[int], params: SamplingParams
    ) -> Iterator[Delta]:
        request = self._engine.add(ids, params)
        tokens = characters = 0
        output = None
        try:
            while output is None:
                # Another stream of this LLM may have moved this request on, even to its end.
                while len(request.token_ids) == tokens and not request.finished:
                    self._step()
                if request.error is not None:
                    raise request.error
                new = slice(tokens, len(request.token_ids))
                text = request.text[characters:]
                tokens, characters = new.stop, len(request.text)
                output = _output(prompt, request) if request.finished else None
                yield Delta(text, request.token_ids[new], request.sources[new], output)
        finally:
            self._engine.abort(request)


def _output(prompt: str | None, request: Request) -> RequestOutput:
    assert request.finish_reason is not None
    return RequestOutput(
        prompt=prompt,
        prompt_token_ids=request.prompt_token_ids,
        text=request.text,
        token_ids=request.token_ids,
        finish_reason=request.finish_reason,
        logprobs=None if request.params.logprobs is None else request.logprobs,
        sources=request.sources,
        stats=request.stats,
        error=request.error,
        prompt_logprobs=None if request.params.prompt_logprobs is None else request.prompt_logprobs,
    )


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    # Any iterable would do, but a dict would lose its values and bytes would become token ids.
    many = list(prompts) if isinstance(prompts, (list, tuple)) else [None]
    if not many:
        raise InvalidRequestError("prompts is empty; give at least one prompt.")
    if all(isinstance(p, int) for p in many):
        return [many]  # type: ignore[list-item]
    if not all(isinstance(p, (str, list, tuple)) for p in many):
        raise InvalidRequestError(
            "prompts must be a string, a list of token ids, or a list of either."
        )
    return many  # type: ignore[return-value]


def _as_conversations(
    messages: Sequence[Message] | Sequence[Sequence[Message]],
) -> list[list[Message]]:
    many = list(messages)
    if not many:
        raise InvalidRequestError("messages is empty; give at least one message.")
    if all(isinstance(m, dict) for m in many):
        return [many]  # type: ignore[list-item]
    return [list(m) for m in many]  # type: ignore[arg-type]


def _each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None:
        return [SamplingParams()] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise InvalidRequestError(
            f"{len(params)} sampling_params for {count} prompts; give one, or one each."
        )
    return list(params)


def _rows(layout: str, stride: int | str) -> Layout:
    """The rows of a forward; with a stride ``auto``, of those for which nothing is chosen."""
    name = "quadratic" if layout == "auto" else layout
    return Layout.named(name, 4 if stride == "auto" else stride)  # type: ignore[arg-type]


def _adapter_folder(model: str | Path | None, adapter: str | Path | None) -> Path | None:
    if adapter == "none":
        return None
    if adapter is not None:
        return checkpoint.resolve(adapter)
    if model is not None:
        return None
    return Path(str(files("idlm") / "adapters" / DEFAULT_ADAPTER))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidRequestError(
            f"device must be auto, cpu, cuda or cuda:N, not {name!r}."
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidRequestError(
            f"There is no device {name!r}: {torch.cuda.device_count()} CUDA devices found; use cpu."
        )
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        fast = device.type == "cuda" or cpu_kernels.available()
        return torch.bfloat16 if fast else torch.float32
    if name not in DTYPES:
        raise InvalidRequestError(f"dtype must be auto, {', '.join(DTYPES)}, not {name!r}.")
    return DTYPES[name]

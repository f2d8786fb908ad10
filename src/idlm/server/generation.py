"""From a request body to jobs, and from their updates to the end of the request."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from idlm.decoding.params import SamplingParams
from idlm.llm import LLM
from idlm.model.tokenizer import Detokenizer
from idlm.server.errors import ApiError
from idlm.server.limits import Limits
from idlm.server.protocol import (
    ChatCompletionBody,
    CompletionBody,
    GenerationBody,
    JsonObjectFormat,
    JsonSchemaFormat,
    ResponseFormat,
    Usage,
)
from idlm.server.worker import Inbox, Job, MethodKey, Progress, Update, Worker

COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions


@dataclass(frozen=True)
class Prompt:
    """A prompt; for ``echo`` also its text, and at which character of that each token begins."""

    token_ids: list[int]
    text: str = ""
    offsets: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What a body asks for: ``n`` choices for each prompt."""

    prompts: list[Prompt]
    params: SamplingParams
    n: int
    method: MethodKey


class Planner:
    """Checks bodies against the model and the limits; every refusal is an `ApiError`."""

    def __init__(self, llm: LLM, method: MethodKey, limits: Limits, name: str) -> None:
        self._llm, self._method, self._limits, self._name = llm, method, limits, name

    def chat(self, body: ChatCompletionBody) -> Plan:
        """The plan for a conversation."""
        self.check_model(body.model)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true.", param="top_logprobs")
        params = self._params(
            body,
            body.max_completion_tokens or body.max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        messages = [
            {"role": "system" if m.role == "developer" else m.role, "content": m.text}
            for m in body.messages
        ]
        prompt = Prompt(self._llm.tokenizer.apply_chat_template(messages))
        return self._plan(body, [prompt], params, "messages")

    def completion(self, body: CompletionBody) -> Plan:
        """The plan for plain prompts."""
        self.check_model(body.model)
        limit = min(COMPLETION_TOKENS, self._limits.max_output_tokens or COMPLETION_TOKENS)
        params = self._params(
            body,
            limit if body.max_tokens is None else body.max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
        )
        prompts = [self._prompt(p, bool(body.echo)) for p in _each_prompt(body.prompt)]
        return self._plan(body, prompts, params, "prompt")

    def check_model(self, name: str | None) -> None:
        """Raise `ApiError` (404) unless ``name`` is the served model's, or None."""
        if name is not None and name != self._name:
            raise ApiError(
                404,
                f"There is no model {name!r} here; this server has {self._name!r}.",
                param="model",
                code="model_not_found",
            )

    def _prompt(self, prompt: str | list[int], echo: bool) -> Prompt:
        tokenizer = self._llm.tokenizer
        if isinstance(prompt, str):
            ids, ends = tokenizer.encode_with_ends(prompt, add_special_tokens=True)
            return Prompt(ids, prompt, _starts(ends))
        if not echo:
            return Prompt(prompt)
        detokenizer = Detokenizer(tokenizer)
        ends = list(accumulate(len(detokenizer.push(token)) for token in prompt))
        return Prompt(prompt, tokenizer.decode(prompt), _starts(ends))

    def _params(
        self,
        body: GenerationBody,
        max_tokens: int | None,
        *,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        limit = self._limits.max_output_tokens
        context = self._llm.config.max_position_embeddings
        most = context if limit is None else min(limit, context)
        if max_tokens is not None and max_tokens > most:
            raise ApiError(
                400,
                f"max_tokens is {max_tokens}; this server gives at most {most}.",
                param="max_tokens",
                code="max_tokens_exceeded",
            )
        given: dict[str, Any] = {
            "temperature": body.temperature,
            "top_k": body.top_k,
            "top_p": body.top_p,
            "min_p": body.min_p,
            "repetition_penalty": body.repetition_penalty,
            "presence_penalty": body.presence_penalty,
            "frequency_penalty": body.frequency_penalty,
            "logit_bias": None if body.logit_bias is None else _token_ids(body.logit_bias),
            "seed": body.seed,
            "stop": body.stop,
            "stop_token_ids": body.stop_token_ids,
            "ignore_eos": body.ignore_eos,
            "json_schema": _schema(body.response_format),
            "regex": body.guided_regex,
        }
        params = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(
            max_tokens=most if max_tokens is None else max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            **params,
        )

    def _plan(
        self, body: GenerationBody, prompts: list[Prompt], params: SamplingParams, param: str
    ) -> Plan:
        limits, n = self._limits, body.n or 1
        if n * len(prompts) > limits.max_choices:
            raise ApiError(
                400,
                f"{len(prompts)} prompts x n = {n} are more than the {limits.max_choices} texts "
                "that one request may ask for; send several requests.",
                param="n",
            )
        longest = max(len(p.token_ids) for p in prompts)
        context = self._llm.config.max_position_embeddings
        most = min(limits.max_prompt_tokens or context, context - 1)
        if longest > most:
            raise ApiError(
                400,
                f"The prompt has {longest} tokens; this server takes at most {most}. Shorten it.",
                param=param,
                code="context_length_exceeded",
            )
        for prompt in prompts:
            self._llm.check(prompt.token_ids, params)
        return Plan(prompts, params, n, self._chosen_method(body))

    def _chosen_method(self, body: GenerationBody) -> MethodKey:
        own = self._method
        stride = own.stride if body.stride is None else body.stride
        layout = "auto" if own.layout == "ar" else own.layout
        rule = body.verification or own.verification
        return MethodKey.of(self._llm.with_layout(layout, stride, rule))  # or it says why not


def _each_prompt(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise ApiError(400, "The prompt is empty; give at least one.", param="prompt")
    if isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def _starts(ends: list[int]) -> list[int]:
    """Where each token's piece of a text begins: where that of the one before it ended."""
    return [0, *accumulate(ends[:-1], max)][: len(ends)]


def _schema(format: ResponseFormat | None) -> dict[str, Any] | None:
    if isinstance(format, JsonSchemaFormat):
        return format.json_schema.schema_
    return {"type": "object"} if isinstance(format, JsonObjectFormat) else None


def _token_ids(bias: dict[str, float]) -> dict[int, float]:
    # Digits only: int() would take "1_0" and " 1".
    wrong = next((key for key in bias if not (key.isascii() and key.isdigit())), None)
    if wrong is not None or any(len(key) > 10 for key in bias):
        raise ApiError(
            400, "The keys of logit_bias must be token ids, such as '123'.", param="logit_bias"
        )
    return {int(key): value for key, value in bias.items()}


class Generation:
    """The jobs of one HTTP request.

    Args:
        streamed: what comes of them is wanted as it comes.
        detailed: how each token came to be is wanted.
    """

    def __init__(self, plan: Plan, worker: Worker, *, streamed: bool, detailed: bool) -> None:
        self.plan, self._worker = plan, worker
        inbox = Inbox(asyncio.get_running_loop())
        self.jobs = [
            Job(
                p * plan.n + i,
                prompt.token_ids,
                _seeded(plan.params, i),
                plan.method,
                inbox,
                streamed,
                detailed,
            )
            for p, prompt in enumerate(plan.prompts)
            for i in range(plan.n)
        ]
        self._inbox, self._open = inbox, set(self.jobs)
        self._tokens, self._progress = Counter[int](), dict[int, Progress]()

    def submit(self) -> None:
        """Queue all jobs.

        Raises:
            ApiError: they are not taken; see `Worker.submit`.
        """
        self._worker.submit(self.jobs)

    def close(self) -> None:
        """End the jobs that have not ended."""
        self._worker.cancel([job for job in self._open if job.submitted])

    async def batches(self) -> AsyncIterator[list[Update]]:
        """All updates of all choices until the last one, as many at a time as there are.

        Raises:
            Exception: what a job failed with.
        """
        while self._open:
            updates = await self._inbox.get()
            for update in updates:
                if update.last:
                    self._open.discard(update.job)
                if update.error is not None:
                    raise update.error
                self._tokens[update.job.index] += len(update.token_ids)
                if update.progress is not None:
                    self._progress[update.job.index] = update.progress
            yield updates

    async def updates(self) -> AsyncIterator[Update]:
        """The same one by one."""
        async for updates in self.batches():
            for update in updates:
                yield update

    @property
    def usage(self) -> Usage:
        """Tokens so far; per forward as far as that is known."""
        prompt = sum(len(p.token_ids) for p in self.plan.prompts)
        tokens = self._tokens.total()
        forwards = sum(p.forwards for p in self._progress.values())
        counted = sum(p.tokens for p in self._progress.values())
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=tokens,
            total_tokens=prompt + tokens,
            tokens_per_forward=counted / forwards if forwards else None,
        )

    @property
    def log(self) -> dict[str, Any]:
        """What a log may say of it: counts and times, no text."""
        usage, submitted = self.usage, [job.submitted for job in self.jobs if job.submitted]
        first = [job.first_token for job in self.jobs if job.first_token]
        return {
            **usage.model_dump(),
            "choices": len(self.jobs),
            "stride": self.plan.method.stride,
            "seconds_to_first_token": round(min(first) - min(submitted), 4) if first else None,
        }


def _seeded(params: SamplingParams, choice: int) -> SamplingParams:
    """Choice ``i`` gets ``seed + i``, kept within 64 bits."""
    if params.seed is None or choice == 0:
        return params
    return replace(params, seed=(params.seed + choice + 2**63) % 2**64 - 2**63)

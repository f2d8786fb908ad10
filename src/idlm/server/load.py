"""Load on a server with OpenAI's API, of whatever make, and what it was like for the clients.

Closed loop: so many clients, each of which asks again as soon as it has its answer. Open loop:
requests come by a Poisson process, whether or not the server keeps up.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

from idlm.errors import InvalidRequestError, ResourceError

PROMPTS = (
    "Why is the sky blue?",
    "List ten tips for a healthy life.",
    "Write a short story about a lighthouse keeper.",
    "Explain how a bicycle stays upright.",
    "What are the first twelve prime numbers?",
    "Write a Python function that reverses a list.",
    "Summarise what photosynthesis does.",
    "Compare tea with coffee.",
)


@dataclass(frozen=True)
class Target:
    """A server and what every request asks of it.

    Attributes:
        url: with or without ``/v1``.
        model: None: the first that the server lists.
        variants: so many different requests, over and over; None: no two have the same seed.
        extra: further fields of the body.
    """

    url: str
    model: str | None = None
    api_key: str | None = None
    prompts: Sequence[str] = PROMPTS
    max_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    variants: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    timeout: float = 300.0


@dataclass(frozen=True)
class Pattern:
    """How requests come: by ``clients`` (closed loop) or at ``rate`` per second (open loop).

    It ends after ``requests`` or ``seconds``, whichever comes first; what runs then is finished.

    Attributes:
        leave: share of the clients that disconnect in mid-answer.
    """

    clients: int | None = None
    rate: float | None = None
    requests: int | None = None
    seconds: float | None = None
    leave: float = 0.0

    @property
    def name(self) -> str:
        """For tables."""
        if self.rate is not None:
            return f"{self.rate:g} per s"
        return f"{self.clients} client{'' if self.clients == 1 else 's'}"


@dataclass
class Sample:
    """One request; times in seconds by `time.perf_counter`.

    Attributes:
        number: from 0, or that of the variant; request ``i`` has prompt ``i`` (in turn) and seed
            ``seed + i``.
        first, last: when the first and last piece of text came.
        tokens: as the server says, or the number of pieces if it says nothing.
        error: None, or what went wrong.
        left: the client disconnected on purpose.
    """

    number: int
    started: float
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    text: str = ""
    error: str | None = None
    left: bool = False


@dataclass(frozen=True)
class Spread:
    """Mean and percentiles."""

    mean: float
    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None: there are no values."""
        if not values:
            return None
        ordered = sorted(values)

        def percentile(share: float) -> float:
            """By linear interpolation between the closest ranks."""
            place = share * (len(ordered) - 1)
            low = int(place)
            high = min(low + 1, len(ordered) - 1)
            return ordered[low] + (place - low) * (ordered[high] - ordered[low])

        return cls(statistics.fmean(values), percentile(0.5), percentile(0.95), percentile(0.99))


@dataclass(frozen=True)
class Summary:
    """What one pattern was like.

    Attributes:
        ttft: seconds to the first piece of text.
        tpot: seconds per token after the first one.
        latency: seconds to the end.
        errors: kinds of errors and how many.
    """

    load: str
    requests: int
    finished: int
    left: int
    errors: dict[str, int]
    seconds: float
    tokens: int
    tokens_per_second: float
    requests_per_second: float
    ttft: Spread | None
    tpot: Spread | None
    latency: Spread | None

    @classmethod
    def of(cls, pattern: Pattern, samples: Sequence[Sample], seconds: float) -> Summary:
        """The summary of all samples of a pattern that took ``seconds``."""
        finished = [s for s in samples if s.error is None and not s.left]
        errors: dict[str, int] = {}
        for sample in samples:
            if sample.error is not None:
                errors[sample.error] = errors.get(sample.error, 0) + 1
        tokens = sum(s.tokens for s in samples)
        return cls(
            load=pattern.name,
            requests=len(samples),
            finished=len(finished),
            left=sum(s.left for s in samples),
            errors=errors,
            seconds=seconds,
            tokens=tokens,
            tokens_per_second=tokens / seconds,
            requests_per_second=len(finished) / seconds,
            ttft=Spread.of([s.first - s.started for s in finished if s.first]),
            tpot=Spread.of([(s.last - s.first) / (s.tokens - 1) for s in finished if s.tokens > 1]),
            latency=Spread.of([s.last - s.started for s in finished if s.last]),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


class Load:
    """Sends patterns of requests to a target; use it as an async context."""

    def __init__(self, target: Target) -> None:
        self._target = target
        key = target.api_key
        base = target.url.rstrip("/").removesuffix("/v1")
        if not base.startswith(("http://", "https://")):
            raise InvalidRequestError(f"The URL must begin with http:// or https://, not {base!r}.")
        self._client = httpx.AsyncClient(
            base_url=base,
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=target.timeout,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )
        self._model = target.model
        self._numbers = itertools.count()
        self._random = random.Random(target.seed)

    async def __aenter__(self) -> Load:
        if self._model is None:
            self._model = await self._first_model()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def run(self, pattern: Pattern) -> list[Sample]:
        """All requests of a pattern."""
        if pattern.rate is None:
            return await self._closed(pattern)
        return await self._open(pattern)

    async def warm_up(self) -> None:
        """One request that is not counted.

        Raises:
            ResourceError: it failed, so that the others would fail as well.
        """
        sample = await self._request(0, None)
        if sample.error is not None:
            raise ResourceError(f"The server at {self._target.url} fails: {sample.error}.")

    async def _first_model(self) -> str:
        try:
            response = await self._client.get("/v1/models")
            response.raise_for_status()
            return str(response.json()["data"][0]["id"])
        except (httpx.HTTPError, ValueError, LookupError) as error:
            raise ResourceError(
                f"No model list at {self._target.url}/v1/models ({error or type(error).__name__}); "
                "check the URL, or name a model."
            ) from error

    async def _closed(self, pattern: Pattern) -> list[Sample]:
        samples: list[Sample] = []
        turns = self._turns(pattern)

        async def client() -> None:
            for number in turns:
                samples.append(await self._request(number, self._patience(pattern)))

        assert pattern.clients is not None
        await asyncio.gather(*(client() for _ in range(pattern.clients)))
        return samples

    async def _open(self, pattern: Pattern) -> list[Sample]:
        assert pattern.rate is not None
        tasks: list[asyncio.Task[Sample]] = []
        due = time.perf_counter()
        for number in self._turns(pattern):
            tasks.append(asyncio.create_task(self._request(number, self._patience(pattern))))
            due += self._random.expovariate(pattern.rate)
            await asyncio.sleep(max(due - time.perf_counter(), 0))
        return list(await asyncio.gather(*tasks))

    def _turns(self, pattern: Pattern) -> Iterator[int]:
        """Numbers of requests until the pattern ends; clients share the iterator."""
        end = None if pattern.seconds is None else time.perf_counter() + pattern.seconds
        for count in itertools.count():
            over = end is not None and time.perf_counter() >= end
            if over or (pattern.requests is not None and count >= pattern.requests):
                return
            number = next(self._numbers)
            yield number % self._target.variants if self._target.variants else number

    def _patience(self, pattern: Pattern) -> int | None:
        """Pieces of text after which the client leaves; None: it stays."""
        if self._random.random() >= pattern.leave:
            return None
        return self._random.randrange(1, max(self._target.max_tokens // 2, 2))

    async def _request(self, number: int, patience: int | None) -> Sample:
        target = self._target
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": target.prompts[number % len(target.prompts)]}],
            "max_tokens": target.max_tokens,
            "temperature": target.temperature,
            "seed": target.seed + number,
            "stream": True,
            "stream_options": {"include_usage": True},
            **target.extra,
        }
        sample = Sample(number, time.perf_counter())
        pieces = 0
        try:
            async with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    sample.error = f"status {response.status_code}"
                    return sample
                async for event in _events(response):
                    if "error" in event:
                        sample.error = str(event["error"].get("code") or "error in the stream")
                        return sample
                    if usage := event.get("usage"):
                        sample.tokens = usage["completion_tokens"]
                    choices = event.get("choices")
                    text = (choices[0]["delta"].get("content") or "") if choices else ""
                    if text:
                        sample.last = time.perf_counter()
                        sample.first = sample.first or sample.last
                        sample.text += text
                        pieces += 1
                    if patience is not None and pieces >= patience:
                        sample.left = True
                        break
        except (httpx.HTTPError, ValueError, LookupError) as error:
            sample.error = type(error).__name__
        sample.tokens = sample.tokens or pieces
        return sample


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON of server-sent events up to ``[DONE]``.

    Raises:
        ValueError: the stream ended before.
    """
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith("data:"):
            yield json.loads(line.removeprefix("data:"))
    raise ValueError("the stream ended without [DONE]")


async def measure(target: Target, patterns: Sequence[Pattern]) -> list[Summary]:
    """The summaries of ``patterns``, run one after the other after a warm-up.

    Raises:
        InvalidRequestError: the URL is none.
        ResourceError: there is no such server, or it fails.
    """
    summaries = []
    async with Load(target) as load:
        await load.warm_up()
        for pattern in patterns:
            start = time.perf_counter()
            samples = await load.run(pattern)
            summaries.append(Summary.of(pattern, samples, time.perf_counter() - start))
    return summaries

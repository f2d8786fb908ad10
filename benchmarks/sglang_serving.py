"""SGLang with and without I-DLM: the same texts? how many tokens per second and per forward?

    python benchmarks/sglang_serving.py --concurrency 1 8 32 64 --seconds 8 -- \\
        --attention-backend triton --sampling-backend pytorch --grammar-backend none

What follows ``--`` goes to both servers. Greedy; every text has ``--tokens`` tokens: with few of
them, most of the time goes to reading prompts.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx

from idlm.llm import DEFAULT_ADAPTER
from idlm.model.checkpoint import resolve
from idlm.model.tokenizer import Tokenizer

TASKS = (
    "Explain in a few sentences what {} is.",
    "Write a short story about {}.",
    "List five facts about {}.",
    "Write a poem about {}.",
    "What should a child know about {}?",
)
TOPICS = ("rain", "a lighthouse", "gravity", "bread", "the moon", "a market", "trees", "music")
START_SECONDS = 240


@dataclass(frozen=True)
class Load:
    """What users ask for: texts of ``tokens`` tokens after ``prompts``, for so many seconds."""

    prompts: list[list[int]]
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Figures:
    """What one server reached with ``concurrency`` requests at a time."""

    concurrency: int
    requests: int
    tokens_per_second: float
    tokens_per_forward: float
    seconds_per_request: float


def main() -> None:
    """Run both servers and print (or write) one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: the default model")
    parser.add_argument("--adapter", default=str(files("idlm") / "adapters" / DEFAULT_ADAPTER))
    parser.add_argument("--steps", type=int, default=3, help="stride minus one")
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 8, 32, 64])
    parser.add_argument("--seconds", type=float, default=8, help="of load at each concurrency")
    parser.add_argument("--tokens", type=int, default=128, help="of each text")
    parser.add_argument("--together", action="store_true", help="start both servers at once")
    parser.add_argument("--logs", type=Path, default=Path("runs/sglang"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("options", nargs="*", help="for both servers, after --")
    args = parser.parse_args()
    model = resolve(args.model)
    tokenizer = Tokenizer.load(model)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": task.format(topic)}])
        for task in TASKS
        for topic in TOPICS
    ]
    spec = ["--speculative-algorithm", "IDLM", "--speculative-num-steps", str(args.steps)]
    servers = {
        "ar": [],
        "idlm": [*spec, "--speculative-draft-model-path", args.adapter],
    }
    args.logs.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "options": args.options,
        "stride": args.steps + 1,
        "tokens": args.tokens,
        "prompts": len(prompts),
    }
    load = Load(prompts, args.tokens, args.seconds)
    texts = {}
    runs = {
        name: server(
            args.logs / f"{name}.log",
            ["--model-path", str(model), "--port", str(30000 + number), *args.options, *extra],
        )
        for number, (name, extra) in enumerate(servers.items())
    }
    with ExitStack() as stack:
        started = {name: stack.enter_context(run) for name, run in runs.items() if args.together}
        for name, run in runs.items():
            with nullcontext(started[name]) if args.together else run as url:
                begin = time.perf_counter()
                wait(url, args.logs / f"{name}.log")
                report[name] = {"ready_after_seconds": time.perf_counter() - begin}
                replies, figures = asyncio.run(measure(url, load, args.concurrency))
                texts[name] = [reply["output_ids"] for reply in replies]
                report[name] |= {"tokens_per_forward": tokens_per_forward(replies), "load": figures}
                print(name, json.dumps(report[name], indent=1), file=sys.stderr)
                _write(args.output, report)
    report["identical_texts"] = sum(a == b for a, b in zip(texts["ar"], texts["idlm"], strict=True))
    report["speedup"] = {
        a["concurrency"]: b["tokens_per_second"] / a["tokens_per_second"]
        for a, b in zip(report["ar"]["load"], report["idlm"]["load"], strict=True)
    }
    _write(args.output, report)
    print(json.dumps(report, indent=1))


@contextmanager
def server(log: Path, options: list[str]) -> Iterator[str]:
    """A server's process; its address."""
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "sglang.launch_server", *options, "--skip-server-warmup"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
    try:
        yield f"http://127.0.0.1:{options[options.index('--port') + 1]}"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def wait(url: str, log: Path) -> None:
    """Until the server answers."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        if "kill_process_tree called" in log.read_text(errors="replace"):
            break
        time.sleep(0.5)
    raise SystemExit(f"The server did not start:\n{log.read_text(errors='replace')[-8000:]}")


async def measure(
    url: str, load: Load, concurrency: list[int]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The reply to every prompt, then the figures at each concurrency."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        replies = await asyncio.gather(*(generate(client, p, load.tokens) for p in load.prompts))
        figures = []
        for count in concurrency:
            await under_load(client, replace(load, seconds=load.seconds / 4), count)
            figures.append(asdict(await under_load(client, load, count)))
    return replies, figures


async def under_load(client: httpx.AsyncClient, load: Load, concurrency: int) -> Figures:
    """Keep ``concurrency`` requests running; none starts when the load's seconds are over."""
    begin = time.perf_counter()
    order = itertools.cycle(load.prompts)
    replies: list[dict[str, Any]] = []

    async def user() -> None:
        while time.perf_counter() - begin < load.seconds:
            replies.append(await generate(client, next(order), load.tokens))

    await asyncio.gather(*(user() for _ in range(concurrency)))
    passed = time.perf_counter() - begin
    tokens = sum(len(reply["output_ids"]) for reply in replies)
    return Figures(
        concurrency,
        len(replies),
        tokens / passed,
        tokens_per_forward(replies),
        passed * concurrency / len(replies),
    )


def tokens_per_forward(replies: list[dict[str, Any]]) -> float:
    """After the first token, which reading the prompt gives."""
    tokens = [len(reply["output_ids"]) - 1 for reply in replies]
    # Without speculation the host counts no forwards: each gives one token.
    forwards = [
        reply["meta_info"].get("spec_verify_ct", count)
        for reply, count in zip(replies, tokens, strict=True)
    ]
    return sum(tokens) / sum(forwards)


async def generate(client: httpx.AsyncClient, prompt: list[int], tokens: int) -> dict[str, Any]:
    """One greedy text."""
    params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    reply = await client.post("/generate", json={"input_ids": prompt, "sampling_params": params})
    reply.raise_for_status()
    result: dict[str, Any] = reply.json()
    return result


def _write(path: Path | None, report: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

"""What HTTP costs: tokens per second of the server against those of the offline engine.

Eight requests at once, in turns; the server's client parses nothing on the way.

    python benchmarks/server_overhead.py
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import time

from server_process import server_process

from idlm import LLM, SamplingParams
from idlm.server.load import PROMPTS

SEED = 100


def main() -> None:
    """Print both speeds of every round and the median overhead."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    llm = LLM(stride=4, layout="linear", max_batch=args.clients)
    messages = [
        [{"role": "user", "content": PROMPTS[i % len(PROMPTS)]}] for i in range(args.requests)
    ]
    params = [
        SamplingParams(temperature=0.8, seed=SEED + i, max_tokens=args.max_tokens, ignore_eos=True)
        for i in range(args.requests)
    ]

    def offline() -> float:
        start = time.perf_counter()
        outputs = llm.chat(messages, params)
        return sum(len(o.token_ids) for o in outputs) / (time.perf_counter() - start)

    def served(url: str) -> float:
        start = time.perf_counter()
        tokens = asyncio.run(stream_all(url, messages, params, args.clients))
        return tokens / (time.perf_counter() - start)

    ratios = []
    with server_process("--layout", "linear", "--max-batch", str(args.clients)) as server:
        llm.chat(messages[:2], params[:2])  # both are warm
        served(server.url)
        for _ in range(args.rounds):
            alone, over_http = offline(), served(server.url)
            ratios.append(over_http / alone)
            print(f"offline {alone:.1f} tokens/s, server {over_http:.1f} tokens/s")
    print(f"overhead: {1 - statistics.median(ratios):.1%} (median of {args.rounds})")


async def stream_all(
    url: str, messages: list[list[dict[str, str]]], params: list[SamplingParams], clients: int
) -> int:
    """Tokens of all streams, ``clients`` at a time.

    A client that parses nothing on the way: it shares the cores with the server, and what it costs
    is not the server's.
    """
    host, port = url.removeprefix("http://").split(":")
    turns = iter(zip(messages, params, strict=True))
    tokens = 0

    async def client() -> None:
        nonlocal tokens
        for conversation, p in turns:
            body = json.dumps(
                {
                    "messages": conversation,
                    "temperature": p.temperature,
                    "seed": p.seed,
                    "max_tokens": p.max_tokens,
                    "ignore_eos": p.ignore_eos,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                }
            ).encode()
            reader, writer = await asyncio.open_connection(host, int(port))
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            answer = await reader.read()
            writer.close()
            [count] = re.findall(rb'"completion_tokens":(\d+)', answer)
            tokens += int(count)

    await asyncio.gather(*(client() for _ in range(clients)))
    return tokens


if __name__ == "__main__":
    main()

"""What HTTP costs: tokens per second of the server against those of the offline engine.

The same requests, 8 at a time, in turns.

    python benchmarks/server_overhead.py
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time

from server_process import server_process

from idlm import LLM, SamplingParams
from idlm.server.load import PROMPTS, Load, Pattern, Target

SEED = 100


def main() -> None:
    """Print both speeds of every round and the median overhead."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    llm = LLM(layout="linear", max_batch=args.clients)
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

    async def served(url: str) -> float:
        target = Target(
            url,
            max_tokens=args.max_tokens,
            temperature=0.8,
            seed=SEED,
            extra={"ignore_eos": True},
        )
        async with Load(target) as load:
            start = time.perf_counter()
            samples = await load.run(Pattern(clients=args.clients, requests=args.requests))
            seconds = time.perf_counter() - start
        assert all(sample.error is None for sample in samples)
        return sum(sample.tokens for sample in samples) / seconds

    ratios = []
    with server_process("--layout", "linear", "--max-batch", str(args.clients)) as server:
        llm.chat(messages[:2], params[:2])  # both are warm
        asyncio.run(served(server.url))
        for _ in range(args.rounds):
            alone, over_http = offline(), asyncio.run(served(server.url))
            ratios.append(over_http / alone)
            print(f"offline {alone:.1f} tokens/s, server {over_http:.1f} tokens/s")
    print(f"overhead: {1 - statistics.median(ratios):.1%} (median of {args.rounds})")


if __name__ == "__main__":
    main()

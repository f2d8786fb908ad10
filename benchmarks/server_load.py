"""Many streams at once for minutes, some of which disconnect: errors, leaks, wrong texts?

Every finished stream is compared with the offline text for its prompt and seed.

    python benchmarks/server_load.py --clients 64 --seconds 180 --leave 0.2
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time

from server_process import ServerProcess, server_process

from idlm import LLM, SamplingParams
from idlm.server.load import PROMPTS, Load, Pattern, Sample, Summary, Target

VARIANTS = 32
TEMPERATURE = 0.8


def main() -> None:
    """Run the load and print one JSON object; the exit status is 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--leave", type=float, default=0.2)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--stride", default="4", help="of the linear layout, or auto")
    args = parser.parse_args()
    expected = offline(args.stride, args.max_tokens)
    method = ["--stride", args.stride] + ["--layout", "linear"] * (args.stride != "auto")
    with server_process(*method) as server:
        target = Target(
            server.url, max_tokens=args.max_tokens, temperature=TEMPERATURE, variants=VARIANTS
        )
        pattern = Pattern(clients=args.clients, seconds=args.seconds, leave=args.leave)
        samples, seconds, memory = asyncio.run(drive(target, pattern, server))
        time.sleep(1)
        metrics, after = server.metrics(), server.resident_mib()
    summary = Summary.of(pattern, samples, seconds)
    finished = [s for s in samples if s.error is None and not s.left]
    wrong = [s.number for s in finished if s.text != expected[s.number]]
    left = {
        name: metrics[f"idlm_{name}"]
        for name in ("running_texts", "waiting_texts", "step_failures")
    }
    report = summary.to_dict() | {
        "wrong_texts": len(wrong),
        "resident_mib": [round(m) for m in [*memory, after]],
        "after": left,
    }
    print(json.dumps(report, indent=2))
    raise SystemExit(bool(summary.errors or wrong or any(left.values())))


def offline(stride: str, max_tokens: int) -> list[str]:
    """The text of every variant; with ``auto``, whose rule is coupled, that of the plain model."""
    if stride == "auto":
        llm = LLM(stride=1, verification="coupled")
    else:
        llm = LLM(stride=int(stride), layout="linear")
    messages = [[{"role": "user", "content": PROMPTS[i % len(PROMPTS)]}] for i in range(VARIANTS)]
    params = [
        SamplingParams(temperature=TEMPERATURE, seed=i, max_tokens=max_tokens)
        for i in range(VARIANTS)
    ]
    return [output.text for output in llm.chat(messages, params)]


async def drive(
    target: Target, pattern: Pattern, server: ServerProcess
) -> tuple[list[Sample], float, list[float]]:
    """Samples, seconds, and the server's memory every 30 seconds."""
    memory: list[float] = []

    async def watch() -> None:
        while True:
            memory.append(server.resident_mib())
            await asyncio.sleep(30)

    async with Load(target) as load:
        await load.warm_up()
        watching = asyncio.create_task(watch())
        start = time.perf_counter()
        samples = await load.run(pattern)
        seconds = time.perf_counter() - start
        watching.cancel()
    return samples, seconds, memory


if __name__ == "__main__":
    main()

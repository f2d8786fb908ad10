"""Is a text the same whatever the plan and the batch? 200 prompts against AR in batches of 32.

    python benchmarks/identity.py --dtype float32 --json results.json

By `coupled`, greedy and at T=0.8 with a seed for each prompt. Prints hardware, versions and the
command, then a row per plan and batch: texts that are AR's to the last token, where the others
first differ, tokens per forward.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

import torch

from idlm import LLM, SamplingParams, __version__
from idlm.decoding.metrics import DecodeStats

TASKS = (
    "Explain {} in simple words.",
    "Write a short poem about {}.",
    "List three facts about {}.",
    "Tell a story about {}.",
    "What is {}?",
    "Why do people like {}?",
    "Give advice about {}.",
    "Describe {} to a child.",
)
TOPICS = (
    *("a lighthouse", "bread", "the moon", "a robot", "chess", "rain", "a bicycle", "the sea"),
    *("trains", "honey", "a library", "volcanoes", "a violin", "snow", "tea", "the desert"),
    *("a garden", "bees", "a compass", "maps", "clocks", "an island", "wolves", "paper", "glass"),
)
PLANS = ("ar:1", "linear:4", "quadratic:2", "quadratic:4", "quadratic:8", "auto")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--adapter")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--count", type=int, default=200, help="of the prompts")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--plans", nargs="+", default=PLANS)
    parser.add_argument("--batches", nargs="+", type=int, default=[32, 200])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    prompts = [task.format(topic) for task in TASKS for topic in TOPICS][: args.count]
    lines = []
    expected: dict[float, list[list[int]]] = {}
    # Cache, batches and graphs are a model's own: one for each size of batch.
    for batch in args.batches:
        llm = LLM(
            args.model,
            args.adapter,
            verification="coupled",
            device=args.device,
            dtype=args.dtype,
            max_batch=batch,
        )
        if not lines:
            on_gpu = llm.device.type == "cuda"
            device = torch.cuda.get_device_name() if on_gpu else platform.processor()
            print(f"# {device}, torch {torch.__version__}, idlm {__version__}, {llm.dtype}")
            print(f"# {' '.join(sys.argv)}")
        ids = [llm.tokenizer.apply_chat_template([{"role": "user", "content": p}]) for p in prompts]
        for temperature in (0.0, 0.8):
            params = [
                SamplingParams(
                    temperature=temperature, seed=i, max_tokens=args.max_tokens, ignore_eos=True
                )
                for i in range(len(ids))
            ]
            if temperature not in expected:
                base = llm.autoregressive().generate(ids, params)
                expected[temperature] = [list(x.token_ids) for x in base]
            for plan in args.plans:
                name, _, stride = plan.partition(":")
                other = llm.with_layout(name, int(stride) if stride else "auto")
                outputs = other.generate(ids, params)
                texts = [list(x.token_ids) for x in outputs]
                pairs = list(zip(texts, expected[temperature], strict=True))
                line = {
                    "plan": plan,
                    "batch": batch,
                    "temperature": temperature,
                    "same": sum(a == b for a, b in pairs),
                    "of": len(pairs),
                    "first_differences": [_first(a, b) for a, b in pairs if a != b],
                    "tokens_per_forward": sum(
                        (x.stats for x in outputs), DecodeStats()
                    ).tokens_per_forward,
                }
                lines.append(line)
                print(
                    f"{plan:12s} batch {batch:3d}  T={temperature}  {line['same']} of {line['of']}"
                    f"  TPF {line['tokens_per_forward']:.2f}  {line['first_differences'][:8]}",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(lines, indent=2) + "\n")


def _first(a: list[int], b: list[int]) -> int:
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)


if __name__ == "__main__":
    main()

"""Decoding speed of one request: I-DLM layouts and `transformers` against our own AR.

    python benchmarks/decode_speed.py [--layouts linear:4 quadratic:3] [--prompts "..."]

Greedy unless said otherwise, one request at a time, the default model with its adapter. Every round
runs each way once, so that a ratio compares neighbours in time; the table gives the median over the
rounds.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM

from idlm import LLM, SamplingParams, __version__
from idlm.model import checkpoint
from idlm.model.cpu import kernels as cpu_kernels

PROMPTS = [
    "List ten tips for a healthy life.",
    "Write a Python function that checks whether a number is prime.",
    "Explain in a few sentences why the sky is blue.",
]
LAYOUTS = ["linear:2", "linear:3", "linear:4", "linear:6", "quadratic:2", "quadratic:3"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, metavar="NAME:STRIDE")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--no-transformers", action="store_true")
    args = parser.parse_args()

    llm = LLM(stride=4, dtype=args.dtype, device=args.device)
    reference = AutoModelForCausalLM.from_pretrained(checkpoint.resolve(None), dtype=llm.dtype)
    reference = reference.to(llm.device).eval()
    reference.generation_config.eos_token_id = None
    limits = {"temperature": args.temperature, "top_p": args.top_p}
    params = SamplingParams(**limits, seed=1, max_tokens=args.tokens, ignore_eos=True)
    print(f"# {platform.processor()} {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"# idlm {__version__}, own CPU kernels: {cpu_kernels.available()}, {llm.dtype}")
    print(f"# {' '.join(sys.argv)}; load average {os.getloadavg()[0]:.1f}")

    def ours(model: LLM) -> Callable[[list[int]], float]:
        return lambda ids: model.generate(ids, params)[0].stats.tokens_per_forward

    @torch.inference_mode()
    def theirs(ids: list[int]) -> float:
        tokens = torch.tensor([ids], device=llm.device)
        reference.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            **({"do_sample": False} if params.greedy else {"do_sample": True, "top_k": 0} | limits),
            max_new_tokens=args.tokens,
            pad_token_id=0,
        )
        return 1.0

    ways = {"ar": ours(llm.autoregressive())}
    if not args.no_transformers:
        ways["transformers"] = theirs
    for name, stride in (layout.split(":") for layout in args.layouts):
        ways[f"{name} N={stride}"] = ours(llm.with_layout(name, int(stride)))
    for prompt in args.prompts:
        ids = llm.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        tpf = {}
        for round_ in range(args.rounds + 1):
            for name, run in ways.items():
                start = time.perf_counter()
                tpf[name] = run(ids)
                if round_ > 0:  # the first one warms up
                    seconds[name].append(time.perf_counter() - start)
        print(f"\n{prompt}\n  way              tokens/s    TPF  ms/forward  x AR")
        for name, times in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(seconds["ar"], times, strict=True))
            median = statistics.median(times)
            print(
                f"  {name:15s} {args.tokens / median:9.1f}  {tpf[name]:5.2f}  "
                f"{1e3 * median * tpf[name] / args.tokens:10.1f}  {ratio:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

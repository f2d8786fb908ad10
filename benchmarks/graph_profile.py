"""Where the time of captured decoding cycles goes: kernels by name, and what a whole replay takes.

    python benchmarks/graph_profile.py --cases ar:1:1,quadratic:4:1,quadratic:4:32

A case is layout:stride:requests[:temperature][+rows]; rows of prompts go along. Random weights in
the shape of the default model (or of Qwen3-8B), texts of 300 tokens: what drafts are worth shows in
no kernel's time.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import repeat

import torch
from cycles import Cycles
from random_models import RANK

from idlm.engine.graphs import timed

REPLAYS = 4  # that are profiled


class Products:
    """Names for the launches of `project_tile`, by what came before them."""

    LAYER = ("o", "gate_up", "down", "qkv")  # after attention

    def __init__(self) -> None:
        self._names: Iterator[str] = iter(())

    def name(self, kernel: str) -> str:
        """What ``kernel`` is called in a table."""
        if kernel in ("_attend", "_merge"):
            self._names = iter(self.LAYER)
        elif kernel == "_begin":
            self._names = iter(self.LAYER[-1:])
        elif kernel == "_begin_chain":
            self._names = repeat("head")
        return next(self._names, kernel) if kernel == "project_tile" else kernel


def profile(graph: torch.cuda.CUDAGraph, kernels: int) -> None:
    """Print the ``kernels`` that take most of a replay.

    Kernels overlap: a launch counts from the end of the one before to its own end.
    """
    took: dict[str, float] = defaultdict(float)
    alone: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
    events = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    before, products, size = 0.0, Products(), len(events) // REPLAYS
    for index, (start, end, kernel) in enumerate(events):
        name = products.name(kernel)
        # What lies between two replays is nobody's.
        since = start if index % size == 0 else before
        took[name] += max(0.0, end - since) / REPLAYS
        alone[name] += (end - start) / REPLAYS
        calls[name] += 1
        before = max(before, end)
    print(f"   {size} kernels, busy {sum(took.values()):.0f} us; of each: its share, by itself")
    for name, us in sorted(took.items(), key=lambda item: -item[1])[:kernels]:
        times = calls[name] / REPLAYS
        own = alone[name] / times
        print(f"   {us:8.1f} us {times:5.0f}x {us / times:8.2f} {own:8.2f}  {name[:60]}")


@torch.inference_mode()
def main() -> None:
    """Capture, time and profile every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=RANK, default="135M")
    parser.add_argument("--cases", default="ar:1:1,quadratic:4:1,ar:1:32,quadratic:4:32")
    parser.add_argument("--rank", type=int, help="of the LoRA; default: 24, 8B 128")
    parser.add_argument("--head-width", type=int, help="default: 1024, 8B 4096")
    parser.add_argument("--kernels", type=int, default=16, help="shown of each case")
    args = parser.parse_args()
    cycles = Cycles(args.model, args.rank, args.head_width)
    print(cycles.heading)
    for case in args.cases.split(","):
        graph = cycles.capture(case)
        print(f"{case}: {timed(graph, times=10) * 1e6:.0f} us")
        profile(graph, args.kernels)


if __name__ == "__main__":
    main()

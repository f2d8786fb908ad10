"""Where the time of captured decoding cycles goes: kernels by name, and what a whole replay takes.

    python benchmarks/graph_profile.py --cases ar:1:1,quadratic:4:1,quadratic:4:32

A case is layout:stride:requests[:temperature]. Random weights in the shape of the default model (or
of Qwen3-8B), texts of 300 tokens: what drafts are worth shows in no kernel's time.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import repeat

import torch
from random_models import DEVICE, DTYPE, RANK, bandwidth, random_model

from idlm import SamplingParams
from idlm.decoding.cycle import Method, State
from idlm.decoding.layout import Layout
from idlm.decoding.propose import num_candidates
from idlm.decoding.sampling import Sampling
from idlm.decoding.verify import Drafts
from idlm.engine.graphs import Graphs, timed
from idlm.engine.kv_cache import BLOCK_TOKENS, KVCache

TEXT, BLOCKS, REPLAYS = 300, 40, 4  # tokens and blocks of a request; replays that are profiled


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
    parser.add_argument("--kernels", type=int, default=16, help="shown of each case")
    args = parser.parse_args()
    copied, read = bandwidth()
    decoder, adapter = random_model(args.model)
    vocab_size = decoder.config.vocab_size
    cache = KVCache(decoder.config, DEVICE, DTYPE, 131_072 if args.model == "135M" else 40_000, 0)
    real_blocks = cache.pool.capacity // BLOCK_TOKENS - 1  # the first is nobody's
    most = num_candidates(DEVICE, vocab_size)
    graphs = Graphs(cache, DEVICE, 512, 7, most)
    # AR reads them all, but for the embeddings where the output layer has weights of its own.
    weights = sum(parameter.nbytes for parameter in decoder.parameters())
    weights -= 0 if decoder.config.tie_word_embeddings else decoder.embed.weight.nbytes
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, {args.model}")
    print(f"# copy {copied:.0f} GB/s, sum {read:.0f} GB/s")
    print(f"# {weights / 1e6:.0f} MB of weights, {weights / copied / 1e3:.0f} us as fast as a copy")
    for case in args.cases.split(","):
        name, stride, count, *rest = case.split(":")
        layout, B = Layout.named(name, int(stride)), int(count)
        params = SamplingParams(temperature=float(rest[0]) if rest else 0.0)
        candidates = 1 if params.greedy else most
        blocks = torch.arange(B * BLOCKS, device=DEVICE) % real_blocks + 1
        M = layout.block_size
        ids = torch.randint(vocab_size, (B, M, candidates), device=DEVICE)
        full_B = torch.full((B,), M, device=DEVICE)
        drafts = Drafts(ids[..., 0].clone(), ids, torch.rand(ids.shape, device=DEVICE), full_B)
        state = State(
            torch.randint(vocab_size, (B,), device=DEVICE),
            torch.full((B,), TEXT, device=DEVICE),
            drafts if M else Drafts.none(B, DEVICE),
        )
        empty: list[list[int]] = [[]] * B
        sampling = Sampling.of([params] * B, list(range(B)), empty, empty, vocab_size, DEVICE)
        method = Method(decoder, adapter if M else None, layout, "rejection")
        graphs.decode(method, blocks.view(B, BLOCKS).int(), state, sampling)
        graph = list(graphs._graphs.values())[-1].graph
        print(f"{case}: {timed(graph, times=10) * 1e6:.0f} us")
        profile(graph, args.kernels)


if __name__ == "__main__":
    main()

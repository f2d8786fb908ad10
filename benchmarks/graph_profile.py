"""Where the time of captured decoding cycles goes: kernels by name, and what a whole replay takes.

    python benchmarks/graph_profile.py --cases ar:1:1,quadratic:4:1,quadratic:4:32

A case is layout:stride:requests[:temperature]. Random weights in the shape of the default model (or
of Qwen3-8B), texts of 300 tokens: what drafts are worth shows in no kernel's time.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict

import torch
from random_models import DEVICE, DTYPE, RANK, random_model

from idlm import SamplingParams
from idlm.decoding.cycle import Method, State
from idlm.decoding.layout import Layout
from idlm.decoding.propose import num_candidates
from idlm.decoding.sampling import Sampling
from idlm.decoding.verify import Drafts
from idlm.engine.graphs import Graphs, timed
from idlm.engine.kv_cache import BLOCK_TOKENS, KVCache

TEXT, BLOCKS, REPLAYS = 300, 40, 4  # tokens and blocks of a request; replays that are profiled


def profile(graph: torch.cuda.CUDAGraph, kernels: int) -> None:
    """Print the ``kernels`` that take most of a replay."""
    took: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            took[event.name] += event.device_time / REPLAYS
            calls[event.name] += 1
    print(f"   {sum(calls.values()) / REPLAYS:.0f} kernels, busy {sum(took.values()):.0f} us")
    for name, us in sorted(took.items(), key=lambda item: -item[1])[:kernels]:
        print(f"   {us:8.1f} us {calls[name] / REPLAYS:5.0f}x  {name[:80]}")


@torch.inference_mode()
def main() -> None:
    """Capture, time and profile every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=RANK, default="135M")
    parser.add_argument("--cases", default="ar:1:1,quadratic:4:1,ar:1:32,quadratic:4:32")
    parser.add_argument("--kernels", type=int, default=14, help="shown of each case")
    args = parser.parse_args()
    decoder, adapter = random_model(args.model)
    vocab_size = decoder.config.vocab_size
    cache = KVCache(decoder.config, DEVICE, DTYPE, 131_072 if args.model == "135M" else 40_000, 0)
    real_blocks = cache.pool.capacity // BLOCK_TOKENS - 1  # the first is nobody's
    most = num_candidates(DEVICE, vocab_size)
    graphs = Graphs(cache, DEVICE, 512, 7, most)
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, {args.model}")
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

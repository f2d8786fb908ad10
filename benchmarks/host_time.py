"""What the host does for each forward, in microseconds of its processor: no forward is run.

Graphs are replaced by copies of made-up results, so what is left is the engine's own work: whose
turn it is, blocks, plans, inputs of graphs, and what the results bring. CUDA's launches and events
are not part of it. Requests go on as long as they may (``stationary``), or have answers of 256
tokens and are replaced by the next (``replaced``).

    python benchmarks/host_time.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from typing import Any

import numpy as np
import torch

from idlm import LLM, SamplingParams
from idlm.decoding.layout import Layout
from idlm.decoding.policy import Policy, plans
from idlm.engine.commit import Launch
from idlm.engine.engine import Engine
from idlm.engine.graphs import Graphs
from idlm.engine.kv_cache import KVCache
from idlm.engine.request import Request

STANDS = 0.75  # chance that a draft stands
SECONDS = {1: 0.6e-3, 32: 1.1e-3, 128: 1.3e-3}  # that a forward of up to so many is said to take
BLOCKS, PLACES = 600, 7  # of a request at most


class MadeUpGraph:
    """In place of a captured graph."""

    def __init__(self, requests: int, layout: Layout) -> None:
        random, N = np.random.default_rng(0), layout.stride
        self.rows = layout.num_rows
        self.packed_BX = torch.zeros(requests, 2 * N + 1, dtype=torch.int64)
        self.seconds = next((s for most, s in SECONDS.items() if requests <= most), 2e-3)
        self._made = cycle([_packed(random, requests, N) for _ in range(16)])

    def replay(self) -> None:
        """Do nothing."""

    def landed(self, launch: Launch) -> Launch:
        """With the next results."""
        return replace(launch, host_BX=next(self._made)[: len(launch.packed_BX)].numpy())


def _packed(random: np.random.Generator, requests: int, stride: int) -> torch.Tensor:
    tokens_BN = random.integers(100, 1000, (requests, stride))
    stands_BM = random.random((requests, stride - 1)) < STANDS
    accepted_B = np.cumprod(stands_BM, axis=1).sum(1)
    overlap_BM = np.full((requests, stride - 1), 0.8, np.float32).view(np.int32)
    counts_B2 = np.stack((accepted_B, np.full(requests, stride - 1)), axis=1)
    return torch.from_numpy(np.concatenate((tokens_BN, counts_B2, overlap_BM), axis=1))


class MadeUpGraphs(Graphs):
    """Graphs that compute nothing."""

    launches = 0  # of cycles

    def decode(self, method: Any, *inputs: Any) -> Launch:
        self._layout, self.launches = method.layout, self.launches + 1
        return super().decode(method, *inputs)

    def decode_with(self, method: Any, *inputs: Any) -> tuple[Launch, Launch]:
        self._layout, self.launches = method.layout, self.launches + 1
        return super().decode_with(method, *inputs)

    def prefill(self, method: Any, *inputs: Any) -> Launch:
        self._layout = Layout.named("ar", 1)
        return super().prefill(method, *inputs)

    def _captured(self, run: Callable[[], Any], *inputs: Any) -> Any:
        return MadeUpGraph(sum(own.size for own in inputs), self._layout)


def engine_of(llm: LLM, plan: str, requests: int) -> tuple[Engine, MadeUpGraphs]:
    """An engine for ``ar``, ``quadratic:4`` or ``auto`` whose forwards are made up."""
    name, _, stride = plan.partition(":")
    method, policy = llm._method, None
    if plan == "auto":
        policy = Policy(plans(PLACES))
    else:
        method = replace(method, layout=Layout.named(name, int(stride or 1)))
    device = torch.device("cpu")
    # Nothing is ever written: memory that nobody touches is not there.
    tokens = requests * 8400 + 8192
    cache = KVCache(method.decoder.config, device, torch.float32, tokens, wanted=0)
    engine = Engine(
        method,
        llm.tokenizer,
        cache=cache,
        device=device,
        max_batch=requests,
        ahead=True,
        policy=policy,
    )
    vocab_size = method.decoder.config.vocab_size
    graphs = MadeUpGraphs(cache, device, BLOCKS, PLACES, 1, vocab_size)
    engine._runner._graphs = graphs
    return engine, graphs


def measure(
    engine: Engine, graphs: MadeUpGraphs, requests: int, tokens: int | None, seconds: float
) -> float:
    """Microseconds of the processor for each forward, with ``requests`` at a time."""
    alive: list[Request] = []
    params = SamplingParams(temperature=0, max_tokens=tokens, seed=0)

    def step() -> float:
        while len(alive) < requests:
            alive.append(engine.add([5, 6, 7 + len(alive)], params))
        start = time.thread_time()
        engine.step()
        spent = time.thread_time() - start
        alive[:] = [request for request in alive if not request.finished]
        return spent

    while graphs.launches < 100:
        step()
    least, spent = graphs.launches, 0.0
    # As long as there is room in the context.
    while spent < seconds and (tokens or max(len(r.token_ids) for r in alive) < 7500):
        for _ in range(100):
            spent += step()
    launches = graphs.launches - least
    for request in alive:
        engine.abort(request)
    engine.close()
    return spent / launches * 1e6


def main() -> None:
    """Print a line for each plan and number of requests."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", default="1,32,128")
    parser.add_argument("--plans", default="ar,quadratic:4,auto")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="the least of so many counts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    llm = LLM(layout="quadratic", stride=4, kv_cache_tokens=64)
    for requests in map(int, args.requests.split(",")):
        for plan in args.plans.split(","):
            times = {}
            for name, tokens in (("stationary", None), ("replaced", 256)):
                times[name] = min(
                    measure(*engine_of(llm, plan, requests), requests, tokens, args.seconds)
                    for _ in range(args.rounds)
                )
            told = ", ".join(f"{name} {us:.1f} us" for name, us in times.items())
            print(f"{requests} requests, {plan}: {told}", flush=True)


if __name__ == "__main__":
    main()

"""What the host does for each forward, in microseconds of its processor: no forward is run.

Forwards are replaced by made-up results that are there at once, so what is left is the engine's own
work: whose turn it is, blocks, plans, and what the results bring. CUDA's launches and copies are
not part of it. Requests go on as long as they may (``stationary``), or have answers of 256 tokens
and are replaced by the next (``replaced``).

    python benchmarks/host_time.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import torch

from idlm import LLM, SamplingParams
from idlm.decoding.cycle import Method, State
from idlm.decoding.layout import Layout
from idlm.decoding.policy import Policy, plans
from idlm.decoding.verify import Drafts
from idlm.engine.commit import Launch
from idlm.engine.engine import Engine
from idlm.engine.kv_cache import KVCache
from idlm.engine.request import Request

MOST = 256  # requests
STANDS = 0.75  # chance that a draft stands
SECONDS = {1: 0.6e-3, 32: 1.1e-3, 128: 1.3e-3}  # that a forward of up to so many is said to take


class MadeUp:
    """Results of forwards; they are made before they are needed."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)
        self._made: dict[int, list[torch.Tensor]] = {}
        self._next = count()
        self.launches, self.seconds = 0, 0.0  # of these, nothing counts

    def decode(self, method: Method, requests: Sequence[Request], *rest: Any) -> Launch:
        """In place of `Runner.decode`."""
        _table_BP, state, _sampling = rest
        return self._launch(method.layout, len(requests), state)

    def prefill(self, method: Method, requests: Sequence[Request]) -> Launch:
        """In place of `Runner.prefill`."""
        zeros_B = torch.zeros(len(requests), dtype=torch.int64)
        state = State(zeros_B, zeros_B, Drafts.none(len(requests), zeros_B.device))
        return self._launch(Layout.named("ar", 1), len(requests), state)

    def _launch(self, layout: Layout, requests: int, state: State) -> Launch:
        start = time.thread_time()
        self.launches += 1
        N = layout.stride
        if N not in self._made:
            self._made[N] = [self._packed(MOST, N) for _ in range(16)]
        packed_BX = self._made[N][next(self._next) % 16][:requests]
        takes = next((s for most, s in SECONDS.items() if requests <= most), 2e-3)
        # As after a graph: other objects, in the same memory.
        state = State(state.pending_B[:requests], state.length_B[:requests], state.drafts)
        self.seconds += time.thread_time() - start
        return Launch(state, packed_BX, layout.num_rows, None, takes)

    def _packed(self, requests: int, stride: int) -> torch.Tensor:
        tokens_BN = self._random.integers(100, 1000, (requests, stride))
        stands_BM = self._random.random((requests, stride - 1)) < STANDS
        accepted_B = np.cumprod(stands_BM, axis=1).sum(1)
        overlap_BM = np.full((requests, stride - 1), 0.8, np.float32).view(np.int32)
        counts_B2 = np.stack((accepted_B, np.full(requests, stride - 1)), axis=1)
        return torch.from_numpy(np.concatenate((tokens_BN, counts_B2, overlap_BM), axis=1))


def engine_of(llm: LLM, plan: str, requests: int) -> tuple[Engine, MadeUp]:
    """An engine for ``ar``, ``quadratic:4`` or ``auto`` whose forwards are made up."""
    name, _, stride = plan.partition(":")
    method, policy = llm._method, None
    if plan == "auto":
        policy = Policy(plans(7))
    else:
        method = replace(method, layout=Layout.named(name, int(stride or 1)))
    config, device = method.decoder.config, torch.device("cpu")
    # Nothing is ever written: memory that nobody touches is not there.
    cache = KVCache(config, device, torch.float32, requests * 8400 + 8192, wanted=0)
    engine = Engine(
        method,
        llm.tokenizer,
        cache=cache,
        device=device,
        max_batch=requests,
        ahead=True,
        policy=policy,
    )
    made_up = MadeUp()
    engine._runner.decode = made_up.decode  # type: ignore[assignment, method-assign]
    engine._runner.prefill = made_up.prefill  # type: ignore[method-assign]
    # As with graphs: rows of those that have ended may stay.
    engine._runner.takes_nobody = lambda requests: True  # type: ignore[method-assign]
    return engine, made_up


def measure(
    engine: Engine, made_up: MadeUp, requests: int, tokens: int | None, seconds: float
) -> float:
    """Microseconds of the processor for each forward, with ``requests`` at a time."""
    alive: list[Request] = []
    params = SamplingParams(temperature=0, max_tokens=tokens, seed=0)

    def step() -> float:
        while len(alive) < requests:
            alive.append(engine.add([5, 6, 7 + len(alive)], params))
        start = time.thread_time() - made_up.seconds
        engine.step()
        spent = time.thread_time() - made_up.seconds - start
        alive[:] = [request for request in alive if not request.finished]
        return spent

    while not all(request.token_ids for request in alive) or made_up.launches < 50:
        step()
    launches, spent = made_up.launches, 0.0
    while spent < seconds and (tokens or not any(len(r.token_ids) > 7000 for r in alive)):
        spent += step()
    launches = made_up.launches - launches
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

"""How much of a fast engine's tokens the server passes on, on a machine without a GPU.

Forwards are made up and take a fixed time in which the processor is free, as on a GPU; all else is
the real engine behind the real server. Another process reads the streams and parses nothing.

    python benchmarks/server_ceiling.py --clients 1,32,128
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import platform
import sys
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from host_time import BLOCKS, PLACES, MadeUpGraph, MadeUpGraphs
from server_overhead import stream_all
from server_process import server_process

from idlm import LLM, SamplingParams
from idlm.cli import main as cli
from idlm.engine import flights
from idlm.engine.commit import Landing, Launch
from idlm.engine.engine import Engine

SECONDS = {1: 0.64e-3, 32: 1.1e-3, 128: 1.4e-3}  # of a cycle of so many requests, about an H200's
PLAN = ("quadratic", 3)


class Device:
    """One thing after another, each of which takes its time."""

    free = 0.0  # when it has done what it was told so far

    @classmethod
    def work(cls, seconds: float) -> float:
        """Begin something more; when it will be done."""
        cls.free = max(cls.free, time.perf_counter()) + seconds
        return cls.free


class SlowLanding(Landing):
    """Results that are there when the device has done its work."""

    def fetch(self, launch: Launch) -> None:
        super().fetch(launch)
        self._there = Device.work(launch.seconds or 0.0)

    @property
    def done(self) -> bool:
        """Whether it is so."""
        return time.perf_counter() >= self._there

    def wait(self) -> npt.NDArray[np.int64]:
        """Sleep until then."""
        time.sleep(max(0.0, self._there - time.perf_counter()))
        return super().wait()


def seconds_of(requests: int) -> float:
    """That a cycle of so many takes."""
    return next((s for most, s in SECONDS.items() if requests <= most), 2.2e-3)


def with_device(llm: LLM) -> Engine:
    """In place of `LLM.new_engine`."""
    engine = Engine(
        llm._method,
        llm.tokenizer,
        cache=llm._cache,
        device=llm.device,
        max_batch=llm.max_batch,
        ahead=True,
        policy=llm._policy,
    )
    vocab_size = llm.config.vocab_size
    graphs = MadeUpGraphs(llm._cache, llm.device, BLOCKS, PLACES, 1, vocab_size)
    capture = graphs._captured

    def captured(run: Any, *inputs: Any) -> MadeUpGraph:
        graph: MadeUpGraph = capture(run, *inputs)
        graph.seconds = seconds_of(inputs[0].size)
        return graph

    graphs._captured = captured  # type: ignore[method-assign]
    engine._runner._graphs = graphs
    return engine


def serve(arguments: list[str]) -> None:
    """`idlm serve` with such engines."""
    torch.set_num_threads(1)
    flights.Landing = SlowLanding  # type: ignore[misc]
    LLM.new_engine = with_device  # type: ignore[method-assign]
    sys.argv = ["idlm", "serve", *arguments]
    sys.exit(cli.main())


def read(url: str, clients: int, tokens: int, requests: int) -> tuple[int, float]:
    """Tokens and seconds of ``requests`` streams, ``clients`` at a time."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    messages = [[{"role": "user", "content": f"Question {i % 8}"}] for i in range(requests)]
    all_params = [replace(params, seed=i) for i in range(requests)]
    start = time.perf_counter()
    made = asyncio.run(stream_all(url, messages, all_params, clients))
    return made, time.perf_counter() - start


def offline(clients: int, tokens: int, requests: int) -> float:
    """Tokens per second of the engine alone."""
    llm = LLM(layout=PLAN[0], stride=PLAN[1], max_batch=clients)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    prompts = [[5, 6, 7 + i % 8] for i in range(requests)]
    llm.generate(prompts[:clients], params)
    start = time.perf_counter()
    made = sum(len(output.token_ids) for output in llm.generate(prompts, params))
    return made / (time.perf_counter() - start)


def main() -> None:
    """Print a line for each number of clients."""
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", default="1,32,128")
    parser.add_argument("--tokens", type=int, default=256, help="of an answer")
    parser.add_argument("--rounds", type=int, default=6, help="answers of each client")
    args = parser.parse_args()
    torch.set_num_threads(1)
    flights.Landing = SlowLanding  # type: ignore[misc]
    LLM.new_engine = with_device  # type: ignore[method-assign]
    print(f"# {platform.processor() or platform.machine()}, {json.dumps(SECONDS)}")
    print("#", *sys.argv, flush=True)
    for clients in map(int, args.clients.split(",")):
        requests = args.rounds * clients
        alone = offline(clients, args.tokens, requests)
        options = ["--layout", PLAN[0], "--stride", str(PLAN[1]), "--max-batch", str(clients)]
        command = sys.executable, __file__, "serve"
        with server_process(*options, command=command) as server:
            context = multiprocessing.get_context("spawn")
            with context.Pool(1) as pool:
                reads = partial(pool.apply, read)
                reads((server.url, clients, args.tokens, clients))  # graphs are there
                made, seconds = reads((server.url, clients, args.tokens, requests))
        served = made / seconds
        print(
            f"{clients}: engine {alone:.0f} tokens/s, streamed {served:.0f}: {served / alone:.0%}"
        )


if __name__ == "__main__":
    main()

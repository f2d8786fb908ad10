"""SGLang's own server, as a process of its own on this machine's CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

HERE = Path(__file__).parent
START_SECONDS = 600  # of a machine that does other things, too


class Server:
    """A running server; `generate` is SGLang's native API."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client = httpx.Client(base_url=url, timeout=150)

    def generate(self, prompts: list[list[int]], **params: Any) -> list[dict[str, Any]]:
        """One batch; each reply has ``output_ids`` and ``meta_info``."""
        reply = self.client.post(
            "/generate", json={"input_ids": prompts, "sampling_params": params}
        )
        reply.raise_for_status()
        replies: list[dict[str, Any]] = reply.json()
        return replies

    def tokens(self, prompts: list[list[int]], **params: Any) -> list[list[int]]:
        """The tokens of one batch."""
        return [reply["output_ids"] for reply in self.generate(prompts, **params)]

    def one_by_one(
        self, prompts: list[list[int]], each: list[dict[str, Any]], at_once: int
    ) -> list[list[int]]:
        """The tokens of requests with their own parameters, that come and go."""

        def ask(prompt: list[int], params: dict[str, Any]) -> list[int]:
            return self.tokens([prompt], **params)[0]

        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(ask, prompts, each))

    def flush(self) -> None:
        """Empty the cache of prompts."""
        self.client.post("/flush_cache").raise_for_status()


def command(model: Path, port: int, *options: str) -> list[str]:
    """How the server is started on a CPU, in fp32."""
    return [
        *(sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)),
        *("--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32"),
        *("--sampling-backend", "pytorch", "--grammar-backend", "none"),
        *("--max-total-tokens", "20000", "--mem-fraction-static", "0.2", "--disable-cuda-graph"),
        *("--host", "127.0.0.1", "--port", str(port), "--skip-server-warmup", "--sleep-on-idle"),
        *options,
    ]


def environment(**extra: str) -> dict[str, str]:
    """For servers started by `command`."""
    paths = (str(HERE / "stand_in"), *os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return os.environ | {
        "SGLANG_USE_CPU_ENGINE": "1",
        "TRITON_INTERPRET": "0",  # which is for the tests' own kernels
        "OMP_WAIT_POLICY": "PASSIVE",  # idle threads leave the cores to the other processes
        "TORCH_COMPILE_DISABLE": "1",  # the host compiles its penalties: a minute for each
        "SGLANG_NCCL_SO_PATH": "none",  # where there is one, the host uses it for CPUs, too
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        **extra,
    }


@contextmanager
def server(
    model: Path, log: Path, *options: str, ranks: int = 1, **variables: str
) -> Iterator[Server]:
    """A server of ``model`` in ``ranks`` processes that share it, until the block ends."""
    if ranks > 1:  # the host wants to be told the core of each
        options = (*options, "--tp-size", str(ranks))
        variables["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(ranks)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("w") as output:
        process = subprocess.Popen(
            command(model, port, *options),
            env=environment(**variables),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    running = Server(f"http://127.0.0.1:{port}")
    try:
        _wait(running, process, log)
        yield running
    finally:
        running.client.close()
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(running: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            if running.client.get("/health", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    raise RuntimeError(f"SGLang did not start:\n{log.read_text()[-6000:]}")

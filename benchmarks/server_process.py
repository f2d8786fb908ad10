"""`idlm serve` as a process of its own, for the benchmarks."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

SERVE = (sys.executable, "-m", "idlm.cli.main", "serve")


class ServerProcess:
    """A running server; ``url`` is where."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self._process, self.url = process, url

    def resident_mib(self) -> float:
        """Memory in use, in MiB (Linux only)."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        [line] = [line for line in status.splitlines() if line.startswith("VmRSS")]
        return int(line.split()[1]) / 1024

    def metrics(self) -> dict[str, float]:
        """Every sample of ``/metrics`` by its name and labels."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}


@contextmanager
def server_process(*options: str, command: Sequence[str] = SERVE) -> Iterator[ServerProcess]:
    """Run ``idlm serve`` (or another ``command``) on a free port while the block runs."""
    command = [*command, "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        first = process.stderr.readline()
        if not first.startswith("Serving "):
            raise SystemExit(first + process.stderr.read())
        # Nobody reads the log, but a full pipe would hold the server up.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield ServerProcess(process, first.split()[-1])
    finally:
        process.terminate()
        process.wait()

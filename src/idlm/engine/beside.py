"""Two streams of one device: prompts run beside cycles.

Prompts run after all that came before the last cycle when they were launched (and after that cycle
if it took other prompts along), and beside it and the cycles after it, until one of them joins
(`Beside.join`). They never touch the same blocks: a request joins after its prompt; one that has
ended has no row in a cycle that is launched after its blocks were given back; and who gives back
blocks that a prompt may still write into joins first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Beside:
    """The order of what is launched on ``device``; elsewhere than on CUDA it is that of the host.

    All that works on one KV cache shares one of these.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        if self._cuda:
            self._stream, self._before = torch.cuda.Stream(device), torch.cuda.Event()
            self._cycles = torch.cuda.current_stream(device)
        self._apart = False  # whether prompts were launched that nothing waits for yet

    def join(self) -> None:
        """Let cycles that are launched from now on run after all prompts so far."""
        if self._apart:
            self._cycles.wait_stream(self._stream)
            self._apart = False

    def mark(self) -> None:
        """What is launched from now on is what the next prompts need not wait for."""
        if self._cuda:
            self._before.record(torch.cuda.current_stream(self._device))

    @contextmanager
    def prompts(self) -> Iterator[None]:
        """What is launched inside belongs to prompts."""
        if not self._cuda:
            yield
            return
        self._cycles = torch.cuda.current_stream(self._device)
        self._stream.wait_event(self._before)
        self._apart = True
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            self._apart = True  # who joined inside has not waited for what came after
